"""The load of a run over time, told by the stamps of its requests: running, waiting, tokens per second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from replay.trace import REQUEST_CLOCK, Trace

Floats = npt.NDArray[np.float64]

POINTS = 240
"""Instants of a series that is derived from stamps; most points of a series in a document."""
GAUGES = ("running", "waiting", "kv_usage")


@dataclass(frozen=True)
class Series:
    """One quantity over time, on both sides.

    ``time`` in seconds from the first arrival; ``measured`` and ``predicted`` of the same shape, NaN where unknown;
    ``source`` is ``gauge`` (samples of the engine's own gauge) or ``stamps`` (derived from the requests' stamps, on
    both sides in the same way).
    """

    time: Floats
    measured: Floats
    predicted: Floats
    source: str

    def thinned(self, points: int = POINTS) -> Series:
        """Return means over neighbours, at most ``points`` of them."""
        if self.time.size <= points:
            return self
        time, measured, predicted = (
            np.array([one.mean() for one in np.array_split(values, points)])
            for values in (self.time, self.measured, self.predicted)
        )
        return Series(time, measured, predicted, self.source)


class Load:
    """What a run had to do at any instant, from the stamps of requests that were served or left unfinished.

    A request waits from its arrival to ``scheduled`` and runs from there to its last token (stamps do not tell
    preemptions). Where nothing has schedule stamps, only requests in flight (arrived, not ended) are known. Instants
    are seconds on the trace's clock; what happens at the very instant has not happened yet.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        counted = pc.is_in(trace.requests.column("status"), value_set=pa.array(["ok", "unfinished"]))
        self._counted = counted.to_numpy() & (trace.clock != REQUEST_CLOCK)
        self._arrival, self._scheduled, self._last = (
            _rising(one[self._counted]) for one in (trace.start, trace.column("scheduled"), trace.column("last_token"))
        )

    @property
    def has_schedule(self) -> bool:
        """Whether waiting can be told from running."""
        return bool(self._scheduled.size)

    @property
    def end(self) -> float:
        """The last token; NaN if requests in flight cannot be told."""
        return float(self._last[-1]) if self._arrival.size and self._last.size else np.nan

    def running(self, times: Floats) -> Floats:
        """Requests that were scheduled and had not ended."""
        return _before(self._scheduled, times) - _before(self._last, times)

    def waiting(self, times: Floats) -> Floats:
        """Requests that had arrived and were not yet scheduled."""
        return _before(self._arrival, times) - _before(self._scheduled, times)

    def in_flight(self, times: Floats) -> Floats:
        """Requests that had arrived and had not ended."""
        return _before(self._arrival, times) - _before(self._last, times)

    def concurrency(self, times: Floats) -> Floats:
        """Running requests, or those in flight without schedule stamps; NaN if neither can be told."""
        if np.isnan(self.end):
            return np.full(len(times), np.nan)
        return self.running(times) if self.has_schedule else self.in_flight(times)

    def arrival_rate(self, times: Floats, window: float) -> Floats:
        """Arrivals per second in the ``window`` (s) before each instant."""
        return (_before(self._arrival, times) - _before(self._arrival, times - window)) / window

    def output_tokens(self, times: Floats, by_token: bool) -> Floats:
        """Output tokens produced so far: by token times, or spread evenly from a request's first to its last."""
        if by_token:
            some = self._trace.requests.column("token_times").filter(pa.array(self._counted))
            return _before(_rising(pc.list_flatten(some).to_numpy()), times)
        first, last, tokens = (self._trace.column(name) for name in ("first_token", "last_token", "output_tokens"))
        fine = self._counted & ~(np.isnan(first) | np.isnan(last) | np.isnan(tokens))
        first, last, rest = first[fine], last[fine], tokens[fine] - 1
        spread = last > first
        rate = rest[spread] / (last[spread] - first[spread])
        at_once = _sum_before(last[~spread], rest[~spread], times)
        produced = _before(np.sort(first), times) + at_once
        return produced + _ramps(first[spread], rate, times) - _ramps(last[spread], rate, times)


def series_of(measured: Trace, predicted: Trace, begin: tuple[float, float]) -> dict[str, Series]:
    """Running and waiting requests, KV use and output tokens per second of two runs.

    From gauges where both sides have them at the same instants. The rest comes from stamps, at ``POINTS`` instants
    between the first arrival and the last token: counts at them, tokens per second as means around them.
    ``in_flight`` takes the place of ``running`` and ``waiting`` where a side has no schedule stamps.

    Parameters
    ----------
    measured, predicted : Trace
    begin : tuple of float
        First arrival on either side's clock, seconds.
    """
    found = _gauges(measured, predicted, begin[0])
    sides = Load(measured), Load(predicted)
    span = max(side.end - at for side, at in zip(sides, begin, strict=True))
    if span > 0:
        edges = np.linspace(0.0, span, POINTS + 1)
        middle = (edges[1:] + edges[:-1]) / 2

        def derive(name: str, times: Floats, of: Callable[[Load, Floats], Floats]) -> None:
            if name not in found:
                one, other = (of(side, times + at) for side, at in zip(sides, begin, strict=True))
                found[name] = Series(middle, one, other, "stamps")

        if all(side.has_schedule for side in sides):
            derive("running", middle, Load.running)
            derive("waiting", middle, Load.waiting)
        elif "running" not in found:
            derive("in_flight", middle, Load.in_flight)
        by_token = measured.has("token_times") and predicted.has("token_times")
        derive(
            "output_tokens_per_s",
            edges,
            lambda side, times: np.diff(side.output_tokens(times, by_token)) / (edges[1] - edges[0]),
        )
    order = ("running", "in_flight", "waiting", "kv_usage", "output_tokens_per_s")
    return {name: found[name] for name in order if name in found}


def _gauges(measured: Trace, predicted: Trace, begin: float) -> dict[str, Series]:
    if measured.timeline is None or predicted.timeline is None:
        return {}
    times, others = (gauge(trace, "time") for trace in (measured, predicted))
    if not np.array_equal(times, others):
        return {}
    found = {}
    for name in GAUGES:
        one, other = gauge(measured, name), gauge(predicted, name)
        if not (np.isnan(one).all() or np.isnan(other).all()):
            found[name] = Series(times - begin, one, other, "gauge")
    return found


def gauge(trace: Trace, name: str) -> Floats:
    """One column of a trace's timeline as floats, NaN where null."""
    assert trace.timeline is not None
    return np.asarray(trace.timeline.column(name).to_numpy(zero_copy_only=False), dtype=np.float64)


def _rising(values: Floats) -> Floats:
    return np.sort(values[~np.isnan(values)])


def _before(rising: Floats, times: Floats) -> Floats:
    """How many of the rising values lie before each instant."""
    return np.searchsorted(rising, times, side="left").astype(np.float64)


def _sum_before(stamps: Floats, weights: Floats, times: Floats) -> Floats:
    """Sum of the weights whose stamps lie before each instant."""
    order = np.argsort(stamps)
    sums = np.concatenate([[0.0], np.cumsum(weights[order])])
    return np.asarray(sums[np.searchsorted(stamps[order], times, side="left")])


def _ramps(begin: Floats, slope: Floats, times: Floats) -> Floats:
    """Sum of ramps max(0, slope * (time - begin)) at each instant."""
    return times * _sum_before(begin, slope, times) - _sum_before(begin, slope * begin, times)
