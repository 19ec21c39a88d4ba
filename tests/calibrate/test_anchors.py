from __future__ import annotations

import json
import re

import pytest

from calibrate.anchors import served_of
from calibrate.errors import compare
from replay.readers import read_trace

ROWS = {"TTFT": "ttft", "TPOT": "tpot", "Latency": "e2e"}
STATISTICS = {"Mean": "mean", "Median": "p50", "P90": "p90", "P95": "p95", "P99": "p99"}
LLAMA = "rtxpro6000-llama-3.1-8b"


def printed(folder) -> dict[tuple[str, str], str]:
    """What LLMServingSim's summary says vLLM measured, as printed, in ms; it counts from the queue stamp."""
    lines = re.findall(r"^(\w+) (\w+) +([\d.]+) ", (folder / "llmservingsim_summary.txt").read_text(), re.MULTILINE)
    found = {(ROWS[metric], STATISTICS[statistic]): figure for metric, statistic, figure in lines}
    assert len(found) == 15
    return found


def in_ms(levels) -> dict[tuple[str, str], str]:
    return {(metric, name): f"{1e3 * value:.1f}" for metric, own in levels.items() for name, value in own.items()}


@pytest.mark.parametrize("name", [LLAMA, "rtxpro6000-qwen3-32b-tp2", "rtxpro6000-qwen3-30b-a3b-dp2ep2"])
def test_measured_levels_are_to_the_digit_those_that_the_traces_authors_printed(traces, name):
    served = served_of(read_trace(traces / name), "queued")
    assert served.n == 300
    assert in_ms(served.levels) == printed(traces / name)


def test_a_report_by_the_queued_anchor_prints_the_authors_figures(called, traces):
    run = ("report", LLAMA, "--profile", "rtx-pro-6000-llama-3.1-8b", "--anchor", "queued")
    document = called(*run, "--format", "json", SERVECAL_TRACES=traces).json
    summary = printed(traces / LLAMA)

    assert in_ms(document["anchors"]["queued"]["served"]["levels"]) == summary
    # Without the cold first request, which is not scored; with it they are the table's own.
    assert document["coverage"]["excluded"] == {"warmup": 1}
    warm = called(*run, "--no-cold-start", "--format", "json", SERVECAL_TRACES=traces).json
    measured = {
        metric: {name: level["measured"] for name, level in warm["metrics"][metric]["percentiles"].items()}
        for metric in ROWS.values()
    }
    assert in_ms(measured) == summary

    text = called(*run, SERVECAL_TRACES=traces).out
    rows = [line.split("ms", 1)[1].split() for line in text.splitlines() if line.startswith("  all 300 measured, ms")]
    assert [[figure.replace(",", "") for figure in row] for row in rows] == [
        [summary[metric, name] for name in STATISTICS.values()] for metric in ROWS.values()
    ]
    assert "Latencies from the arrival are longer than those from the queue stamp by 22.8 ms on average" in text
    assert "wait for the step in flight" in text


def test_both_anchors_are_reported_whichever_is_chosen(make_trace):
    measured = make_trace([1.0, 2.0], [2.0, 4.0], queued=[0.5, 1.25])
    predicted = make_trace([1.0, 2.0], [2.0, 4.0])
    found = {anchor: compare(measured, predicted, anchor) for anchor in ("arrival", "queued")}

    for anchor, comparison in found.items():
        assert comparison.anchors == found["arrival"].anchors
        assert comparison.anchors[anchor].metrics["ttft"] == comparison.metrics["ttft"]
    anchors = found["arrival"].anchors
    assert anchors["arrival"].metrics["ttft"].bias == 0.0
    assert anchors["queued"].metrics["ttft"].percentiles["mean"].measured == pytest.approx((0.5 + 1.75) / 2)
    assert anchors["queued"].served.levels["e2e"]["mean"] == pytest.approx((1.5 + 3.75) / 2)
    gap = found["arrival"].anchor_gap
    assert (gap.n, gap.mean, gap.largest) == (2, pytest.approx(0.375), 0.5)
    assert "375.0 ms on average" in gap.sentence


def test_a_trace_with_one_clock_has_one_anchor(make_trace):
    found = compare(make_trace([1.0]), make_trace([1.0]))
    assert list(found.anchors) == ["arrival"]
    assert found.anchor_gap is None


def test_what_was_left_out_of_the_pairs_was_served(make_trace):
    measured = make_trace([1.0, 3.0, 9.0], ids=["a", "b", "c"], status=["ok", "ok", "failed"])
    found = compare(measured, make_trace([1.0], ids=["a"]))
    assert found.num_paired == 1
    served = found.anchors["arrival"].served
    assert (served.n, served.levels["ttft"]["mean"]) == (2, 2.0)
    json.dumps(served.levels)
