"""Latencies of a simulated run and their exact Jacobian in the coefficients of an iteration's time.

The engine runs from one idle moment to the next. An iteration ends at ``anchor + sum of the iterations since``, the
anchor being when the engine began to run, and each iteration's time is ``features @ coefficients``. So the running sum
of the features since the anchor, kept at the end of every iteration, is the derivative of every stamp by the
coefficients: exact as long as a small change of them leaves the schedule alone (calibration.md,
"Residuals and Jacobian").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from calibrate.inference import warm_up_requests
from calibrate.space import FRONT_END_UNIT
from profiles.errors import InputError
from profiles.profile import FrontEnd
from replay.cold_start import find_cold_start
from replay.run import replayable
from replay.trace import Trace
from simulator.batch import Batch
from simulator.engine import NS, ClosedLoop, Engine, Iteration, nanoseconds
from simulator.engine_config import EngineConfig
from simulator.errors import SimulationError
from simulator.request import Request

Floats = npt.NDArray[np.floating[Any]]
Rows = npt.NDArray[np.bool_]
LATENCIES = ("ttft", "e2e", "decode")
SHORTEST_TTFT = 0.1
"""Seconds below which a TTFT's error counts by its size, and no longer by its share."""
SHORTEST_DECODE = 0.02


@dataclass(frozen=True)
class Residuals:
    """``(predicted - measured) / scale`` of what was measured, and its derivatives.

    ``values`` has shape (n,), ``jacobian`` (n, coefficients); ``kinds`` are places in ``LATENCIES``, or, of aggregates,
    in the list of statistics; ``shares`` say what share of the run's requests had arrived before. ``noise`` and
    ``worth``, one each kind, say how far a right model may lie off and how many independent measurements one residual
    stands for, where that need not be told from the residuals themselves.
    """

    values: Floats
    jacobian: Floats
    kinds: npt.NDArray[np.signedinteger[Any]]
    shares: Floats
    noise: Floats | None = None
    worth: Floats | None = None


class Simulated(Protocol):
    """Something measured that can be simulated under any coefficients."""

    simulations: int

    @property
    def num_measured(self) -> int:
        """Measurements that count."""

    def residuals(self, coefficients: Floats) -> Residuals:
        """Simulate, and compare."""


@dataclass(frozen=True)
class FrontEndTerm:
    """The way between client and engine, where latencies were measured at the client.

    ``place`` is that of its constant among the coefficients (None: there is none, and ``way`` is all); ``way`` what is
    taken as known. Moving the engine's whole clock changes nothing in its schedule, so the constant's derivative is
    that of the latencies alone: 1 for what counts from the sending, 0 for the time between tokens.
    """

    place: int | None = None
    way: FrontEnd = field(default_factory=FrontEnd)

    def constant(self, coefficients: Floats) -> float:
        """Seconds per request."""
        return float(coefficients[self.place]) * FRONT_END_UNIT if self.place is not None else 0.0


@dataclass(frozen=True)
class Course:
    """When the requests of a simulated run were sent and got tokens, and the derivatives.

    ``sent``, ``first``, ``last`` are seconds of shape (n,), NaN where there is no such token; ``at_sent``,
    ``at_first``, ``at_last`` their derivatives by the coefficients, shape (n, coefficients). ``moving`` says that all
    times but the start depend on the coefficients, as where clients wait for each other.
    """

    sent: Floats
    first: Floats
    last: Floats
    at_sent: Floats
    at_first: Floats
    at_last: Floats
    moving: bool


def course_of(
    config: EngineConfig,
    requests: Sequence[Request],
    features: Callable[[Batch], Floats],
    coefficients: Floats,
    *,
    cold_start: Callable[[Engine], float] | None = None,
    loop: ClosedLoop | None = None,
    smooth: bool = False,
) -> Course:
    """Simulate requests under coefficients.

    Parameters
    ----------
    config : EngineConfig
    requests : sequence of Request
    features : callable
        Seconds of each component of a batch at a coefficient of 1.
    coefficients : array (coefficients,)
    cold_start : callable, optional
        Seconds by which the first iteration lasts longer, given the engine.
    loop : ClosedLoop, optional
        Clients that wait for each other: then requests are sent when others have ended.
    smooth : bool
        Derivatives of expected latencies (``_Sums.anchors``) instead of those under the very same schedule.

    Raises
    ------
    InputError
        If the engine cannot serve the requests.
    """
    model = Priced(features, coefficients)
    engine = Engine(config, model)
    sums = _Sums(model, resets=not smooth)
    try:
        cold = cold_start(engine) if cold_start is not None else 0.0
        run = engine.run(requests, observe=sums.add, cold_start=cold, closed_loop=loop)
    except SimulationError as error:
        raise InputError(str(error)) from None
    arrivals = np.array([one.arrival for one in run.served])
    # Where all requests wait for each other, all times move together, and nothing but the start is fixed.
    moving = loop is not None and len({one.arrival for one in requests}) == 1
    at_sent: Floats = np.zeros((len(requests), len(coefficients)))
    begun = arrivals - (np.array([nanoseconds(delay) for delay in loop.delays]) if loop is not None else 0)
    if smooth:
        scheduled = [one.scheduled for one in run.served]
        at_sent = sums.interpolated(begun if moving else sums.anchors(arrivals, scheduled))
    first, at_first = sums.at([one.first_token for one in run.served])
    last, at_last = sums.at([one.last_token for one in run.served])
    return Course(begun / NS, first / NS, last / NS, at_sent, at_first, at_last, moving)


class SimulatedRun:
    """One measured run whose requests' latencies are known.

    Parameters
    ----------
    trace : Trace
        With first or last tokens.
    config : EngineConfig
    features : callable
        Seconds of each component of a batch at a coefficient of 1.
    known : array of bool, optional
        Rows whose latencies count; all requests are simulated.
    front_end : FrontEndTerm, optional
        For runs measured at the client.

    Attributes
    ----------
    smooth : bool
        Whether derivatives are those of expected latencies, which lead from afar, or those under the very same
        schedule, which lead to the end.

    Raises
    ------
    InputError
        If no request was measured, or the engine cannot serve them.
    """

    def __init__(
        self,
        trace: Trace,
        config: EngineConfig,
        features: Callable[[Batch], Floats],
        known: Rows | None = None,
        front_end: FrontEndTerm | None = None,
    ) -> None:
        self.trace, self.config, self.features = trace, config, features
        self.front_end = front_end or FrontEndTerm()
        self.rows, self.requests = replayable(trace, config, self.front_end.way)
        rows = self.rows
        counts = (trace.statuses == "ok")[rows]
        if known is not None:
            counts &= known[rows]
        self.start = trace.start[rows]
        first, last, output = (trace.column(name)[rows] for name in ("first_token", "last_token", "output_tokens"))
        self.measured = np.array([first - self.start, last - self.start, np.where(output > 1, last - first, np.nan)])
        self.measured[:, ~counts] = np.nan
        if trace.meta.get("warmed_up") is not True and rows:
            # Whether its excess is a cold start or not, the first request is none to learn from.
            self.measured[:, int(np.argmin(trace.column("arrival")[rows]))] = np.nan
        if not np.isfinite(self.measured).any():
            raise InputError(f"{trace.name}: no request that may be fitted has a first or a last token")
        least = np.array([SHORTEST_TTFT, SHORTEST_TTFT, SHORTEST_DECODE])[:, None]
        self.scale = np.maximum(np.where(np.isnan(self.measured), 1.0, self.measured), least)
        ranks = np.argsort(np.argsort([one.arrival for one in self.requests], kind="stable"))
        self.shares = (ranks + 0.5) / len(ranks)
        self.smooth = False
        self.simulations = 0

    @property
    def num_measured(self) -> int:
        """Requests with a latency that counts."""
        return int(np.isfinite(self.measured).any(axis=0).sum())

    def residuals(self, coefficients: Floats) -> Residuals:
        """Simulate, and compare what was measured.

        Raises
        ------
        InputError
            If the engine cannot serve the requests.
        """
        predicted, slopes = self._simulate(coefficients)
        there = np.isfinite(self.measured) & np.isfinite(predicted)
        scale = self.scale[there]
        kinds, requests = np.nonzero(there)
        return Residuals(
            (predicted - np.nan_to_num(self.measured))[there] / scale,
            slopes[there] / scale[:, None],
            kinds,
            self.shares[requests],
        )

    def _simulate(self, coefficients: Floats) -> tuple[Floats, Floats]:
        """Latencies in seconds (latencies, requests), NaN where there is none, and their derivatives."""
        self.simulations += 1

        def cold_start(engine: Engine) -> float:
            cold = find_cold_start(self.trace, self.requests, engine.run)
            return cold.seconds if cold else 0.0

        run = course_of(
            self.config, self.requests, self.features, coefficients, cold_start=cold_start, smooth=self.smooth
        )
        constant, place = self.front_end.constant(coefficients), self.front_end.place
        first, last = run.first + constant, run.last + constant
        predicted = np.array([first - self.start, last - self.start, last - first])
        slopes = np.array([run.at_first - run.at_sent, run.at_last - run.at_sent, run.at_last - run.at_first])
        if place is not None:
            slopes[:2, :, place] = FRONT_END_UNIT
        return predicted, slopes

    def leave_out_warm_up(self, coefficients: Floats) -> list[int]:
        """Count the latencies of the run's anomalous first requests no longer; return their rows of the trace.

        None where the trace says that the engine was warm.
        """
        if self.trace.meta.get("warmed_up") is True:
            return []
        arrival = np.array([request.arrival for request in self.requests])
        odd = warm_up_requests(arrival, self.measured, self._simulate(coefficients)[0])
        self.measured[:, odd] = np.nan
        return [self.rows[place] for place in odd]


class Priced:
    """An accelerator model whose components are the coefficients times their features."""

    def __init__(self, features: Callable[[Batch], Floats], coefficients: Floats) -> None:
        self.features, self.values = features, coefficients
        self.components = tuple(str(place) for place in range(len(coefficients)))
        self.last: Floats = np.zeros(len(coefficients))

    def step(self, batch: Batch) -> Sequence[float]:
        """Return the seconds as one component; the features stay for who asks."""
        self.last = self.features(batch)
        return (max(float(self.last @ self.values), 1e-6),)


class _Sums:
    """Ends of all iterations, and the sums of features since the engine last was idle (or since the start)."""

    def __init__(self, model: Priced, resets: bool = True) -> None:
        self._model, self._resets = model, resets
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._scheduled_at: list[int] = []
        self._waiting: list[int] = []
        self._sums: list[Floats] = []
        self._sum: Floats = np.zeros(len(model.components))

    def add(self, iteration: Iteration) -> None:
        if self._resets and (not self._ends or iteration.start > self._ends[-1]):
            self._sum = np.zeros_like(self._sum)
        self._sum = self._sum + self._model.last
        self._starts.append(iteration.start)
        self._ends.append(iteration.start + iteration.duration)
        self._scheduled_at.append(iteration.scheduled_at)
        self._waiting.append(iteration.waiting)
        self._sums.append(self._sum)

    def at(self, stamps: Sequence[int | None]) -> tuple[Floats, Floats]:
        """Stamps in nanoseconds (NaN where there is none), and the sums at each; shapes (n,) and (n, components)."""
        ends, sums = np.array(self._ends), np.array(self._sums)
        known = np.array([stamp is not None for stamp in stamps])
        when = np.array([stamp or 0 for stamp in stamps])
        place = np.clip(np.searchsorted(ends, when, side="right") - 1, 0, len(ends) - 1)
        return np.where(known, when.astype(np.float64), np.nan), sums[place]

    def interpolated(self, times: Floats) -> Floats:
        """The sums at any times in nanoseconds, an iteration's features spread evenly over it; (n, components)."""
        starts, ends, sums = np.array(self._starts), np.array(self._ends), np.array(self._sums)
        place = np.clip(np.searchsorted(ends, times, side="right"), 0, len(ends) - 1)
        before = np.where((place > 0)[:, None], sums[place - 1], 0.0)
        share = np.clip((times - starts[place]) / np.maximum(ends[place] - starts[place], 1), 0.0, 1.0)
        return np.asarray(before + share[:, None] * (sums[place] - before))

    def anchors(self, arrivals: Floats, scheduled: Sequence[int | None]) -> Floats:
        """What each request's latency counts from in the derivative of its expectation, in nanoseconds.

        Under the very same schedule, an iteration that lasts longer delays all that follow until the engine is idle.
        But a request that finds room joins the next iteration, whichever that is: it waits for a part of one iteration
        and no more, and only the iterations from its arrival on count. A queue does add up what delayed it, from where
        it began: who was scheduled while others had been left waiting counts from then.
        """
        at, waiting = np.array(self._scheduled_at), np.array(self._waiting) > 0
        begins = np.where(waiting & ~np.concatenate([[False], waiting[:-1]]), np.arange(at.size), -1)
        began = at[np.maximum(np.maximum.accumulate(begins), 0)]
        when = np.array([one if one is not None else arrival for one, arrival in zip(scheduled, arrivals, strict=True)])
        before = np.searchsorted(at, when, side="left") - 1
        queued = (before >= 0) & waiting[np.maximum(before, 0)]
        return np.where(queued, np.minimum(arrivals, began[np.maximum(before, 0)]), arrivals)
