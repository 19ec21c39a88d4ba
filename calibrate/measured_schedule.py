"""What a run's engine computed and when: recorded, or put together from the stamps that requests share.

One form for both, so that whoever asks what an iteration took, or what the engine was doing when a request arrived,
need not know where the answer comes from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from calibrate.reconstruction import NotRecoverable, Reconstruction, StepSeconds, reconstruct, steps_between_tokens
from profiles.deployment import Deployment
from replay.trace import REQUEST_CLOCK, Trace
from simulator.batch import Batch

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.bool_]

IDLE = 1e-3
"""Seconds between recorded iterations from which the engine counts as idle."""
LEAST_SCALE = 0.05
LEAST_STEPS = 20
"""Iterations below which the number between two stamps says nothing of a length."""
LEAST_DOUBT = 0.03
DOUBT = 4.0
ROUNDS = 3
FEWEST, FEWEST_SHARE = 3, 0.01
"""Requests, and their share, below which doubts are chance."""
"""Share, and robust standard deviations, by which a length must differ from those of the same time to be doubted."""


@dataclass(frozen=True)
class MeasuredSchedule:
    """Iterations of a run.

    Parameters
    ----------
    source : {"recorded iterations", "reconstructed schedule"}
    batches : sequence of Batch
        What each iteration computed.
    start, end : array (iterations,)
        Seconds on the trace's clock. Reconstructed: only ends that were stamped are measured, the time between them
        is shared as predicted.
    span : array of int (iterations,)
        Span of consecutive iterations whose seconds together were measured; -1 where that is not known.
    seconds : array (spans,)
    tokens : array (requests,)
        Output tokens of each request by the schedule, NaN where that is not told.
    """

    source: str
    batches: Sequence[Batch]
    start: Floats
    end: Floats
    span: npt.NDArray[np.intp]
    seconds: Floats
    tokens: Floats

    def sums(self, values: Floats) -> Floats:
        """Sum a value of each iteration over the spans."""
        inside = self.span >= 0
        return np.bincount(self.span[inside], values[inside], self.seconds.size).astype(np.float64)

    @property
    def busy(self) -> float:
        """Share of the time from the first iteration to the last in which one ran."""
        return float(np.sum(self.end - self.start)) / max(float(self.end[-1] - self.start[0]), 1e-9)

    @property
    def typical(self) -> float:
        """Median seconds of an iteration."""
        return float(np.median(self.end - self.start))


def measured_schedule(trace: Trace, deployment: Deployment, computed: Floats) -> MeasuredSchedule:
    """Return a run's schedule.

    Parameters
    ----------
    trace : Trace
        With recorded iterations, or engine stamps (``scheduled``, ``first_token``, ``last_token``) on one clock.
    deployment : Deployment
        Its accelerator is the first idea of an iteration's seconds; its token budget limits a prompt's chunks.
    computed : array (requests,)
        Prompt tokens that each request computed (those not cached).

    Raises
    ------
    NotRecoverable
        If there is neither.
    """
    if trace.iterations is not None and trace.iterations.num_rows:
        return _with_spans(trace, _recorded(trace))
    if trace.batches is not None:
        raise NotRecoverable("batches have one makespan and no stamps of their requests: record engine stamps")
    if trace.clock == REQUEST_CLOCK or not trace.has("scheduled") or not trace.has("first_token"):
        raise NotRecoverable(
            "the trace has no engine stamps (scheduled, first and last token, on one clock) and no recorded "
            "iterations; record them at the server: queued_ts, scheduled_ts, first_token_ts and last_token_ts of "
            "vLLM's request metrics, or every iteration"
        )
    return _with_spans(trace, _reconstructed(trace, deployment, computed))


def _with_spans(trace: Trace, schedule: MeasuredSchedule) -> MeasuredSchedule:
    if not schedule.seconds.size:
        raise NotRecoverable(f"{trace.name}: no iteration followed another at once, so that none has a measured length")
    return schedule


def step_seconds(deployment: Deployment) -> StepSeconds:
    """Seconds of an iteration by a deployment's accelerator."""
    accelerator = deployment.accelerator
    return lambda batch: float(sum(accelerator.step(batch)))


def _recorded(trace: Trace) -> MeasuredSchedule:
    assert trace.iterations is not None
    columns = {name: trace.iterations.column(name).to_pylist() for name in ("requests", "computed", "scheduled")}
    start, duration = (np.asarray(trace.iterations.column(name).to_numpy()) for name in ("start", "duration"))
    end = start + duration
    # What passes before the next one begins is the engine's too, unless it was idle.
    following = np.append(start[1:], np.inf)
    end = np.where((following >= end) & (following - end < IDLE), following, end)
    batches, tokens = [], np.zeros(len(trace))
    prompt = np.nan_to_num(trace.column("prompt_tokens"))
    for rows, before, scheduled in zip(*columns.values(), strict=True):
        parts = list(zip(scheduled, before, strict=True))
        batches.append(Batch([one for one in parts if one[0] > 1], [context for count, context in parts if count == 1]))
        for row, (count, context) in zip(rows, parts, strict=True):
            tokens[row] += context + count >= prompt[row] + tokens[row]
    count = len(batches)
    span = np.arange(count)
    if trace.meta.get("warmed_up") is not True:
        span -= 1  # a cold engine's first iteration tells nothing of the others
    seconds = (end - start)[span >= 0]
    unfinished = trace.statuses != "ok"
    tokens[unfinished] = np.nan
    return MeasuredSchedule("recorded iterations", batches, start, end, span, seconds, tokens)


def _reconstructed(trace: Trace, deployment: Deployment, computed: Floats) -> MeasuredSchedule:
    rough = step_seconds(deployment)
    unsure, expected = doubtful_lengths(trace, steps_between_tokens(trace, deployment.config, rough))

    def refine(found: Reconstruction) -> StepSeconds:
        return _scaled(found.spans(), rough)

    found = reconstruct(trace, deployment.config, rough, refine, ~unsure, computed=computed)
    tokens = np.where(unsure, _tokens(trace, found, expected), trace.column("output_tokens"))
    return _of_reconstruction(found, refine(found), tokens)


def _scaled(spans: Sequence[tuple[list[Batch], float]], rough: StepSeconds) -> StepSeconds:
    """Return a rough idea of an iteration's seconds with one scale for its decodes and one for its prompts."""
    parts = [[_parts(one, rough) for one in batches] for batches, _ in spans]
    rows = [np.sum(some, axis=0) / seconds for some, (_, seconds) in zip(parts, spans, strict=True)]
    if not rows:
        return rough
    scales = np.maximum(nnls(np.array(rows), np.ones(len(rows)))[0], LEAST_SCALE)
    # With its batch, so that no other one can get its id.
    known = {
        id(batch): (batch, float(np.dot(part, scales)))
        for (batches, _), some in zip(spans, parts, strict=True)
        for batch, part in zip(batches, some, strict=True)
    }

    def seconds(batch: Batch) -> float:
        found = known.get(id(batch))
        return float(np.dot(_parts(batch, rough), scales)) if found is None else found[1]

    return seconds


def _parts(batch: Batch, rough: StepSeconds) -> tuple[float, float]:
    """Seconds of an iteration's decodes alone, and what its prompts add."""
    whole = rough(batch)
    if not batch.prefills:
        return whole, 0.0
    alone = rough(Batch([], batch.decode_contexts)) if batch.decode_contexts else 0.0
    return alone, whole - alone


def _of_reconstruction(found: Reconstruction, seconds_of: StepSeconds, tokens: Floats) -> MeasuredSchedule:
    batches: list[Batch] = []
    starts: list[float] = []
    ends: list[float] = []
    spans: list[int] = []
    seconds: list[float] = []
    before = [one for one in found.batches[: int(found.numbers[0]) + 1 - found.first] if one is not None]
    groups: list[tuple[Sequence[Batch | None], float, float | None]] = [(before, float(found.stamps[0]), None)]
    for place, gap in enumerate(np.diff(found.stamps).tolist()):
        begin, end = found.numbers[place] + 1 - found.first, found.numbers[place + 1] + 1 - found.first
        whole = None if found.quiet[place] else gap
        groups.append((found.batches[begin:end], float(found.stamps[place + 1]), whole))
    previous = -np.inf
    for some, until, gap in groups:
        inside = [one for one in some if one is not None]
        if not inside:
            previous = until
            continue
        times = np.array([seconds_of(one) for one in inside])
        told = gap is not None and len(inside) == len(some)
        times *= gap / times.sum() if gap is not None else min(1.0, (until - previous) / times.sum())
        last = until - times.sum() + np.cumsum(times)
        batches += inside
        starts += (last - times).tolist()
        ends += last.tolist()
        spans += [len(seconds) if told else -1] * len(inside)
        if told and gap is not None:
            seconds.append(gap)
        previous = until
    arrays = (np.array(starts), np.array(ends), np.array(spans, dtype=np.intp), np.array(seconds))
    return MeasuredSchedule("reconstructed schedule", batches, *arrays, tokens)


def _tokens(trace: Trace, found: Reconstruction, expected: Floats) -> Floats:
    """Output tokens by the numbers of first and last token; by the time between where the numbering ends before."""
    times = trace.column("first_token"), trace.column("last_token")
    first, last = (np.interp(one, found.stamps, found.numbers) for one in times)
    inside = (times[0] >= found.stamps[0]) & (times[1] <= found.stamps[-1])
    return np.where(inside, np.round(last - first) + 1.0, expected)


def doubtful_lengths(trace: Trace, steps: Floats) -> tuple[Rows, Floats]:
    """Return rows whose output tokens do not agree with the iterations that others got meanwhile, and lengths that do.

    Parameters
    ----------
    trace : Trace
    steps : array (requests,)
        Iterations expected between first and last token (``reconstruction.steps_between_tokens``).

    Returns
    -------
    doubtful : array of bool (requests,)
    lengths : array (requests,)
        Output tokens by the rate of the others; as stated where that is not doubted.
    """
    ratio = (trace.column("output_tokens") - 1) / np.where(steps >= LEAST_STEPS, steps, np.nan)
    rows = np.flatnonzero(np.isfinite(ratio) & ~(np.nan_to_num(trace.column("preemptions")) > 0))
    found, lengths = np.zeros(len(trace), dtype=bool), trace.column("output_tokens").copy()
    if rows.size < 2 * LEAST_STEPS:
        return found, lengths
    first, last, ratio = trace.column("first_token")[rows], trace.column("last_token")[rows], ratio[rows]
    trusted = np.ones(rows.size, dtype=bool)
    for _ in range(ROUNDS):
        usual = _usual(first, last, ratio, trusted)
        off = ratio / usual - 1
        # Of many wrong ones the lower third knows nothing; it lies at 0.43 standard deviations.
        spread = float(np.percentile(np.abs(off[trusted]), 100 / 3)) / 0.43
        trusted = np.abs(off) <= max(DOUBT * spread, LEAST_DOUBT)
    if np.count_nonzero(~trusted) < max(FEWEST, FEWEST_SHARE * len(trace)):
        return found, lengths
    found[rows] = ~trusted
    lengths[rows] = np.where(trusted, lengths[rows], np.round(steps[rows] * usual) + 1)
    return found, lengths


def _usual(first: Floats, last: Floats, ratio: Floats, trusted: Rows) -> Floats:
    """Median ratio of the trusted ones that were decoded at the same time, weighted by the time shared."""
    known = np.flatnonzero(trusted)[np.argsort(first[trusted], kind="stable")]
    begin = first[known]
    # Whoever shares time with one began before it ended, and no longer before it than the longest takes.
    low = np.searchsorted(begin, first - (last - first).max())
    high = np.searchsorted(begin, last)
    usual = ratio.copy()
    for place in range(ratio.size):
        some = known[low[place] : high[place]]
        order = some[np.argsort(ratio[some], kind="stable")]
        shared = np.minimum(last[order], last[place]) - np.maximum(first[order], first[place])
        weight = np.cumsum(np.maximum(shared, 0.0) ** 2 / (last - first)[order])
        if order.size and weight[-1] > 0:
            usual[place] = ratio[order][np.searchsorted(weight, weight[-1] / 2)]
    return usual


def with_columns(trace: Trace, **columns: Floats) -> Trace:
    """Return the trace with columns of its requests replaced (NaN becomes null)."""
    table = trace.requests
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(name), _array(values, table.schema.field(name).type))
    return replace(trace, requests=table, _columns={})


def _array(values: Floats, kind: Any) -> Any:
    import pyarrow as pa

    return pa.array(values, from_pandas=True).cast(kind)


def calls_ahead(trace: Trace, schedule: MeasuredSchedule, computed: Floats, token_budget: int) -> tuple[int, int]:
    """Count first tokens by how the engine scheduled: ahead of the iteration in flight, or after it.

    A synchronous engine's call computes a prompt in the very next iteration; an asynchronous one has handed that out
    already, and the prompt is in the one after it. Counted are requests whose prompt fits one iteration and that were
    scheduled while the engine was busy.

    Returns
    -------
    ahead, at_once : int
    """
    scheduled, first = trace.column("scheduled"), trace.column("first_token")
    near = 0.3 * schedule.typical
    called = np.searchsorted(schedule.end, scheduled + near, side="right") - 1
    token = np.searchsorted(schedule.end, first - near)
    inside = (called >= 0) & (token < schedule.end.size) & ~np.isnan(scheduled) & ~np.isnan(first)
    called, token = np.clip(called, 0, None), np.clip(token, 0, schedule.end.size - 1)
    follows = np.abs(schedule.end[called] - scheduled) < near
    busy = np.append(schedule.start[1:] - schedule.end[:-1], np.inf)[called] < IDLE
    fits = computed <= 0.5 * token_budget
    some = (token - called)[inside & follows & busy & fits]
    return int(np.count_nonzero(some == 2)), int(np.count_nonzero(some == 1))
