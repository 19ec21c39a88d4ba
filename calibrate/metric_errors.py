"""Errors of one metric: levels, per-request errors, intervals, and the distance of the two distributions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import wasserstein_distance

from calibrate.intervals import Pool, Resamples, interval, ratio

Floats = npt.NDArray[np.float64]

PERCENTILES: Mapping[str, float | None] = {"mean": None, "p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0}
LABELS = {
    "ttft": "TTFT",
    "tpot": "TPOT",
    "itl": "ITL",
    "e2e": "E2E",
    "queue_time": "queue time",
    "makespan": "makespan",
    "prompt_time": "prompt time",
    "token_time": "token time",
}
"""What metrics are called in sentences and tables."""


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
class Distance:
    """How far the predicted distribution of a metric lies from the measured one, whichever request is which.

    ``wasserstein`` is the Wasserstein-1 distance (the mean distance of equal quantiles) as a share of the measured
    mean (``scipy.stats.wasserstein_distance``). ``kolmogorov_smirnov`` is the largest distance of the two cumulative
    distributions, 0 to 1: the statistic of ``scipy.stats.ks_2samp``, whose p-value would say nothing here, since the
    requests of one run are not independent.
    """

    wasserstein: float
    kolmogorov_smirnov: float


def errors_of(measured: Pool, predicted: Pool, relative: Pool, resamples: Resamples) -> MetricErrors:
    """Errors of one metric: its values on both sides, and the signed relative errors of those that are paired."""
    absolute = np.abs(relative.values)
    known = relative.values.size > 1
    return MetricErrors(
        n=int(relative.values.size),
        mape=_mean(absolute),
        mape_ci95=interval(resamples.means(Pool(relative.places, absolute))) if known else (np.nan, np.nan),
        median_ape=float(np.median(absolute)) if known else _mean(absolute),
        bias=_mean(relative.values),
        percentiles=_levels(measured, predicted, resamples),
    )


def _levels(measured: Pool, predicted: Pool, resamples: Resamples) -> dict[str, Level]:
    levels, known = {}, min(measured.values.size, predicted.values.size) > 1
    at = [one for one in PERCENTILES.values() if one is not None]
    errors = np.full((len(PERCENTILES), 1), np.nan)
    if known:
        drawn = [
            np.column_stack([resamples.means(one), resamples.percentiles(one, at)]) for one in (measured, predicted)
        ]
        errors = (ratio(drawn[1], drawn[0]) - 1).T
    ones, others = levels_of(measured.values), levels_of(predicted.values)
    for name, error in zip(PERCENTILES, errors, strict=True):
        one, other = ones[name], others[name]
        levels[name] = Level(one, other, other / one - 1 if one > 0 else np.nan, interval(error))
    return levels


def levels_of(values: Floats) -> dict[str, float]:
    """Mean and linear percentiles (``numpy.percentile``) of values by name; NaN if there are none."""
    if not values.size:
        return dict.fromkeys(PERCENTILES, np.nan)
    at = [one for one in PERCENTILES.values() if one is not None]
    percentiles = iter(np.percentile(values, at))
    return {name: float(values.mean() if one is None else next(percentiles)) for name, one in PERCENTILES.items()}


def _mean(values: Floats) -> float:
    return float(values.mean()) if values.size else np.nan


def errors_of_pairs(measured: Floats, predicted: Floats, least: float, resamples: Resamples) -> MetricErrors:
    """Errors of a metric with one value a pair, NaN where a side has none."""
    neither = np.isnan(measured) | np.isnan(predicted)
    left, right = (Pool.of(np.where(neither, np.nan, one)) for one in (measured, predicted))
    return errors_of(left, right, Pool.of(relative_errors(measured, predicted, least)), resamples)


def relative_errors(measured: Floats, predicted: Floats, least: float = 0.0) -> Floats:
    """Signed relative errors, NaN where the measured value is not above ``least``."""
    return np.asarray(predicted / np.where(measured > least, measured, np.nan) - 1)


def distance_of(measured: Floats, predicted: Floats) -> Distance:
    """Distance of two samples, none of them empty."""
    mean, sides = float(measured.mean()), (np.sort(measured), np.sort(predicted))
    if measured.size == predicted.size:
        apart = float(np.abs(sides[0] - sides[1]).mean())
    else:
        apart = float(wasserstein_distance(*sides))
    steps = (np.abs(_cumulative(sides[0], side) - _cumulative(sides[1], side)).max() for side in sides)
    return Distance(apart / mean if mean > 0 else np.nan, float(max(steps)))


def _cumulative(rising: Floats, at: Floats) -> Floats:
    """Share of the rising values that are at most each of ``at``."""
    return np.searchsorted(rising, at, side="right") / rising.size
