"""Latencies of a simulated run and their exact Jacobian in the coefficients of an iteration's time.

The engine runs from one idle moment to the next. An iteration ends at ``anchor + sum of the iterations since``, the
anchor being when the engine began to run, and each iteration's time is ``features @ coefficients``. So the running sum
of the features since the anchor, kept at the end of every iteration, is the derivative of every stamp by the
coefficients: exact as long as a small change of them leaves the schedule alone (calibration.md,
"Residuals and Jacobian").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from calibrate.inference import warm_up_requests
from profiles.errors import InputError
from replay.cold_start import find_cold_start
from replay.run import replayable
from replay.trace import Trace
from simulator.batch import Batch
from simulator.engine import NS, Engine, Iteration
from simulator.engine_config import EngineConfig
from simulator.errors import SimulationError

Floats = npt.NDArray[np.floating[Any]]
Rows = npt.NDArray[np.bool_]
LATENCIES = ("ttft", "e2e", "decode")
SHORTEST_TTFT = 0.1
"""Seconds below which a TTFT's error counts by its size, and no longer by its share."""
SHORTEST_DECODE = 0.02


@dataclass(frozen=True)
class Residuals:
    """``(predicted - measured) / scale`` of each latency that was measured, and its derivatives.

    ``values`` has shape (n,), ``jacobian`` (n, coefficients); ``kinds`` are places in ``LATENCIES``; ``shares`` say
    what share of the run's requests had arrived before. ``predicted`` (latencies, requests) are all in seconds, NaN
    where there is none.
    """

    values: Floats
    jacobian: Floats
    kinds: npt.NDArray[np.signedinteger[Any]]
    shares: Floats
    predicted: Floats


class SimulatedRun:
    """One measured run that can be simulated under any coefficients.

    Parameters
    ----------
    trace : Trace
        With first or last tokens.
    config : EngineConfig
    features : callable
        Seconds of each component of a batch at a coefficient of 1.
    known : array of bool, optional
        Rows whose latencies count; all requests are simulated.

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
    ) -> None:
        self.trace, self.config, self.features = trace, config, features
        rows, self.requests = replayable(trace, config)
        self.rows = rows
        counts = (trace.statuses == "ok")[rows]
        if known is not None:
            counts &= known[rows]
        start = trace.start[rows]
        first, last, output = (trace.column(name)[rows] for name in ("first_token", "last_token", "output_tokens"))
        self.measured = np.array([first - start, last - start, np.where(output > 1, last - first, np.nan)])
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
        self.simulations += 1
        model = Priced(self.features, coefficients)
        engine = Engine(self.config, model)
        sums = _Sums(model)
        try:
            cold = find_cold_start(self.trace, self.requests, engine.run)
            run = engine.run(self.requests, observe=sums.add, cold_start=cold.seconds if cold else 0.0)
        except SimulationError as error:
            raise InputError(str(error)) from None
        arrival = np.array([one.arrival for one in run.served])
        first, at_first = sums.at([one.first_token for one in run.served])
        last, at_last = sums.at([one.last_token for one in run.served])
        predicted = np.array([first - arrival, last - arrival, last - first]) / NS
        slopes = np.array([at_first, at_last, at_last - at_first])
        there = np.isfinite(self.measured) & np.isfinite(predicted)
        scale = self.scale[there]
        kinds, requests = np.nonzero(there)
        return Residuals(
            (predicted - np.nan_to_num(self.measured))[there] / scale,
            slopes[there] / scale[:, None],
            kinds,
            self.shares[requests],
            predicted,
        )

    def leave_out_warm_up(self, coefficients: Floats) -> list[int]:
        """Count the latencies of the run's anomalous first requests no longer; return their rows of the trace.

        None where the trace says that the engine was warm.
        """
        if self.trace.meta.get("warmed_up") is True:
            return []
        arrival = np.array([request.arrival for request in self.requests])
        odd = warm_up_requests(arrival, self.measured, self.residuals(coefficients).predicted)
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
    """Ends of all iterations, and the sums of features since the engine last was idle."""

    def __init__(self, model: Priced) -> None:
        self._model = model
        self._ends: list[int] = []
        self._sums: list[Floats] = []
        self._sum: Floats = np.zeros(len(model.components))

    def add(self, iteration: Iteration) -> None:
        if not self._ends or iteration.start > self._ends[-1]:
            self._sum = np.zeros_like(self._sum)
        self._sum = self._sum + self._model.last
        self._ends.append(iteration.start + iteration.duration)
        self._sums.append(self._sum)

    def at(self, stamps: Sequence[int | None]) -> tuple[Floats, Floats]:
        """Stamps in nanoseconds (NaN where there is none), and the sums at each; shapes (n,) and (n, components)."""
        ends, sums = np.array(self._ends), np.array(self._sums)
        known = np.array([stamp is not None for stamp in stamps])
        when = np.array([stamp or 0 for stamp in stamps])
        place = np.clip(np.searchsorted(ends, when, side="right") - 1, 0, len(ends) - 1)
        return np.where(known, when.astype(np.float64), np.nan), sums[place]
