"""Fitting coefficients to simulated latencies: damped Gauss-Newton steps, each accepted on a fresh simulation.

The loss is Huber's, over the latencies that were measured (``calibrate.simulated``) and the spans of iterations that
are linear in the coefficients (``calibrate.space.Equations``), each in units of its own noise, with a pull towards the
base profile. A step solves the linearised problem inside the bounds; it counts only if the simulated loss falls, for
the schedule may change with the coefficients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from calibrate.least_squares import HUBER, bounded, going_together, robust, scatter
from calibrate.simulated import LATENCIES, Residuals, Simulated

Floats = npt.NDArray[np.floating[Any]]

LEAST_NOISE = (0.005, 0.001, 0.001)
"""Of TTFT, end-to-end and decode time as shares: an engine's stamps hold no more."""
SCALES = (0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0, 8.0)


@dataclass(frozen=True)
class Effort:
    """When to stop.

    The noise is estimated anew ``stages`` times; the loss is the same within each. A stage has at most ``steps``; one
    that lowers the loss by less than a share of ``small_gain`` is its last, as is one braked beyond ``most_damping``.
    """

    stages: int = 3
    steps: int = 10
    small_gain: float = 3e-3
    most_damping: float = 1e3


THOROUGH = Effort()
CLOSE = 0.1
"""Logarithm of a factor that a start need not be better than."""


@dataclass(frozen=True)
class Prior:
    """Where coefficients are expected, how far they may lie from it, and where they end; shape (coefficients,)."""

    mean: Floats
    spread: Floats
    least: Floats
    weight: float


@dataclass(frozen=True)
class LinearRows:
    """Rows ``matrix @ coefficients = target``, in units of their noise, and the weight that they have."""

    matrix: Floats
    target: Floats
    weight: float


@dataclass(frozen=True)
class Fitted:
    """Coefficients, and what the loss looks like there.

    ``rows`` (n, coefficients) and ``residuals`` (n,) are those of the latencies, robust weights applied, run by run in
    order of arrival; ``place`` (n,) is the place of the run among those given plus the share of it that had arrived;
    ``simulations`` were needed.
    """

    values: Floats
    rows: Floats
    residuals: Floats
    place: Floats
    simulations: int


def best_start(runs: Sequence[Simulated], likely: Sequence[Floats]) -> Floats:
    """Return which of several coefficients, and factors on them, brings latencies nearest by their logarithms."""

    def off(values: Floats) -> float:
        shares = [np.abs(np.log(np.maximum(1 + run.residuals(values).values, 1e-3))).mean() for run in runs]
        return float(np.mean(shares))

    return min((scale * values for values in likely for scale in SCALES), key=off)


def scaled_start(runs: Sequence[Simulated], likely: Floats, tries: int = 3) -> Floats:
    """Return the nearest of the factors on likely coefficients that their own simulations suggest, one after the other.

    Where each simulation is dear, this takes fewer than ``best_start``. A factor is the median of measured over
    predicted.
    """
    values, best, nearest = likely, likely, np.inf
    for _ in range(tries):
        logs = np.concatenate([np.log(np.maximum(1 + run.residuals(values).values, 1e-3)) for run in runs])
        off = float(np.abs(logs).mean())
        if off < nearest:
            best, nearest = values, off
        middle = float(np.median(logs))
        if abs(middle) < CLOSE:
            break
        values = values * np.exp(-np.clip(middle, -2.0, 2.0))
    return best


def refine(
    runs: Sequence[Simulated],
    start: Floats,
    prior: Prior,
    linear: LinearRows | None,
    progress: Callable[[int], None] | None = None,
    effort: Effort = THOROUGH,
) -> Fitted:
    """Lower the simulated loss from a start.

    Parameters
    ----------
    runs : sequence of Simulated
    start : array (coefficients,)
    prior : Prior
    linear : LinearRows, optional
        Spans of iterations, where some were measured.
    progress : callable, optional
        Called with the number of steps tried.
    effort : Effort

    Raises
    ------
    InputError
        If an engine cannot serve its requests.
    """
    values = np.maximum(start, prior.least)
    found = [run.residuals(values) for run in runs]
    tried = 0
    for _ in range(effort.stages):
        problem = _Problem(prior, linear, found)
        loss, damping = problem.loss(values, found), 0.01
        began = loss
        for _ in range(effort.steps):
            moved = problem.step(values, found, damping)
            simulated = [run.residuals(moved) for run in runs]
            tried += 1
            if progress is not None:
                progress(tried)
            reached = problem.loss(moved, simulated)
            if reached < loss:
                gain = loss - reached
                values, found, loss, damping = moved, simulated, reached, max(damping / 5, 1e-4)
                if gain < effort.small_gain * loss:
                    break
            else:
                damping *= 10
                if damping > effort.most_damping:
                    break
        if began - loss < effort.small_gain * began:
            break
    rows, residuals = problem.latency_rows(found)
    place = np.concatenate([number + one.shares for number, one in enumerate(found)])
    return Fitted(values, rows, residuals, place, sum(run.simulations for run in runs))


class _Problem:
    """The loss under one estimate of the noise, and its linearisation."""

    def __init__(self, prior: Prior, linear: LinearRows | None, found: Sequence[Residuals]) -> None:
        self.prior, self.linear = prior, linear
        self.noise = [_noise(one) for one in found]
        self.worth = [_worth(one, noise) for one, noise in zip(found, self.noise, strict=True)]

    def loss(self, values: Floats, found: Sequence[Residuals]) -> float:
        total = sum(
            _huber(one.values / noise[one.kinds], worth[one.kinds])
            for one, noise, worth in zip(found, self.noise, self.worth, strict=True)
        )
        if self.linear is not None:
            total += self.linear.weight * _huber(self.linear.matrix @ values - self.linear.target)
        pull = (values - self.prior.mean) / self.prior.spread
        return total + self.prior.weight * float(pull @ pull)

    def latency_rows(self, found: Sequence[Residuals]) -> tuple[Floats, Floats]:
        rows, residuals = [], []
        for one, noise, worth in zip(found, self.noise, self.worth, strict=True):
            off = one.values / noise[one.kinds]
            weight = robust(off) * np.sqrt(worth[one.kinds])
            rows.append(one.jacobian * (weight / noise[one.kinds])[:, None])
            residuals.append(off * weight)
        return np.concatenate(rows), np.concatenate(residuals)

    def step(self, values: Floats, found: Sequence[Residuals], damping: float) -> Floats:
        """Solve the linearised problem inside the bounds."""
        spread, mean = self.prior.spread, self.prior.mean
        rows, residuals = self.latency_rows(found)
        matrices, targets = [rows * spread], [-residuals]
        if self.linear is not None:
            off = self.linear.matrix @ values - self.linear.target
            weight = robust(off) * np.sqrt(self.linear.weight)
            matrices.append(self.linear.matrix * weight[:, None] * spread)
            targets.append(-off * weight)
        pull = np.sqrt(self.prior.weight)
        matrices.append(pull * np.eye(values.size))
        targets.append(pull * (mean - values) / spread)
        stacked = np.vstack(matrices)
        brake = np.sqrt(damping * (stacked**2).sum(axis=0))
        rows = np.vstack([stacked, np.diag(brake)])
        aim = np.concatenate([*targets, np.zeros(values.size)])
        moved = bounded(rows, aim, np.minimum((self.prior.least - values) / spread, 0.0) - 1e-9)
        stepped: Floats = np.maximum(values + moved * spread, self.prior.least)
        return stepped


def _noise(found: Residuals) -> Floats:
    """Deviation of each kind: what is known of it, else a robust one of the residuals."""
    if found.noise is not None:
        return found.noise
    noise = np.array(LEAST_NOISE)
    for kind in range(len(LATENCIES)):
        there = found.values[found.kinds == kind]
        if there.size:
            noise[kind] = max(noise[kind], scatter(there))
    return noise


def _worth(found: Residuals, noise: Floats) -> Floats:
    """How many independent ones each latency is worth: requests that share a queue err together."""
    if found.worth is not None:
        return found.worth
    worth = np.ones(len(LATENCIES))
    for kind in range(len(LATENCIES)):
        off = np.clip(found.values[found.kinds == kind] / noise[kind], -2 * HUBER, 2 * HUBER)
        if off.size:
            worth[kind] = 1 / going_together(off)
    return worth


def _huber(off: Floats, weight: Floats | float = 1.0) -> float:
    size = np.abs(off)
    return float((weight * np.where(size < HUBER, size * size, 2 * HUBER * size - HUBER**2)).sum())
