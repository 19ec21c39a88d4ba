"""What the JSON and the text say of slices, distances, anchors and series."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from calibrate.load import POINTS
from calibrate.reports import json_report, text_report


@pytest.fixture(scope="module")
def made(make_trace, make_report):
    """A run whose late requests took twice as long as the profile's 10 ms a step, queued 2 ms after they came."""
    random = np.random.default_rng(0)
    arrival = np.cumsum(0.2 + 0.02 * random.random(200))
    ttft = np.where(np.arange(200) < 150, 0.010, 0.020) * np.exp(0.02 * random.normal(size=200))
    engine = {"version": "0.19.0", "arguments": {"max_num_seqs": 32, "max_num_batched_tokens": 1024}}
    return make_report(
        make_trace(
            ttft.tolist(),
            (ttft + 0.1).tolist(),
            arrival=arrival.tolist(),
            queued=(arrival + 0.002).tolist(),
            scheduled=(arrival + 0.003).tolist(),
            meta={"model": "me/mine", "engine": engine, "warmed_up": True},
        )
    )


@pytest.fixture(scope="module")
def document(made):
    return json.loads(json_report.render(made))


def text_of(report, width: int) -> list[str]:
    stream = io.StringIO()
    text_report.print_report(report, Console(file=stream, width=width, no_color=True, highlight=False))
    return stream.getvalue().splitlines()


def test_json_names_the_worst_slice_and_its_figures(document):
    (worst,) = [one for one in document["worst_slices"] if one["metric"] == "ttft"]
    assert worst["by"] == "arrival_s"
    assert worst["slice"]["n"] == 50
    assert worst["slice"]["mape"] == pytest.approx(0.5, abs=0.01)
    assert worst["slice"]["rest_mape"] == pytest.approx(0.016, abs=0.005)
    assert worst["slice"] in document["slices"]["ttft"]["arrival_s"]
    assert sum(one["n"] for one in document["slices"]["ttft"]["arrival_s"]) == 200


def test_json_has_the_distance_of_every_metric(document):
    assert set(document["distances"]) == set(document["metrics"])
    # A quarter of the requests lies 10 ms off a mean of 12.5 ms.
    assert document["distances"]["ttft"]["wasserstein"] == pytest.approx(0.2, abs=0.015)
    assert 0.25 <= document["distances"]["ttft"]["kolmogorov_smirnov"] <= 1


def test_json_has_both_anchors(document):
    assert document["anchor"] == "arrival"
    assert document["anchors"]["arrival"]["metrics"]["ttft"] == document["metrics"]["ttft"]
    queued = document["anchors"]["queued"]
    gap = document["anchor_gap"]["mean"]
    assert gap == pytest.approx(0.002)
    mean = document["metrics"]["ttft"]["percentiles"]["mean"]["measured"]
    assert queued["metrics"]["ttft"]["percentiles"]["mean"]["measured"] == pytest.approx(mean - gap)
    assert queued["served"]["n"] == 200


def test_json_has_a_bounded_number_of_points_of_each_series(document):
    assert set(document["series"]) == {"running", "waiting", "output_tokens_per_s"}
    for series in document["series"].values():
        assert series["source"] == "stamps"
        assert {len(series[side]) for side in ("time", "measured", "predicted")} == {POINTS}


def test_json_has_an_interval_of_the_throughput(document):
    for name, (low, high) in document["throughput_ci95"].items():
        assert low <= document["throughput"][name]["error"] <= high


@pytest.mark.parametrize("width", [80, 100])
def test_text_fits_the_terminal_and_says_what_stands_out(made, width):
    lines = text_of(made, width)
    assert max(map(len, lines)) <= width
    whole = " ".join(" ".join(lines).split())
    assert "…" not in whole
    assert "median bias distance" in whole
    assert "TTFT is worst for the 50 requests that arrived 32 to 42 s after the first: " in whole
    assert "mean error per request, counted from queued: TTFT" in whole
    assert "2.0 ms on average" in whole
