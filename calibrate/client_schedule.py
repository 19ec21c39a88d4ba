"""The schedule of a run, recovered from what its clients saw of every token.

``calibrate.token_times`` numbers the iterations. vLLM's scheduling rules then say what each computed, as in
``calibrate.reconstruction``: the scheduler is driven iteration by iteration, and requests are admitted so that their
first tokens come where the clients saw them. When the engine got a request is not measured; what the admissions say of
it becomes the front end's bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from calibrate.front_end import Bounds, fit_front_end
from calibrate.reconstruction import Driven, NotRecoverable, Reconstruction, StepSeconds, drive
from calibrate.token_times import Timeline, follow
from profiles.errors import InputError
from replay.run import replayable
from replay.trace import Trace
from simulator.batch import Batch
from simulator.engine_config import EngineConfig

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.signedinteger[Any]]
Way = tuple[float, float]
"""Seconds to the engine: per request, and per prompt token."""

GUESSES = 12
GUESSED_OVER = 300
"""Iterations over which the first guess is made."""
ROUNDS = 3
REPAIRS = 4
TOLERATED = 2
"""Iterations by which a first token may lie off: clients see tokens too late, and some not at all."""
ROOM = 0.9
"""An iteration of less than this share of the token budget would have taken in a request that was there."""
PAUSES = 0.05
"""Largest share of a run that counts as pauses."""
SMEARED = 0.5
"""Jitter, as a share of an iteration, from which tokens no longer tell iterations apart."""
HELD_BACK = 0.2
"""Share of iterations delivered together with the next from which the client, or the front end, is saturated."""


@dataclass(frozen=True)
class ClientReconstruction:
    """``schedule`` as of engine stamps; ``bounds`` on the front end; ``warnings`` of times that are doubtful."""

    schedule: Reconstruction
    bounds: Bounds
    warnings: tuple[str, ...]


def is_client_side(trace: Trace) -> bool:
    """Whether a trace was measured at the client and holds nothing of the engine's own."""
    return trace.meta.get("vantage") == "client" and not trace.has("scheduled") and trace.iterations is None


def reconstruct_client_side(
    trace: Trace,
    config: EngineConfig,
    step_seconds: StepSeconds,
    refine: Callable[[Reconstruction], StepSeconds],
    known: npt.NDArray[np.bool_] | None = None,
) -> ClientReconstruction:
    """Recover the schedule of a run from its clients' token times.

    Parameters
    ----------
    trace : Trace
        With arrivals and ``token_times`` on the client's clock.
    config, step_seconds, refine, known
        As of ``calibrate.reconstruction.reconstruct``.

    Raises
    ------
    NotRecoverable
        If there are no token times.
    InputError
        If there are tokens before their request was sent, or a client too slow to tell iterations apart.
    """
    run = _Run(trace, config, known)
    way = run.first_guess()
    for again in range(ROUNDS):
        driven = run.compose(way)
        found = run.reconstruction(driven)
        if not found.spans():
            raise InputError(f"{trace.name}: no iterations can be timed: too few tokens, or none that were seen apart")
        step_seconds = refine(found)
        if run.late:
            run.place_ends(driven, step_seconds)
            if not again:
                way = run.first_guess()
                continue
        bounds = run.bounds(driven, step_seconds)
        fitted = fit_front_end(bounds, resamples=0)
        if fitted is None:
            break
        following = fitted.per_request, fitted.per_prompt_token
        if np.allclose(following, way, rtol=0.02, atol=1e-5):
            break
        way = following
    return ClientReconstruction(_pauses_spread(found, step_seconds), bounds, run.warnings())


def _pauses_spread(found: Reconstruction, step_seconds: StepSeconds) -> Reconstruction:
    """Spread what a robust fit leaves of the time (rare pauses of the engine) evenly over the run.

    A queue feels every pause: the sum of all iterations must be right, not only the typical one.
    """
    spans = found.spans()
    measured = sum(seconds for _, seconds in spans)
    told = sum(step_seconds(batch) for batches, _ in spans for batch in batches)
    factor = float(np.clip(measured / told, 1 - PAUSES, 1 + PAUSES))
    return replace(found, stamps=found.stamps * factor)


def _misses(off: Ints) -> float:
    """How far first tokens lie off, in iterations; no single request counts for many."""
    return float(np.minimum(np.abs(off), 5).sum())


class _Run:
    """Numbered iterations, the requests, and the scheduler that fills the iterations."""

    def __init__(self, trace: Trace, config: EngineConfig, known: npt.NDArray[np.bool_] | None) -> None:
        self.trace, self.config = trace, config
        self.depth = 2 if config.async_scheduling else 1
        rows, self.requests = replayable(trace, config)
        if not rows:
            raise InputError(f"{trace.name} has no request that was served: all failed or without arrival")
        lists = trace.lists("token_times")
        usable = np.array([bool(lists[row]) and (known is None or bool(known[row])) for row in rows], dtype=bool)
        if not any(lists):
            raise NotRecoverable(
                f"{trace.name} was measured at the client and has no times of single tokens (`vllm bench serve` writes "
                "them with --save-detailed)"
            )
        if usable.sum() < 2:
            raise InputError(f"{trace.name} has {usable.sum()} requests with token times: too few to fit")
        times = [np.asarray(lists[row], dtype=np.float64) for row, use in zip(rows, usable, strict=True) if use]
        self.known = np.flatnonzero(usable)
        self.arrival = trace.column("arrival")[rows]
        self.prompt = trace.column("prompt_tokens")[rows]
        self.begins = np.array([own[0] for own in times])
        self._refuse_early_tokens()
        self.timeline: Timeline = follow(times)
        if self.timeline.smear > SMEARED:
            raise InputError(
                f"{trace.name}: the tokens of an iteration reach the client over {self.timeline.smear:.0%} of an "
                "iteration: the client was too slow to tell iterations apart (saturated); use more client processes"
            )
        self.late = config.semantics.output_after_next_launch
        self.ends = self.timeline.ends
        self.numbers = self._numbered()
        self.target = self.numbers[self.timeline.first]
        self.rank = self._rank()

    def _refuse_early_tokens(self) -> None:
        early = self.begins <= self.arrival[self.known]
        if early.any():
            one = self.requests[int(self.known[np.argmax(early)])]
            raise InputError(
                f"{self.trace.name}: {early.sum()} first tokens come before their request was sent (the first is of "
                f"request {one.id!r}): send times and token times are not of one clock"
            )

    def _numbered(self) -> Ints:
        """Number the iterations, with room in idle times for those that computed prompts only."""
        timeline, budget = self.timeline, self.config.token_budget
        prompts = np.zeros(timeline.ends.size)
        np.add.at(prompts, timeline.first, self.prompt[self.known])
        steps = np.where(timeline.idle, np.ceil(prompts / budget) + self.depth, 1).astype(np.int64)
        return np.asarray(np.cumsum(steps) - steps[0], dtype=np.int64)

    def _rank(self) -> Floats:
        """Order in which requests reached the engine: that of their first tokens, as it serves them in turn.

        The way there may take longer for one than for the next. Who left no stamp keeps its place among the arrivals.
        """
        by_arrival = np.argsort(self.arrival, kind="stable")
        rank = np.full(self.arrival.size, -np.inf)
        rank[self.known] = self.target
        queued = np.maximum.accumulate(rank[by_arrival])
        rank[by_arrival] = np.where(np.isinf(rank[by_arrival]), queued, rank[by_arrival])
        return rank

    def _admissions(self, way: Way) -> Ints:
        """Iteration that each request is admitted into at the earliest, by its arrival and the way to the engine."""
        when = self.arrival + way[0] + way[1] * self.prompt
        ends, idle, numbers = self.ends, self.timeline.idle, self.numbers
        place = np.searchsorted(ends, when, side="right")
        inside = np.minimum(place, ends.size - 1)
        before = np.where(inside > 0, numbers[inside - 1], numbers[0] - self._lead)
        admitted = np.where(idle[inside], before + 1, numbers[inside] + self.depth)
        return np.asarray(np.where(place < ends.size, admitted, numbers[-1] + 1), dtype=np.int64)

    @property
    def _lead(self) -> int:
        """Iterations before the first token."""
        return int(np.ceil(self.prompt.max() / self.config.token_budget)) + self.depth

    def _drive(self, admitted: Ints, last: int | None = None) -> Driven:
        last = int(self.numbers[-1]) if last is None else last
        return drive(self.config, self.requests, admitted, int(self.numbers[0]), last, self.rank)

    def _off(self, driven: Driven) -> Ints:
        """Iterations by which the scheduler's first tokens come late."""
        return np.asarray(driven.placed[self.known] - self.target)

    def first_guess(self) -> Way:
        """The constant way to the engine under which the scheduler, let run, comes closest to all first tokens."""
        longest = float(np.quantile(self.begins - self.arrival[self.known], 0.01))
        guesses = np.linspace(0.0, longest, GUESSES)
        last = int(self.numbers[min(GUESSED_OVER, self.numbers.size) - 1])
        early = self.target <= last
        misses = []
        for guess in guesses:
            off = self._off(self._drive(self._admissions((guess, 0.0)), last))[early]
            misses.append(_misses(off))
        return float(guesses[int(np.argmin(misses))]), 0.0

    def compose(self, way: Way) -> Driven:
        """Drive the scheduler; admissions of known requests move until their first tokens lie where they were seen."""
        by_arrival = np.argsort(self.arrival, kind="stable")
        known = np.zeros(self.arrival.size, dtype=bool)
        known[self.known] = True
        free = self._admissions(way)
        admitted = free.copy()
        driven = self._drive(admitted)
        for repair in range(REPAIRS):
            off = self._off(driven)
            if not off.any():
                break
            wanted = admitted.copy()
            near = np.where(np.abs(off) < 50, off, 0)
            wanted[self.known] -= near if repair % 2 == 0 else np.sign(near)
            # Whoever came later and left no stamp is not served earlier.
            queued = np.maximum.accumulate(np.where(known, wanted, free)[by_arrival])
            wanted[by_arrival] = np.where(known[by_arrival], wanted[by_arrival], queued)
            again = self._drive(wanted)
            gain = _misses(off) - _misses(self._off(again))
            if gain > 0:
                admitted, driven = wanted, again
            if gain < 0.05 * off.size and repair:
                break
        return driven

    def reconstruction(self, driven: Driven) -> Reconstruction:
        """Batches, and the measured spans as differences of stamps."""
        stamps = [0.0]
        numbers: list[int] = []
        quiet: list[bool] = []
        for begin, end, seconds in self.timeline.spans():
            begins, ended = (int(self.numbers[one]) for one in (begin, end))
            begins, ended = begins + self._waits(driven, begins), ended + self._waits(driven, ended)
            if not numbers:
                numbers.append(begins)
            elif numbers[-1] != begins:
                numbers.append(begins)
                stamps.append(stamps[-1] + 1.0)
                quiet.append(True)
            numbers.append(ended)
            stamps.append(stamps[-1] + seconds)
            quiet.append(False)
        if not numbers:
            raise InputError(f"{self.trace.name} has no two tokens of one request: there is nothing to fit")
        misplaced = int(np.count_nonzero(np.abs(self._off(driven)) > TOLERATED))
        return Reconstruction(
            np.array(stamps), np.array(numbers), driven.first, driven.batches, misplaced, np.array(quiet, dtype=bool)
        )

    def _waits(self, driven: Driven, number: int) -> int:
        """Iterations that the tokens of an iteration wait for (``Semantics.output_after_next_launch``)."""
        following = driven.batch(number + 1)
        return int(self.late and following is not None and bool(following.prefills))

    def place_ends(self, driven: Driven, step_seconds: StepSeconds) -> None:
        """Tell when iterations ended whose tokens had to wait for the next."""
        ends = self.timeline.ends.copy()
        for place, number in enumerate(self.numbers.tolist()):
            following = driven.batch(number + 1)
            if following is not None and self._waits(driven, number):
                ends[place] -= step_seconds(following)
        self.ends = np.maximum.accumulate(ends)

    def bounds(self, driven: Driven, step_seconds: StepSeconds) -> Bounds:
        """Between which times after its sending each request reached the engine."""
        place = {int(number): one for one, number in enumerate(self.numbers)}
        ends, batch = self.ends, driven.batch
        least, most, prompts = [], [], []
        for one, begins, target in zip(self.known.tolist(), self.begins.tolist(), self.target.tolist(), strict=True):
            begun, sent = int(driven.begun[one]), float(self.arrival[one])
            if driven.placed[one] != target:
                continue
            if batch(begun - 1) is None:
                # The engine was idle: it began at once.
                last = target + self._waits(driven, target)
                took = sum(step_seconds(own) for number in range(begun, last + 1) if (own := batch(number)))
                low = high = begins - took - sent
            else:
                last, before = place.get(begun - self.depth), place.get(begun - self.depth - 1)
                if last is None:
                    continue
                high = float(ends[last]) - sent
                low = float(ends[before]) - sent if before is not None and self._has_room(batch(begun - 1)) else -np.inf
            least.append(low)
            most.append(high)
            prompts.append(float(self.prompt[one]))
        return Bounds(np.array(least), np.array(most), np.array(prompts), max(self.timeline.jitter, 1e-4))

    def _has_room(self, batch: Batch | None) -> bool:
        if batch is None or batch.num_seqs >= self.config.max_num_seqs:
            return False
        return batch.num_tokens <= ROOM * self.config.token_budget

    def warnings(self) -> tuple[str, ...]:
        """What of the client's times makes the fit less sure."""
        held = self.timeline.held_back
        if held < HELD_BACK:
            return ()
        return (
            f"{self.trace.name}: {held:.0%} of the iterations reached the client together with the next one: client or "
            "front end was saturated, and single iterations are uncertain",
        )
