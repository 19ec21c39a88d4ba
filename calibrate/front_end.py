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
from dataclasses import dataclass, replace
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
RESAMPLES = 50
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

    def rows(self, some: Any) -> Bounds:
        """Some of the requests."""
        return Bounds(self.least[some], self.most[some], self.prompt_tokens[some], self.blur)


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
    identified: bool = True
    """False where nearly nothing but the prior tells the constant."""
    from_latencies: bool = False
    """The constant was fitted together with the coefficients, to simulated latencies; per prompt token is as known."""

    @property
    def sentences(self) -> list[str]:
        """What these numbers mean."""
        found = [
            "front end: only the sum of both ways (request to engine, tokens to client) can be told from client-side "
            "times; it is placed before the engine"
        ]
        if self.negative:
            found.append(
                "front end: requests seem to reach the engine before they were sent; check the arrivals (--arrivals) "
                "and the engine arguments"
            )
        if not self.identified:
            found.append(
                "front end: its constant is not told apart from what is expected of one (5 ms) by these latencies, as "
                "where every request queues; record a run at a rate the server keeps up with"
            )
        if self.from_latencies:
            return found
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
    bounds = replace(bounds, least=np.minimum(bounds.least, bounds.most))
    telling = int(np.isfinite(bounds.least).sum())
    if telling < FEWEST:
        return None
    found = _maximise(bounds)
    random = np.random.default_rng(SEED)
    size = bounds.most.size
    draws = [_maximise(bounds.rows(random.integers(0, size, size)), found) for _ in range(resamples)]
    # Instants are known to the blur, which all requests may share.
    shared = np.array([bounds.blur, bounds.blur / max(float(np.std(bounds.prompt_tokens)), 1.0)])
    spread = 1.96 * np.hypot(np.std(draws, axis=0, ddof=1), shared) if resamples > 1 else np.zeros(2)
    negative = resamples > 1 and bool(found[0] + spread[0] < 0)
    value = found
    if found[1] < 0:
        value = np.array([_maximise(replace(bounds, prompt_tokens=np.zeros(bounds.most.size)))[0], 0.0])
    value = np.maximum(value, 0.0)
    low, high = np.clip(found - spread, 0.0, value), np.maximum(found + spread, value)
    return FittedFrontEnd(
        float(value[0]),
        (float(low[0]), float(high[0])),
        float(value[1]),
        (float(low[1]), float(high[1])),
        telling,
        negative,
    )


def _maximise(bounds: Bounds, start: Floats | None = None) -> Floats:
    """Constant and seconds per prompt token of greatest likelihood; the noise is at least the blur."""
    least, most, tokens = bounds.least, bounds.most, bounds.prompt_tokens
    scale = max(bounds.blur, 1e-5)
    wide = np.maximum(most - least, 1e-3 * scale)

    def loss(point: Floats) -> float:
        way = point[0] * scale + point[1] * TOKENS * tokens
        noise = scale * np.exp(np.clip(point[2], 0.0, 8.0))
        # The logistic F(most) - F(least) as a product.
        inside = log_expit((way - least) / noise) + log_expit((most - way) / noise)
        return -float(np.sum(inside + np.log1p(-np.exp(-wide / noise))))

    if start is None:
        middle = ((least + most) / 2)[np.isfinite(least)]
        start = np.array([float(np.median(middle)), 0.0])
    point = np.array([start[0] / scale, start[1] / TOKENS, 1.0])
    # Three numbers: a simplex needs no linear algebra library, whose threads would cost more than the search. The
    # second one starts where the first has narrowed down to.
    for size in (1.0, 0.1):
        corners = point + np.vstack([np.zeros(3), size * np.diag([10.0, 5.0, 1.0])])
        options = {"initial_simplex": corners, "xatol": 1e-2, "fatol": 1e-3, "maxfev": 600}
        point = minimize(loss, point, method="Nelder-Mead", options=options).x
    return np.array([point[0] * scale, point[1] * TOKENS])
