"""What gates judge: one statistic of a comparison, its 95 % interval, and the noise below which nothing can be told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
from scipy.stats import norm as normal
from scipy.stats import t as student

from calibrate.aggregates import AggregateComparison
from calibrate.errors import BATCH_METRICS, METRICS, PERCENTILES, SMALLEST_QUEUE_TIME, Comparison, bootstrap_interval

Floats = npt.NDArray[np.float64]
Interval = tuple[float, float]
NONE = (math.nan, math.nan)

OF_REQUESTS = ("mape", "median_ape", "bias")
STATISTICS = (*OF_REQUESTS, *PERCENTILES)
"""Of every metric in seconds."""
NAMES = {
    **dict.fromkeys((*METRICS, *BATCH_METRICS), STATISTICS),
    "throughput": ("output_tokens_per_s", "makespan"),
    "coverage": ("paired",),
}
"""Statistics that can be gated, by metric."""


@dataclass(frozen=True)
class Estimate:
    """A statistic as a fraction, and how sure it is.

    Parameters
    ----------
    value : float
        NaN if it cannot be had; ``reason`` says why.
    ci95 : tuple of float
        NaN if it is not known.
    floor : float
        What two runs of the engine itself differ by, where repeats tell.
    """

    value: float
    ci95: Interval = NONE
    floor: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Coverage:
    """Requests that were compared, and those that a prediction lost."""

    paired: int
    lost: int

    @property
    def share(self) -> float:
        """Of the requests that could have been compared, NaN if there are none."""
        whole = self.paired + self.lost
        return self.paired / whole if whole else math.nan


def coverage_of(paired: int, excluded: dict[str, int]) -> Coverage:
    """From counts as ``Comparison.coverage`` has them; measured requests that failed are no loss of the prediction."""
    return Coverage(paired, excluded.get("unpaired", 0) + excluded.get("not_predicted", 0))


class Figures(Protocol):
    """Statistics of one comparison, computed now or saved."""

    @property
    def trace(self) -> str:
        """Digest of what was measured."""

    @property
    def coverage(self) -> Coverage:
        """How much was compared."""

    @property
    def names(self) -> list[tuple[str, str]]:
        """Metrics and statistics that there are."""

    def estimate(self, metric: str, statistic: str) -> Estimate:
        """One of them; NaN with a reason if it is none."""


def widened(value: float, interval: Interval, count: int) -> Interval:
    """Widen a block-bootstrap interval of ``count`` values for its few blocks.

    Resamples of few blocks vary less than runs do: distances from the value grow by Student's quantile over the normal
    one, and by the variance's lost degree of freedom (Hesterberg 2015, "narrowness bias").
    """
    blocks = count / max(1, round(count**0.5)) if count else 0.0
    if blocks < 2 or math.isnan(interval[0]):
        return NONE
    factor = math.sqrt(blocks / (blocks - 1)) * student.ppf(0.975, blocks - 1) / normal.ppf(0.975)
    low, high = interval
    return value - factor * max(value - low, 0.0), value + factor * max(high - value, 0.0)


@dataclass(frozen=True)
class Compared:
    """Figures of a comparison; intervals by block bootstrap over arrival time."""

    comparison: Comparison

    @cached_property
    def trace(self) -> str:
        """Digest of the measured trace."""
        return self.comparison.measured.digest()

    @property
    def coverage(self) -> Coverage:
        """How much was compared."""
        counts = self.comparison.coverage
        return coverage_of(counts["paired"], counts["excluded"])

    @property
    def names(self) -> list[tuple[str, str]]:
        """All statistics of the metrics that both traces support."""
        found = [(metric, one) for metric in self.comparison.metrics for one in STATISTICS]
        return found + [("throughput", one) for one in NAMES["throughput"]]

    def estimate(self, metric: str, statistic: str) -> Estimate:
        """One statistic with its interval."""
        if metric == "throughput":
            return self._throughput(statistic)
        errors = self.comparison.metrics.get(metric)
        if errors is None:
            return Estimate(math.nan, reason=self.comparison.unsupported.get(metric, "the traces do not have it"))
        if statistic in OF_REQUESTS:
            value = float(getattr(errors, statistic))
            interval = getattr(errors, f"{statistic}_ci95", None) or self._of_requests(metric, statistic)
        else:
            level = errors.percentiles[statistic]
            value, interval = level.error, level.error_ci95
        return _estimate(value, interval, errors.n)

    def _of_requests(self, metric: str, statistic: str) -> Interval:
        if metric == "itl":
            return NONE
        measured, predicted = self.comparison.pairs(metric)
        fine = (measured > (SMALLEST_QUEUE_TIME if metric == "queue_time" else 0.0)) & ~np.isnan(predicted)
        relative = predicted[fine] / measured[fine] - 1
        if statistic == "bias":
            return bootstrap_interval(relative, lambda drawn: np.asarray(drawn.mean(axis=1)))
        return bootstrap_interval(np.abs(relative), lambda drawn: np.asarray(np.median(drawn, axis=1)))

    def _throughput(self, statistic: str) -> Estimate:
        values = self.comparison.throughput[statistic]
        if math.isnan(values["error"]):
            return Estimate(math.nan, reason="the traces have no span")
        interval = self.comparison.throughput_ci95.get(statistic, NONE)
        per_batch = self.comparison.measured.batches is not None
        count = self.comparison.metrics["makespan"].n if per_batch else self.comparison.num_paired
        return _estimate(values["error"], interval, count)


@dataclass(frozen=True)
class OfLevel(Compared):
    """Figures of a load level: errors of its statistics, by the intervals in which one draw would lie."""

    @property
    def coverage(self) -> Coverage:
        """Nothing is paired, so a draw is looked at: what of it the engine serves."""
        counts, level = self.comparison.coverage, len(self.comparison.predicted)
        return Coverage(counts["predicted"], level - counts["predicted"])

    @property
    def names(self) -> list[tuple[str, str]]:
        """What was measured."""
        return [(metric, one) for metric, errors in self.comparison.metrics.items() for one in errors.percentiles]

    def estimate(self, metric: str, statistic: str) -> Estimate:
        """One statistic with its interval."""
        if metric == "throughput":
            found = self.comparison.throughput.get(statistic)
            return Estimate(found["error"] if found else math.nan, reason="the level's throughput has no interval")
        errors = self.comparison.metrics.get(metric)
        level = errors.percentiles.get(statistic) if errors is not None else None
        if level is None:
            return Estimate(math.nan, reason=f"the level does not say {metric}.{statistic}")
        return Estimate(level.error, level.error_ci95)


def figures_of(comparison: Comparison) -> Compared:
    """What gates judge of a comparison."""
    return OfLevel(comparison) if isinstance(comparison, AggregateComparison) else Compared(comparison)


def _estimate(value: float, interval: Interval, count: int) -> Estimate:
    """Put an interval to a value, or the reason why there is none."""
    found = widened(value, interval, count)
    reason = ""
    if math.isnan(value):
        reason = "it is not defined for these requests"
    elif math.isnan(found[0]):
        reason = f"{count} pairs allow no interval" if count < 4 else "no interval is computed for it"
    return Estimate(value, found, reason=reason)


@dataclass(frozen=True)
class Repeated:
    """Figures of a comparison whose run was repeated.

    The value is that of the first run. Its interval is the wider one, to either side, of the bootstrap's and of
    ``t * s``, with s the standard deviation of the value over the k runs and t Student's 97.5 % quantile for k - 1
    degrees of freedom. The floor is the same statistic between two measured runs, the largest if there are several.

    Parameters
    ----------
    first : Figures
        The run that is reported.
    others : sequence of Figures
        The same for each repeat.
    between : sequence of Figures
        The first run compared with each repeat.
    """

    first: Figures
    others: Sequence[Figures]
    between: Sequence[Figures]

    @property
    def trace(self) -> str:
        """Digest of the first run."""
        return self.first.trace

    @property
    def coverage(self) -> Coverage:
        """Of the first run."""
        return self.first.coverage

    @property
    def names(self) -> list[tuple[str, str]]:
        """Of the first run."""
        return self.first.names

    def estimate(self, metric: str, statistic: str) -> Estimate:
        """One statistic; its interval holds what runs differ by."""
        own = self.first.estimate(metric, statistic)
        values = [own.value, *(one.estimate(metric, statistic).value for one in self.others)]
        if np.isnan(values).any():
            return own
        reach = float(student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1))
        low, high = (own.value, own.value) if math.isnan(own.ci95[0]) else own.ci95
        floors = [abs(one.estimate(metric, statistic).value) for one in self.between]
        floor = max((one for one in floors if not math.isnan(one)), default=0.0)
        return replace(own, ci95=(min(low, own.value - reach), max(high, own.value + reach)), floor=floor, reason="")
