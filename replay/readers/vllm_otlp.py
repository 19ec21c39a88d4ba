"""vLLM's OpenTelemetry spans (``--otlp-traces-endpoint``): one span ``llm_request`` a finished request.

A span begins at the request's arrival (wall clock); its attributes are durations, from which the stamps follow: first
token = arrival + TTFT, scheduled = first token - prefill, queued = scheduled - time in queue, last token = first token
+ decode. TTFT is stamped in the front end, so the others are late by the way from the engine to it. Source: vLLM 0.32
``OutputProcessor.do_tracing``.

The spans of a fork that traces journeys and steps (``--enable-journey-tracing``) hold the stamps themselves, and a
summary of each engine step: ``vllm_journeys``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from profiles.errors import InputError
from replay.readers.fields import MOST_TOKENS
from replay.readers.opening import head
from replay.readers.otlp import Span, spans
from replay.readers.vllm_journeys import Journeys
from replay.trace import Trace, file_facts, requests_table

FORMAT = "vllm-otlp"
REQUESTS_FILE = ""
REQUEST = "llm_request"
_LATENCY = "gen_ai.latency."
_USAGE = "gen_ai.usage."


def detect(path: Path) -> bool:
    """Whether a file holds spans of vLLM."""
    if not path.is_file():
        return False
    content = head(path).removeprefix(b"\xef\xbb\xbf").lstrip()
    return (
        content[:1] in (b"{", b"[")
        and b'"resourceSpans"' in content
        and (b"llm_request" in content or b'"vllm.' in content)
    )


def read(path: Path) -> Trace:
    """Read a run.

    Raises
    ------
    InputError
        Naming file, line and attribute of what cannot be used.
    """
    journeys = Journeys(path)
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    for span in spans(path):
        if span.span_id and span.span_id in seen:
            continue  # an export that was sent again
        seen.add(span.span_id)
        if span.name == REQUEST and f"{_USAGE}completion_tokens" in span.attributes:
            rows.append(_request(span))
        else:
            journeys.take(span)
    if journeys.found:
        return journeys.trace(FORMAT)
    if not rows:
        raise InputError(f"holds no spans of requests ({REQUEST} with {_USAGE}completion_tokens)", file=path)
    origin = min(row["began"] for row in rows)
    for row in rows:
        _stamp(row, (row["began"] - origin) * 1e-9)
    stamps = ("arrival", "queued", "scheduled", "first_token", "last_token")
    columns = {
        name: [row.get(name) for row in rows] for name in ("id", "status", *stamps, "prompt_tokens", "output_tokens")
    }
    reckoned = "reconstructed: from durations, counted back from the first token's stamp in the front end"
    return Trace(
        requests_table(columns, len(rows)),
        {
            "name": path.resolve().name.partition(".")[0],
            "source": {"format": FORMAT, "files": file_facts([path])},
            "model": None,
            "hardware": None,
            "engine": {"name": "vllm", "version": None, "arguments": {}},
            "clock": {"kind": "run", "origin": origin * 1e-9, "note": "the API server's wall clock (Unix seconds)"},
            "vantage": "engine",
            "columns": {
                "arrival": "measured",
                "queued": reckoned,
                "scheduled": reckoned,
                "first_token": "measured: in the front end",
                "last_token": "reconstructed: the first token's stamp and the engine's decode time",
            },
            "notes": _notes(rows),
        },
    )


def _request(span: Span) -> dict[str, Any]:
    identity = span.text("gen_ai.request.id")
    if identity is None or span.time is None:
        missing = "gen_ai.request.id" if identity is None else "startTimeUnixNano"
        raise span.error(missing, "is missing")
    prompt, output = (span.count(f"{_USAGE}{name}_tokens") for name in ("prompt", "completion"))
    if prompt is None or prompt > MOST_TOKENS or (output or 0) > MOST_TOKENS:
        raise span.error(f"{_USAGE}prompt_tokens", "expected the tokens of a request")
    ttft, queue, prefill, decode = (
        span.number(f"{_LATENCY}{name}")
        for name in ("time_to_first_token", "time_in_queue", "time_in_model_prefill", "time_in_model_decode")
    )
    row: dict[str, Any] = {
        "id": identity,
        "status": "unfinished",
        "began": span.time,
        "prompt_tokens": prompt,
        "output_tokens": output,
    }
    if ttft is None or queue is None or prefill is None or decode is None or not output or not prompt:
        return row
    # Stamps that were never reached are 0, and durations to or from them no durations.
    if ttft == 0 or not all(0 <= one < 1e7 for one in (ttft, queue, prefill, decode)):
        return row
    return row | {"status": "ok", "durations": (ttft, queue, prefill, decode)}


def _stamp(row: dict[str, Any], arrival: float) -> None:
    """Stamps of a request from its arrival, in seconds since the run's first, and its durations."""
    row["arrival"] = arrival
    if row["status"] == "ok":
        ttft, queue, prefill, decode = row["durations"]
        first = arrival + ttft
        row |= {"first_token": first, "last_token": first + decode, "scheduled": first - prefill}
        row["queued"] = row["scheduled"] - queue


def _notes(rows: list[dict[str, Any]]) -> list[str]:
    unfinished = sum(row["status"] != "ok" for row in rows)
    return [f"{unfinished} requests ended without tokens, or aborted: they have no stamps"] if unfinished else []
