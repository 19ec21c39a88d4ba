"""The iterations of a run, told by the times at which a client saw each token.

Every token that a client sees was produced by one engine iteration, and a request that decodes gets one token per
iteration. So the next tokens of all decoding requests belong together: followed from the first token on, they number
the run's iterations. Each request sees its tokens late by its own amount (its place in the loop that sends them); a
stall of the front end or of the client holds several iterations back and delivers them at once; and a chunk may lack
(no printable text yet) or hold two tokens. The numbering survives all three: a stall hits everybody, and a request
that lags is renumbered only if it stays behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import median_filter

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.signedinteger[Any]]

NEIGHBOURS = 31
"""Iterations over which a typical duration is taken."""
PERSISTENT = 15
"""Tokens over whose median a request's place among the iterations is taken: longer than a stall."""
BURST = 0.3
"""Iterations that seem shorter than this share of their neighbours were delivered together."""
PRECISE = 40.0
"""A span is at least this many times as long as the jitter of a token."""


@dataclass(frozen=True)
class Timeline:
    """Numbered iterations.

    ``ends`` (seconds, shape (iterations,)) is when their tokens arrived; ``first[r]`` and ``last[r]`` are the
    iterations of request r's first and last token; ``idle[i]`` says that no request was decoding before iteration i.
    ``jitter`` is the median absolute deviation of a token from its iteration, in seconds.
    """

    times: tuple[Floats, ...]
    places: tuple[Ints, ...]
    ends: Floats
    idle: npt.NDArray[np.bool_]
    jitter: float

    @property
    def first(self) -> Ints:
        """Iteration of each request's first token."""
        return np.array([own[0] for own in self.places])

    @property
    def last(self) -> Ints:
        """Iteration of each request's last token."""
        return np.array([own[-1] for own in self.places])

    @property
    def smear(self) -> float:
        """Jitter as a share of a typical iteration: at a half, iterations can no longer be told apart."""
        steps = np.diff(self.ends)[~self.idle[1:]]
        return self.jitter / max(float(np.median(steps)), 1e-9) if steps.size else 0.0

    @property
    def held_back(self) -> float:
        """Share of the iterations that were delivered together with the next."""
        return float(_burst(self.ends, self.idle)[1:].mean()) if self.ends.size > 1 else 0.0

    def spans(self) -> list[tuple[int, int, float]]:
        """Measured seconds between iterations: the median over the requests that decoded in both.

        A request's own lateness cancels. A span ends at the next iteration that is far enough and was not delivered
        in a burst.
        """
        burst = _burst(self.ends, self.idle)
        steady = ~(burst | np.append(burst[1:], False))
        when: list[dict[int, float]] = [{} for _ in self.ends]
        for request, (times, places) in enumerate(zip(self.times, self.places, strict=True)):
            for time, place in zip(times.tolist(), places.tolist(), strict=True):
                when[place].setdefault(request, time)
        found: list[tuple[int, int, float]] = []
        begin = 0
        for end in range(1, self.ends.size):
            if self.idle[end]:
                begin = end
            elif steady[end] and self.ends[end] - self.ends[begin] >= PRECISE * self.jitter:
                both = [time - when[begin][one] for one, time in when[end].items() if one in when[begin]]
                if both and (seconds := float(np.median(both))) > 0:
                    found.append((begin, end, seconds))
                begin = end
        return found


def follow(times: Sequence[Floats]) -> Timeline:
    """Number the iterations of a run.

    Parameters
    ----------
    times : sequence of array
        Of each request, when its tokens (or chunks) arrived, in seconds, ascending; at least one each.
    """
    arrays = tuple(np.asarray(one, dtype=np.float64) for one in times)
    ends, idle, places = _chain(arrays)
    for _ in range(2):
        burst = _burst(ends, idle)
        apart = ~(burst | np.append(burst[1:], False))
        places = tuple(_settled(own, chained, ends, apart) for own, chained in zip(arrays, places, strict=True))
        ends = _centred(arrays, places, ends)
    late = [own - ends[chained] for own, chained in zip(arrays, places, strict=True)]
    several = [one - np.median(one) for one in late if one.size > 1]
    jitter = float(np.median(np.abs(np.concatenate(several)))) if several else 0.0
    return Timeline(arrays, places, ends, idle, jitter)


def _chain(times: tuple[Floats, ...]) -> tuple[Floats, npt.NDArray[np.bool_], tuple[Ints, ...]]:
    """Follow the next tokens of all decoding requests, a new request joining the iteration nearest in time."""
    begins = np.array([own[0] for own in times])
    order = np.argsort(begins, kind="stable").tolist()
    start = np.zeros(len(times), dtype=np.int64)
    late = np.zeros(len(times))
    ends: list[float] = []
    idle: list[bool] = []
    decoding: list[int] = []
    entered = 0
    while decoding or entered < len(order):
        number = len(ends)
        upcoming = np.array([times[one][number - start[one]] - late[one] for one in decoding])
        end = float(np.median(upcoming)) if decoding else float(begins[order[entered]])
        end = max(end, ends[-1]) if ends else end
        idle.append(not decoding)
        ends.append(end)
        late[decoding] += 0.1 * (upcoming - end)
        following = [
            times[one][number + 1 - start[one]] - late[one]
            for one in decoding
            if number + 1 - start[one] < len(times[one])
        ]
        recent = np.diff(ends[-NEIGHBOURS:])
        step = float(np.median(following)) - end if following else float(np.median(recent)) if recent.size else 0.0
        close = BURST * float(np.median(recent)) if recent.size else 0.0
        while entered < len(order) and begins[order[entered]] < end + max(step, 0.0) / 2 + 1e-9:
            one = order[entered]
            until = float(begins[one]) + close
            left = [np.searchsorted(times[each], until + late[each]) - (number - start[each]) for each in decoding]
            # Of several iterations delivered at once, it joins the one that leaves as many tokens as it has of its own.
            if left and np.median(left) > max(np.searchsorted(times[one], until), 1):
                break
            start[one], late[one] = number, begins[one] - end
            decoding.append(one)
            entered += 1
        decoding = [one for one in decoding if number + 1 - start[one] < len(times[one])]
    places = tuple(begin + np.arange(len(own)) for begin, own in zip(start, times, strict=True))
    return np.array(ends), np.array(idle), places


def _burst(ends: Floats, idle: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Iterations that were delivered together with the one before."""
    steps = np.diff(ends, prepend=ends[0])
    typical = median_filter(np.where(idle, np.median(steps), steps), NEIGHBOURS, mode="nearest")
    return np.asarray((steps < BURST * typical) & ~idle)


def _nearest(ends: Floats, times: Floats) -> Ints:
    """Iteration whose end lies nearest to each time."""
    right = np.clip(np.searchsorted(ends, times), 1, ends.size - 1)
    return np.asarray(right - (times - ends[right - 1] < ends[right] - times))


def _settled(times: Floats, places: Ints, ends: Floats, apart: npt.NDArray[np.bool_]) -> Ints:
    """Move a request by whole iterations where it stays apart from the others: a chunk lacked or held two tokens.

    Only tokens of iterations that stand apart in time (``apart``) tell.
    """
    telling = np.flatnonzero(apart[_nearest(ends, times)])
    if telling.size < PERSISTENT:
        return places
    seen = times[telling]
    nearest = _nearest(ends, seen)
    nearest = _nearest(ends, seen - np.median(seen - ends[nearest]))
    moved = np.round(median_filter((nearest - telling).astype(float), PERSISTENT, mode="nearest"))
    if np.count_nonzero(np.diff(moved) < 0) > 1:
        # Chunks that lack make the following ones later, never earlier: these times do not tell.
        moved = np.full(telling.size, np.round(np.median(nearest - telling)))
    of_all = moved[np.clip(np.searchsorted(telling, np.arange(times.size)), 0, telling.size - 1)]
    settled = np.maximum.accumulate(of_all.astype(np.int64) + np.arange(times.size))
    return np.asarray(np.clip(settled, 0, ends.size - 1))


def _centred(times: tuple[Floats, ...], places: tuple[Ints, ...], ends: Floats) -> Floats:
    """When each iteration's tokens arrived: the median over its requests, each less its own lateness."""
    late = [float(np.median(own - ends[chained])) for own, chained in zip(times, places, strict=True)]
    arrived = np.concatenate([own - one for own, one in zip(times, late, strict=True)])
    numbers = np.concatenate(places)
    order = np.argsort(numbers, kind="stable")
    parts = np.split(arrived[order], np.searchsorted(numbers[order], np.arange(1, ends.size)))
    centred = np.array([np.median(part) if part.size else end for part, end in zip(parts, ends, strict=True)])
    return np.asarray(np.maximum.accumulate(centred))
