from __future__ import annotations

import numpy as np
import pytest

from calibrate.errors import compare
from calibrate.intervals import Resamples
from calibrate.slices import group_by, slice_errors, worst_slices

LABELS = {"ttft": "TTFT", "e2e": "E2E"}


def test_slices_lie_between_quartiles_and_have_the_errors_of_their_requests():
    values = np.arange(80.0)[::-1]
    errors = np.where(values < 20, 0.5, -0.1)
    found = slice_errors(group_by(values), errors, Resamples(80))

    assert [(one.low, one.high, one.n) for one in found] == [(0, 19, 20), (20, 39, 20), (40, 59, 20), (60, 79, 20)]
    assert [(one.mape, one.bias) for one in found] == [
        pytest.approx(pair) for pair in [(0.5, 0.5), (0.1, -0.1), (0.1, -0.1), (0.1, -0.1)]
    ]
    assert found[0].rest_mape == pytest.approx(0.1)
    assert found[1].rest_mape == pytest.approx((0.5 + 0.1 + 0.1) / 3)
    assert found[0].mape_ci95 == pytest.approx((0.5, 0.5))


@pytest.mark.parametrize(
    ("values", "sizes"),
    [
        ([0.0] * 70 + [3.0] * 10, [70, 10]),
        ([0.0] * 10 + [3.0] * 70, [10, 70]),
        ([1.0, 2.0], [1, 1]),
        ([5.0] * 9, None),
        ([np.nan] * 9, None),
        ([], None),
    ],
)
def test_values_that_repeat_are_not_torn_apart(values, sizes):
    found = group_by(np.array(values, dtype=float))
    assert (found and np.bincount(found.group).tolist()) == sizes


def test_requests_without_value_or_error_are_left_out():
    values = np.array([1.0, 1.0, np.nan, 2.0, 2.0])
    errors = np.array([0.1, np.nan, 0.3, 0.2, 0.2])
    found = slice_errors(group_by(values), errors, Resamples(5))
    assert [(one.n, one.mape) for one in found] == [(1, pytest.approx(0.1)), (2, pytest.approx(0.2))]


def tried(random, fault: float = 1.0, count: int = 300):
    """Slices by four quantities of errors that have nothing to do with them; but for the longest prompts."""
    keys = {
        "prompt_tokens": random.lognormal(6, 1, count),
        "output_tokens": random.lognormal(5, 1, count),
        "arrival_s": np.arange(count),
        "concurrency": np.abs(np.cumsum(random.normal(size=count))),
    }
    long = keys["prompt_tokens"] > np.quantile(keys["prompt_tokens"], 0.75)
    errors = {"ttft": 0.1 * random.normal(size=count) * np.where(long, fault, 1), "e2e": random.normal(size=count)}
    resamples = Resamples(count)
    groups = {name: group_by(values.astype(float)) for name, values in keys.items()}
    slices = {
        metric: {name: slice_errors(group, some, resamples) for name, group in groups.items()}
        for metric, some in errors.items()
    }
    return worst_slices(slices, resamples.blocks, LABELS)


def test_a_slice_with_twice_the_error_is_named():
    random = np.random.default_rng(5)
    found = [tried(random, fault=2.0) for _ in range(20)]
    named = [one for some in found for one in some if (one.metric, one.by) == ("ttft", "prompt_tokens")]
    assert len(named) >= 18
    assert all(one.slice.n == 75 and one.least_excess > 0 for one in named)
    assert named[0].sentence.startswith("TTFT is worst for the 75 requests with prompts of ")


def test_among_many_slices_of_mere_noise_none_is_named():
    """One in twenty runs may be; 32 slices are tried in each, of which at 5 % every second run would have one."""
    random = np.random.default_rng(6)
    assert sum(bool(tried(random)) for _ in range(60)) <= 8


def test_few_requests_have_no_worst_slice():
    random = np.random.default_rng(7)
    assert not any(tried(random, fault=100.0, count=16) for _ in range(20))


def test_long_prompts_that_err_are_named_in_the_comparison(make_trace):
    random = np.random.default_rng(8)
    prompts = random.permutation(np.repeat([100, 200, 300, 4000], 50)).tolist()
    arrival = np.cumsum(random.exponential(1.0, 200)).tolist()
    ttft = (0.2 * np.exp(0.05 * random.normal(size=200))).tolist()
    wrong = [one * (1.5 if prompt == 4000 else 1.02) for one, prompt in zip(ttft, prompts, strict=True)]
    fields = {"arrival": arrival, "prompt_tokens": prompts, "cached_tokens": [0] * 200}
    found = compare(make_trace(ttft, **fields), make_trace(wrong, **fields))

    (worst,) = [one for one in found.worst_slices if one.metric == "ttft"]
    assert worst.by == "prompt_tokens"
    assert worst.sentence == (
        "TTFT is worst for the 50 requests with prompts of 4,000 tokens: 50.0 % mean error, 2.0 % for all others"
    )
    # Nothing was cached, all outputs are alike: nothing to slice by.
    assert set(found.slices["ttft"]) == {"prompt_tokens", "arrival_s", "concurrency", "arrival_rate"}


def test_load_that_a_request_met_is_counted_from_the_stamps(make_trace):
    """Served one after the other for 10 s each, arriving every second: the third waits for two."""
    arrival = [0.0, 1.0, 2.0, 3.0]
    scheduled = [0.0, 10.0, 20.0, 30.0]
    ends = [9.5, 19.5, 29.5, 39.5]
    measured = make_trace(
        [begin + 1 - at for begin, at in zip(scheduled, arrival, strict=True)],
        [end - at for end, at in zip(ends, arrival, strict=True)],
        scheduled=scheduled,
    )
    met = compare(measured, measured).at_arrival
    assert met["concurrency"].tolist() == [0, 1, 1, 1]
    assert met["waiting"].tolist() == [0, 0, 1, 2]
    assert met["arrival_s"].tolist() == arrival


def test_without_schedule_stamps_requests_in_flight_are_counted(make_trace):
    measured = make_trace([1.0] * 3, [5.0, 1.5, 1.5], arrival=[10.0, 11.0, 14.0])
    met = compare(measured, measured).at_arrival
    assert met["concurrency"].tolist() == [0, 1, 1]
    assert np.isnan(met["waiting"]).all()
    assert met["arrival_s"].tolist() == [0.0, 1.0, 4.0]


def test_requests_that_are_not_compared_are_load_all_the_same(make_trace):
    measured = make_trace([1.0] * 3, [9.0, 9.0, 9.0], status=["unfinished", "ok", "ok"], ids=["a", "b", "c"])
    predicted = make_trace([1.0] * 2, [9.0, 9.0], ids=["a", "c"], arrival=[0.0, 2.0])
    assert compare(measured, predicted).at_arrival["concurrency"].tolist() == [2]
