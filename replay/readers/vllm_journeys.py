"""Journey and step spans of a vLLM fork (``--enable-journey-tracing``), which upstream vLLM does not write.

``vllm.scheduler``: a span ``llm_core`` a request, with the engine's stamps as events ``journey.*``. ``vllm.api``: one
named ``llm_request`` with ``api.ARRIVED`` and ``api.DEPARTED``; its request id is the engine's without the suffix.
``vllm.scheduler.step``: events ``step.BATCH_SUMMARY`` with counts of each engine step, and ``step.REQUEST_SNAPSHOT``
for some requests. Stamps ``ts.monotonic`` are the host's monotonic clock; that of a step is told by its size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from profiles.errors import InputError
from replay.readers.otlp import Span, Stamped
from replay.trace import ITERATION_COUNTS, TIMELINE, Trace, file_facts, requests_table, table_of

WALL = 1e8
"""Seconds above which a stamp counts from 1970 and not from the host's start (three years)."""
_STAMPS = {"QUEUED": "queued", "SCHEDULED": "scheduled", "FIRST_TOKEN": "first_token", "FINISHED": "last_token"}
_COLUMNS = (
    "id",
    "status",
    "error",
    "arrival",
    "queued",
    "scheduled",
    "first_token",
    "last_token",
    "prompt_tokens",
    "output_tokens",
    "cached_tokens",
    "preemptions",
)
_COUNTS = {
    "context_requests": "batch.num_prefill_reqs",
    "context_tokens": "batch.prefill_tokens",
    "generation_requests": "batch.num_decode_reqs",
    "generation_tokens": "batch.decode_tokens",
    "running": "queue.running_depth",
    "waiting": "queue.waiting_depth",
    "preempted": "batch.num_preempted",
    "free_blocks": "kv.blocks_free_gpu",
}


def request_of(identity: str) -> str:
    """Return the front end's request id of an engine's: that has a suffix ``-0-xxxxxxxx``."""
    return identity.rpartition("-0-")[0] or identity


@dataclass
class Journeys:
    """What such spans said, taken in one by one."""

    file: Path
    requests: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    offsets: list[float] = field(default_factory=list)
    blocks: int | None = None
    model: str | None = None

    @property
    def found(self) -> bool:
        """Whether there was any."""
        return bool(self.requests or self.steps)

    def take(self, span: Span) -> None:
        """Take in a span; others are passed over.

        Raises
        ------
        InputError
            Naming line and attribute of what cannot be used.
        """
        identity = span.text("gen_ai.request.id") if span.events else None
        for event in span.events:
            kind, _, what = event.name.partition(".")
            if kind == "journey" and identity:
                self._journey(self._of(identity), event, what)
            elif kind == "api" and identity:
                self._api(self._of(identity), span, event, what)
            elif event.name == "step.BATCH_SUMMARY":
                self._step(event)
            elif event.name == "step.REQUEST_SNAPSHOT":
                self._snapshot(event)

    def _of(self, identity: str) -> dict[str, Any]:
        name = request_of(identity)
        return self.requests.setdefault(name, {"id": name})

    def _journey(self, row: dict[str, Any], event: Stamped, what: str) -> None:
        time = _monotonic(event, "ts.monotonic")
        if time is not None and event.time is not None:
            self.offsets.append(event.time * 1e-9 - time)
        if what in _STAMPS and time is not None and (what != "SCHEDULED" or "scheduled" not in row):
            row[_STAMPS[what]] = time
        for name, key in (("preemptions", "num_preemptions"), ("prompt_tokens", "prefill.total_tokens")):
            value = event.count(key)
            if value is not None:
                row[name] = max(value, row.get(name, 0))
        if what == "FINISHED":
            row["finish"] = event.text("finish.status")
            row["output_tokens"] = event.count("decode.done_tokens")

    def _api(self, row: dict[str, Any], span: Span, event: Stamped, what: str) -> None:
        time = _monotonic(event, "event.ts.monotonic")
        self.model = span.text("gen_ai.response.model") or self.model
        prompt = span.count("gen_ai.usage.prompt_tokens")
        if prompt:
            row["prompt_tokens"] = prompt
        if what == "ARRIVED" and time is not None:
            row["arrival"] = time
        elif what == "ABORTED":
            row["error"] = event.text("reason") or "aborted"

    def _step(self, event: Stamped) -> None:
        number = event.count("step.id")
        if number is None:
            raise event.error("step.id", "is missing")
        start, end = (event.number(f"step.ts_{name}_ns", 0) for name in ("start", "end"))
        duration = event.number("step.duration_us", 0)
        if duration is None and start is not None and end is not None and end >= start:
            duration = (end - start) * 1e-3
        row: dict[str, Any] = {"iteration": number, "engine": 0, "kv_usage": event.number("kv.usage_gpu_ratio", 0)}
        row["start"] = None if start is None else start * 1e-9
        row["duration"] = None if duration is None else duration * 1e-6
        row |= {name: event.count(key) for name, key in _COUNTS.items()}
        self.steps[number] = row
        self.blocks = event.count("kv.blocks_total_gpu") or self.blocks

    def _snapshot(self, event: Stamped) -> None:
        identity = event.text("request.id")
        prompt, effective = event.count("request.num_prompt_tokens"), event.count("request.effective_prompt_len")
        if identity and prompt is not None and effective is not None and effective <= prompt:
            row = self._of(identity)
            row["cached_tokens"] = max(row.get("cached_tokens", 0), prompt - effective)

    def trace(self, source: str) -> Trace:
        """Return the run: with step spans alone it holds no requests.

        Raises
        ------
        InputError
            If nothing in it has a time.
        """
        requests = [_finished(row) for row in self.requests.values() if _began(row) is not None]
        offset = median(self.offsets) if self.offsets else None
        steps = [self.steps[number] for number in sorted(self.steps)]
        for step in steps:
            if step["start"] is not None and step["start"] > WALL:
                step["start"] = None if offset is None and requests else step["start"] - (offset or 0.0)
        times = [row["arrival"] for row in requests] + [step["start"] for step in steps if step["start"] is not None]
        if not times:
            raise InputError("its events have no times (ts.monotonic)", file=self.file)
        origin = min(times)
        for row in requests:
            row |= {name: row[name] - origin for name in ("arrival", *_STAMPS.values()) if row.get(name) is not None}
        for step in steps:
            step["start"] = None if step["start"] is None else step["start"] - origin
        if not requests and steps and offset is None and origin > WALL:
            offset = 0.0
        return Trace(
            requests_table({name: [row.get(name) for row in requests] for name in _COLUMNS}, len(requests)),
            self._meta(source, requests, None if offset is None else origin + offset),
            timeline=_timeline(steps),
            iteration_counts=table_of(steps, ITERATION_COUNTS) if steps else None,
        )

    def _meta(self, source: str, requests: list[dict[str, Any]], origin: float | None) -> dict[str, Any]:
        seen = any(row["seen"] for row in requests)
        notes = []
        unseen = sum(not row["seen"] for row in requests)
        if unseen and seen:
            notes.append(
                f"{unseen} requests have no api.ARRIVED: their arrival is taken to be the engine's queue stamp"
            )
        if len(requests) < len(self.requests):
            notes.append(f"{len(self.requests) - len(requests)} requests without any time are left out")
        return {
            "name": self.file.resolve().name.partition(".")[0],
            "source": {"format": source, "files": file_facts([self.file])},
            **({} if requests else {"facts_only": True}),
            "model": self.model,
            "hardware": None,
            "engine": {
                "name": "vllm",
                "version": None,
                "arguments": {} if self.blocks is None else {"num_gpu_blocks": self.blocks},
            },
            "clock": {"kind": "run", "origin": origin, "note": "the host's monotonic clock; origin on its wall clock"},
            "vantage": "engine",
            "columns": {
                "arrival": "measured" if seen else "reconstructed: the engine's queue stamp",
                "cached_tokens": "measured: where a snapshot of the request was taken",
            },
            "notes": notes,
        }


def _monotonic(event: Stamped, key: str) -> float | None:
    """Seconds of a stamp that may also stand as nanoseconds."""
    exact = event.number(f"{key}_ns", 0)
    seconds = exact * 1e-9 if exact is not None else event.number(key, 0)
    if seconds is not None and seconds > 1e11:
        raise event.error(key, f"expected seconds, found {seconds:g}")
    return seconds


def _began(row: dict[str, Any]) -> float | None:
    return next((row[name] for name in ("arrival", "queued", "scheduled") if row.get(name) is not None), None)


def _finished(row: dict[str, Any]) -> dict[str, Any]:
    """A request with its arrival and how it ended."""
    served = row.get("finish") in ("length", "stopped", "stop", None) and row.get("last_token") is not None
    served = (
        served
        and row.get("first_token") is not None
        and bool(row.get("output_tokens"))
        and bool(row.get("prompt_tokens"))
    )
    row = row | {"seen": row.get("arrival") is not None, "arrival": _began(row)}
    failed = row.get("finish") == "error" or (row.get("error") is not None and "first_token" not in row)
    row["status"] = "ok" if served else "failed" if failed else "unfinished"
    if row["status"] != "ok":
        row |= {"last_token": None, "error": row.get("error") or row.get("finish")}
    return row


def _timeline(steps: list[dict[str, Any]]) -> Any:
    """Gauges at the end of each step."""
    rows = [
        {
            "time": step["start"] + (step["duration"] or 0.0),
            **{name: step[name] for name in ("running", "waiting", "kv_usage")},
        }
        for step in steps
        if step["start"] is not None
    ]
    return table_of(sorted(rows, key=lambda row: row["time"]), TIMELINE) if rows else None
