from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrate import intervals
from calibrate.errors import compare
from calibrate.intervals import Pool, Resamples, bootstrap_interval, interval

AT = (50.0, 90.0, 95.0, 99.0)


def waves(count: int, seed: int = 0) -> np.ndarray:
    """Latencies with a queue that builds up and goes: neighbours are alike."""
    random = np.random.default_rng(seed)
    swell = np.convolve(random.normal(size=count), np.ones(40) / 6, mode="same")
    return np.exp(swell + 0.2 * random.normal(size=count))


def drawn_rows(resamples: Resamples, count: int) -> list[np.ndarray]:
    """What each resample holds, one by one."""
    cells = resamples.cells(np.arange(count))
    return [np.repeat(np.arange(count), weights[cells].astype(int)) for weights in resamples.weights]


@given(
    values=st.lists(st.floats(0.001, 100) | st.just(1.0), min_size=2, max_size=40),
    several=st.lists(st.integers(0, 3), min_size=40, max_size=40),
)
def test_statistics_of_resamples_are_those_of_what_was_drawn(values, several):
    """Some requests have no value, some several."""
    counts = np.array(several[: len(values)])
    pool = Pool(np.repeat(np.arange(len(values)), counts), np.repeat(values, counts) + np.arange(counts.sum()) % 3)
    resamples = Resamples(len(values))
    by_request = [pool.values[pool.places == one] for one in range(len(values))]
    bags = [np.concatenate([by_request[one] for one in rows]) for rows in drawn_rows(resamples, len(values))]
    means = [bag.mean() if bag.size else np.nan for bag in bags]
    levels = [np.percentile(bag, AT) if bag.size else [np.nan] * 4 for bag in bags]

    assert resamples.means(pool) == pytest.approx(means, nan_ok=True)
    if pool.values.size:
        assert resamples.percentiles(pool, AT) == pytest.approx(np.array(levels), nan_ok=True)


def test_interval_of_a_mean_is_that_of_the_plain_bootstrap():
    values = waves(1500)
    plain = bootstrap_interval(values, lambda sample: sample.mean(axis=1))
    assert interval(Resamples(1500).means(Pool.of(values))) == pytest.approx(plain)


@pytest.mark.parametrize("step", [1e-9, 0.1], ids=["all differ", "many equal"])
def test_percentiles_of_many_values_agree_with_the_plain_ones(monkeypatch, step):
    """Beyond ``EXACT`` values bins are counted, beyond ``CELLS`` requests neighbours are drawn together."""
    values = np.round(waves(6000) / step) * step
    pool = Pool.of(values)
    exact = Resamples(6000).percentiles(pool, AT)
    monkeypatch.setattr(intervals, "EXACT", 0)
    binned = Resamples(6000).percentiles(pool, AT)

    for at, one, other in zip(AT, exact.T, binned.T, strict=True):
        low, high = interval(one)
        # A bin holds three of the values here.
        assert interval(other) == pytest.approx((low, high), abs=0.03 * (high - low) + step), at
        plain = bootstrap_interval(values, lambda sample, at=at: np.percentile(sample, at, axis=1))
        # Other blocks were drawn: ends of two sound intervals of 200 resamples differ by some of their width.
        assert plain == pytest.approx((low, high), abs=0.3 * (high - low) + step), at


def test_a_value_that_most_have_is_not_spread_by_bins(monkeypatch):
    """As queue times at light load: two in three are 0."""
    values = np.where(np.arange(5000) % 3 == 0, waves(5000), 0.0)
    monkeypatch.setattr(intervals, "EXACT", 0)
    found = Resamples(5000).percentiles(Pool.of(values), (50.0, 60.0, 90.0))
    assert np.abs(found[:, :2]).max() < 1e-300
    assert (found[:, 2] > 0).all()


def test_coarse_cells_draw_as_much_as_single_requests(monkeypatch):
    values = waves(4000)
    fine = interval(Resamples(4000).means(Pool.of(values)))
    monkeypatch.setattr(intervals, "CELLS", 500)
    coarse = Resamples(4000)
    assert coarse.weights.shape == (intervals.RESAMPLES, 500)
    low, high = interval(coarse.means(Pool.of(values)))
    assert high - low == pytest.approx(fine[1] - fine[0], rel=0.25)


def test_interval_of_pooled_gaps_draws_requests(make_trace):
    """100 requests of 50 equal gaps each tell as much as 100 gaps, not as 5,000."""
    random = np.random.default_rng(3)

    def gaps(each):
        times = [list(place + np.arange(51) * one) for place, one in enumerate(each)]
        return make_trace([1.0] * 100, token_times=times)

    each = 0.03 * np.exp(0.2 * random.normal(size=100))
    measured, predicted = gaps(each), gaps(0.03 * np.exp(0.2 * random.normal(size=100)))
    low, high = compare(measured, predicted).metrics["itl"].percentiles["mean"].error_ci95
    # Standard error of the ratio of two means of 100 with 20 % spread: 0.2 * sqrt(2 / 100).
    assert high - low == pytest.approx(2 * 1.96 * 0.2 * np.sqrt(2 / 100), rel=0.25)


def test_every_percentile_of_the_gaps_has_an_interval(make_trace):
    times = [[place + 0.1 * one for one in range(4 + place % 3)] for place in range(30)]
    found = compare(make_trace([1.0] * 30, token_times=times), make_trace([1.0] * 30, token_times=times))
    for level in found.metrics["itl"].percentiles.values():
        assert level.error_ci95 == (0.0, 0.0)


def test_makespan_has_an_interval_that_holds_its_error(make_trace):
    """An engine that takes 10 % longer from completion to completion."""
    random = np.random.default_rng(1)
    between = random.exponential(1.0, 200)
    first = [0.1] * 200
    measured = make_trace(first, list(np.cumsum(between)), arrival=[0.0] * 200)
    slower = between * (1.1 + 0.1 * random.normal(size=200))
    found = compare(measured, make_trace(first, list(np.cumsum(slower)), arrival=[0.0] * 200))

    low, high = found.throughput_ci95["makespan"]
    assert low < found.throughput["makespan"]["error"] < high
    assert low == pytest.approx(0.1, abs=0.03)
    assert high == pytest.approx(0.1, abs=0.03)
    slowest, fastest = found.throughput_ci95["output_tokens_per_s"]
    assert (slowest, fastest) == pytest.approx((1 / (1 + high) - 1, 1 / (1 + low) - 1), abs=1e-3)


def test_a_single_request_has_no_interval_of_its_makespan(make_trace):
    found = compare(make_trace([1.0]), make_trace([1.0])).throughput_ci95
    assert np.isnan(found["makespan"]).all()
    assert np.isnan(found["output_tokens_per_s"]).all()


@pytest.mark.parametrize("load", [0.5, 2.0], ids=["light load", "overload"])
def test_interval_of_the_makespan_holds_0_where_two_runs_differ_by_noise_alone(make_trace, load):
    """The same requests twice through one server, each service 10 % more or less by chance."""
    random = np.random.default_rng(4)

    def run(arrival, service):
        ends, free = [], 0.0
        for at, seconds in zip(arrival, service * np.exp(0.1 * random.normal(size=service.size)), strict=True):
            free = max(free, at) + seconds
            ends.append(free - at)
        return make_trace([0.1] * service.size, ends, arrival=list(arrival))

    held = []
    for _ in range(40):
        arrival, service = np.cumsum(random.exponential(1.0, 100)), load * random.gamma(4, 0.25, 100)
        low, high = compare(run(arrival, service), run(arrival, service)).throughput_ci95["makespan"]
        held.append(low <= 0 <= high)
    assert np.mean(held) >= 0.85


def test_figures_do_not_depend_on_the_number_of_threads():
    """BLAS adds in an order that does: a report must be the same, byte for byte, on any machine."""
    program = """if True:
        import hashlib, numpy as np
        from calibrate.intervals import Pool, Resamples
        random = np.random.default_rng(0)
        values, group = random.lognormal(size=100_000), random.integers(0, 4, 100_000)
        drawn, pool = Resamples(100_000), Pool.of(values)
        found = [drawn.means(pool), drawn.sums_by_group(pool.places, group, 4, values), drawn.percentiles(pool, [50.0])]
        print(hashlib.sha256(b"".join(one.tobytes() for one in found)).hexdigest())
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(intervals.__file__).parents[1])}
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**environment, "OPENBLAS_NUM_THREADS": threads},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for threads in ("1", "2", "4")
    }
    assert len(digests) == 1
