"""The Comparison of two traces: every request paired, every error signed. All reports are views of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from calibrate.anchors import ANCHORED, AnchorErrors, AnchorGap, anchors_of, gap_of, served_of
from calibrate.gaps import Gaps, gaps_of
from calibrate.intervals import Interval, Pool, Resamples
from calibrate.intervals import bootstrap_interval as bootstrap_interval  # its users import it from here
from calibrate.load import GAUGES, Load, Series, gauge, series_of
from calibrate.metric_errors import LABELS, Distance, distance_of, errors_of, errors_of_pairs, relative_errors
from calibrate.metric_errors import PERCENTILES as PERCENTILES
from calibrate.metric_errors import Level as Level
from calibrate.metric_errors import MetricErrors as MetricErrors
from calibrate.pairing import Rows, pair, served
from calibrate.slices import ARRIVALS, Slice, WorstSlice, group_by, slice_errors, worst_slices
from calibrate.throughput import between_ends, throughput_intervals
from profiles.errors import InputError
from replay.trace import Trace

Floats = npt.NDArray[np.float64]

METRICS = ("ttft", "tpot", "itl", "e2e", "queue_time")
PER_REQUEST = tuple(name for name in METRICS if name != "itl")
BATCH_METRICS = {"makespan": "makespan", "prompt_time": "prompt_seconds", "token_time": "token_seconds"}
"""Metrics per batch, and the columns of ``replay.trace.BATCHES`` that they are."""
SMALLEST_QUEUE_TIME = 1e-3
"""Seconds. Relative errors of shorter measured queue times say nothing; they are left out of the MAPE."""
SMALLEST_GAP = 0.1
"""Share of the median inter-token gap. Shorter gaps are tokens that were delivered together; left out likewise."""


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
    def rows(self) -> tuple[Rows, Rows]:
        """Rows of the measured and of the predicted trace that are compared, in order of arrival."""
        return self._paired[:2]

    @property
    def num_paired(self) -> int:
        """Requests that are compared."""
        return int(self._paired[0].size)

    @property
    def coverage(self) -> dict[str, Any]:
        """Counts of requests on both sides, of pairs, and of those left out by reason."""
        return {
            "measured": len(self.measured),
            "predicted": int(served(self.predicted).sum()),
            "paired": self.num_paired,
            "excluded": dict(sorted(self._paired[2].items())),
            "unsupported": self.unsupported,
        }

    def pairs(self, metric: str, anchor: str | None = None) -> tuple[Floats, Floats]:
        """Measured and predicted seconds of the pairs, in order of arrival, NaN where one side has none.

        By the comparison's anchor if none is given. Metrics of ``BATCH_METRICS`` are per batch, of those whose
        requests are all compared.
        """
        if metric in BATCH_METRICS:
            some = self._paired_batches
            name = BATCH_METRICS[metric]
            return self.measured.of_batches(name)[some], self.predicted.of_batches(name)[some]
        mine, theirs, _ = self._paired
        anchor = "arrival" if metric == "tpot" else anchor or self.anchor
        return self.measured.latency(metric, anchor)[mine], self.predicted.latency(metric)[theirs]

    def samples(self, metric: str) -> tuple[Floats, Floats]:
        """Measured and predicted seconds of which a metric's percentiles are taken: of ITL, all gaps of the pairs."""
        if metric != "itl":
            measured, predicted = self.pairs(metric)
            both = ~(np.isnan(measured) | np.isnan(predicted))
            return measured[both], predicted[both]
        gaps = self._gaps
        return gaps[0].pool.values, gaps[1].pool.values

    @cached_property
    def _paired_batches(self) -> Rows:
        """Batches on both sides whose requests are all paired."""
        if self.measured.batches is None or self.predicted.batches is None:
            return np.empty(0, dtype=np.intp)
        paired = set(self._paired[0].tolist())
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
            found[metric] = errors_of_pairs(measured, predicted, _least(metric), self._resamples(metric))
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
                elif not all(gaps.pool.values.size for gaps in self._gaps):
                    reasons[metric] = "no request has it on both sides"
                continue
            measured, predicted = self.pairs(metric)
            if not (~np.isnan(measured)).any():
                reasons[metric] = "the measured trace has no pair with these stamps"
            elif not (~(np.isnan(measured) | np.isnan(predicted))).any():
                reasons[metric] = "no request has it on both sides"
        return reasons

    @cached_property
    def _gaps(self) -> tuple[Gaps, Gaps]:
        """Inter-token gaps of each pair."""
        mine, theirs, _ = self._paired
        return gaps_of(self.measured, mine), gaps_of(self.predicted, theirs)

    def _itl(self) -> MetricErrors:
        """Gaps pooled over requests; gap by gap where a request has as many on both sides."""
        measured, predicted = self._gaps
        same = measured.counts == predicted.counts
        left, right = measured.pool.of_requests(same), predicted.pool.of_requests(same)
        relative = relative_errors(left.values, right.values, SMALLEST_GAP * float(np.median(measured.pool.values)))
        fine = ~np.isnan(relative)
        paired = Pool(left.places[fine], relative[fine])
        return errors_of(measured.pool, predicted.pool, paired, self._resamples("itl"))

    @cached_property
    def _drawn(self) -> tuple[Resamples, Resamples]:
        return Resamples(self.num_paired), Resamples(self._paired_batches.size)

    def _resamples(self, metric: str) -> Resamples:
        """Resamples of the requests, or of the batches for metrics per batch."""
        return self._drawn[metric in BATCH_METRICS]

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
    def throughput_ci95(self) -> dict[str, Interval]:
        """95 % intervals of the errors of ``throughput`` (``calibrate.throughput``)."""
        if self.measured.batches is not None:
            measured, predicted = self.pairs("makespan")
            fine = ~(np.isnan(measured) | np.isnan(predicted))
            return throughput_intervals(measured[fine], predicted[fine])
        mine, theirs, _ = self._paired
        both = ~np.isnan(self.measured.column("last_token")[mine] + self.predicted.column("last_token")[theirs])
        sides = (self.measured, mine[both]), (self.predicted, theirs[both])
        left, right = (between_ends(trace.start[rows], trace.column("last_token")[rows]) for trace, rows in sides)
        tokens = [float(np.nansum(trace.column("output_tokens")[rows])) for trace, rows in sides]
        return throughput_intervals(left, right, tokens[1] / tokens[0] if tokens[0] else np.nan)

    @cached_property
    def distances(self) -> dict[str, Distance]:
        """Distance of the two distributions, by metric; of the requests (or gaps) that ``metrics`` are of."""
        found = {}
        for metric in self.metrics:
            if metric == "itl":
                found[metric] = distance_of(*(side.pool.values for side in self._gaps))
                continue
            measured, predicted = self.pairs(metric)
            both = ~(np.isnan(measured) | np.isnan(predicted))
            found[metric] = distance_of(measured[both], predicted[both])
        return found

    @cached_property
    def slices(self) -> dict[str, dict[str, tuple[Slice, ...]]]:
        """Errors per slice of the requests, by metric and by what is sliced.

        ``prompt_tokens``, ``output_tokens``, ``arrival_s``, ``concurrency``, the load (``waiting`` requests at arrival,
        or ``arrival_rate`` where none waits or it is not known), and ``cached_share`` of the prompt
        (``predicted_cached_share`` where it was not measured). Edges are quartiles. What is the same for all is absent.
        """
        groupings = {name: group_by(values) for name, values in self._sliced_by().items()}
        resamples = self._resamples("ttft")
        found = {}
        for metric in (name for name in PER_REQUEST if name in self.metrics):
            errors = relative_errors(*self.pairs(metric), _least(metric))
            by = {name: slice_errors(one, errors, resamples) for name, one in groupings.items() if one is not None}
            found[metric] = {name: slices for name, slices in by.items() if slices}
        return found

    def _sliced_by(self) -> dict[str, Floats]:
        mine, theirs, _ = self._paired
        met, prompt = self.at_arrival, self.measured.column("prompt_tokens")[mine]
        keys = {
            "prompt_tokens": prompt,
            "output_tokens": self.measured.column("output_tokens")[mine],
            "arrival_s": met["arrival_s"],
            "concurrency": met["concurrency"],
        }
        if np.nanmax(met["waiting"], initial=0.0) > 0:
            keys["waiting"] = met["waiting"]
        else:
            times, span = self.measured.start[mine], np.ptp(met["arrival_s"])
            if span > 0:
                keys["arrival_rate"] = Load(self.measured).arrival_rate(times, ARRIVALS * span / times.size)
        if self.measured.has("cached_tokens"):
            keys["cached_share"] = self.measured.column("cached_tokens")[mine] / prompt
        else:
            keys["predicted_cached_share"] = self.predicted.column("cached_tokens")[theirs] / prompt
        return keys

    @cached_property
    def worst_slices(self) -> list[WorstSlice]:
        """The slice of each metric that is worst, if it is worse than the rest beyond the noise."""
        return worst_slices(self.slices, self._resamples("ttft").blocks, LABELS)

    @cached_property
    def anchors(self) -> dict[str, AnchorErrors]:
        """Errors by every anchor that the trace has stamps for, whichever was chosen."""
        return {
            anchor: AnchorErrors(
                {metric: errors for metric in ANCHORED if (errors := self._errors(metric, anchor)) is not None},
                served_of(self.measured, anchor),
            )
            for anchor in anchors_of(self.measured)
        }

    def _errors(self, metric: str, anchor: str) -> MetricErrors | None:
        """Errors of a metric per request or batch; None if no pair has it."""
        if anchor == self.anchor and metric in self.metrics:
            return self.metrics[metric]
        measured, predicted = self.pairs(metric, anchor)
        if np.isnan(measured + predicted).all():
            return None
        return errors_of_pairs(measured, predicted, _least(metric), self._resamples(metric))

    @cached_property
    def anchor_gap(self) -> AnchorGap | None:
        """How far the anchors lie apart, None if the trace has but one."""
        return gap_of(self.measured)

    @cached_property
    def timeline(self) -> dict[str, dict[str, float]]:
        """Mean absolute error and means of the engine gauges, at the measured instants while requests ran."""
        if self.measured.timeline is None or self.predicted.timeline is None:
            return {}
        begin = np.fmin.reduce(self.measured.start, initial=np.inf)
        end = np.fmax.reduce(self.measured.column("last_token"), initial=-np.inf)
        time = gauge(self.measured, "time")
        ran = (time >= begin) & (time <= end)
        found = {}
        for name in GAUGES:
            measured, predicted = gauge(self.measured, name), gauge(self.predicted, name)
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
        if self.measured.batches is not None or not np.isfinite(self._begin).all():
            return {}
        return series_of(self.measured, self.predicted, self._begin)

    @cached_property
    def _begin(self) -> tuple[float, float]:
        """First arrival of the measured run, on the clocks of both sides; they are aligned at the first pair."""
        first = float(np.fmin.reduce(self.measured.start, initial=np.inf))
        mine, theirs, _ = self._paired
        one, other = self.measured.start[mine], self.predicted.start[theirs]
        if not mine.size:
            return first, first
        return first, first + float(np.fmin.reduce(other, initial=np.inf) - np.fmin.reduce(one, initial=np.inf))

    @cached_property
    def at_arrival(self) -> dict[str, Floats]:
        """What each pair met when it arrived, from the stamps of all measured requests; NaN where unknown.

        ``arrival_s`` (s from the first arrival), ``concurrency`` (running requests; those in flight where the trace
        has no schedule stamps), ``waiting`` (requests), each of shape (pairs,).
        """
        times, load = self.measured.start[self._paired[0]], Load(self.measured)
        waiting = load.waiting(times) if load.has_schedule else np.nan
        return {
            "arrival_s": times - self._begin[0],
            "concurrency": np.where(np.isnan(times), np.nan, load.concurrency(times)),
            "waiting": np.where(np.isnan(times), np.nan, waiting),
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
            error = relative_errors(measured, predicted, _least(metric))
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


def _least(metric: str) -> float:
    return SMALLEST_QUEUE_TIME if metric == "queue_time" else 0.0


def _nullable(values: Floats) -> pa.Array:
    return pa.array(values, from_pandas=True)


def _versus(measured: float, predicted: float) -> dict[str, float]:
    error = predicted / measured - 1 if measured else np.nan
    return {"measured": measured, "predicted": predicted, "error": error}
