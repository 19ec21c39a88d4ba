"""Errors by slices of the requests, and the slice that is worse than the rest beyond the noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student

from calibrate.intervals import Interval, Resamples, Rows, interval, ratio

Floats = npt.NDArray[np.float64]

QUARTILES = (0.25, 0.5, 0.75)
FEWEST = 20
"""Requests of a slice below which it is not called the worst."""
FEWEST_BLOCKS = 5
"""Blocks of a resample below which the noise is not known."""
FALSE_ALARMS = 0.05
"""Chance to call any slice worse if none is, over all slices tried."""
ARRIVALS = 20
"""Arrivals in the window, on average, in which the arrival rate that a request met is counted."""

WORDS = {
    "prompt_tokens": "prompts of {} tokens",
    "output_tokens": "outputs of {} tokens",
    "arrival_s": "arrivals from {} s",
    "waiting": "{} requests waiting at arrival",
    "arrival_rate": "{} arrivals per second",
    "concurrency": "{} requests being served at arrival",
    "cached_share": "{} % of the prompt cached",
    "predicted_cached_share": "{} % of the prompt cached, as predicted",
}
"""What requests are sliced by, and how a slice is called."""


@dataclass(frozen=True)
class Slice:
    """Per-request errors of the requests whose value lies from ``low`` to ``high``.

    ``mape`` and ``bias`` as in ``MetricErrors``, over the ``n`` requests; ``rest_mape`` is over all others, and
    ``excess_se`` the standard error of ``mape - rest_mape`` by block bootstrap.
    """

    low: float
    high: float
    n: int
    mape: float
    mape_ci95: Interval
    bias: float
    bias_ci95: Interval
    rest_mape: float
    excess_se: float

    @property
    def excess(self) -> float:
        """How much larger its mean absolute error is than that of the others."""
        return self.mape - self.rest_mape


@dataclass(frozen=True)
class WorstSlice:
    """A slice that is worse than the rest beyond the noise: by more than ``least_excess`` (a fraction)."""

    metric: str
    by: str
    slice: Slice
    least_excess: float
    sentence: str


@dataclass(frozen=True)
class Grouping:
    """Requests sliced at the quartiles of a quantity.

    ``places`` (rows of the pairs) and ``group`` have one entry for each request whose value is known; ``lows`` and
    ``highs`` are the extremes of each group.
    """

    places: Rows
    group: Rows
    lows: list[float]
    highs: list[float]


def group_by(values: Floats) -> Grouping | None:
    """Slice at the quartiles of ``values`` (pairs,), NaN where unknown; None if it is the same for all."""
    places = np.flatnonzero(~np.isnan(values))
    values = values[places]
    if not values.size or values.min() == values.max():
        return None
    edges = np.unique(np.quantile(values, QUARTILES, method="lower"))
    edges = edges[edges < values.max()]
    if not edges.size:
        edges = np.array([values[values < values.max()].max()])
    group = np.searchsorted(edges, values, side="left")
    members = [values[group == one] for one in range(edges.size + 1)]
    return Grouping(places, group, [float(one.min()) for one in members], [float(one.max()) for one in members])


def slice_errors(grouping: Grouping, errors: Floats, resamples: Resamples) -> tuple[Slice, ...]:
    """Per-request errors by slice; those without any are left out, and all if they are in one slice.

    Parameters
    ----------
    grouping : Grouping
    errors : array (pairs,)
        Signed relative errors in order of arrival, NaN where unknown.
    resamples : Resamples
        Of the pairs.
    """
    known = ~np.isnan(errors[grouping.places])
    places, group, groups = grouping.places[known], grouping.group[known], len(grouping.lows)
    errors, absolute = errors[places], np.abs(errors[places])
    counts = np.bincount(group, minlength=groups)
    if (counts > 0).sum() < 2:
        return ()
    sums, signed = (np.bincount(group, of, minlength=groups) for of in (absolute, errors))
    drawn = resamples.sums_by_group(places, group, groups)
    drawn_sums, drawn_signed = (resamples.sums_by_group(places, group, groups, of) for of in (absolute, errors))
    means, biases = ratio(drawn_sums, drawn), ratio(drawn_signed, drawn)
    excess = means - ratio(_others(drawn_sums), _others(drawn))
    found = []
    for one in np.flatnonzero(counts):
        several = counts[one] > 1
        found.append(
            Slice(
                low=grouping.lows[one],
                high=grouping.highs[one],
                n=int(counts[one]),
                mape=float(sums[one] / counts[one]),
                mape_ci95=interval(means[:, one]) if several else (np.nan, np.nan),
                bias=float(signed[one] / counts[one]),
                bias_ci95=interval(biases[:, one]) if several else (np.nan, np.nan),
                rest_mape=float((sums.sum() - sums[one]) / (counts.sum() - counts[one])),
                excess_se=_spread(excess[:, one]) if several else np.nan,
            )
        )
    return tuple(found)


def _others(sums: Floats) -> Floats:
    """Sums over all groups but one, for each."""
    return np.asarray(sums.sum(axis=1, keepdims=True) - sums)


def _spread(statistics: Floats) -> float:
    known = statistics[~np.isnan(statistics)]
    return float(known.std(ddof=1)) if known.size > 1 else np.nan


def worst_slices(
    tried: Mapping[str, Mapping[str, Sequence[Slice]]], blocks: int, labels: Mapping[str, str]
) -> list[WorstSlice]:
    """Return, for each metric, the slice that is worst, if it is worse than the rest beyond the noise.

    A slice counts if the lower bound of its excess is above 0. The bound lies Student's quantile of standard errors
    below the excess, for as many blocks as there are, and its one-sided 5 % are divided by the number of slices tried
    over all metrics (Bonferroni): among many slices one always looks bad.

    Parameters
    ----------
    tried : mapping
        Slices by metric and quantity.
    blocks : int
        Of a resample (``Resamples.blocks``).
    labels : mapping of str to str
        What the metrics are called in sentences.
    """
    large = {
        metric: [(name, one) for name, slices in by.items() for one in slices if one.n >= FEWEST]
        for metric, by in tried.items()
    }
    count = sum(map(len, large.values()))
    if blocks < FEWEST_BLOCKS or not count:
        return []
    quantile = student.ppf(1 - FALSE_ALARMS / count, blocks - 1)
    found = []
    for metric, slices in large.items():
        beyond = [(name, one) for name, one in slices if one.excess - quantile * one.excess_se > 0]
        if beyond:
            name, one = max(beyond, key=lambda candidate: candidate[1].excess)
            sentence = (
                f"{labels[metric]} is worst for {describe(name, one)} ({one.n:,} requests): "
                f"{100 * one.mape:.1f} % mean error, {100 * one.rest_mape:.1f} % for all others"
            )
            found.append(WorstSlice(metric, name, one, one.excess - quantile * one.excess_se, sentence))
    return found


def describe(name: str, one: Slice) -> str:
    """Say in words which requests a slice holds."""
    low, high = (_figure(100 * value if name.endswith("cached_share") else value) for value in (one.low, one.high))
    return WORDS[name].format(low if low == high else f"{low} to {high}")


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10 or value.is_integer() else f"{value:,.1f}"
