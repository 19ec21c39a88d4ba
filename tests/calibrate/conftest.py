"""Traces written down by hand, and a report of one replayed by a linear profile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from calibrate.errors import compare
from calibrate.reports.report import Report
from profiles.deployment import resolve
from profiles.profile import LoadedProfile, Profile
from replay.run import facts_of, replay
from replay.trace import TIMELINE, Trace, requests_table


def trace(
    ttft: Sequence[float],
    e2e: Sequence[float] | None = None,
    *,
    arrival: Sequence[float] | None = None,
    ids: Sequence[str] | None = None,
    output_tokens: Sequence[int] | None = None,
    prompt_tokens: Sequence[int] | None = None,
    status: Sequence[str] | None = None,
    timeline: Mapping[str, Sequence[float]] | None = None,
    meta: Mapping[str, Any] | None = None,
    **columns: Any,
) -> Trace:
    """A trace of requests 0, 1, 2 ... a second apart; ``ttft`` and ``e2e`` in seconds from the arrival."""
    count = len(ttft)
    sent = [float(place) for place in range(count)] if arrival is None else list(arrival)
    whole = [seconds + 1.0 for seconds in ttft] if e2e is None else e2e
    table = requests_table(
        {
            "id": ids or [str(place) for place in range(count)],
            "status": status or ["ok"] * count,
            "arrival": sent,
            "first_token": [begin + seconds for begin, seconds in zip(sent, ttft, strict=True)],
            "last_token": [begin + seconds for begin, seconds in zip(sent, whole, strict=True)],
            "prompt_tokens": prompt_tokens or [100] * count,
            "output_tokens": output_tokens or [11] * count,
            **columns,
        },
        count,
    )
    gauges = None
    if timeline is not None:
        length = len(timeline["time"])
        gauges = pa.table(
            [pa.array(timeline.get(field.name, [None] * length), field.type) for field in TIMELINE], TIMELINE
        )
    return Trace(table, {"name": "by-hand", "clock": {"kind": "run"}, **(meta or {})}, timeline=gauges)


@pytest.fixture(scope="session")
def make_trace() -> Callable[..., Trace]:
    return trace


@pytest.fixture(scope="session")
def make_report() -> Callable[..., Report]:
    """Replay a trace with a linear profile of 10 ms a step, and compare."""

    def make(
        measured: Trace,
        settings: tuple[str, ...] = (),
        *,
        anchor: str = "arrival",
        cold_start: bool = True,
        **fields: Any,
    ) -> Report:
        document = {
            "name": "ten-ms",
            "accelerator": {"kind": "linear", "seconds": {"step": 0.01}},
            "engine": {"version": "0.19.0", "max_num_seqs": 64, "max_num_batched_tokens": 1024, "num_gpu_blocks": 999},
            "host": {"per_step": 0.0, "source": "by hand"},
            **fields,
        }
        loaded = LoadedProfile(Profile.model_validate(document), Path(), "0" * 64, "ten-ms.yaml")
        deployment = resolve(loaded, facts_of(measured), settings=settings)
        replayed = replay(measured, deployment, cold_start=cold_start)
        return Report(measured, deployment, replayed, compare(measured, replayed.predicted, anchor))

    return make
