"""vllm-vcr: a tap between vLLM's front end and its engine, one JSON line a finished request.

An optional first line ``{"meta": {...}}`` describes the engine. Times are milliseconds; ``arrival_ms`` counts from the
capture's start, and where it is absent stamps count from each request's own arrival. Requests stand in the order in
which they finished, and have no ids: an id is the number of the record. Format: vllm-vcr @4b460a1.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from profiles.errors import InputError, found
from replay.readers.fields import Record, as_seconds, as_tokens, parse_json
from replay.readers.opening import head, open_text
from replay.trace import REQUEST_CLOCK, RUN_CLOCK, TIMELINE, Trace, file_facts, requests_table, table_of

FORMAT = "vllm-vcr"
REQUESTS_FILE = ""
LARGEST_HASH = 2**63 - 1
_FINISHED = {"stop": "ok", "length": "ok", "repetition": "ok", "abort": "unfinished", "error": "failed", None: "ok"}
_ARGUMENTS = {"tp": "tensor_parallel_size", "max_num_seqs": "max_num_seqs", "block_size": "block_size"}


def detect(path: Path) -> bool:
    """Whether a file is of this format: its first record has the keys of one."""
    if not path.is_file():
        return False
    lines = [line for line in head(path).decode("utf-8-sig", "replace").splitlines() if line.strip()][:2]
    if not lines or not lines[0].lstrip().startswith("{"):
        return False
    if lines[0].lstrip().startswith('{"meta"') and len(lines) > 1:
        lines = lines[1:]
    return all(f'"{key}"' in lines[0] for key in ("prompt_tokens", "output_tokens", "ttft_ms"))


def read(path: Path) -> Trace:
    """Read a capture.

    Raises
    ------
    InputError
        Naming file, line and field of what cannot be used.
    """
    described: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    gauges: dict[float, float] = {}
    for record in _records(path):
        if "meta" in record.values and not rows:
            described = record.values["meta"]
            if not isinstance(described, dict):
                raise record.error("meta", f"expected an object, found {found(described)}")
            continue
        rows.append(_request(record, len(rows), gauges))
    if not rows:
        raise InputError("holds no requests", file=path)
    timed = [row["arrival"] is not None for row in rows]
    if any(timed) and not all(timed):
        row = timed.index(False)
        raise InputError(
            "is missing, although other records have it", file=path, row=rows[row]["line"], field="arrival_ms"
        )
    columns = {name: [row.get(name) for row in rows] for name in _COLUMNS}
    # Prompts shorter than a block have no hashes; without any, nothing says how long a block is.
    hashes = columns["block_hashes"] if any(columns["block_hashes"]) else [None] * len(rows)
    columns["block_hashes"] = pa.array(hashes, pa.list_(pa.int64()))
    meta = _meta(path, Record(described, path, 1), rows, run=all(timed))
    samples = [{"time": time, "running": gauges[time]} for time in sorted(gauges)] if all(timed) else []
    return Trace(requests_table(columns, len(rows)), meta, timeline=table_of(samples, TIMELINE) if samples else None)


_COLUMNS = (
    "id",
    "status",
    "error",
    "arrival",
    "first_token",
    "last_token",
    "token_times",
    "prompt_tokens",
    "output_tokens",
    "cached_tokens",
    "block_hashes",
)


def _records(path: Path) -> Iterator[Record]:
    with open_text(path) as stream:
        try:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                value = parse_json(line, path, number)
                if not isinstance(value, dict):
                    raise InputError(f"expected a JSON object, found {found(value)}", file=path, row=number)
                yield Record(value, path, number)
        except UnicodeDecodeError as error:
            raise InputError(f"is no UTF-8 text: {error.reason} at byte {error.start}", file=path) from None


def _request(record: Record, index: int, gauges: dict[float, float]) -> dict[str, Any]:
    reason = record.text("finish_reason")
    if reason not in _FINISHED:
        raise record.error("finish_reason", f"expected {', '.join(filter(None, _FINISHED))}, found {found(reason)}")
    status = _FINISHED[reason]
    output = record.tokens("output_tokens")
    row: dict[str, Any] = {
        "line": record.row,
        "id": str(index),
        "status": status,
        "error": reason if status == "failed" else None,
        "prompt_tokens": record.tokens("prompt_tokens", 1),
        "output_tokens": output,
        "cached_tokens": record.tokens("cached_tokens") if record.get("cached_tokens") is not None else 0,
        "block_hashes": _hashes(record),
        "arrival": record.seconds("arrival_ms", unit=1e-3) if record.get("arrival_ms") is not None else None,
        "tokens_told": record.get("itl_tokens") is not None,
    }
    if status == "ok" and output < 1:
        raise record.error("output_tokens", "expected at least 1 of a request that was served, found 0")
    if output < 1 or (status == "failed" and record.get("ttft_ms") is None):
        return row
    first = (row["arrival"] or 0.0) + record.seconds("ttft_ms", unit=1e-3)
    gaps = _list(record, "itl_ms")
    summary = record.get("itl_summary")
    if gaps is None and summary is None and output > 1:
        raise record.error("itl_ms", f"is missing (and so is itl_summary) although there are {output} output tokens")
    if gaps is None:
        row |= {"first_token": first, "last_token": first + _summed(record, summary)}
    else:
        seconds = [as_seconds(gap, False, lambda why: record.error("itl_ms", why), 1e-3) for gap in gaps]
        times = np.cumsum([first, *seconds])
        row |= {"first_token": first, "last_token": float(times[-1]), "token_times": times.tolist()}
        _running(record, times, gauges)
    if status != "ok":
        row["last_token"] = None
    return row


def _summed(record: Record, summary: Any) -> float:
    """Seconds between first and last token, where only their mean is kept."""
    if summary is None:
        return 0.0
    if not isinstance(summary, dict):
        raise record.error("itl_summary", f"expected an object, found {found(summary)}")
    inner = Record(summary, record.file, record.row)
    return inner.seconds("mean_ms", unit=1e-3) * inner.tokens("count")


def _list(record: Record, name: str) -> list[Any] | None:
    value = record.get(name)
    if value is not None and not isinstance(value, list):
        raise record.error(name, f"expected an array, found {found(value)}")
    return value


def _hashes(record: Record) -> list[int] | None:
    """Hashes of full prompt blocks; unsigned there, so their top bit is dropped here."""
    values = _list(record, "block_hashes")
    for value in values or ():
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
            raise record.error("block_hashes", f"expected whole numbers below 2^64, found {found(value)}")
    return None if values is None else [value & LARGEST_HASH for value in values]


def _running(record: Record, times: Any, gauges: dict[float, float]) -> None:
    """Note how many requests ran in the step that closed each gap."""
    context = record.get("itl_ctx")
    if not isinstance(context, dict) or context.get("num_running") is None:
        return
    inner = Record(context, record.file, record.row)
    running = _list(inner, "num_running") or []
    if len(running) != len(times) - 1:
        raise record.error("itl_ctx", f"num_running has {len(running)} entries, itl_ms has {len(times) - 1}")
    for time, value in zip(times[1:].tolist(), running, strict=True):
        gauges[time] = float(as_tokens(value, 0, lambda why: record.error("itl_ctx", why)))


def _meta(path: Path, said: Record, rows: list[dict[str, Any]], *, run: bool) -> dict[str, Any]:
    arguments = {}
    for theirs, ours in _ARGUMENTS.items():
        if said.get(theirs) is not None:
            arguments[ours] = as_tokens(said.get(theirs), 1, lambda why, name=theirs: said.error(f"meta.{name}", why))
    hashed = any(row["block_hashes"] for row in rows)
    if hashed and "block_size" not in arguments:
        raise said.error("meta.block_size", "is missing although records have block_hashes")
    notes = ["requests stand in the order in which they finished; their ids are numbers of records"]
    chunked = sum(row["tokens_told"] and len(row.get("token_times") or ()) < row["output_tokens"] for row in rows)
    if chunked:
        notes.append(f"{chunked} requests received several tokens in one chunk: token_times are chunks")
    meta = {
        "name": path.resolve().name.partition(".")[0],
        "source": {"format": FORMAT, "files": file_facts([path])},
        "model": said.text("model"),
        "hardware": said.text("gpu"),
        "engine": {"name": "vllm", "version": said.text("vllm_version"), "arguments": arguments},
        "clock": {
            "kind": RUN_CLOCK if run else REQUEST_CLOCK,
            "origin": 0.0 if run else None,
            "note": "milliseconds since the capture's start" if run else "each request's own arrival",
        },
        "vantage": "engine",
        "columns": {
            "id": "assumed: numbers of records",
            "arrival": "measured" if run else "unknown: the records have no arrival_ms",
            "token_times": "measured: chunks",
            "cached_tokens": "measured",
        },
        "notes": notes,
    }
    return meta | ({"block_hash": {"block_size": arguments["block_size"]}} if hashed else {})
