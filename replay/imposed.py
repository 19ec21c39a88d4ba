"""The scheduler under the recorded instants of a real engine: no clock of its own, no accelerator model.

Each recorded iteration says when it was scheduled. Before it, the scheduler takes in what the engine had queued
by then and the output of every step that had ended by then; what it composes must be what the engine composed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from profiles.errors import InputError
from replay.block_hashes import at_block_size
from replay.trace import Trace
from simulator.engine import nanoseconds
from simulator.engine_config import EngineConfig
from simulator.request import Request, ServedRequest
from simulator.scheduler import Scheduler, Step

STAMP_ERROR = 1000
"""Nanoseconds by which two stamps of one instant may differ (recordings are rounded)."""


@dataclass(frozen=True)
class ImposedStep:
    """One recorded iteration and what the simulated scheduler composed in its place."""

    recorded: dict[str, Any]
    step: Step
    scheduler: Scheduler


def impose(trace: Trace, config: EngineConfig) -> Iterator[ImposedStep]:
    """Schedule at every recorded instant.

    Parameters
    ----------
    trace : Trace
        With recorded iterations, and queue stamps of its requests.
    config : EngineConfig
        Of the recorded engine.

    Yields
    ------
    ImposedStep
        In order; once the composed step differs from the recorded one, later ones need not be meaningful.

    Raises
    ------
    InputError
        If the trace has no iterations or queue stamps.
    """
    if trace.iterations is None or not trace.has("queued"):
        raise InputError(f"{trace.name} has no recorded iterations with queue stamps")
    scheduler = Scheduler(config)
    waiting = deque(_arrivals(trace, config))
    in_flight: deque[tuple[int, Step]] = deque()
    for recorded in trace.iterations.to_pylist():
        now = nanoseconds(recorded["start"] if recorded["scheduled_at"] is None else recorded["scheduled_at"])
        while in_flight and in_flight[0][0] <= now + STAMP_ERROR:
            end, done = in_flight.popleft()
            scheduler.update(done, end)
        while waiting and waiting[0].arrival <= now + STAMP_ERROR:
            scheduler.add(waiting.popleft())
        step = scheduler.schedule(now)
        yield ImposedStep(recorded, step, scheduler)
        in_flight.append((nanoseconds(recorded["start"] + recorded["duration"]), step))


def _arrivals(trace: Trace, config: EngineConfig) -> list[ServedRequest]:
    """Requests in the order in which the engine queued them; ``index`` is the row in the trace."""
    queued, hashes = trace.column("queued"), trace.lists("block_hashes")
    prompt, output = trace.column("prompt_tokens"), trace.column("output_tokens")
    priority = np.nan_to_num(trace.column("priority"))
    size = int((trace.meta.get("block_hash") or {}).get("block_size") or config.block_size)
    served = []
    for row, one in enumerate(trace.ids):
        if np.isnan(queued[row]):
            continue
        own = hashes[row]
        request = Request(
            id=one,
            arrival=float(queued[row]),
            prompt_tokens=int(prompt[row]),
            output_tokens=int(output[row]),
            priority=int(priority[row]),
            block_hashes=None if own is None else at_block_size(own, size, config.block_size),
        )
        served.append(ServedRequest.enter(request, row, config.max_model_len))
    return sorted(served, key=lambda one: (one.arrival, one.index))
