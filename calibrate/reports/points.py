"""What charts show of every request, or of every batch, thinned where there are too many to draw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calibrate.errors import BATCH_METRICS, Comparison
from calibrate.reports.figures import shortened

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.intp]

MOST = 8_000
"""Requests that charts show, besides extremes. A page of that many has about 2 MB."""
EXTREMES = 100
"""Requests with the largest and with the smallest value of each quantity that are shown in any case."""
LONGEST_ID = 200
"""Characters of an id that a chart shows."""
DRAWN = ("ttft", "tpot", "e2e")
FACTS = ("arrival_s", "prompt_tokens", "output_tokens", "cached_tokens", "concurrency")


@dataclass(frozen=True)
class Points:
    """Pairs, in order of arrival.

    Parameters
    ----------
    ids : list of str
        Of the shown ones.
    columns : mapping of str to array of shape (shown,)
        ``FACTS`` as far as known, and ``<metric>_measured``, ``_predicted`` (s), ``_error`` (signed, relative).
    every : mapping of str to array of shape (pairs,)
        The same columns of all pairs, shown or not.
    metrics : tuple of str
        Those that have any pair.
    """

    ids: list[str]
    columns: Mapping[str, Floats]
    every: Mapping[str, Floats]
    metrics: tuple[str, ...]

    @property
    def total(self) -> int:
        """Pairs, shown or not."""
        return len(next(iter(self.every.values()), ()))

    def worst(self, metric: str, count: int) -> Rows:
        """Rows of the largest errors, largest first; ``EXTREMES`` bounds ``count``, so none is missed by thinning."""
        error = np.abs(self.columns[f"{metric}_error"])
        order = np.argsort(np.where(np.isnan(error), -1.0, error), kind="stable")[::-1]
        return np.array([row for row in order[:count] if error[row] >= 0], dtype=np.intp)


def points_of(comparison: Comparison) -> Points:
    """Collect the pairs of a comparison, at most ``MOST`` and their extremes."""
    if comparison.measured.batches is not None:
        return _batches(comparison)
    table = comparison.requests_table()
    names = [*FACTS, *(f"{metric}_{side}" for metric in DRAWN for side in ("measured", "predicted", "error"))]
    columns = {name: _floats(table.column(name).to_numpy(zero_copy_only=False)) for name in names}
    known = {name: values for name, values in columns.items() if not np.isnan(values).all()}
    metrics = tuple(metric for metric in DRAWN if f"{metric}_error" in known)
    chosen = thinned(known, table.num_rows)
    ids = [shortened(one, LONGEST_ID) for one in table.column("id").take(chosen).to_pylist()]
    return Points(ids, {name: values[chosen] for name, values in known.items()}, known, metrics)


def _batches(comparison: Comparison) -> Points:
    """A point a batch; it is known by its number among those that are compared."""
    columns: dict[str, Floats] = {}
    for metric in BATCH_METRICS:
        measured, predicted = comparison.pairs(metric)
        both = ~(np.isnan(measured) | np.isnan(predicted))
        if both.any():
            columns[f"{metric}_measured"], columns[f"{metric}_predicted"] = measured, predicted
            columns[f"{metric}_error"] = predicted / np.where(measured > 0, measured, np.nan) - 1
    metrics = tuple(metric for metric in BATCH_METRICS if f"{metric}_error" in columns)
    total = len(next(iter(columns.values()), np.empty(0)))
    chosen = thinned(columns, total)
    ids = [f"batch {row + 1}" for row in chosen]
    return Points(ids, {name: values[chosen] for name, values in columns.items()}, columns, metrics)


def thinned(columns: Mapping[str, Floats], total: int) -> Rows:
    """Choose rows: every n-th, and the extremes of each column. All rows if they are few."""
    if total <= MOST:
        return np.arange(total)
    kept = [np.arange(0, total, -(-total // MOST)), np.array([total - 1])]
    for values in columns.values():
        known = np.flatnonzero(~np.isnan(values))
        ends = [EXTREMES, known.size - EXTREMES] if known.size > 2 * EXTREMES else []
        order = known[np.argpartition(values[known], ends)] if ends else known
        kept += [order[:EXTREMES], order[-EXTREMES:]]
    return np.unique(np.concatenate(kept))


def _floats(values: npt.NDArray[np.generic]) -> Floats:
    return np.asarray(values, dtype=np.float64)
