"""95 % intervals by a circular-block bootstrap over arrival time.

Requests that are served together share their queue, so blocks of about sqrt(n) neighbours are drawn with replacement,
the end of a run joined to its start (Politis and Romano 1992). What is drawn are requests: a pooled statistic such as
ITL takes all values of each drawn request, since the gaps of one request are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.intp]
Interval = tuple[float, float]

RESAMPLES = 200
HELD_AT_ONCE = 2_000_000
"""Resampled values; what is held in memory stays of this size however long the trace."""
SEED = 20240815
CELLS = 2048
"""Most units that are drawn. Up to this many requests each is a unit; beyond, as many neighbours as it takes."""
EXACT = 100_000
"""Most values whose resampled percentiles are those of the drawn values; beyond, of ``BINS`` bins."""
BINS = 2048
"""Bins of about equal count in which percentiles of many values are sought, linear inside a bin."""


@dataclass(frozen=True)
class Pool:
    """Values of requests, of some several or none: ``values[i]`` belongs to the request at place ``places[i]``."""

    places: Rows
    values: Floats

    @classmethod
    def of(cls, values: Floats) -> Pool:
        """Return one value a request; NaN is none."""
        places = np.flatnonzero(~np.isnan(values))
        return cls(places, values[places])

    def of_requests(self, some: npt.NDArray[np.bool_]) -> Pool:
        """Return the values of some requests; ``some`` has an entry for each."""
        fine = some[self.places]
        return Pool(self.places[fine], self.values[fine])


class Resamples:
    """Drawn multisets of ``count`` requests in order of arrival, the same for every statistic of a run.

    ``weights`` has shape (resamples, cells): how often each cell of neighbouring requests was drawn. ``blocks`` is the
    number of blocks that make up a resample.
    """

    def __init__(self, count: int) -> None:
        self._cell = -(-count // CELLS) or 1
        self._cells = -(-count // self._cell)
        width = max(1, round(count**0.5 / self._cell))
        self.blocks = -(-self._cells // width)
        starts = np.random.default_rng(SEED).integers(0, max(self._cells, 1), size=(RESAMPLES, self.blocks))
        drawn = (starts[:, :, None] + np.arange(width)).reshape(RESAMPLES, -1)[:, : self._cells] % max(self._cells, 1)
        self.weights = np.array([np.bincount(one, minlength=self._cells) for one in drawn], dtype=np.float64)

    def cells(self, places: Rows) -> Rows:
        """Cell of each place."""
        return places // self._cell

    def sums(self, places: Rows, values: Floats | None = None) -> Floats:
        """Sum of the values at these places (their number without values) in each resample, exactly."""
        return self.sums_by_group(places, np.zeros(places.size, dtype=np.intp), 1, values)[:, 0]

    def sums_by_group(self, places: Rows, group: Rows, groups: int, values: Floats | None = None) -> Floats:
        """The same for every group of values, shape (resamples, groups)."""
        by_cell = np.bincount(self.cells(places) * groups + group, values, minlength=self._cells * groups)
        return np.asarray(self.weights @ by_cell.reshape(self._cells, groups).astype(np.float64))

    def means(self, pool: Pool) -> Floats:
        """Mean of the drawn values, shape (resamples,); NaN where none was drawn."""
        return ratio(self.sums(pool.places, pool.values), self.sums(pool.places))

    def percentiles(self, pool: Pool, at: Sequence[float]) -> Floats:
        """Percentiles of the drawn values, shape (resamples, len(at)).

        Up to ``EXACT`` values these are the linear percentiles (``numpy.percentile``) of what was drawn. Beyond, counts
        are exact at the edges of ``BINS`` bins of about equal count, and values between two edges are taken as uniform:
        off by less than the bin is wide, which is 1/2048 of all values.
        """
        return (self._exact if pool.values.size <= EXACT else self._binned)(pool, at)

    def _exact(self, pool: Pool, at: Sequence[float]) -> Floats:
        order = np.argsort(pool.values, kind="stable")
        values, cells = pool.values[order], self.cells(pool.places[order])
        found = []
        for weights in np.array_split(self.weights, -(-RESAMPLES * values.size // HELD_AT_ONCE) or 1):
            drawn = np.cumsum(weights[:, cells], axis=1)
            some = []
            for one in at:
                position = (drawn[:, -1] - 1) * one / 100
                low, high = (
                    values[np.minimum((drawn <= edge[:, None]).sum(axis=1), values.size - 1)]
                    for edge in (np.floor(position), np.ceil(position))
                )
                some.append(low + (position - np.floor(position)) * (high - low))
            found.append(np.where(drawn[:, -1:] > 0, np.column_stack(some), np.nan))
        return np.concatenate(found)

    def _binned(self, pool: Pool, at: Sequence[float]) -> Floats:
        edges = np.sort(pool.values)[np.linspace(0, pool.values.size - 1, BINS + 1).astype(np.intp)]
        # A value that fills bins gets one of its own, from just below it, else it would be spread.
        edges = np.unique(np.concatenate([edges, np.nextafter(edges[1:][np.diff(edges) == 0], -np.inf)]))
        bins = np.searchsorted(edges, pool.values, side="left")
        drawn = np.cumsum(self.sums_by_group(pool.places, bins, edges.size), axis=1)
        shares = np.asarray(at) / 100
        return np.array([np.interp(shares * one[-1], one, edges) for one in drawn])


def ratio(above: Floats, below: Floats) -> Floats:
    """Quotients, NaN where there is nothing to divide by."""
    return np.asarray(above / np.where(below > 0, below, np.nan), dtype=np.float64)


def interval(statistics: Floats) -> Interval:
    """95 % interval of a statistic's resamples; NaN if none is known."""
    known = statistics[~np.isnan(statistics)]
    if not known.size:
        return (np.nan, np.nan)
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)


def bootstrap_interval(values: Floats, statistic: Callable[[Floats], Floats]) -> Interval:
    """95 % interval of any statistic by drawing blocks of the values, in their order, and computing it anew.

    Parameters
    ----------
    values : array (n, ...)
    statistic : callable
        From resamples, shape (resamples, n, ...), to their statistics.
    """
    count = len(values)
    if count < 2:
        return (np.nan, np.nan)
    width = max(1, round(count**0.5))
    random = np.random.default_rng(SEED)
    starts = random.integers(0, count, size=(RESAMPLES, -(-count // width)))
    found = []
    for some in np.array_split(starts, min(RESAMPLES, -(-RESAMPLES * count // HELD_AT_ONCE))):
        rows = (some[:, :, None] + np.arange(width)).reshape(len(some), -1)[:, :count] % count
        found.append(statistic(values[rows]))
    return interval(np.concatenate(found))
