"""The Comparison of two traces: every request paired, every error signed. All reports are views of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from calibrate.load import Load, Series, series_of
from calibrate.pairing import Rows, pair
from profiles.errors import InputError
from replay.trace import Trace

Floats = npt.NDArray[np.float64]

METRICS = ("ttft", "tpot", "itl", "e2e", "queue_time")
PER_REQUEST = tuple(name for name in METRICS if name != "itl")
BATCH_METRICS = {"makespan": "makespan", "prompt_time": "prompt_seconds", "token_time": "token_seconds"}
"""Metrics per batch, and the columns of ``replay.trace.BATCHES`` that they are."""
PERCENTILES: Mapping[str, float | None] = {"mean": None, "p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0}
SMALLEST_QUEUE_TIME = 1e-3
"""Seconds. Relative errors of shorter measured queue times say nothing; they are left out of the MAPE."""
SMALLEST_GAP = 0.1
"""Share of the median inter-token gap. Shorter gaps are tokens that were delivered together; left out likewise."""
RESAMPLES = 200
RESAMPLED_AT_ONCE = 2_000_000
"""Values; what a bootstrap holds in memory stays of this size however long the trace."""
SEED = 20240815


@dataclass(frozen=True)
class Level:
    """A statistic of one metric, measured and predicted, in seconds; ``error`` signed and relative."""

    measured: float
    predicted: float
    error: float
    error_ci95: tuple[float, float]


@dataclass(frozen=True)
class MetricErrors:
    """Errors of one metric.

    ``mape`` (mean absolute relative error), ``median_ape`` and ``bias`` (mean signed relative error) are over
    the ``n`` pairs. Intervals are 95 % percentiles of a block bootstrap over arrival time.
    """

    n: int
    mape: float
    mape_ci95: tuple[float, float]
    median_ape: float
    bias: float
    percentiles: Mapping[str, Level]


@dataclass(frozen=True)
class Comparison:
    """Two traces, request by request.

    Parameters
    ----------
    measured, predicted : Trace
        Paired by request id.
    anchor : {"arrival", "queued"}
        What the measured latencies count from. Predicted ones always count from the arrival: a simulation
        has no second clock.
    exclude : mapping of str to set of str, optional
        Request ids to leave out, by reason.
    """

    measured: Trace
    predicted: Trace
    anchor: str = "arrival"
    exclude: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @cached_property
    def _paired(self) -> tuple[Rows, Rows, Mapping[str, int]]:
        """Rows of both traces that belong together, in order of arrival, and why others do not."""
        found = pair(self.measured, self.predicted, self.exclude)
        return found.measured, found.predicted, found.reasons

    @property
    def num_paired(self) -> int:
        """Requests that are compared."""
        return int(self._paired[0].size)

    @property
    def coverage(self) -> dict[str, Any]:
        """Counts of requests on both sides, of pairs, and of those left out by reason."""
        return {
            "measured": len(self.measured),
            "predicted": int(pc.sum(pc.equal(self.predicted.requests.column("status"), "ok")).as_py() or 0),
            "paired": self.num_paired,
            "excluded": dict(sorted(self._paired[2].items())),
            "unsupported": self.unsupported,
        }

    def pairs(self, metric: str) -> tuple[Floats, Floats]:
        """Measured and predicted seconds of the pairs, in order of arrival, NaN where one side has none.

        Metrics of ``BATCH_METRICS`` are per batch, of those whose requests are all compared.
        """
        if metric in BATCH_METRICS:
            some = self._paired_batches
            name = BATCH_METRICS[metric]
            return self.measured.of_batches(name)[some], self.predicted.of_batches(name)[some]
        mine, theirs, _ = self._paired
        anchor = "arrival" if metric == "tpot" else self.anchor
        return self.measured.latency(metric, anchor)[mine], self.predicted.latency(metric)[theirs]

    def samples(self, metric: str) -> tuple[Floats, Floats]:
        """Measured and predicted seconds of which a metric's percentiles are taken: of ITL, all gaps of the pairs."""
        if metric != "itl":
            measured, predicted = self.pairs(metric)
            both = ~(np.isnan(measured) | np.isnan(predicted))
            return measured[both], predicted[both]
        gaps = self._gaps
        return np.concatenate(gaps[0]), np.concatenate(gaps[1])

    @cached_property
    def _paired_batches(self) -> Rows:
        """Batches on both sides whose requests are all paired."""
        paired = set(self._paired[0].tolist())
        if self.measured.batches is None or self.predicted.batches is None:
            return np.empty(0, dtype=np.intp)
        rows = self.measured.rows_of_batches()[: self.predicted.batches.num_rows]
        return np.array([batch for batch, members in enumerate(rows) if paired.issuperset(members)], dtype=np.intp)

    @property
    def _names(self) -> tuple[str, ...]:
        return METRICS if self.measured.batches is None else (*BATCH_METRICS, *METRICS)

    @cached_property
    def metrics(self) -> dict[str, MetricErrors]:
        """Errors of every metric that both traces support."""
        found: dict[str, MetricErrors] = {}
        for metric in self._names:
            if metric in self.unsupported:
                continue
            if metric == "itl":
                found[metric] = self._itl()
                continue
            measured, predicted = self.pairs(metric)
            both = ~(np.isnan(measured) | np.isnan(predicted))
            found[metric] = _errors(measured[both], predicted[both], _least(metric))
        return found

    @cached_property
    def unsupported(self) -> dict[str, str]:
        """Metrics that cannot be compared, and why."""
        reasons: dict[str, str] = {}
        for metric in self._names:
            if metric == "itl":
                sides = {"measured": self.measured, "predicted": self.predicted}
                without = [side for side, trace in sides.items() if not trace.has("token_times")]
                if without:
                    reasons[metric] = f"the {' and the '.join(without)} trace has no token times"
                elif not all(any(one.size for one in gaps) for gaps in self._gaps):
                    reasons[metric] = "no request has it on both sides"
                continue
            measured, predicted = self.pairs(metric)
            if not (~np.isnan(measured)).any():
                reasons[metric] = "the measured trace has no pair with these stamps"
            elif not (~(np.isnan(measured) | np.isnan(predicted))).any():
                reasons[metric] = "no request has it on both sides"
        return reasons

    @cached_property
    def _gaps(self) -> tuple[list[Floats], list[Floats]]:
        """Inter-token gaps of each pair."""
        mine, theirs, _ = self._paired
        measured, predicted = self.measured.lists("token_times"), self.predicted.lists("token_times")
        return [_diff(measured[row]) for row in mine], [_diff(predicted[row]) for row in theirs]

    def _itl(self) -> MetricErrors:
        """Gaps pooled over requests; gap by gap where a request has as many on both sides."""
        measured, predicted = self._gaps
        same = [(left, right) for left, right in zip(measured, predicted, strict=True) if left.size == right.size]
        paired = _relative(
            np.concatenate([left for left, _ in same] or [np.empty(0)]),
            np.concatenate([right for _, right in same] or [np.empty(0)]),
            SMALLEST_GAP * _level(np.concatenate(measured), 50.0),
        )
        pooled_measured, pooled_predicted = np.concatenate(measured), np.concatenate(predicted)
        levels = {}
        for name, percentile in PERCENTILES.items():
            left, right = _level(pooled_measured, percentile), _level(pooled_predicted, percentile)
            levels[name] = Level(left, right, right / left - 1 if left else np.nan, (np.nan, np.nan))
        absolute = np.abs(paired)
        return MetricErrors(
            n=int(paired.size),
            mape=_mean(absolute),
            mape_ci95=bootstrap_interval(absolute, lambda sample: sample.mean(axis=1)),
            median_ape=float(np.median(absolute)) if absolute.size else np.nan,
            bias=_mean(paired),
            percentiles=levels,
        )

    @cached_property
    def throughput(self) -> dict[str, dict[str, float]]:
        """Output tokens per second and makespan of the pairs, from the first arrival to the last token."""
        if self.measured.batches is not None:
            return self._throughput_of_batches()
        mine, theirs, _ = self._paired
        spans, rates = [], []
        for trace, rows in ((self.measured, mine), (self.predicted, theirs)):
            last, start = trace.column("last_token")[rows], trace.start[rows]
            ended = last[~np.isnan(last)]
            span = float(ended.max() - np.nanmin(start)) if ended.size else np.nan
            spans.append(span)
            rates.append(float(np.nansum(trace.column("output_tokens")[rows])) / span if span > 0 else np.nan)
        return {"output_tokens_per_s": _versus(*rates), "makespan": _versus(*spans)}

    def _throughput_of_batches(self) -> dict[str, dict[str, float]]:
        """The same over the batches that have a makespan, one after the other."""
        measured, predicted = self.pairs("makespan")
        fine = ~(np.isnan(measured) | np.isnan(predicted))
        rows = [self.measured.rows_of_batches()[batch] for batch in self._paired_batches[fine]]
        tokens = float(self.measured.column("output_tokens")[[row for some in rows for row in some]].sum())
        spans = [float(some[fine].sum()) if fine.any() else np.nan for some in (measured, predicted)]
        return {
            "output_tokens_per_s": _versus(*(tokens / span if span > 0 else np.nan for span in spans)),
            "makespan": _versus(*spans),
        }

    @cached_property
    def timeline(self) -> dict[str, dict[str, float]]:
        """Mean absolute error and means of the engine gauges, at the measured instants while requests ran."""
        if self.measured.timeline is None or self.predicted.timeline is None:
            return {}
        begin = np.fmin.reduce(self.measured.start, initial=np.inf)
        end = np.fmax.reduce(self.measured.column("last_token"), initial=-np.inf)
        time = np.asarray(self.measured.timeline.column("time").to_numpy(zero_copy_only=False), dtype=np.float64)
        ran = (time >= begin) & (time <= end)
        found = {}
        for name in ("running", "waiting", "kv_usage"):
            measured, predicted = (
                np.asarray(trace.timeline.column(name).to_numpy(zero_copy_only=False), dtype=np.float64)
                for trace in (self.measured, self.predicted)
                if trace.timeline is not None
            )
            if measured.size != predicted.size:
                continue
            both = ran & ~(np.isnan(measured) | np.isnan(predicted))
            if both.any():
                found[name] = {
                    "mae": float(np.abs(predicted[both] - measured[both]).mean()),
                    "measured_mean": float(measured[both].mean()),
                    "predicted_mean": float(predicted[both].mean()),
                }
        return found

    def series(self) -> dict[str, Series]:
        """Quantities over time, measured and predicted, by name.

        ``running``, ``waiting`` (requests; ``in_flight`` where schedule stamps are missing), ``kv_usage`` (0 to 1),
        ``output_tokens_per_s``; over all requests of either trace, not only the pairs. See ``calibrate.load``.
        """
        if self.measured.batches is not None:
            return {}
        return series_of(self.measured, self.predicted, self._begin)

    @cached_property
    def _begin(self) -> tuple[float, float]:
        """First arrival of the measured run, on the clocks of both sides; they are aligned at the first pair."""
        first = float(np.fmin.reduce(self.measured.start, initial=np.inf))
        mine, theirs, _ = self._paired
        one, other = self.measured.start[mine], self.predicted.start[theirs]
        return first, first + float(np.fmin.reduce(other, initial=np.inf) - np.fmin.reduce(one, initial=np.inf))

    @cached_property
    def at_arrival(self) -> dict[str, Floats]:
        """What each pair met when it arrived, from the stamps of all measured requests; NaN where unknown.

        ``arrival_s`` (s from the first arrival), ``concurrency`` (running requests; those in flight where the trace
        has no schedule stamps), ``waiting`` (requests), each of shape (pairs,).
        """
        times, load = self.measured.start[self._paired[0]], Load(self.measured)
        unknown = np.full(times.size, np.nan)
        return {
            "arrival_s": times - self._begin[0],
            "concurrency": load.concurrency(times),
            "waiting": load.waiting(times) if load.has_schedule else unknown,
        }

    def requests_table(self) -> pa.Table:
        """All pairs, in order of arrival, one row a request.

        Columns ``id``, ``arrival_s`` (s from the first arrival), ``prompt_tokens``, ``output_tokens``,
        ``cached_tokens`` (as measured), ``predicted_cached_tokens``, ``concurrency`` and ``waiting`` (requests at its
        arrival, as ``at_arrival``), and for every metric that is per request ``<metric>_measured``,
        ``<metric>_predicted`` (s) and ``<metric>_error`` (signed, relative; of queue times only from 1 ms on). Null
        where unknown.
        """
        mine, theirs, _ = self._paired
        taken = self.measured.requests.select(["id", "prompt_tokens", "output_tokens", "cached_tokens"]).take(mine)
        met = self.at_arrival
        columns = {
            "id": taken.column("id"),
            "arrival_s": _nullable(met["arrival_s"]),
            **{name: taken.column(name) for name in ("prompt_tokens", "output_tokens", "cached_tokens")},
            "predicted_cached_tokens": self.predicted.requests.column("cached_tokens").take(theirs),
            "concurrency": _nullable(met["concurrency"]).cast(pa.int64()),
            "waiting": _nullable(met["waiting"]).cast(pa.int64()),
        }
        for metric in PER_REQUEST:
            measured, predicted = self.pairs(metric)
            error = _relative_or_nan(measured, predicted, _least(metric))
            values = {"measured": measured, "predicted": predicted, "error": error}
            columns |= {f"{metric}_{name}": _nullable(one) for name, one in values.items()}
        return pa.table(columns)


def compare(measured: Trace, predicted: Trace, anchor: str = "arrival") -> Comparison:
    """Pair two traces; what the predicted one declares as cold start is left out as warm-up.

    Raises
    ------
    InputError
        If no request can be compared, or the anchor was not measured.
    """
    if anchor == "queued" and not measured.has("queued"):
        raise InputError(f"{measured.name} has no queue stamps", field="--anchor")
    cold = predicted.meta.get("cold_start")
    warmup = frozenset([cold["request"]] if cold else [])
    comparison = Comparison(measured, predicted, anchor, {"warmup": warmup})
    if not comparison.num_paired:
        reasons = comparison.coverage["excluded"]
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        raise InputError(f"{measured.name}: no request can be compared ({why})")
    return comparison


def _diff(times: list[Any] | None) -> Floats:
    return np.diff(np.asarray(times or [], dtype=np.float64))


def _relative(measured: Floats, predicted: Floats, least: float = 0.0) -> Floats:
    """Signed relative errors of the pairs whose measured value is above ``least``."""
    fine = measured > least
    return predicted[fine] / measured[fine] - 1


def _relative_or_nan(measured: Floats, predicted: Floats, least: float = 0.0) -> Floats:
    """The same for every pair, NaN where there is none."""
    return predicted / np.where(measured > least, measured, np.nan) - 1


def _least(metric: str) -> float:
    return SMALLEST_QUEUE_TIME if metric == "queue_time" else 0.0


def _nullable(values: Floats) -> pa.Array:
    return pa.array(values, from_pandas=True)


def _errors(measured: Floats, predicted: Floats, least: float) -> MetricErrors:
    relative = _relative(measured, predicted, least)
    absolute = np.abs(relative)
    levels = {}
    for name, percentile in PERCENTILES.items():
        left, right = _level(measured, percentile), _level(predicted, percentile)
        interval = bootstrap_interval(
            np.stack([measured, predicted], axis=-1), partial(_level_error, percentile=percentile)
        )
        levels[name] = Level(left, right, right / left - 1 if left > 0 else np.nan, interval)
    return MetricErrors(
        n=int(relative.size),
        mape=_mean(absolute),
        mape_ci95=bootstrap_interval(absolute, lambda sample: sample.mean(axis=1)),
        median_ape=float(np.median(absolute)) if absolute.size else np.nan,
        bias=_mean(relative),
        percentiles=levels,
    )


def _level(values: Floats, percentile: float | None) -> float:
    if not values.size:
        return np.nan
    return float(values.mean() if percentile is None else np.percentile(values, percentile))


def _level_error(sample: Floats, percentile: float | None) -> Floats:
    """Relative error of a statistic for each resample; sample has shape (resamples, n, 2)."""
    levels = sample.mean(axis=1) if percentile is None else np.percentile(sample, percentile, axis=1)
    measured = np.where(levels[:, 0] > 0, levels[:, 0], np.nan)
    return np.asarray(levels[:, 1] / measured - 1, dtype=np.float64)


def _mean(values: Floats) -> float:
    return float(values.mean()) if values.size else np.nan


def bootstrap_interval(values: Floats, statistic: Callable[[Floats], Floats]) -> tuple[float, float]:
    """95 % interval of a statistic by a circular-block bootstrap over the values' order (arrival time).

    Requests that are served together share their queue, so blocks of about sqrt(n) neighbours are drawn. After
    the last value comes the first, so that those at the ends are drawn as often as others.
    """
    count = len(values)
    if count < 2:
        return (np.nan, np.nan)
    width = max(1, round(count**0.5))
    random = np.random.default_rng(SEED)
    starts = random.integers(0, count, size=(RESAMPLES, -(-count // width)))
    found = []
    for some in np.array_split(starts, min(RESAMPLES, -(-RESAMPLES * count // RESAMPLED_AT_ONCE))):
        rows = (some[:, :, None] + np.arange(width)).reshape(len(some), -1)[:, :count] % count
        found.append(statistic(values[rows]))
    statistics = np.concatenate(found)
    known = statistics[~np.isnan(statistics)]
    if not known.size:
        return (np.nan, np.nan)
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)


def _versus(measured: float, predicted: float) -> dict[str, float]:
    error = predicted / measured - 1 if measured else np.nan
    return {"measured": measured, "predicted": predicted, "error": error}
