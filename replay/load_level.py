"""A load level: a run of which only aggregates are known, as requests that can be drawn.

``meta["aggregates"]`` of such a trace holds ``{metric: {statistic: seconds}}``, with metrics ``ttft``, ``tpot``,
``itl`` and ``e2e`` and statistics ``mean``, ``std`` and percentiles (``p50``, ``p99.9``), and under ``throughput`` the
run's ``duration`` (s), ``output_tokens_per_s`` and ``requests_per_s``. ``meta["workload"]`` says how its requests were
made, so that a simulation can make such requests again, with any seed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from replay.clocks import Floats
from replay.draws import Draw, parse_draw
from replay.trace import REQUEST_CLOCK, RUN_CLOCK, Trace, requests_table

METRICS = ("ttft", "tpot", "itl", "e2e")
THROUGHPUT = ("duration", "output_tokens_per_s", "requests_per_s")
LATENCY_STAMPS = ("first_token", "last_token")
MOST_REQUESTS = 10**6


@dataclass(frozen=True)
class LoadLevel:
    """How the requests of a load level are made.

    Parameters
    ----------
    requests : int
    prompt_tokens, output_tokens : float
        Means. Without deviation all requests are alike: a mean that is no whole number is met by the neighbouring ones.
    rate : float, optional
        Requests per second; absent where all were sent at once, or as clients became free.
    burstiness : float
        Shape of the gamma distribution of the gaps; 1 is Poisson.
    distribution : {"gamma", "poisson"}
        As of ``replay.draws.Draw``.
    max_concurrency : int, optional
        Requests that the clients keep in flight at most: a closed loop.
    prompt_tokens_std, output_tokens_std : float
        Standard deviations; lengths are then drawn from gamma distributions, which are positive and may be wide.
    scheme : str, optional
        Arrivals as the user said they were drawn (``--arrivals``): no other seed is tried.
    lengths_known : bool
        False where only the totals are known, and that requests differed is likely.
    """

    requests: int
    prompt_tokens: float
    output_tokens: float
    rate: float | None = None
    burstiness: float = 1.0
    distribution: str = "gamma"
    max_concurrency: int | None = None
    prompt_tokens_std: float = 0.0
    output_tokens_std: float = 0.0
    scheme: str | None = None
    lengths_known: bool = True

    @property
    def drawn(self) -> bool:
        """Whether another seed makes other requests."""
        spread = self.prompt_tokens_std > 0 or self.output_tokens_std > 0
        return spread or (self.scheme is None and self.rate is not None)

    @property
    def exact(self) -> bool:
        """Whether these are the very requests that were measured, and none that are only alike."""
        return not self.drawn and self.lengths_known

    def arrivals(self, seed: int) -> Floats:
        """Send times in seconds from the run's start; in a closed loop the earliest ones."""
        if self.scheme is not None:
            return parse_draw(self.scheme).arrivals(self.requests)
        if self.rate is None:
            return np.zeros(self.requests)
        return Draw(self.distribution, self.rate, seed, self.burstiness).arrivals(self.requests)

    def lengths(self, seed: int) -> tuple[Floats, Floats]:
        """Prompt and output tokens, whole numbers of at least 1."""
        random = np.random.default_rng([seed, 1])
        prompt = _lengths(self.prompt_tokens, self.prompt_tokens_std, self.requests, random)
        return prompt, _lengths(self.output_tokens, self.output_tokens_std, self.requests, random)

    def arrivals_said(self, seed: int) -> str:
        """For ``meta.columns``."""
        sent = f"{self.distribution}:rate={self.rate:g},seed={seed}" if self.rate is not None else "all at the start"
        if self.rate is not None and self.distribution == "gamma":
            sent += f",burstiness={self.burstiness:g}"
        if self.scheme is not None:
            sent = self.scheme
        if self.max_concurrency is not None:
            sent += f", at most {self.max_concurrency} in flight"
        return f"assumed: drawn, {sent}"

    def trace(self, meta: Mapping[str, Any], lengths_said: Mapping[str, str]) -> Trace:
        """Return a trace of such requests, with the lengths of seed 0, arrivals unknown and nothing measured."""
        prompt, output = self.lengths(0)
        columns = {
            "id": [str(row) for row in range(self.requests)],
            "status": ["ok"] * self.requests,
            "prompt_tokens": prompt,
            "output_tokens": output,
        }
        made = "assumed: requests were made from the load level, not measured"
        origins = {"id": made, "status": made, "arrival": "unknown: drawn for each replay", **lengths_said}
        said = {"clock": {"kind": REQUEST_CLOCK}, "warmed_up": True, "columns": origins, "workload": asdict(self)}
        return Trace(requests_table(columns, self.requests), {**meta, **said})


def _lengths(mean: float, deviation: float, count: int, random: np.random.Generator) -> Floats:
    if deviation > 0:
        drawn = random.gamma((mean / deviation) ** 2, deviation**2 / mean, count)
        return np.asarray(np.maximum(np.round(drawn), 1.0), dtype=np.float64)
    return np.asarray(np.maximum(np.diff(np.floor(mean * np.arange(count + 1) + 0.5)), 1.0), dtype=np.float64)


def level_of(trace: Trace) -> LoadLevel | None:
    """How a trace's requests are made, or None where they were measured."""
    said = trace.meta.get("workload")
    return LoadLevel(**said) if said else None


def holds_aggregates(trace: Trace) -> bool:
    """Whether a trace's latencies are known as aggregates only."""
    measured = any(trace.has(name) for name in LATENCY_STAMPS) or trace.iterations is not None
    return bool(trace.meta.get("aggregates")) and not measured


def draws(trace: Trace, count: int) -> list[Trace]:
    """The same load level with several seeds; one where its requests are given."""
    level = level_of(trace)
    if level is None or not level.drawn:
        return [trace]
    return [draw(trace, seed) for seed in range(count)]


def draw(trace: Trace, seed: int) -> Trace:
    """Return a load level's trace with arrivals and lengths of a seed."""
    level = level_of(trace)
    assert level is not None
    prompt, output = level.lengths(seed)
    columns = {name: trace.requests.column(name).combine_chunks() for name in trace.requests.column_names}
    columns |= {"arrival": level.arrivals(seed), "prompt_tokens": prompt, "output_tokens": output}
    origins = {**trace.meta.get("columns", {}), "arrival": level.arrivals_said(seed)}
    clock = {**(trace.meta.get("clock") or {}), "kind": RUN_CLOCK, "origin": 0.0}
    meta = {**trace.meta, "columns": origins, "clock": clock}
    return replace(trace, requests=requests_table(columns, len(trace)), meta=meta, _columns={})


def with_scheme(trace: Trace, scheme: str) -> Trace:
    """Return a load level's trace whose arrivals are drawn as a user said, and never otherwise."""
    level = level_of(trace)
    assert level is not None
    return draw(trace.with_meta(workload=asdict(replace(level, scheme=scheme, rate=None))), 0)


def percentile(statistic: str) -> float | None:
    """The percentile (0 to 100) that a statistic's name says, or None where it is none."""
    match = re.fullmatch(r"p(\d{1,2}(?:\.\d+)?|100)", statistic)
    return float(match[1]) if match else None
