from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrate.errors import compare


def errors_of(make_trace, measured, predicted):
    return compare(make_trace(list(measured)), make_trace(list(predicted))).metrics["ttft"]


@given(
    off=st.lists(st.sampled_from([0.0, 0.1, -0.2, 1.0, 3.0]), min_size=2, max_size=80),
)
def test_interval_contains_the_mean_error(make_trace, off):
    measured = np.ones(len(off))
    errors = errors_of(make_trace, measured, measured * (1 + np.array(off)))
    low, high = errors.mape_ci95
    assert low <= errors.mape + 1e-12
    assert errors.mape - 1e-12 <= high


@pytest.mark.parametrize("place", ["first", "last", "both"])
def test_errors_at_the_ends_of_the_run_weigh_as_much_as_others(make_trace, place):
    """The first requests of a run, on an empty engine, often have the largest relative errors."""
    off = np.zeros(100)
    off[{"first": [0, 1], "last": [98, 99], "both": [0, 99]}[place]] = 1.0
    errors = errors_of(make_trace, np.ones(100), 1 + off)
    low, high = errors.mape_ci95

    middle = np.zeros(100)
    middle[[50, 51]] = 1.0
    assert errors.mape == pytest.approx(0.02)
    assert low <= errors.mape <= high
    assert high == pytest.approx(errors_of(make_trace, np.ones(100), 1 + middle).mape_ci95[1], rel=0.51)


def test_interval_is_the_same_every_time(make_trace):
    random = np.random.default_rng(7)
    measured, predicted = random.gamma(2, size=200), random.gamma(2, size=200)
    assert errors_of(make_trace, measured, predicted) == errors_of(make_trace, measured, predicted)


def test_interval_narrows_with_more_requests(make_trace):
    random = np.random.default_rng(7)
    widths = []
    for count in (50, 800):
        factor = 1 + 0.2 * random.standard_normal(count)
        low, high = errors_of(make_trace, np.ones(count), factor).mape_ci95
        widths.append(high - low)
    # Four times narrower for sixteen times as many; a quarter of room for luck.
    assert widths[1] < widths[0] / 3


def test_interval_covers_the_true_mean_about_as_often_as_it_says(make_trace):
    """Independent errors of true MAPE 0.2 x sqrt(2 / pi): 95 % intervals of 100 runs, with room for luck."""
    random = np.random.default_rng(11)
    true = 0.2 * math.sqrt(2 / math.pi)
    hits = 0
    for _ in range(100):
        low, high = errors_of(make_trace, np.ones(100), 1 + 0.2 * random.standard_normal(100)).mape_ci95
        hits += low <= true <= high
    assert 82 <= hits <= 100


def test_neighbours_that_err_together_widen_the_interval(make_trace):
    """100 queues of 10 requests that are all 30 % off or not at all say less than 1000 independent requests."""
    random = np.random.default_rng(3)
    alone = 0.3 * random.integers(0, 2, 1000)
    together = 0.3 * np.repeat(random.integers(0, 2, 100), 10)
    widths = [np.ptp(errors_of(make_trace, np.ones(1000), 1 + off).mape_ci95) for off in (alone, together)]
    assert widths[1] > 2 * widths[0]


def test_intervals_of_percentiles_contain_a_constant_error(make_trace):
    measured = np.random.default_rng(5).gamma(2, size=60)
    for level in errors_of(make_trace, measured, 1.25 * measured).percentiles.values():
        assert level.error_ci95 == pytest.approx((0.25, 0.25))


def test_one_pair_has_no_interval(make_trace):
    errors = errors_of(make_trace, [1.0], [1.1])
    assert all(math.isnan(end) for end in errors.mape_ci95)


def test_gaps_of_a_long_run_fit_in_memory(make_trace):
    """200,000 gaps: all resamples at once would be 320 MB twice over."""
    import tracemalloc

    times = (np.arange(1001) * 0.02).tolist()
    many = make_trace([1.0] * 200, token_times=[[one + place for one in times] for place in range(200)])
    comparison = compare(many, many)
    comparison.unsupported  # noqa: B018 - the pairing, outside of what is measured
    tracemalloc.start()
    assert comparison.metrics["itl"].mape_ci95 == (0.0, 0.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150e6
