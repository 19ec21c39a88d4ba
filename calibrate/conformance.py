"""Whether the simulated schedule is vLLM's, iteration by iteration, and where they part if not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from profiles.errors import InputError
from replay.golden_schedules import NS_PER_US, GoldenSchedule
from replay.imposed import impose
from replay.trace import Trace
from simulator.engine import Engine, Iteration
from simulator.engine_config import EngineConfig
from simulator.errors import SimulationError
from simulator.request import ServedRequest, Status


@dataclass(frozen=True)
class Divergence:
    """The first difference of two schedules.

    ``iteration`` counts from 0, None for a difference in the requests' results; ``fields`` are those that differ;
    ``expected`` and ``simulated`` hold both sides (None where a side has ended), ``before`` the last iteration on
    which they agreed.
    """

    iteration: int | None
    fields: tuple[str, ...]
    expected: Mapping[str, Any] | None
    simulated: Mapping[str, Any] | None
    before: Mapping[str, Any] | None = None
    reason: str = ""


@dataclass(frozen=True)
class Conformance:
    """The verdict on one file: iterations compared, and the first divergence if there is one."""

    file: str
    engine: str
    iterations: int
    divergence: Divergence | None

    @property
    def identical(self) -> bool:
        """Whether nothing differs."""
        return self.divergence is None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "identical": self.identical}


def check_golden(golden: GoldenSchedule) -> Conformance:
    """Run a golden schedule's requests and compare every iteration and every request's result."""
    iterations: list[dict[str, Any]] = []
    try:
        simulation = Engine(golden.config, golden.step_time).run(
            golden.requests, observe=lambda iteration: iterations.append(_as_golden(iteration))
        )
    except SimulationError as error:
        first = _first_difference(golden.iterations, iterations)
        divergence = first or Divergence(None, ("error",), None, None)
        return Conformance(str(golden.file), golden.engine, len(iterations), replace(divergence, reason=str(error)))
    found = _first_difference(golden.iterations, iterations) or _results_differ(golden, simulation.served)
    return Conformance(str(golden.file), golden.engine, len(iterations), found)


def check_recording(trace: Trace, config: EngineConfig, name: str) -> Conformance:
    """Impose a recording's instants on the scheduler and compare what it composes.

    Raises
    ------
    InputError
        If the trace has no recorded iterations.
    """
    version = str((trace.meta.get("engine") or {}).get("version"))
    compared = ("items", "preempted", "running", "waiting", "free")
    ids = trace.ids
    before: dict[str, Any] | None = None
    count = 0
    for imposed in impose(trace, config):
        recorded, scheduler = imposed.recorded, imposed.scheduler
        expected = {
            "items": _items(ids, recorded),
            "preempted": sorted(ids[row] for row in recorded["preempted"] or ()),
            "running": recorded["running"],
            "waiting": recorded["waiting"],
            "free": recorded["free_blocks"],
        }
        simulated = {
            "items": _step_items(imposed.step.items),
            "preempted": sorted(served.request.id for served in imposed.step.preempted),
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "free": scheduler.kv_cache.num_free_blocks,
        }
        fields = tuple(key for key in compared if expected[key] is not None and expected[key] != simulated[key])
        at = {"start_us": round(recorded["start"] * 1e6, 1)}
        if fields:
            found = Divergence(count, fields, at | expected, at | simulated, before)
            return Conformance(name, f"vllm {version}", count, found)
        before = at | expected
        count += 1
    return Conformance(name, f"vllm {version}", count, None)


def _as_golden(iteration: Iteration) -> dict[str, Any]:
    """An iteration in the terms of a golden file; times that are no whole microseconds stay fractions."""
    return {
        "start_us": _us(iteration.start),
        "dur_us": _us(iteration.duration),
        "sched_us": _us(iteration.scheduled_at),
        "items": _step_items(iteration.step.items),
        "preempted": sorted(served.request.id for served in iteration.step.preempted),
        "running": iteration.running,
        "waiting": iteration.waiting,
        "free": iteration.free_blocks,
    }


def _us(ns: int) -> float | int:
    whole, rest = divmod(ns, NS_PER_US)
    return whole if not rest else ns / NS_PER_US


def _step_items(items: Sequence[Any]) -> list[list[Any]]:
    return [[item.served.request.id, item.num_computed_tokens, item.num_scheduled_tokens] for item in items]


def _items(ids: Sequence[str], recorded: Mapping[str, Any]) -> list[list[Any]]:
    parts = zip(recorded["requests"], recorded["computed"], recorded["scheduled"], strict=True)
    return [[ids[row], computed, scheduled] for row, computed, scheduled in parts]


def _first_difference(
    expected: Sequence[Mapping[str, Any]], simulated: Sequence[Mapping[str, Any]]
) -> Divergence | None:
    before: Mapping[str, Any] | None = None
    for place, (left, right) in enumerate(zip(expected, simulated, strict=False)):
        fields = tuple(key for key, value in left.items() if key in right and value != right[key])
        if fields:
            return Divergence(place, fields, left, right, before)
        before = left
    if len(expected) != len(simulated):
        place = min(len(expected), len(simulated))
        left_over, right_over = expected[place:], simulated[place:]
        return Divergence(
            place,
            ("iterations",),
            left_over[0] if left_over else None,
            right_over[0] if right_over else None,
            before,
        )
    return None


def _results_differ(golden: GoldenSchedule, served: Sequence[ServedRequest]) -> Divergence | None:
    by_id = {one.request.id: one for one in served}
    for expected in golden.results:
        one = by_id.get(str(expected.get("id")))
        if one is None:
            raise InputError(f"has a result for {expected.get('id')!r}, which is no request", file=golden.file)
        done = one.last_token if one.status is Status.FINISHED else None
        simulated = {
            "id": one.request.id,
            "first_us": None if one.first_token is None else _us(one.first_token),
            "done_us": None if done is None else _us(done),
        }
        fields = tuple(key for key in ("first_us", "done_us") if expected.get(key) != simulated[key])
        if fields:
            return Divergence(None, fields, expected, simulated)
    return None
