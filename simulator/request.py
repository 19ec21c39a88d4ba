"""A request as the workload states it, and its state while the engine works on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a workload.

    Parameters
    ----------
    id : str
        Unique within a run.
    arrival : float
        When the engine's front end hands it over, in seconds.
    prompt_tokens, output_tokens : int
        Lengths in tokens. Exactly ``output_tokens`` are generated, unless ``max_model_len`` ends it first.
    priority : int
        Smaller is served first under ``scheduling_policy="priority"``.
    block_hashes : sequence of int, optional
        Chained hashes (each identifies a block *and* everything before it) of the first full KV blocks, at
        the engine's block size, each >= 0. May reach past the prompt into the output, for conversations
        whose next turn repeats it. Blocks without a hash are shared with nobody.
    abort : float, optional
        When the client gives up, in seconds.
    """

    id: str
    arrival: float
    prompt_tokens: int
    output_tokens: int
    priority: int = 0
    block_hashes: Sequence[int] | None = None
    abort: float | None = None


class Status(Enum):
    """Where a request stands. Names as in vLLM's ``RequestStatus``."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"
    ABORTED = "aborted"
    REJECTED = "rejected"


@dataclass(slots=True, eq=False)
class ServedRequest:
    """A request while it is served (vLLM's ``Request`` object): counters, blocks, stamps.

    ``num_tokens`` is the prompt plus the output tokens that are known; ``num_computed_tokens`` counts those
    whose KV is computed *or scheduled*; ``num_output_placeholders`` are tokens that an asynchronous step in
    flight will produce. Up to ``block_event`` tokens it needs no block and has none to
    register. ``num_blocks`` KV blocks it holds, of which the first are ``blocks``, those that others may find. ``rank``
    is its place in the order of admission.

    While it is ``steady`` (``Scheduler``), ``offset`` and the scheduler's count of steps say how far it is, and its
    counters are those of step ``joined``. Stamps are integer nanoseconds, None where not reached.
    """

    request: Request
    index: int
    arrival: int
    max_total_tokens: int
    status: Status = Status.WAITING
    finished: bool = False
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    num_computed_tokens: int = 0
    num_output_placeholders: int = 0
    num_in_flight_tokens: int = 0
    num_stale_output_tokens: int = 0
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    blocks: list[int] = field(default_factory=list)
    num_blocks: int = 0
    num_hashed_blocks: int = 0
    block_event: int = 0
    block_hashes: list[int] = field(default_factory=list)
    rank: int = 0
    steady: bool = False
    offset: int = 0
    joined: int = 0
    num_updates_before: int = 0
    queued: int | None = None
    scheduled: int | None = None
    first_token: int | None = None
    last_token: int | None = None
    token_times: list[int] | None = None

    @classmethod
    def enter(
        cls, request: Request, index: int, max_model_len: int, *, record_token_times: bool = False
    ) -> ServedRequest:
        """Return the state of a request that has just arrived; ``index`` is its place among all requests."""
        return cls(
            request=request,
            index=index,
            arrival=round(request.arrival * 1e9),
            max_total_tokens=min(request.prompt_tokens + request.output_tokens, max_model_len),
            num_prompt_tokens=request.prompt_tokens,
            num_tokens=request.prompt_tokens,
            block_hashes=list(request.block_hashes or ()),
            token_times=[] if record_token_times else None,
        )

    def __lt__(self, other: ServedRequest) -> bool:
        """Order of the priority queue (vLLM ``Request.__lt__``)."""
        mine = (self.request.priority, self.arrival, self.request.id)
        return mine < (other.request.priority, other.arrival, other.request.id)

    @property
    def num_output_tokens(self) -> int:
        """Output tokens produced so far."""
        return self.num_tokens - self.num_prompt_tokens
