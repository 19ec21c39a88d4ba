"""The engine gives to the bit what one gives that touches every request and block in every step."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_scheduler import PlainScheduler

from simulator import engine
from simulator.engine import ClosedLoop, Engine
from simulator.engine_config import EngineConfig
from simulator.errors import SimulationError
from simulator.request import Request


class Uneven:
    """A step time that depends on all a batch says, each single context included."""

    components = ("tokens", "contexts")

    def step(self, batch):
        return 0.003 + 1e-4 * batch.num_tokens, 1e-6 * sum(one % 7 for one in batch.decode_contexts)


class UnevenAtOnce(Uneven):
    def decode_run(self, batch, steps):
        return np.array([self.step(batch.later(place)) for place in range(steps)])


VERSIONS = [(0, 7), (0, 10), (0, 11), (0, 12), (0, 16), (0, 19), (0, 24), (0, 28), (0, 32)]


@st.composite
def workloads(draw):
    size = draw(st.sampled_from([1, 4, 16]))
    milliseconds, tokens = st.integers(0, 200), st.integers(1, 90)
    outputs = st.one_of(st.integers(1, 25), st.integers(1, 150))
    abort = st.one_of(st.none(), st.none(), st.integers(0, 400))
    one = st.tuples(milliseconds, tokens, outputs, st.integers(0, 2), st.integers(0, 2), abort, st.integers(0, 12))
    lengths = draw(st.lists(one, min_size=1, max_size=14))
    hashed = draw(st.sampled_from(["nothing", "prompt", "everything"]))
    requests = []
    for place, (arrival, prompt, output, priority, prefix, after, shared) in enumerate(lengths):
        full = (prompt if hashed == "prompt" else prompt + output) // size
        common = min(full, shared)
        hashes = [1000 * prefix + at for at in range(common)] + [
            10_000 + 1000 * place + at for at in range(common, full)
        ]
        requests.append(
            Request(
                f"r{place}",
                arrival * 1e-3,
                prompt,
                output,
                priority,
                None if hashed == "nothing" else hashes,
                None if after is None else (arrival + after) * 1e-3,
            )
        )
    longest = max(-(-(one.prompt_tokens + one.output_tokens) // size) for one in requests)
    reserve = draw(st.booleans())
    config = EngineConfig(
        version=draw(st.sampled_from(VERSIONS)),
        max_num_seqs=draw(st.integers(1, 12)),
        max_num_batched_tokens=draw(st.sampled_from([3, 16, 64, 512])),
        max_model_len=draw(st.sampled_from([64, 4096])),
        block_size=size,
        num_gpu_blocks=1 + longest + draw(st.sampled_from([0, 3, 20, 300])),
        enable_prefix_caching=draw(st.booleans()),
        long_prefill_token_threshold=draw(st.sampled_from([0, 8])),
        scheduling_policy=draw(st.sampled_from(["fcfs", "priority"] if reserve else ["fcfs"])),
        async_scheduling=draw(st.booleans()),
        scheduler_reserve_full_isl=reserve,
        watermark=draw(st.sampled_from([0.0, 0.05])),
    )
    options = {
        "record_token_times": draw(st.booleans()),
        "cold_start": draw(st.sampled_from([0.0, 0.1])),
        "ahead": draw(st.integers(0, 2)),
    }
    outside = draw(st.sampled_from(["open", "closed", "limited"]))
    if outside == "closed":
        requests = [Request(*(getattr(one, name) for name in Request.__slots__[:6])) for one in requests]
        options["closed_loop"] = ClosedLoop(
            draw(st.integers(1, 6)), [0.001 * (one % 3) for one in range(len(requests))]
        )
    elif outside == "limited":
        limits = st.lists(st.integers(0, 8), min_size=len(requests), max_size=len(requests))
        options["most_unfinished"] = draw(limits)
    return config, requests, options


STAMPS = ("arrival", "queued", "scheduled", "first_token", "last_token", "token_times")
COUNTS = ("status", "finished", "num_tokens", "num_preemptions", "num_cached_tokens")


def everything(config, requests, options, model):
    """All that a run says: each iteration, each request, the totals, what was told of progress, or why it ended."""
    iterations, ended = [], []

    def observe(one):
        items = [(item.served.index, *item[1:]) for item in one.step.items]
        preempted = [served.index for served in one.step.preempted]
        state = (one.start, one.duration, one.scheduled_at, one.running, one.waiting, one.free_blocks)
        iterations.append((*state, tuple(one.components), items, preempted))

    try:
        run = Engine(config, model).run(requests, observe=observe, progress=ended.append, **options)
    except SimulationError as error:
        return iterations, ended, str(error)
    served = [[getattr(one, name) for name in (*STAMPS, *COUNTS)] for one in run.served]
    return iterations, ended, served, (run.iterations, run.busy, run.end, run.component_seconds)


@pytest.mark.parametrize(("model", "least"), [(Uneven(), 10), (UnevenAtOnce(), 1), (UnevenAtOnce(), 5)])
@given(workload=workloads())
@settings(max_examples=120, deadline=None)
def test_every_iteration_and_every_request_is_the_plain_schedulers(model, least, workload):
    with mock.patch.object(engine, "Scheduler", PlainScheduler):
        plain = everything(*workload, Uneven())
    with mock.patch.object(engine, "LEAST_LEAP", least):
        assert everything(*workload, model) == plain


def test_without_an_event_a_run_asks_for_the_price_of_stretches_and_not_of_steps():
    asked = []

    class Counted(UnevenAtOnce):
        def step(self, batch):
            asked.append(batch)
            return super().step(batch)

        def decode_run(self, batch, steps):
            return np.array([Uneven.step(self, batch.later(place)) for place in range(steps)])

    config = EngineConfig(num_gpu_blocks=4000)
    run = Engine(config, Counted()).run([Request(str(place), 0.0, 100, 1000) for place in range(8)])
    assert run.iterations >= 1000
    assert len(asked) < 10


def test_nobody_who_waits_for_room_is_passed_by_in_a_stretch():
    """A waiting request is admitted by the first schedule call after another one ended."""
    config = EngineConfig(num_gpu_blocks=4000, max_num_seqs=2)
    requests = [Request("short", 0.0, 10, 50), Request("long", 0.0, 10, 500), Request("waits", 0.01, 10, 5)]
    short, _, waits = Engine(config, UnevenAtOnce()).run(requests).served
    assert short.last_token <= waits.scheduled < short.last_token + 10_000_000


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_block_filled_by_decoding_is_found_from_the_same_step_on(asynchronous):
    """A second turn that repeats the first one's output, sent at any moment of it."""
    config = EngineConfig(num_gpu_blocks=400, block_size=4, async_scheduling=asynchronous)
    hashes = list(range(20))
    first = Request("first", 0.0, 6, 70, block_hashes=hashes)

    def cached(model) -> list[int]:
        turns = [Request("next", 0.002 * place, 60, 2, block_hashes=hashes) for place in range(100)]
        return [Engine(config, model).run([first, turn]).served[1].num_cached_tokens for turn in turns]

    with mock.patch.object(engine, "Scheduler", PlainScheduler):
        plain = cached(Uneven())
    assert len(set(plain)) > 10
    assert cached(Uneven()) == cached(UnevenAtOnce()) == plain
