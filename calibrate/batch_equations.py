"""Equations from batches whose times were measured, and which of them cannot be true."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from calibrate.batches import BatchSums
from calibrate.space import CoefficientSpace, Equations
from profiles.deployment import Deployment
from profiles.errors import InputError
from replay.run import PREDICTED
from replay.trace import Trace

Floats = npt.NDArray[np.floating[Any]]
Rows = npt.NDArray[np.bool_]

MOST_IMPOSSIBLE = 0.1
"""Share of a trace's batches that may be shorter than the datasheet allows."""


def impossible_warning(trace: Trace, space: CoefficientSpace, sums: BatchSums, known: Rows | None) -> str | None:
    """Say which batches break the datasheet.

    Raises
    ------
    InputError
        If many do.
    """
    mine = _known_batches(trace, sums, known)
    bad = sums.batches[_impossible(trace, space, sums) & mine]
    if not bad.size:
        return None
    text = (
        f"{trace.name}: {bad.size} of {mine.sum()} batches (the first is batch {bad[0] + 1}) took less time than "
        "the datasheet allows: not all of their prompts can have been computed together, or another device ran them"
    )
    if bad.size > MOST_IMPOSSIBLE * mine.sum():
        raise InputError(f"{text}; check hardware, tensor_parallel_size and model")
    return f"{text}; left out"


def usable_batches(trace: Trace, space: CoefficientSpace, sums: BatchSums, known: Rows | None) -> Rows:
    """Which batches may be fitted: those of which all requests are ``known``, and no time is impossible."""
    return _known_batches(trace, sums, known) & ~_impossible(trace, space, sums)


def _known_batches(trace: Trace, sums: BatchSums, known: Rows | None) -> Rows:
    rows = trace.rows_of_batches()
    return np.array([known is None or bool(known[rows[batch]].all()) for batch in sums.batches])


def _impossible(trace: Trace, space: CoefficientSpace, sums: BatchSums) -> Rows:
    """Batches measured shorter than the datasheet allows: they were not computed as the trace says."""
    found = np.zeros(sums.batches.size, dtype=bool)
    for name in PREDICTED:
        seconds = trace.of_batches(name)[sums.batches]
        found |= seconds < np.nan_to_num(sums.features[name] @ space.least)
    return found


def impossible_requests(trace: Trace, deployment: Deployment) -> list[str]:
    """Ids of the requests of batches that were measured shorter than the deployment's datasheet allows."""
    space = CoefficientSpace(deployment)
    sums = space.sums(trace)
    rows, ids = trace.rows_of_batches(), trace.ids
    return [ids[row] for batch in sums.batches[_impossible(trace, space, sums)] for row in rows[batch]]


def equations_of_batches(trace: Trace, sums: BatchSums, usable: Rows) -> Equations:
    """One equation a measured column of each usable batch."""
    found = []
    for name in PREDICTED:
        seconds = trace.of_batches(name)[sums.batches]
        features = sums.features[name]
        some = usable & ~np.isnan(seconds) & ~np.isnan(features[:, 0]) & features.any(axis=1)
        found.append(Equations(features[some], seconds[some], 1 / seconds[some]))
    return Equations.joined(found)
