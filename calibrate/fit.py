"""Fitting a profile's coefficients to what a run measured, with uncertainty.

An iteration's time is a sum of components, each times a coefficient that is not negative. Where the iterations are
recorded, or can be reconstructed from the stamps that requests share (``calibrate.reconstruction``) or from token times
that clients saw (``calibrate.client_schedule``), the measured time between two iteration ends is a linear equation in
the coefficients, as is the time of an offline batch: bounded least squares, robust against single wrong equations,
pulled towards the base profile by as much as cross-validation inside the training part finds best. What the data cannot
tell so stays at physics. Where the schedule cannot be told (preempted requests, clients without token times, aggregates
of a load level), or the equations err together, simulated latencies are fitted (``calibrate.gauss_newton``). The fit
is then checked end to end by simulation (``calibrate.holdout``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from calibrate.aggregates import AggregateRun, contradiction
from calibrate.batch_equations import equations_of_batches, impossible_warning, usable_batches
from calibrate.client_schedule import is_client_side, reconstruct_client_side
from calibrate.evidence import Evidence
from calibrate.front_end import Bounds, FittedFrontEnd, fit_front_end
from calibrate.gauss_newton import Effort, Fitted, LinearRows, Prior, best_start, refine, scaled_start
from calibrate.inference import Finding, infer_blocks, infer_scheduling, warm_up_finding
from calibrate.least_squares import SYSTEMATIC, best_strength, scatter, solve, systematic
from calibrate.reconstruction import (
    NotRecoverable,
    Reconstruction,
    StepSeconds,
    reconstruct,
    spans_of_recording,
)
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
from simulator.accelerators.base import HOST_COMPONENTS
from simulator.batch import Batch
from simulator.engine_config import EngineConfig

Floats = npt.NDArray[np.floating[Any]]
Rows = npt.NDArray[np.bool_]
Run = tuple[Trace, Deployment, Rows | None]
Simulate = Callable[[CoefficientSpace], Simulated]

BATCH_TERMS = ("attention_grid", "long_prefill_token", "several_tokens", "several_tiles")
"""Terms learned only where batches are among the runs. Stamps of a server whose batches are always full cannot tell
them from others: fitted to the first half of ``rtxpro6000-qwen3-32b-tp2``, they make TPOT of the second 2.8 % wrong
instead of 0.4 %."""
SOME_STEPS = ("several_tokens", "several_tiles")
"""Terms of large steps that are else like the per-step one."""
LEAST_CONTRAST = 0.05
"""Share of the iterations that must have such a term, and must not, for it to be a coefficient."""
ROUGH = 0.01
"""Weight of the prior where only a rough idea of step times is needed."""
HELD = 1e-6
"""Prior deviation of a coefficient that is not learned."""
_HOST_PLACE = {name: place for place, name in enumerate(HOST_COMPONENTS)}
MOST_MISPLACED = 0.1
"""Share of first tokens elsewhere than their stamps say, up to which a reconstructed schedule is believed."""
ALIKE = 0.5
"""Values are alike if nearly all are above this share of the largest: they tell a sum, and not its parts."""
SEARCH, POLISH = Effort(2, 8, 0.02, 100.0), Effort(1, 2, 0.02, 1.0)
"""For load levels: with one draw of each, then with all. A statistic's noise is no less than 1 %: more steps gain
nothing."""


@dataclass
class _Material:
    """What the runs of a fit tell: equations, and latencies or aggregates to simulate.

    ``numbers`` and ``simulated`` are the places, among the runs, of ``parts`` and of ``simulate``; ``rough`` are
    equations that only lead to a start; ``seen`` are batches and how many iterations each stands for.
    """

    parts: list[Equations] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    simulate: list[Simulate] = field(default_factory=list)
    simulated: list[int] = field(default_factory=list)
    rough: list[Equations] = field(default_factory=list)
    seen: list[tuple[Batch, int]] = field(default_factory=list)

    def told_by(self, number: int, equations: Equations, seen: Sequence[tuple[Batch, int]]) -> None:
        """Add the equations of a run."""
        self.numbers.append(number)
        self.parts.append(equations)
        self.seen += seen

    def simulated_too(self, number: int, simulate: Simulate) -> None:
        """Add a run whose latencies or aggregates count."""
        self.simulate.append(simulate)
        self.simulated.append(number)


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
    findings_ : list of Finding
        What the logs lacked and the runs told (``calibrate.inference``).
    domain_ : dict
        Range of sequences, tokens and contexts in the fitted iterations, and of the fitted requests' prompt lengths.
    spans_ : list of (list of Batch, float)
        What was fitted: the iterations between two measured ends, and the seconds between those.
    evidence_ : Evidence
        The loss at the solution, linearised: what ``calibrate.bootstrap`` resamples and ``calibrate.plan`` adds to.
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
    evidence_: Evidence | None = field(default=None, init=False, repr=False)
    findings_: list[Finding] = field(default_factory=list, init=False)
    _inferred: dict[EngineConfig, EngineConfig] = field(default_factory=dict, init=False, repr=False)
    _schedules: dict[tuple[int, EngineConfig], Reconstruction] = field(default_factory=dict, init=False, repr=False)
    _bounds: list[Bounds] = field(default_factory=list, init=False, repr=False)
    _simulated: list[int] = field(default_factory=list, init=False, repr=False)
    _place: Floats = field(default_factory=lambda: np.empty(0), init=False, repr=False)

    def fit(self, runs: Sequence[tuple[Trace, Deployment, Rows | None]]) -> ProfileFit:
        """Learn from one or more runs, which share their coefficients.

        Parameters
        ----------
        runs : sequence of (Trace, Deployment, array of bool or None)
            Each trace with the base deployment of its own shapes, and the rows whose stamps may be used (None: all).

        Raises
        ------
        InputError
            If a trace has no recorded iterations, no stamps to reconstruct them, no latencies and no aggregates, if
            these are too few to tell the coefficients, or if what was measured contradicts itself.
        """
        client = any(trace.meta.get("vantage") == "client" for trace, _, _ in runs)
        space = CoefficientSpace(runs[0][1], client)
        material = _Material()
        for number, run in enumerate(map(self._with_inferred, runs)):
            self._take(number, run, CoefficientSpace(run[1], client), material)
        seen, equations = material.seen, _together(space, material.parts)
        self._place, self._simulated = _places(material.numbers, material.parts), material.simulated
        complete = len(material.parts) == len(runs)
        if complete and len(equations) < 2 * len(space.names):
            raise InputError(
                f"{len(equations)} spans of iterations cannot tell {len(space.names)} coefficients; record a longer run"
            )
        self.iterations_, self.equations_ = sum(steps for _, steps in seen), len(equations)
        prompts = _prompts(runs)
        self.domain_ = _domain([batch for batch, _ in seen]) if seen else {}
        if prompts.size:
            self.domain_["prompt_tokens"] = [int(prompts.min()), int(prompts.max())]
        told = _told(space, seen, any(trace.batches is not None for trace, _, _ in runs))
        # What is not learned stays what the base profile says.
        space.spread[~told] = HELD
        self._learn(space, told, equations, material.simulate, complete, _together(space, material.rough))
        self.sentences_ += _what_was_seen(seen, prompts, self.coefficients_)
        if all(holds_aggregates(trace) for trace, _, _ in runs):
            self.sentences_ += _what_aggregates_tell(self.coefficients_)
        self._take_front_end(runs)
        if self._bounds:
            self._learn_front_end()
        return self

    def _take(self, number: int, run: Run, own: CoefficientSpace, material: _Material) -> None:
        """Add what one run tells, in the space of its own shapes."""
        trace = run[0]
        if holds_aggregates(trace):
            self._take_aggregates(trace)
            material.simulated_too(number, partial(_aggregated, run, own))
            return
        if trace.batches is not None:
            equations, inside = self._from_batches(own, *run)
            material.told_by(number, equations, inside)
            return
        try:
            spans = self._spans(*run)
        except NotRecoverable as error:
            if not self.simulates:
                raise
            self.warnings_.append(f"{error}; fitted to simulated latencies instead")
            material.simulated_too(number, partial(_simulated, run, own))
            material.rough += [own.equations(error.spans)] if error.spans else []
            return
        if _stamped_by_engine(*run):
            material.simulated_too(number, partial(_simulated, run, own))
        material.told_by(number, own.equations(spans), [(batch, 1) for batches, _ in spans for batch in batches])
        self.spans_ += spans

    @property
    def num_coefficients_(self) -> int:
        """Numbers that were learned."""
        return len(self.coefficients_)

    def deployment(self, base: Deployment) -> Deployment:
        """Return the deployment with what was learned in force."""
        learned = with_coefficients(replace(base, config=self.inferred(base.config)), self.coefficients_)
        if self.front_end_ is None:
            return learned
        way = FrontEnd(per_request=self.front_end_.per_request, per_prompt_token=self.front_end_.per_prompt_token)
        return replace(learned, front_end=way)

    def written(self, profile: Profile, stem: str) -> tuple[Profile, dict[str, bytes]]:
        """Return the profile with what was learned, and the files that lie beside it, by name; here there are none."""
        return profile, {}

    def inferred(self, config: EngineConfig) -> EngineConfig:
        """Return the arguments with what runs that were started with the same arguments told of them."""
        return self._inferred.get(config, config)

    def _with_inferred(self, run: Run) -> Run:
        """Tell what nobody said of a run's engine, by the rows that may be used."""
        trace, stated, known = run
        if trace.batches is not None or holds_aggregates(trace):
            return run
        deployment, finding = infer_blocks(trace, stated, known)
        findings: list[Finding | None] = [finding]
        if not is_client_side(trace):
            try:
                deployment, finding_ = infer_scheduling(
                    trace,
                    deployment,
                    known,
                    lambda config: self._schedule(trace, replace(deployment, config=config), known),
                )
                findings.append(finding_)
            except NotRecoverable:
                pass  # said where the schedule is needed
        self.findings_ += [one for one in findings if one is not None]
        self.warnings_ += [f"{trace.name}: {one.sentence}" for one in findings if one is not None and one.doubt]
        self._inferred[stated.config] = deployment.config
        return trace, deployment, known

    def _schedule(self, trace: Trace, deployment: Deployment, known: Rows | None) -> tuple[Reconstruction, StepSeconds]:
        """The reconstruction of a run from engine stamps, made once for every configuration, and its step times."""
        key = id(trace), deployment.config
        prior, refined = _step_seconds(deployment)
        if key not in self._schedules:
            self._schedules[key] = reconstruct(trace, deployment.config, prior, refined, known)
        return self._schedules[key], refined(self._schedules[key])

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

    def _from_batches(
        self, space: CoefficientSpace, trace: Trace, deployment: Deployment, known: Rows | None
    ) -> tuple[Equations, list[tuple[Batch, int]]]:
        """Equations of the batches of a trace, and their iterations with how many each stands for."""
        sums = space.sums(trace)
        usable = usable_batches(trace, space, sums, known)
        warning = impossible_warning(trace, space, sums, known)
        self.warnings_ += [warning] if warning else []
        if deployment.config.enable_prefix_caching and not trace.has("block_hashes"):
            self.warnings_.append(
                f"{trace.name}: prefix caching was on and what the prompts share is unknown: where they hit the cache, "
                "prefill is learned too fast"
            )
        inside = [one for place in np.flatnonzero(usable) for one in sums.seen[place]]
        return equations_of_batches(trace, sums, usable), inside

    def _spans(self, trace: Trace, deployment: Deployment, known: Rows | None) -> list[tuple[list[Batch], float]]:
        if trace.iterations is not None and known is None:
            return spans_of_recording(trace)
        if is_client_side(trace):
            prior, refined = _step_seconds(deployment)
            client = reconstruct_client_side(trace, deployment.config, prior, refined, known)
            self._bounds.append(client.bounds)
            self.warnings_ += client.warnings
            found = client.schedule
        else:
            found, _ = self._schedule(trace, deployment, known)
        if np.nansum(trace.column("preemptions")[slice(None) if known is None else known]) > 0:
            raise NotRecoverable(
                f"{trace.name}: requests were preempted, so its stamps do not tell its schedule", found.spans()
            )
        if found.misplaced > MOST_MISPLACED * len(trace):
            where = f"{found.misplaced} of {len(trace)} first tokens lie elsewhere"
            if replay(trace, deployment, cold_start=False).summary["preemptions"]:
                raise NotRecoverable(
                    f"{trace.name}: its stamps do not tell its schedule ({where}), as with preempted requests",
                    found.spans(),
                )
            raise InputError(
                f"{trace.name}: the schedule that its stamps tell is not the engine's by the arguments given: {where}; "
                "check the engine arguments (max_num_seqs, max_num_batched_tokens, num_gpu_blocks, async_scheduling) "
                "and that all stamps are of the engine's clock"
            )
        self.misplaced_ += found.misplaced
        return found.spans()

    def _learn(
        self,
        space: CoefficientSpace,
        told: Rows,
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
        there &= told | (space.prior != 0)
        space = space.only(there)
        equations = replace(equations, features=equations.features[:, there])
        rough = replace(rough, features=rough.features[:, there])
        latencies = None
        if not len(equations):
            self.strength_ = 1.0 if self.strength is None else self.strength
            runs = [one(space) for one in simulate]
            _refuse_too_few(runs, space)
            prior = Prior(space.prior, space.spread, space.least, self.strength_)
            likely = [space.prior, solve(space, rough, self.strength_)[0]] if len(rough) else [space.prior]
            latencies = _refined_from(likely, runs, prior)
            if self._leave_out_warm_up(runs, latencies.values):
                latencies = refine(runs, latencies.values, prior, None)
            latencies = self._numbered(latencies)
            values = latencies.values
        else:
            self.strength_ = self.strength if self.strength is not None else best_strength(space, equations)
            values = solve(space, equations, self.strength_)[0]
            # Where neighbouring spans err together, the model is wrong somewhere; the loss decides where it may be.
            runs = _that_tell_latencies(space, simulate)
            self._leave_out_warm_up(runs, values)
            if runs and self.simulates and (not complete or systematic(space, equations) > SYSTEMATIC):
                latencies = self._refined(space, equations, values, runs)
                values = latencies.values
            self.residual_ = float(np.median(np.abs(equations.features @ values / equations.seconds - 1)))
        self.evidence_ = evidence = Evidence(space, equations, values, self.strength_, latencies, self._place)
        self.simulations_ = latencies.simulations if latencies is not None else 0
        self.coefficients_ = evidence.coefficients()
        self.singular_values_ = evidence.singular_values()
        self.correlated_ = evidence.correlated()
        self.sentences_ = [
            f"{left} and {right} can hardly be told apart (correlation {value:+.2f}): their sum is known better"
            for left, right, value in self.correlated_
        ]

    def _leave_out_warm_up(self, runs: Sequence[Simulated], values: Floats) -> bool:
        """Leave out what the runs' first requests took longer; whether there is any."""
        found = [(run.trace, run.leave_out_warm_up(values)) for run in runs if isinstance(run, SimulatedRun)]
        self.findings_ += [warm_up_finding(trace, rows) for trace, rows in found if rows]
        return any(rows for _, rows in found)

    def _refined(
        self, space: CoefficientSpace, equations: Equations, start: Floats, runs: Sequence[Simulated]
    ) -> Fitted:
        """Lower the error of simulated latencies from where the equations lead."""
        base = equations.weights
        off = (equations.features @ start - equations.seconds) * base
        noise = max(scatter(off), 1e-9)
        rows = LinearRows(
            equations.features * (base / noise)[:, None], equations.seconds * base / noise, 1 / max(self.strength_, 1.0)
        )
        prior = Prior(space.prior, space.spread, space.least, min(self.strength_, 1.0))
        return self._numbered(refine(runs, start, prior, rows))

    def _numbered(self, fitted: Fitted) -> Fitted:
        """The places of latencies, by the runs' numbers among all that are fitted."""
        which, share = np.divmod(fitted.place, 1.0)
        return replace(fitted, place=np.array(self._simulated)[which.astype(int)] + share)


def _step_seconds(deployment: Deployment) -> tuple[StepSeconds, Callable[[Reconstruction], StepSeconds]]:
    """How long a batch takes: as expected before any data, and as a reconstructed schedule roughly tells."""
    space = CoefficientSpace(deployment)

    def refined(found: Reconstruction) -> StepSeconds:
        return space.step_seconds(solve(space, space.equations(found.spans()), ROUGH)[0])

    return space.step_seconds(space.prior), refined


def _that_tell_latencies(space: CoefficientSpace, simulate: Sequence[Simulate]) -> list[Simulated]:
    try:
        return [one(space) for one in simulate]
    except InputError:
        return []  # recorded iterations without requests' stamps


def _together(space: CoefficientSpace, parts: Sequence[Equations]) -> Equations:
    return Equations.joined([Equations(np.empty((0, len(space.names))), np.empty(0), np.empty(0)), *parts])


def _told(space: CoefficientSpace, seen: Sequence[tuple[Batch, int]], batches: bool) -> Rows:
    """Which coefficients may be learned: all but ``BATCH_TERMS`` in runs without batches, and those without contrast.

    Where nearly all steps have a term of ``SOME_STEPS``, or nearly none, the few others would decide what every step
    costs.
    """
    steps = np.array([count for _, count in seen])
    told = np.array([batches or name not in BATCH_TERMS for name in space.names])
    for name in SOME_STEPS:
        if name in space.names:
            place = space.names.index(name)
            has = np.array([space.host.seconds(batch)[_HOST_PLACE[name]] > 0 for batch, _ in seen], dtype=bool)
            share = float(steps[has].sum() / max(steps.sum(), 1))
            told[place] &= LEAST_CONTRAST <= share <= 1 - LEAST_CONTRAST
    return told


def _places(numbers: Sequence[int], parts: Sequence[Equations]) -> Floats:
    """For each equation the number of its run, plus the share of its equations that lie before."""
    shares = [number + (np.arange(len(one)) + 0.5) / len(one) for number, one in zip(numbers, parts, strict=True)]
    return np.concatenate([np.empty(0), *shares])


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


def _what_was_seen(
    seen: Sequence[tuple[Batch, int]], prompts: Floats, coefficients: Sequence[FittedCoefficient]
) -> list[str]:
    """Say what was not identified, what the runs held alike, and what to add to change that."""
    missing = [one.name for one in coefficients if not one.identified]
    if not missing or not seen:
        return []
    steps = [count for _, count in seen]
    iterations = sum(steps)
    sequences = np.repeat([batch.num_seqs for batch, _ in seen], steps)
    contexts = np.array([context for batch, _ in seen for context in batch.decode_contexts])
    prefills = sum(count for batch, count in seen if batch.prefills)
    advice = [
        _alike("all batches are of size {}", sequences, 8, "add a run at a low rate", "add a run at a high rate"),
        _alike("every prompt is {} tokens", prompts, 256, "add short ones", "add long ones"),
        _alike("all contexts are {} tokens", contexts, 256, "add short requests", "add long requests"),
        f"only {prefills} of {iterations} iterations computed prompts: add a run with more" if prefills < 30 else "",
    ]
    said = "; ".join(one for one in advice if one) or (
        f"batches held {_ends(sequences)} sequences, {prefills} of {iterations} iterations computed prompts: --plan "
        "says which run would tell more"
    )
    return [f"not identified, so kept near the base profile: {', '.join(missing)}; {said}"]


def _alike(what: str, values: Any, few: float, less: str, more: str) -> str:
    """Say that values are all alike, if they are, and whether to add smaller ones: if these are more than a few."""
    if not values.size:
        return ""
    low, high = np.percentile(values, [5, 95])
    if low <= ALIKE * high:
        return ""
    return f"{what.format(_ends(values))}: {less if low > few else more}"


def _ends(values: Any) -> str:
    """What nearly all values lie between, in words."""
    low, high = (f"{one:,.0f}" for one in np.percentile(values, [5, 95]))
    return low if low == high else f"{low} to {high}"


def _prompts(runs: Sequence[Run]) -> Floats:
    """Prompt lengths of the requests that were fitted."""
    lengths = [
        trace.column("prompt_tokens")[(trace.statuses == "ok") & (True if known is None else known)]
        for trace, _, known in runs
    ]
    every: Floats = np.concatenate(lengths)
    return every[~np.isnan(every)]


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
