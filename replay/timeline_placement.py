"""Placing samples of an engine's gauges on the clock of a run.

A server log counts seconds of a wall clock (often without a time zone), a client's file an arbitrary counter. If both
say the time of day, that is the offset, up to whole quarters of an hour between time zones. Otherwise the requests in
flight tell: at the right offset, the samples' running and waiting requests are those that the run had then.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from replay.checks.evidence import grid_of, present
from replay.trace import Floats

ZONES = 900.0
"""Seconds: time zones differ by multiples of this."""
MOST_ZONES = 26 * 4
FINEST, MOST_CANDIDATES = 0.05, 40_000
EXPLAINED = 0.6
"""Share of the requests in the samples that the run must explain, where nothing but them tells the offset."""
NEARLY = 0.9
"""Offsets that explain this share of what the best one does cannot be told from it."""


@dataclass(frozen=True)
class Placement:
    """Seconds to add to the samples' times, how far that may be off, and how it was found."""

    offset: float
    error: float
    how: str


@dataclass(frozen=True)
class Flight:
    """When each request of the run was in flight, on the run's clock; NaN where not known. Shape (n,) each."""

    begin: Floats
    end: Floats

    @property
    def span(self) -> tuple[float, float]:
        """First begin and last end."""
        return float(np.nanmin(self.begin)), float(np.nanmax(np.concatenate([self.begin, self.end])))


def resolution_of(times: Floats) -> float:
    """Seconds to which samples are rounded: logs write whole ones."""
    whole = bool(times.size) and bool(np.all(np.abs(times - np.round(times)) < 1e-6))
    return 1.0 if whole else grid_of(times)


def by_wall_clock(times: Floats, in_flight: Floats, flight: Flight, offset: float, error: float) -> Placement | None:
    """Place samples whose wall-clock offset to the run is known, but perhaps not their time zone.

    Parameters
    ----------
    times, in_flight : array, shape (samples,)
        Seconds of the samples, and requests running and waiting (NaN where not told).
    flight : Flight
    offset, error : float
        Seconds from the samples' clock to the run's if both are of one time zone, and how far it may be off.

    Returns
    -------
    Placement or None
        None if the samples lie beside the run in every time zone.
    """
    grid = resolution_of(times)
    centre = offset + grid / 2
    begin, end = flight.span
    zones = np.arange(-MOST_ZONES, MOST_ZONES + 1)
    offsets = centre + ZONES * zones[np.argsort(np.abs(zones), kind="stable")]
    overlaps = (times.max() + offsets >= begin) & (times.min() + offsets <= end)
    if not overlaps.any():
        return None
    offsets = offsets[overlaps]
    scores = np.array([_score(times, in_flight, flight, one) for one in offsets])
    best = float(offsets[np.argmin(scores)])
    if scores[0] <= NEARLY * scores.min():
        best = float(offsets[0])
    moved = (best - centre) / 3600
    how = "both say the time of day"
    if moved:
        how += f"; their time zones are {abs(moved):g} h apart, as the requests in flight tell"
    return Placement(best, error + grid / 2, how)


def by_requests_in_flight(times: Floats, in_flight: Floats, flight: Flight) -> Placement | None:
    """Place samples by the requests that ran and waited; None if they do not tell, or tell several offsets.

    Parameters are those of ``by_wall_clock``. The error is half the range of offsets that explain the samples nearly as
    well as the best one.
    """
    told = ~np.isnan(in_flight)
    times, in_flight = times[told], in_flight[told]
    if not (in_flight > 0).any() or np.isnan(flight.end).all():
        return None
    begin, end = flight.span
    least, most = begin - float(times.max()), end - float(times.min())
    step = max(FINEST, (most - least) / MOST_CANDIDATES)
    offsets = np.arange(least, most + step, step)
    scores = np.array([_score(times, in_flight, flight, one) for one in offsets])
    place = int(np.argmin(scores))
    inside = (times + offsets[place] >= begin) & (times + offsets[place] <= end)
    if -scores[place] < EXPLAINED * in_flight[inside].sum() or scores[place] >= 0:
        return None
    near = offsets[scores <= NEARLY * scores[place]]
    if np.diff(near, prepend=near[0]).max() > (end - begin) / 4 or np.ptp(near) > (end - begin) / 2:
        return None
    error = float(np.ptp(near)) / 2 + step + resolution_of(times) / 2
    return Placement(float(near[0] + near[-1]) / 2, error, "by the requests in flight")


def _score(times: Floats, in_flight: Floats, flight: Flight, offset: float) -> float:
    """How far run and samples differ, less how far samples differ from an idle engine; below 0 is better than that."""
    there: npt.NDArray[np.float64] = present(flight.begin, flight.end, times + offset)
    apart = np.abs(there - in_flight) - in_flight
    return float(np.nansum(apart[there > 0]))
