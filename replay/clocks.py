"""Bringing stamps of several clocks onto one.

vLLM stamps ``arrival_time`` on the wall clock of its API server and everything later on the engine's monotonic
clock. A request cannot be queued before it arrives, so the smallest ``queued - arrival`` over a run is the
offset between the clocks plus the shortest way from front end to engine; taking it as the offset recovers
every arrival but for that shortest way. What remains of ``queued - arrival`` is the wait for the step in
flight, which starts when the request arrives and not when the engine looks at it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Alignment:
    """Wall-clock arrivals on the engine's clock.

    ``arrival`` in seconds on the engine's clock; ``offset`` what was added to the wall clock; ``lag`` the wait
    between arrival and queue stamp, all >= 0.
    """

    arrival: Floats
    offset: float
    lag: Floats


def align_arrivals(wall_arrival: Floats, queued: Floats) -> Alignment:
    """Place wall-clock arrivals on the clock of the queue stamps.

    Parameters
    ----------
    wall_arrival, queued : array, shape (n,)
        Seconds; NaN where not measured. At least one pair must be complete.
    """
    gaps = queued - wall_arrival
    offset = float(np.nanmin(gaps))
    # Doubles near 1.8e9 s resolve no better than 0.24 us: rounding must not queue a request before it came.
    arrival = np.fmin(wall_arrival + offset, queued)
    return Alignment(arrival, offset, queued - arrival)
