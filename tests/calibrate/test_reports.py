from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace

import pytest
from rich.console import Console

from calibrate.estimates import Compared
from calibrate.gates import Gate, Rules, judge
from calibrate.reports import json_report, text_report

ARGUMENTS = {"max_num_seqs": 32, "max_num_batched_tokens": 1024, "num_gpu_blocks": 999}


def measured_by_hand(make_trace, first: float = 0.011, **fields):
    """Five requests, 10 s apart, of 11 tokens 10 ms apart; the first may be slow."""
    ttft = [first, 0.010, 0.012, 0.010, 0.008]
    meta = {
        "model": "me/mine",
        "hardware": "abacus",
        "engine": {"version": "0.19.0", "arguments": ARGUMENTS},
        **fields.pop("meta", {}),
    }
    return make_trace(
        ttft,
        [one + 0.1 for one in ttft],
        arrival=[0.0, 10.0, 20.0, 30.0, 40.0],
        timeline={"time": [0.0, 10.05, 25.0], "running": [0.0, 1.0, 0.0]},
        meta=meta,
        **fields,
    )


def text_of(report, width: int = 120) -> str:
    """As a terminal shows it, runs of blanks as one."""
    stream = io.StringIO()
    text_report.print_report(report, Console(file=stream, width=width, no_color=True, highlight=False))
    return re.sub(r"\s+", " ", stream.getvalue())


def document_of(report) -> dict:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(json_report.render(report), parse_constant=refuse)


def test_json_has_what_the_contract_names(make_trace, make_report):
    document = document_of(make_report(measured_by_hand(make_trace)))

    assert document["schema"] == "servecal.report/1"
    assert {"trace", "profile", "coverage", "metrics", "throughput", "timeline", "gates", "verdict"} <= set(document)
    assert document["coverage"]["measured"] == document["coverage"]["paired"] == 5
    assert document["coverage"]["excluded"] == {}
    assert set(document["metrics"]) == {"ttft", "tpot", "e2e"}
    assert set(document["coverage"]["unsupported"]) == {"itl", "queue_time"}
    for errors in document["metrics"].values():
        assert set(errors) == {"n", "mape", "mape_ci95", "median_ape", "bias", "percentiles"}
        assert set(errors["percentiles"]) == {"mean", "p50", "p90", "p95", "p99"}
        for level in errors["percentiles"].values():
            assert set(level) == {"measured", "predicted", "error", "error_ci95"}
    assert set(document["throughput"]) == {"output_tokens_per_s", "makespan"}
    assert document["timeline"]["running"]["measured_mean"] == pytest.approx(1 / 3)


def test_json_figures_are_fractions_and_seconds(make_trace, make_report):
    """A step takes 10 ms: TTFTs of 11, 10, 12, 10 and 8 ms are off by -1/11, 0, -1/6, 0 and 1/4."""
    ttft = document_of(make_report(measured_by_hand(make_trace)))["metrics"]["ttft"]

    assert ttft["mape"] == pytest.approx((1 / 11 + 1 / 6 + 1 / 4) / 5)
    assert ttft["bias"] == pytest.approx((-1 / 11 - 1 / 6 + 1 / 4) / 5)
    assert ttft["median_ape"] == pytest.approx(1 / 11)
    assert ttft["percentiles"]["mean"]["measured"] == pytest.approx(0.0102)
    assert ttft["percentiles"]["mean"]["predicted"] == pytest.approx(0.010)
    assert ttft["percentiles"]["mean"]["error"] == pytest.approx(10.0 / 10.2 - 1)


def test_json_of_unmeasured_values_is_null_not_nan(make_trace, make_report):
    nan = math.nan
    one = make_trace(
        [nan, 0.01],
        [nan, 0.11],
        status=["failed", "ok"],
        meta={"model": "me/mine", "engine": {"version": "0.19.0", "arguments": ARGUMENTS}},
    )
    document = document_of(make_report(one))
    assert document["metrics"]["ttft"]["mape_ci95"] == [None, None]
    assert document["coverage"]["excluded"] == {"failed": 1}


def test_text_of_unmeasured_values_is_a_dash(make_trace, make_report):
    """Two requests of which nothing but the first token is known."""
    nan = math.nan
    meta = {"model": "me/mine", "engine": {"version": "0.19.0", "arguments": ARGUMENTS}}
    text = text_of(make_report(make_trace([0.01, 0.012], [nan, nan], meta=meta)))
    assert "output tokens/s: - measured" in text
    assert "nan" not in text.lower()


def test_json_names_trace_profile_and_how_the_replay_went(make_trace, make_report):
    trace = measured_by_hand(make_trace)
    document = document_of(make_report(trace, coefficients={"step": 1.5}))

    assert document["trace"]["digest"] == trace.digest()
    assert document["trace"]["engine"]["arguments"] == ARGUMENTS
    assert document["profile"]["coefficients"]["step"] == 1.5
    assert document["profile"]["accelerator"] == "linear"
    assert document["profile"]["engine"]["arguments"]["max_num_seqs"] == 32
    assert document["profile"]["assumed"]["block_size"] == 16
    assert document["simulation"]["iterations"] == 5 * 11


def test_same_report_renders_to_the_same_bytes(make_trace, make_report):
    one, two = (make_report(measured_by_hand(make_trace)) for _ in range(2))
    assert json_report.render(one) == json_report.render(two)
    assert text_of(one) == text_of(two)


def test_conflicts_are_told(make_trace, make_report):
    report = make_report(measured_by_hand(make_trace))
    sentence = "engine.max_num_seqs: profile says 64, trace says 32; trace is used"
    assert sentence in document_of(report)["conflicts"]
    assert f"conflict: {sentence}" in text_of(report)


def test_assumptions_are_told(make_trace, make_report):
    text = text_of(make_report(measured_by_hand(make_trace), host={}))
    assert "assumed: " in text
    assert "block_size=16" in text
    assert "enable_prefix_caching=True" in text
    assert "assumed: host overhead 0.4 ms per step" in text


def test_host_time_that_was_measured_is_not_called_assumed(make_trace, make_report):
    assert "host overhead" not in text_of(make_report(measured_by_hand(make_trace)))


def test_cold_start_is_told_and_its_request_not_scored(make_trace, make_report):
    report = make_report(measured_by_hand(make_trace, first=2.5))
    document = document_of(report)

    assert document["cold_start"]["request"] == "0"
    assert document["cold_start"]["seconds"] == pytest.approx(2.49)
    assert document["coverage"]["excluded"] == {"warmup": 1}
    text = text_of(report)
    assert "cold start: the first request (0) took 2.500 s to its first token" in text
    assert "0.010 s" in text
    assert "4 of 5 requests compared (left out: 1 warmup)" in text


def test_cold_start_that_was_not_asked_for_is_not_told(make_trace, make_report):
    report = make_report(measured_by_hand(make_trace, first=2.5), cold_start=False)
    assert document_of(report)["cold_start"] is None
    assert "cold start" not in text_of(report)
    assert report.comparison.num_paired == 5


def test_text_has_the_headline_errors_levels_and_components(make_trace, make_report):
    report = make_report(measured_by_hand(make_trace))
    text = text_of(report)

    assert report.headline in text
    assert report.headline.startswith("Mean error per request: TTFT 10.2 %, TPOT 0.0 %, E2E ")
    assert "me/mine, vLLM 0.19.0, 5 requests" in text
    assert "TTFT 5 10.15 %" in text
    assert "ITL - not measured" in text
    assert "TTFT measured, ms 10.20" in text
    assert "time in step 100.0 %" in text
    assert "nan" not in text.lower()


def test_headline_says_which_way_a_biased_prediction_errs(make_trace, make_report):
    slow = make_report(measured_by_hand(make_trace), coefficients={"step": 2.0})
    fast = make_report(measured_by_hand(make_trace), coefficients={"step": 0.5})
    assert "Predicted E2E is 100 % too long on average." in slow.headline
    assert "Predicted E2E is 50 % too short on average." in fast.headline


def test_datasheet_profile_says_that_nothing_was_measured(make_trace, make_report):
    trace = measured_by_hand(make_trace)
    datasheet = {"model": "llama-3.1-8b", "hardware": "h100-sxm", "accelerator": {"kind": "roofline"}}
    assert "This profile is a datasheet" in make_report(trace, **datasheet).headline
    fitted = make_report(trace, coefficients={"weight_traffic": 1.2}, **datasheet)
    assert "datasheet" not in fitted.headline


def test_latencies_measured_at_a_client_are_called_so(make_trace, make_report):
    report = make_report(measured_by_hand(make_trace, meta={"vantage": "client", "notes": ["half of it is guessed"]}))
    text = text_of(report)
    assert "note: measured at the client" in text
    assert "note: half of it is guessed" in text


def test_prompts_that_a_server_would_refuse_are_told(make_trace, make_report):
    trace = measured_by_hand(make_trace, prompt_tokens=[100, 100, 100, 100, 5000])
    report = make_report(trace, ("engine.max_model_len=1000",))
    assert "1 prompts are longer than max_model_len" in text_of(report)
    assert report.comparison.coverage["excluded"] == {"not_predicted": 1}


def test_names_that_look_like_markup_are_shown_as_they_are(make_trace, make_report):
    report = make_report(measured_by_hand(make_trace, meta={"name": "[bold]run[/bold]", "model": "[red]m[/]"}))
    assert "[bold]run[/bold] [red]m[/], vLLM" in text_of(report)


@pytest.mark.parametrize("width", [80, 120])
def test_gates_are_told_and_not_cut_off(make_trace, make_report, width):
    report = make_report(measured_by_hand(make_trace))
    rules = Rules((Gate("throughput", "output_tokens_per_s", 0.05), Gate("itl", "p99", 0.1)), baseline="old")
    figures = Compared(report.comparison)
    judged = replace(report, judgement=judge(figures, rules, figures, "as it was"))
    text = text_of(judged, width)
    assert "…" not in text
    assert "Gates: inconclusive (itl.p99)." in judged.headline
    assert "itl.p99: cannot be judged" in text
    assert "noise: as it was; the baseline is of the same run" in text
    document = document_of(judged)
    assert (document["verdict"], document["gates"][0]["metric"]) == ("inconclusive", "coverage")


@pytest.mark.parametrize("width", [80, 120])
def test_no_figure_is_cut_off_on_a_terminal_of_that_width(make_trace, make_report, width):
    text = text_of(make_report(measured_by_hand(make_trace)), width)
    assert "…" not in text
    assert "output tokens/s: 1.4 measured, 1.4 predicted" in text
