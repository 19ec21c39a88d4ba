"""Invariants of any run, whatever the workload and the configuration."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.engine import Engine, Iteration
from simulator.engine_config import EngineConfig
from simulator.errors import NeverFitsError, StuckError
from simulator.kv_cache import KVCache
from simulator.request import Request, Status
from simulator.scheduler import Scheduler


class UnevenSteps:
    """A step time that depends on the batch, so that arrivals fall at odd moments of steps."""

    components = ("base", "tokens")

    def step(self, batch):
        return (0.003, 0.0001 * batch.num_tokens)


@st.composite
def workloads(draw):
    block_size = draw(st.sampled_from([4, 16]))
    requests = draw(
        st.lists(
            st.tuples(
                st.integers(0, 60),  # arrival, ms
                st.integers(1, 90),  # prompt
                st.integers(1, 25),  # output
                st.integers(0, 2),  # priority
                st.integers(0, 2),  # shared prefix
                st.one_of(st.none(), st.integers(0, 200)),  # abort, ms
            ),
            min_size=1,
            max_size=18,
        )
    )
    longest = max(-(-(prompt + output) // block_size) for _, prompt, output, _, _, _ in requests)
    # Without it vLLM itself can go round for ever under equal priorities (tested on its own below).
    reserve_full_isl = draw(st.booleans())
    policy = draw(st.sampled_from(["fcfs", "priority"] if reserve_full_isl else ["fcfs"]))
    config = EngineConfig(
        version=draw(st.sampled_from([(0, 10), (0, 16), (0, 19), (0, 24), (0, 32)])),
        max_num_seqs=draw(st.integers(1, 12)),
        max_num_batched_tokens=draw(st.sampled_from([3, 16, 64, 512])),
        max_model_len=draw(st.sampled_from([64, 4096])),
        block_size=block_size,
        num_gpu_blocks=1 + longest + draw(st.integers(0, 20)),
        enable_prefix_caching=draw(st.booleans()),
        long_prefill_token_threshold=draw(st.sampled_from([0, 8])),
        scheduling_policy=policy,
        async_scheduling=draw(st.booleans()),
        scheduler_reserve_full_isl=reserve_full_isl,
        watermark=draw(st.sampled_from([0.0, 0.05])),
    )
    made = []
    for place, (arrival, prompt, output, priority, prefix, abort) in enumerate(requests):
        full = prompt // block_size
        shared = min(full, 3)
        hashes = [prefix * 1000 + i for i in range(shared)] + [10_000 + place * 1000 + i for i in range(shared, full)]
        made.append(
            Request(
                id=f"r{place}",
                arrival=arrival * 1e-3,
                prompt_tokens=prompt,
                output_tokens=output,
                priority=priority,
                block_hashes=hashes,
                abort=None if abort is None else (arrival + abort) * 1e-3,
            )
        )
    return config, made


class Watch:
    """Checks every iteration as it happens."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.last_start = -1
        self.last_end = -1
        self.scheduled: dict[str, int] = {}

    def __call__(self, iteration: Iteration) -> None:
        config = self.config
        assert iteration.start >= self.last_end
        assert iteration.start >= self.last_start
        assert iteration.duration > 0
        assert iteration.scheduled_at <= iteration.start
        self.last_start, self.last_end = iteration.start, iteration.start + iteration.duration
        assert sum(item.num_scheduled_tokens for item in iteration.step.items) <= config.token_budget
        assert len({item.served.index for item in iteration.step.items}) == len(iteration.step.items)
        assert iteration.running <= config.max_num_seqs
        assert 0 <= iteration.free_blocks <= config.num_gpu_blocks - 1
        for item in iteration.step.items:
            assert item.num_scheduled_tokens >= 1
            assert item.num_computed_tokens + item.num_scheduled_tokens <= config.max_model_len
            one = item.served.request.id
            self.scheduled[one] = self.scheduled.get(one, 0) + item.num_scheduled_tokens


@given(workloads())
@settings(max_examples=300, deadline=None)
def test_every_request_ends_exactly_once_with_the_tokens_it_asked_for(workload):
    config, requests = workload
    simulation = Engine(config, UnevenSteps()).run(requests, record_token_times=True)
    assert [one.request.id for one in simulation.served] == [request.id for request in requests]
    for one in simulation.served:
        total = min(one.request.prompt_tokens + one.request.output_tokens, config.max_model_len)
        if one.status is Status.REJECTED:
            assert one.request.prompt_tokens >= config.max_model_len
        elif one.status is Status.ABORTED:
            assert one.request.abort is not None
            assert one.num_tokens <= total
        else:
            assert one.status is Status.FINISHED
            assert one.num_tokens == total
            assert len(one.token_times) == total - one.request.prompt_tokens
            assert one.arrival <= one.queued <= one.scheduled < one.first_token <= one.last_token
            assert one.token_times == sorted(one.token_times)
            assert (one.token_times[0], one.token_times[-1]) == (one.first_token, one.last_token)


@given(workloads())
@settings(max_examples=300, deadline=None)
def test_time_never_runs_back_and_no_limit_is_passed(workload):
    config, requests = workload
    Engine(config, UnevenSteps()).run(requests, observe=Watch(config))


@given(workloads())
@settings(max_examples=300, deadline=None)
def test_tokens_scheduled_are_the_tokens_computed(workload):
    config, requests = workload
    watch = Watch(config)
    simulation = Engine(config, UnevenSteps()).run(requests, observe=watch)
    # Asynchronous engines before 0.11 schedule a request once more while its last token is in flight.
    wasteful = config.async_scheduling and not config.semantics.capped_requests_skip_the_last_step
    for one in simulation.served:
        if one.status is Status.FINISHED and not one.num_preemptions and not wasteful:
            # The last token is sampled, never computed.
            assert watch.scheduled[one.request.id] == one.num_tokens - 1 - one.num_cached_tokens


@given(workloads())
@settings(max_examples=200, deadline=None)
def test_blocks_are_conserved_and_none_is_free_and_referenced(workload):
    config, requests = workload
    schedulers = []
    original = Scheduler.schedule

    def check(scheduler: Scheduler) -> None:
        cache = scheduler.kv_cache
        # Steady requests' counters are those of an earlier step: how many blocks they hold follows from their contexts.
        alike = sum(one.num_blocks - len(one.blocks) for one in scheduler.running if not one.steady)
        for one in scheduler.running:
            if one.steady:
                computed = one.offset + scheduler._scheduled + 1
                alike += -(-computed // cache.block_size) - len(one.blocks)
        found = [block for one in scheduler.running for block in one.blocks]
        for block, references in cache._references.items():
            assert references == found.count(block)
            assert (block in cache._free) == (references == 0)
        assert cache.num_free_blocks == cache._front + sum(cache._free.values()) >= 0
        assert cache.num_free_blocks + len(set(found)) + alike == cache.num_gpu_blocks - 1
        assert set(found) <= set(cache._references) == set(cache._hash_of)
        for block_hash, blocks in cache._blocks_of.items():
            assert blocks
            assert all(cache._hash_of[block] == block_hash for block in blocks)

    def schedule(self: Scheduler, now: int):
        if self not in schedulers:
            schedulers.append(self)
        step = original(self, now)
        check(self)
        return step

    Scheduler.schedule = schedule
    try:
        Engine(config, UnevenSteps()).run(requests)
    finally:
        Scheduler.schedule = original
    for scheduler in schedulers:
        assert scheduler.kv_cache.num_free_blocks == config.num_gpu_blocks - 1
        assert scheduler.num_unfinished == 0


@given(workloads(), st.integers(-(10**6), 10**6))
@settings(max_examples=100, deadline=None)
def test_shifting_all_times_by_a_constant_changes_nothing(workload, shift_ms):
    config, requests = workload
    shift = shift_ms * 1e-3

    def moved(request: Request) -> Request:
        return Request(
            request.id,
            request.arrival + shift,
            request.prompt_tokens,
            request.output_tokens,
            request.priority,
            request.block_hashes,
            None if request.abort is None else request.abort + shift,
        )

    here = Engine(config, UnevenSteps()).run(requests)
    there = Engine(config, UnevenSteps()).run([moved(request) for request in requests])
    for left, right in zip(here.served, there.served, strict=True):
        assert left.status is right.status
        for stamp in ("queued", "scheduled", "first_token", "last_token"):
            here_at, there_at = getattr(left, stamp), getattr(right, stamp)
            assert (here_at is None) == (there_at is None)
            assert here_at is None or here_at - left.arrival == there_at - right.arrival


@given(workloads())
@settings(max_examples=100, deadline=None)
def test_a_run_repeats_to_the_nanosecond(workload):
    config, requests = workload
    first, second = (Engine(config, UnevenSteps()).run(requests) for _ in range(2))
    assert [(one.first_token, one.last_token) for one in first.served] == [
        (one.first_token, one.last_token) for one in second.served
    ]


def config(**arguments) -> EngineConfig:
    return EngineConfig(**{"num_gpu_blocks": 100, "max_model_len": 4096, "async_scheduling": False} | arguments)


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_two_requests_that_evict_each_other_both_finish(policy, asynchronous):
    # 10 usable blocks; each request needs all of them in the end.
    engine = Engine(
        config(num_gpu_blocks=11, block_size=4, scheduling_policy=policy, async_scheduling=asynchronous),
        UnevenSteps(),
    )
    simulation = engine.run([Request("a", 0.0, 8, 32), Request("b", 0.001, 8, 32)])
    assert [one.status for one in simulation.served] == [Status.FINISHED] * 2
    assert sum(one.num_preemptions for one in simulation.served) >= 1


def test_a_request_that_can_never_fit_is_refused_with_the_numbers():
    with pytest.raises(NeverFitsError, match=r"'big' needs 7 KV blocks.*has 5 usable"):
        Engine(config(num_gpu_blocks=6, block_size=4), UnevenSteps()).run([Request("big", 0.0, 20, 8)])


def test_a_run_that_cannot_progress_says_which_request_is_stuck():
    scheduler_never_admits = config(num_gpu_blocks=11, block_size=4)
    original = KVCache.allocate
    KVCache.allocate = lambda *_, **__: False
    try:
        with pytest.raises(StuckError, match="'a' has 8 tokens, 10 of 10 KV blocks are free"):
            Engine(scheduler_never_admits, UnevenSteps()).run([Request("a", 0.0, 8, 2)])
    finally:
        KVCache.allocate = original


def test_requests_that_evict_each_other_for_ever_end_the_run_with_the_reason():
    # Equal priorities and arrivals: vLLM evicts the first of them, and readmits it before the others.
    engine = Engine(
        config(
            num_gpu_blocks=10,
            max_num_batched_tokens=512,
            long_prefill_token_threshold=8,
            scheduling_policy="priority",
            scheduler_reserve_full_isl=False,
            enable_prefix_caching=False,
        ),
        UnevenSteps(),
    )
    lengths = [(14, 58), (4, 8), (73, 48), (2, 35), (38, 44), (84, 9), (10, 33), (48, 37)]
    with pytest.raises(StuckError, match=r"without an output token.*preempt each other"):
        engine.run([Request(f"r{i}", 0.0, prompt, output) for i, (prompt, output) in enumerate(lengths)])


def test_an_accelerator_that_gives_no_time_is_refused():
    class Nothing:
        components = ("none",)

        def step(self, batch):
            return (0.0,)

    with pytest.raises(Exception, match=r"gave 0\.0 seconds"):
        Engine(config(), Nothing()).run([Request("a", 0.0, 8, 2)])


def test_synchronous_waits_for_the_running_step_and_asynchronous_for_one_more():
    class OneSecond:
        components = ("step",)

        def step(self, batch):
            return (1.0,)

    requests = [Request("first", 0.0, 8, 8), Request("second", 0.5, 8, 1)]
    sync = Engine(config(), OneSecond()).run(requests).served[1]
    asynchronous = Engine(config(async_scheduling=True), OneSecond()).run(requests).served[1]
    # Arrived in the middle of step 0: residual 0.5 s and the own step; asynchronously step 1 is committed already.
    assert sync.first_token - sync.arrival == 1_500_000_000
    assert asynchronous.first_token - asynchronous.arrival == 2_500_000_000


def test_limits_keep_a_request_out_until_few_enough_run():
    """Four at once: the third may only begin beside one other, the fourth only alone."""
    engine = Engine(config(num_gpu_blocks=100, max_num_seqs=4), UnevenSteps())
    lengths = {"a": 3, "b": 5, "c": 4, "d": 2}
    requests = [Request(name, 0.0, 10, output) for name, output in lengths.items()]
    a, b, c, d = engine.run(requests, most_unfinished=[9, 9, 1, 0]).served
    assert a.scheduled == b.scheduled == 0
    assert a.last_token <= c.scheduled < b.last_token
    assert max(b.last_token, c.last_token) <= d.scheduled
    free = engine.run(requests, most_unfinished=[9, 9, 9, 9]).served
    assert [one.last_token for one in free] == [one.last_token for one in engine.run(requests).served]


def test_a_prompt_longer_than_the_model_allows_is_rejected_and_the_rest_is_served():
    simulation = Engine(config(max_model_len=64), UnevenSteps()).run(
        [Request("long", 0.0, 64, 4), Request("short", 0.0, 60, 10)]
    )
    assert [one.status for one in simulation.served] == [Status.REJECTED, Status.FINISHED]
    assert simulation.served[1].num_tokens == 64


def test_a_cold_start_lengthens_the_first_iteration_alone():
    requests = [Request("a", 0.0, 8, 3)]
    warm = Engine(config(), UnevenSteps()).run(requests).served[0]
    cold = Engine(config(), UnevenSteps()).run(requests, cold_start=0.25).served[0]
    assert cold.first_token - warm.first_token == 250_000_000
    assert cold.last_token - warm.last_token == 250_000_000
