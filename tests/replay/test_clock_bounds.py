import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.clock_bounds import MOST_DRIFT, ROUNDING, bound, same_events

NONE = np.empty(0)
SEEDS = st.integers(0, 2**32 - 1)


def bounds_of(seed, count, offset, drift, span=60.0, least=0.001, mean=0.004, origin=0.0):
    """Events of a source whose clock stands off by ``offset + drift * (t - origin)``, with random delays either way."""
    random = np.random.default_rng(seed)
    sent = origin + np.sort(random.uniform(0, span, count))
    seen = sent + random.uniform(0.01, 2.0, count)

    def true(times):
        return offset + drift * (times - origin)

    upper = true(sent) + least + random.exponential(mean, count)
    lower = true(seen) - least - random.exponential(mean, count)
    return sent, upper, seen, lower, true


@given(SEEDS, st.integers(1, 200), st.floats(-1e5, 1e5), st.floats(0, 0.05), st.floats(0, 0.05))
def test_the_true_offset_lies_within_the_stated_error(seed, count, offset, least, mean):
    sent, upper, seen, lower, true = bounds_of(seed, count, offset, 0.0, least=least, mean=mean)
    clock = bound(sent, upper, seen, lower)
    assert clock.contradiction == 0
    assert clock.drift == 0
    assert clock.pairs == 2 * count
    assert clock.drift_interval[0] <= 0 <= clock.drift_interval[1]
    apart = np.abs(clock.move(sent) - (sent + true(sent)))
    assert apart.max() <= clock.error + ROUNDING
    # No wider than the shortest ways leave it, and what a drift could hide.
    assert clock.error <= (upper.min() - lower.max()) + 2 * MOST_DRIFT * np.ptp([*sent, *seen]) + 3 * ROUNDING


@given(
    SEEDS, st.integers(2, 200), st.floats(-1e4, 1e4), st.floats(-0.99, 0.99), st.sampled_from([10.0, 600.0, 20000.0])
)
def test_a_clock_that_drifts_is_followed_within_the_error(seed, count, offset, share, span):
    drift = share * MOST_DRIFT
    sent, upper, seen, lower, true = bounds_of(seed, count, offset, drift, span=span)
    clock = bound(sent, upper, seen, lower)
    assert clock.contradiction == 0
    assert clock.drift_interval[0] - 1e-9 <= drift <= clock.drift_interval[1] + 1e-9
    for times in (sent, seen):
        assert np.abs(clock.move(times) - (times + true(times))).max() <= clock.error + ROUNDING


def test_a_long_run_tells_the_drift_from_a_constant_offset():
    sent, upper, seen, lower, _ = bounds_of(1, 2000, 40.0, 5e-5, span=7200.0)
    clock = bound(sent, upper, seen, lower)
    assert clock.drift == pytest.approx(5e-5, rel=0.02)
    assert clock.error < 0.003
    assert clock.drift_interval[0] > 0


@pytest.mark.parametrize("drift", [-2e-3, 1e-3])
def test_a_wild_clock_is_followed_where_no_quartz_could_explain_it(drift):
    sent, upper, seen, lower, true = bounds_of(2, 500, -3.0, drift, span=600.0)
    clock = bound(sent, upper, seen, lower)
    assert clock.contradiction == 0
    assert clock.drift == pytest.approx(drift, rel=0.02)
    assert np.abs(clock.move(sent) - (sent + true(sent))).max() <= clock.error


def test_more_requests_leave_the_shortest_way_as_the_error():
    sent, upper, seen, lower, _ = bounds_of(3, 4000, 7.0, 0.0, least=0.002)
    errors = [bound(sent[:n], upper[:n], seen[:n], lower[:n]).error for n in (5, 50, 500, 4000)]
    assert errors[0] > errors[3]
    assert 0.002 <= errors[3] < 0.0023


@given(SEEDS, st.floats(0.001, 100.0))
def test_bounds_that_exclude_each_other_say_by_how_much(seed, by):
    sent, upper, seen, lower, _ = bounds_of(seed, 50, 5.0, 0.0)
    lower[25] = upper.min() + 2 * by + 1.0
    clock = bound(sent, upper, seen, lower)
    if clock.contradiction:
        assert clock.contradiction <= by + 0.5 + ROUNDING
        assert clock.error == pytest.approx(clock.contradiction + ROUNDING)
    else:
        assert abs(clock.drift) > MOST_DRIFT


def test_with_bounds_from_one_side_the_error_is_unknown_and_the_shortest_way_counts_as_none():
    sent, upper, seen, lower, _ = bounds_of(4, 100, 5.0, 0.0, least=0.002)
    clock = bound(sent, upper, NONE, NONE)
    assert clock.error is None
    assert clock.offset == pytest.approx(upper.min())
    assert clock.offset >= 5.002
    clock = bound(NONE, NONE, seen, lower)
    assert clock.error is None
    assert clock.offset == pytest.approx(lower.max())


def test_no_bound_is_no_clock():
    nan = np.full(3, np.nan)
    assert bound(nan, nan, nan, nan) is None
    assert bound(NONE, NONE, NONE, NONE) is None


@given(SEEDS, st.floats(-1e6, 1e6), st.floats(0, 0.01))
def test_the_same_events_stamped_twice_tell_the_offset_up_to_their_noise(seed, offset, noise):
    random = np.random.default_rng(seed)
    times = np.sort(random.uniform(0, 100, 60))
    clock = same_events(times, offset + random.uniform(-noise, noise, 60))
    apart = np.abs(clock.move(times) - times - offset)
    assert apart.max() <= clock.error + noise + 2 * ROUNDING
    assert clock.error <= noise + 2 * ROUNDING


def test_coarse_stamps_widen_the_bounds():
    sent, upper, seen, lower, true = bounds_of(5, 300, 2.0, 0.0)
    coarse = np.floor((sent + upper) * 10) / 10 - sent
    clock = bound(sent, coarse, seen, lower, resolution=0.1)
    assert clock.contradiction == 0
    assert np.abs(clock.move(sent) - (sent + true(sent))).max() <= clock.error


def test_one_clock_that_reads_the_same_is_exact():
    clock = bound(np.array([1.0]), np.array([0.5]), np.array([2.0]), np.array([-0.5]))
    assert clock.offset == 0
    moved = clock.at_offset(0.25)
    assert (moved.offset, moved.drift, moved.error) == (0.25, 0.0, clock.error + 0.25)
