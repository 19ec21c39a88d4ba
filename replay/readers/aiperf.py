"""AIPerf's ``profile_export.jsonl`` (records) and ``profile_export_raw.jsonl`` (raw): one line a request.

A record has ``metadata`` (wall-clock nanoseconds: ``credit_issued_ns`` when it was to be sent, ``request_start_ns``
when it was), ``metrics`` (``{"value", "unit"}``, latencies in milliseconds) and ``error``. A raw line has the stream
itself, on ``perf_counter_ns``. Warm-up requests are left out. Checked against files of AIPerf 0.13.0.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from profiles.errors import InputError, found
from replay.readers.client_requests import (
    ClientRequest,
    as_times,
    below,
    client_trace,
    listed,
    message_of,
    name_of,
    nanoseconds,
    optional_tokens,
)
from replay.readers.fields import Record, as_seconds
from replay.readers.json_records import keys_of, read_document, stream_lines
from replay.trace import Floats, Trace

FORMAT = "aiperf"
REQUESTS_FILE = "profile_export.jsonl"
SUMMARY_FILE = "profile_export_aiperf.json"
UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "sec": 1.0, "s": 1.0}
SLACK = 1e-6
"""Seconds by which sums of rounded milliseconds may differ."""


def detect(path: Path) -> bool:
    """Whether a file holds AIPerf's records or raw records, or a folder of its artifacts the former."""
    keys = keys_of(path / REQUESTS_FILE if path.is_dir() else path)
    return "metadata.request_start_ns" in keys and bool({"metrics", "start_perf_ns"} & keys)


def read(path: Path) -> Trace:
    """Read a run.

    Raises
    ------
    InputError
        Naming file, line and field of what cannot be used.
    """
    source = path / REQUESTS_FILE if path.is_dir() else path
    requests: list[ClientRequest] = []
    base: int | None = None
    warm_up = recounted = 0
    raw = "start_perf_ns" in keys_of(source)
    for record in stream_lines(source):
        metadata = below(record, "metadata")
        if metadata.get("benchmark_phase") not in (None, "profiling"):
            warm_up += 1
            continue
        base = nanoseconds(metadata, "request_start_ns") if base is None else base
        request, retokenised = (_raw if raw else _measured)(record, metadata, base, len(requests))
        recounted += retokenised
        requests.append(request)
    notes = [f"{warm_up} warm-up requests are left out"] if warm_up else []
    if recounted:
        notes.append(
            f"the server did not say how many tokens {recounted} requests had: AIPerf counted their text with its "
            "tokenizer, without the chat template (--use-server-token-count asks the server)"
        )
    counted = "measured: by the server" if not recounted else "assumed: counted from the text by AIPerf's tokenizer"
    summary = source.parent / SUMMARY_FILE
    described = _described(summary) if summary.is_file() else {}
    return client_trace(
        source,
        requests,
        {**described, "name": name_of(path), "warmed_up": True if warm_up else None},
        clock="the client's wall clock" + (" (sending) and performance counter (chunks)" if raw else ""),
        base=(base or 0) * 1e-9,
        origins={
            "arrival": "measured: when the client sent it",
            "nominal_arrival": "measured: when AIPerf gave the request its credit",
            "prompt_tokens": counted,
            "output_tokens": counted,
        },
        notes=notes,
        files=[summary] if described else [],
        format=FORMAT,
    )


def _begun(metadata: Record, base: int, index: int) -> ClientRequest:
    """A request with its id and when it was sent, the rest open."""
    credit = metadata.get("credit_issued_ns")
    one = ClientRequest(metadata.text("x_request_id") or f"request-{index}", None, None)
    one.sent = (nanoseconds(metadata, "request_start_ns") - base) * 1e-9
    one.nominal = None if credit is None else (nanoseconds(metadata, "credit_issued_ns") - base) * 1e-9
    return one


def _ended(one: ClientRequest, record: Record, metadata: Record) -> bool:
    """Mark a request that failed or was cancelled; whether it did."""
    if metadata.get("was_cancelled") is True:
        one.status, one.error = "unfinished", "cancelled by the client"
    elif record.get("error") is not None:
        error = record.get("error")
        about = Record(error if isinstance(error, dict) else {"message": error}, record.file, record.row)
        one.status, one.error = "failed", message_of(about, "message", "type")
    return one.status != "ok"


def _measured(record: Record, metadata: Record, base: int, index: int) -> tuple[ClientRequest, bool]:
    """One line of ``profile_export.jsonl``, and whether its tokens were counted by the client."""
    metrics = below(record, "metrics", optional=True)
    one = _begun(metadata, base, index)
    prompt, output = (_tokens(metrics, f"usage_{name}_tokens") for name in ("prompt", "completion"))
    one.cached = _tokens(metrics, "usage_prompt_cache_read_tokens")
    retokenised = prompt is None or output is None
    one.prompt = _tokens(metrics, "input_sequence_length") if prompt is None else prompt
    one.output = _tokens(metrics, "output_sequence_length") if output is None else output
    if one.prompt is None:
        one.prompt = _tokens(metrics, "error_isl")
    if _ended(one, record, metadata):
        return one, False
    if not one.prompt:
        raise record.error("metrics.input_sequence_length", "is missing: expected the tokens of the prompt, at least 1")
    if not one.output:
        raise record.error(
            "metrics.output_sequence_length", "is missing: expected the tokens of the output, at least 1"
        )
    first = _seconds(metrics, "time_to_first_token", "ttft")
    one.last = _seconds(metrics, "request_latency")
    if first is None:
        return one, retokenised
    gaps = _gaps(metrics)
    if gaps is not None:
        one.times = np.cumsum([first, *gaps])
    elif one.last is not None and one.last < first - SLACK:
        raise record.error("metrics.request_latency", f"expected at least the TTFT ({first:g} s), found {one.last:g} s")
    one.first, one.last = first, max(first, one.last or first)
    return one, retokenised


def _metric(metrics: Record, name: str) -> tuple[Any, float]:
    """A metric's value and the seconds of its unit; None if it is absent."""
    value = metrics.get(name)
    if value is None:
        return None, 1.0
    if not isinstance(value, dict):
        raise metrics.error(f"metrics.{name}", f'expected {{"value", "unit"}}, found {found(value)}')
    unit = value.get("unit")
    return value.get("value"), UNITS.get(unit, 0.0) if isinstance(unit, str) else 0.0


def _tokens(metrics: Record, name: str) -> int | None:
    value = _metric(metrics, name)[0]
    return optional_tokens(Record({f"metrics.{name}": value}, metrics.file, metrics.row), f"metrics.{name}")


def _seconds(metrics: Record, *names: str) -> float | None:
    for name in names:
        value, unit = _metric(metrics, name)
        if value is not None:
            return _time(metrics, name, value, unit)
    return None


def _time(metrics: Record, name: str, value: Any, unit: float) -> float:
    if not unit:
        raise metrics.error(f"metrics.{name}", f"expected a unit of {', '.join(UNITS)}")
    return as_seconds(value, False, lambda message: metrics.error(f"metrics.{name}", message), unit)


def _gaps(metrics: Record) -> Floats | None:
    values, unit = _metric(metrics, "inter_chunk_latency")
    if values is None:
        return None
    if not isinstance(values, list):
        raise metrics.error("metrics.inter_chunk_latency", f"expected an array, found {found(values)}")
    if not unit:
        raise metrics.error("metrics.inter_chunk_latency", f"expected a unit of {', '.join(UNITS)}")
    return as_times(values, lambda message: metrics.error("metrics.inter_chunk_latency", message), unit)


def _raw(record: Record, metadata: Record, base: int, index: int) -> tuple[ClientRequest, bool]:
    """One line of ``profile_export_raw.jsonl``: chunks with content, tokens from the server's ``usage``."""
    one = _begun(metadata, base, index)
    start = nanoseconds(record, "start_perf_ns")
    times: list[float] = []
    usage: dict[str, Any] = {}
    for response in listed(record, "responses"):
        chunk = below(Record({"responses": response}, record.file, record.row), "responses")
        content = False
        for packet in listed(chunk, "packets"):
            event = _event(packet)
            content |= _has_content(event)
            usage = event["usage"] if isinstance(event.get("usage"), dict) else usage
        if content:
            times.append((nanoseconds(chunk, "perf_ns") - start) * 1e-9)
    if any(after < before for before, after in pairwise([0.0, *times])):
        raise record.error("responses", "expected stamps that ascend from start_perf_ns")
    said = Record(usage, record.file, record.row)
    one.prompt, one.output = optional_tokens(said, "prompt_tokens"), optional_tokens(said, "completion_tokens")
    details = below(said, "prompt_tokens_details", optional=True)
    one.cached = optional_tokens(details, "cached_tokens")
    if _ended(one, record, metadata):
        return one, False
    if not one.prompt:
        raise InputError(
            "the stream holds no usage, so the prompt's tokens are unknown; read profile_export.jsonl, which AIPerf "
            "writes beside it, or let the server say them (--use-server-token-count)",
            file=record.file,
            row=record.row,
            field="responses",
        )
    one.times = np.array(times)
    return one, False


def _event(packet: Any) -> dict[str, Any]:
    """The JSON of one server-sent event; empty for comments and ``[DONE]``."""
    value = packet.get("value") if isinstance(packet, dict) else None
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return {}
    try:
        event = json.loads(value)
    except (ValueError, RecursionError):
        return {}
    return event if isinstance(event, dict) else {}


def _has_content(event: dict[str, Any]) -> bool:
    """Whether a chunk of a completion or a chat brings text (or thoughts, or a call of a tool), not only a role."""
    choices = event.get("choices")
    for choice in choices if isinstance(choices, list) else []:
        if not isinstance(choice, dict):
            continue
        delta = choice.get("delta")
        holder = delta if isinstance(delta, dict) else choice
        if any(holder.get(name) for name in ("content", "text", "reasoning_content", "reasoning", "tool_calls")):
            return True
    return False


def _described(summary: Path) -> dict[str, Any]:
    """Model and load, as the summary beside the records has them; nothing if it cannot be read."""
    try:
        config = read_document(summary).get("input_config")
    except InputError:
        return {}
    if not isinstance(config, dict):
        return {}
    models = config.get("models")
    items = models.get("items") if isinstance(models, dict) else None
    first = items[0] if isinstance(items, list) and items else None
    name = first.get("name") if isinstance(first, dict) else None
    phases = config.get("phases")
    load = [one for one in phases if isinstance(one, dict)] if isinstance(phases, list) else []
    kept = {
        key: value
        for one in load
        if one.get("kind") == "profiling"
        for key, value in one.items()
        if key in ("type", "rate", "concurrency", "requests")
        and (isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)))
    }
    return {"model": name if isinstance(name, str) else None, "load": kept}
