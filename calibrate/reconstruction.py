"""The schedule of a run, recovered from the stamps that its requests left.

All tokens of one engine iteration carry the same time stamp, and a request that is not preempted gets one token per
iteration. So the iteration of its last token comes exactly ``output_tokens - 1`` after that of its first, and stamps
that requests share tie these chains together. What the chains leave open (how they lie against each other) is an
integer for each, told by the time between neighbouring stamps and a rough idea of an iteration's duration. With
every stamp numbered, vLLM's own scheduling rules say what each iteration in between computed: the scheduler is driven
iteration by iteration, and must put every request's first token where the stamps have it.

What comes out are the batches of all iterations and the measured time between numbered ones: equations that are
linear in an accelerator model's coefficients, without a simulation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import lsqr

from profiles.errors import InputError
from replay.checks.evidence import RESOLUTION
from replay.run import replayable
from replay.trace import Trace
from simulator.batch import Batch
from simulator.engine_config import EngineConfig
from simulator.request import Request, ServedRequest
from simulator.scheduler import Scheduler, Step

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.signedinteger[Any]]
StepSeconds = Callable[[Batch], float]

MOST_ROUNDS = 8
REPAIRS = 8
NEAR = 0.3
"""Share of an iteration within which a schedule call must lie of an end, to count as following it."""
CROWDED = 1000.0
"""Cost of two stamps of different time in one iteration, which cannot be."""


class NotRecoverable(InputError):
    """A run's schedule cannot be told from its stamps; ``spans`` hold what is nearest, if anything is."""

    def __init__(self, message: str, spans: Sequence[tuple[list[Batch], float]] = ()) -> None:
        super().__init__(message)
        self.spans = list(spans)


@dataclass(frozen=True)
class Reconstruction:
    """Batches of a run's iterations, and the time between those whose end was stamped.

    ``stamps`` (seconds, ascending) are the ends of the iterations ``numbers``; ``batches[number - first]`` is what an
    iteration computed (None: the engine had nothing to do). ``misplaced`` counts requests whose first token the
    scheduler puts into another iteration than the stamps do: 0 if the schedule is recovered without contradiction.
    ``quiet`` marks the gaps between stamps in which no request was decoding: the engine may have been idle.
    """

    stamps: Floats
    numbers: Ints
    first: int
    batches: list[Batch | None]
    misplaced: int
    quiet: npt.NDArray[np.bool_]

    def spans(self) -> list[tuple[list[Batch], float]]:
        """Batches and measured seconds between neighbouring stamps, those with an idle engine left out."""
        found = []
        for place, seconds in enumerate(np.diff(self.stamps)):
            if self.quiet[place]:
                continue
            inside = self.batches[self.numbers[place] + 1 - self.first : self.numbers[place + 1] + 1 - self.first]
            batches = [batch for batch in inside if batch is not None]
            if batches and len(batches) == len(inside):
                found.append((batches, float(seconds)))
        return found

    def ends(self, step_seconds: StepSeconds) -> Floats:
        """Ends of all iterations from the first stamp to the last, the time between stamps shared as predicted."""
        ends = [float(self.stamps[0])]
        for place, seconds in enumerate(np.diff(self.stamps)):
            inside = self.batches[self.numbers[place] + 1 - self.first : self.numbers[place + 1] + 1 - self.first]
            times = np.cumsum([step_seconds(batch) if batch is not None else 1e-6 for batch in inside])
            if times.size:
                ends += (self.stamps[place] + times * (seconds / times[-1])).tolist()
        return np.array(ends)


def reconstruct(
    trace: Trace,
    config: EngineConfig,
    step_seconds: StepSeconds,
    refine: Callable[[Reconstruction], StepSeconds],
    known: npt.NDArray[np.bool_] | None = None,
    *,
    computed: Floats | None = None,
) -> Reconstruction:
    """Recover the schedule of a run.

    Parameters
    ----------
    trace : Trace
        With engine stamps (``scheduled``, ``first_token``, ``last_token``) on one clock.
    config : EngineConfig
        Of the engine that ran.
    step_seconds : callable
        A rough idea of an iteration's seconds; a datasheet will do.
    refine : callable
        Returns a better one, learned from the reconstruction so far.
    known : array of bool, optional
        Rows whose stamps may be used. Of the others only arrivals and lengths are, as a simulation would.
    computed : array, optional
        Prompt tokens that each row computed (those not cached). With it, batches are put together from the numbered
        stamps alone, without a scheduler: ten times as fast, but chunks of a prompt may lie an iteration off, and
        nothing is said of ``misplaced``. Rows that are not ``known`` have their place by their stamps' time.

    Raises
    ------
    NotRecoverable
        If the trace has not the stamps it takes.
    """
    puzzle = _Puzzle(trace, config, known)
    expected = puzzle.first_guess(step_seconds)
    numbers = puzzle.number(expected, 0.3 + 0.08 * expected)
    best: tuple[tuple[int, float], Reconstruction] | None = None
    previous: Ints | None = None
    for _ in range(MOST_ROUNDS):
        if previous is not None and np.array_equal(previous, numbers):
            break
        found = puzzle.compose(numbers) if computed is None else puzzle.compose_by_stamps(numbers, computed)
        previous = numbers
        step_seconds = refine(found)
        badness = found.misplaced, puzzle.seconds_missed(found, step_seconds)
        if best is None or badness < best[0]:
            best = badness, found
        expected = puzzle.expected_steps(found, step_seconds)
        numbers = puzzle.number(expected, 0.15 + 0.03 * expected)
    assert best is not None
    return best[1]


def steps_between_tokens(trace: Trace, config: EngineConfig, step_seconds: StepSeconds) -> npt.NDArray[np.float64]:
    """Iterations that lie between each request's first and last token, by the load meanwhile; NaN where not stamped.

    Whole requests scale a rough idea of an iteration's seconds, so that the rate is right on the whole.

    Raises
    ------
    NotRecoverable
        If the trace has not the stamps it takes.
    """
    puzzle = _Puzzle(trace, config, None)
    passed = np.concatenate([[0.0], np.cumsum(puzzle.first_guess(step_seconds))])
    found = np.full(len(trace), np.nan)
    found[puzzle.rows[puzzle.known]] = passed[puzzle.last_place] - passed[puzzle.first_place]
    return found


def first_tokens_in_place(
    trace: Trace,
    config: EngineConfig,
    found: Reconstruction,
    step_seconds: StepSeconds,
    known: npt.NDArray[np.bool_] | None = None,
) -> npt.NDArray[np.bool_]:
    """Whether the scheduler, called when the stamps say it was, puts first tokens where they came.

    Unlike in a reconstruction nothing is moved until it fits. One value for each known request that was scheduled while
    others decoded (an idle engine starts at once, whichever way it schedules) and whose stamp clearly lies at the end
    of one iteration.

    Parameters
    ----------
    trace, config, known
        As of ``reconstruct``.
    found : Reconstruction
        Numbers the iterations; those between two stamps end where ``step_seconds`` has them.
    """
    puzzle = _Puzzle(trace, config, known)
    admitted, clear = puzzle.as_called(found, found.ends(step_seconds))
    driven = drive(config, puzzle.requests, admitted, int(found.numbers[0]), int(found.numbers[-1]))
    return np.asarray((driven.placed[puzzle.known] == found.numbers[puzzle.first_place])[clear])


class _Puzzle:
    """The stamps of a run, the chains they form, and the scheduler that fills the gaps."""

    def __init__(self, trace: Trace, config: EngineConfig, known: npt.NDArray[np.bool_] | None) -> None:
        self.config = config
        self.depth = 2 if config.async_scheduling else 1
        rows, self.requests = replayable(trace, config)
        names = ("first_token", "last_token", "scheduled", "arrival", "output_tokens", "prompt_tokens")
        first, last, scheduled, arrival, output, prompt = (trace.column(name)[rows] for name in names)
        stamped = ~(np.isnan(first) | np.isnan(last) | np.isnan(scheduled))
        if known is not None:
            stamped &= known[rows]
        if stamped.sum() < 2:
            raise NotRecoverable(
                f"{trace.name} has not the engine stamps (scheduled, first and last token) that it takes"
            )
        self.arrival, self.scheduled = arrival, scheduled
        self.known = np.flatnonzero(stamped)
        # Requests that were preempted had iterations without a token: nobody knows how many.
        self.straight = ~(np.nan_to_num(trace.column("preemptions")[rows])[stamped] > 0)
        self.rows = np.array(rows, dtype=np.intp)
        self.seen = ~(np.isnan(first) | np.isnan(last))
        self.every = first[self.seen], last[self.seen], prompt[self.seen]
        self.first, self.last = first[stamped], last[stamped]
        self.output, self.prompt = output[stamped].astype(np.int64), prompt[stamped]
        ticks, places = np.unique(
            np.round(np.concatenate([self.first, self.last]) / RESOLUTION).astype(np.int64), return_inverse=True
        )
        self.stamps: Floats = ticks * RESOLUTION
        self.first_place, self.last_place = places[: self.first.size], places[self.first.size :]
        self.gaps: Floats = np.diff(self.stamps)
        self.chain, self.offset = self._chains()
        self.running = np.zeros(self.gaps.size)
        for begin, end in zip(self.first_place, self.last_place, strict=True):
            self.running[begin:end] += 1
        self.quiet = self.running == 0

    def _chains(self) -> tuple[Ints, Ints]:
        """Chain of each stamp, and its iterations past the chain's origin."""
        links: list[list[tuple[int, int]]] = [[] for _ in self.stamps]
        for begin, end, output in self._straight_chains():
            links[begin].append((int(end), int(output) - 1))
            links[end].append((int(begin), 1 - int(output)))
        chain = np.full(self.stamps.size, -1, dtype=np.int64)
        offset = np.zeros(self.stamps.size, dtype=np.int64)
        count = 0
        for root in range(self.stamps.size):
            if chain[root] >= 0:
                continue
            chain[root] = count
            todo = [root]
            while todo:
                at = todo.pop()
                for other, steps in links[at]:
                    if chain[other] < 0:
                        chain[other] = count
                        offset[other] = offset[at] + steps
                        todo.append(other)
            count += 1
        return chain, offset

    def _straight_chains(self) -> Iterator[tuple[int, int, int]]:
        """Places of first and last token, and output tokens, of the requests that were not preempted."""
        chains = self.first_place[self.straight], self.last_place[self.straight], self.output[self.straight]
        return zip(*(one.tolist() for one in chains), strict=True)

    def first_guess(self, step_seconds: StepSeconds) -> Floats:
        """Iterations between neighbouring stamps, from the running requests and one scale each for decode and prefill.

        A request's decode lasts ``output - 1`` iterations: over all requests that tells by how much the rough idea is
        off, once for iterations that only decode and once for what prompts add.
        """
        count = self.gaps.size
        running, context, prompts = self.running, np.zeros(count), np.zeros(count)
        middle = (self.stamps[:-1] + self.stamps[1:]) / 2
        for one in range(self.first.size):
            begin, end = self.first_place[one], self.last_place[one]
            share = (middle[begin:end] - self.first[one]) / max(self.last[one] - self.first[one], RESOLUTION)
            context[begin:end] += self.prompt[one] + self.output[one] * share
            if begin:
                prompts[begin - 1] += self.prompt[one]
        decode, prefill = np.zeros(count), np.zeros(count)
        for place in range(count):
            decodes = [int(context[place] / running[place])] * int(running[place]) if running[place] else [1]
            decode[place] = step_seconds(Batch([], decodes))
            if prompts[place]:
                mixed = step_seconds(Batch([(int(prompts[place]), 0)], decodes))
                prefill[place] = max(0.0, mixed - decode[place])
        rows = []
        for begin, end, output in self._straight_chains():
            if output > 1 and end > begin:
                inside = slice(begin, end)
                mean = np.average(decode[inside], weights=self.gaps[inside])
                took = self.stamps[end] - self.stamps[begin]
                rows.append(((output - 1) * mean / took, prefill[inside].sum() / took))
        scales, _ = nnls(np.array(rows or [(1.0, 1.0)]), np.ones(max(len(rows), 1)))
        per_step = max(scales[0], 1e-3) * decode
        expected: Floats = np.maximum((self.gaps - scales[1] * prefill) / per_step, 0.6)
        # Between two busy periods the time says nothing; the next prompt's chunks are what was computed.
        expected[self.quiet] = np.maximum(np.ceil(prompts[self.quiet] / self.config.token_budget), 1)
        return expected

    def number(self, expected: Floats, deviation: Floats) -> Ints:
        """Number the stamps' iterations: whole numbers, rising, closest to the expected steps between neighbours."""
        count = self.gaps.size
        pairs = np.arange(count)
        matrix = csr_matrix(
            (
                np.concatenate([1 / deviation, -1 / deviation]),
                (np.concatenate([pairs, pairs]), np.concatenate([self.chain[1:], self.chain[:-1]])),
            ),
            shape=(count, int(self.chain.max()) + 1),
        )
        steps = np.diff(self.offset)
        real = lsqr(matrix, (expected - steps) / deviation, atol=1e-12, btol=1e-12, iter_lim=5000)[0]
        shift = np.round(real - real[self.chain[0]]).astype(np.int64)
        return self._settled(shift, expected, deviation)

    def _settled(self, shift: Ints, expected: Floats, deviation: Floats) -> Ints:
        """Move single chains by an iteration or two while that lowers the cost."""
        chain, steps = self.chain, np.diff(self.offset)
        touching = [np.flatnonzero((chain[1:] == one) ^ (chain[:-1] == one)) for one in range(shift.size)]

        def cost(some: Ints) -> float:
            between = steps[some] + shift[chain[1:][some]] - shift[chain[:-1][some]]
            off = np.abs(between - expected[some]) / deviation[some]
            return float(np.where(off < 2, off * off, 4 * off - 4).sum() + CROWDED * np.maximum(0, 1 - between).sum())

        for _ in range(30):
            moved = False
            for one, some in enumerate(touching):
                here = cost(some)
                for by in (1, -1, 2, -2):
                    shift[one] += by
                    if cost(some) < here - 1e-9:
                        moved = True
                        break
                    shift[one] -= by
            if not moved:
                break
        numbers: Ints = self.offset + shift[chain]
        numbers = numbers - numbers[0]
        return numbers

    def seconds_missed(self, found: Reconstruction, step_seconds: StepSeconds) -> float:
        """Sum over the gaps of the time by which their batches miss what was measured."""
        missed = 0.0
        for batches, seconds in found.spans():
            missed += abs(sum(step_seconds(batch) for batch in batches) - seconds)
        return missed

    def expected_steps(self, found: Reconstruction, step_seconds: StepSeconds) -> Floats:
        """Iterations between neighbours, given their batches: those there, and what the time left over makes."""
        expected = np.empty(self.gaps.size)
        for place, seconds in enumerate(self.gaps):
            begin, end = found.numbers[place], found.numbers[place + 1]
            inside = found.batches[begin + 1 - found.first : end + 1 - found.first]
            times = [step_seconds(batch) for batch in inside if batch is not None]
            if self.quiet[place] or not times:
                expected[place] = max(len(times), 1)
            else:
                expected[place] = max(end - begin + (seconds - sum(times)) / min(times), 0.6)
        return expected

    def compose(self, numbers: Ints) -> Reconstruction:
        """Drive the scheduler through the numbered iterations."""
        numbers = np.maximum.accumulate(numbers)
        admitted = self._admissions(numbers)
        target = numbers[self.first_place]
        driven = self._drive(numbers, admitted)
        for _ in range(REPAIRS):
            off = driven.placed[self.known] - target
            if not off.any():
                break
            # Admitted an iteration or so too early or too late: the stamp of the schedule call lies at a boundary.
            moved = admitted.copy()
            moved[self.known] -= np.sign(off) * (np.abs(off) < 50)
            again = self._drive(numbers, moved)
            if np.count_nonzero(again.placed[self.known] - target) >= np.count_nonzero(off):
                break
            driven, admitted = again, moved
        misplaced = int(np.count_nonzero(driven.placed[self.known] - target))
        return Reconstruction(self.stamps, numbers, driven.first, driven.batches, misplaced, self.quiet)

    def compose_by_stamps(self, numbers: Ints, computed: Floats) -> Reconstruction:
        """Put batches together from the numbered stamps alone: decodes between first and last, prompts before first."""
        numbers = np.maximum.accumulate(numbers)
        begin, end = (np.round(np.interp(one, self.stamps, numbers)).astype(np.int64) for one in self.every[:2])
        prompts = self.every[2].astype(np.int64)
        tokens = np.clip(computed[self.rows[self.seen]], 1, prompts).astype(np.int64)
        first = int(numbers[0]) - int(-(-tokens.max() // self.config.token_budget))
        count = int(numbers[-1]) - first + 1
        decodes: list[list[int]] = [[] for _ in range(count)]
        for prompt, at, until in zip(prompts.tolist(), begin - first, end - first, strict=True):
            for step in range(int(at) + 1, int(until) + 1):
                decodes[step].append(prompt + step - int(at) - 1)
        room = [max(self.config.token_budget - len(one), 1) for one in decodes]
        prefills: list[list[tuple[int, int]]] = [[] for _ in range(count)]
        for one in np.argsort(begin, kind="stable").tolist():
            at, left, context = int(begin[one]) - first, int(tokens[one]), int(prompts[one] - tokens[one])
            step, fits = at, room[at]
            while fits < left and step > 0:
                step -= 1
                fits += room[step]
            for place in range(step, at + 1):
                chunk = min(left, room[place]) if place < at else left
                if chunk == 1:
                    decodes[place].append(context)
                elif chunk > 1:
                    prefills[place].append((chunk, context))
                room[place], left, context = max(room[place] - chunk, 0), left - chunk, context + chunk
        batches = [Batch(*both) if any(both) else None for both in zip(prefills, decodes, strict=True)]
        return Reconstruction(self.stamps, numbers, first, batches, 0, self.quiet)

    def as_called(self, found: Reconstruction, ends: Floats) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """Iteration that each request is admitted into by the call that stamped it; for known ones whether it is clear.

        The call follows the end of an iteration at once; ``ends`` are those of all from the first stamp on.
        """
        admitted = self._admissions(found.numbers)
        when = self.scheduled[self.known]
        place = np.clip(np.searchsorted(self.stamps, when + RESOLUTION, side="right") - 1, -1, self.gaps.size - 1)
        nearest = np.clip(np.searchsorted(ends, when), 1, ends.size - 1)
        nearest -= when - ends[nearest - 1] < ends[nearest] - when
        steps = np.diff(ends)
        shorter = np.minimum(steps[np.clip(nearest - 1, 0, None)], steps[np.clip(nearest, None, steps.size - 1)])
        clear = (place >= 0) & ~self.quiet[place] & (np.abs(when - ends[nearest]) < NEAR * shorter)
        called = nearest + int(found.numbers[0]) + self.depth
        admitted[self.known] = np.where(clear, called, admitted[self.known])
        return admitted, clear

    def _drive(self, numbers: Ints, admitted: Ints) -> Driven:
        return drive(self.config, self.requests, admitted, int(numbers[0]), int(numbers[-1]))

    def _admissions(self, numbers: Ints) -> Ints:
        """Iteration that each request is admitted into at the earliest.

        A schedule call happens when an iteration ends, for the iteration ``depth`` later. Requests whose stamps are
        known are admitted by the call that stamped them, others as soon as they have arrived.
        """
        when = self.arrival.copy()
        when[self.known] = self.scheduled[self.known]
        place = np.clip(np.searchsorted(self.stamps, when + RESOLUTION, side="right") - 1, -1, self.gaps.size - 1)
        steps = np.diff(numbers)
        share = (when - self.stamps[place]) / self.gaps[place]
        exact = numbers[place] + share * steps[place]
        known = np.zeros(when.size, dtype=bool)
        known[self.known] = True
        # The call's stamp follows the end it belongs to closely; an arrival waits for the next end.
        ended = np.where(known, np.round(exact), np.ceil(exact)).astype(np.int64)
        admitted = np.where(place < 0, 0, ended + self.depth)
        admitted[self.known] = np.minimum(admitted[self.known], numbers[self.first_place])
        if self.config.scheduling_policy == "fcfs":
            # Whoever came later is not served earlier.
            by_arrival = np.argsort(self.arrival, kind="stable")
            queued = np.maximum.accumulate(admitted[by_arrival])
            admitted[by_arrival] = np.where(known[by_arrival], admitted[by_arrival], queued)
        return admitted.astype(np.int64)


@dataclass(frozen=True)
class Driven:
    """What the scheduler made of a run: ``batches[number - first]``, and of each request two iterations.

    ``begun`` is the one that computed its first tokens, ``placed`` the one that yields its first output token (far
    away if that was not reached).
    """

    first: int
    batches: list[Batch | None]
    begun: Ints
    placed: Ints

    def batch(self, number: int) -> Batch | None:
        """Return what an iteration computed; None if the engine had nothing to do, or it is not among these."""
        inside = 0 <= number - self.first < len(self.batches)
        return self.batches[number - self.first] if inside else None


def drive(
    config: EngineConfig, requests: Sequence[Request], admitted: Ints, first: int, last: int, rank: Floats | None = None
) -> Driven:
    """Schedule iterations ``first`` (or the first admission, if that is earlier) to ``last``.

    Request r waits from iteration ``admitted[r]`` on; of those admitted together the one of lower ``rank`` comes first
    (their arrival if absent).
    """
    first = min(first, int(admitted.min()))
    depth = 2 if config.async_scheduling else 1
    scheduler = Scheduler(config)
    served = [ServedRequest.enter(request, place, config.max_model_len) for place, request in enumerate(requests)]
    ranks = np.array([request.arrival for request in requests]) if rank is None else rank
    order = deque(sorted(served, key=lambda one: (admitted[one.index], ranks[one.index], one.arrival, one.index)))
    batches: list[Batch | None] = []
    in_flight: deque[Step] = deque()
    for number in range(first, last + 1):
        if len(in_flight) == depth:
            scheduler.update(in_flight.popleft(), number - depth)
        while order and admitted[order[0].index] <= number:
            scheduler.add(order.popleft())
        step = scheduler.schedule(number)
        in_flight.append(step)
        batches.append(step.batch() if step.items else None)
    for number, step in enumerate(in_flight, start=last + 1 - len(in_flight)):
        scheduler.update(step, number)
    # The clock of this scheduler counts iterations: its stamps are their numbers.
    never = np.iinfo(np.int64).max // 2
    begun = np.array([never if one.scheduled is None else one.scheduled for one in served], dtype=np.int64)
    placed = np.array([never if one.first_token is None else one.first_token for one in served], dtype=np.int64)
    return Driven(first, batches, begun, placed)


def spans_of_recording(trace: Trace) -> list[tuple[list[Batch], float]]:
    """Recorded iterations as spans: each batch with the seconds until the next one began, where that followed at once.

    Raises
    ------
    InputError
        If the trace has no recorded iterations.
    """
    if trace.iterations is None:
        raise InputError(f"{trace.name} has no recorded iterations")
    idle = 1e-3
    rows = trace.iterations.to_pylist()
    spans = []
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        end = row["start"] + row["duration"]
        until = following["start"] if following and 0 <= following["start"] - end < idle else end
        parts = list(zip(row["scheduled"], row["computed"], strict=True))
        prefills = [(count, context) for count, context in parts if count > 1]
        spans.append(([Batch(prefills, [context for count, context in parts if count == 1])], until - row["start"]))
    return spans
