"""What the stamps themselves are worth: their resolution, and whether they are the engine's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from replay.checks.evidence import Evidence
from replay.checks.finding import Finding
from replay.trace import Trace

RESOLUTION = 1e-6
"""Seconds. Stamps of one iteration are identical in the source; this is what survives the arithmetic since."""
GRIDS = (60.0, 10.0, 1.0, 0.1, 0.01, 0.001)
"""Seconds to which sources round."""
ON_GRID = 0.999
"""Share of the differences that must be multiples (the rest is what arithmetic did to them)."""
FEWEST_STAMPS = 20
COARSE = 0.1
"""Resolution as a share of the median latency, from which rounding shows in percentiles."""
FEWEST_SHARED = 15
"""Stamps that requests should share by chance, from which sharing hardly any tells that they were not the engine's."""
MOST_SMEARED = 0.1


@dataclass(frozen=True)
class Shared:
    """Pairs of first and last tokens that carry one stamp, and how many should by chance."""

    pairs: int
    expected: float

    @property
    def smeared(self) -> bool:
        """Whether the stamps cannot be those of iterations."""
        return self.expected >= FEWEST_SHARED and self.pairs < MOST_SMEARED * self.expected


def shared_stamps(trace: Trace) -> Shared | None:
    """Count stamps that requests share; None without engine stamps.

    Tokens of one iteration carry one stamp, so n stamps on N iterations share n^2 / 2N by chance (the birthday
    problem).
    """
    if not trace.has("scheduled"):
        return None
    first, last, output = (trace.column(name) for name in ("first_token", "last_token", "output_tokens"))
    there = (output > 1) & (last > first) & ~np.isnan(trace.column("scheduled"))
    if not there.any():
        return None
    stamps = np.sort(np.concatenate([first[there], last[there]]))
    iterations = (stamps[-1] - stamps[0]) / float(np.median((last - first)[there] / (output - 1)[there]))
    expected = stamps.size**2 / (2 * max(iterations, 1.0))
    return Shared(int(np.count_nonzero(np.diff(stamps) < RESOLUTION)), float(expected))


def smeared_stamps(evidence: Evidence) -> Iterator[Finding]:
    """Engine stamps that requests hardly share: they were taken elsewhere, or later.

    The schedule cannot be reconstructed from them, and what they measure has a delay of its own.
    """
    if not evidence.one_clock or evidence.trace.iterations is not None:
        return
    shared = shared_stamps(evidence.trace)
    if shared is not None and shared.smeared:
        yield evidence.found(
            "smeared_stamps",
            "warning",
            f"{shared.pairs} pairs of first and last tokens carry the same stamp, about {shared.expected:.0f} should: "
            "the stamps are not the engine's, once an iteration, or they are of several clocks; record the engine's",
            values={"pairs": shared.pairs, "expected": shared.expected},
        )


def coarse_stamps(evidence: Evidence) -> Iterator[Finding]:
    """Stamps rounded to a grid that is coarse against the latencies.

    Differences of stamps are then multiples of the grid. The error of a duration is up to one grid unit, so a grid of a
    tenth of the median TTFT, or of TPOT times the median output, shows in every percentile.
    """
    durations = {"TTFT": evidence.first - evidence.trace.start, "decode time": evidence.last - evidence.first}
    columns = {"arrivals": evidence.arrival, "first tokens": evidence.first, "last tokens": evidence.last}
    for name, column in columns.items():
        stamps = column[~np.isnan(column)]
        if np.unique(stamps).size < FEWEST_STAMPS:
            continue
        parts = (stamps - stamps[0])[:, None] / np.array(GRIDS)
        # A float of 1.8e9 s resolves 0.24 us.
        on = np.abs(parts - np.round(parts)) * np.array(GRIDS) < RESOLUTION
        coarse = [grid for grid, share in zip(GRIDS, on.mean(axis=0), strict=True) if share >= ON_GRID]
        if not coarse:
            continue
        grid = coarse[0]
        for label, seconds in durations.items():
            some = seconds[evidence.ok & (seconds > 0)]
            whole = float(np.median(some)) if some.size else np.nan
            if grid >= COARSE * whole:
                yield evidence.found(
                    "coarse_stamps",
                    "warning",
                    f"{name} are stamped to {grid:g} s, the median {label} is {whole:.3f} s: rounding makes up much of "
                    "every latency; record with finer stamps",
                    values={"resolution": grid, "median": whole},
                )
                break
