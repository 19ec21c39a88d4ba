"""Load levels of which only aggregates were measured: predicted statistics, their derivatives, and how sure they are.

A benchmark's mean or p99 is one draw: other arrivals and lengths of the same recipe would have given another. The
recipe is simulated with several seeds, the same at every step of a fit, and the prediction is their average. How far
one draw lies off is told by the simulated latencies themselves, by a block bootstrap over arrivals (requests that share
a queue err together) and by the spread between seeds.

A statistic's derivative is that of the order statistics it is made of: of a mean, the mean of the requests'
derivatives; of a percentile, those of the two requests that it lies between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from calibrate.anchors import AnchorErrors, AnchorGap
from calibrate.errors import METRICS, Comparison, Level, MetricErrors
from calibrate.intervals import HELD_AT_ONCE, SEED, Interval
from calibrate.load import Series
from calibrate.metric_errors import Distance
from calibrate.pairing import Rows
from calibrate.simulated import Course, FrontEndTerm, Residuals, course_of
from calibrate.slices import Slice
from calibrate.space import FRONT_END_UNIT
from profiles.deployment import Deployment
from profiles.errors import InputError
from replay.load_level import draws, level_of, percentile
from replay.run import Replay, closed_loop, max_concurrency, replay, replayable
from replay.trace import Trace
from simulator.batch import Batch

Floats = npt.NDArray[np.floating[Any]]

DRAWS = 3
"""Seeds that a load level is simulated with, where its requests are drawn."""
LEAST_NOISE = 0.01
"""Of a statistic, as a share: what a right model may miss it by however many requests there were."""
LEAST_SECONDS = 0.5e-3
GUESSED_LENGTHS = 0.05
"""The same where of the lengths only the means are known."""
RESAMPLES = 60
CONTRADICTION = 0.1
"""Share by which TTFT and the TPOT of all tokens may miss the mean E2E: lengths and TPOT may go together."""
WHY_NOT = "the trace holds aggregates, no latencies of single requests"


@dataclass(frozen=True)
class Target:
    """One measured statistic, in seconds: of a metric of ``replay.load_level.METRICS``, or the run's duration."""

    metric: str
    statistic: str
    measured: float


def targets_of(trace: Trace) -> list[Target]:
    """What of a load level's aggregates a fit takes.

    Means and percentiles of TTFT, TPOT and E2E; the mean ITL only where there is no TPOT, and the duration (or what of
    it the throughput says). Where of the lengths only the means are known, percentiles are left out: they would say how
    the lengths differed.
    """
    given: Mapping[str, Mapping[str, float]] = trace.meta.get("aggregates") or {}
    level = level_of(trace)
    lengths_known = level is None or level.lengths_known
    found = []
    for metric in ("ttft", "tpot", "e2e"):
        for statistic, value in given.get(metric, {}).items():
            usable = statistic == "mean" or (percentile(statistic) is not None and lengths_known)
            if usable and value > 0:
                found.append(Target(metric, statistic, value))
    if "tpot" not in given and given.get("itl", {}).get("mean", 0) > 0:
        found.append(Target("itl", "mean", given["itl"]["mean"]))
    duration = run_seconds(trace)
    return [*found, Target("duration", "", duration)] if duration else found


def contradiction(trace: Trace) -> str | None:
    """Say where means contradict each other: E2E is TTFT and the time of the tokens after the first."""
    given = trace.meta.get("aggregates") or {}
    ttft, tpot, e2e = (given.get(metric, {}).get("mean") for metric in ("ttft", "tpot", "e2e"))
    if ttft is None or tpot is None or not e2e:
        return None
    output = float(np.mean(trace.column("output_tokens")[trace.statuses == "ok"]))
    sum_of_parts = ttft + tpot * (output - 1)
    if abs(sum_of_parts / e2e - 1) <= CONTRADICTION:
        return None
    return (
        f"{trace.name}: its means contradict each other: TTFT and {output - 1:.0f} TPOT make {sum_of_parts:.3g} s, "
        f"the mean E2E is {e2e:.3g} s; check units and output lengths, and whether all requests took part in each mean"
    )


def run_seconds(trace: Trace) -> float | None:
    """How long a load level's run took, as far as its throughput says."""
    throughput = (trace.meta.get("aggregates") or {}).get("throughput", {})
    if throughput.get("duration"):
        return float(throughput["duration"])
    if throughput.get("output_tokens_per_s"):
        return float(np.nansum(trace.column("output_tokens")) / throughput["output_tokens_per_s"])
    return float(len(trace) / throughput["requests_per_s"]) if throughput.get("requests_per_s") else None


class AggregateRun:
    """One load level that can be simulated, compared by its aggregates.

    Parameters
    ----------
    trace : Trace
        With ``meta["aggregates"]``, arrivals and lengths.
    deployment : Deployment
    features : callable
        Seconds of each component of a batch at a coefficient of 1.
    front_end : FrontEndTerm, optional
        For levels measured at the client.

    Attributes
    ----------
    seeds : int
        How many of the draws are simulated; a search may begin with one.

    Raises
    ------
    InputError
        If there is no statistic that a fit takes, or no request can be replayed.
    """

    def __init__(
        self,
        trace: Trace,
        deployment: Deployment,
        features: Callable[[Batch], Floats],
        front_end: FrontEndTerm | None = None,
    ) -> None:
        self.trace, self.config, self.features = trace, deployment.config, features
        self.front_end = front_end or FrontEndTerm()
        self.targets = targets_of(trace)
        if not self.targets:
            raise InputError(f"{trace.name}: none of its aggregates can be fitted; expected means of TTFT, TPOT or E2E")
        self.measured = np.array([one.measured for one in self.targets])
        self.draws = draws(trace, DRAWS)
        self.seeds = len(self.draws)
        self.level = level_of(trace)
        self.clients = max_concurrency(trace)
        self.simulations = 0

    @property
    def num_measured(self) -> int:
        """Statistics."""
        return len(self.targets)

    def residuals(self, coefficients: Floats) -> Residuals:
        """Simulate every draw, and compare the averages of its statistics.

        Raises
        ------
        InputError
            If the engine cannot serve the requests.
        """
        values, slopes, spreads = [], [], []
        for draw in self.draws[: self.seeds]:
            statistics = self._simulated(draw, coefficients)
            found = [statistics.of(one) for one in self.targets]
            values.append([value for value, _ in found])
            slopes.append(np.array([slope for _, slope in found]))
            spreads.append(statistics.covariance(self.targets))
        predicted, jacobian = np.mean(values, axis=0), np.mean(slopes, axis=0)
        noise, worth = self._noise(np.array(values), np.mean(spreads, axis=0))
        return Residuals(
            predicted / self.measured - 1,
            jacobian / self.measured[:, None],
            np.arange(len(self.targets)),
            np.full(len(self.targets), 0.5),  # of the whole run
            noise / self.measured,
            np.full(len(self.targets), worth),
        )

    def _simulated(self, draw: Trace, coefficients: Floats) -> _Statistics:
        self.simulations += 1
        way, place = self.front_end.way, self.front_end.place
        constant = self.front_end.constant(coefficients)
        rows, requests = replayable(draw, self.config, way if self.clients is None else None)
        if not requests:
            raise InputError(f"{draw.name} has no request that can be replayed")
        loop = None
        if self.clients is not None:
            whole = way.model_copy(update={"per_request": way.per_request + constant})
            loop = closed_loop(self.clients, requests, whole)
        course = course_of(self.config, requests, self.features, coefficients, loop=loop, smooth=True)
        sent = draw.start[rows] if loop is None else course.sent
        late = constant if loop is None else 0.0
        begin = 0.0 if self.level is not None else float(np.min(sent))
        # Silent requests load the engine; the statistics are not of them.
        output = np.where((draw.statuses == "ok")[rows], draw.column("output_tokens")[rows], np.nan)
        return _Statistics.of_course(course, sent, late, begin, output, place)

    def _noise(self, values: Floats, within: Floats) -> tuple[Floats, float]:
        """How far a right model may lie off each statistic (seconds), and how many independent ones each is worth."""
        least = GUESSED_LENGTHS if self.level is not None and not self.level.lengths_known else LEAST_NOISE
        floor = np.hypot(least * self.measured, LEAST_SECONDS)
        if self.level is None or self.level.exact:
            return floor, _worth(within + np.diag(floor**2))
        variance = np.diag(within).copy()
        if len(values) > 1:
            variance = np.maximum(variance, values.var(axis=0, ddof=1))
        if self.level.distribution == "poisson" and self.level.rate is not None:
            # The last arrival of n exponential gaps is known to one part in the root of n.
            arrivals = self.level.requests**0.5 / self.level.rate
            variance[[one.metric == "duration" for one in self.targets]] += arrivals**2
        scale = np.sqrt(variance / np.maximum(np.diag(within), 1e-30))
        # Measured was one draw, predicted is the mean of some.
        both = within * np.outer(scale, scale) * (1 + 1 / len(values)) + np.diag(floor**2)
        return np.sqrt(variance * (1 + 1 / len(values)) + floor**2), _worth(both)


def _worth(covariance: Floats) -> float:
    """Share of independent ones among correlated measurements: the participation ratio of their correlation."""
    scale = np.sqrt(np.diag(covariance))
    correlation = covariance / np.outer(scale, scale)
    return float(len(scale) / (correlation**2).sum())


@dataclass(frozen=True)
class _Statistics:
    """Latencies of one simulated draw in order of arrival, with derivatives; shapes (n,) and (n, coefficients)."""

    latencies: Mapping[str, Floats]
    slopes: Mapping[str, Floats]
    duration: float
    duration_slope: Floats

    @classmethod
    def of_course(
        cls, course: Course, sent: Floats, late: float, begin: float, output: Floats, place: int | None
    ) -> _Statistics:
        """Latencies as a client that sent then would see them, tokens ``late`` seconds after the engine made them.

        Requests without output tokens (NaN) do not count.
        """
        order = np.argsort(sent, kind="stable")
        order = order[np.isfinite(course.last[order]) & (output[order] > 0)]
        if not order.size:
            raise InputError("the engine refuses every request: prompts are longer than max_model_len")
        gaps = np.where(output > 1, output - 1, np.nan)
        decode, decoding = course.last - course.first, course.at_last - course.at_first
        latencies = {"ttft": course.first + late - sent, "e2e": course.last + late - sent, "tpot": decode / gaps}
        slopes = {
            "ttft": course.at_first - course.at_sent,
            "e2e": course.at_last - course.at_sent,
            "tpot": decoding / gaps[:, None],
        }
        if place is not None:
            for metric in ("ttft", "e2e"):
                slopes[metric] = slopes[metric].copy()
                slopes[metric][:, place] = FRONT_END_UNIT
        some = order[np.isfinite(gaps[order])]
        latencies |= {"decode": decode, "gaps": gaps}
        slopes |= {"decode": decoding}
        ends = int(order[np.argmax(course.last[order])])
        slope = course.at_last[ends] - (0.0 if course.moving else course.at_sent[ends])
        rows = {"ttft": order, "e2e": order}
        kept = {name: values[rows.get(name, some)] for name, values in latencies.items()}
        own = {name: values[rows.get(name, some)] for name, values in slopes.items()}
        return cls(kept, own, float(course.last[ends] + late - begin), slope)

    def of(self, target: Target) -> tuple[float, Floats]:
        """A statistic and its derivative."""
        if target.metric == "duration":
            return self.duration, self.duration_slope
        if target.metric == "itl":
            whole = self.latencies["gaps"].sum()
            return float(self.latencies["decode"].sum() / whole), self.slopes["decode"].sum(axis=0) / whole
        values, slopes = self.latencies[target.metric], self.slopes[target.metric]
        if not values.size:
            raise InputError("TPOT was measured, but requests of one output token have none", field="output_tokens")
        at = percentile(target.statistic)
        if at is None:
            return float(values.mean()), slopes.mean(axis=0)
        place = (values.size - 1) * at / 100
        low = int(place)
        high, part = min(low + 1, values.size - 1), place - low
        order = np.argsort(values, kind="stable")
        left, right = order[low], order[high]
        value = (1 - part) * values[left] + part * values[right]
        return float(value), (1 - part) * slopes[left] + part * slopes[right]

    def covariance(self, targets: Sequence[Target]) -> Floats:
        """Of the statistics of one draw, by a circular-block bootstrap over arrivals; the duration has none."""
        columns = np.zeros((len(targets), RESAMPLES))
        for place, target in enumerate(targets):
            name = "tpot" if target.metric == "itl" else target.metric
            if name != "duration":
                columns[place] = _resampled(self.latencies[name], percentile(target.statistic))
        return np.atleast_2d(np.cov(columns))


def _resampled(values: Floats, at: float | None) -> Floats:
    """The mean, or a percentile, of resamples of circular blocks of neighbours, always the same ones; (RESAMPLES,)."""
    count = values.size
    width = max(1, round(count**0.5))
    starts = np.random.default_rng(SEED).integers(0, count, size=(RESAMPLES, -(-count // width)))
    found = []
    for some in np.array_split(starts, min(RESAMPLES, -(-RESAMPLES * count // HELD_AT_ONCE))):
        drawn = values[(some[:, :, None] + np.arange(width)).reshape(len(some), -1)[:, :count] % count]
        found.append(drawn.mean(axis=1) if at is None else np.percentile(drawn, at, axis=1))
    return np.concatenate(found)


def predict(trace: Trace, deployment: Deployment, progress: Callable[[int], None] | None = None) -> list[Replay]:
    """Replay a load level with every seed.

    Raises
    ------
    InputError
        As ``replay``.
    """
    found: list[Replay] = []

    def advance(ended: int) -> None:
        if progress is not None:
            progress(len(trace) * len(found) + ended)

    for one in draws(trace, DRAWS):
        found.append(replay(one, deployment, progress=advance))
    return found


@dataclass(frozen=True)
class AggregateComparison(Comparison):
    """A load level's aggregates, measured and predicted; ``draws`` are predictions with several seeds.

    There are no errors per request; ``pairs`` are those of the means, one a metric, so that several levels have a mean
    error. A predicted statistic is the average over the draws. Its interval is that of a single draw, which is what was
    measured: twice the spread between draws that a block bootstrap within them, or their differences, tell.
    """

    draws: Sequence[Trace] = field(default_factory=tuple)

    @property
    def num_paired(self) -> int:
        """Requests that are compared: none."""
        return 0

    @property
    def coverage(self) -> dict[str, Any]:
        """Requests of a draw, and why none is compared with a measured one."""
        return {
            "measured": 0,
            "predicted": int((self.draws[0].statuses == "ok").sum()),
            "paired": 0,
            "excluded": {},
            "unsupported": self.unsupported,
            "per_request": WHY_NOT,
            "draws": len(self.draws),
        }

    @cached_property
    def unsupported(self) -> dict[str, str]:
        """Metrics of which there is no aggregate."""
        return {metric: "the trace has no aggregate of it" for metric in METRICS if metric not in self.metrics}

    @cached_property
    def metrics(self) -> dict[str, MetricErrors]:
        """Statistics of every metric that both sides have; errors per request are absent (NaN, of 0 pairs)."""
        found = {}
        for metric, given in (self.measured.meta.get("aggregates") or {}).items():
            if metric == "throughput":
                continue
            counts = self.measured.statuses == "ok"
            latencies = [_latencies(one, metric, counts) for one in self.draws]
            if not all(values.size for values in latencies):
                continue
            levels = {
                statistic: _level(value, statistic, latencies)
                for statistic, value in given.items()
                if statistic != "std" and value > 0
            }
            if levels:
                none = float("nan")
                found[metric] = MetricErrors(0, none, (none, none), none, none, levels)
        return found

    def pairs(self, metric: str, anchor: str | None = None) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Measured and predicted mean, of shape (1,), or (0,) where there is none."""
        errors = self.metrics.get(metric)
        mean = errors.percentiles.get("mean") if errors is not None else None
        if mean is None:
            return np.empty(0), np.empty(0)
        return np.array([mean.measured]), np.array([mean.predicted])

    @cached_property
    def throughput(self) -> dict[str, dict[str, float]]:
        """Output tokens per second, and the makespan."""
        given = (self.measured.meta.get("aggregates") or {}).get("throughput", {})
        measured = run_seconds(self.measured)
        if measured is None:
            return {}
        drawn = level_of(self.measured) is not None
        begins = [0.0 if drawn else float(np.nanmin(one.start)) for one in self.draws]
        ends = [float(np.nanmax(one.column("last_token"))) for one in self.draws]
        predicted = float(np.mean(np.array(ends) - np.array(begins)))
        tokens = float(np.nansum(self.measured.column("output_tokens")))
        rate = given.get("output_tokens_per_s", tokens / measured)
        pairs = {"output_tokens_per_s": (rate, tokens / predicted), "makespan": (measured, predicted)}
        return {
            name: {"measured": float(left), "predicted": float(right), "error": float(right / left - 1)}
            for name, (left, right) in pairs.items()
        }

    @cached_property
    def timeline(self) -> dict[str, dict[str, float]]:
        """None was measured."""
        return {}

    @cached_property
    def _paired(self) -> tuple[Rows, Rows, Mapping[str, int]]:
        """None: what the trace has of requests is drawn."""
        return np.empty(0, dtype=np.intp), np.empty(0, dtype=np.intp), {}

    @cached_property
    def throughput_ci95(self) -> dict[str, Interval]:
        """None: no times between completions were measured."""
        return {}

    @cached_property
    def distances(self) -> dict[str, Distance]:
        """None: no distribution was measured."""
        return {}

    @cached_property
    def slices(self) -> dict[str, dict[str, tuple[Slice, ...]]]:
        """None: no errors per request."""
        return {}

    @cached_property
    def anchors(self) -> dict[str, AnchorErrors]:
        """None: no stamps."""
        return {}

    @cached_property
    def anchor_gap(self) -> AnchorGap | None:
        """None: no stamps."""
        return None

    def series(self) -> dict[str, Series]:
        """None was measured."""
        return {}

    def samples(self, metric: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """None: no latencies of single requests."""
        return np.empty(0), np.empty(0)

    def requests_table(self) -> pa.Table:
        """No rows."""
        drawn = {"drawn": frozenset(self.measured.ids)}
        return Comparison(self.measured, self.predicted, exclude=drawn).requests_table()


def compare_aggregates(measured: Trace, replays: Sequence[Replay]) -> AggregateComparison:
    """Compare a load level's aggregates with its predictions.

    Raises
    ------
    InputError
        If there is no statistic on both sides.
    """
    drawn = [one.predicted for one in replays]
    comparison = AggregateComparison(measured, drawn[0], draws=drawn)
    if not comparison.metrics and not comparison.throughput:
        raise InputError(f"{measured.name}: none of its aggregates can be compared")
    return comparison


def _latencies(predicted: Trace, metric: str, counts: npt.NDArray[np.bool_]) -> Floats:
    """Of the requests that count, in order of arrival; inter-token gaps pooled."""
    if metric == "itl":
        every = zip(predicted.lists("token_times"), counts, strict=True)
        return np.concatenate([*(np.diff(times) for times, own in every if times and own), np.empty(0)])
    order = np.argsort(np.nan_to_num(predicted.start), kind="stable")
    values = predicted.latency(metric)[order][counts[order]]
    return values[np.isfinite(values)]


def _level(measured: float, statistic: str, latencies: Sequence[Floats]) -> Level:
    at = percentile(statistic)
    values = np.array([own.mean() if at is None else np.percentile(own, at) for own in latencies])
    predicted = float(values.mean())
    spread = _spread(latencies, at, values)
    error = predicted / measured - 1
    return Level(measured, predicted, error, (error - 1.96 * spread / measured, error + 1.96 * spread / measured))


def _spread(latencies: Sequence[Floats], at: float | None, values: Floats) -> float:
    """Standard deviation of measured less predicted, if both are draws of one recipe."""
    within = [_resampled(own, at).var(ddof=1) for own in latencies]
    between = float(values.var(ddof=1)) if len(values) > 1 else 0.0
    return float(np.sqrt(max(float(np.mean(within)), between) * (1 + 1 / len(values))))
