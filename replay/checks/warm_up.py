"""The first request of a run, which may pay for what is loaded and compiled on the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow.compute as pc

from replay.checks.evidence import Evidence, Rows
from replay.checks.finding import Finding
from replay.cold_start import find_cold_start
from replay.run import replayable
from simulator.errors import SimulationError

SIMILAR = 0.9
"""Share of the first prompt's length from which another prompt takes at least about as long."""
COLD, VERY_COLD = 1.1, 1.5
"""Time of the first request over the shortest of those, from which it is said, and from which it is doubted."""
FEWEST = 3
MOST_AHEAD = 1000
"""Requests before the first token of the first, beyond which it is not simulated."""


def warm_up(evidence: Evidence) -> Iterator[Finding]:
    """The first request took longer to its first token than a warm engine would.

    Told without a model where it can be: who has the engine alone is served fastest, so on a warm one no later request
    with as long a prompt is faster, and how much the fastest is tells the least that the start cost (requests that
    share prompt blocks are left out). On a busy engine none may be; then the deployment's own model tells, as the
    replay does (``replay.cold_start``), which imposes a cold start where the trace does not say that it was warmed up.
    """
    if evidence.trace.batches is not None or not evidence.arrivals_measured:
        return
    begin = np.where(np.isnan(evidence.scheduled), evidence.trace.start, evidence.scheduled)
    some = evidence.ok & ~np.isnan(evidence.first - begin)
    if not some.any():
        return
    one = int(np.argmin(np.where(some, evidence.trace.start, np.inf)))
    took = evidence.first - begin
    others = some & (evidence.prompt >= SIMILAR * evidence.prompt[one]) & ~_shared(evidence)
    others[one] = False
    # The third fastest: one may have been served from a cache.
    least = float(np.partition(took[others], FEWEST - 1)[FEWEST - 1]) if others.sum() >= FEWEST else np.inf
    imposed = not evidence.trace.meta.get("warmed_up")
    company = some & (evidence.trace.start <= evidence.first[one])
    if company.sum() == 1 and took[one] > COLD * least:
        yield evidence.found(
            "warm_up",
            "info" if imposed or took[one] < VERY_COLD * least or not _hits_told(evidence) else "warning",
            f"the first request took {took[one]:.3f} s to its first token, later ones with as long a prompt "
            f"{least:.3f} s: the engine (or the client) was cold; "
            + ("the replay imposes that" if imposed else "warm the server up with a few requests, or leave it out"),
            np.array([one]),
            {"first": float(took[one]), "later": least},
        )
    elif imposed:
        yield from _by_model(evidence, one)


def _by_model(evidence: Evidence, one: int) -> Iterator[Finding]:
    trace, deployment = evidence.trace, evidence.deployment
    ahead = evidence.trace.start <= evidence.first[one]
    if deployment is None or ahead.sum() > MOST_AHEAD:
        return
    early = replace(trace, requests=trace.requests.filter(ahead), _columns={})
    front_end = deployment.front_end if trace.meta.get("vantage") == "client" else None
    _, requests = replayable(early, deployment.config, front_end)
    try:
        cold = find_cold_start(early, requests, deployment.engine().run) if requests else None
    except SimulationError:
        return  # the replay says why
    if cold is not None:
        yield evidence.found(
            "warm_up",
            "info",
            f"the first request took {cold.measured_ttft:.3f} s to its first token, a warm engine would by this "
            f"profile take {cold.predicted_ttft:.3f} s: it was cold, and the replay imposes that",
            np.array([one]),
            {"first": cold.measured_ttft, "predicted": cold.predicted_ttft},
        )


def _hits_told(evidence: Evidence) -> bool:
    """Whether later requests cannot have been faster by prefix hits that nobody tells."""
    told = evidence.trace.has("block_hashes") or evidence.trace.has("cached_tokens")
    return told or evidence.argument("enable_prefix_caching") is False


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
