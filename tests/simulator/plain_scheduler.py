"""The scheduler and the KV cache written plainly: every request in every step, every block by its number.

What the simulator does without touching each request and block must be what this does: ``test_plain_scheduler``
compares.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from simulator.batch import Batch
from simulator.engine_config import EngineConfig
from simulator.request import ServedRequest, Status
from simulator.waiting_queue import waiting_queue


class PlainKVCache:
    """Blocks, their reference counts, and the hashes under which they can be found.

    Parameters
    ----------
    num_gpu_blocks : int
        As vLLM reports it, the null block included.
    block_size : int
        Tokens per block.
    max_model_len : int
        Longest sequence, in tokens.
    enable_prefix_caching : bool
        Whether full blocks are registered under their hashes and looked up.
    unhashed_blocks_first : bool
        Freed blocks without a hash go to the front of the free list (vLLM >= 0.24) instead of its tail.
    """

    def __init__(
        self,
        num_gpu_blocks: int,
        block_size: int,
        max_model_len: int,
        *,
        enable_prefix_caching: bool = True,
        unhashed_blocks_first: bool = True,
    ) -> None:
        self.num_gpu_blocks = num_gpu_blocks
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.enable_prefix_caching = enable_prefix_caching
        self.unhashed_blocks_first = unhashed_blocks_first
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_gpu_blocks))
        self._references = [0] * num_gpu_blocks
        self._hash_of: list[int | None] = [None] * num_gpu_blocks
        self._blocks_of: dict[int, dict[int, None]] = {}
        self._next_private_hash = -1

    @property
    def num_free_blocks(self) -> int:
        """Blocks that an allocation may take, cached but unreferenced ones included."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the usable blocks that requests hold, 0 to 1, as vLLM reports it."""
        usable = self.num_gpu_blocks - 1
        return 1.0 - len(self._free) / usable if usable else 0.0

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens of one sequence."""
        return -(-min(num_tokens, self.max_model_len) // self.block_size)

    def cached_prefix(self, served: ServedRequest) -> list[int]:
        """Blocks of the longest cached prefix, full blocks only, leaving a token to compute."""
        hits: list[int] = []
        if not self.enable_prefix_caching:
            return hits
        most = (served.num_tokens - 1) // self.block_size
        for block_hash in served.block_hashes[:most]:
            blocks = self._blocks_of.get(block_hash)
            if not blocks:
                break
            hits.append(next(iter(blocks)))
        return hits

    def allocate(
        self,
        served: ServedRequest,
        num_new_tokens: int,
        hits: Sequence[int] = (),
        *,
        whole_sequence_must_fit: bool = False,
        headroom: int = 0,
    ) -> bool:
        """Give a request the blocks for its next tokens, or change nothing and return False.

        Parameters
        ----------
        served : ServedRequest
            Holds ``served.blocks`` already; none if it waits.
        num_new_tokens : int
            Tokens to compute beyond ``num_computed_tokens`` and the hits.
        hits : sequence of int
            Cached blocks that it adopts (``cached_prefix``).
        whole_sequence_must_fit : bool
            Require room for all known tokens, not only for this chunk (``scheduler_reserve_full_isl``).
        headroom : int
            Blocks that must stay free besides (``watermark``).
        """
        held = len(served.blocks) + len(hits)
        revived = sum(1 for block in hits if not self._references[block])
        free = len(self._free) - headroom - revived
        if whole_sequence_must_fit and self.blocks_for(served.num_tokens) - held > free:
            return False
        end = served.num_computed_tokens + len(hits) * self.block_size + num_new_tokens
        wanted = max(0, self.blocks_for(end) - held)
        if wanted > free:
            return False
        for block in hits:
            if not self._references[block]:
                del self._free[block]
            self._references[block] += 1
        if hits:
            served.blocks.extend(hits)
            served.num_hashed_blocks = len(served.blocks)
        for _ in range(wanted):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._references[block] = 1
            served.blocks.append(block)
        self.register(served, min(end, served.num_tokens))
        self._note_next_event(served)
        return True

    def register(self, served: ServedRequest, num_tokens: int) -> None:
        """Make the full blocks among the first ``num_tokens`` tokens findable by their hashes."""
        full = num_tokens // self.block_size
        if not self.enable_prefix_caching or full <= served.num_hashed_blocks:
            return
        hashes = served.block_hashes
        while len(hashes) < full:
            hashes.append(self._next_private_hash)
            self._next_private_hash -= 1
        for position in range(served.num_hashed_blocks, full):
            block = served.blocks[position]
            self._hash_of[block] = hashes[position]
            self._blocks_of.setdefault(hashes[position], {})[block] = None
        served.num_hashed_blocks = full
        self._note_next_event(served)

    def _note_next_event(self, served: ServedRequest) -> None:
        """Say up to how many tokens neither ``allocate`` nor ``register`` would change anything."""
        held = len(served.blocks) * self.block_size
        if self.enable_prefix_caching:
            held = min(held, (served.num_hashed_blocks + 1) * self.block_size - 1)
        served.block_event = held

    def free(self, served: ServedRequest) -> None:
        """Drop a request's references, its tail first, so that its prefix is evicted last."""
        for block in reversed(served.blocks):
            self._references[block] -= 1
            if self._references[block]:
                continue
            self._free[block] = None
            if self.unhashed_blocks_first and self._hash_of[block] is None:
                self._free.move_to_end(block, last=False)
        served.blocks.clear()
        served.num_hashed_blocks = 0
        served.block_event = 0

    def _forget(self, block: int) -> None:
        block_hash = self._hash_of[block]
        if block_hash is None:
            return
        self._hash_of[block] = None
        blocks = self._blocks_of[block_hash]
        del blocks[block]
        if not blocks:
            del self._blocks_of[block_hash]


class ScheduledItem(NamedTuple):
    """A request's part of one iteration; ``samples`` says whether it yields an output token."""

    served: ServedRequest
    num_computed_tokens: int
    num_scheduled_tokens: int
    samples: bool


class PlainStep:
    """What one call of ``Scheduler.schedule`` decided."""

    __slots__ = ("budget", "items", "preempted")

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.items: list[ScheduledItem] = []
        self.preempted: list[ServedRequest] = []

    def __bool__(self) -> bool:
        return bool(self.items)

    @property
    def samples(self) -> bool:
        return any(item.samples for item in self.items)

    def add(self, served: ServedRequest, num_new_tokens: int) -> None:
        """Take in a request's next tokens. One that reaches the end of its known tokens samples another."""
        computed = served.num_computed_tokens
        known = served.num_tokens + served.num_output_placeholders
        samples = computed + num_new_tokens >= known
        self.items.append(ScheduledItem(served, computed, num_new_tokens, samples))
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


class PlainScheduler:
    """Decides which tokens the next iteration computes.

    ``schedule`` composes a step and counts its tokens as computed at once; ``update`` takes in what the
    step produced. An asynchronous engine calls ``schedule`` for the next step before ``update`` for the last:
    output tokens that are not there yet are counted by placeholders.

    Parameters
    ----------
    config : EngineConfig
        Resolved, with ``num_gpu_blocks`` known.
    """

    def __init__(self, config: EngineConfig, *, record_token_times: bool = False) -> None:
        semantics = config.semantics
        self.config = config
        self.kv_cache = PlainKVCache(
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
    def num_running(self) -> int:
        return len(self.running)

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

    def schedule(self, now: int) -> PlainStep:
        """Compose the next step; ``now`` stamps first admissions (nanoseconds)."""
        step = PlainStep(self.config.token_budget)
        threshold = self._long_prefill_threshold()
        self._schedule_running(step, threshold)
        if not step.preempted:
            self._admit_waiting(step, threshold, now)
        self._count_as_computed(step)
        return step

    def update(self, step: PlainStep, now: int) -> list[ServedRequest]:
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

    def _schedule_running(self, step: PlainStep, threshold: int) -> None:
        """Phase 1: every running request advances, in order of admission."""
        place = 0
        running = self.running
        while place < len(running) and step.budget > 0:
            served = running[place]
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

    def _preempt(self, step: PlainStep, place: int) -> tuple[ServedRequest, bool]:
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

    def _admit_waiting(self, step: PlainStep, threshold: int, now: int) -> None:
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

    def _count_as_computed(self, step: PlainStep) -> None:
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
