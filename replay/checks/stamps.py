"""What the stamps themselves are worth: their resolution, and whether they are the engine's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from replay.checks.evidence import RESOLUTION, Evidence, grid_of
from replay.checks.finding import Finding
from replay.trace import Trace

COARSE = 0.1
"""Resolution as a share of a short TTFT (10th percentile), from which rounding shows in percentiles."""
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

    Tokens of one iteration carry one stamp, so n stamps fall on N (1 - exp(-n / N)) of N iterations by chance; the
    others stand twice.
    """
    if not trace.has("scheduled"):
        return None
    first, last, output = (trace.column(name) for name in ("first_token", "last_token", "output_tokens"))
    there = (output > 1) & (last > first) & ~np.isnan(trace.column("scheduled"))
    if not there.any():
        return None
    stamps = np.sort(np.concatenate([first[there], last[there]]))
    iterations = (stamps[-1] - stamps[0]) / float(np.median((last - first)[there] / (output - 1)[there]))
    # Data-parallel engines stamp their own iterations.
    engines = ((trace.meta.get("engine") or {}).get("arguments") or {}).get("data_parallel_size")
    iterations = max(iterations, 1.0) * (engines if isinstance(engines, int) and engines > 0 else 1)
    expected = stamps.size + iterations * np.expm1(-stamps.size / iterations)
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
    """Stamps rounded to a grid that is coarse against what they measure.

    A duration is off by up to one unit of the grid. From a tenth of the shorter TTFTs on that shows in their
    percentiles; from an iteration's length on, stamps no longer tell iterations, and gaps between tokens are
    nothing.
    """
    if evidence.trace.batches is not None:
        return
    grid = max(evidence.resolution, grid_of(evidence.arrival))
    ttft = (evidence.first - evidence.trace.start)[evidence.ok]
    ttft = ttft[ttft > 0]
    if not ttft.size:
        return
    short = float(np.quantile(ttft, 0.1))
    if grid >= COARSE * short or grid >= evidence.step:
        yield evidence.found(
            "coarse_stamps",
            "warning",
            f"times are stamped to {grid:g} s; a tenth of the TTFTs are below {short:.3f} s, a token takes about "
            f"{evidence.step:.3f} s: rounding makes up much of them; record with finer stamps",
            values={"resolution": grid, "ttft_p10": short, "token": evidence.step},
        )
