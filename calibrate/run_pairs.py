"""Which requests of two runs belong together: by id, by order, or not at all.

Pairs cancel what the workload does, so that far smaller differences show. Where the requests differ, only the
distributions can be compared, and a difference may be the workload's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.stats import ks_2samp

from calibrate.errors import BATCH_METRICS, METRICS, PERCENTILES, Comparison, Level, bootstrap_interval
from calibrate.estimates import NONE, Coverage, Estimate, Interval, widened
from profiles.errors import InputError
from replay.trace import REQUEST_CLOCK, Trace

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.intp]
SAME_PROMPTS = 0.9
"""Share of equal prompt lengths from which on two runs are of one workload; by chance far fewer are equal."""
ENOUGH = 0.5
"""Share of the smaller run that must be paired."""
OTHER_PACE = 0.05
"""Relative difference of the mean arrival rates that is worth a word."""
DIFFERENT = "the requests differ, so none is paired with another"


@dataclass(frozen=True)
class Distribution:
    """One metric of two runs of different requests.

    ``n`` are the counts, ``distance`` is the Kolmogorov-Smirnov one: the largest gap between the two CDFs.
    """

    n: tuple[int, int]
    distance: float
    percentiles: Mapping[str, Level]


@dataclass(frozen=True)
class Unpaired:
    """Two runs of different requests, their distributions side by side. ``measured`` is what the other is held to."""

    measured: Trace
    predicted: Trace

    @cached_property
    def metrics(self) -> dict[str, Distribution]:
        """Of every metric that both runs have."""
        found = {}
        for metric in (*BATCH_METRICS, *METRICS):
            a, b = (_values(trace, metric) for trace in (self.measured, self.predicted))
            if a.size and b.size:
                levels = {name: _level(a, b, percentile) for name, percentile in PERCENTILES.items()}
                found[metric] = Distribution((a.size, b.size), float(ks_2samp(a, b).statistic), levels)
        return found

    @property
    def throughput(self) -> dict[str, dict[str, float]]:
        """Output tokens per second and makespan of what was served."""
        spans, rates = [], []
        for trace in (self.measured, self.predicted):
            served = trace.statuses == "ok"
            last, start = trace.column("last_token")[served], trace.start[served]
            span = float(np.fmax.reduce(last, initial=-np.inf) - np.fmin.reduce(start, initial=np.inf))
            if trace.batches is not None:
                span = float(trace.of_batches("makespan").sum())
            spans.append(span if span > 0 else math.nan)
            rates.append(float(np.nansum(trace.column("output_tokens")[served])) / spans[-1])
        return {
            name: {"measured": a, "predicted": b, "error": b / a - 1}
            for name, (a, b) in {"output_tokens_per_s": rates, "makespan": spans}.items()
        }

    @property
    def trace(self) -> str:
        """Digest of the run that is held to."""
        return self.measured.digest()

    @property
    def coverage(self) -> Coverage:
        """Nothing is paired."""
        return Coverage(0, 0)

    @property
    def names(self) -> list[tuple[str, str]]:
        """Statistics that distributions have."""
        return [(metric, name) for metric in self.metrics for name in PERCENTILES]

    def estimate(self, metric: str, statistic: str) -> Estimate:
        """Relative difference of one statistic."""
        if metric == "throughput":
            return Estimate(self.throughput[statistic]["error"], reason=DIFFERENT)
        found = self.metrics.get(metric)
        if found is None:
            return Estimate(math.nan, reason="the traces do not both have it")
        if statistic not in found.percentiles:
            return Estimate(math.nan, reason=DIFFERENT)
        level = found.percentiles[statistic]
        return Estimate(level.error, widened(level.error, level.error_ci95, min(found.n)), reason="too few requests")


def _values(trace: Trace, metric: str) -> Floats:
    """Seconds of the served requests, in order of arrival; of batches, in their order."""
    if metric in BATCH_METRICS:
        values = trace.of_batches(BATCH_METRICS[metric])
        return np.asarray(values[~np.isnan(values)])
    if metric == "itl":
        gaps = [np.diff(np.asarray(one, dtype=np.float64)) for one in trace.lists("token_times") if one]
        return np.concatenate(gaps or [np.empty(0)])
    served = trace.statuses == "ok"
    values = trace.latency(metric)[served][np.argsort(np.nan_to_num(trace.start[served]), kind="stable")]
    return np.asarray(values[~np.isnan(values)])


def _level(a: Floats, b: Floats, percentile: float | None) -> Level:
    """One statistic of both, and the interval of their ratio: the two are independent, so logarithms add in squares
    (MOVER, as in ``calibrate.gates.worsening``).
    """

    def statistic(sample: Floats) -> Floats:
        return np.asarray(sample.mean(axis=1) if percentile is None else np.percentile(sample, percentile, axis=1))

    levels = [float(statistic(one[None])[0]) for one in (a, b)]
    bounds = [bootstrap_interval(one, statistic) for one in (a, b)]
    error = levels[1] / levels[0] - 1 if levels[0] > 0 else math.nan
    return Level(levels[0], levels[1], error, _ratio(levels, bounds))


def _ratio(levels: list[float], bounds: list[Interval]) -> Interval:
    if not all(low > 0 for low in (*levels, bounds[0][0], bounds[1][0])):
        return NONE
    (a, b), (a_low, a_high), (b_low, b_high) = np.log(levels), *np.log(bounds)
    down, up = math.hypot(b - b_low, a_high - a), math.hypot(b_high - b, a - a_low)
    return math.exp(b - a - down) - 1, math.exp(b - a + up) - 1


@dataclass(frozen=True)
class Pairing:
    """Two runs, paired as far as they can be.

    ``kind`` is ``id``, ``order`` or ``none``; ``notes`` say what a reader of the differences must know.
    """

    kind: str
    compared: Comparison | Unpaired
    notes: tuple[str, ...]


def pair(a: Trace, b: Trace) -> Pairing:
    """Pair two runs.

    By id, if at least half of the smaller run's ids are in the other and nine tenths of those have the same prompt
    length; else by order of arrival, if there are as many and nine tenths have. Pairs with other lengths are left out.

    Raises
    ------
    InputError
        If the requests differ and there is no metric that both runs have.
    """
    ids, other_ids = a.ids, b.ids
    for kind, (rows, others) in (("id", _by_id(a, b)), ("order", _by_order(a, b))):
        if rows.size < max(1.0, ENOUGH * min(len(a), len(b))):
            continue
        same_prompts = a.column("prompt_tokens")[rows] == b.column("prompt_tokens")[others]
        same = same_prompts & (a.column("output_tokens")[rows] == b.column("output_tokens")[others])
        if same_prompts.mean() < SAME_PROMPTS or not same.any():
            continue
        if kind == "order":
            b = _renamed(b, dict(zip((other_ids[row] for row in others), (ids[row] for row in rows), strict=True)))
        cold = [trace.meta["cold_start"]["request"] for trace in (a, b) if trace.meta.get("cold_start")]
        exclude = {"warmup": frozenset(cold), "other_lengths": frozenset(ids[row] for row in rows[~same])}
        comparison = Comparison(a, b, exclude=exclude)
        if comparison.num_paired:
            return Pairing(kind, comparison, (*_notes(kind, int((~same).sum()), int(rows.size)), *_pace(a, b)))
    unpaired = Unpaired(a, b)
    if not unpaired.metrics:
        raise InputError(f"{a.name} and {b.name} have other requests and no metric in common")
    said = "the requests of the two differ: their distributions are compared, and a difference may be the workload's"
    return Pairing("none", unpaired, (said, *_pace(a, b)))


def _by_id(a: Trace, b: Trace) -> tuple[Rows, Rows]:
    place = {one: row for row, one in enumerate(b.ids)}
    both = [(row, place[one]) for row, one in enumerate(a.ids) if one in place]
    rows, others = zip(*both, strict=True) if both else ((), ())
    return np.array(rows, dtype=np.intp), np.array(others, dtype=np.intp)


def _by_order(a: Trace, b: Trace) -> tuple[Rows, Rows]:
    if len(a) != len(b) or a.batches is not None or b.batches is not None:
        return np.empty(0, dtype=np.intp), np.empty(0, dtype=np.intp)
    return _order(a), _order(b)


def _order(trace: Trace) -> Rows:
    if trace.clock == REQUEST_CLOCK:
        return np.arange(len(trace))
    return np.argsort(trace.start, kind="stable")


def _renamed(trace: Trace, names: Mapping[str, str]) -> Trace:
    """The same trace with other ids, also where its cold start names one."""
    table = trace.requests
    ids = pa.array([names[one] for one in trace.ids], pa.string())
    renamed = Trace(
        table.set_column(table.schema.get_field_index("id"), "id", ids),
        dict(trace.meta),
        trace.iterations,
        trace.timeline,
        trace.batches,
    )
    cold = trace.meta.get("cold_start")
    return renamed.with_meta(cold_start={**cold, "request": names[cold["request"]]}) if cold else renamed


def _notes(kind: str, different: int, count: int) -> tuple[str, ...]:
    notes = []
    if kind == "order":
        notes.append("ids differ: requests are paired in order of arrival, which their prompt lengths bear out")
    if different:
        notes.append(f"{different} of {count} requests have other lengths in the second run and are not compared")
    return tuple(notes)


def _pace(a: Trace, b: Trace) -> list[str]:
    """Whether the two were sent at another pace: then load differs, and with it every latency."""
    if REQUEST_CLOCK in (a.clock, b.clock) or a.batches is not None or b.batches is not None:
        return []
    spans = [float(np.ptp(trace.start[~np.isnan(trace.start)])) if trace.has("arrival") else 0.0 for trace in (a, b)]
    if not all(spans):
        return []
    rates = [(len(trace) - 1) / span for trace, span in zip((a, b), spans, strict=True)]
    if max(rates) < (1 + OTHER_PACE) * min(rates):
        return []
    return [f"requests came at another pace, {rates[0]:.3g} a second in A and {rates[1]:.3g} in B: the load differs"]
