import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.run import replay

LATER = [{"arrival": 0.25 + index / 8, "prompt": (1, 0, 30), "output": 4} for index in range(3)]


def served(made, deployment, first, delay, **meta):
    """What an engine measures whose first iteration lasts longer by a delay, while a second request comes early."""
    workload = [first, {"arrival": 0.125, "prompt": (1, 0, 50), "output": 6}, *LATER]
    warm = replay(made(workload, warmed_up=True), deployment).predicted
    ended = warm.column("first_token")[0] + delay
    stamps = [(ended, ended + 0.1)] + [(3.0, 4.0)] * 4
    rows = [row | {"first_token": one, "last_token": last} for row, (one, last) in zip(workload, stamps, strict=True)]
    return made(rows, **meta)


FIRST = {"arrival": 0.0, "prompt": (1, 0, 40), "output": 4}


@given(st.floats(0.01, 1.0))
def test_the_excess_of_the_first_token_is_imposed_on_the_first_iteration(deployed, made, delay):
    deployment = deployed()
    measured = served(made, deployment, FIRST, delay, warmed_up=False)
    predicted = replay(measured, deployment).predicted
    assert predicted.meta["cold_start"]["request"] == "r0"
    assert predicted.meta["cold_start"]["seconds"] == pytest.approx(delay, abs=1e-8)
    assert predicted.column("first_token")[0] == pytest.approx(measured.column("first_token")[0], abs=1e-8)


def test_those_who_arrive_meanwhile_wait_for_the_cold_engine(deployed, made):
    measured = served(made, deployed(), FIRST, 0.5)
    cold, warm = (replay(measured, deployed(), cold_start=on).predicted for on in (True, False))
    assert warm.meta["cold_start"] is None
    assert cold.latency("ttft")[1] - warm.latency("ttft")[1] > 0.35
    assert (cold.column("queued")[1], warm.column("queued")[1]) == pytest.approx((0.51, 0.125), abs=1e-3)


@pytest.mark.parametrize("delay", [0.0, 0.0009, -0.004])
def test_a_tenth_of_the_first_ttft_is_no_cold_start(deployed, made, delay):
    measured = served(made, deployed(), FIRST, delay)
    assert replay(measured, deployed()).predicted.meta["cold_start"] is None


@pytest.mark.parametrize(("warmed_up", "imposed"), [(True, False), (False, True), (None, True)])
def test_a_trace_that_was_warmed_up_has_none(deployed, made, warmed_up, imposed):
    measured = served(made, deployed(), FIRST, 0.5, warmed_up=warmed_up)
    assert (replay(measured, deployed()).predicted.meta["cold_start"] is not None) == imposed


def test_a_first_request_that_was_not_alone_shows_nothing(deployed, made):
    rows = [FIRST | {"first_token": 0.5, "last_token": 0.6}] * 2
    assert replay(made(rows), deployed()).predicted.meta["cold_start"] is None


@pytest.mark.parametrize("status", ["unfinished", "silent"])
def test_a_first_request_that_was_not_served_shows_nothing(deployed, made, status):
    rows = [FIRST | {"status": status, "first_token": 0.5}, *LATER]
    assert replay(made(rows), deployed()).predicted.meta["cold_start"] is None


def test_a_first_request_without_a_first_token_shows_nothing(deployed, made):
    assert replay(made([FIRST, *LATER]), deployed()).predicted.meta["cold_start"] is None


def test_the_first_is_the_first_to_arrive_not_the_first_row(deployed, made):
    rows = [row | {"first_token": 3.0, "last_token": 4.0} for row in LATER]
    rows.append(FIRST | {"id": "early", "first_token": 0.5, "last_token": 0.6})
    assert replay(made(rows), deployed()).predicted.meta["cold_start"]["request"] == "early"
