"""vLLM V1's scheduling policy: running requests first, then waiting ones, under one token budget.

Source: vLLM 0.32 ``Scheduler.schedule``, ``Scheduler.update_from_output`` and ``AsyncScheduler``. Differences
of older versions are fields of ``EngineConfig.semantics``. There is no prefill phase and no decode phase: a
request is scheduled for the tokens by which it lags behind those known, as far as the budget reaches.
"""

from __future__ import annotations

from typing import NamedTuple

from simulator.batch import Batch
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


class Step:
    """What one call of ``Scheduler.schedule`` decided."""

    __slots__ = ("budget", "items", "preempted")

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.items: list[ScheduledItem] = []
        self.preempted: list[ServedRequest] = []

    def add(self, served: ServedRequest, num_new_tokens: int) -> None:
        """Take in a request's next tokens. One that reaches the end of its known tokens samples another."""
        computed = served.num_computed_tokens
        known = served.num_tokens + served.num_output_placeholders
        samples = computed + num_new_tokens >= known
        # What a NamedTuple's constructor does, without the call in between: this runs for every token.
        self.items.append(_new_item(ScheduledItem, (served, computed, num_new_tokens, samples)))
        self.budget -= num_new_tokens

    def remove(self, served: ServedRequest) -> bool:
        """Take a request out again and refund its tokens; False if it is not in."""
        for place, item in enumerate(self.items):
            if item.served is served:
                self.budget += item.num_scheduled_tokens
                del self.items[place]
                return True
        return False

    def batch(self) -> Batch:
        """The step as numbers."""
        prefills = [(new, computed) for _, computed, new, _ in self.items if new > 1]
        decodes = [computed for _, computed, new, _ in self.items if new == 1]
        return Batch(prefills, decodes)


class Scheduler:
    """Decides which tokens the next iteration computes.

    ``schedule`` composes a step and counts its tokens as computed at once; ``update`` takes in what the
    step produced. An asynchronous engine calls ``schedule`` for the next step before ``update`` for the last:
    output tokens that are not there yet are counted by placeholders.

    Parameters
    ----------
    config : EngineConfig
        Resolved, with ``num_gpu_blocks`` known.
    """

    def __init__(self, config: EngineConfig) -> None:
        semantics = config.semantics
        self.config = config
        self.kv_cache = KVCache(
            config.num_gpu_blocks,
            config.block_size,
            config.max_model_len,
            enable_prefix_caching=config.enable_prefix_caching,
            unhashed_blocks_first=semantics.unhashed_blocks_first,
        )
        self.running: list[ServedRequest] = []
        self.waiting = waiting_queue(config.scheduling_policy)
        self._by_priority = config.scheduling_policy == "priority"
        self._watermark_blocks = int(config.watermark * config.num_gpu_blocks)

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self.running) + len(self.waiting)

    def add(self, served: ServedRequest) -> None:
        """Queue an arrival."""
        self.waiting.add(served)

    def abort(self, served: ServedRequest) -> None:
        """Drop a request that its client gave up; tokens in flight for it are lost."""
        if served.finished:
            return
        self._end(served, Status.ABORTED)

    def schedule(self, now: int) -> Step:
        """Compose the next step; ``now`` stamps first admissions (nanoseconds)."""
        step = Step(self.config.token_budget)
        threshold = self._long_prefill_threshold()
        self._schedule_running(step, threshold)
        if not step.preempted:
            self._admit_waiting(step, threshold, now)
        self._count_as_computed(step)
        return step

    def update(self, step: Step, now: int) -> list[ServedRequest]:
        """Take in a step's output tokens, produced at ``now``; return the requests that ended."""
        ended = []
        asynchronous, register = self.config.async_scheduling, self.kv_cache.register
        for served, _, num_scheduled_tokens, samples in step.items:
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

    def _long_prefill_threshold(self) -> int:
        alone = self.num_unfinished <= 1
        if alone and self.config.semantics.lone_request_ignores_threshold:
            return 0
        return self.config.long_prefill_token_threshold

    def _schedule_running(self, step: Step, threshold: int) -> None:
        """Phase 1: every running request advances, in order of admission."""
        place = 0
        running, items = self.running, step.items
        max_model_len = self.config.max_model_len
        skips_last = self.config.semantics.capped_requests_skip_the_last_step
        while place < len(running) and step.budget > 0:
            served = running[place]
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
        if placeholders and last_token_in_flight and self.config.semantics.capped_requests_skip_the_last_step:
            return 0
        num_new_tokens = served.num_tokens + placeholders - computed
        if 0 < threshold < num_new_tokens:
            num_new_tokens = threshold
        return min(num_new_tokens, budget, self.config.max_model_len - computed - 1)

    def _preempt(self, step: Step, place: int) -> tuple[ServedRequest, bool]:
        """Send the least important running request back to the queue; its KV is to be recomputed.

        Also return whether the request at ``place`` counts as moved one place up the list.
        """
        semantics = self.config.semantics
        moves_up = False
        if self._by_priority:
            victim = max(self.running, key=lambda served: (served.request.priority, served.arrival))
            above = self.running.index(victim) < place
            self.running.remove(victim)
            was_scheduled = semantics.victims_leave_the_step and step.remove(victim)
            moves_up = above if semantics.victims_above_move_the_place else was_scheduled
        else:
            victim = self.running.pop()
        self.kv_cache.free(victim)
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
        set_aside = []
        while step.budget > 0 and self.waiting and len(self.running) < config.max_num_seqs:
            served = self.waiting.peek()
            if served.num_stale_output_tokens:
                # A step that was in flight when it was preempted still has a token of it to deliver.
                set_aside.append(self.waiting.take())
                continue
            hits = self.kv_cache.cached_prefix(served)
            num_cached_tokens = len(hits) * config.block_size
            num_new_tokens = served.num_tokens - num_cached_tokens
            if 0 < threshold < num_new_tokens:
                num_new_tokens = threshold
            if num_new_tokens > step.budget:
                if not config.enable_chunked_prefill:
                    if not config.semantics.passes_over_prompts_beyond_the_budget:
                        break
                    set_aside.append(self.waiting.take())
                    continue
                num_new_tokens = step.budget
            if not self.kv_cache.allocate(
                served,
                num_new_tokens,
                hits,
                whole_sequence_must_fit=config.scheduler_reserve_full_isl,
                headroom=self._watermark_blocks if self.running else 0,
            ):
                break
            self.waiting.take()
            self.running.append(served)
            served.status = Status.RUNNING
            served.num_computed_tokens = num_cached_tokens
            if served.scheduled is None:
                served.scheduled = now
                served.num_cached_tokens = num_cached_tokens
            step.add(served, num_new_tokens)
        for served in set_aside if config.semantics.passes_over_prompts_beyond_the_budget else reversed(set_aside):
            self.waiting.put_back(served)

    def _count_as_computed(self, step: Step) -> None:
        asynchronous = self.config.async_scheduling
        for served, _, num_scheduled_tokens, samples in step.items:
            served.num_computed_tokens += num_scheduled_tokens
            served.num_in_flight_tokens += num_scheduled_tokens
            if samples and asynchronous:
                served.num_output_placeholders += 1

    def _end(self, served: ServedRequest, status: Status) -> None:
        if served.status is Status.RUNNING:
            self.running.remove(served)
        else:
            self.waiting.remove(served)
        served.status = status
        served.finished = True
        self.kv_cache.free(served)
