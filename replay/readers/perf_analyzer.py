"""``profile_export.json`` of perf_analyzer and GenAI-Perf: responses of every request with their stamps.

Nanoseconds of the client. One experiment a load level, each a trace of its own. Tokens are not counted in the file
(GenAI-Perf tokenises texts later): they come from the server's ``usage`` or from token ids where it has them. Empty
responses, roles, ``[DONE]`` and ``usage`` are no chunks; an event that was cut into several responses is put together
again. Format: GenAI-Perf 0.0.16, ``llm_profile_data_parser``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from profiles.errors import InputError, found
from replay.readers.client_requests import (
    ClientRequest,
    below,
    choose,
    client_trace,
    listed,
    name_of,
    nanoseconds,
    optional_tokens,
)
from replay.readers.fields import Record, as_text
from replay.readers.json_records import keys_of, read_document
from replay.trace import Trace

FORMAT = "perf-analyzer"
REQUESTS_FILE = ""
_TEXT = ("content", "text", "reasoning_content", "reasoning", "tool_calls", "text_output", "generated_text")


def detect(path: Path) -> bool:
    """Whether a file is a profile export of perf_analyzer."""
    keys = keys_of(path)
    return "experiments" in keys and bool(
        {"experiments.[].experiment", "experiments.[].requests", "experiments.[].window_boundaries"} & keys
    )


def selections(path: Path) -> list[str]:
    """Names of the experiments of a file."""
    return _names(_experiments(path)[1])


def read(path: Path, selection: str | None = None) -> Trace:
    """Read one experiment.

    Raises
    ------
    InputError
        Naming file, request and field of what cannot be used, or the experiments if none of several was named.
    """
    document, experiments = _experiments(path)
    names = _names(experiments)
    place = choose(path, names, selection, "experiments")
    experiment = experiments[place]
    rows = listed(experiment, "requests")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise experiment.error("requests", f"expected objects, found {found(row)} in place {number}")
    records = [Record(row, path, f"{experiment.row}: request {number}") for number, row in enumerate(rows, 1)]
    base = nanoseconds(records[0], "timestamp") if records else 0
    requests: list[ClientRequest] = []
    counted = 0
    for record in records:
        one, by_chunks = _request(record, base, len(requests))
        counted += by_chunks
        requests.append(one)
    notes = []
    if counted:
        notes.append(
            f"the server did not say how many tokens it made for {counted} requests: their chunks are taken, one token "
            "each"
        )
    load = below(experiment, "experiment", optional=True)
    made = "reconstructed: one a chunk, where the server did not say it" if counted else "measured: by the server"
    return client_trace(
        path,
        requests,
        {
            "name": f"{name_of(path)}#{names[place]}" if len(names) > 1 else name_of(path),
            "model": _model(records),
            "load": {
                "endpoint": _plain(document, "endpoint"),
                "mode": _plain(load, "mode"),
                "value": load.get("value") if isinstance(load.get("value"), int) else None,
            },
        },
        clock="the client's system clock, nanoseconds",
        base=base * 1e-9,
        origins={
            "arrival": "measured: when the client sent it",
            "prompt_tokens": "measured: by the server, or as token ids",
            "output_tokens": made,
        },
        notes=notes,
        format=FORMAT,
    )


def _model(records: list[Record]) -> str | None:
    """The model that the first request asked for."""
    inputs = records[0].get("request_inputs") if records else None
    payload = _payload(inputs.get("payload")) if isinstance(inputs, dict) else {}
    return _plain(Record(payload, records[0].file), "model") if records else None


def _payload(text: Any) -> dict[str, Any]:
    """The body of a request; empty if it is no JSON object."""
    try:
        body = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def _plain(record: Record, key: str) -> str | None:
    value = record.get(key)
    return value if isinstance(value, str) and value.isprintable() else None


def _experiments(path: Path) -> tuple[Record, list[Record]]:
    document = read_document(path)
    experiments = listed(document, "experiments")
    if not experiments or not all(isinstance(one, dict) for one in experiments):
        raise document.error("experiments", f"expected objects, one a load level, found {found(experiments)}")
    return document, [Record(one, path, f"experiment {place}") for place, one in enumerate(experiments, 1)]


def _names(experiments: list[Record]) -> list[str]:
    names = []
    for place, one in enumerate(experiments, 1):
        load = one.get("experiment")
        load = load if isinstance(load, dict) else {}
        mode, value = load.get("mode"), load.get("value")
        plain = mode in ("concurrency", "request_rate") and isinstance(value, int | float) and abs(value) < 1e12
        name = f"{mode}-{value:g}" if plain else f"experiment-{place}"
        names.append(name if name not in names else f"experiment-{place}")
    return names


def _request(record: Record, base: int, index: int) -> tuple[ClientRequest, bool]:
    sent = nanoseconds(record, "timestamp")
    stamps, outputs = listed(record, "response_timestamps"), listed(record, "response_outputs")
    if len(stamps) != len(outputs):
        raise record.error("response_outputs", f"has {len(outputs)} entries, response_timestamps has {len(stamps)}")
    times, usage, tokens = _chunks(record, sent, stamps, outputs)
    inputs = below(record, "request_inputs", optional=True)
    one = ClientRequest(f"request-{index}", optional_tokens(usage, "prompt_tokens"), None, sent=(sent - base) * 1e-9)
    details = below(usage, "prompt_tokens_details", optional=True)
    one.cached = optional_tokens(details, "cached_tokens")
    one.output = optional_tokens(usage, "completion_tokens") or tokens or None
    if record.get("success") is False:
        one.status, one.error = "failed", "not successful"
        return one, False
    if one.prompt is None:
        one.prompt = _token_ids(inputs)
    if not one.prompt:
        raise InputError(
            "is missing, and so are token ids: the prompt's tokens are unknown; let the server say them, for example "
            'with `genai-perf profile --extra-inputs \'{"stream_options": {"include_usage": true}}\'`',
            file=record.file,
            row=record.row,
            field="usage",
        )
    one.times = np.array(times)
    return one, one.output is None and bool(times)


def _chunks(record: Record, sent: int, stamps: list[Any], outputs: list[Any]) -> tuple[list[float], Record, int]:
    """Seconds from sending to every chunk with content, the server's usage, and token ids counted."""
    times: list[float] = []
    usage: dict[str, Any] = {}
    tokens, pending, previous = 0, "", sent
    for stamp, output in zip(stamps, outputs, strict=True):
        at = nanoseconds(Record({"response_timestamps": stamp}, record.file, record.row), "response_timestamps")
        if at < previous:
            raise record.error("response_timestamps", "expected stamps that ascend from timestamp")
        previous = at
        if not isinstance(output, dict):
            raise record.error("response_outputs", f"expected objects, found {found(output)}")
        ids = output.get("output_ids")
        tokens += len(ids) if isinstance(ids, list) else isinstance(ids, int) and not isinstance(ids, bool)
        content = bool(ids) or bool(output.get("text_output"))
        response = output.get("response")
        if response is not None:
            text = as_text(response, lambda message: record.error("response_outputs", message))
            # What does not begin an event of its own goes on with the one that was cut.
            events, pending = _events(text if text.startswith("data:") else pending + text)
            content = content or any(map(_has_content, events))
            usage = next((one["usage"] for one in events if isinstance(one.get("usage"), dict)), usage)
        if content:
            times.append((at - sent) * 1e-9)
    return times, Record(usage, record.file, record.row), tokens


def _events(text: str) -> tuple[list[dict[str, Any]], str]:
    """The JSON objects of server-sent events (or a bare one), and what of the last is still to come."""
    events: list[dict[str, Any]] = []
    rest = ""
    for line in text.split("\n"):
        data = line.strip().removeprefix("data:").strip()
        rest = ""
        if not data.startswith("{"):
            continue
        try:
            event = json.loads(data)
        except (ValueError, RecursionError):
            rest = line
            continue
        events += [event] if isinstance(event, dict) else []
    return events, rest


def _has_content(event: dict[str, Any]) -> bool:
    choices = event.get("choices")
    parts: list[Any] = choices if isinstance(choices, list) else [event]
    for part in parts:
        if not isinstance(part, dict):
            continue
        delta = part.get("delta") if isinstance(part.get("delta"), dict) else part.get("message")
        holder = delta if isinstance(delta, dict) else part
        if any(holder.get(name) for name in _TEXT):
            return True
    return False


def _token_ids(inputs: Record) -> int | None:
    """Prompt tokens that were sent as ids: ``input_ids``, or a payload whose ``prompt`` is a list of numbers."""
    ids = inputs.get("input_ids")
    if ids is None:
        body = _payload(inputs.get("payload"))
        ids = body.get("prompt", body.get("input_ids"))
    if isinstance(ids, list) and len(ids) == 1 and isinstance(ids[0], list):
        ids = ids[0]
    whole = isinstance(ids, list) and all(type(one) is int for one in ids)
    return len(ids) if isinstance(ids, list) and whole else None
