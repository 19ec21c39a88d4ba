"""Fitting on one part of the data and scoring on another, by construction.

Requests of one run share their queue, so they are never split at random: a part is a stretch of arrivals or a whole
trace. Every simulation serves all requests, since the engine did; only the stamps of the training part are fitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import numpy.typing as npt

from calibrate.aggregates import compare_aggregates, predict
from calibrate.batch_equations import impossible_requests
from calibrate.batches import predict_batches
from calibrate.errors import BATCH_METRICS, Comparison, bootstrap_interval
from calibrate.learners import Learner, learner_for
from profiles.deployment import Deployment
from profiles.errors import InputError
from replay.load_level import holds_aggregates
from replay.run import replay
from replay.trace import Trace

Rows = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.floating[Any]]
Run = tuple[Trace, Deployment]
SHAPE = "time:FRACTION, trace:PATTERN or kfold-time:K"


@dataclass(frozen=True)
class Part:
    """For each run, the rows that are fitted and the rows that are scored (None: no row)."""

    fitted: tuple[Rows | None, ...]
    scored: tuple[Rows | None, ...]


def parts(scheme: str, traces: Sequence[Trace]) -> list[Part]:
    """Split traces by a scheme.

    ``time:0.5`` fits the first half of each trace's arrivals and scores the rest; ``kfold-time:5`` scores each of five
    stretches after fitting the others; ``trace:PATTERN`` fits the other traces and scores those whose name fits
    the pattern (``*`` and ``?``). Batches are split whole.

    Raises
    ------
    InputError
        If the scheme is none of these, or leaves nothing to fit or score.
    """
    kind, _, value = scheme.partition(":")
    if kind == "trace":
        names = [trace.name for trace in traces]
        out = [name == value or fnmatchcase(name, value) for name in names]
        if all(out) or not any(out):
            raise InputError(
                f"{scheme!r}: expected a name or pattern of some, not all, of several traces: {', '.join(names)}",
                field="--holdout",
            )
        every = [np.ones(len(trace), dtype=bool) for trace in traces]
        return [
            Part(
                tuple(None if left else rows for left, rows in zip(out, every, strict=True)),
                tuple(rows if left else None for left, rows in zip(out, every, strict=True)),
            )
        ]
    whole = next((trace.name for trace in traces if holds_aggregates(trace)), None)
    if whole is not None:
        raise InputError(
            f"{scheme!r}: {whole} holds aggregates, which are of the whole run; expected trace:NAME", field="--holdout"
        )
    ranks = [_ranks(trace) for trace in traces]
    try:
        if kind == "time" and 0 < float(value) < 1:
            fitted = tuple(rank < float(value) for rank in ranks)
            return [Part(fitted, tuple(~rows for rows in fitted))]
        if kind == "kfold-time" and 2 <= int(value) <= 20:
            found = []
            for fold in range(int(value)):
                scored = tuple((rank * int(value)).astype(int) == fold for rank in ranks)
                found.append(Part(tuple(~rows for rows in scored), scored))
            return found
    except ValueError:
        pass
    raise InputError(f"{scheme!r}: expected {SHAPE}", field="--holdout")


def _ranks(trace: Trace) -> Floats:
    """Place of each request in order of arrival, 0 to below 1; the same for all requests of a batch."""
    arrival = trace.column("arrival")
    if trace.batches is not None:
        starts = np.argsort(np.argsort(trace.of_batches("start"), kind="stable"))
        ranks: Floats = np.append(starts, 0)[np.nan_to_num(trace.column("batch"), nan=-1).astype(int)] / starts.size
        return ranks
    ranks = np.argsort(np.argsort(arrival, kind="stable")) / max(len(trace), 1)
    return ranks


def simulate(
    runs: Sequence[Run], fit: Learner, wanted: Sequence[Rows | None], cold_start: bool = True
) -> list[Trace | None]:
    """Predict each run with what was learned; None for runs of which no row is wanted."""
    return [
        None if rows is None else _predicted(trace, fit.deployment(deployment), cold_start)
        for (trace, deployment), rows in zip(runs, wanted, strict=True)
    ]


def _predicted(trace: Trace, deployment: Deployment, cold_start: bool) -> Trace:
    if trace.batches is not None:
        return predict_batches(trace, deployment)
    return replay(trace, deployment, cold_start=cold_start).predicted


def cold_requests(predicted: Trace) -> frozenset[str]:
    """Ids of the requests whose measured cold start a prediction took over, which says nothing of the model."""
    cold = predicted.meta.get("cold_start")
    return frozenset([cold["request"]] if cold else [])


def compared(
    trace: Trace, predicted: Trace, rows: Rows, cold: frozenset[str], impossible: frozenset[str] = frozenset()
) -> Comparison:
    """Compare the rows that are scored, less the cold ones and those that cannot be true."""
    exclude: Mapping[str, frozenset[str]] = {
        "warmup": cold,
        "training": frozenset(one for one, scored_here in zip(trace.ids, rows, strict=True) if not scored_here),
        "impossible": impossible,
    }
    return Comparison(trace, predicted, "arrival", exclude)


def score(
    runs: Sequence[Run], fit: Learner, scored: Sequence[Rows | None], cold_start: bool = True
) -> list[Comparison]:
    """Simulate each run with what was learned and compare the rows that are scored; of a load level its aggregates."""
    found: list[Comparison] = []
    for (trace, base), rows in zip(runs, scored, strict=True):
        if rows is None:
            continue
        deployment = fit.deployment(base)
        if holds_aggregates(trace):
            found.append(compare_aggregates(trace, predict(trace, deployment)))
            continue
        predicted = _predicted(trace, deployment, cold_start)
        impossible = frozenset(impossible_requests(trace, base) if trace.batches is not None else ())
        found.append(compared(trace, predicted, rows, cold_requests(predicted), impossible))
    return found


def training_of(runs: Sequence[Run], part: Part) -> list[tuple[Trace, Deployment, Rows | None]]:
    """The runs that a part fits, with the rows whose stamps may be used."""
    return [
        (trace, deployment, rows)
        for (trace, deployment), rows in zip(runs, part.fitted, strict=True)
        if rows is not None
    ]


def hold_out(
    runs: Sequence[Run], scheme: str, strength: float | None, cold_start: bool = True
) -> list[tuple[Learner, list[Comparison]]]:
    """Fit and score every part of a scheme; the scored rows take no part in any choice of their fit."""
    results: list[tuple[Learner, list[Comparison]]] = []
    for part in parts(scheme, [trace for trace, _ in runs]):
        fit = learner_for(runs[0][1], strength)
        fit.fit(training_of(runs, part))
        results.append((fit, score(runs, fit, part.scored, cold_start)))
    return results


def mean_errors(comparisons: Sequence[Comparison]) -> dict[str, dict[str, Any]]:
    """Errors over several comparisons, each request (or batch, for the metrics of batches) counting once.

    Of a load level, its mean counts once. Intervals as in ``Comparison``.
    """
    found: dict[str, dict[str, Any]] = {}
    for metric in ("ttft", "tpot", "e2e", *BATCH_METRICS):
        pairs = [comparison.pairs(metric) for comparison in comparisons]
        measured: Any = np.concatenate([one for one, _ in pairs])
        predicted: Any = np.concatenate([one for _, one in pairs])
        fine = (measured > 0) & ~np.isnan(predicted)
        if fine.any():
            relative = predicted[fine] / measured[fine] - 1
            absolute = np.abs(relative)
            interval = bootstrap_interval(absolute, lambda sample: sample.mean(axis=1)) if absolute.size > 1 else None
            found[metric] = {
                "n": int(fine.sum()),
                "mape": float(absolute.mean()),
                "mape_ci95": interval and list(interval),
                "median_ape": float(np.median(absolute)),
                "bias": float(relative.mean()),
            }
    return found
