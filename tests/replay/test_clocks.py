import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from replay.clocks import align_arrivals

wall_times = st.floats(1.7e9, 1.8e9)
lags = st.floats(0.0, 10.0)


@given(st.lists(st.tuples(wall_times, lags), min_size=1, max_size=20), st.floats(0.0, 1e7))
def test_no_request_is_queued_before_its_aligned_arrival(requests, boot):
    wall = np.array([sent for sent, _ in requests])
    queued = np.array([sent - 1.7e9 + boot + lag for sent, lag in requests])
    alignment = align_arrivals(wall, queued)
    assert (alignment.lag >= 0).all()
    assert (alignment.arrival <= queued).all()
    np.testing.assert_array_equal(alignment.lag, queued - alignment.arrival)


@given(st.lists(st.tuples(wall_times, lags), min_size=1, max_size=20))
def test_alignment_keeps_the_gaps_between_arrivals(requests):
    wall = np.array([sent for sent, _ in requests])
    queued = np.array([sent - 1.7e9 + lag for sent, lag in requests])
    aligned = align_arrivals(wall, queued).arrival
    # A microsecond is what doubles resolve at 1.7e9 s, four times over.
    np.testing.assert_allclose(aligned - aligned[0], wall - wall[0], atol=1e-6)


def test_smallest_way_to_the_engine_is_the_offset():
    alignment = align_arrivals(np.array([1000.0, 1001.0, 1002.0]), np.array([10.5, 11.25, 13.0]))
    assert alignment.offset == -989.75
    assert alignment.arrival.tolist() == [10.25, 11.25, 12.25]
    assert alignment.lag.tolist() == [0.25, 0.0, 0.75]


def test_a_request_that_was_never_queued_is_placed_by_the_others():
    alignment = align_arrivals(np.array([1000.0, 1001.0]), np.array([10.5, np.nan]))
    assert alignment.arrival.tolist() == [10.5, 11.5]
    assert np.isnan(alignment.lag[1])
