"""A report of a million requests, in seconds of CPU time; of fewer without `--benchmark-enable`."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from calibrate.cli.options import render_text
from calibrate.errors import compare
from calibrate.reports import json_report, text_report
from calibrate.reports.report import Report
from profiles.deployment import resolve
from profiles.profile import LoadedProfile, Profile
from replay.run import Replay, facts_of
from replay.trace import REQUESTS, Trace

TOKENS = 8
MOST_SECONDS, MOST_BYTES = 20.0, 2e9


def served(count: int, noise: float, seed: int) -> Trace:
    """Arrivals, lengths and load of one workload; latencies differ by ``noise`` from seed to seed."""
    workload, engine = np.random.default_rng(0), np.random.default_rng(seed)
    arrival = np.cumsum(workload.exponential(1 / 50, count))
    prompt = workload.integers(10, 4000, count)
    swell = np.convolve(workload.normal(size=count), np.ones(200) / 14, mode="same")
    cached = prompt * (workload.random(count) < 0.3) // 2
    scheduled = arrival + 0.01 + np.maximum(0.0, 0.2 + 0.2 * swell) * np.exp(noise * engine.normal(size=count))
    first = scheduled + 0.02 + 1e-5 * prompt
    gaps = workload.gamma(8, 0.03 / 8, (count, TOKENS - 1)) * np.exp(noise * engine.normal(size=(count, 1)))
    times = np.column_stack([first, first[:, None] + np.cumsum(gaps, axis=1)])
    columns = {
        "id": pa.array(np.arange(count)).cast(pa.string()),
        "status": pa.array(["ok"] * count),
        "arrival": arrival,
        "queued": arrival + 0.01 * workload.random(count),
        "scheduled": scheduled,
        "first_token": first,
        "last_token": times[:, -1],
        "token_times": pa.ListArray.from_arrays(np.arange(count + 1, dtype=np.int32) * TOKENS, times.reshape(-1)),
        "prompt_tokens": prompt,
        "output_tokens": np.full(count, TOKENS),
        "cached_tokens": cached,
    }
    arrays = [
        pa.array(columns[one.name]).cast(one.type) if one.name in columns else pa.nulls(count, one.type)
        for one in REQUESTS
    ]
    engine_meta = {"name": "vllm", "version": "0.19.0", "arguments": {"max_num_seqs": 128}}
    meta = {"name": "synthetic", "model": "me/mine", "clock": {"kind": "run"}, "engine": engine_meta}
    return Trace(pa.table(arrays, schema=REQUESTS), meta)


@pytest.fixture(scope="module")
def deployment():
    engine = {"version": "0.19.0", "max_num_seqs": 128, "max_num_batched_tokens": 2048, "num_gpu_blocks": 9999}
    document = {"name": "ten-ms", "accelerator": {"kind": "linear", "seconds": {"step": 0.01}}, "engine": engine}
    loaded = LoadedProfile(Profile.model_validate(document), Path(), "0" * 64, "ten-ms.yaml")
    return resolve(loaded, facts_of(served(1000, 0.0, 0)))


SUMMARY = {
    **dict.fromkeys(("requests", "left_out", "rejected", "iterations", "prompt_tokens", "cached_tokens"), 0),
    **{"simulated_seconds": 1.0, "device_busy": 1.0, "component_seconds": {"step": 1.0}},
    **{"preemptions": 0, "outside_domain": None},
}


@pytest.mark.benchmark(timer=time.process_time)
def test_reporting_a_million_requests(benchmark, deployment):
    count = 1_000_000 if benchmark.enabled else 20_000
    measured, predicted = served(count, 0.10, 1), served(count, 0.12, 2)

    def report() -> tuple[str, str | None]:
        made = Report(measured, deployment, Replay(predicted, SUMMARY), compare(measured, predicted))
        return json_report.render(made), render_text(text_report.view(made), Path("report.txt"))

    document, text = benchmark.pedantic(report, rounds=1)
    found = json.loads(document)
    assert len(document) < 150_000
    assert text is not None
    assert found["coverage"]["paired"] == count
    assert found["metrics"]["itl"]["n"] > 0.99 * (TOKENS - 1) * count
    for metric in found["metrics"].values():
        low, high = metric["mape_ci95"]
        assert low < metric["mape"] < high
        for level in metric["percentiles"].values():
            low, high = level["error_ci95"]
            assert low < level["error"] < high
    assert found["metrics"]["tpot"]["mape"] == pytest.approx(np.sqrt(2 / np.pi) * np.hypot(0.10, 0.12), rel=0.05)
    if benchmark.enabled:
        benchmark.extra_info["peak_bytes"] = peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert peak < MOST_BYTES
        assert benchmark.stats.stats.max < MOST_SECONDS
