"""The front end: what a request takes on its way to the engine, and its tokens on their way back.

A client counts from when it sends a request, so what it measures holds the network, the HTTP server and the tokeniser
besides the engine. Once the iterations are numbered, every request says between which two of them it reached the
engine: not after the iteration that computed its first tokens was scheduled, and, where the one before had room left,
not before that was. An interval each, from which a constant and a time per prompt token follow by maximum likelihood
(interval-censored regression with logistic noise, which no single odd request moves far).

Moving the engine's whole clock against the client's changes nothing that a client sees. So only the sum of both ways
can be told; all of it is placed before the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import log_expit

Floats = npt.NDArray[np.floating[Any]]

FEWEST = 20
"""Requests with a lower bound, below which nothing is fitted: everybody queued, and a queue hides the way to it."""
TOKENS = 1e-6
"""Seconds per prompt token in one unit of the search."""
RESAMPLES = 60
SEED = 20240815


@dataclass(frozen=True)
class Bounds:
    """Between which times after its sending each request reached the engine.

    ``least`` (-inf where unknown), ``most`` in seconds, ``prompt_tokens``; shape (requests,) each. ``blur`` is how
    precisely the instants are known, in seconds.
    """

    least: Floats
    most: Floats
    prompt_tokens: Floats
    blur: float

    @classmethod
    def of_all(cls, parts: Sequence[Bounds]) -> Bounds:
        """Bounds of several runs that share a front end."""
        least, most, prompts = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("least", "most", "prompt_tokens")
        )
        return cls(least, most, prompts, max(part.blur for part in parts))


@dataclass(frozen=True)
class FittedFrontEnd:
    """Seconds per request and per prompt token, with 95 % intervals, from ``requests`` that did not queue."""

    per_request: float
    per_request_ci95: tuple[float, float]
    per_prompt_token: float
    per_prompt_token_ci95: tuple[float, float]
    requests: int
    negative: bool = False
    """Requests seem to reach the engine before they are sent."""

    @property
    def sentences(self) -> list[str]:
        """What these numbers mean."""
        found = [
            "front end: only the sum of both ways (request to engine, tokens to client) can be told from client-side "
            "times; it is placed before the engine"
        ]
        if self.negative:
            found.append(
                "front end: requests seem to reach the engine before they were sent; check the arrivals (--arrivals) and "
                "the engine arguments"
            )
        if self.per_prompt_token_ci95[0] <= 0:
            found.append(
                "front end: a time per prompt token is not told apart from 0; send prompts of 100 and of 10,000 tokens "
                "at a low rate to tell it"
            )
        return found


def fit_front_end(bounds: Bounds, resamples: int = RESAMPLES) -> FittedFrontEnd | None:
    """Fit a constant and a time per prompt token, both at least 0; None where too few requests tell them.

    Intervals are of a bootstrap over requests; without resamples they are points.
    """
    least, most = np.minimum(bounds.least, bounds.most), bounds.most
    telling = int(np.isfinite(least).sum())
    if telling < FEWEST:
        return None
    random = np.random.default_rng(SEED)
    value = _maximise(least, most, bounds.prompt_tokens, bounds.blur, least_way=0.0)
    draws = []
    for _ in range(resamples):
        some = random.integers(0, least.size, least.size)
        # Free to be negative: a bound would make values next to it look sure.
        draws.append(_maximise(least[some], most[some], bounds.prompt_tokens[some], bounds.blur, start=value))
    # Instants are known to the blur, which all requests may share.
    shared = np.array([bounds.blur, bounds.blur / max(float(np.std(bounds.prompt_tokens)), 1.0)])
    spread = 1.96 * np.hypot(np.std(draws, axis=0, ddof=1), shared) if resamples > 1 else np.zeros(2)
    low, high = np.maximum(value - spread, 0.0), value + spread
    negative = resamples > 1 and float(np.mean(draws, axis=0)[0] + spread[0]) < 0
    return FittedFrontEnd(
        float(value[0]),
        (float(low[0]), float(high[0])),
        float(value[1]),
        (float(low[1]), float(high[1])),
        telling,
        negative,
    )


def _maximise(
    least: Floats,
    most: Floats,
    tokens: Floats,
    blur: float,
    *,
    start: Floats | None = None,
    least_way: float | None = None,
) -> Floats:
    """Constant and seconds per prompt token of greatest likelihood; the noise is at least ``blur``."""
    wide = most - least
    scale = max(blur, 1e-5)

    def loss(point: Floats) -> float:
        way = point[0] * scale + point[1] * TOKENS * tokens
        noise = scale * np.exp(point[2])
        above, below = (way - least) / noise, (most - way) / noise
        # The logistic F(below) - F(-above) as a product; an interval that is a point gets a small width.
        apart = np.maximum(wide, 1e-3 * scale) / noise
        return -float(np.sum(log_expit(above) + log_expit(below) + np.log1p(-np.exp(-apart))))

    middle = ((least + most) / 2)[np.isfinite(least)]
    spread = float(np.median(np.abs(middle - np.median(middle)))) if middle.size else scale
    if start is None:
        start = np.array([max(float(np.median(middle)), 0.0), 0.0])
    first = np.array([start[0] / scale, start[1] / TOKENS, np.log(max(spread / scale, 1.0))])
    bounds = [(least_way, None), (least_way, None), (0.0, 8.0)]
    found = minimize(loss, first, method="L-BFGS-B", bounds=bounds)
    return np.array([found.x[0] * scale, found.x[1] * TOKENS])
