"""Fitting a profile's coefficients to what a run measured, with uncertainty.

An iteration's time is a sum of components, each times a coefficient that is not negative. Where the iterations are
recorded, or can be reconstructed from the stamps that requests share (``calibrate.reconstruction``), the measured
time between two iteration ends is a linear equation in the coefficients: bounded least squares, robust against single
wrong equations, pulled towards the base profile by as much as cross-validation inside the training part finds best.
What the data cannot tell so stays at physics. The fit is then checked end to end by simulation (``calibrate.holdout``).
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import lsq_linear

from calibrate.batches import BatchSums, batch_sums, predicted_trace
from calibrate.reconstruction import Reconstruction, reconstruct, spans_of_recording
from profiles.deployment import Deployment
from profiles.errors import InputError
from replay.run import PREDICTED
from replay.trace import Trace
from simulator.accelerators.base import (
    CALL_COMPONENTS,
    HOST_COMPONENTS,
    AcceleratorModel,
    CallOverhead,
    HostOverhead,
    WithHost,
)
from simulator.accelerators.linear import Linear
from simulator.batch import Batch

Floats = npt.NDArray[np.floating[Any]]
Rows = npt.NDArray[np.bool_]

HOST_UNITS = {
    "host_step": 1e-3,
    "host_sequence": 1e-5,
    "host_prefill_step": 1e-2,
    "host_prefill_token": 1e-5,
    "graph_padding": 1e-4,
    "beyond_graphs": 1e-2,
    "longest_context": 1e-6,
    "attention_grid": 1e-7,
    "long_prefill_token": 1e-5,
    "several_tokens": 1e-4,
    "several_tiles": 1e-4,
}
"""Seconds of one unit of each term beside the device: a coefficient of 1 is a plausible size."""
CALL_UNITS = {"call": 1e-3, "call_request": 1e-4}
"""The same of the terms of an offline call."""
LINEAR_UNITS = {
    "step": 5e-3,
    "sequence": 1e-4,
    "token": 5e-5,
    "prefill_step": 5e-3,
    "prefill_attention": 1e-8,
    "decode_attention": 1e-7,
}
PRIOR_SPREAD = 0.5
"""Standard deviation of a coefficient before any data, in units of the base profile's value or the host unit."""
_LINEAR = Linear(LINEAR_UNITS)
STRENGTHS = (1.0, 0.1, 0.01, 1e-3)
"""Weights of the prior that cross-validation chooses from; 1 takes the spread above at its word."""
FOLDS = 5
SHORTEST = 0.01
"""Seconds. Spans shorter than this are weighted as if they were this long: their stamps have jitter too."""
MOST_IMPOSSIBLE = 0.1
"""Share of a trace's batches that may be shorter than the datasheet allows."""
BATCH_TERMS = ("attention_grid", "long_prefill_token", "several_tokens", "several_tiles")
"""Terms learned only where batches are among the runs. Stamps of a server whose batches are always full cannot tell
them from others: fitted to the first half of ``rtxpro6000-qwen3-32b-tp2``, they make TPOT of the second 2.8 % wrong
instead of 0.4 %."""
SOME_STEPS = ("several_tokens", "several_tiles")
"""Terms of large steps that are else like the per-step one."""
LEAST_CONTRAST = 0.05
"""Share of the iterations that must have such a term, and must not, for it to be a coefficient."""
HELD = 1e-6
"""Prior deviation of a coefficient that is not learned."""
_HOST_PLACE = {name: place for place, name in enumerate(HOST_COMPONENTS)}
CORRELATED = 0.9
IDENTIFIED = 0.5
"""A coefficient counts as identified if the data cut its prior standard deviation to this share or less."""


@dataclass(frozen=True)
class FittedCoefficient:
    """A learned factor on one component: value, 95 % interval, where it started, and whether the data told it."""

    name: str
    value: float
    ci95: tuple[float, float]
    prior: float
    identified: bool


@dataclass(frozen=True)
class Equations:
    """``features @ coefficients = seconds``: one row a span of iterations, in order of time.

    ``weights`` are relative to the noise: that of a span grows with the root of its length (independent iterations),
    that of a batch with its length (all its iterations share the state of the device).
    """

    features: Floats
    seconds: Floats
    weights: Floats

    def __len__(self) -> int:
        return int(self.seconds.size)

    def rows(self, some: Any) -> Equations:
        """Some of the equations."""
        return Equations(self.features[some], self.seconds[some], self.weights[some])

    @classmethod
    def joined(cls, parts: Sequence[Equations]) -> Equations:
        """Those of several runs."""
        names = ("features", "seconds", "weights")
        return cls(*(np.concatenate([getattr(one, name) for one in parts]) for name in names))


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
    sentences_ : list of str
        What was not identified, and what to record to change that.
    singular_values_ : list of float
        Of the equations in units of prior spread and noise: values below 1 are directions the data do not tell.
    domain_ : dict
        Range of sequences, tokens and contexts in the fitted iterations.
    """

    strength: float | None = None
    coefficients_: list[FittedCoefficient] = field(default_factory=list, init=False)
    strength_: float = field(default=np.nan, init=False)
    equations_: int = field(default=0, init=False)
    iterations_: int = field(default=0, init=False)
    misplaced_: int = field(default=0, init=False)
    residual_: float = field(default=np.nan, init=False)
    correlated_: list[tuple[str, str, float]] = field(default_factory=list, init=False)
    sentences_: list[str] = field(default_factory=list, init=False)
    singular_values_: list[float] = field(default_factory=list, init=False)
    domain_: dict[str, Any] = field(default_factory=dict, init=False)

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
        space = _Space(runs[0][1])
        self.sentences_ = []
        parts = []
        seen: list[tuple[Batch, int]] = []
        for trace, deployment, known in runs:
            if trace.batches is not None:
                own = _Space(deployment)
                sums = own.sums(trace)
                usable = _usable(trace, own, sums, known)
                self._warn_of_the_impossible(trace, own, sums, known)
                if deployment.config.enable_prefix_caching and not trace.has("block_hashes"):
                    self.sentences_.append(
                        f"{trace.name}: prefix caching was on and what the prompts share is unknown: where they hit "
                        "the cache, prefill is learned too fast"
                    )
                parts.append(_equations_of_batches(trace, sums, usable))
                seen += [one for place in np.flatnonzero(usable) for one in sums.seen[place]]
                continue
            spans = self._spans(trace, deployment, known)
            parts.append(_Space(deployment).equations(spans))
            seen += [(batch, 1) for inside, _ in spans for batch in inside]
        equations = Equations.joined(parts)
        if len(equations) < 2 * len(space.names):
            raise InputError(
                f"{len(equations)} spans of iterations cannot tell {len(space.names)} coefficients; record a longer run"
            )
        self.iterations_ = sum(steps for _, steps in seen)
        self.domain_ = _domain([batch for batch, _ in seen])
        # What no batch has a part in (collectives on one device) is no coefficient of these runs.
        told = _told(space, seen, any(trace.batches is not None for trace, _, _ in runs))
        # What is not learned stays what the base profile says.
        space.spread[~told] = HELD
        there = np.asarray(equations.features.any(axis=0)) & (told | (space.prior != 0))
        self._learn(space.only(there), replace(equations, features=equations.features[:, there]))
        self.sentences_ += _what_was_seen(seen, self.coefficients_)
        return self

    def _warn_of_the_impossible(self, trace: Trace, space: _Space, sums: BatchSums, known: Rows | None) -> None:
        """Say which batches break the datasheet; refuse a trace of which many do."""
        mine = _known_batches(trace, sums, known)
        bad = sums.batches[_impossible(trace, space, sums) & mine]
        if not bad.size:
            return
        text = (
            f"{trace.name}: {bad.size} of {mine.sum()} batches (the first is batch {bad[0] + 1}) took less time than "
            "the datasheet allows: not all of their prompts can have been computed together, or another device ran them"
        )
        if bad.size > MOST_IMPOSSIBLE * mine.sum():
            raise InputError(f"{text}; check hardware, tensor_parallel_size and model")
        self.sentences_.append(f"{text}; left out")

    def _spans(self, trace: Trace, deployment: Deployment, known: Rows | None) -> list[tuple[list[Batch], float]]:
        if trace.iterations is not None and known is None:
            return spans_of_recording(trace)
        space = _Space(deployment)

        def refine(found: Reconstruction) -> Any:
            return space.step_seconds(_solve(space, space.equations(found.spans()), 0.01)[0])

        found = reconstruct(trace, deployment.config, space.step_seconds(space.prior), refine, known)
        self.misplaced_ += found.misplaced
        if found.misplaced > 0.1 * len(trace):
            raise InputError(
                f"{trace.name}: the schedule that its stamps tell is not the engine's by the arguments given: "
                f"{found.misplaced} of {len(trace)} first tokens lie elsewhere; check the engine arguments "
                "(max_num_seqs, max_num_batched_tokens, async_scheduling)"
            )
        return found.spans()

    def _learn(self, space: _Space, equations: Equations) -> None:
        self.strength_ = self.strength if self.strength is not None else _best_strength(space, equations)
        values, weights, noise = _solve(space, equations, self.strength_)
        scaled = equations.features * space.spread * weights[:, None] / noise
        # Equations beyond Huber's bend pull with constant force: they tell nothing of the slope.
        inside = weights >= equations.weights * (1 - 1e-9)
        information = scaled[inside].T @ scaled[inside]
        precision = information + self.strength_ * np.eye(len(space.names))
        covariance = np.linalg.inv(precision)
        residual = (equations.features @ values - equations.seconds) * weights / noise
        deviation = np.sqrt(np.diag(covariance)) * space.spread
        bound = 1.96 * _deviations(scaled, residual, covariance) * space.spread
        prior_deviation = space.spread / np.sqrt(self.strength_)
        self.coefficients_ = [
            FittedCoefficient(
                name,
                float(values[place]),
                (float(max(space.least[place], values[place] - bound[place])), float(values[place] + bound[place])),
                float(space.prior[place]),
                bool(deviation[place] <= IDENTIFIED * prior_deviation[place]),
            )
            for place, name in enumerate(space.names)
        ]
        self.equations_ = len(equations)
        self.residual_ = float(np.median(np.abs(equations.features @ values / equations.seconds - 1)))
        self.singular_values_ = [float(one) for one in np.linalg.svd(scaled, compute_uv=False)]
        correlation = covariance / np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
        self.correlated_ = [
            (space.names[left], space.names[right], float(correlation[left, right]))
            for left in range(len(space.names))
            for right in range(left)
            if abs(correlation[left, right]) > CORRELATED
        ]
        self.sentences_ += [
            f"{left} and {right} can hardly be told apart (correlation {value:+.2f}): their sum is known better"
            for left, right, value in self.correlated_
        ]


class _Space:
    """The coefficients of a deployment: names, prior values and spreads, and the features of a batch.

    A device component's feature is its seconds by the base profile, a host term's its unit's seconds times what it
    counts. A linear model has no physics: its coefficients are in plausible units, and only weakly held.
    """

    def __init__(self, deployment: Deployment) -> None:
        device: AcceleratorModel = deployment.accelerator.device
        own = deployment.accelerator.coefficients
        self.linear = isinstance(device, Linear)
        self.config = deployment.config
        call = deployment.accelerator.call
        calls = [own[name] * getattr(call, term) / CALL_UNITS[name] for name, term in CALL_COMPONENTS.items()]
        if isinstance(device, Linear):
            self.device: AcceleratorModel = _LINEAR
            self.host = HostOverhead(0.0, 0.0)
            self.names: tuple[str, ...] = (*device.components, *CALL_COMPONENTS)
            terms = [own[name] * device.seconds[name] / LINEAR_UNITS[name] for name in device.components]
            self.prior: Floats = np.array([*terms, *calls])
            self.spread: Floats = np.full(len(self.names), 10.0)
            self.least: Floats = np.zeros(len(self.names))
            return
        self.device = device
        self.names = (*device.components, *HOST_COMPONENTS, *CALL_COMPONENTS)
        host = deployment.accelerator.host
        factors = [own[name] for name in device.components]
        terms = [own[name] * getattr(host, term) / HOST_UNITS[name] for name, term in HOST_COMPONENTS.items()]
        units = {term: HOST_UNITS[name] for name, term in HOST_COMPONENTS.items()}
        self.host = HostOverhead(**units, capture_sizes=host.capture_sizes)
        self.prior = np.array([*factors, *terms, *calls])
        self.least = np.zeros(len(self.names))
        if getattr(device, "bounds_from_below", False):
            self.least[: len(factors)] = 1.0
        self.spread = np.full(len(self.names), PRIOR_SPREAD)

    def only(self, some: Rows) -> _Space:
        """Return the space of some of the coefficients, for solving."""
        part = copy(self)
        part.names = tuple(name for name, there in zip(self.names, some, strict=True) if there)
        part.prior, part.spread, part.least = self.prior[some], self.spread[some], self.least[some]
        return part

    def features(self, batch: Batch) -> Floats:
        """Seconds of each component at a coefficient of 1."""
        parts = self.device.step(batch)
        if self.linear:
            return np.array([*parts, 0.0, 0.0])
        return np.array([*parts, *self.host.seconds(batch), 0.0, 0.0])

    def sums(self, trace: Trace) -> BatchSums:
        """Features of each batch of a trace: the sums over its iterations, and the call's own."""
        sums = batch_sums(trace, self.config, self.features, self.device, self.host)
        call = CallOverhead(*CALL_UNITS.values())
        sums.features["makespan"][:, -len(CALL_UNITS) :] = [call.seconds(int(count)) for count in sums.requests]
        return sums

    def equations(self, spans: Sequence[tuple[list[Batch], float]]) -> Equations:
        """One equation a span."""
        rows = [np.sum([self.features(batch) for batch in batches], axis=0) for batches, _ in spans]
        seconds = np.array([one for _, one in spans])
        return Equations(np.array(rows), seconds, 1 / np.sqrt(np.maximum(seconds, SHORTEST)))

    def step_seconds(self, values: Floats) -> Any:
        """An iteration's seconds by those coefficients."""
        return lambda batch: max(float(self.features(batch) @ values), 1e-6)


def _solve(space: _Space, equations: Equations, strength: float) -> tuple[Floats, Floats, float]:
    """Robust bounded least squares; return coefficients, weights of the equations, and the noise at weight 1.

    The noise of a span grows with the root of its length (independent iterations). Residuals beyond 1.5 times the noise
    count by their size and no longer by its square (Huber).
    """
    base = equations.weights
    values = space.prior.copy()
    weights, noise = base, 1.0
    for _ in range(15):
        residual = (equations.features @ values - equations.seconds) * base
        noise = max(1.4826 * float(np.median(np.abs(residual))), 1e-9)
        weights = base * np.sqrt(np.minimum(1.0, 1.5 * noise / np.maximum(np.abs(residual), 1e-15)))
        matrix = np.vstack(
            [
                equations.features * space.spread * (weights / noise)[:, None],
                np.sqrt(strength) * np.eye(len(space.names)),
            ]
        )
        target = np.concatenate([equations.seconds * weights / noise, np.sqrt(strength) * space.prior / space.spread])
        # The triangle of a QR decomposition has the same solutions, and few rows.
        triangle = np.asarray(np.linalg.qr(np.column_stack([matrix, target]), mode="r"))[: len(space.names)]
        bounds = (space.least / space.spread, np.inf)
        found = lsq_linear(triangle[:, :-1], triangle[:, -1], bounds=bounds).x * space.spread
        close = np.max(np.abs(found - values) / space.spread) < 1e-4
        values = found
        if close:
            break
    return values, weights, noise


def _told(space: _Space, seen: Sequence[tuple[Batch, int]], batches: bool) -> Rows:
    """Which coefficients may be learned: all but ``BATCH_TERMS`` in runs without batches, and those without contrast.

    Where nearly all steps have a term of ``SOME_STEPS``, or nearly none, the few others would decide what every step
    costs.
    """
    steps = np.array([count for _, count in seen])
    told = np.array([batches or name not in BATCH_TERMS for name in space.names])
    for name in SOME_STEPS:
        if name in space.names:
            place = space.names.index(name)
            has = np.array([space.host.seconds(batch)[_HOST_PLACE[name]] > 0 for batch, _ in seen])
            share = float(steps[has].sum() / steps.sum())
            told[place] &= LEAST_CONTRAST <= share <= 1 - LEAST_CONTRAST
    return told


def _usable(trace: Trace, space: _Space, sums: BatchSums, known: Rows | None) -> Rows:
    """Which batches may be fitted: those of which all requests are ``known``, and no time is impossible."""
    return _known_batches(trace, sums, known) & ~_impossible(trace, space, sums)


def _known_batches(trace: Trace, sums: BatchSums, known: Rows | None) -> Rows:
    rows = trace.rows_of_batches()
    return np.array([known is None or bool(known[rows[batch]].all()) for batch in sums.batches])


def _impossible(trace: Trace, space: _Space, sums: BatchSums) -> Rows:
    """Batches measured shorter than the datasheet allows: they were not computed as the trace says."""
    found = np.zeros(sums.batches.size, dtype=bool)
    for name in PREDICTED:
        seconds = trace.of_batches(name)[sums.batches]
        found |= seconds < np.nan_to_num(sums.features[name] @ space.least)
    return found


def impossible_requests(trace: Trace, deployment: Deployment) -> list[str]:
    """Ids of the requests of batches that were measured shorter than the deployment's datasheet allows."""
    space = _Space(deployment)
    sums = space.sums(trace)
    rows, ids = trace.rows_of_batches(), trace.ids
    return [ids[row] for batch in sums.batches[_impossible(trace, space, sums)] for row in rows[batch]]


def _equations_of_batches(trace: Trace, sums: BatchSums, usable: Rows) -> Equations:
    """One equation a measured column of each usable batch."""
    found = []
    for name in PREDICTED:
        seconds = trace.of_batches(name)[sums.batches]
        features = sums.features[name]
        some = usable & ~np.isnan(seconds) & ~np.isnan(features[:, 0]) & features.any(axis=1)
        found.append(Equations(features[some], seconds[some], 1 / seconds[some]))
    return Equations.joined(found)


def predict_batches(trace: Trace, deployment: Deployment, coefficients: Sequence[FittedCoefficient]) -> Trace:
    """What a replay with learned coefficients says of a trace of batches, by the sums that they were learned from.

    It is the replay's to the rounding of times to nanoseconds, and to ``simulator.at_once.STRAIGHT``.
    """
    space = _Space(deployment)
    sums = space.sums(trace)
    learned = {one.name: one.value for one in coefficients}
    # As ``with_coefficients`` has it: a device's component that was not fitted stays what it is.
    unfitted = () if space.linear else space.device.components
    values = np.array([learned.get(name, float(name in unfitted)) for name in space.names])
    columns = {name: np.full(trace.of_batches("start").size, np.nan) for name in PREDICTED}
    for name, column in columns.items():
        column[sums.batches] = sums.features[name] @ values
    return predicted_trace(trace, columns)


def _best_strength(space: _Space, equations: Equations) -> float:
    """The prior's weight under which blocks of time predict each other best; only training equations are seen."""
    folds = np.array_split(np.arange(len(equations)), FOLDS)
    scores = []
    for strength in STRENGTHS:
        errors = []
        for fold in folds:
            others = np.setdiff1d(np.arange(len(equations)), fold)
            values, _, _ = _solve(space, equations.rows(others), strength)
            left_out = equations.rows(fold)
            errors.append(np.abs(left_out.features @ values / left_out.seconds - 1))
        scores.append(float(np.concatenate(errors).mean()))
    # The strongest prior that is not clearly worse: what the data do not need stays at physics.
    best = min(scores)
    return next(strength for strength, score in zip(STRENGTHS, scores, strict=True) if score <= 1.02 * best)


def _deviations(scaled: Floats, residual: Floats, covariance: Floats) -> Floats:
    """Standard deviations that hold also where the noise grows with a span, or neighbours share theirs.

    The largest of three: equal and independent noise; each equation's own (White); neighbours' together, in blocks of
    sqrt(n) (cluster-robust). ``scaled`` and ``residual`` are in units of the noise.
    """
    found = [np.diag(covariance)]
    for width in (1, max(2, round(len(residual) ** 0.5))):
        edges = np.arange(0, len(residual), width)
        pushes = np.add.reduceat(scaled * residual[:, None], edges, axis=0)
        small = len(edges) / max(len(edges) - 1, 1)
        found.append(np.diag(covariance @ (small * pushes.T @ pushes) @ covariance))
    deviations: Floats = np.sqrt(np.max(found, axis=0))
    return deviations


def _what_was_seen(seen: Sequence[tuple[Batch, int]], coefficients: Sequence[FittedCoefficient]) -> list[str]:
    """Say what was not identified, what the run held, and what to record."""
    missing = [one.name for one in coefficients if not one.identified]
    if not missing:
        return []
    steps = [count for _, count in seen]
    sequences = np.repeat([batch.num_seqs for batch, _ in seen], steps)
    prefills = sum(count for batch, count in seen if batch.prefills)
    low, high = np.percentile(sequences, [5, 95])
    sentence = (
        f"not identified, so kept near the base profile: {', '.join(missing)}; batches held {low:.0f} to {high:.0f} "
        f"sequences, {prefills} of {sum(steps)} iterations computed prompts"
    )
    if low > 0.5 * high:
        sentence += "; record a run at a low rate, with batches of few sequences"
    elif prefills < 30:
        sentence += "; record a run with more prompts"
    return [sentence]


def _domain(batches: Sequence[Batch]) -> dict[str, Any]:
    """The range of batches that a fit has seen."""
    contexts = [context for batch in batches for context in batch.decode_contexts]
    return {
        "sequences": [min(batch.num_seqs for batch in batches), max(batch.num_seqs for batch in batches)],
        "tokens": [min(batch.num_tokens for batch in batches), max(batch.num_tokens for batch in batches)],
        "context": [min(contexts, default=0), max(contexts, default=0)],
    }


def call_units(learned: Container[str]) -> CallOverhead:
    """The units of the call's terms that were learned, 0 for the others."""
    units = {CALL_COMPONENTS[name]: unit if name in learned else 0.0 for name, unit in CALL_UNITS.items()}
    return CallOverhead(**units)


def with_coefficients(deployment: Deployment, coefficients: Sequence[FittedCoefficient]) -> Deployment:
    """Return the deployment with learned coefficients in force."""
    values = {one.name: one.value for one in coefficients}
    if isinstance(deployment.accelerator.device, Linear):
        seconds = {name: values.get(name, 0.0) * LINEAR_UNITS[name] for name in Linear.components}
        calls = {name: value for name, value in values.items() if name in CALL_COMPONENTS}
        accelerator = WithHost(Linear(seconds), HostOverhead(0.0, 0.0), calls, call_units(values))
    else:
        units = {HOST_COMPONENTS[name]: unit if name in values else 0.0 for name, unit in HOST_UNITS.items()}
        host = HostOverhead(**units, capture_sizes=deployment.accelerator.host.capture_sizes)
        accelerator = WithHost(deployment.accelerator.device, host, values, call_units(values))
    return replace(deployment, accelerator=accelerator)
