"""The arrays that ``vllm bench serve`` and SGLang's ``bench_serving`` write: one entry a request, in order of issue.

``input_lens``, ``output_lens``, ``ttfts`` (s), ``itls`` (lists of s, between chunks), ``errors``; vLLM from 0.16 adds
``start_times`` (s), from 0.32 ``queue_times`` (s, the wait for one of ``max_concurrency`` places, no part of the TTFT).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from profiles.errors import InputError, found
from replay.readers.client_requests import as_times, list_column
from replay.readers.fields import Record, as_seconds, as_text, as_tokens
from replay.trace import Floats

ARRAYS = ("input_lens", "output_lens", "ttfts", "itls", "errors")
STARTS = ("start_times", "queue_times")
MEASURED = ("prompt_tokens", "output_tokens", "first_token", "last_token", "token_times")


def request_rows(record: Record, *, command: str, chat: bool, optional: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Return lengths, status and times of every request.

    Parameters
    ----------
    record : Record
        A run.
    command : str
        What writes the arrays, for a file that lacks them.
    chat : bool
        Whether the first chunk holds the role only.
    optional : tuple of str
        Further arrays, used where they are there.

    Raises
    ------
    InputError
        Naming file, request and field of what cannot be used.
    """
    missing = [name for name in ARRAYS[:4] if record.get(name) is None]
    if missing:
        raise record.error(missing[0], f"is missing; run {command}")
    arrays = {name: record.get(name) for name in (*ARRAYS, *optional) if record.get(name) is not None}
    for name, values in arrays.items():
        if not isinstance(values, list):
            raise record.error(name, f"expected an array, found {found(values)}")
    for name, values in arrays.items():
        if len(values) != len(arrays["ttfts"]):
            raise record.error(name, f"has {len(values)} entries, ttfts has {len(arrays['ttfts'])}")
    if not arrays["ttfts"]:
        raise record.error("ttfts", "holds no requests")
    return [_request(record, arrays, index, chat) for index in range(len(arrays["ttfts"]))]


def request_columns(rows: list[dict[str, Any]], origin: float | None) -> dict[str, Any]:
    """Return columns of a trace; without an origin on each request's own clock."""
    stamps = [None if row["times"] is None else row["times"] + (row["sent"] - (origin or 0.0)) for row in rows]
    waited = origin is not None and any(row["waited"] is not None for row in rows)
    return {
        "id": [str(index) for index in range(len(rows))],
        "status": [row["status"] for row in rows],
        "error": [row["error"] for row in rows],
        "nominal_arrival": [row["sent"] - row["waited"] - origin for row in rows] if waited else None,
        "arrival": None if origin is None else [row["sent"] - origin for row in rows],
        "first_token": [None if one is None else float(one[0]) for one in stamps],
        "last_token": [None if one is None else float(one[-1]) for one in stamps],
        "token_times": list_column(stamps),
        "prompt_tokens": [row["prompt"] for row in rows],
        "output_tokens": [row["output"] for row in rows],
    }


def _request(record: Record, arrays: dict[str, list[Any]], index: int, chat: bool) -> dict[str, Any]:
    """One request's lengths, status and times since it was sent."""
    path, where = record.file, f"request {index}"
    if record.row is not None:
        where = f"line {record.row}: {where}"

    def error(field: str) -> Any:
        return lambda message: InputError(message, file=path, row=where, field=field)

    failure = arrays["errors"][index] if "errors" in arrays else None
    ttft = as_seconds(arrays["ttfts"][index], False, error("ttfts"))
    gaps = arrays["itls"][index]
    if not isinstance(gaps, list):
        raise error("itls")(f"expected an array of seconds, found {found(gaps)}")
    times: Floats = np.cumsum([ttft, *as_times(gaps, error("itls"))])
    said = as_tokens(arrays["output_lens"][index], 0, error("output_lens"))
    row: dict[str, Any] = {
        "prompt": as_tokens(arrays["input_lens"][index], 0, error("input_lens")),
        "status": "ok",
        "error": None,
        "said": said,
        "output": said,
        "times": times,
        "sent": 0.0,
        "waited": None,
    }
    if "queue_times" in arrays:
        row["waited"] = as_seconds(arrays["queue_times"][index], False, error("queue_times"))
    if "start_times" in arrays:
        row["sent"] = as_seconds(arrays["start_times"][index], True, error("start_times"))
    if failure is not None and as_text(failure, error("errors")):
        row |= {"status": "failed", "error": failure, "output": None, "times": None}
    elif ttft == 0 and not gaps:
        # No content came, yet nothing failed: the model ended at once, after a prefill that the engine did.
        row |= {"status": "silent", "output": 1, "times": None}
    elif ttft == 0:
        raise error("ttfts")("is 0 although tokens followed: expected a time above 0")
    else:
        if chat and gaps and len(gaps) == said:
            # The chat endpoint opens with a chunk that holds only the role.
            row["times"] = times = times[1:]
        # Fewer tokens than chunks: output_lens counts re-tokenised text, the chunks are the engine's.
        row["output"] = max(said, len(times))
    if row["status"] != "failed" and row["prompt"] < 1:
        raise error("input_lens")("expected at least 1 token, found 0")
    return row


def request_notes(rows: list[dict[str, Any]]) -> list[str]:
    """Say what the arrays cannot say themselves."""
    notes = []
    silent = sum(row["status"] == "silent" for row in rows)
    if silent:
        notes.append(
            f"{silent} requests ended without content or error; they are replayed as prefills of one output "
            "token and have no latency to compare"
        )
    recounted = sum(row["status"] == "ok" and row["said"] < row["output"] for row in rows)
    if recounted:
        notes.append(f"output_lens is less than the chunks received in {recounted} requests: chunks are taken")
    coalesced = sum(row["status"] == "ok" and row["times"].size < row["output"] for row in rows)
    if coalesced:
        notes.append(f"{coalesced} requests received several tokens in one chunk: token_times are chunks")
    return notes
