"""Fitting a profile's coefficients to what a run measured, with uncertainty.

An iteration's time is a sum of components, each times a coefficient that is not negative. Where the iterations are
recorded, or can be reconstructed from the stamps that requests share (``calibrate.reconstruction``), the measured
time between two iteration ends is a linear equation in the coefficients: bounded least squares, robust against single
wrong equations, pulled towards the base profile by as much as cross-validation inside the training part finds best.
What the data cannot tell so stays at physics. The fit is then checked end to end by simulation (``calibrate.holdout``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from calibrate.aggregates import AggregateRun, contradiction
from calibrate.client_schedule import is_client_side, reconstruct_client_side
from calibrate.front_end import Bounds, FittedFrontEnd, fit_front_end
from calibrate.gauss_newton import (
    HUBER,
    Effort,
    Fitted,
    LinearRows,
    Prior,
    best_start,
    going_together,
    refine,
    scaled_start,
)
from calibrate.least_squares import SYSTEMATIC, base_weights, best_strength, deviations, solve, systematic
from calibrate.reconstruction import NotRecoverable, Reconstruction, reconstruct, spans_of_recording
from calibrate.simulated import FrontEndTerm, Simulated, SimulatedRun
from calibrate.space import (
    FRONT_END,
    FRONT_END_UNIT,
    CoefficientSpace,
    Equations,
    FittedCoefficient,
    with_coefficients,
)
from profiles.deployment import Deployment
from profiles.errors import InputError
from profiles.profile import FrontEnd, Profile
from replay.load_level import holds_aggregates, level_of
from replay.run import replay
from replay.trace import Trace
from simulator.batch import Batch

Floats = npt.NDArray[np.floating[Any]]
Rows = npt.NDArray[np.bool_]
Run = tuple[Trace, Deployment, Rows | None]
Simulate = Callable[[CoefficientSpace], Simulated]

CORRELATED = 0.9
MOST_MISPLACED = 0.1
"""Share of first tokens elsewhere than their stamps say, up to which a reconstructed schedule is believed."""
SEARCH, POLISH = Effort(2, 8, 0.02, 100.0), Effort(1, 2, 0.02, 1.0)
"""For load levels: with one draw of each, then with all. A statistic's noise is no less than 1 %: more steps gain
nothing."""
IDENTIFIED = 0.5
"""A coefficient counts as identified if the data cut its prior standard deviation to this share or less."""


@dataclass
class ProfileFit:
    """Learns the coefficients of a deployment's components.

    Parameters
    ----------
    strength : float, optional
        Weight of the prior; chosen by cross-validation over blocks of time if absent.

    Attributes
    ----------
    coefficients_ : list of FittedCoefficient
    strength_ : float
    equations_ : int
        Spans of iterations that were fitted.
    iterations_ : int
        Iterations in them.
    misplaced_ : int
        Requests whose first token the reconstructed schedule puts elsewhere than its stamp.
    residual_ : float
        Median absolute relative error of a span's time.
    correlated_ : list of (str, str, float)
        Pairs of coefficients that the data cannot tell apart well.
    simulations_ : int
        Simulations that the fit took; 0 where the equations alone told the coefficients.
    sentences_ : list of str
        What was not identified, and what to record to change that.
    singular_values_ : list of float
        Of the equations in units of prior spread and noise: values below 1 are directions the data do not tell.
    front_end_ : FittedFrontEnd or None
        The way between client and engine, where runs were measured at the client and tell it.
    warnings_ : list of str
        What of the traces makes the fit less sure, or could not be used as it should, and what was done instead.
    domain_ : dict
        Range of sequences, tokens and contexts in the fitted iterations.
    spans_ : list of (list of Batch, float)
        What was fitted: the iterations between two measured ends, and the seconds between those.
    """

    strength: float | None = None
    simulates: ClassVar[bool] = True
    coefficients_: list[FittedCoefficient] = field(default_factory=list, init=False)
    strength_: float = field(default=np.nan, init=False)
    equations_: int = field(default=0, init=False)
    iterations_: int = field(default=0, init=False)
    misplaced_: int = field(default=0, init=False)
    simulations_: int = field(default=0, init=False)
    residual_: float = field(default=np.nan, init=False)
    correlated_: list[tuple[str, str, float]] = field(default_factory=list, init=False)
    sentences_: list[str] = field(default_factory=list, init=False)
    singular_values_: list[float] = field(default_factory=list, init=False)
    domain_: dict[str, Any] = field(default_factory=dict, init=False)
    spans_: list[tuple[list[Batch], float]] = field(default_factory=list, init=False, repr=False)
    front_end_: FittedFrontEnd | None = field(default=None, init=False)
    warnings_: list[str] = field(default_factory=list, init=False)
    _bounds: list[Bounds] = field(default_factory=list, init=False, repr=False)

    def fit(self, runs: Sequence[tuple[Trace, Deployment, Rows | None]]) -> ProfileFit:
        """Learn from one or more runs, which share their coefficients.

        Parameters
        ----------
        runs : sequence of (Trace, Deployment, array of bool or None)
            Each trace with the base deployment of its own shapes, and the rows whose stamps may be used (None: all).

        Raises
        ------
        InputError
            If a trace has neither recorded iterations nor the stamps to reconstruct them, or if what was measured
            contradicts itself.
        """
        client = any(trace.meta.get("vantage") == "client" for trace, _, _ in runs)
        space = CoefficientSpace(runs[0][1], client)
        parts, rough = [], []
        simulate: list[Simulate] = []
        batches: list[Batch] = []
        for run in runs:
            own = CoefficientSpace(run[1], client)
            if holds_aggregates(run[0]):
                self._take_aggregates(run[0])
                simulate.append(partial(_aggregated, run, own))
                continue
            try:
                spans = self._spans(*run)
            except NotRecoverable as error:
                if not self.simulates:
                    raise
                self.warnings_.append(f"{error}; fitted to simulated latencies instead")
                simulate.append(partial(_simulated, run, own))
                rough += [own.equations(error.spans)] if error.spans else []
                continue
            if _stamped_by_engine(*run):
                simulate.append(partial(_simulated, run, own))
            parts.append(own.equations(spans))
            batches += [batch for inside, _ in spans for batch in inside]
            self.spans_ += spans
        equations = _together(space, parts)
        complete = len(parts) == len(runs)
        preempted = any(np.nansum(trace.column("preemptions")) > 0 for trace, _, _ in runs)
        if complete and len(equations) < 2 * len(space.names):
            raise InputError(
                f"{len(equations)} spans of iterations cannot tell {len(space.names)} coefficients; record a longer run"
            )
        self.iterations_, self.equations_ = len(batches), len(equations)
        self.domain_ = _domain(batches) if batches else {}
        self._learn(space, equations, simulate, complete and not preempted, _together(space, rough))
        self.sentences_ += _what_was_seen(batches, self.coefficients_)
        if all(holds_aggregates(trace) for trace, _, _ in runs):
            self.sentences_ += _what_aggregates_tell(self.coefficients_)
        self._take_front_end(runs)
        if self._bounds:
            self._learn_front_end()
        return self

    @property
    def num_coefficients_(self) -> int:
        """Numbers that were learned."""
        return len(self.coefficients_)

    def deployment(self, base: Deployment) -> Deployment:
        """Return the deployment with what was learned in force."""
        learned = with_coefficients(base, self.coefficients_)
        if self.front_end_ is None:
            return learned
        way = FrontEnd(per_request=self.front_end_.per_request, per_prompt_token=self.front_end_.per_prompt_token)
        return replace(learned, front_end=way)

    def written(self, profile: Profile, stem: str) -> tuple[Profile, dict[str, bytes]]:
        """Return the profile with what was learned, and the files that lie beside it, by name; here there are none."""
        return profile, {}

    def _take_aggregates(self, trace: Trace) -> None:
        """Say what of a load level makes the fit less sure."""
        if not self.simulates:
            raise InputError(f"{trace.name} holds aggregates; trees take iterations: use --base roofline or linear")
        odd = contradiction(trace)
        self.warnings_ += [odd] if odd else []
        level = level_of(trace)
        if level is not None and not level.lengths_known:
            self.warnings_.append(
                f"{trace.name}: of the lengths only the means are known, so its percentiles take no part in the fit"
            )

    def _take_front_end(self, runs: Sequence[Run]) -> None:
        """Take the front end's constant out of the coefficients of iterations."""
        told = [one for one in self.coefficients_ if one.name == FRONT_END]
        self.coefficients_ = [one for one in self.coefficients_ if one.name != FRONT_END]
        if not told:
            return
        [one] = told
        token = runs[0][1].front_end.per_prompt_token
        low, high = (bound * FRONT_END_UNIT for bound in one.ci95)
        self.front_end_ = FittedFrontEnd(
            one.value * FRONT_END_UNIT,
            (low, high),
            token,
            (token, token),
            sum(len(trace) for trace, _, _ in runs if trace.meta.get("vantage") == "client"),
            identified=one.identified,
            from_latencies=True,
        )
        self.sentences_ += self.front_end_.sentences

    def _learn_front_end(self) -> None:
        self.front_end_ = fit_front_end(Bounds.of_all(self._bounds))
        if self.front_end_ is None:
            self.sentences_.append(
                "front end: not told, since nearly every request queued; record a run at a rate the server keeps "
                "up with"
            )
            return
        self.sentences_ += self.front_end_.sentences

    def _spans(self, trace: Trace, deployment: Deployment, known: Rows | None) -> list[tuple[list[Batch], float]]:
        if trace.iterations is not None and known is None:
            return spans_of_recording(trace)
        space = CoefficientSpace(deployment)

        def refined(found: Reconstruction) -> Any:
            return space.step_seconds(solve(space, space.equations(found.spans()), 0.01)[0])

        prior = space.step_seconds(space.prior)
        if is_client_side(trace):
            client = reconstruct_client_side(trace, deployment.config, prior, refined, known)
            self._bounds.append(client.bounds)
            self.warnings_ += client.warnings
            found = client.schedule
        else:
            found = reconstruct(trace, deployment.config, prior, refined, known)
        if found.misplaced > MOST_MISPLACED * len(trace):
            where = f"{found.misplaced} of {len(trace)} first tokens lie elsewhere"
            if replay(trace, deployment, cold_start=False).summary["preemptions"]:
                raise NotRecoverable(
                    f"{trace.name}: its stamps do not tell its schedule ({where}), as with preempted requests",
                    found.spans(),
                )
            raise InputError(
                f"{trace.name}: the schedule that its stamps tell is not the engine's by the arguments given: {where}; "
                "check the engine arguments (max_num_seqs, max_num_batched_tokens, num_gpu_blocks, async_scheduling)"
            )
        self.misplaced_ += found.misplaced
        return found.spans()

    def _learn(
        self,
        space: CoefficientSpace,
        equations: Equations,
        simulate: Sequence[Simulate],
        complete: bool,
        rough: Equations,
    ) -> None:
        """Equations first; then simulated latencies, where they tell more or are all there is (then from a rough idea).

        ``complete`` says that the schedule of every run is known.
        """
        there = np.asarray(equations.features.any(axis=0))
        if not complete:
            there |= np.any([_has_part(one(space), space) for one in simulate], axis=0)
        # What no batch has a part in (collectives on one device) is no coefficient of these runs.
        space = space.only(there)
        equations = Equations(equations.features[:, there], equations.seconds)
        rough = Equations(rough.features[:, there], rough.seconds)
        latencies = None
        if not len(equations):
            self.strength_ = 1.0 if self.strength is None else self.strength
            runs = [one(space) for one in simulate]
            _refuse_too_few(runs, space)
            prior = Prior(space.prior, space.spread, space.least, self.strength_)
            likely = [space.prior, solve(space, rough, self.strength_)[0]] if len(rough) else [space.prior]
            latencies = _refined_from(likely, runs, prior)
            evidence = _Evidence(space, equations, latencies.values, self.strength_, latencies)
        else:
            self.strength_ = self.strength if self.strength is not None else best_strength(space, equations)
            values = solve(space, equations, self.strength_)[0]
            # Where neighbouring spans err together, the model is wrong somewhere; the loss decides where it may be.
            if simulate and self.simulates and (not complete or systematic(space, equations) > SYSTEMATIC):
                latencies = self._refined(space, equations, values, simulate)
            evidence = _Evidence(
                space, equations, values if latencies is None else latencies.values, self.strength_, latencies
            )
            residual = np.abs(equations.features @ evidence.values / equations.seconds - 1)
            self.residual_ = float(np.median(residual))
        self.simulations_ = latencies.simulations if latencies is not None else 0
        self.coefficients_ = evidence.coefficients()
        self.singular_values_ = evidence.singular_values()
        self.correlated_ = evidence.correlated()
        self.sentences_ = [
            f"{left} and {right} can hardly be told apart (correlation {value:+.2f}): their sum is known better"
            for left, right, value in self.correlated_
        ]

    def _refined(
        self, space: CoefficientSpace, equations: Equations, start: Floats, simulate: Sequence[Simulate]
    ) -> Fitted | None:
        """Lower the error of simulated latencies from where the equations lead."""
        try:
            runs = [one(space) for one in simulate]
        except InputError:
            return None  # recorded iterations without requests' stamps
        base = base_weights(equations)
        off = (equations.features @ start - equations.seconds) * base
        noise = max(1.4826 * float(np.median(np.abs(off))), 1e-9)
        rows = LinearRows(
            equations.features * (base / noise)[:, None], equations.seconds * base / noise, 1 / max(self.strength_, 1.0)
        )
        prior = Prior(space.prior, space.spread, space.least, min(self.strength_, 1.0))
        return refine(runs, start, prior, rows)


def _together(space: CoefficientSpace, parts: Sequence[Equations]) -> Equations:
    return Equations(
        np.concatenate([np.empty((0, len(space.names))), *(part.features for part in parts)]),
        np.concatenate([np.empty(0), *(part.seconds for part in parts)]),
    )


def _stamped_by_engine(trace: Trace, deployment: Deployment, known: Rows | None) -> bool:
    """Whether latencies tell more than spans do: not where iterations were recorded, or seen by a client."""
    return not is_client_side(trace) and (trace.iterations is None or known is not None)


def _simulated(run: Run, own: CoefficientSpace, space: CoefficientSpace) -> SimulatedRun:
    """A run that can be simulated, with the features of its own shapes for the coefficients of a space."""
    trace, deployment, known = run
    features = own.only(space.chosen).features
    return SimulatedRun(trace, deployment.config, features, known, _front_end(trace, deployment, space))


def _aggregated(run: Run, own: CoefficientSpace, space: CoefficientSpace) -> AggregateRun:
    """The same of a load level."""
    trace, deployment, _ = run
    return AggregateRun(trace, deployment, own.only(space.chosen).features, _front_end(trace, deployment, space))


def _front_end(trace: Trace, deployment: Deployment, space: CoefficientSpace) -> FrontEndTerm | None:
    """The way to the engine that a run's latencies hold: a constant to be fitted, and what is known per token."""
    if trace.meta.get("vantage") != "client":
        return None
    known = deployment.front_end if space.front_end_place is None else FrontEnd()
    way = FrontEnd(per_request=known.per_request, per_prompt_token=deployment.front_end.per_prompt_token)
    return FrontEndTerm(space.front_end_place, way)


def _has_part(run: Simulated, space: CoefficientSpace) -> Rows:
    """Which coefficients any measurement of a run depends on."""
    if isinstance(run, AggregateRun):
        run.seeds = 1
    return np.asarray(run.residuals(space.prior).jacobian.any(axis=0))


def _refuse_too_few(runs: Sequence[Simulated], space: CoefficientSpace) -> None:
    """Latencies must tell the coefficients; of aggregates there are few, and a base's physics fills the gap."""
    told = sum(run.num_measured for run in runs)
    if any(isinstance(run, SimulatedRun) for run in runs):
        if told < 2 * len(space.names):
            raise InputError(f"{told} requests cannot tell {len(space.names)} coefficients; record a longer run")
    elif space.linear and told < len(space.names):
        raise InputError(
            f"{told} aggregates cannot tell {len(space.names)} coefficients of a base without physics; give more load "
            "levels, or start from --base roofline:<hardware>"
        )


def _refined_from(likely: Sequence[Floats], runs: Sequence[Simulated], prior: Prior) -> Fitted:
    """Search from nearby; load levels with one draw first, then with all of them."""
    levels = [run for run in runs if isinstance(run, AggregateRun)]
    if len(levels) < len(runs):
        alone = [run for run in runs if isinstance(run, SimulatedRun)]
        for run in alone:
            run.smooth = True
        near = refine(runs, best_start(runs, likely), prior, None).values
        for run in alone:
            run.smooth = False
        return refine(runs, near, prior, None)
    for level in levels:
        level.seeds = 1
    found = refine(runs, scaled_start(runs, likely[0]), prior, None, effort=SEARCH)
    if all(level.seeds == len(level.draws) for level in levels):
        return found
    for level in levels:
        level.seeds = len(level.draws)
    return refine(runs, found.values, prior, None, effort=POLISH)


class _Evidence:
    """How well equations and simulated latencies tell the coefficients."""

    def __init__(
        self,
        space: CoefficientSpace,
        equations: Equations,
        values: Floats,
        strength: float,
        latencies: Fitted | None,
    ) -> None:
        self.space, self.values = space, values
        self.weight = min(strength, 1.0)
        # A prior that weighs more than 1 is data that weigh less: its own spread stays what it is.
        self.groups = [_equation_rows(space, equations, values, max(strength, 1.0))] if len(equations) else []
        bread = self._precision([1.0] * len(self.groups))
        honest = bread
        if latencies is not None:
            self.groups.append((latencies.rows * space.spread, latencies.residuals, slice(None)))
            ones = [1.0] * len(self.groups)
            bread = self._precision(ones)
            # Latencies of one run err together: they are fewer than they look.
            honest = self._precision([*ones[:-1], 1 / going_together(latencies.residuals)])
        self.covariance = np.linalg.inv(honest)
        pushes = [(rows, residuals) for rows, residuals, _ in self.groups]
        self.deviation = deviations(pushes, np.linalg.inv(bread), self.covariance) * space.spread

    def _precision(self, weights: Sequence[float]) -> Floats:
        found: Floats = self.weight * np.eye(len(self.space.names))
        for (rows, _, inside), weight in zip(self.groups, weights, strict=True):
            found = found + weight * rows[inside].T @ rows[inside]
        return found

    def coefficients(self) -> list[FittedCoefficient]:
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
        rows = np.vstack([rows[inside] for rows, _, inside in self.groups])
        return [float(one) for one in np.linalg.svd(rows, compute_uv=False)]

    def correlated(self) -> list[tuple[str, str, float]]:
        scale = np.sqrt(np.diag(self.covariance))
        correlation = self.covariance / np.outer(scale, scale)
        names = self.space.names
        return [
            (names[left], names[right], float(correlation[left, right]))
            for left in range(len(names))
            for right in range(left)
            if abs(correlation[left, right]) > CORRELATED
        ]


def _equation_rows(
    space: CoefficientSpace, equations: Equations, values: Floats, temper: float
) -> tuple[Floats, Floats, Any]:
    """Rows and residuals of the equations, in units of prior spread and of noise, and which of them tell slopes."""
    base = base_weights(equations)
    off = (equations.features @ values - equations.seconds) * base
    noise = max(1.4826 * float(np.median(np.abs(off))), 1e-9)
    robust = np.sqrt(np.minimum(1.0, HUBER * noise / np.maximum(np.abs(off), 1e-15)))
    scale = base * robust / (noise * np.sqrt(temper))
    # Equations beyond Huber's bend pull with constant force: they tell nothing of the slope.
    return equations.features * space.spread * scale[:, None], off / base * scale, robust >= 1


def _what_was_seen(batches: Sequence[Batch], coefficients: Sequence[FittedCoefficient]) -> list[str]:
    """Say what was not identified, what the run held, and what to record."""
    missing = [one.name for one in coefficients if not one.identified]
    if not missing or not batches:
        return []
    sequences = np.array([batch.num_seqs for batch in batches])
    prefills = sum(bool(batch.prefills) for batch in batches)
    low, high = np.percentile(sequences, [5, 95])
    seen = (
        f"not identified, so kept near the base profile: {', '.join(missing)}; batches held {low:.0f} to {high:.0f} "
        f"sequences, {prefills} of {len(batches)} iterations computed prompts"
    )
    if low > 0.5 * high:
        seen += "; record a run at a low rate, with batches of few sequences"
    elif prefills < 30:
        seen += "; record a run with more prompts"
    return [seen]


def _what_aggregates_tell(coefficients: Sequence[FittedCoefficient]) -> list[str]:
    """Say what stays where the base profile had it, and what would change that."""
    missing = [one.name for one in coefficients if not one.identified and one.name != FRONT_END]
    if not missing:
        return []
    return [
        f"not identified, so kept near the base profile: {', '.join(missing)}; aggregates tell few numbers a load "
        "level: add levels at other rates and prompt lengths, or keep the times of single requests (--save-detailed)"
    ]


def _domain(batches: Sequence[Batch]) -> dict[str, Any]:
    """The range of batches that a fit has seen."""
    contexts = [context for batch in batches for context in batch.decode_contexts]
    return {
        "sequences": [min(batch.num_seqs for batch in batches), max(batch.num_seqs for batch in batches)],
        "tokens": [min(batch.num_tokens for batch in batches), max(batch.num_tokens for batch in batches)],
        "context": [min(contexts, default=0), max(contexts, default=0)],
    }
