"""vLLM V1's scheduling policy: running requests first, then waiting ones, under one token budget.

Source: vLLM 0.32 ``Scheduler.schedule``, ``Scheduler.update_from_output`` and ``AsyncScheduler``. Differences
of older versions are fields of ``EngineConfig.semantics``. There is no prefill phase and no decode phase: a
request is scheduled for the tokens by which it lags behind those known, as far as the budget reaches.

Nearly all of a run are requests that decode one token in every step, and in which nothing else happens. They are
*steady*: no step touches them one by one. How far each is follows from the count of steps, and when they need KV blocks
from that modulo the block size. A request leaves them before anything else happens to it, and is scheduled on its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from operator import attrgetter
from typing import NamedTuple

from simulator.batch import NO_DECODES, Batch, Decodes
from simulator.engine_config import EngineConfig
from simulator.kv_cache import KVCache
from simulator.request import ServedRequest, Status
from simulator.waiting_queue import waiting_queue


class ScheduledItem(NamedTuple):
    """A request's part of one iteration; ``samples`` says whether it yields an output token."""

    served: ServedRequest
    num_computed_tokens: int
    num_scheduled_tokens: int
    samples: bool


_new_item = tuple.__new__
_rank = attrgetter("rank")


class Step:
    """What one call of ``Scheduler.schedule`` decided.

    ``own`` are the items of requests that are scheduled on their own, ``steady`` and ``decodes`` the requests that
    decode a token each, and how far they are; ``left`` the items of those that stopped to be steady since.
    """

    __slots__ = ("budget", "decodes", "left", "number", "own", "preempted", "steady")

    def __init__(self, number: int, budget: int) -> None:
        self.number = number
        self.budget = budget
        self.own: list[ScheduledItem] = []
        self.steady: Sequence[ServedRequest] = ()
        self.decodes = NO_DECODES
        self.left: list[ScheduledItem] = []
        self.preempted: list[ServedRequest] = []

    def __bool__(self) -> bool:
        """Whether it computes anything."""
        return bool(self.own or self.steady)

    @property
    def items(self) -> list[ScheduledItem]:
        """Each request's part, in the order of admission."""
        number = self.number
        steady = [
            ScheduledItem(served, offset + number, 1, True)
            for served, offset in zip(self.steady, self.decodes.offsets, strict=True)
        ]
        if not (steady and self.own):
            return steady or list(self.own)
        return sorted([*steady, *self.own], key=lambda item: item.served.rank)

    @property
    def num_items(self) -> int:
        """Requests of which it computes tokens."""
        return len(self.own) + len(self.steady)

    @property
    def num_tokens(self) -> int:
        """Tokens that it computes."""
        return len(self.steady) + sum(item.num_scheduled_tokens for item in self.own)

    @property
    def has_prefills(self) -> bool:
        """Whether it computes more than one token of a request."""
        return any(item.num_scheduled_tokens > 1 for item in self.own)

    @property
    def samples(self) -> bool:
        """Whether it yields an output token."""
        return bool(self.steady) or any(item.samples for item in self.own)

    def add(self, served: ServedRequest, num_new_tokens: int) -> None:
        """Take in a request's next tokens. One that reaches the end of its known tokens samples another."""
        computed = served.num_computed_tokens
        known = served.num_tokens + served.num_output_placeholders
        samples = computed + num_new_tokens >= known
        # What a NamedTuple's constructor does, without the call in between.
        self.own.append(_new_item(ScheduledItem, (served, computed, num_new_tokens, samples)))
        self.budget -= num_new_tokens

    def remove(self, served: ServedRequest) -> bool:
        """Take a request out again and refund its tokens; False if it is not in."""
        for place, item in enumerate(self.own):
            if item.served is served:
                self.budget += item.num_scheduled_tokens
                del self.own[place]
                return True
        return False

    def batch(self) -> Batch:
        """The step as numbers."""
        if not self.own:
            return Batch([], (), self.decodes, self.number)
        prefills = [(new, computed) for _, computed, new, _ in self.own if new > 1]
        decodes = [computed for _, computed, new, _ in self.own if new == 1]
        return Batch(prefills, decodes, self.decodes, self.number)


class Scheduler:
    """Decides which tokens the next iteration computes.

    ``schedule`` composes a step and counts its tokens as computed at once; ``update`` takes in what the
    step produced. An asynchronous engine calls ``schedule`` for the next step before ``update`` for the last:
    output tokens that are not there yet are counted by placeholders. Steps are updated in the order of scheduling.

    Parameters
    ----------
    config : EngineConfig
        Resolved, with ``num_gpu_blocks`` known.
    record_token_times : bool
        Keep the times of all updates, for requests with ``token_times``.
    """

    def __init__(self, config: EngineConfig, *, record_token_times: bool = False) -> None:
        semantics = config.semantics
        self.config = config
        self.kv_cache = KVCache(
            config.num_gpu_blocks,
            config.block_size,
            config.max_model_len,
            enable_prefix_caching=config.enable_prefix_caching,
            unhashed_blocks_first=semantics.unhashed_blocks_first,
        )
        self.waiting = waiting_queue(config.scheduling_policy)
        self._by_priority = config.scheduling_policy == "priority"
        self._watermark_blocks = int(config.watermark * config.num_gpu_blocks)
        self._semantics, self._budget = semantics, config.token_budget
        self._threshold, self._block_size = config.long_prefill_token_threshold, config.block_size
        self._asynchronous = config.async_scheduling
        self._alone: list[ServedRequest] = []
        """Running requests that are scheduled on their own, in the order of admission."""
        self._steady: list[ServedRequest] = []
        """The others, in that order. This list, ``_decodes`` and its offsets are replaced and never changed: steps
        keep them."""
        self._decodes = NO_DECODES
        self._admitted = 0
        self._scheduled = 0
        """Calls of ``schedule`` so far: the number of the last step."""
        self._updated = self._updated_before = 0
        """Number of the last step that was updated, now and when the last step was scheduled."""
        self._in_flight: deque[Step] = deque()
        self._leaving: list[tuple[int, int, ServedRequest]] = []
        """Heap of (step, rank): who of the steady ones is scheduled on its own from which step on."""
        self._needs = [0] * config.block_size
        """Steady requests that need a KV block in a step, by its number modulo the block size."""
        self._hashing: dict[int, list[ServedRequest]] = {}
        """Steady requests whose next blocks others may find, by the number modulo the block size of the step whose
        update fills a block."""
        self._update_times: list[int] | None = [] if record_token_times else None
        self._num_updates = 0
        self._kept_out = False
        """Whether the last schedule call left requests waiting that will wait until somebody ends."""
        self._last_update = 0

    @property
    def running(self) -> list[ServedRequest]:
        """Admitted requests in the order of admission."""
        if not self._steady or not self._alone:
            return [*self._alone, *self._steady]
        return sorted([*self._alone, *self._steady], key=_rank)

    @property
    def num_running(self) -> int:
        """Admitted requests."""
        return len(self._alone) + len(self._steady)

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self._alone) + len(self._steady) + len(self.waiting)

    def add(self, served: ServedRequest) -> None:
        """Queue an arrival."""
        self.waiting.add(served)
        self._kept_out = False

    def abort(self, served: ServedRequest) -> None:
        """Drop a request that its client gave up; tokens in flight for it are lost."""
        if served.finished:
            return
        if served.steady:
            self._set_alone([served])
        self._end(served, Status.ABORTED)

    def schedule(self, now: int) -> Step:
        """Compose the next step; ``now`` stamps first admissions (nanoseconds)."""
        number = self._scheduled + 1
        leaving = self._leaving
        if leaving and leaving[0][0] <= number:
            self._set_alone(self._due(number))
        step = Step(number, self._budget)
        threshold = self._threshold and self._long_prefill_threshold()
        if self._steady and not self._goes_on(number, threshold):
            self._set_alone(self._steady)
        hashing: list[ServedRequest] = []
        if self._steady:
            step.steady, step.decodes = self._steady, self._decodes
            step.budget -= len(self._steady)
            self.kv_cache.take(self._needs[number % self._block_size])
            if self._hashing:
                hashing = self._filled()
        self._scheduled = number
        self._updated_before = self._updated
        self._kept_out = False
        if self._alone:
            self._schedule_running(step, threshold, hashing)
        for served in hashing:
            self._hash_steady(served, self._hashed_tokens(served))
        if self.waiting and not step.preempted:
            self._admit_waiting(step, threshold, now)
        self._in_flight.append(step)
        if step.own:
            self._count_as_computed(step)
        return step

    def update(self, step: Step, now: int) -> list[ServedRequest]:
        """Take in a step's output tokens, produced at ``now``; return the requests that ended."""
        in_flight = self._in_flight
        while in_flight and in_flight[0].number <= step.number:
            in_flight.popleft()
        self._updated = step.number
        self._num_updates += 1
        self._last_update = now
        if self._update_times is not None:
            self._update_times.append(now)
        ended: list[ServedRequest] = []
        if not step.own and not step.left:
            return ended
        asynchronous, register = self._asynchronous, self.kv_cache.register
        for served, _, num_scheduled_tokens, samples in (*step.own, *step.left):
            if served.steady:
                continue
            served.num_in_flight_tokens -= num_scheduled_tokens
            stale = served.num_stale_output_tokens > 0
            if stale:
                served.num_stale_output_tokens -= num_scheduled_tokens
            if not samples or served.finished:
                continue
            served.num_tokens += 1
            if served.first_token is None:
                served.first_token = now
            served.last_token = now
            if served.token_times is not None:
                served.token_times.append(now)
            if asynchronous and not stale:
                served.num_output_placeholders -= 1
            computed = served.num_computed_tokens - served.num_output_placeholders
            if computed > served.block_event and served.status is Status.RUNNING:
                register(served, computed)
            if served.num_tokens >= served.max_total_tokens:
                self._end(served, Status.FINISHED)
                ended.append(served)
        return ended

    def quiet_steps(self) -> int:
        """How many further steps are sure to be all steady requests and nobody else, if nobody arrives or gives up."""
        steady = self._steady
        if not steady or self._alone or len(steady) > self._budget or (self.waiting and not self._kept_out):
            return 0
        if any(step.own or step.left for step in self._in_flight):
            return 0
        steps = self._leaving[0][0] - 1 - self._scheduled
        needs, size, free = self._needs, self._block_size, self.kv_cache.num_free_blocks
        if steps * len(steady) > free * size - len(steady) * size:
            number = self._scheduled
            last = number + steps
            while number < last and free >= needs[(number + 1) % size]:
                number += 1
                free -= needs[number % size]
            steps = number - self._scheduled
        return steps

    def next_batch(self) -> Batch:
        """The first of the ``quiet_steps``; in each further one every decode has one more token of context."""
        return Batch([], (), self._decodes, self._scheduled + 1)

    def steps_of_leap(self, steps: int) -> Iterator[tuple[Step, int]]:
        """Each of so many quiet steps, and the free KV blocks after it."""
        free = self.kv_cache.num_free_blocks
        for number in range(self._scheduled + 1, self._scheduled + 1 + steps):
            free -= self._needs[number % self._block_size]
            yield self._steady_step(number), free

    def _steady_step(self, number: int) -> Step:
        step = Step(number, self._budget - len(self._steady))
        step.steady, step.decodes = self._steady, self._decodes
        return step

    def leap(self, times: Sequence[int]) -> Step | None:
        """Take so many of the quiet steps at once: each is scheduled, and then the oldest in flight updated.

        Parameters
        ----------
        times : sequence of int
            When each update takes place, in nanoseconds.

        Returns
        -------
        Step or None
            The last one, if one step is in flight as before.
        """
        steps, size = len(times), self._block_size
        whole, rest = divmod(steps, size)
        number = self._scheduled
        self.kv_cache.take(
            whole * len(self._steady) + sum(self._needs[place % size] for place in range(number + 1, number + 1 + rest))
        )
        if self._hashing:
            for updated in range(self._updated_before + 1, self._updated + steps):
                for served in sorted(self._hashing.get(updated % size, ()), key=_rank):
                    self._hash_steady(served, served.offset + updated + 2)
        self._scheduled += steps
        self._updated += steps
        self._updated_before = self._updated - 1
        self._num_updates += steps
        self._last_update = times[-1]
        if self._update_times is not None:
            self._update_times += times
        if not self._in_flight:
            return None
        step = self._steady_step(self._scheduled)
        self._in_flight.clear()
        self._in_flight.append(step)
        return step

    def _goes_on(self, number: int, threshold: int) -> bool:
        """Whether every steady request gets its token and its block, whatever the others get."""
        budget = self._budget - len(self._steady)
        if budget < 0:
            return False
        wanted = self._needs[number % self._block_size]
        for served in self._alone:
            num_new_tokens = self._next_tokens(served, self._budget, threshold)
            if num_new_tokens <= 0:
                continue
            if num_new_tokens > budget:
                if served.rank < self._steady[-1].rank:
                    return False
                num_new_tokens = budget
            budget -= num_new_tokens
            end = served.num_computed_tokens + num_new_tokens
            if end > served.block_event:
                wanted += max(0, self.kv_cache.blocks_for(end) - served.num_blocks)
        return wanted <= self.kv_cache.num_free_blocks

    def _due(self, number: int) -> list[ServedRequest]:
        """Steady requests that are scheduled on their own from this step on."""
        due, leaving = [], self._leaving
        while leaving and leaving[0][0] <= number:
            last, _, served = heappop(leaving)
            if served.steady and self._last_steady(served) < last:
                due.append(served)
        return due

    def _last_steady(self, served: ServedRequest) -> int:
        """Number of the last step before the one that yields a steady request's last token."""
        return served.max_total_tokens - 3 - served.offset

    def _filled(self) -> list[ServedRequest]:
        """Steady requests that have filled a block which others may find, in the order of admission."""
        size = self._block_size
        filled: list[ServedRequest] = []
        for number in range(self._updated_before + 1, self._updated + 1):
            filled += self._hashing.get(number % size, ())
        return sorted(filled, key=_rank)

    def _hash_steady(self, served: ServedRequest, num_tokens: int) -> None:
        self.kv_cache.register(served, num_tokens)
        if served.num_hashed_blocks >= len(served.block_hashes):
            self._forget_hashing(served)

    def _hashed_tokens(self, served: ServedRequest) -> int:
        """Tokens of a steady request of which full blocks are registered: all known ones in the last schedule call, or
        all but the last known one since."""
        return served.offset + max(self._updated_before + 2, self._updated + 1)

    def _hashing_place(self, served: ServedRequest) -> int:
        return (-served.offset - 2) % self._block_size

    def _forget_hashing(self, served: ServedRequest) -> None:
        place = self._hashing_place(served)
        if served in self._hashing.get(place, ()):
            self._hashing[place].remove(served)
            if not self._hashing[place]:
                del self._hashing[place]

    def _join(self, joining: list[ServedRequest]) -> None:
        """Make requests steady that were scheduled for one token each in the step just composed."""
        steady, size = [*self._steady, *joining], self._block_size
        if self._steady and self._steady[-1].rank > joining[0].rank:
            steady.sort(key=_rank)
        for served in joining:
            served.steady = True
            served.joined = self._scheduled
            served.num_updates_before = self._num_updates
            self._needs[-served.offset % size] += 1
            heappush(self._leaving, (self._last_steady(served) + 1, served.rank, served))
            if self.config.enable_prefix_caching and served.num_hashed_blocks < len(served.block_hashes):
                self._hashing.setdefault(self._hashing_place(served), []).append(served)
        self._steady, self._decodes = steady, Decodes([served.offset for served in steady])
        self._alone = [served for served in self._alone if not served.steady]

    def _set_alone(self, some: list[ServedRequest]) -> None:
        """Have steady requests scheduled on their own again, their counters brought up to the last step."""
        if not some:
            return
        for served in some:
            self._bring_up_to_date(served)
        if some is self._steady:
            self._steady, self._decodes = [], NO_DECODES
            self._leaving.clear()
        else:
            self._steady = [served for served in self._steady if served.steady]
            self._decodes = Decodes([served.offset for served in self._steady])
        if self._alone:
            self._alone = sorted([*self._alone, *some], key=_rank)
        else:
            self._alone = list(some)

    def _bring_up_to_date(self, served: ServedRequest) -> None:
        size, pending = self._block_size, self._scheduled - self._updated
        computed = served.offset + self._scheduled + 1
        served.steady = False
        served.num_computed_tokens = computed
        served.num_tokens = computed + 1 - pending
        served.num_output_placeholders = pending if self._asynchronous else 0
        served.num_in_flight_tokens = pending
        served.num_blocks = -(-computed // size)
        if self._num_updates > served.num_updates_before:
            served.last_token = self._last_update
            if served.token_times is not None and self._update_times is not None:
                served.token_times += self._update_times[served.num_updates_before :]
        self._needs[-served.offset % size] -= 1
        if self._hashing:
            self._forget_hashing(served)
        self.kv_cache.register(served, self._hashed_tokens(served))
        self.kv_cache.note_next_event(served)
        for step in self._in_flight:
            if step.number > served.joined:
                step.left.append(_new_item(ScheduledItem, (served, served.offset + step.number, 1, True)))

    def _long_prefill_threshold(self) -> int:
        alone = self.num_unfinished <= 1
        if alone and self._semantics.lone_request_ignores_threshold:
            return 0
        return self._threshold

    def _schedule_running(self, step: Step, threshold: int, hashing: list[ServedRequest]) -> None:
        """Phase 1: every running request advances, in order of admission; so do the ``hashing`` steady ones."""
        place = 0
        running, items = self._alone, step.own
        max_model_len = self.config.max_model_len
        skips_last = self._semantics.capped_requests_skip_the_last_step
        while place < len(running) and step.budget > 0:
            served = running[place]
            while hashing and hashing[0].rank < served.rank:
                first = hashing.pop(0)
                self._hash_steady(first, self._hashed_tokens(first))
            computed, placeholders = served.num_computed_tokens, served.num_output_placeholders
            end = computed + 1
            if (
                served.num_tokens + placeholders == end
                and end <= served.block_event
                and end < max_model_len
                and not (skips_last and placeholders and end + 1 - placeholders >= served.max_total_tokens)
            ):
                # Most of all: a decode that needs no block.
                items.append(_new_item(ScheduledItem, (served, computed, 1, True)))
                step.budget -= 1
                place += 1
                continue
            num_new_tokens = self._next_tokens(served, step.budget, threshold)
            if num_new_tokens <= 0:
                place += 1
                continue
            end = served.num_computed_tokens + num_new_tokens
            while end > served.block_event and not self.kv_cache.allocate(served, num_new_tokens):
                victim, moves_up = self._preempt(step, place)
                if victim is served:
                    return
                place -= moves_up
            step.add(served, num_new_tokens)
            place += 1

    def _next_tokens(self, served: ServedRequest, budget: int, threshold: int) -> int:
        """Tokens by which a running request lags, as far as the limits allow; 0 to pass it over."""
        computed = served.num_computed_tokens
        placeholders = served.num_output_placeholders
        last_token_in_flight = computed + 2 - placeholders >= served.max_total_tokens
        if placeholders and last_token_in_flight and self._semantics.capped_requests_skip_the_last_step:
            return 0
        num_new_tokens = served.num_tokens + placeholders - computed
        if 0 < threshold < num_new_tokens:
            num_new_tokens = threshold
        return min(num_new_tokens, budget, self.config.max_model_len - computed - 1)

    def _preempt(self, step: Step, place: int) -> tuple[ServedRequest, bool]:
        """Send the least important running request back to the queue; its KV is to be recomputed.

        Also return whether the request at ``place`` counts as moved one place up the list.
        """
        semantics = self._semantics
        moves_up = False
        if self._by_priority:
            victim = max(self._alone, key=lambda served: (served.request.priority, served.arrival))
            above = self._alone.index(victim) < place
            self._alone.remove(victim)
            was_scheduled = semantics.victims_leave_the_step and step.remove(victim)
            moves_up = above if semantics.victims_above_move_the_place else was_scheduled
        else:
            victim = self._alone.pop()
        self.kv_cache.free(victim, returns=True)
        victim.status = Status.PREEMPTED
        victim.num_computed_tokens = 0
        victim.num_output_placeholders = 0
        victim.num_stale_output_tokens = victim.num_in_flight_tokens
        victim.num_preemptions += 1
        self.waiting.put_back(victim)
        step.preempted.append(victim)
        return victim, moves_up

    def _admit_waiting(self, step: Step, threshold: int, now: int) -> None:
        """Phase 2: admit in the queue's order, until one does not fit. None is passed over for a smaller one."""
        config = self.config
        # Blocks only get fewer while the same requests run, and hits with them, unless those fill blocks to be found.
        self._kept_out = not self._hashing
        set_aside = []
        while step.budget > 0 and self.waiting and self.num_running < config.max_num_seqs:
            served = self.waiting.peek()
            if served.num_stale_output_tokens:
                # A step that was in flight when it was preempted still has a token of it to deliver.
                set_aside.append(self.waiting.take())
                self._kept_out = False
                continue
            hits = self.kv_cache.cached_prefix(served)
            num_cached_tokens = len(hits) * config.block_size
            num_new_tokens = served.num_tokens - num_cached_tokens
            if 0 < threshold < num_new_tokens:
                num_new_tokens = threshold
            if num_new_tokens > step.budget:
                if not config.enable_chunked_prefill:
                    if not self._semantics.passes_over_prompts_beyond_the_budget:
                        break
                    set_aside.append(self.waiting.take())
                    self._kept_out = False
                    continue
                num_new_tokens = step.budget
            if not self.kv_cache.allocate(
                served,
                num_new_tokens,
                hits,
                whole_sequence_must_fit=config.scheduler_reserve_full_isl,
                headroom=self._watermark_blocks if self.num_running else 0,
            ):
                break
            self.waiting.take()
            self._alone.append(served)
            self._admitted += 1
            served.rank = self._admitted
            served.status = Status.RUNNING
            served.num_computed_tokens = num_cached_tokens
            if served.scheduled is None:
                served.scheduled = now
                served.num_cached_tokens = num_cached_tokens
            step.add(served, num_new_tokens)
        for served in set_aside if self._semantics.passes_over_prompts_beyond_the_budget else reversed(set_aside):
            self.waiting.put_back(served)

    def _count_as_computed(self, step: Step) -> None:
        asynchronous = self._asynchronous
        pending = step.number - self._updated
        joining = []
        for served, computed, num_scheduled_tokens, samples in step.own:
            served.num_computed_tokens += num_scheduled_tokens
            served.num_in_flight_tokens += num_scheduled_tokens
            if not samples:
                continue
            if asynchronous:
                served.num_output_placeholders += 1
            if (
                num_scheduled_tokens == 1
                and served.first_token is not None
                and served.num_in_flight_tokens == pending
                and served.num_output_placeholders == (pending if asynchronous else 0)
                and computed + 1 < served.max_total_tokens - 3
                and served.status is Status.RUNNING
            ):
                served.offset = computed - step.number
                joining.append(served)
        if joining and self.num_running <= self._budget:
            self._join(joining)

    def _end(self, served: ServedRequest, status: Status) -> None:
        if served.status is Status.RUNNING:
            self._alone.remove(served)
        else:
            self.waiting.remove(served)
        self._kept_out = False
        served.status = status
        served.finished = True
        self.kv_cache.free(served)
