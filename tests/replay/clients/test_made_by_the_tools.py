"""Real files of the tools, against what the server that they talked to logged (``made/README.md``)."""

import json
from pathlib import Path

import numpy as np
import pytest

from replay.readers import READERS, read_trace

MADE = Path(__file__).parent / "made"
SERVED = json.loads((MADE / "served.json").read_text())
FORMATS = {
    "aiperf.jsonl": "aiperf",
    "aiperf_raw.jsonl": "aiperf",
    "guidellm.json": "guidellm",
    "inference_perf.json": "inference-perf",
    "vllm.jsonl": "vllm-bench",
}
FIRST, NEXT = 0.02, 0.005
"""Seconds that the server waited before the first token, and before each after it."""


@pytest.mark.parametrize("name", FORMATS)
def test_exactly_one_reader_knows_it(name):
    assert [reader.FORMAT for reader in READERS if reader.detect(MADE / name)] == [FORMATS[name]]


@pytest.mark.parametrize("name", SERVED)
def test_tokens_are_those_that_the_server_counted(name):
    file, _, selection = name.partition("#")
    trace = read_trace(MADE / file, selection or None)
    rows = {row["id"]: row for row in trace.requests.to_pylist()}
    served = {key: [row["prompt_tokens"], row["output_tokens"]] for key, row in rows.items() if row["status"] == "ok"}
    assert served == SERVED[name]
    assert set(trace.statuses) == {"ok", "failed"}


@pytest.mark.parametrize("name", SERVED)
def test_no_time_is_shorter_than_the_server_took(name):
    file, _, selection = name.partition("#")
    trace = read_trace(MADE / file, selection or None)
    ok = trace.statuses == "ok"
    ttft, tpot = trace.latency("ttft")[ok], trace.latency("tpot")[ok]
    assert (ttft > FIRST).all()
    assert ttft.max() < 3 * FIRST
    # A first token that came late on its way makes the gap after it shorter.
    assert np.median(tpot) > NEXT
    assert tpot.max() < 2 * NEXT


def test_raw_records_and_records_of_one_run_agree():
    records, raw = read_trace(MADE / "aiperf.jsonl"), read_trace(MADE / "aiperf_raw.jsonl")
    assert records.ids == raw.ids
    for metric in ("ttft", "tpot", "e2e"):
        np.testing.assert_allclose(records.latency(metric), raw.latency(metric), atol=1e-6)
