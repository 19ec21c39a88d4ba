"""Equations of batches: requests handed over in one call, of which a time of the whole was measured.

All requests of a batch are there when it begins, so the schedule does not depend on how long an iteration takes
(``simulator.at_once``). A batch's makespan is the sum of its iterations' features times the coefficients, and the
call's own terms; its prompt time that of the iterations up to the last that computes a prompt; its token time the
mean of those after it. No simulation is needed, neither to fit nor to predict.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from profiles.deployment import Deployment
from profiles.errors import InputError
from replay.run import PREDICTED, predicted_batches, replayable, requests_ahead
from replay.trace import Trace, requests_table
from simulator.at_once import Stretch, schedule_at_once
from simulator.batch import Batch
from simulator.engine_config import EngineConfig
from simulator.errors import SimulationError
from simulator.request import Request

Floats = npt.NDArray[np.float64]
Features = Callable[[Batch], npt.NDArray[np.floating[Any]]]

REMEMBERED = 8192
"""Schedules kept: those of a few thousand batches, which fits on parts of the data ask for again and again."""


@dataclass(frozen=True)
class BatchSums:
    """Sums over the iterations of each batch of a trace.

    ``features[name]`` has shape (batches, components) and belongs to the measured column of that name; ``batches`` are
    their rows in ``trace.batches``, ``iterations`` how many iterations each took, ``seen[place]`` its
    iterations at both ends of every stretch, with how many they stand for.
    """

    batches: npt.NDArray[np.intp]
    requests: npt.NDArray[np.int64]
    features: dict[str, Floats]
    iterations: npt.NDArray[np.int64]
    seen: list[list[tuple[Batch, int]]]


def batch_sums(trace: Trace, config: EngineConfig, features: Features, owner: object, key: object) -> BatchSums:
    """Schedule every batch of a trace that was served, and sum the features of its iterations.

    Parameters
    ----------
    trace : Trace
        With batches.
    config : EngineConfig
    features : callable
        An iteration's features, shape (components,).
    owner : object
        What computes the features; sums are remembered as long as it lives, by batch and ``key``.
    key : object
        What else the features depend on.

    Raises
    ------
    InputError
        If no batch was served, or the engine could not serve one.
    """
    remembered, ahead = _SUMS.setdefault(owner, {}), requests_ahead(trace)
    rows, requests = replayable(trace, config)
    place = {row: index for index, row in enumerate(rows)}
    batches, counts, iterations, found, seen = [], [], [], [], []
    for batch, members in enumerate(trace.rows_of_batches()):
        own = [requests[place[row]] for row in members if row in place]
        if not own:
            continue
        lengths = tuple((one.prompt_tokens, one.output_tokens, one.priority) for one in own)
        shape: Any = (config, ahead, key, lengths)
        hashed = any(one.block_hashes for one in own)
        try:
            stretches = schedule_at_once(config, own, ahead) if hashed else _schedule(config, ahead, lengths)
        except SimulationError as error:
            raise InputError(f"{trace.name}: batch {batch + 1}: {error}") from None
        if hashed or shape not in remembered:
            remembered[shape] = _sums(stretches, features)
        batches.append(batch)
        counts.append(len(own))
        found.append(remembered[shape].features)
        iterations.append(remembered[shape].iterations)
        seen.append(remembered[shape].seen)
    if not found:
        raise InputError(f"{trace.name} has no batch that was served")
    named = {name: np.array([one[name] for one in found]) for name in PREDICTED}
    return BatchSums(np.array(batches), np.array(counts), named, np.array(iterations), seen)


class _Sums(NamedTuple):
    """Those of one batch."""

    features: dict[str, Floats]
    iterations: int
    seen: list[tuple[Batch, int]]


_SUMS: WeakKeyDictionary[Any, dict[Any, _Sums]] = WeakKeyDictionary()


@lru_cache(maxsize=REMEMBERED)
def _schedule(config: EngineConfig, ahead: int, lengths: tuple[tuple[int, int, int], ...]) -> list[Stretch]:
    return schedule_at_once(config, [Request(str(place), 0.0, *one) for place, one in enumerate(lengths)], ahead)


def _sums(stretches: Sequence[Stretch], features: Features) -> _Sums:
    sums = [one.sum(features) for one in stretches]
    last = max((place for place, one in enumerate(stretches) if one.batch.prefills), default=-1)
    steps = [one.steps for one in stretches]
    zero = np.zeros_like(sums[0])
    after = sum(steps[last + 1 :])
    seen = []
    for one in stretches:
        seen.append((one.batch, one.steps - one.steps // 2))
        if one.steps > 1:
            seen.append((one.at(one.steps - 1), one.steps // 2))
    columns = {
        "makespan": np.sum(sums, axis=0),
        "prompt_seconds": np.sum(sums[: last + 1], axis=0) if last >= 0 else zero,
        "token_seconds": np.sum(sums[last + 1 :], axis=0) / after if after else np.full_like(zero, np.nan),
    }
    return _Sums(columns, sum(steps), seen)


def predict_batches(trace: Trace, deployment: Deployment) -> Trace:
    """What a replay says of a trace of batches, by sums over their iterations.

    It is the replay's to the rounding of times to nanoseconds, and to ``simulator.at_once.STRAIGHT``.
    """
    accelerator = deployment.accelerator
    sums = batch_sums(trace, deployment.config, lambda batch: np.array(accelerator.step(batch)), accelerator, None)
    columns = {name: np.full(trace.of_batches("start").size, np.nan) for name in PREDICTED}
    for name, column in columns.items():
        column[sums.batches] = sums.features[name].sum(axis=1)
    columns["makespan"][sums.batches] += [accelerator.call_seconds(int(count)) for count in sums.requests]
    return predicted_trace(trace, columns)


def predicted_trace(trace: Trace, columns: dict[str, Floats]) -> Trace:
    """A trace of the same requests whose batches took the given seconds, in the columns of ``PREDICTED``."""
    kept = {name: trace.requests.column(name).combine_chunks() for name in _GIVEN}
    return Trace(
        requests_table(kept, len(trace)),
        {"name": f"{trace.name} predicted", "clock": trace.meta.get("clock")},
        batches=predicted_batches(trace, columns),
    )


_GIVEN = ("id", "status", "arrival", "prompt_tokens", "output_tokens", "batch")
