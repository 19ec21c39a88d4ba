"""Robust bounded least squares on spans of iterations whose time was measured.

``features @ coefficients = seconds``, each equation weighted by the root of its span, Huber's loss against single wrong
equations, a pull towards the base profile whose strength cross-validation over blocks of time chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import lsq_linear

from calibrate.space import CoefficientSpace, Equations

Floats = npt.NDArray[np.floating[Any]]

STRENGTHS = (100.0, 30.0, 10.0, 3.0, 1.0, 0.1, 0.01, 1e-3)
"""Weights of the prior that cross-validation chooses from; 1 takes its spread and the noise at their word."""
SYSTEMATIC = 1.5
"""Neighbouring residuals that go together by this factor are the model's error and no noise."""
AS_GOOD = 1.1
"""The strongest prior is taken whose cross-validated error is within this factor of the best."""
FOLDS = 5
HUBER = 1.5
"""Residuals beyond this many times the noise count by their size and no longer by its square."""


def scatter(residuals: Floats) -> float:
    """Standard deviation of most of the residuals, single large ones left aside: 1.4826 times the median size."""
    return 1.4826 * float(np.median(np.abs(residuals)))


def robust(residuals: Floats) -> Floats:
    """Square roots of Huber's weights of residuals in units of their noise."""
    weights: Floats = np.sqrt(np.minimum(1.0, HUBER / np.maximum(np.abs(residuals), 1e-12)))
    return weights


def going_together(residuals: Floats) -> float:
    """Variance of the sums over blocks of sqrt(n) neighbours, over what independent ones would have; at least 1."""
    edges = np.arange(0, len(residuals), max(2, round(len(residuals) ** 0.5)))
    blocks = np.add.reduceat(residuals, edges)
    return max(1.0, float((blocks**2).sum() / max(float((residuals**2).sum()), 1e-30)))


def bounded(matrix: Floats, target: Floats, least: Floats) -> Floats:
    """Least squares of ``matrix @ x = target``, no x below ``least``; shapes (n, k), (n,), (k,)."""
    # The triangle of a QR decomposition has the same least squares in as many rows as there are coefficients.
    triangle: Floats = np.asarray(np.linalg.qr(np.column_stack([matrix, target]), mode="r"))
    found: Floats = lsq_linear(triangle[:, :-1], triangle[:, -1], bounds=(least, np.inf)).x
    return found


def solve(space: CoefficientSpace, equations: Equations, strength: float) -> tuple[Floats, Floats, float]:
    """Robust bounded least squares; return coefficients, weights of the equations, and the noise at weight 1.

    The noise of a span grows with the root of its length (independent iterations).
    """
    base = equations.weights
    values = space.prior.copy()
    weights, noise = base, 1.0
    for _ in range(15):
        residual = (equations.features @ values - equations.seconds) * base
        noise = max(scatter(residual), 1e-9)
        weights = base * robust(residual / noise)
        matrix = np.vstack(
            [
                equations.features * space.spread * (weights / noise)[:, None],
                np.sqrt(strength) * np.eye(len(space.names)),
            ]
        )
        target = np.concatenate([equations.seconds * weights / noise, np.sqrt(strength) * space.prior / space.spread])
        found = bounded(matrix, target, space.least / space.spread) * space.spread
        close = np.max(np.abs(found - values) / space.spread) < 1e-4
        values = found
        if close:
            break
    return values, weights, noise


def best_strength(space: CoefficientSpace, equations: Equations) -> float:
    """The prior's weight under which blocks of time predict each other best; only training equations are seen."""
    # A linear model's prior holds no physics to fall back on.
    strengths = [one for one in STRENGTHS if one <= 1 or not space.linear]
    folds = np.array_split(np.arange(len(equations)), FOLDS)
    scores = []
    for strength in strengths:
        errors = []
        for fold in folds:
            others = np.setdiff1d(np.arange(len(equations)), fold)
            values, _, _ = solve(space, equations.rows(others), strength)
            left_out = equations.rows(fold)
            errors.append(np.abs(left_out.features @ values / left_out.seconds - 1))
        scores.append(float(np.concatenate(errors).mean()))
    # The strongest prior that is not clearly worse: what the data do not need stays at physics.
    best = min(scores)
    return next(strength for strength, score in zip(strengths, scores, strict=True) if score <= AS_GOOD * best)


def systematic(space: CoefficientSpace, equations: Equations) -> float:
    """By how much the residuals of neighbouring spans go together (``going_together``)."""
    values, weights, _ = solve(space, equations, 1.0)
    return going_together((equations.features @ values - equations.seconds) * weights)


def deviations(groups: Sequence[tuple[Floats, Floats]], bread: Floats, least: Floats) -> Floats:
    """Standard deviations that hold also where noise grows with a span, or neighbours share theirs.

    The largest of three: what equal and independent noise gives (``least``, a covariance); each equation's own (White);
    neighbours' together, in blocks of sqrt(n) (cluster-robust).

    Parameters
    ----------
    groups : sequence of (array (n, coefficients), array (n,))
        Rows and residuals in units of their noise, group by group in order of time.
    bread, least : array (coefficients, coefficients)
        Inverse of the loss's second derivative, and the covariance under independent noise.
    """
    found = [np.diag(least)]
    for block in (False, True):
        meat: Floats = np.zeros_like(bread)
        for rows, residuals in groups:
            width = max(2, round(len(residuals) ** 0.5)) if block else 1
            edges = np.arange(0, len(residuals), width)
            pushes = np.add.reduceat(rows * residuals[:, None], edges, axis=0)
            meat = meat + len(edges) / max(len(edges) - 1, 1) * pushes.T @ pushes
        found.append(np.diag(bread @ meat @ bread))
    largest: Floats = np.sqrt(np.max(found, axis=0))
    return largest
