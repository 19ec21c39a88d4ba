"""Running a Trace through a Deployment: measured requests in, a predicted Trace out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from profiles.deployment import Deployment, Facts
from profiles.errors import InputError
from profiles.profile import FrontEnd
from replay.block_hashes import at_block_size
from replay.clocks import Floats
from replay.cold_start import find_cold_start
from replay.domain import DomainWatch
from replay.load_level import level_of
from replay.trace import BATCHES, ITERATIONS, TIMELINE, Trace, requests_table
from simulator.engine import NS, ClosedLoop, Iteration, Simulation
from simulator.engine_config import EngineConfig
from simulator.errors import SimulationError
from simulator.request import Request, Status

_STATUS = {Status.FINISHED: "ok", Status.REJECTED: "failed", Status.ABORTED: "unfinished"}


def facts_of(trace: Trace) -> Facts:
    """What a trace says of its deployment, for ``profiles.deployment.resolve``."""
    engine = trace.meta.get("engine") or {}
    return Facts(
        model=trace.meta.get("model"),
        model_config=trace.meta.get("model_config"),
        version=engine.get("version"),
        arguments=engine.get("arguments"),
        link=trace.meta.get("link"),
    )


@dataclass(frozen=True)
class Replay:
    """A predicted trace and what the simulation says about itself.

    ``summary``: iterations, simulated seconds, busy share of the device, seconds by component, prompt tokens
    served from the prefix cache, preemptions, requests replayed and left out; ``outside_domain`` by axis where requests
    left what the profile was fitted to (``replay.domain``), None if the profile does not say that.
    """

    predicted: Trace
    summary: dict[str, Any]


def replay(
    trace: Trace,
    deployment: Deployment,
    *,
    record_iterations: bool = False,
    cold_start: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Replay:
    """Simulate the requests of a trace.

    A trace of batches is one engine run a batch, each on an idle engine. Requests that the source calls failed are not
    replayed; how long they loaded the engine is unknown. Silent ones are, as prefills of one output token.

    Parameters
    ----------
    trace : Trace
        With arrivals (``replay.arrivals.with_arrivals``).
    deployment : Deployment
    record_iterations : bool
        Keep every iteration in the predicted trace.
    cold_start : bool
        Impose the measured cold start of a run that nobody warmed up (``replay.cold_start``).
    progress : callable, optional
        Called with the number of requests that have ended.

    Raises
    ------
    InputError
        If nothing can be replayed, or the engine could not serve it.
    """
    front_end = deployment.front_end if trace.meta.get("vantage") == "client" else FrontEnd()
    clients = max_concurrency(trace)
    rows, requests = replayable(trace, deployment.config, front_end if clients is None else None)
    loop = None if clients is None else closed_loop(clients, requests, front_end)
    if not requests:
        raise InputError(f"{trace.name} has no request that can be replayed: all failed or without arrival")
    if trace.batches is not None:
        return _replay_batches(trace, deployment, rows, requests, record_iterations, progress)
    gauges = _Gauges(deployment.config.num_gpu_blocks - 1) if trace.timeline is not None else None
    log = _IterationLog(rows) if record_iterations else None
    domain = deployment.loaded.profile.domain
    watch = DomainWatch(domain) if domain else None

    observers = [one.add for one in (gauges, watch, log) if one is not None]

    engine = deployment.engine()
    try:
        cold = find_cold_start(trace, requests, engine.run) if cold_start else None
        simulation = engine.run(
            requests,
            observe=_all(observers),
            progress=progress,
            record_token_times=trace.has("token_times") or "itl" in (trace.meta.get("aggregates") or {}),
            cold_start=cold.seconds if cold else 0.0,
            closed_loop=loop,
        )
    except SimulationError as error:
        raise InputError(str(error)) from None
    predicted = Trace(
        _requests_of(trace, rows, simulation, loop),
        {
            **_meta(trace, deployment),
            "cold_start": cold.as_dict() if cold else None,
            "warmed_up": cold is None,
        },
        iterations=log.table() if log is not None else None,
        timeline=gauges.at(trace.timeline) if gauges is not None else None,
    )
    outside = watch.outside(simulation.served) if watch is not None else None
    return Replay(predicted, {**_summary(trace, simulation), "outside_domain": outside})


def requests_ahead(trace: Trace) -> int:
    """Requests of a batch that the engine's first schedule call sees, 0 for all.

    vLLM's ``LLM.generate`` sends them one by one to an engine in its own process (V1), which begins with the first; by
    its next call the others have come. Of other sources nothing of the kind is known.
    """
    return 1 if (trace.meta.get("engine") or {}).get("name") == "vllm" else 0


def _replay_batches(
    trace: Trace,
    deployment: Deployment,
    rows: list[int],
    requests: list[Request],
    record_iterations: bool,
    progress: Callable[[int], None] | None,
) -> Replay:
    """Every batch as an engine run of its own, at the batch's start."""
    engine, place = deployment.engine(), {row: index for index, row in enumerate(rows)}
    log = _IterationLog(rows) if record_iterations else None
    simulations: list[tuple[list[int], Simulation]] = []
    columns = {name: np.full(len(trace.rows_of_batches()), np.nan) for name in PREDICTED}
    ended = 0
    for batch, members in enumerate(trace.rows_of_batches()):
        own = [row for row in members if row in place]
        if not own:
            continue
        sums = _BatchSums()
        mine = _IterationLog(own) if log is not None else None
        try:
            simulation = engine.run(
                [requests[place[row]] for row in own],
                observe=_all([sums.add, *([mine.add] if mine is not None else [])]),
                ahead=requests_ahead(trace),
            )
        except SimulationError as error:
            raise InputError(f"batch {batch + 1}: {error}") from None
        simulations.append((own, simulation))
        if log is not None and mine is not None:
            log.extend(mine)
        begin = min(one.arrival for one in simulation.served)
        call = deployment.accelerator.call_seconds(len(own))
        for name, value in sums.values((simulation.end - begin) / NS + call).items():
            columns[name][batch] = value
        ended += len(own)
        if progress is not None:
            progress(ended)
    everything = _joined(simulations)
    predicted = Trace(
        _requests_of(trace, [row for own, _ in simulations for row in own], everything, None),
        {**_meta(trace, deployment), "cold_start": None, "warmed_up": True},
        iterations=log.table() if log is not None else None,
        batches=predicted_batches(trace, columns),
    )
    return Replay(predicted, {**_summary(trace, everything), "outside_domain": None})


PREDICTED = ("makespan", "prompt_seconds", "token_seconds")


def predicted_batches(trace: Trace, columns: Mapping[str, Floats]) -> pa.Table:
    """Build the ``batches`` table of a prediction: the measured starts, and columns of ``PREDICTED`` in seconds."""
    values = {"start": trace.of_batches("start"), **columns}
    empty = np.full(len(values["start"]), np.nan)
    arrays = [pa.array(values.get(one.name, empty), one.type, from_pandas=True) for one in BATCHES]
    return pa.table(arrays, schema=BATCHES)


class _BatchSums:
    """Seconds of one batch's iterations up to the last that computes a prompt, and after it."""

    def __init__(self) -> None:
        self._prompts = self._tokens = self._steps = 0

    def add(self, iteration: Iteration) -> None:
        if iteration.step.has_prefills:
            self._prompts += self._tokens + iteration.duration
            self._tokens = self._steps = 0
        else:
            self._tokens += iteration.duration
            self._steps += 1

    def values(self, makespan: float) -> dict[str, float]:
        """Columns of the batch."""
        token = self._tokens / self._steps / NS if self._steps else np.nan
        return {"makespan": makespan, "prompt_seconds": self._prompts / NS, "token_seconds": token}


def _all(observers: Sequence[Callable[[Iteration], None]]) -> Callable[[Iteration], None] | None:
    """One observer that is all of them."""
    if len(observers) < 2:
        return observers[0] if observers else None

    def observe(iteration: Iteration) -> None:
        for add in observers:
            add(iteration)

    return observe


def _joined(simulations: list[tuple[list[int], Simulation]]) -> Simulation:
    """Runs on an engine that was idle in between, as one."""
    runs = [run for _, run in simulations]
    return Simulation(
        [one for run in runs for one in run.served],
        runs[0].components,
        sum(run.iterations for run in runs),
        sum(run.busy for run in runs),
        max(run.end for run in runs),
        [sum(parts) for parts in zip(*(run.component_seconds for run in runs), strict=True)],
    )


def max_concurrency(trace: Trace) -> int | None:
    """Requests that the clients of a load level keep in flight, or None where each is sent at its arrival."""
    level = level_of(trace)
    return level.max_concurrency if level is not None else None


def closed_loop(clients: int, requests: Sequence[Request], front_end: FrontEnd) -> ClosedLoop:
    """Clients that wait for each other's requests, with the way from them to the engine."""
    return ClosedLoop(clients, [front_end.seconds(one.prompt_tokens) for one in requests])


def replayable(
    trace: Trace, config: EngineConfig, front_end: FrontEnd | None = None
) -> tuple[list[int], list[Request]]:
    """Return the rows of a trace that a simulation can serve, and their requests.

    Left out are failed requests and those without arrival or lengths. A front end delays their arrival at the engine.
    """
    arrival, priority = trace.column("arrival"), np.nan_to_num(trace.column("priority"))
    prompt, output = trace.column("prompt_tokens"), trace.column("output_tokens")
    hashes = trace.lists("block_hashes")
    hashed = int((trace.meta.get("block_hash") or {}).get("block_size") or 0)
    rows, requests = [], []
    for row, (one, status) in enumerate(zip(trace.ids, trace.statuses, strict=True)):
        if status == "failed" or math.isnan(arrival[row]) or not (prompt[row] >= 1 and output[row] >= 1):
            continue
        own = hashes[row]
        rows.append(row)
        requests.append(
            Request(
                id=one,
                arrival=float(arrival[row]) + (front_end.seconds(prompt[row]) if front_end else 0.0),
                prompt_tokens=int(prompt[row]),
                output_tokens=int(output[row]),
                priority=int(priority[row]),
                block_hashes=None if own is None else at_block_size(own, hashed, config.block_size),
            )
        )
    return rows, requests


def _requests_of(trace: Trace, rows: list[int], simulation: Simulation, loop: ClosedLoop | None) -> pa.Table:
    """One row for every row of the trace; those not replayed are ``failed`` and empty."""
    count = len(trace)
    arrival = trace.column("arrival").copy()
    if loop is not None:
        arrival[rows] = [one.arrival / NS - delay for one, delay in zip(simulation.served, loop.delays, strict=True)]
    columns: dict[str, Any] = {
        "id": trace.requests.column("id").combine_chunks(),
        "nominal_arrival": trace.column("nominal_arrival"),
        "arrival": arrival,
        "prompt_tokens": trace.requests.column("prompt_tokens").combine_chunks(),
        "output_tokens": trace.requests.column("output_tokens").combine_chunks(),
        "priority": trace.requests.column("priority").combine_chunks(),
        "block_hashes": trace.requests.column("block_hashes").combine_chunks(),
        "batch": trace.requests.column("batch").combine_chunks(),
        "session": trace.requests.column("session").combine_chunks(),
    }
    status = ["failed"] * count
    stamps = {name: np.full(count, np.nan) for name in ("queued", "scheduled", "first_token", "last_token")}
    lists: list[list[float] | None] = [None] * count
    cached: list[int | None] = [None] * count
    preemptions: list[int | None] = [None] * count
    for row, served in zip(rows, simulation.served, strict=True):
        status[row] = _STATUS.get(served.status, "unfinished")
        for name, values in stamps.items():
            stamp = getattr(served, name)
            if stamp is not None:
                values[row] = stamp / NS
        cached[row], preemptions[row] = served.num_cached_tokens, served.num_preemptions
        if served.token_times is not None:
            lists[row] = [time / NS for time in served.token_times]
    columns |= stamps
    columns |= {"status": status, "cached_tokens": cached, "preemptions": preemptions, "token_times": lists}
    return requests_table(columns, count)


def _meta(trace: Trace, deployment: Deployment) -> dict[str, Any]:
    config, loaded = deployment.config, deployment.loaded
    notes = []
    if config.enable_prefix_caching and not trace.has("block_hashes"):
        notes.append("prompt contents are unknown: the simulated prefix cache finds nothing in common")
    return {
        "name": f"{trace.name} replayed with {loaded.profile.name}",
        "source": {"format": "servecal-replay", "trace": trace.digest(), "profile": loaded.digest},
        "model": deployment.model.name if deployment.model else trace.meta.get("model"),
        "hardware": deployment.hardware.name if deployment.hardware else None,
        "engine": {
            "name": "vllm",
            "version": ".".join(map(str, config.version)),
            "arguments": config.arguments,
        },
        "clock": trace.meta.get("clock"),
        "block_hash": trace.meta.get("block_hash"),
        "vantage": "engine",
        "columns": dict.fromkeys(
            ("queued", "scheduled", "first_token", "last_token", "cached_tokens", "preemptions"), "predicted"
        ),
        "notes": notes,
    }


def _summary(trace: Trace, simulation: Simulation) -> dict[str, Any]:
    served = simulation.served
    start = min(one.arrival for one in served)
    span = max(simulation.end - start, 1)
    return {
        "requests": len(served),
        "left_out": len(trace) - len(served),
        "rejected": sum(one.status is Status.REJECTED for one in served),
        "iterations": simulation.iterations,
        "simulated_seconds": span / NS,
        "device_busy": simulation.busy / span,
        "component_seconds": dict(zip(simulation.components, simulation.component_seconds, strict=True)),
        "prompt_tokens": sum(one.num_prompt_tokens for one in served),
        "cached_tokens": sum(one.num_cached_tokens for one in served),
        "preemptions": sum(one.num_preemptions for one in served),
    }


class _Gauges:
    """Running, waiting and KV use after each scheduling, sampled at a measured timeline's instants."""

    def __init__(self, usable_blocks: int) -> None:
        self._usable = max(usable_blocks, 1)
        self._rows: list[tuple[int, int, int, int, int]] = []

    def add(self, iteration: Iteration) -> None:
        end = iteration.start + iteration.duration
        self._rows.append((iteration.scheduled_at, end, iteration.running, iteration.waiting, iteration.free_blocks))

    def at(self, measured: pa.Table) -> pa.Table:
        """The state that held at each instant: that of the last step scheduled before it, 0 when idle."""
        times: Floats = measured.column("time").to_numpy()
        rows = np.array(self._rows or [(0, 0, 0, 0, self._usable)], dtype=np.float64).reshape(-1, 5)
        place = np.searchsorted(rows[:, 0] / NS, times, side="right") - 1
        known = np.maximum(place, 0)
        busy = (place >= 0) & (times <= rows[known, 1] / NS)
        running, waiting = (np.where(busy, rows[known, column], 0.0) for column in (2, 3))
        usage = np.where(busy, 1.0 - rows[known, 4] / self._usable, 0.0)
        empty = pa.nulls(len(times), pa.float64())
        return pa.table(
            [pa.array(times), pa.array(running), pa.array(waiting), pa.array(usage), empty, empty], TIMELINE
        )


class _IterationLog:
    """Every iteration as a row of ``replay.trace.ITERATIONS``; requests are rows of the trace."""

    def __init__(self, rows: list[int]) -> None:
        self._rows = rows
        self._columns: dict[str, list[Any]] = {column.name: [] for column in ITERATIONS}

    def add(self, iteration: Iteration) -> None:
        step, rows = iteration.step, self._rows
        values = {
            "start": iteration.start / NS,
            "duration": iteration.duration / NS,
            "scheduled_at": iteration.scheduled_at / NS,
            "requests": [rows[item.served.index] for item in step.items],
            "computed": [item.num_computed_tokens for item in step.items],
            "scheduled": [item.num_scheduled_tokens for item in step.items],
            "preempted": sorted(rows[served.index] for served in step.preempted),
            "running": iteration.running,
            "waiting": iteration.waiting,
            "free_blocks": iteration.free_blocks,
        }
        for name, value in values.items():
            self._columns[name].append(value)

    def extend(self, other: _IterationLog) -> None:
        """Take in the rows of another log."""
        for name, values in other._columns.items():
            self._columns[name] += values

    def table(self) -> pa.Table:
        return pa.table([pa.array(self._columns[one.name], one.type) for one in ITERATIONS], ITERATIONS)
