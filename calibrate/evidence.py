"""What measured runs say of the coefficients at the solution of a fit: its loss, linearised, and what follows from it.

The rows of spans and of simulated latencies are kept with their place in time, for ``calibrate.bootstrap``; their sum,
the information, for ``calibrate.plan``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from calibrate.gauss_newton import Fitted
from calibrate.least_squares import deviations, going_together, robust, scatter
from calibrate.space import SHORTEST, CoefficientSpace, Equations, FittedCoefficient

Floats = npt.NDArray[np.floating[Any]]
Rows = npt.NDArray[np.bool_]

CORRELATED = 0.9
IDENTIFIED = 0.5
"""A coefficient counts as identified if the data cut its prior standard deviation to this share or less."""


@dataclass(frozen=True)
class Group:
    """Rows of the linearised loss, in units of prior spread and of noise.

    Parameters
    ----------
    rows : array (n, coefficients)
        Derivatives of the residuals.
    residuals : array (n,)
        At the solution, robust weights applied.
    slopes : array of bool (n,)
        Rows within Huber's bend. The others pull with constant force: they tell nothing of the slope.
    place : array (n,)
        Number of the run, plus the share of it that was over: by spans, or by arrivals of requests.
    """

    rows: Floats
    residuals: Floats
    slopes: Rows
    place: Floats

    @property
    def information(self) -> Floats:
        """Second derivative of the loss, shape (coefficients, coefficients)."""
        inside = self.rows[self.slopes]
        return np.asarray(inside.T @ inside)


@dataclass(frozen=True)
class SpanNoise:
    """Standard deviation of a span's measured time.

    The fit's weights assume that of independent iterations: ``size`` (seconds per root of a second) times the root of
    the seconds. Residuals may say otherwise: ``typical[1] * (seconds / typical[0]) ** growth``, with a growth of 1
    where all iterations of a span err together.
    """

    size: float
    typical: tuple[float, float]
    growth: float

    @classmethod
    def of(cls, off: Floats, equations: Equations) -> SpanNoise:
        """Learn it from residuals, in seconds, of equations."""
        size = max(scatter(off * equations.weights), 1e-9)
        seconds, errors = np.log(equations.seconds), np.abs(off)
        varied = seconds - seconds.mean()
        floor = max(1e-3 * float(np.median(errors)), 1e-12)
        slope = float(varied @ np.log(np.maximum(errors, floor))) / max(float(varied @ varied), 1e-9)
        growth = float(np.clip(slope, 0.0, 1.0))
        # The middle of what is left when growth is taken off.
        middle = float(np.exp(seconds.mean()))
        return cls(size, (middle, scatter(errors * (middle / equations.seconds) ** growth)), growth)

    def assumed(self, spans: Floats) -> Floats:
        """Deviation, in seconds, of spans of that many seconds, as the fit weights them."""
        return np.asarray(self.size * np.sqrt(np.maximum(spans, SHORTEST)))

    def seconds(self, spans: Floats) -> Floats:
        """Deviation, in seconds, of spans of that many seconds, as residuals have it."""
        return np.asarray(self.typical[1] * (np.maximum(spans, 1e-6) / self.typical[0]) ** self.growth)


class Evidence:
    """How well equations and simulated latencies tell the coefficients.

    Parameters
    ----------
    space : CoefficientSpace
    equations : Equations
        Spans of iterations; may be none.
    values : array (coefficients,)
        The solution.
    strength : float
        Weight of the prior.
    latencies : Fitted, optional
        Where latencies were simulated.
    place : array (equations,)
        Of each equation, as in ``Group``.
    """

    def __init__(
        self,
        space: CoefficientSpace,
        equations: Equations,
        values: Floats,
        strength: float,
        latencies: Fitted | None,
        place: Floats,
    ) -> None:
        self.space, self.values = space, values
        self.weight = min(strength, 1.0)
        self.temper = max(strength, 1.0)
        """A prior that weighs more than 1 is data that weigh less: its own spread stays what it is."""
        off = equations.features @ values - equations.seconds
        self.noise = SpanNoise.of(off, equations) if len(equations) else None
        self.groups = [self._of_equations(equations, off, self.noise.size, place)] if self.noise else []
        bread = self._precision([1.0] * len(self.groups))
        honest = bread
        if latencies is not None:
            rows = latencies.rows * space.spread
            every = np.ones(len(rows), dtype=bool)
            self.groups.append(Group(rows, latencies.residuals, every, latencies.place))
            ones = [1.0] * len(self.groups)
            bread = self._precision(ones)
            # Latencies of one run err together: they are fewer than they look.
            honest = self._precision([*ones[:-1], 1 / going_together(latencies.residuals)])
        self.covariance = np.linalg.inv(honest)
        pushes = [(group.rows, group.residuals) for group in self.groups]
        self.deviation = deviations(pushes, np.linalg.inv(bread), self.covariance) * space.spread

    def _precision(self, weights: Sequence[float]) -> Floats:
        found: Floats = self.weight * np.eye(len(self.space.names))
        for group, weight in zip(self.groups, weights, strict=True):
            found = found + weight * group.information
        return found

    def _of_equations(self, equations: Equations, off: Floats, noise: float, place: Floats) -> Group:
        base = equations.weights
        weights = robust(off * base / noise)
        scale = base * weights / (noise * np.sqrt(self.temper))
        return Group(equations.features * self.space.spread * scale[:, None], off * scale, weights >= 1, place)

    def coefficients(self) -> list[FittedCoefficient]:
        """Values with their intervals."""
        space, bound = self.space, 1.96 * self.deviation
        before = space.spread / np.sqrt(self.weight)
        after = np.sqrt(np.diag(self.covariance)) * space.spread
        return [
            FittedCoefficient(
                name,
                float(value),
                (float(max(space.least[place], value - bound[place])), float(value + bound[place])),
                float(space.prior[place]),
                bool(after[place] <= IDENTIFIED * before[place]),
            )
            for place, (name, value) in enumerate(zip(space.names, self.values, strict=True))
        ]

    def singular_values(self) -> list[float]:
        """Of the rows in units of prior spread and noise."""
        rows = np.vstack([group.rows[group.slopes] for group in self.groups])
        return [float(one) for one in np.linalg.svd(rows, compute_uv=False)]

    def correlated(self) -> list[tuple[str, str, float]]:
        """Pairs of coefficients that can hardly be told apart, and their correlation."""
        scale = np.sqrt(np.diag(self.covariance))
        correlation = self.covariance / np.outer(scale, scale)
        names = self.space.names
        return [
            (names[left], names[right], float(correlation[left, right]))
            for left in range(len(names))
            for right in range(left)
            if abs(correlation[left, right]) > CORRELATED
        ]
