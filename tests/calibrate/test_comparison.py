from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ks_2samp, wasserstein_distance

from calibrate.errors import METRICS, PERCENTILES, Comparison, compare
from profiles.errors import InputError


def test_errors_of_three_requests_by_hand(make_trace):
    """TTFT off by +10 %, -10 % and 0."""
    found = compare(make_trace([1.0, 2.0, 4.0]), make_trace([1.1, 1.8, 4.0])).metrics["ttft"]

    assert found.n == 3
    assert found.mape == pytest.approx(0.2 / 3)
    assert found.median_ape == pytest.approx(0.1)
    assert found.bias == pytest.approx(0.0, abs=1e-12)
    # Linear between order statistics: p90 of three values lies 0.8 of the way from the second to the third.
    by_hand = {
        "mean": (7.0 / 3, 6.9 / 3),
        "p50": (2.0, 1.8),
        "p90": (3.6, 3.56),
        "p95": (3.8, 3.78),
        "p99": (3.96, 3.956),
    }
    assert set(found.percentiles) == set(by_hand) == set(PERCENTILES)
    for name, (measured, predicted) in by_hand.items():
        level = found.percentiles[name]
        assert (level.measured, level.predicted) == pytest.approx((measured, predicted))
        assert level.error == pytest.approx(predicted / measured - 1)


def test_bias_keeps_the_sign_that_mape_loses(make_trace):
    found = compare(make_trace([1.0, 2.0, 4.0]), make_trace([0.9, 1.6, 3.6])).metrics["ttft"]
    assert found.mape == pytest.approx(0.4 / 3)
    assert found.bias == pytest.approx(-0.4 / 3)
    assert found.median_ape == pytest.approx(0.1)


def test_tpot_is_the_mean_gap_after_the_first_token(make_trace):
    """Measured (3 - 1) / 10 s a token, predicted (3.4 - 1.2) / 10; a single token has no gap."""
    measured = make_trace([1.0, 1.0], [3.0, 1.0], output_tokens=[11, 1])
    predicted = make_trace([1.2, 1.0], [3.4, 1.0], output_tokens=[11, 1])
    found = compare(measured, predicted).metrics["tpot"]

    assert found.n == 1
    assert found.mape == pytest.approx(0.1)
    assert found.percentiles["mean"].measured == pytest.approx(0.2)


def test_e2e_counts_from_arrival_to_last_token(make_trace):
    found = compare(make_trace([1.0, 1.0], [4.0, 8.0]), make_trace([1.0, 1.0], [5.0, 8.0])).metrics["e2e"]
    assert found.mape == pytest.approx(0.125)
    assert found.percentiles["mean"].measured == pytest.approx(6.0)


def test_requests_are_paired_by_id_whatever_their_row(make_trace):
    measured = make_trace([1.0, 2.0, 4.0], ids=["a", "b", "c"])
    predicted = make_trace([4.0, 1.1, 1.8], ids=["c", "a", "b"], arrival=[2.0, 0.0, 1.0])
    found = compare(measured, predicted)

    assert found.metrics["ttft"].bias == pytest.approx(0.0, abs=1e-12)
    assert found.metrics["ttft"].mape == pytest.approx(0.2 / 3)
    assert [values.tolist() for values in found.pairs("ttft")] == [[1.0, 2.0, 4.0], pytest.approx([1.1, 1.8, 4.0])]


def test_pairs_come_in_order_of_arrival(make_trace):
    measured = make_trace([1.0, 2.0, 4.0], arrival=[5.0, 0.0, 2.0])
    assert compare(measured, measured).pairs("ttft")[0].tolist() == [2.0, 4.0, 1.0]


def test_what_is_left_out_is_counted_by_reason(make_trace):
    measured = make_trace(
        [1.0] * 7,
        ids=["cold", "failed", "unfinished", "silent", "stranger", "dropped", "fine"],
        status=["ok", "failed", "unfinished", "silent", "ok", "ok", "ok"],
    )
    predicted = make_trace(
        [2.0] * 7,
        ids=["cold", "failed", "unfinished", "silent", "dropped", "fine", "ghost"],
        status=["ok", "ok", "ok", "ok", "failed", "ok", "ok"],
        meta={"cold_start": {"request": "cold", "measured_ttft": 1.0, "predicted_ttft": 0.1, "seconds": 0.9}},
    )
    found = compare(measured, predicted)

    assert found.num_paired == 1
    assert found.pairs("ttft")[0].tolist() == [1.0]
    assert {key: found.coverage[key] for key in ("measured", "predicted", "paired", "excluded")} == {
        "measured": 7,
        "predicted": 6,
        "paired": 1,
        "excluded": {
            "failed": 1,
            "not_predicted": 1,
            "only_predicted": 1,
            "silent": 1,
            "unfinished": 1,
            "unpaired": 1,
            "warmup": 1,
        },
    }


def test_requests_can_be_left_out_for_a_reason_of_the_callers(make_trace):
    measured = make_trace([1.0, 2.0, 3.0])
    found = Comparison(measured, measured, exclude={"outlier": frozenset(["1", "9"])})
    assert found.num_paired == 2
    assert found.coverage["excluded"] == {"outlier": 1}


def test_nothing_to_compare_is_refused_with_the_reasons(make_trace):
    measured = make_trace([1.0, 1.0, 1.0], status=["failed", "failed", "ok"])
    predicted = make_trace([1.0], ids=["other"])
    with pytest.raises(InputError, match=r"by-hand: no request can be compared \(.*2 failed.*1 unpaired"):
        compare(measured, predicted)


def test_requests_without_a_stamp_count_only_where_they_have_it(make_trace):
    nan = math.nan
    measured = make_trace([1.0, nan, 2.0, 4.0], [2.0, 2.0, nan, 8.0])
    predicted = make_trace([1.5, 1.0, 2.0, nan], [2.0, 3.0, 4.0, 8.0])
    found = compare(measured, predicted)

    # TTFT: requests 0 and 2; E2E: 0, 1 and 3; TPOT: 0 alone.
    assert found.num_paired == 4
    assert (found.metrics["ttft"].n, found.metrics["ttft"].mape) == (2, pytest.approx(0.25))
    assert (found.metrics["e2e"].n, found.metrics["e2e"].mape) == (3, pytest.approx(0.5 / 3))
    assert (found.metrics["tpot"].n, found.metrics["tpot"].mape) == (1, pytest.approx(0.5))
    assert found.metrics["ttft"].percentiles["mean"].measured == pytest.approx(1.5)


def test_metrics_that_a_side_lacks_are_absent_and_explained(make_trace):
    nan = math.nan
    found = compare(make_trace([nan, nan], [1.0, 2.0]), make_trace([1.0, 2.0], [1.0, 2.0]))

    assert set(found.metrics) == {"e2e"}
    assert set(found.unsupported) == {"ttft", "tpot", "itl", "queue_time"}
    assert found.unsupported["itl"] == "the measured and the predicted trace has no token times"
    assert found.coverage["unsupported"] == found.unsupported


def test_metric_that_no_request_has_on_both_sides_is_absent(make_trace):
    nan = math.nan
    found = compare(make_trace([1.0, nan], [2.0, 2.0]), make_trace([nan, 1.0], [2.0, 2.0]))
    assert "ttft" not in found.metrics
    assert found.unsupported["ttft"] == "no request has it on both sides"


def served(make_trace, seconds, **columns):
    """A trace with every stamp, queued 10 ms after the arrival and scheduled half way to the first token."""
    count = len(seconds)
    begin = np.arange(count, dtype=float)
    ttft = np.array(seconds)
    return make_trace(
        list(ttft),
        queued=list(begin + 0.01),
        scheduled=list(begin + ttft / 2),
        token_times=[[at + one, at + one + 0.5, at + one + 1.0] for at, one in zip(begin, ttft, strict=True)],
        output_tokens=[3] * count,
        **columns,
    )


def test_identical_traces_have_no_errors(make_trace):
    same = served(make_trace, [0.3, 1.0, 0.7, 2.0], timeline={"time": [0.0, 1.0], "running": [1.0, 3.0]})
    found = compare(same, same)

    assert set(found.metrics) == set(METRICS)
    for errors in found.metrics.values():
        assert (errors.mape, errors.median_ape, errors.bias) == (0.0, 0.0, 0.0)
        assert errors.mape_ci95 == (0.0, 0.0)
        assert {level.error for level in errors.percentiles.values()} == {0.0}
    assert {one["error"] for one in found.throughput.values()} == {0.0}
    assert found.timeline["running"]["mae"] == 0.0


@given(seconds=st.lists(st.floats(0.02, 100), min_size=1, max_size=30), factor=st.floats(0.1, 10), data=st.data())
def test_a_constant_factor_is_every_error_and_row_order_does_not_matter(make_trace, seconds, factor, data):
    order = data.draw(st.permutations(range(len(seconds))))
    arrivals = [float(place) for place in range(len(seconds))]
    measured = make_trace(seconds)
    predicted = make_trace(
        [factor * seconds[place] for place in order],
        ids=[str(place) for place in order],
        arrival=[arrivals[place] for place in order],
    )
    errors = compare(measured, predicted).metrics["ttft"]

    assert errors.n == len(seconds)
    assert errors.bias == pytest.approx(factor - 1, abs=1e-9)
    assert errors.mape == pytest.approx(abs(factor - 1), abs=1e-9)
    assert errors.median_ape == pytest.approx(abs(factor - 1), abs=1e-9)
    for level in errors.percentiles.values():
        assert level.error == pytest.approx(factor - 1, abs=1e-9)


@given(shift=st.floats(-1e5, 1e5))
def test_where_the_clock_starts_does_not_matter(make_trace, shift):
    measured, predicted = make_trace([1.0, 2.0, 4.0]), make_trace([1.5, 2.5, 3.0])
    moved = make_trace([1.0, 2.0, 4.0], arrival=[shift, shift + 1, shift + 2])
    here, there = (compare(one, predicted) for one in (measured, moved))
    assert there.metrics["ttft"].mape == pytest.approx(here.metrics["ttft"].mape, abs=1e-6)
    assert there.throughput["makespan"]["measured"] == pytest.approx(here.throughput["makespan"]["measured"], abs=1e-6)


def test_queued_anchor_moves_the_measured_side_only(make_trace):
    measured = make_trace([1.0, 2.0], [2.0, 4.0], queued=[0.5, 1.5])
    predicted = make_trace([1.0, 2.0], [2.0, 4.0], queued=[0.25, 1.25])
    by_arrival, by_queue = compare(measured, predicted), compare(measured, predicted, "queued")

    assert by_arrival.metrics["ttft"].mape == 0.0
    assert by_queue.pairs("ttft")[0].tolist() == [0.5, 1.5]
    assert by_queue.pairs("ttft")[1].tolist() == [1.0, 2.0]
    assert by_queue.pairs("e2e")[0].tolist() == [1.5, 3.5]
    assert by_queue.metrics["ttft"].bias == pytest.approx((1.0 + 1 / 3) / 2)
    assert by_queue.metrics["tpot"] == by_arrival.metrics["tpot"]


def test_queued_anchor_without_queue_stamps_is_refused(make_trace):
    with pytest.raises(InputError, match="no queue stamps") as caught:
        compare(make_trace([1.0]), make_trace([1.0]), "queued")
    assert caught.value.field == "--anchor"


def test_tiny_queue_times_are_left_out_of_relative_errors_and_kept_in_percentiles(make_trace):
    measured = make_trace([1.0] * 3, scheduled=[0.0001, 1.1, 2.3])
    predicted = make_trace([1.0] * 3, scheduled=[0.0100, 1.2, 2.3])
    found = compare(measured, predicted).metrics["queue_time"]

    assert found.n == 2
    assert found.mape == pytest.approx(0.5)
    assert found.percentiles["mean"].measured == pytest.approx(0.4001 / 3)
    assert found.percentiles["mean"].predicted == pytest.approx(0.51 / 3)


def test_run_without_last_tokens_has_no_throughput(make_trace):
    found = compare(make_trace([1.0, 2.0], [math.nan, math.nan]), make_trace([1.0, 2.0]))
    assert set(found.metrics) == {"ttft"}
    for figures in found.throughput.values():
        assert math.isnan(figures["measured"])
        assert math.isnan(figures["error"])
        assert figures["predicted"] > 0


def test_mostly_zero_queue_times_have_intervals_all_the_same(make_trace):
    """Most of a light load is scheduled at once: the measured median is 0, its relative error unknown."""
    measured = make_trace([1.0] * 20, scheduled=[place + (0.5 if place % 5 == 0 else 0.0) for place in range(20)])
    predicted = make_trace([1.0] * 20, scheduled=[place + (0.6 if place % 5 == 0 else 0.0) for place in range(20)])
    found = compare(measured, predicted).metrics["queue_time"]

    assert (found.n, found.mape) == (4, pytest.approx(0.2))
    assert math.isnan(found.percentiles["p50"].error)
    assert found.percentiles["mean"].error == pytest.approx(0.2)
    assert found.percentiles["mean"].error_ci95 == pytest.approx((0.2, 0.2))


def test_measured_zero_has_no_relative_error(make_trace):
    found = compare(make_trace([0.0, 1.0]), make_trace([0.5, 1.5])).metrics["ttft"]
    assert (found.n, found.mape) == (1, pytest.approx(0.5))


def test_gaps_between_tokens_are_compared_one_by_one_and_pooled(make_trace):
    measured = make_trace([1.0, 1.0], token_times=[[1.0, 2.0, 4.0], [2.0, 3.0]])
    predicted = make_trace([1.0, 1.0], token_times=[[1.0, 2.5, 4.0], [2.0, 3.0]])
    found = compare(measured, predicted).metrics["itl"]

    # Gaps 1, 2, 1 measured; 1.5, 1.5, 1 predicted.
    assert found.n == 3
    assert found.mape == pytest.approx((0.5 + 0.25) / 3)
    assert found.bias == pytest.approx((0.5 - 0.25) / 3)
    assert found.percentiles["mean"].measured == pytest.approx(4 / 3)
    assert found.percentiles["p50"].predicted == pytest.approx(1.5)


def test_request_with_another_number_of_gaps_counts_in_the_levels_only(make_trace):
    """As when the client saw several tokens in one chunk."""
    measured = make_trace([1.0, 1.0], token_times=[[1.0, 2.0], [2.0, 6.0]])
    predicted = make_trace([1.0, 1.0], token_times=[[1.0, 2.1], [2.0, 4.0, 6.0]])
    found = compare(measured, predicted).metrics["itl"]

    assert (found.n, found.mape) == (1, pytest.approx(0.1))
    assert found.percentiles["mean"].measured == pytest.approx(2.5)
    assert found.percentiles["mean"].predicted == pytest.approx(5.1 / 3)


def test_tokens_delivered_together_have_no_relative_error(make_trace):
    """Gaps of 1, 1, 1 and 0.05 s: the last is below a tenth of the median."""
    measured = make_trace([1.0], token_times=[[1.0, 2.0, 3.0, 4.0, 4.05]])
    predicted = make_trace([1.0], token_times=[[1.0, 2.2, 3.4, 4.6, 5.8]])
    found = compare(measured, predicted).metrics["itl"]
    assert (found.n, found.mape) == (3, pytest.approx(0.2))


def test_token_times_of_excluded_requests_alone_do_not_make_an_itl(make_trace):
    measured = make_trace([1.0, 1.0], token_times=[[1.0, 2.0], None], status=["failed", "ok"])
    predicted = make_trace([1.0, 1.0], token_times=[[1.0, 2.0], [2.0, 3.0]])
    found = compare(measured, predicted)
    assert "itl" not in found.metrics
    assert "itl" in found.unsupported


def test_throughput_and_makespan_span_from_first_arrival_to_last_token_of_the_pairs(make_trace):
    """Arrivals 10, 11, 12; last tokens 15, 14, 20 against 15, 14, 17; 10 + 20 + 30 tokens."""
    tokens = [10, 20, 30, 1000]
    measured = make_trace(
        [1.0] * 4,
        [5.0, 3.0, 8.0, 500.0],
        arrival=[10.0, 11.0, 12.0, 1.0],
        output_tokens=tokens,
        status=["ok", "ok", "ok", "failed"],
    )
    predicted = make_trace([1.0] * 4, [5.0, 3.0, 5.0, 9.0], arrival=[10.0, 11.0, 12.0, 1.0], output_tokens=tokens)
    found = compare(measured, predicted).throughput

    assert found["makespan"] == pytest.approx({"measured": 10.0, "predicted": 7.0, "error": -0.3})
    assert found["output_tokens_per_s"] == pytest.approx({"measured": 6.0, "predicted": 60 / 7, "error": 10 / 7 - 1})


def test_timeline_error_is_the_mean_distance_at_the_measured_instants(make_trace):
    nan = math.nan
    time = [0.0, 1.0, 2.0, 3.0]
    measured = make_trace([1.0], [5.0], timeline={"time": time, "running": [1.0, 2.0, 3.0, nan], "kv_usage": [0.5] * 4})
    predicted = make_trace([1.0], timeline={"time": time, "running": [1.0, 4.0, 2.0, 9.0], "kv_usage": [0.25] * 4})
    found = compare(measured, predicted).timeline

    assert set(found) == {"running", "kv_usage"}
    assert found["running"] == pytest.approx({"mae": 1.0, "measured_mean": 2.0, "predicted_mean": 7 / 3})
    assert found["kv_usage"] == pytest.approx({"mae": 0.25, "measured_mean": 0.5, "predicted_mean": 0.25})


def test_instants_before_the_first_arrival_and_after_the_last_token_do_not_count(make_trace):
    time = [-1.0, 0.0, 1.0, 2.0, 3.0]
    measured = make_trace([1.0], [2.0], timeline={"time": time, "running": [0.0, 1.0, 1.0, 1.0, 0.0]})
    predicted = make_trace([1.0], [2.0], timeline={"time": time, "running": [7.0, 1.0, 3.0, 2.0, 7.0]})
    found = compare(measured, predicted).timeline
    assert found["running"] == pytest.approx({"mae": 1.0, "measured_mean": 1.0, "predicted_mean": 2.0})


def test_no_timeline_or_one_of_other_instants_is_not_compared(make_trace):
    short = make_trace([1.0], timeline={"time": [0.0], "running": [1.0]})
    long = make_trace([1.0], timeline={"time": [0.0, 1.0], "running": [1.0, 2.0]})
    assert compare(short, long).timeline == {}
    assert compare(short, make_trace([1.0])).timeline == {}


def test_ids_that_one_side_lacks_are_paired_all_the_same(make_trace):
    """Any order, any gaps: the join is that of a plain loop."""
    random = np.random.default_rng(0)
    ids = [f"r{one}" for one in random.permutation(500)]
    others = [f"r{one}" for one in random.permutation(600)[:400]]
    statuses = random.choice(["ok", "failed", "silent"], 500).tolist()
    measured = make_trace(list(random.random(500)), ids=ids, status=statuses, arrival=list(random.random(500)))
    predicted = make_trace(list(random.random(400)), ids=others, status=random.choice(["ok", "failed"], 400).tolist())
    found = Comparison(measured, predicted, exclude={"one": frozenset(ids[:50]), "two": frozenset(ids[:60])})

    place = {one: row for row, one in enumerate(others)}
    left = [
        (measured.start[row], row, place[one])
        for row, one in enumerate(ids)
        if row >= 60 and statuses[row] == "ok" and one in place and predicted.statuses[place[one]] == "ok"
    ]
    mine, theirs = (np.array(rows) for rows in list(zip(*sorted(left), strict=True))[1:])
    assert found.pairs("ttft")[0].tolist() == measured.latency("ttft")[mine].tolist()
    assert found.pairs("ttft")[1].tolist() == predicted.latency("ttft")[theirs].tolist()
    excluded = found.coverage["excluded"]
    assert (excluded["one"], excluded["two"]) == (50, 10)
    assert sum(excluded.values()) - excluded["only_predicted"] + found.num_paired == 500
    assert excluded["only_predicted"] == len(set(others) - set(ids))


def test_distances_are_those_of_the_distributions_whichever_request_is_which(make_trace):
    random = np.random.default_rng(0)
    one, other = random.gamma(2, 1, 200), random.gamma(2, 1.2, 200)
    found = compare(make_trace(list(one)), make_trace(list(other))).distances["ttft"]
    shuffled = compare(make_trace(list(one)), make_trace(list(random.permutation(other)))).distances["ttft"]

    assert found.wasserstein == pytest.approx(wasserstein_distance(one, other) / one.mean())
    assert found.kolmogorov_smirnov == pytest.approx(ks_2samp(one, other).statistic)
    assert (shuffled.wasserstein, shuffled.kolmogorov_smirnov) == pytest.approx(
        (found.wasserstein, found.kolmogorov_smirnov)
    )


def test_distance_of_gaps_that_differ_in_number(make_trace):
    measured = make_trace([1.0], token_times=[[1.0, 2.0, 4.0]])
    predicted = make_trace([1.0], token_times=[[1.0, 2.0, 4.0, 5.0]])
    found = compare(measured, predicted).distances["itl"]
    assert found.wasserstein == pytest.approx(wasserstein_distance([1, 2], [1, 2, 1]) / 1.5)
    assert found.kolmogorov_smirnov == pytest.approx(1 / 6)
