"""The first request of a run, which may pay for what is loaded and compiled on the way."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow.compute as pc

from replay.checks.evidence import Evidence, Rows
from replay.checks.finding import Finding

SIMILAR = 0.9
"""Share of the first prompt's length from which another prompt takes at least about as long."""
COLD, VERY_COLD = 1.1, 1.5
"""Time of the first request over the shortest of those, from which it is said, and from which it is doubted."""
FEWEST = 3


def warm_up(evidence: Evidence) -> Iterator[Finding]:
    """The first request took longer to its first token than a later one with as long a prompt on a busier engine.

    Nobody can have been ahead of the first request, so on a warm engine none with as long a prompt is faster; how much the
    fastest is tells the least that the start cost. Requests that share prompt blocks are left out. A replay imposes a
    cold start where the trace says that the run was not warmed up (``replay.cold_start``); else it is an error.
    """
    if evidence.trace.batches is not None or not evidence.arrivals_measured:
        return
    begin = np.where(np.isnan(evidence.scheduled), evidence.trace.start, evidence.scheduled)
    some = evidence.ok & ~np.isnan(evidence.first - begin)
    if not some.any():
        return
    one = int(np.argmin(np.where(some, evidence.trace.start, np.inf)))
    others = some & (evidence.prompt >= SIMILAR * evidence.prompt[one]) & ~_shared(evidence)
    others[one] = False
    took = evidence.first - begin
    if others.sum() < FEWEST:
        return
    # The third fastest: one may have been served from a cache.
    least = float(np.partition(took[others], FEWEST - 1)[FEWEST - 1])
    if not took[one] > COLD * least:
        return
    imposed = not evidence.trace.meta.get("warmed_up")
    yield evidence.found(
        "warm_up",
        "info" if imposed or took[one] < VERY_COLD * least else "warning",
        f"the first request took {took[one]:.3f} s to its first token, later ones with as long a prompt {least:.3f} s: the "
        "engine (or the client) was cold; "
        + ("the replay imposes that" if imposed else "warm the server up with a few requests, or leave the first out"),
        np.array([one]),
        {"first": float(took[one]), "later": least},
    )


def _shared(evidence: Evidence) -> Rows:
    """Rows whose first prompt block stands in another prompt too, or that are known to have come from the cache."""
    trace = evidence.trace
    cached = np.nan_to_num(trace.column("cached_tokens")) > 0
    if not trace.has("block_hashes"):
        return np.asarray(cached)
    column = trace.requests.column("block_hashes").combine_chunks()
    hashes = pc.list_flatten(column).to_numpy(zero_copy_only=False)
    owner = np.asarray(pc.list_parent_indices(column), dtype=np.int64)
    opens = np.concatenate([[True], np.diff(owner) != 0])[: owner.size]
    _, place, counts = np.unique(hashes[opens], return_inverse=True, return_counts=True)
    cached[owner[opens]] |= counts[place] > 1
    return np.asarray(cached)
