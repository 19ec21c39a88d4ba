"""Arrivals drawn as load generators draw them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from profiles.errors import InputError
from replay.clocks import Floats

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
