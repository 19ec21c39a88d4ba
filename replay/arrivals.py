"""Which arrivals a replay uses: the measured ones, the workload's nominal ones, or ones drawn anew."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace as dataclass_replace

import numpy as np

from profiles.errors import InputError
from replay.clocks import Floats
from replay.trace import REQUEST_CLOCK, RUN_CLOCK, Trace, requests_table

DISTRIBUTIONS = ("poisson", "gamma", "constant")
SHAPE = "<distribution>:rate=R,seed=S[,burstiness=B][,overhead=SECONDS], with distribution " + "|".join(DISTRIBUTIONS)


@dataclass(frozen=True)
class Draw:
    """How a load generator drew the gaps between requests.

    ``rate`` in requests/s; ``burstiness`` the gamma distribution's shape (1 is Poisson); ``overhead`` seconds
    that every send took besides. ``poisson`` is numpy's legacy generator as old versions of vLLM's benchmark
    seed it (first request at once, then exponential gaps); ``gamma`` is the newer one's (gaps from the start,
    stretched so that the last request comes at n / rate); ``constant`` is 1 / rate.
    """

    distribution: str
    rate: float
    seed: int = 0
    burstiness: float = 1.0
    overhead: float = 0.0

    def arrivals(self, count: int) -> Floats:
        """Return ``count`` send times, seconds from the run's start."""
        random = np.random.RandomState(self.seed)
        if self.distribution == "constant":
            times = np.arange(count) / self.rate
        elif self.distribution == "poisson":
            gaps = random.exponential(1.0 / self.rate, size=count)
            times = np.concatenate([[0.0], np.cumsum(gaps)[:-1]])
        else:
            times = np.cumsum(random.gamma(self.burstiness, 1.0 / (self.rate * self.burstiness), size=count))
            # Gaps of a tiny burstiness are below what a double holds: all requests come at once.
            if times[-1] > 0:
                times *= count / self.rate / times[-1]
        return np.asarray(times + self.overhead * np.arange(count), dtype=np.float64)


def parse_draw(text: str) -> Draw:
    """Parse ``poisson:rate=16,seed=0``.

    Raises
    ------
    InputError
        If it has another shape, or a value is out of range.
    """
    distribution, _, rest = text.partition(":")
    values: dict[str, float] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        try:
            values[key.strip()] = float(value)
        except ValueError:
            equals = ""
        if not equals or key.strip() not in ("rate", "seed", "burstiness", "overhead"):
            raise InputError(f"{text!r}: expected {SHAPE}", field="--arrivals")
    rate, seed = values.get("rate", 0.0), values.get("seed", 0.0)
    fine = distribution in DISTRIBUTIONS and 1e-6 <= rate < 1e9 and seed.is_integer() and 0 <= seed < 2**32
    fine = fine and 0 < values.get("burstiness", 1.0) < 1e6 and 0 <= values.get("overhead", 0.0) < 1e6
    if not fine:
        raise InputError(f"{text!r}: expected {SHAPE}", field="--arrivals")
    return Draw(distribution, rate, int(seed), values.get("burstiness", 1.0), values.get("overhead", 0.0))


def with_arrivals(trace: Trace, choice: str) -> Trace:
    """Return the trace with the arrivals that a replay shall use.

    Parameters
    ----------
    trace : Trace
    choice : str
        ``measured``, ``nominal``, or a draw such as ``poisson:rate=16,seed=0`` for a trace whose arrivals are
        unknown: its latencies then count from the drawn times.

    Raises
    ------
    InputError
        If the trace lacks the arrivals asked for.
    """
    if choice == "measured":
        if trace.clock == REQUEST_CLOCK:
            raise InputError(
                f"{trace.name} does not say when its requests were sent; --arrivals poisson:rate=R,seed=S draws "
                "them as the load generator did (its --request-rate and --seed)",
                field="--arrivals",
            )
        return trace
    if choice == "nominal":
        if not trace.has("nominal_arrival"):
            raise InputError(f"{trace.name} has no nominal arrivals (a workload file)", field="--arrivals")
        # Both sides count from the nominal instant: the workload's own clock is what is compared.
        return _moved(trace, trace.column("nominal_arrival"), "nominal: the workload's")
    draw = parse_draw(choice)
    if trace.clock == RUN_CLOCK:
        raise InputError(
            f"{trace.name} has measured arrivals; drawing others would pair each request with another's load",
            field="--arrivals",
        )
    return _moved(trace, draw.arrivals(len(trace)), f"assumed: drawn, {choice}")


def _moved(trace: Trace, arrivals: Floats, origin: str) -> Trace:
    """Set the arrivals; stamps of a per-request clock move along."""
    columns = {name: trace.requests.column(name).combine_chunks() for name in trace.requests.column_names}
    columns["arrival"] = arrivals
    meta = {**trace.meta, "columns": {**trace.meta.get("columns", {}), "arrival": origin}}
    if trace.clock == REQUEST_CLOCK:
        for name in ("queued", "scheduled", "first_token", "last_token"):
            columns[name] = trace.column(name) + arrivals
        columns["token_times"] = [
            None if times is None else [time + sent for time in times]
            for times, sent in zip(trace.lists("token_times"), arrivals.tolist(), strict=True)
        ]
        meta["clock"] = {**meta["clock"], "kind": RUN_CLOCK}
        meta["notes"] = [*meta.get("notes", []), f"send times were not recorded; arrivals are drawn anew: {origin}"]
    return dataclass_replace(trace, requests=requests_table(columns, len(trace)), meta=meta, _columns={})
