"""A trace as the checks look at it: columns once, rows by status, stamps of iterations."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from profiles.deployment import Deployment
from replay.checks.finding import MOST_IDS, Finding
from replay.trace import REQUEST_CLOCK, Floats, Trace

Rows = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


RESOLUTION = 1e-6
"""Seconds. Stamps of one iteration are identical in the source; this is what survives the arithmetic since."""
GRIDS = (60.0, 10.0, 1.0, 0.1, 0.01, 0.001)
"""Seconds to which sources round."""
ON_GRID = 0.999
"""Share of the stamps that must lie on a grid (the rest is what arithmetic did to them)."""
FEWEST_STAMPS, FEWEST_DISTINCT = 20, 4


class Evidence:
    """Columns of a trace (shape (n,), seconds or tokens, NaN where not measured), and what follows from them."""

    def __init__(self, trace: Trace, deployment: Deployment | None = None) -> None:
        self.trace, self.deployment = trace, deployment
        names = ("arrival", "queued", "scheduled", "first_token", "last_token", "prompt_tokens", "output_tokens")
        self.arrival, self.queued, self.scheduled, self.first, self.last, self.prompt, self.output = (
            trace.column(name) for name in names
        )

    def with_status(self, status: str) -> Rows:
        """Rows of that status."""
        equal = pc.equal(self.trace.requests.column("status"), status)
        return np.asarray(equal.fill_null(False).to_numpy(zero_copy_only=False), dtype=bool)

    @cached_property
    def ok(self) -> Rows:
        """Rows that were served to the end."""
        return self.with_status("ok")

    @cached_property
    def entered(self) -> Floats:
        """When each request came into the engine: its queue stamp, else its start."""
        return np.where(np.isnan(self.queued), self.trace.start, self.queued)

    @property
    def one_clock(self) -> bool:
        """Whether stamps of different requests may be compared."""
        return self.trace.clock != REQUEST_CLOCK

    @cached_property
    def arrivals_measured(self) -> bool:
        """Whether arrivals were measured, and not drawn anew."""
        told = str((self.trace.meta.get("columns") or {}).get("arrival", "measured"))
        return self.one_clock and self.trace.has("arrival") and not told.startswith(("assumed", "unknown"))

    @cached_property
    def straight(self) -> Rows:
        """Rows that got their tokens without a preemption, as far as the trace tells."""
        return ~(np.nan_to_num(self.trace.column("preemptions")) > 0)

    @cached_property
    def decoding(self) -> Rows:
        """Served rows with a measured time between first and last of several tokens."""
        return self.ok & (self.output > 1) & (self.last > self.first)

    @cached_property
    def step(self) -> float:
        """Median seconds of a token after the first, NaN without any: about an iteration."""
        some = self.decoding
        return float(np.median((self.last - self.first)[some] / (self.output[some] - 1))) if some.any() else np.nan

    @cached_property
    def ends(self) -> Floats:
        """Distinct stamps of first and last tokens, ascending: instants at which iterations ended."""
        stamps = np.unique(np.concatenate([self.first, self.last]))
        return np.asarray(stamps[~np.isnan(stamps)])

    @cached_property
    def resolution(self) -> float:
        """Seconds to which first and last tokens are rounded, 0 if that is none of the usual grids."""
        return max(grid_of(self.first), grid_of(self.last))

    @cached_property
    def chunks(self) -> tuple[Floats, Ints]:
        """All token times and the row of each, in row order."""
        column = self.trace.requests.column("token_times").combine_chunks()
        values = pc.list_flatten(column).to_numpy(zero_copy_only=False)
        return np.asarray(values, dtype=np.float64), np.asarray(pc.list_parent_indices(column), dtype=np.int64)

    @cached_property
    def chunk_counts(self) -> Ints:
        """Token times of each row."""
        return np.bincount(self.chunks[1], minlength=len(self.trace)).astype(np.int64)

    def argument(self, name: str) -> object:
        """An engine argument as the trace states it, None if it does not."""
        return ((self.trace.meta.get("engine") or {}).get("arguments") or {}).get(name)

    def items(self) -> tuple[Ints, Ints, Ints, Ints]:
        """Recorded iterations flattened: iteration, row of the request, tokens computed before and scheduled."""
        table = self.trace.iterations
        assert table is not None
        lists = [_flat(table, name) for name in ("requests", "computed", "scheduled")]
        (iteration, rows), (_, computed), (_, scheduled) = lists
        return iteration, rows, computed, scheduled

    def found(
        self,
        check: str,
        severity: str,
        sentence: str,
        rows: Rows | Ints | None = None,
        values: Mapping[str, float] | None = None,
    ) -> Finding:
        """A finding about some rows (a mask, or row numbers), or about the whole run."""
        figures = {name: float(value) for name, value in (values or {}).items()}
        if rows is None:
            return Finding(check, severity, sentence, values=figures)
        numbers = np.flatnonzero(rows) if rows.dtype == bool else rows
        ids = self.trace.requests.column("id").take(pa.array(numbers[:MOST_IDS])).to_pylist()
        return Finding(
            check, severity, sentence, tuple(str(one) for one in ids), {"requests": float(numbers.size), **figures}
        )


def grid_of(stamps: Floats) -> float:
    """The coarsest usual grid on which stamps lie, 0 if none, or too few to tell."""
    there = np.unique(stamps[~np.isnan(stamps)])
    if np.count_nonzero(~np.isnan(stamps)) < FEWEST_STAMPS or there.size < FEWEST_DISTINCT:
        return 0.0
    for grid in GRIDS:
        parts = (there - there[0]) / grid
        if np.mean(np.abs(parts - np.round(parts)) * grid < RESOLUTION) >= ON_GRID:
            return grid
    return 0.0


def present(begin: Floats, end: Floats, times: Floats) -> Floats:
    """How many intervals hold each instant: those that have begun by then, less those that have ended."""
    both = ~(np.isnan(begin) | np.isnan(end))
    begun = np.searchsorted(np.sort(begin[both]), times, side="right")
    return np.asarray(begun - np.searchsorted(np.sort(end[both]), times, side="right"), dtype=np.float64)


def _flat(table: pa.Table, name: str) -> tuple[Ints, Ints]:
    column = table.column(name).combine_chunks()
    values = pc.list_flatten(column).to_numpy(zero_copy_only=False)
    return np.asarray(pc.list_parent_indices(column), dtype=np.int64), np.asarray(values, dtype=np.int64)
