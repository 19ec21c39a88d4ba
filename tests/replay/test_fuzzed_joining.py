"""Whatever sources hold, they are joined or refused in words; nothing is lost, and time does not run back."""

import json
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from profiles.errors import InputError
from replay.joining import join
from replay.missing import missing
from replay.trace import TIMELINE, Trace, check_requests, requests_table

SPANS = st.sampled_from([0.0, 0.1, 10.0, 1e4, 1e9])


def a_trace(seed, number, span, vantage, clock, origin):
    """Some requests with some columns; lengths are often those of the other sources."""
    random = np.random.default_rng([seed, number])
    shared = np.random.default_rng(seed)
    count = int(random.integers(0, 12))
    rows = random.permutation(12)[:count]
    prompts, outputs = shared.integers(1, 9, 12) * 100, shared.integers(1, 5, 12)
    begin = np.sort(shared.uniform(0, max(span, 1e-3), 12))
    gaps = random.exponential(0.1, (5, 12)).cumsum(axis=0)
    names = ("arrival", "queued", "scheduled", "first_token", "last_token")
    stamps = {
        name: np.where(random.random(12) < 0.1, np.nan, begin + gap)[rows]
        for name, gap in zip(names, gaps, strict=True)
        if random.random() < 0.7
    }
    if "arrival" not in stamps and clock == "run":
        stamps["nominal_arrival"] = begin[rows]
    forms = ("r{}", "cmpl-{}-0", "{}", "x")
    form = forms[int(random.integers(0, 3))]
    columns = {
        "id": [form.format(row) for row in rows],
        "status": random.choice(["ok", "failed", "unfinished"], count).tolist(),
        "prompt_tokens": (prompts + (random.random(12) < 0.05))[rows].tolist(),
        "output_tokens": outputs[rows].tolist(),
        "token_times": [sorted(random.uniform(0, 1, 3).tolist()) for _ in rows] if random.random() < 0.5 else None,
        **stamps,
    }
    timeline = None
    if random.random() < 0.5:
        samples = int(random.integers(1, 9))
        gauges = {one.name: random.integers(0, 4, samples).astype(float) for one in TIMELINE}
        gauges["time"] = np.sort(random.uniform(0, max(span, 1.0), samples))
        timeline = pa.table([pa.array(gauges[one.name]) for one in TIMELINE], schema=TIMELINE)
    meta = {
        "name": f"source {number}",
        "clock": {"kind": clock, "origin": origin},
        "vantage": vantage,
        "engine": {"name": "vllm", "version": None, "arguments": {"max_num_seqs": int(random.integers(1, 3))}},
        "source": {"format": "made", "files": []},
    }
    return Trace(requests_table({k: v for k, v in columns.items() if v is not None}, count), meta, timeline=timeline)


SOURCES = st.lists(
    st.tuples(
        SPANS,
        st.sampled_from(["engine", "client", "call", None]),
        st.sampled_from(["run", "run", "request"]),
        st.sampled_from([0.0, 5000.0, 1.76e9]),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=150)
@given(st.integers(0, 2**32 - 1), SOURCES, st.sampled_from([None, "engine", "client"]))
def test_any_sources_are_joined_or_refused_in_words(seed, sources, vantage):
    traces = [a_trace(seed, number, *one) for number, one in enumerate(sources)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            joined = join(traces, vantage)
        except InputError:
            return
    json.dumps(joined.meta, allow_nan=False)
    missing(joined)
    if len(joined) and len(traces) > 1:
        check_requests(joined, Path("joined"))
        assert len(joined) >= max(len(one) for one in traces if one.meta["name"] == joined.name)
