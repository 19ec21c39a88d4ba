"""How one clock stands to another, from pairs of events of which one cannot come before the other.

A request arrives at the engine after the client sent it, and its first token reaches the client after the engine made
it. Each such pair bounds the offset between both clocks from one side: with x on the source's clock and y on the
target's, an event that follows gives ``offset <= y - x``, one that precedes ``offset >= y - x``. The bounds of all
requests leave an interval; its middle is the estimate, half its width the error. (So NTP bounds an offset, RFC 5905
section 8; for delays that differ between both ways nothing more can be known.) Clocks also drift apart: the offset is
a straight line in time, and the lines between all bounds are a polygon whose extremes are linear programmes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog

Floats = npt.NDArray[np.float64]

MOST_DRIFT = 1e-4
"""Seconds per second between two clocks: quartz is wrong by up to 5e-5 either way."""
WILDEST_DRIFT = 5e-3
"""Where no smaller drift fits: a virtual machine's clock, or one that is being slewed (5e-4) against such a one."""
ROUNDING = 1e-6
"""Seconds: doubles of Unix time resolve 0.24 us, and two of them are subtracted."""


@dataclass(frozen=True)
class ClockMap:
    """Moves stamps of a source's clock onto a target's: ``t + offset + drift * (t - middle)``.

    ``offset`` holds at ``middle`` (seconds on the source's clock). ``error``: seconds that any moved stamp of the run
    can be off, None where events bound the offset from one side only. ``contradiction``: seconds by which the bounds
    exclude each other, 0 if they do not. ``drift_interval`` what the bounds allow. ``pairs``: bounds that were used.
    """

    offset: float
    drift: float = 0.0
    middle: float = 0.0
    error: float | None = 0.0
    drift_interval: tuple[float, float] = (0.0, 0.0)
    contradiction: float = 0.0
    pairs: int = 0

    def move(self, times: Floats | float) -> Floats:
        """Stamps of the source on the target's clock."""
        there = np.asarray(times, dtype=np.float64)
        return there + (self.offset + self.drift * (there - self.middle))

    def at_offset(self, offset: float) -> ClockMap:
        """The same bounds with an offset that is known from elsewhere; the error grows by what that moves."""
        error = None if self.error is None else self.error + abs(offset - self.offset)
        return replace(self, offset=offset, drift=0.0, error=error)


def bound(most_at: Floats, most: Floats, least_at: Floats, least: Floats, resolution: float = 0.0) -> ClockMap | None:
    """Estimate how a source's clock stands to a target's.

    Parameters
    ----------
    most_at, most : array, shape (n,)
        Instants on the source's clock, and what the offset is at most then, in seconds. NaN is passed over.
    least_at, least : array, shape (m,)
        The same for what it is at least.
    resolution : float
        Seconds to which the stamps are rounded: bounds are that much wider.

    Returns
    -------
    ClockMap or None
        None without any bound.
    """
    slack = ROUNDING + resolution
    upper = _present(most_at, most + slack)
    lower = _present(least_at, least - slack)
    if not len(upper) and not len(lower):
        return None
    pairs = len(upper) + len(lower)
    if not len(upper) or not len(lower):
        # One side only: the shortest way is taken to take no time.
        offset = float(upper[:, 1].min()) - slack if len(upper) else float(lower[:, 1].max()) + slack
        return ClockMap(offset, error=None, pairs=pairs)
    ends = np.concatenate([upper[:, 0], lower[:, 0]])
    middle, half = float(ends.min() + ends.max()) / 2, max(float(np.ptp(ends)) / 2, 1e-9)
    origin = float(upper[:, 1].min())
    lines = _Lines(_hull(upper, -1), _hull(lower, 1), middle, half, origin)
    best = lines.roomiest(MOST_DRIFT)
    most_drift = MOST_DRIFT
    if best[2] < 0:
        wild = lines.roomiest(WILDEST_DRIFT)
        # A wilder drift must explain the contradiction, not only lessen it.
        if wild[2] >= 0:
            best, most_drift = wild, WILDEST_DRIFT
    offset, drift, room = best
    if room < 0:
        return ClockMap(offset + origin, drift, middle, slack - room, (drift, drift), -room, pairs)
    flat = float(lower[:, 1].max()), float(upper[:, 1].min())
    if flat[0] <= flat[1]:
        offset, drift = sum(flat) / 2 - origin, 0.0
    error = 0.0
    for end in (-half, half):
        low, high = lines.extremes(end, most_drift)
        error = max(error, high - (offset + drift * end), (offset + drift * end) - low)
    drifts = lines.drifts(most_drift)
    return ClockMap(offset + origin, drift, middle, error, drifts, 0.0, pairs)


def same_events(at: Floats, difference: Floats) -> ClockMap | None:
    """Estimate it where both sources stamped the same events: the line that lies nearest to all differences.

    ``at`` and ``difference`` (target less source) have shape (n,), seconds; the error is the farthest of them.
    """
    return bound(at, difference, at, difference)


def _present(at: Floats, values: Floats) -> Floats:
    both = np.column_stack([at, values])
    return np.asarray(both[~np.isnan(both).any(axis=1)], dtype=np.float64)


def _hull(points: Floats, side: int) -> Floats:
    """The points of the lower (-1) or upper (1) convex hull: only they can bound a line."""
    order = np.lexsort((points[:, 1], points[:, 0]))
    kept: list[tuple[float, float]] = []
    for x, y in points[order].tolist():
        while len(kept) > 1 and side * _turn(kept[-2], kept[-1], (x, y)) >= 0:
            kept.pop()
        kept.append((x, y))
    return np.array(kept)


def _turn(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> float:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


class _Lines:
    """All lines ``offset + drift * (t - middle)`` between bounds; offsets count from ``origin``."""

    def __init__(self, upper: Floats, lower: Floats, middle: float, half: float, origin: float) -> None:
        self.half = half
        # In units of half the run, so that both unknowns are seconds.
        x = np.concatenate([upper[:, 0], lower[:, 0]]) - middle
        sign = np.concatenate([np.ones(len(upper)), -np.ones(len(lower))])
        self.rows = np.column_stack([sign, sign * x / half])
        self.limits = sign * (np.concatenate([upper[:, 1], lower[:, 1]]) - origin)

    def roomiest(self, most_drift: float) -> tuple[float, float, float]:
        """Offset and drift that lie farthest from all bounds, and how far (below 0: by how much they exclude it)."""
        rows = np.column_stack([self.rows, np.ones(len(self.rows))])
        offset, tilt, room = self._solve(rows, [0.0, 0.0, -1.0], most_drift)
        return offset, tilt / self.half, room

    def extremes(self, at: float, most_drift: float) -> tuple[float, float]:
        """The least and the largest offset at a distance from the middle."""
        weights = [1.0, at / self.half]
        low = self._solve(self.rows, weights, most_drift)
        high = self._solve(self.rows, [-one for one in weights], most_drift)
        return float(np.dot(low, weights)), float(np.dot(high, weights))

    def drifts(self, most_drift: float) -> tuple[float, float]:
        """The least and the largest drift."""
        low, high = (self._solve(self.rows, [0.0, sign], most_drift)[1] / self.half for sign in (1.0, -1.0))
        return low, high

    def _solve(self, rows: Floats, weights: list[float], most_drift: float) -> list[float]:
        tilt = most_drift * self.half
        limits = [(None, None), (-tilt, tilt), (None, None)][: len(weights)]
        found = linprog(weights, A_ub=rows, b_ub=self.limits, bounds=limits, method="highs")
        if found.status == 0:
            return [float(one) for one in found.x]
        # Bounds that touch: the solver's own tolerance makes them empty.
        relaxed = linprog(weights, A_ub=rows, b_ub=self.limits + ROUNDING, bounds=limits, method="highs")
        if relaxed.status != 0:
            raise ArithmeticError(f"clock bounds cannot be solved: {relaxed.message}")
        return [float(one) for one in relaxed.x]
