"""How many iterations an engine made by each instant, told by all requests together.

A request that decodes gets one token an iteration, so ``output_tokens - 1`` iterations lie between its first and last
token. All requests see the same engine: one rising function S(t) has ``S(last) - S(first) = output_tokens - 1`` for
each of them. It is fitted as a piecewise linear function, robustly, from coarse to fine, so that a minority whose
lengths are wrong does not bend it; those then stand out by their ratio, whatever the load did.

Robust steps: iteratively re-weighted least squares, first for quantiles of the residuals (Koenker and Bassett 1978;
several, since the wrong ones mostly lie on one side), then with Tukey's biweight. Of several starts the one with
the smallest median deviation is taken (as of an S-estimator, Rousseeuw and Yohai 1984).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.sparse.linalg import spsolve

from replay.trace import Floats

STARTS = ((0.5, 20), (0.25, 32), (0.75, 32), (0.25, 20), (0.75, 20))
"""Quantiles of first fits, and the pieces of S(t) that they have: with fewer, S(t) is not followed closely enough to
see lengths that are 10 % off (found on the public engine traces)."""
FINEST = 128
REQUESTS_PER_PIECE = 3
ROUNDS, REFINING = 12, 4
LEAST = 1e-3
"""Relative residual below which weights no longer rise."""
TIGHT = 0.002
BIWEIGHT = 5.0
"""Deviations beyond which a request no longer counts."""
SMOOTH = 1e-4
GOOD, FEW = 0.01, 0.02
"""Deviation, and share of requests that depart by more than three of those, that need no further start."""


def departures(first: Floats, last: Floats, steps: Floats) -> tuple[Floats, float]:
    """Measured iterations over stated ones, less 1, for each request, and their robust deviation.

    Parameters
    ----------
    first, last : array, shape (n,)
        Seconds; ``last > first``.
    steps : array, shape (n,)
        ``output_tokens - 1``, above 0.

    Returns
    -------
    departures : array, shape (n,)
        Below 0: fewer iterations passed than tokens are stated. -0.09: lengths are 1.1 times too long.
    deviation : float
        1.4826 times the median of their absolute values: what is usual.
    """
    best: tuple[Floats, float] | None = None
    for quantile, pieces in STARTS:
        ratio = _fitted(first, last, steps, quantile, pieces)
        deviation = 1.4826 * float(np.median(np.abs(ratio)))
        if best is None or deviation < best[1]:
            best = ratio, deviation
        if best[1] < GOOD and np.mean(np.abs(best[0]) > 3 * GOOD) < FEW:
            break
    assert best is not None
    return best


def _fitted(first: Floats, last: Floats, steps: Floats, quantile: float, pieces: int) -> Floats:
    most = max(steps.size // REQUESTS_PER_PIECE, 4)
    ratio: Floats = np.zeros(0)
    while True:
        level = _Level(first, last, steps, min(pieces, most))
        if not ratio.size:
            ratio = level.solve(np.ones(steps.size))
            for _ in range(ROUNDS):
                tilt = np.where(ratio > 0, 1 - quantile, quantile)
                ratio = level.solve(tilt / np.maximum(np.abs(ratio), LEAST))
        for _ in range(REFINING):
            scale = BIWEIGHT * max(1.4826 * float(np.median(np.abs(ratio))), TIGHT)
            ratio = level.solve(np.maximum(1 - (ratio / scale) ** 2, 0.01) ** 2)
        if pieces >= min(most, FINEST):
            return ratio
        pieces *= 2


class _Level:
    """S(t) with a number of pieces, knots at quantiles of the stamps."""

    def __init__(self, first: Floats, last: Floats, steps: Floats, pieces: int) -> None:
        knots = np.unique(np.quantile(np.concatenate([first, last]), np.linspace(0, 1, pieces + 1)))
        # S counts from the first knot.
        between = (_between(knots, last) - _between(knots, first))[:, 1:]
        self.matrix = (sparse.diags(1 / steps) @ between).tocsc()
        widths = np.diff(knots)
        slopes = sparse.diags([-1 / widths, 1 / widths], [0, 1], shape=(widths.size, knots.size)).tocsr()
        bends = (slopes[1:] - slopes[:-1])[:, 1:]
        rate = float(np.median(steps / (last - first)))
        # Hardly any smoothing: it only ties pieces that no request tells apart.
        self.penalty = SMOOTH * steps.size / widths.size / rate**2 * (bends.T @ bends)
        self.penalty += 1e-12 * sparse.identity(knots.size - 1)

    def solve(self, weights: Floats) -> Floats:
        normal = self.matrix.T @ sparse.diags(weights) @ self.matrix + float(np.median(weights)) * self.penalty
        counted: npt.NDArray[np.float64] = self.matrix @ spsolve(normal.tocsc(), self.matrix.T @ weights)
        return counted - 1


def _between(knots: Floats, times: Floats) -> sparse.csr_matrix:
    """Rows of linear interpolation between knots."""
    place = np.clip(np.searchsorted(knots, times, side="right") - 1, 0, knots.size - 2)
    share = np.clip((times - knots[place]) / (knots[place + 1] - knots[place]), 0, 1)
    rows = np.arange(times.size)
    values = np.concatenate([1 - share, share]), (np.concatenate([rows, rows]), np.concatenate([place, place + 1]))
    return sparse.csr_matrix(values, shape=(times.size, knots.size))
