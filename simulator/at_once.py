"""The schedule of requests that are handed over together: it does not depend on how long an iteration takes.

The scheduler alone tells every iteration, so nothing needs a clock. While the same requests decode, one iteration is
like the last but for one more token of context each: such a stretch is one item of the schedule, however long it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from simulator.batch import Batch
from simulator.engine import check_fits
from simulator.engine_config import EngineConfig
from simulator.errors import NeverFitsError
from simulator.request import Request, ServedRequest
from simulator.scheduler import Scheduler, Step

Floats = npt.NDArray[np.float64]

EXACT = 4
"""Iterations up to which a stretch is summed one by one."""
STRAIGHT = 1e-6
"""Share of an iteration's time by which it may miss the straight line on which a stretch is summed."""


@dataclass(slots=True)
class Stretch:
    """``steps`` iterations in a row: the first is ``batch``, in each further one every decode has one more context."""

    batch: Batch
    steps: int

    def at(self, place: int) -> Batch:
        """The batch of one of its iterations."""
        return self.batch.later(place) if place else self.batch

    def sum(self, step: Callable[[Batch], Sequence[float] | npt.NDArray[np.floating[Any]]]) -> Floats:
        """Sum ``step(batch)``, shape (components,), over its iterations.

        A long stretch is halved until a part is straight in the context (as attention is, piece by piece): two
        inner points must lie on the line between its ends to ``STRAIGHT`` of the iteration's time.
        """

        def value(place: int) -> Floats:
            return np.asarray(step(self.at(place)), dtype=np.float64)

        def between(low: int, high: int, first: Floats, last: Floats) -> Floats:
            """Over low to high, both ends included."""
            length = high - low
            if length < EXACT:
                inner = [value(place) for place in range(low + 1, high)]
                total: Floats = np.sum([first, *inner, *([last] if length else [])], axis=0)
                return total
            points = low + length // 3, low + (2 * length) // 3
            inner = [value(place) for place in points]
            off = max(
                float(np.abs(first + (last - first) * (place - low) / length - here).max())
                for place, here in zip(points, inner, strict=True)
            )
            if off <= STRAIGHT * float(first.sum()):
                total = (length + 1) / 2 * (first + last)
                return total
            middle = points[0]
            right = value(middle + 1)
            return between(low, middle, first, inner[0]) + between(middle + 1, high, right, last)

        first = value(0)
        return between(0, self.steps - 1, first, value(self.steps - 1) if self.steps > 1 else first)


def schedule_at_once(config: EngineConfig, requests: Iterable[Request], ahead: int = 0) -> list[Stretch]:
    """Every iteration of an engine that is handed all requests before its first schedule call.

    Parameters
    ----------
    config : EngineConfig
    requests : iterable of Request
        In the order handed over; their arrivals are not looked at.
    ahead : int
        Most requests that the first schedule call sees (0: all), as in ``Engine.run``.

    Raises
    ------
    NeverFitsError
        If a prompt is too long, or needs more KV blocks than there are.
    """
    requests = list(requests)
    scheduler = Scheduler(_with_blocks_enough(config, requests))
    later: deque[ServedRequest] = deque()
    for index, request in enumerate(requests):
        served = ServedRequest.enter(request, index, config.max_model_len)
        if served.num_prompt_tokens >= config.max_model_len:
            raise NeverFitsError(
                f"request {request.id!r} has {request.prompt_tokens} prompt tokens, engine.max_model_len is "
                f"{config.max_model_len}"
            )
        check_fits(served, config)
        if ahead and index >= ahead:
            later.append(served)
        else:
            scheduler.add(served)
    depth = 2 if config.async_scheduling else 1
    in_flight: deque[Step] = deque()
    found: list[Stretch] = []
    while scheduler.num_unfinished or in_flight:
        steps = 0 if later else scheduler.quiet_steps()
        if steps and len(in_flight) == depth - 1:
            _append(found, scheduler.next_batch(), steps)
            last = scheduler.leap([0] * steps)
            in_flight = deque() if last is None else deque([last])
            continue
        if scheduler.num_unfinished:
            step = scheduler.schedule(0)
            if step:
                _append(found, step.batch(), 1)
            in_flight.append(step)
            while later:
                scheduler.add(later.popleft())
            if len(in_flight) < depth:
                continue
        scheduler.update(in_flight.popleft(), 0)
    return found


def _with_blocks_enough(config: EngineConfig, requests: Sequence[Request]) -> EngineConfig:
    """The configuration with no more blocks than all requests together can hold; more make no difference but time."""
    tokens = (min(one.prompt_tokens + one.output_tokens, config.max_model_len) for one in requests)
    most = 1 + sum(-(-count // config.block_size) for count in tokens)
    return config if config.watermark else replace(config, num_gpu_blocks=min(config.num_gpu_blocks, max(most, 2)))


def _append(found: list[Stretch], batch: Batch, steps: int) -> None:
    """Add to the schedule, as a part of its last stretch if it goes on with that."""
    last = found[-1] if found else None
    if last is not None and not batch.prefills and not last.batch.prefills and _goes_on(last, batch):
        last.steps += steps
    else:
        found.append(Stretch(batch, steps))


def _goes_on(last: Stretch, batch: Batch) -> bool:
    """Whether the same requests decode in a batch, one token further than at the end of a stretch."""
    before, count = last.batch, batch.num_decodes
    if before.num_decodes != count or before.decode_context + last.steps * count != batch.decode_context:
        return False
    return sorted(last.at(last.steps).decode_contexts) == sorted(batch.decode_contexts)
