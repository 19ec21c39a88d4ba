"""Errors by slices of the requests, and the slice that is worse than the rest beyond the noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student

from calibrate.intervals import Interval, Resamples, interval, ratio

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


def slice_errors(values: Floats, errors: Floats, resamples: Resamples) -> tuple[Slice, ...]:
    """Slice signed relative errors at the quartiles of a quantity; empty if it is the same for all.

    Parameters
    ----------
    values, errors : array (pairs,)
        In order of arrival, NaN where unknown.
    resamples : Resamples
        Of the pairs.
    """
    fine = np.flatnonzero(~(np.isnan(values) | np.isnan(errors)))
    if not fine.size:
        return ()
    values, errors, absolute = values[fine], errors[fine], np.abs(errors[fine])
    edges = np.unique(np.quantile(values, QUARTILES))
    group = np.searchsorted(edges, values, side="left")
    members = [np.flatnonzero(group == one) for one in np.unique(group)]
    if len(members) < 2:
        return ()
    drawn = np.array([resamples.sums(fine[some]) for some in members])
    sums = np.array([resamples.sums(fine[some], absolute[some]) for some in members])
    found = []
    for place, some in enumerate(members):
        means = ratio(sums[place], drawn[place])
        rests = ratio(sums.sum(axis=0) - sums[place], drawn.sum(axis=0) - drawn[place])
        excess = (means - rests)[~np.isnan(means - rests)]
        several = some.size > 1
        signed = ratio(resamples.sums(fine[some], errors[some]), drawn[place])
        found.append(
            Slice(
                low=float(values[some].min()),
                high=float(values[some].max()),
                n=int(some.size),
                mape=float(absolute[some].mean()),
                mape_ci95=interval(means) if several else (np.nan, np.nan),
                bias=float(errors[some].mean()),
                bias_ci95=interval(signed) if several else (np.nan, np.nan),
                rest_mape=float(np.delete(absolute, some).mean()),
                excess_se=float(excess.std(ddof=1)) if several and excess.size > 1 else np.nan,
            )
        )
    return tuple(found)


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
