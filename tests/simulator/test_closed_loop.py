"""Clients that wait for one request before they send the next."""

from itertools import pairwise

import numpy as np
import pytest

from simulator.accelerators.linear import Linear
from simulator.engine import NS, ClosedLoop, Engine
from simulator.engine_config import EngineConfig
from simulator.errors import SimulationError
from simulator.request import Request

CONFIG = EngineConfig(max_num_seqs=64, max_num_batched_tokens=512, num_gpu_blocks=4000)


def serve(arrivals, clients, delays=None, config=CONFIG, output=20):
    requests = [Request(str(row), arrival, 100, output + row % 7) for row, arrival in enumerate(arrivals)]
    loop = ClosedLoop(clients, delays or [0.0] * len(requests))
    engine = Engine(config, Linear({"step": 0.01, "sequence": 1e-4}))
    return engine.run(requests, closed_loop=loop).served


def in_flight(served):
    """Most requests between sending and last token, ends before sendings of the same instant."""
    events = sorted([(one.arrival, 1) for one in served] + [(one.last_token, -1) for one in served])
    return int(np.cumsum([change for _, change in events]).max())


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("clients", [1, 3, 8])
def test_no_more_than_the_clients_requests_are_in_flight_and_none_lies_idle(clients, asynchronous):
    config = EngineConfig(
        max_num_seqs=64, max_num_batched_tokens=512, num_gpu_blocks=4000, async_scheduling=asynchronous
    )
    served = serve([0.0] * 30, clients, config=config)
    assert in_flight(served) == clients
    ends = sorted(one.last_token for one in served)
    sent = [one.arrival for one in served]
    assert sent == sorted(sent)
    assert sent[clients:] == ends[: 30 - clients]


def test_a_request_is_not_sent_before_its_arrival():
    served = serve([float(row) for row in range(10)], clients=4)
    assert [one.arrival / NS for one in served] == [float(row) for row in range(10)]
    hurried = serve([0.05 * row for row in range(40)], clients=2)
    assert in_flight(hurried) == 2
    assert all(one.arrival / NS >= 0.05 * row - 1e-9 for row, one in enumerate(hurried))
    assert any(one.arrival / NS > 0.05 * row + 0.01 for row, one in enumerate(hurried))


def test_the_way_to_the_engine_delays_every_request():
    served = serve([0.0] * 6, clients=1, delays=[0.25] * 6)
    gaps = [after.arrival - before.last_token for before, after in pairwise(served)]
    assert served[0].arrival == 0.25 * NS
    assert gaps == [0.25 * NS] * 5


def test_clients_in_a_loop_do_not_give_up():
    engine = Engine(CONFIG, Linear({"step": 0.01}))
    with pytest.raises(SimulationError, match="do not give up"):
        engine.run([Request("0", 0.0, 10, 5, abort=1.0)], closed_loop=ClosedLoop(1, [0.0]))
