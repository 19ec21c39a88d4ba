"""What to measure next: the run that cuts the uncertainty of predictions most for the time it takes.

Each recipe (``calibrate.recipes``) is simulated with the fitted coefficients, in several sizes. Its iterations, with
the noise that the fit found, are rows of an expected information matrix; added to what the fit knows they give the
intervals to expect, before anything is measured (Bayesian optimal design, Chaloner and Verdinelli 1995). Runs are
ranked by the prediction variance that they take away: the relative variance of an iteration's time, averaged over the
iterations of all recipes (I-optimality), so that coefficients count by what they do to predictions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from calibrate.evidence import Evidence, SpanNoise
from calibrate.fit import ProfileFit
from calibrate.least_squares import going_together
from calibrate.recipes import FEWEST, Recipe, recipes
from calibrate.simulated import Priced
from profiles.deployment import Deployment
from profiles.errors import InputError
from replay.trace import Trace
from simulator.engine import NS, Iteration, Simulation
from simulator.engine_config import EngineConfig
from simulator.errors import SimulationError

Floats = npt.NDArray[np.floating[Any]]

SETUP = 60.0
"""Seconds that a run takes beside its own: server and client have to be started."""
SIZES = (1.0, 0.5, 0.25, 0.125)
"""Of a recipe's most requests."""
TOLD = 0.5
"""A run tells a coefficient if its interval shrinks to this share or less."""
WORTH = 0.9
"""A run is worth it if predictions are uncertain by this share of before or less."""
SIMULATIONS = 45
"""About as many as all recipes in all sizes take, for a progress bar."""


@dataclass(frozen=True)
class Proposal:
    """A run, and what it would tell.

    Attributes
    ----------
    recipe : Recipe
    seconds : float
        That the run takes, simulated.
    spread : float
        Relative standard deviation to expect of an iteration's predicted time, over all recipes' iterations.
    half_widths : dict of str to (float, float)
        Of each coefficient's 95 % interval: now, and after the run.
    told : tuple of str
        Coefficients whose interval it at least halves, the most narrowed first.
    """

    recipe: Recipe
    seconds: float
    spread: float
    half_widths: dict[str, tuple[float, float]]
    told: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Runs that are worth it, the best first; ``spread`` is the predictions' uncertainty without any."""

    spread: float
    proposals: list[Proposal]
    values: dict[str, float]

    @property
    def sentence(self) -> str:
        """What to do, in words."""
        if not self.proposals:
            return (
                "no run of the kinds tried would tell much that these runs do not: what is still uncertain is told by "
                "longer runs, or is the model's own error"
            )
        best = self.proposals[0]
        told = ", ".join(self._known(name, best.half_widths[name]) for name in best.told[:3])
        said = f"Send {best.recipe} (about {best.seconds:.0f} s): "
        if told:
            said += f"{told}; "
        return said + f"predicted iterations from +-{_percent(self.spread)} to +-{_percent(best.spread)}"

    def as_dict(self, model: str | None) -> dict[str, Any]:
        """The plan for JSON, with the command lines for that model."""
        runs = [
            {
                "recipe": str(one.recipe),
                "requests": one.recipe.requests,
                "seconds": one.seconds,
                "prediction_error": one.spread,
                "tells": list(one.told),
                "half_widths": {name: list(pair) for name, pair in one.half_widths.items()},
                "command": one.recipe.command(model or "MODEL"),
            }
            for one in self.proposals
        ]
        return {"sentence": self.sentence, "prediction_error": self.spread, "runs": runs}

    def _known(self, name: str, widths: tuple[float, float]) -> str:
        value = self.values[name]
        if value > widths[1]:
            return f"{name} becomes known to +-{_percent(widths[1] / value)} (now +-{_percent(widths[0] / value)})"
        return f"{name} becomes known to +-{widths[1]:.2g} (now +-{widths[0]:.2g})"


def plan(
    fit: ProfileFit,
    trace: Trace,
    deployment: Deployment,
    progress: Callable[[int], None] | None = None,
) -> Plan:
    """Rank runs by what they add to a fit for the time they take.

    The covariance to start from is scaled to the intervals that the fit reports. A recipe's score is the logarithm by
    which it lowers the predictions' standard deviation, over its seconds and ``SETUP``.

    Parameters
    ----------
    fit : ProfileFit
        Fitted.
    trace : Trace
        If its iterations were recorded, so will those of the new run; else clients will see the time of every token.
    deployment : Deployment
        The engine that would serve it, with the base profile that the fit started from.
    progress : callable, optional
        Called with the number of simulations that are done.

    Raises
    ------
    InputError
        If nothing was fitted, or no noise of iterations is known since the schedule of no run was.
    """
    evidence = fit.evidence_
    if evidence is None or evidence.noise is None:
        raise InputError(
            "no schedule of these runs is known, so neither is the noise of an iteration; record iterations, or a run "
            "without preemptions",
            field="--plan",
        )
    return _Planner(evidence, evidence.noise, trace.iterations is not None, deployment.config, progress).plan()


@dataclass(frozen=True)
class _Expected:
    """A simulated recipe: seconds, what a refit will take for information, how its pushes will vary, in units of prior
    spread, and relative features of its iterations."""

    recipe: Recipe
    seconds: float
    information: Floats
    pushes: Floats
    relative: Floats


class _Planner:
    def __init__(
        self,
        evidence: Evidence,
        noise: SpanNoise,
        recorded: bool,
        config: EngineConfig,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.evidence, self.noise, self.recorded = evidence, noise, recorded
        self.config, self.progress, self.simulated = config, progress, 0
        # Neighbouring spans err together: those of a new run will too, by as much as the prior's weight leaves over.
        together = max(1.0, going_together(evidence.groups[0].residuals) / evidence.temper)
        self.inflation = float(np.sqrt(evidence.temper * together))
        deviation = evidence.deviation / evidence.space.spread
        scale = deviation / np.sqrt(np.diag(evidence.covariance))
        self.precision = np.linalg.inv(evidence.covariance * np.outer(scale, scale))

    def plan(self) -> Plan:
        largest = [self.expected(one) for one in recipes(self.config, self.capacity)]
        every = [one for one in largest if one is not None]
        parts = [one.relative.T @ one.relative / len(one.relative) for one in every]
        weight = np.mean(parts, axis=0) if parts else np.zeros_like(self.precision)
        now = self._spread(weight, np.linalg.inv(self.precision))
        best = [max(self._sizes(one), key=lambda some: self._score(some, weight, now)) for one in every]
        ranked = sorted(best, key=lambda one: -self._score(one, weight, now))
        proposals = [self._proposal(one, weight) for one in ranked]
        names = self.evidence.space.names
        return Plan(
            now,
            [one for one in proposals if one.spread <= WORTH * now],
            dict(zip(names, self.evidence.values.tolist(), strict=True)),
        )

    def _sizes(self, largest: _Expected) -> list[_Expected]:
        recipe = largest.recipe
        counts = {max(round(share * recipe.requests), 2 * (recipe.concurrency or 0), FEWEST) for share in SIZES}
        smaller = [self.expected(replace(recipe, requests=one)) for one in counts if one < recipe.requests]
        return [largest, *(one for one in smaller if one is not None)]

    def _score(self, expected: _Expected, weight: Floats, now: float) -> float:
        after = self._spread(weight, self._after(expected))
        return float(np.log(now / after) / (expected.seconds + SETUP))

    def _after(self, expected: _Expected) -> Floats:
        """Covariance to expect: a refit weights spans as if their noise were that of independent iterations."""
        bread = np.linalg.inv(self.precision + expected.information)
        return np.asarray(bread @ (self.precision + expected.pushes) @ bread)

    def _proposal(self, expected: _Expected, weight: Floats) -> Proposal:
        space, after = self.evidence.space, self._after(expected)
        widths = [1.96 * np.sqrt(np.diag(one)) * space.spread for one in (np.linalg.inv(self.precision), after)]
        shares = widths[1] / widths[0]
        told = tuple(space.names[place] for place in np.argsort(shares) if shares[place] <= TOLD)
        halves = {name: (float(widths[0][place]), float(widths[1][place])) for place, name in enumerate(space.names)}
        return Proposal(expected.recipe, expected.seconds, self._spread(weight, after), halves, told)

    @staticmethod
    def _spread(weight: Floats, covariance: Floats) -> float:
        return float(np.sqrt((weight * covariance).sum()))

    def capacity(self, recipe: Recipe) -> float:
        """Requests/s that the engine serves of a recipe."""
        model = Priced(self.evidence.space.features, self.evidence.values)
        simulation = recipe.simulate(model, self.config, lambda _: None)
        return recipe.requests / max(simulation.end / NS, 1e-9)

    def expected(self, recipe: Recipe) -> _Expected | None:
        """Simulate; None where the engine cannot serve it, or only with preemptions, whose stamps tell less."""
        self.simulated += 1
        if self.progress is not None:
            self.progress(self.simulated)
        model = Priced(self.evidence.space.features, self.evidence.values)
        ends: list[int] = []
        features: list[Floats] = []

        def observe(iteration: Iteration) -> None:
            ends.append(iteration.start + iteration.duration)
            features.append(model.last)

        try:
            simulation = recipe.simulate(model, self.config, observe)
        except SimulationError:
            return None
        if any(one.num_preemptions or one.last_token is None for one in simulation.served):
            return None
        rows = np.array(features)
        spans = self._spans(rows, np.array(ends), simulation)
        values, spread = self.evidence.values, self.evidence.space.spread
        seconds = spans @ values
        assumed, likely = self.noise.assumed(seconds), self.noise.seconds(seconds)
        scaled = spans * spread / (self.inflation * assumed)[:, None]
        pushes = scaled * np.maximum(likely / assumed, 1.0)[:, None]
        relative = rows * spread / np.maximum(rows @ values, 1e-6)[:, None]
        return _Expected(recipe, simulation.end / NS, scaled.T @ scaled, pushes.T @ pushes, relative)

    def _spans(self, features: Floats, ends: npt.NDArray[np.signedinteger[Any]], simulation: Simulation) -> Floats:
        """Features of the spans whose time will be measured, shape (spans, coefficients)."""
        if self.recorded:
            return features
        # Clients see iterations in which some request decodes: the time since the end of the one before.
        first, last = (
            np.sort([getattr(one, name) for one in simulation.served]) for name in ("first_token", "last_token")
        )
        decoding = np.searchsorted(first, ends, side="right") > np.searchsorted(last, ends, side="right")
        return np.asarray(features[1:][decoding[:-1]])


def _percent(share: float) -> str:
    figure = 100 * share
    return "over 1000 %" if figure > 1000 else f"{figure:.2g} %" if figure < 99.5 else f"{figure:.0f} %"
