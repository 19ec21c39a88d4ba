"""Accuracy on real GPU traces: with measured operator tables, nothing fitted; and of fits, held out."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from calibrate.cli.options import load_trace
from calibrate.errors import compare
from calibrate.holdout import hold_out, mean_errors
from profiles.deployment import resolve
from profiles.import_bundle import import_bundle
from profiles.profile import load_profile
from replay.arrivals import with_arrivals
from replay.readers import read_trace
from replay.run import facts_of, replay

ROOT = Path(__file__).resolve().parents[2]
TRACES = Path(os.environ.get("SERVECAL_TRACES", ROOT / "../shared/traces"))
TABLES = Path(os.environ.get("SERVECAL_TABLES", ROOT / "../shared/operator_tables"))

LLAMA = ("rtxpro6000-llama-3.1-8b", "RTXPRO6000/meta-llama/Llama-3.1-8B/bf16", 1)
QWEN = ("rtxpro6000-qwen3-32b-tp2", "RTXPRO6000/Qwen/Qwen3-32B/bf16", 2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Trace and profile by name, read once."""
    loaded = {}

    def get(case):
        name, bundle, degree = case
        if not (TRACES / name).is_dir() or not (TABLES / bundle).is_dir():
            pytest.skip(f"{name} or its tables are not in {TRACES}, {TABLES} (SERVECAL_TRACES, SERVECAL_TABLES)")
        if name not in loaded:
            output = tmp_path_factory.mktemp(name) / "p.yaml"
            import_bundle(TABLES / bundle, degree, output)
            loaded[name] = read_trace(TRACES / name), load_profile(str(output))
        return loaded[name]

    return get


@pytest.mark.parametrize(
    ("case", "limits"),
    [
        pytest.param(LLAMA, {"ttft": 0.065, "tpot": 0.015, "e2e": 0.013}, id="llama-3.1-8b"),
        pytest.param(QWEN, {"ttft": 0.025, "tpot": 0.016, "e2e": 0.016}, id="qwen3-32b-tp2"),
    ],
)
def test_operator_tables_predict_every_request_within_the_limits(runs, case, limits):
    trace, profile = runs(case)
    replayed = replay(trace, resolve(profile, facts_of(trace)))
    metrics = compare(trace, replayed.predicted).metrics
    assert {name: metrics[name].mape for name in limits} == {
        name: pytest.approx(0, abs=limits[name]) for name in limits
    }


@pytest.mark.parametrize(
    ("case", "tolerance"), [pytest.param(LLAMA, 5e-4, id="llama"), pytest.param(QWEN, 3e-3, id="qwen")]
)
def test_the_published_simulation_is_reproduced_by_its_own_rules(runs, case, tolerance):
    # LLMServingSim: synchronous, no host time, the workload's nominal arrivals.
    trace, profile = runs(case)
    nominal = with_arrivals(trace, "nominal")
    rules = ("engine.async_scheduling=false", "host.per_step=0", "host.per_sequence=0")
    predicted = replay(nominal, resolve(profile, facts_of(nominal), settings=rules), cold_start=False).predicted
    published = (TRACES / case[0] / "llmservingsim_summary.txt").read_text()
    for label, metric in (("TTFT", "ttft"), ("TPOT", "tpot"), ("Latency", "e2e")):
        values = 1e3 * predicted.latency(metric)
        ours = {"Mean": values.mean(), "Median": np.median(values)}
        ours |= {f"P{at}": np.percentile(values, at) for at in (90, 95, 99)}
        for statistic, value in ours.items():
            line = next(line for line in published.splitlines() if line.startswith(f"{label} {statistic} "))
            # The summary is rounded to 0.1 ms.
            assert value == pytest.approx(float(line.split()[3]), rel=tolerance, abs=0.051), line


def test_queued_anchor_gives_the_published_measured_side(runs):
    trace, _ = runs(LLAMA)
    published = (TRACES / LLAMA[0] / "llmservingsim_summary.txt").read_text()
    for label, metric in (("TTFT", "ttft"), ("TPOT", "tpot"), ("Latency", "e2e")):
        values = 1e3 * trace.latency(metric, "arrival" if metric == "tpot" else "queued")
        line = next(line for line in published.splitlines() if line.startswith(f"{label} Mean "))
        assert values.mean() == pytest.approx(float(line.split()[2]), abs=0.051)


def test_the_asynchronous_loop_halves_the_error_of_the_first_token(runs):
    trace, profile = runs(LLAMA)

    def ttft(*settings):
        replayed = replay(trace, resolve(profile, facts_of(trace), settings=settings))
        return compare(trace, replayed.predicted).metrics["ttft"].mape

    assert ttft() < 0.5 * ttft("engine.async_scheduling=false")


def test_a_datasheet_is_too_fast_and_the_report_says_so(runs):
    from calibrate.reports.report import Report

    trace, _ = runs(LLAMA)
    deployment = resolve(load_profile("roofline:rtx-pro-6000"), facts_of(trace))
    replayed = replay(trace, deployment)
    comparison = compare(trace, replayed.predicted)
    assert comparison.metrics["e2e"].bias < -0.1
    headline = Report(trace, deployment, replayed, comparison).headline
    assert "too short on average" in headline
    assert "datasheet" in headline


def test_the_prefix_cache_finds_what_the_reference_found(runs):
    trace, profile = runs(LLAMA)
    summary = replay(trace, resolve(profile, facts_of(trace))).summary
    assert (summary["cached_tokens"], summary["prompt_tokens"]) == (19_520, 257_239)


def test_running_and_waiting_follow_the_measured_gauges(runs):
    trace, profile = runs(LLAMA)
    timeline = compare(trace, replay(trace, resolve(profile, facts_of(trace))).predicted).timeline
    assert timeline["running"]["mae"] < 2
    assert timeline["waiting"]["mae"] < 2
    assert "kv_usage" not in timeline


def test_a_fit_at_16_requests_a_second_predicts_32_from_what_clients_saw(monkeypatch):
    """vLLM 0.6.3 (V0) on eight H100, client-side times, arrivals as the catalogue says they were drawn."""
    name = "h100x8-llama-3.1-405b-fp8"
    if not (TRACES / name).is_dir():
        pytest.skip(f"{name} is not in {TRACES} (SERVECAL_TRACES)")
    monkeypatch.setenv("SERVECAL_TRACES", str(TRACES))
    base = load_profile("roofline:h100-sxm")
    traces = [load_trace(f"{name}/{run}.json", "catalogue") for run in ("qps16", "qps32")]
    runs = [(trace, resolve(base, facts_of(trace))) for trace in traces]
    [(fit, comparisons)] = hold_out(runs, f"trace:{name}/qps32.json", None)
    assert fit.misplaced_ < 0.05 * len(traces[0])
    errors = mean_errors(comparisons)
    assert errors["ttft"]["n"] == 622
    assert errors["ttft"]["mape"] < 0.05
    assert errors["tpot"]["mape"] < 0.03
    assert errors["e2e"]["mape"] < 0.02


ROOFLINE = "roofline:rtx-pro-6000"


@pytest.mark.parametrize(
    ("cases", "base", "scheme", "most"),
    [
        pytest.param((LLAMA,), ROOFLINE, "time:0.5", (0.006, 0.013, 0.008), id="Llama, roofline"),
        pytest.param((LLAMA,), "tables", "time:0.5", (0.01, 0.008, 0.005), id="Llama, operator tables"),
        pytest.param((QWEN,), ROOFLINE, "time:0.5", (0.01, 0.015, 0.006), id="Qwen3, roofline"),
        pytest.param((LLAMA, QWEN), ROOFLINE, f"trace:{QWEN[0]}", (0.08, 0.05, 0.05), id="Llama to Qwen3"),
    ],
)
def test_held_out_errors_of_fits(runs, cases, base, scheme, most):
    """The goals are 1/1/0.6, 1/0.8/0.5, 1/1.5/0.6 and 8/4/4 %; first and last miss one by a tenth of a point."""
    loaded = [runs(case) for case in cases]
    fitted = [
        (trace, resolve(profile if base == "tables" else load_profile(base), facts_of(trace)))
        for trace, profile in loaded
    ]
    [(fit, comparisons)] = hold_out(fitted, scheme, None)
    assert fit.misplaced_ <= 2
    errors = mean_errors(comparisons)
    for metric, limit in zip(("ttft", "tpot", "e2e"), most, strict=True):
        assert errors[metric]["mape"] < limit
