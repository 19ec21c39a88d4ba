"""The engine loop: the one place where simulated time moves.

Source: vLLM ``EngineCore.step`` (synchronous) and ``EngineCore.step_with_batch_queue`` (asynchronous, two
batches deep). Scheduling takes no time of its own here: host time that the device does not hide is part of
an iteration's duration (``accelerators.base.HostOverhead``).
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import add

import numpy as np

from simulator.accelerators.base import AcceleratorModel, Floats
from simulator.batch import Batch
from simulator.engine_config import EngineConfig
from simulator.errors import NeverFitsError, SimulationError, StuckError
from simulator.request import Request, ServedRequest, Status
from simulator.scheduler import Scheduler, Step

NS = 1_000_000_000
PATIENCE = 100
"""Iterations without an output token between two looks at whether a run still gets anywhere."""
LEAST_LEAP, MOST_LEAP = 10, 4096
"""Steps of a stretch that is worth to be taken at once, and most that are."""


def _order(served: ServedRequest) -> tuple[int, int]:
    return served.arrival, served.index


def nanoseconds(seconds: float) -> int:
    """Round a time in seconds to integer nanoseconds."""
    return round(seconds * NS)


@dataclass(slots=True)
class Iteration:
    """One executed step, for observers. Times in nanoseconds; counts as they were right after scheduling."""

    start: int
    duration: int
    scheduled_at: int
    step: Step
    running: int
    waiting: int
    free_blocks: int
    components: Sequence[float]


@dataclass(slots=True)
class Simulation:
    """What a run produced.

    ``served`` is in the order of the requests given. ``iterations`` counts the executed steps, ``busy`` their
    nanoseconds, ``component_seconds`` their time by component.
    """

    served: list[ServedRequest]
    components: tuple[str, ...]
    iterations: int = 0
    busy: int = 0
    end: int = 0
    component_seconds: list[float] = field(default_factory=list)


def check_fits(served: ServedRequest, config: EngineConfig) -> None:
    """Refuse a request that the KV cache could not hold even alone.

    Raises
    ------
    NeverFitsError
        If it needs more KV blocks than there are.
    """
    total = served.max_total_tokens
    needed = -(-(total - 1) // config.block_size)
    if needed > config.num_gpu_blocks - 1:
        raise NeverFitsError(
            f"request {served.request.id!r} needs {needed} KV blocks for its {total} tokens; the cache has "
            f"{config.num_gpu_blocks - 1} usable ones: raise engine.num_gpu_blocks or lower engine.max_model_len"
        )


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """Clients that keep at most ``max_concurrency`` requests in flight.

    A request is sent, in the order of the arrivals, as soon as its arrival has come and one of the clients is free: the
    others wait at the client, where no latency counts yet. ``delays`` are seconds between sending and the engine, one
    each request in the order given, and not part of its arrival. A client is free when the engine has ended its request
    (output that old engines hand on late is not waited for).
    """

    max_concurrency: int
    delays: Sequence[float]


class Engine:
    """One vLLM engine on a virtual clock.

    Parameters
    ----------
    config : EngineConfig
        Validated here.
    accelerator : AcceleratorModel
        Prices iterations.
    """

    def __init__(self, config: EngineConfig, accelerator: AcceleratorModel) -> None:
        self.config = config.validate()
        self.accelerator = accelerator

    def run(
        self,
        requests: Iterable[Request],
        *,
        observe: Callable[[Iteration], None] | None = None,
        progress: Callable[[int], None] | None = None,
        record_token_times: bool = False,
        cold_start: float = 0.0,
        ahead: int = 0,
        closed_loop: ClosedLoop | None = None,
        most_unfinished: Sequence[int] | None = None,
    ) -> Simulation:
        """Serve the requests to the last token.

        Parameters
        ----------
        requests : iterable of Request
            In any order; equal arrivals are queued in the order given.
        observe : callable, optional
            Called with every executed iteration when it has been scheduled.
        progress : callable, optional
            Called with the number of requests that have ended, after each iteration that ended some.
        record_token_times : bool
            Keep the time of every output token.
        cold_start : float
            Seconds by which the first iteration lasts longer than the accelerator model says.
        ahead : int
            Most requests that the first schedule call sees (0: all that have arrived). ``LLM.generate`` sends its
            requests one by one to an engine that schedules as soon as it has the first.
        closed_loop : ClosedLoop, optional
            Clients that wait for one request before they send the next. Arrivals are then the earliest times to send,
            and ``ServedRequest.arrival`` says when the engine got each.
        most_unfinished : sequence of int, optional
            For each request, in the order given, the most unfinished requests in the engine at which it is taken in;
            until then it waits outside, and those behind it with it. So a run keeps the concurrency of another one.

        Raises
        ------
        NeverFitsError
            If a request needs more KV blocks than there are.
        StuckError
            If requests are left that the scheduler never admits.
        """
        served = [self._enter(index, request, record_token_times) for index, request in enumerate(requests)]
        if closed_loop is not None and any(one.request.abort is not None for one in served):
            raise SimulationError("clients in a closed loop do not give up: expected requests without abort")
        cold = nanoseconds(cold_start)
        run = _Run(self.config, self.accelerator, served, observe, progress, cold, ahead, closed_loop, most_unfinished)
        run.to_the_end()
        return run.result

    def _enter(self, index: int, request: Request, record_token_times: bool) -> ServedRequest:
        if request.prompt_tokens < 1 or request.output_tokens < 1:
            raise SimulationError(
                f"request {request.id!r}: {request.prompt_tokens} prompt and {request.output_tokens} output "
                "tokens: expected at least one of each"
            )
        if not math.isfinite(request.arrival):
            raise SimulationError(f"request {request.id!r}: arrival {request.arrival}: expected a finite time")
        config = self.config
        served = ServedRequest.enter(request, index, config.max_model_len, record_token_times=record_token_times)
        if request.prompt_tokens >= config.max_model_len:
            # vLLM's front end refuses such a prompt before the engine sees it.
            served.status = Status.REJECTED
            served.finished = True
            return served
        check_fits(served, config)
        return served


class _Run:
    """State of one run: the clock, the device, what is in flight and what is still to come."""

    def __init__(
        self,
        config: EngineConfig,
        accelerator: AcceleratorModel,
        served: list[ServedRequest],
        observe: Callable[[Iteration], None] | None,
        progress: Callable[[int], None] | None,
        cold_start: int,
        ahead: int,
        closed_loop: ClosedLoop | None,
        most_unfinished: Sequence[int] | None,
    ) -> None:
        self.scheduler = Scheduler(config, record_token_times=any(one.token_times is not None for one in served))
        self.accelerator = accelerator
        self.observe = observe
        self.progress = progress
        self.cold_start = cold_start
        self.ahead = ahead
        self.most_unfinished = most_unfinished
        self.decode_run: Callable[[Batch, int], Floats] | None = getattr(accelerator, "decode_run", None)
        self.last_duration = 0
        self.depth = 2 if config.async_scheduling else 1
        self.semantics = config.semantics
        self.in_flight: deque[tuple[Step, int]] = deque()
        entering = [one for one in served if one.status is not Status.REJECTED]
        self.arrivals = deque(sorted(entering, key=_order))
        self.closed_loop = closed_loop
        self.unsent: deque[ServedRequest] = deque()
        if closed_loop is not None and self.arrivals:
            self.unsent, self.arrivals = self.arrivals, deque()
            self._send(closed_loop.max_concurrency, self.unsent[0].arrival)
        aborts = [
            (max(one.arrival, nanoseconds(one.request.abort)), one) for one in entering if one.request.abort is not None
        ]
        self.aborts = deque(sorted(aborts, key=lambda abort: (abort[0], abort[1].index)))
        self.clock = self.device_free = self.arrivals[0].arrival if self.arrivals else 0
        self.ended = 0
        self.fruitless = 0
        self.preempted_since_token = False
        self.delivered: dict[int, int] = {}
        self.result = Simulation(served, tuple(accelerator.components))
        self.result.component_seconds = [0.0] * len(self.result.components)

    def to_the_end(self) -> None:
        """Alternate as ``EngineCore`` does: take in arrivals, fill the queue of steps, else await the oldest."""
        scheduler = self.scheduler
        while True:
            if self.arrivals:
                self._take_in_arrivals()
            if self.aborts:
                self._drop_aborted()
            if scheduler.num_unfinished:
                if self.decode_run is not None and self._leap(self.decode_run):
                    continue
                step = scheduler.schedule(self.clock)
                self._watch_progress(step)
                end = self._execute(step) if step else self.clock
                self.in_flight.append((step, end))
                if len(self.in_flight) < self.depth:
                    continue
            elif not self.in_flight:
                if not self.arrivals:
                    self._deliver_late()
                    return
                self.clock = self.arrivals[0].arrival
                continue
            self._await_oldest()

    def _leap(self, decode_run: Callable[[Batch, int], Floats]) -> bool:
        """Take steps of a stretch without events at once, as the loop would one by one; False if there is none."""
        scheduler = self.scheduler
        steps = min(scheduler.quiet_steps(), MOST_LEAP)
        if steps < LEAST_LEAP or len(self.in_flight) != self.depth - 1:
            return False
        begin, event = max(self.clock, self.device_free), self._next_event()
        if event is not None:
            steps = min(steps, max(0, event - begin) // self.last_duration + 1)
            if steps < LEAST_LEAP:
                return False
        components = decode_run(scheduler.next_batch(), steps)
        durations = [nanoseconds(sum(row)) for row in components.tolist()]
        if min(durations) <= 0:
            return False
        ends = list(accumulate(durations, initial=begin))
        # Each step is scheduled when the one before, or asynchronously the one before that, has been updated.
        updates = ends[:-1] if self.depth == 2 else ends[1:]
        if event is not None:
            steps = bisect_left(updates, event)
            if not steps:
                return False
        self._take(ends[: steps + 1], updates[:steps], components[:steps])
        return True

    def _take(self, ends: list[int], updates: list[int], components: Floats) -> None:
        """Move on by a stretch: ends of its steps after its begin, times of updates, seconds per component."""
        scheduler, result, steps = self.scheduler, self.result, len(updates)
        if self.observe is not None:
            waiting = len(scheduler.waiting)
            scheduled_at = [self.clock, *updates]
            for place, (step, free) in enumerate(scheduler.steps_of_leap(steps)):
                start, duration = ends[place], ends[place + 1] - ends[place]
                parts = components[place].tolist()
                self.observe(
                    Iteration(start, duration, scheduled_at[place], step, scheduler.num_running, waiting, free, parts)
                )
        last = scheduler.leap(updates)
        if last is not None:
            self.in_flight = deque([(last, ends[-1])])
        self.clock = result.end = updates[-1]
        self.device_free = ends[-1]
        self.last_duration = ends[-1] - ends[-2]
        self.fruitless, self.preempted_since_token = 0, False
        result.iterations += steps
        result.busy += ends[-1] - ends[0]
        sums = np.add.accumulate(np.vstack([result.component_seconds, components]))
        result.component_seconds = sums[-1].tolist()

    def _next_event(self) -> int | None:
        """When the next request arrives, or has arrived and is no longer kept out, or is given up."""
        first = self.arrivals[0] if self.arrivals else None
        times = []
        if first is not None and not (first.arrival <= self.clock and self._is_kept_out(first)):
            times = [first.arrival]
        times += next(([time] for time, _ in self.aborts if time > self.clock), [])
        return min(times, default=None)

    def _take_in_arrivals(self) -> None:
        arrivals = self.arrivals
        while arrivals and arrivals[0].arrival <= self.clock and not self._is_kept_out(arrivals[0]):
            served = arrivals.popleft()
            served.queued = self.clock
            self.scheduler.add(served)

    def _is_kept_out(self, served: ServedRequest) -> bool:
        """Whether a request has to wait outside the engine, until others end."""
        unfinished, most = self.scheduler.num_unfinished, self.most_unfinished
        if self.ahead and not self.result.iterations and unfinished == self.ahead:
            return True
        return most is not None and unfinished > most[served.index]

    def _send(self, free: int, now: int) -> None:
        """Let so many clients send their next requests, at their arrivals or now."""
        assert self.closed_loop is not None
        for _ in range(min(free, len(self.unsent))):
            served = self.unsent.popleft()
            delay = nanoseconds(self.closed_loop.delays[served.index])
            served.arrival = max(served.arrival, now) + delay
            insort(self.arrivals, served, key=_order)

    def _drop_aborted(self) -> None:
        """Forget requests whose clients gave up; those that the engine has not taken in yet wait for that."""
        later = []
        while self.aborts and self.aborts[0][0] <= self.clock:
            abort = self.aborts.popleft()
            if abort[1].queued is None:
                later.append(abort)
            else:
                self.scheduler.abort(abort[1])
        self.aborts.extendleft(reversed(later))

    def _watch_progress(self, step: Step) -> None:
        """End a run in which requests evict each other for ever before any of them samples a token.

        vLLM can do that: under the priority policy it evicts the first of equally unimportant requests, so that
        those may take turns if ``scheduler_reserve_full_isl`` does not keep them apart. A sampled token is never
        lost, so a run that samples ends.
        """
        if step.samples:
            self.fruitless = 0
            self.preempted_since_token = False
            return
        self.fruitless += 1
        self.preempted_since_token |= bool(step.preempted)
        if self.preempted_since_token and self.fruitless % PATIENCE == 0:
            scheduler = self.scheduler
            config = scheduler.config
            chunk = min(config.token_budget, config.long_prefill_token_threshold or config.token_budget)
            unfinished = [*scheduler.running, *scheduler.waiting]
            if self.fruitless > 10 * sum(-(-one.num_tokens // chunk) for one in unfinished):
                raise StuckError(
                    f"{self.fruitless} iterations without an output token: {len(unfinished)} requests preempt each "
                    f"other before their prompts are computed (the first is {unfinished[0].request.id!r}); vLLM would "
                    "go on for ever. Raise engine.num_gpu_blocks, or --set engine.scheduler_reserve_full_isl=true"
                )

    def _execute(self, step: Step) -> int:
        """Hand a step to the device; return when it will be done."""
        batch = step.batch()
        components = self.accelerator.step(batch)
        duration = nanoseconds(sum(components))
        if duration <= 0:
            raise SimulationError(f"the accelerator model gave {sum(components)} seconds for {batch}")
        duration += self.cold_start
        self.cold_start = 0
        self.last_duration = duration
        start = max(self.clock, self.device_free)
        if self.semantics.output_after_next_launch and start == self.device_free and batch.prefills:
            self.delivered[start] = start + duration
        self.device_free = start + duration
        result = self.result
        result.iterations += 1
        result.busy += duration
        result.component_seconds = list(map(add, result.component_seconds, components))
        if self.observe is not None:
            scheduler = self.scheduler
            self.observe(
                Iteration(
                    start,
                    duration,
                    self.clock,
                    step,
                    scheduler.num_running,
                    len(scheduler.waiting),
                    scheduler.kv_cache.num_free_blocks,
                    components,
                )
            )
        return self.device_free

    def _deliver_late(self) -> None:
        """Move the tokens of steps whose output had to wait to when the next step was launched."""
        if not self.delivered:
            return
        for served in self.result.served:
            if served.first_token is not None and served.last_token is not None:
                served.first_token = self.delivered.get(served.first_token, served.first_token)
                served.last_token = self.delivered.get(served.last_token, served.last_token)
            if served.token_times is not None:
                served.token_times = [self.delivered.get(time, time) for time in served.token_times]

    def _await_oldest(self) -> None:
        step, end = self.in_flight.popleft()
        if not step and not any(other for other, _ in self.in_flight):
            self._wait_for_an_event(step)
            return
        self.clock = max(self.clock, end)
        if self.aborts and self.semantics.aborts_before_update:
            self._drop_aborted()
        ended = self.scheduler.update(step, self.clock)
        self.result.end = self.clock
        if ended and self.closed_loop is not None:
            self._send(len(ended), self.clock)
        if ended and self.progress is not None:
            self.ended += len(ended)
            self.progress(self.ended)

    def _wait_for_an_event(self, step: Step) -> None:
        """Nothing could be scheduled and nothing is in flight: only an arrival or an abort can help."""
        if step.preempted or not self.scheduler.num_unfinished:
            return
        events = [self.arrivals[0].arrival] if self.arrivals else []
        events += [self.aborts[0][0]] if self.aborts else []
        if not events:
            raise StuckError(self._why_stuck())
        self.clock = max(self.clock, min(events))

    def _why_stuck(self) -> str:
        scheduler = self.scheduler
        config = scheduler.config
        stuck = scheduler.waiting.peek() if len(scheduler.waiting) else scheduler.running[0]
        return (
            f"{scheduler.num_unfinished} requests are left and none can be scheduled: request {stuck.request.id!r} has "
            f"{stuck.num_tokens} tokens, {scheduler.kv_cache.num_free_blocks} of {config.num_gpu_blocks - 1} KV blocks "
            f"are free (watermark {config.watermark}, scheduler_reserve_full_isl {config.scheduler_reserve_full_isl})"
        )
