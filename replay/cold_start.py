"""The cold start of a run that nobody warmed up.

The first request that an engine ever executes pays for what is loaded and compiled on the way. That is no
property of warm iterations, which is what an accelerator model prices, and no noise either: everybody who
arrives meanwhile waits. It is an initial condition of the run, like its arrivals, and one request shows it:
the first, alone on an idle engine. Its excess over the prediction is imposed on the replay's first
iteration, and the request itself is left out of the errors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from replay.trace import Trace
from simulator.engine import NS, Simulation
from simulator.request import Request

SHARE = 0.1
"""Excess, as a share of the measured TTFT, from which the first request counts as cold."""


@dataclass(frozen=True)
class ColdStart:
    """The first request's TTFT as measured and as predicted for a warm engine, in seconds."""

    request: str
    measured_ttft: float
    predicted_ttft: float

    @property
    def seconds(self) -> float:
        """The excess."""
        return self.measured_ttft - self.predicted_ttft

    def as_dict(self) -> dict[str, Any]:
        """For reports."""
        return {**asdict(self), "seconds": self.seconds}


def find_cold_start(
    trace: Trace, requests: list[Request], simulate: Callable[[list[Request]], Simulation]
) -> ColdStart | None:
    """Return the cold start of a run, or None if its first request met a warm engine.

    A trace whose ``meta`` says ``warmed_up`` has none.

    Parameters
    ----------
    trace : Trace
        With measured first tokens.
    requests : list of Request
        Those to be replayed.
    simulate : callable
        Simulates some of them on a warm engine.
    """
    if trace.meta.get("warmed_up"):
        return None
    first_token = dict(zip(trace.ids, trace.column("first_token").tolist(), strict=True))
    ok = dict(zip(trace.ids, trace.statuses == "ok", strict=True))
    first = min(requests, key=lambda request: request.arrival)
    measured = first_token[first.id] - first.arrival
    alone = sum(request.arrival == first.arrival for request in requests) == 1
    if not ok[first.id] or not np.isfinite(measured) or measured <= 0 or not alone:
        return None
    # Only requests that came before its first token can have had a part in it.
    early = [request for request in requests if request.arrival <= first_token[first.id]]
    place = early.index(first)
    if not any(request.priority < first.priority for request in early):
        # Nobody overtakes it, so what anybody does after a first token comes later than its own.
        early = [replace(request, output_tokens=1) for request in early]
    served = simulate(early).served[place]
    if served.first_token is None:
        return None
    predicted = (served.first_token - served.arrival) / NS
    if measured - predicted < SHARE * measured:
        return None
    return ColdStart(first.id, measured, predicted)
