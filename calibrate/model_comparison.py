"""Ranking ways to model an accelerator by what they predict of the same held-out requests.

Every class is fitted to the same part, runs the same engine, and is scored on the same requests, or batches. The
criterion is the mean of the held-out MAPEs of TTFT, TPOT and E2E, or of what was measured of batches. Whether two
classes differ is told from their differences request by request: what is hard to predict in a run is so for both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from calibrate.batch_equations import impossible_requests
from calibrate.errors import BATCH_METRICS, Comparison, bootstrap_interval
from calibrate.holdout import Part, Run, cold_requests, compared, mean_errors, parts, simulate, training_of
from calibrate.inference import resolved
from calibrate.learners import learner_for
from calibrate.sanity import refuse_nonsense
from profiles.deployment import Deployment, resolve
from profiles.errors import InputError
from profiles.profile import LoadedProfile, load_profile
from replay.load_level import holds_aggregates
from replay.run import facts_of
from replay.trace import Trace
from simulator.errors import SimulationError

Floats = npt.NDArray[np.float64]
METRICS = ("ttft", "tpot", "e2e")


@dataclass(frozen=True)
class Candidate:
    """A base profile, fitted to every part of a scheme and scored on what it left out.

    Attributes
    ----------
    base : LoadedProfile
    held_out, fitted_part : dict
        Errors by metric (``holdout.mean_errors``) of the requests that were held out, and of those that were fitted, by
        the same fits.
    criterion : float
        Mean of the held-out MAPEs.
    criterion_ci95 : (float, float)
        By a block bootstrap over arrivals.
    behind : float
        By how much its criterion is above that of the first.
    behind_ci95 : (float, float)
        Of that difference, request by request; both 0 for the first.
    coefficients : int
        Numbers that were learned; the most of any part.
    seconds : float
        That fitting took, per part.
    """

    base: LoadedProfile
    held_out: dict[str, dict[str, Any]]
    fitted_part: dict[str, dict[str, Any]]
    criterion: float
    criterion_ci95: tuple[float, float]
    behind: float
    behind_ci95: tuple[float, float]
    coefficients: int
    seconds: float

    @property
    def tied(self) -> bool:
        """Whether the data cannot tell it from the first: the interval of the difference holds 0."""
        return self.behind_ci95[0] <= 0


@dataclass(frozen=True)
class Ranking:
    """Candidates, best first, and how they were ranked.

    Attributes
    ----------
    candidates : list of Candidate
    metrics : tuple of str
        Whose held-out MAPEs are averaged.
    failed : dict
        The bases that could not be fitted, and why.
    assumed : dict
        Engine arguments assumed, by trace.
    warnings : list of str
        What of the traces makes the ranking less sure.
    """

    candidates: list[Candidate]
    metrics: tuple[str, ...]
    failed: dict[str, str]
    assumed: dict[str, dict[str, Any]]
    warnings: list[str]


@dataclass
class _Entrant:
    """A base on its way: its runs, and by part what was learned and predicted."""

    base: LoadedProfile
    runs: list[Run]
    predicted: list[list[Trace | None]]
    warnings: list[str]
    coefficients: int = 0
    seconds: float = 0.0

    def enter(self, part: Part, strength: float | None, cold_start: bool) -> None:
        """Fit a part, and predict all runs that it fits or scores."""
        begun = time.perf_counter()
        fit = learner_for(self.runs[0][1], strength)
        fit.fit(training_of(self.runs, part))
        self.seconds += time.perf_counter() - begun
        self.warnings += fit.warnings_
        self.coefficients = max(self.coefficients, fit.num_coefficients_)
        wanted = [one if one is not None else other for one, other in zip(part.scored, part.fitted, strict=True)]
        self.predicted.append(simulate(self.runs, fit, wanted, cold_start))


def rank(
    traces: Sequence[Trace],
    bases: Sequence[str],
    scheme: str,
    *,
    settings: tuple[str, ...] = (),
    model: str | None = None,
    assume_defaults: bool = False,
    strength: float | None = None,
    cold_start: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Ranking:
    """Fit each base to the same parts of the traces and rank them by the error of what was held out.

    Parameters
    ----------
    traces : sequence of Trace
    bases : sequence of str
        What ``load_profile`` takes.
    scheme : str
        What ``holdout.parts`` takes.
    settings, model, assume_defaults
        As for ``resolve``.
    strength : float, optional
        As for ``ProfileFit``.
    cold_start : bool
        As for ``replay.run.replay``.
    progress : callable, optional
        Called with the number of fits that have ended.

    Raises
    ------
    InputError
        If the scheme is none, a base is named twice, a trace cannot be fitted, or no base can.
    """
    if len(set(bases)) < len(bases):
        raise InputError("names a base twice", field="--compare")
    whole = next((trace.name for trace in traces if holds_aggregates(trace)), None)
    if whole is not None:
        raise InputError(f"{whole} holds aggregates; bases are ranked request by request", field="--compare")
    if len({trace.batches is None for trace in traces}) > 1:
        raise InputError("batches and requests are not ranked together: compare them one after the other")
    split = parts(scheme, traces)
    loaded, failed = _loaded(bases)
    assumed = [_assumed(trace, loaded, settings, model, assume_defaults) for trace in traces]
    entrants: list[_Entrant] = []
    done = 0
    for base in loaded:
        try:
            runs = [
                (trace, _resolved(base, trace, values, settings, model, assume_defaults))
                for trace, values in zip(traces, assumed, strict=True)
            ]
            doubts = [line for run in runs for line in refuse_nonsense(*run)]
            entrant = _Entrant(base, runs, [], doubts)
            for part in split:
                entrant.enter(part, strength, cold_start)
                done += 1
                if progress is not None:
                    progress(done)
            entrants.append(entrant)
        except (InputError, SimulationError) as error:
            failed[base.origin] = str(error)
    failed = {name: failed[name] for name in bases if name in failed}
    if not entrants:
        raise InputError("none can be fitted: " + "; ".join(f"{name}: {why}" for name, why in failed.items()))
    by_trace = {trace.name: values for trace, values in zip(traces, assumed, strict=True) if values}
    warnings = list(dict.fromkeys(line for entrant in entrants for line in entrant.warnings))
    metrics = METRICS if traces[0].batches is None else tuple(BATCH_METRICS)
    candidates, known = _ranked(entrants, split, metrics)
    return Ranking(candidates, known, failed, by_trace, warnings)


def _loaded(bases: Sequence[str]) -> tuple[list[LoadedProfile], dict[str, str]]:
    """Return the profiles of those names, and by name why others cannot be had."""
    loaded: list[LoadedProfile] = []
    failed: dict[str, str] = {}
    for name in bases:
        try:
            loaded.append(load_profile(name))
        except InputError as error:
            failed[name] = str(error)
    return loaded, failed


def _resolved(
    base: LoadedProfile,
    trace: Trace,
    assumed: Mapping[str, Any],
    settings: tuple[str, ...],
    model: str | None,
    assume_defaults: bool,
) -> Deployment:
    """The deployment of a base with what is assumed for all; a fit may still infer that from its part of the run."""
    own = {name: value for name, value in assumed.items() if name not in base.profile.engine}
    every = (*(f"engine.{name}={value}" for name, value in own.items()), *settings)
    found = resolved(base, trace, settings=every, model=model, assume_defaults=assume_defaults)
    return replace(found, assumed={**found.assumed, **own})


def _assumed(
    trace: Trace, loaded: Sequence[LoadedProfile], settings: tuple[str, ...], model: str | None, assume_defaults: bool
) -> dict[str, Any]:
    """Engine arguments that nobody says, as the first base that can tell them assumes them, for all to run with.

    What is assumed may depend on the hardware, which not every base knows; the run had one engine.
    """
    for base in loaded:
        try:
            found = resolve(base, facts_of(trace), settings=settings, model=model, assume_defaults=assume_defaults)
        except InputError:
            continue
        return dict(found.assumed)
    return {}


def _ranked(
    entrants: Sequence[_Entrant], split: Sequence[Part], metrics: tuple[str, ...]
) -> tuple[list[Candidate], tuple[str, ...]]:
    """Score all on the same requests, and order them by their criterion; also return the metrics that count."""
    held_out: list[list[Comparison]] = [[] for _ in entrants]
    fitted: list[list[Comparison]] = [[] for _ in entrants]
    traces = [trace for trace, _ in entrants[0].runs]
    for number, part in enumerate(split):
        for place, trace in enumerate(traces):
            predictions = [entrant.predicted[number][place] for entrant in entrants]
            there = [one for one in predictions if one is not None]
            leave_out = frozenset[str]().union(*(cold_requests(one) | _not_served(one) for one in there))
            impossible = [
                impossible_requests(*entrant.runs[place]) for entrant in entrants if trace.batches is not None
            ]
            leave_out = leave_out.union(*impossible)
            for rows, found in ((part.scored[place], held_out), (part.fitted[place], fitted)):
                for mine, predicted in zip(found, predictions, strict=True):
                    if rows is not None and predicted is not None:
                        mine.append(compared(trace, predicted, rows, leave_out))
    errors = [_errors(comparisons, metrics) for comparisons in held_out]
    if not (~np.isnan(errors[0])).any():
        raise InputError("no held-out request can be compared")
    known: Any = (~np.isnan(errors[0])).any(axis=0)
    errors = [one[:, known] for one in errors]
    criteria = [float(_criterion(one)) for one in errors]
    first = int(np.argmin(criteria))
    candidates = [
        Candidate(
            base=entrants[place].base,
            held_out=mean_errors(held_out[place]),
            fitted_part=mean_errors(fitted[place]),
            criterion=criteria[place],
            criterion_ci95=bootstrap_interval(errors[place], _criterion),
            behind=criteria[place] - criteria[first],
            behind_ci95=bootstrap_interval(errors[place] - errors[first], _criterion),
            coefficients=entrants[place].coefficients,
            seconds=entrants[place].seconds / len(split),
        )
        for place in np.argsort(criteria, kind="stable").tolist()
    ]
    return candidates, tuple(metric for metric, there in zip(metrics, known, strict=True) if there)


def _not_served(predicted: Trace) -> frozenset[str]:
    return frozenset(one for one, status in zip(predicted.ids, predicted.statuses, strict=True) if status != "ok")


def _errors(comparisons: Sequence[Comparison], metrics: Sequence[str]) -> Floats:
    """Absolute relative errors, shape (requests or batches, metrics), NaN where one has no such metric."""
    columns = []
    for metric in metrics:
        pairs = [comparison.pairs(metric) for comparison in comparisons]
        measured, predicted = (np.concatenate(side) for side in zip(*pairs, strict=True))
        columns.append(np.abs(predicted / np.where(measured > 0, measured, np.nan) - 1))
    return np.stack(columns, axis=-1)


def _criterion(errors: Floats) -> Floats:
    """Mean over the metrics of the means over the requests; errors has shape (..., requests, metrics)."""
    known = ~np.isnan(errors)
    sums = np.where(known, errors, 0.0).sum(axis=-2)
    return np.asarray((sums / np.maximum(known.sum(axis=-2), 1)).mean(axis=-1))
