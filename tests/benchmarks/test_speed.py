"""How long the parts of a report take. `pytest tests/benchmarks --benchmark-enable`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from calibrate.errors import compare
from profiles.deployment import resolve
from profiles.import_bundle import import_bundle
from profiles.profile import load_profile
from replay.readers import read_trace
from replay.run import facts_of, replay

ROOT = Path(__file__).resolve().parents[2]
TRACES = Path(os.environ.get("SERVECAL_TRACES", ROOT / "../shared/traces"))
TABLES = Path(os.environ.get("SERVECAL_TABLES", ROOT / "../shared/operator_tables"))
TRACE = TRACES / "rtxpro6000-llama-3.1-8b"
BUNDLE = TABLES / "RTXPRO6000/meta-llama/Llama-3.1-8B/bf16"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    if not TRACE.is_dir() or not BUNDLE.is_dir():
        pytest.skip(f"{TRACE} or {BUNDLE} is absent (SERVECAL_TRACES, SERVECAL_TABLES)")
    output = tmp_path_factory.mktemp("profile") / "p.yaml"
    import_bundle(BUNDLE, 1, output)
    trace = read_trace(TRACE)
    return trace, resolve(load_profile(str(output)), facts_of(trace))


def test_reading_a_trace(benchmark):
    if not TRACE.is_dir():
        pytest.skip(f"{TRACE} is absent (SERVECAL_TRACES)")
    assert len(benchmark(read_trace, TRACE)) == 300


def test_replaying_300_requests(benchmark, run):
    trace, deployment = run
    assert benchmark(replay, trace, deployment, cold_start=False).summary["requests"] == 300


def test_comparing_300_requests(benchmark, run):
    trace, deployment = run
    predicted = replay(trace, deployment).predicted
    assert benchmark(lambda: compare(trace, predicted).metrics)["e2e"].n > 290
