"""BLIS TraceV2: a folder with ``trace.yaml``, ``trace.csv`` and, where tokens have times, ``trace.itl.csv``.

What ``blis replay`` and ``blis calibrate`` read (``--trace-header``, ``--trace-data``). Times are whole microseconds
from the first arrival. Prompts are lengths: BLIS has prefix groups and no hashes, so what prompts share is lost.
"""

from __future__ import annotations

import csv
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from profiles.errors import InputError, found
from replay.readers.blis_trace import CHUNK_COLUMNS, COLUMNS, VERSION
from replay.trace import REQUEST_CLOCK, Trace

FILES = HEADER, TABLE, CHUNKS = "trace.yaml", "trace.csv", "trace.itl.csv"
_STATUS = {"ok": "ok", "silent": "ok", "failed": "error", "unfinished": "incomplete"}
_SERVER = {
    "tensor_parallel": "tensor_parallel_size",
    "max_num_seqs": "max_num_seqs",
    "block_size": "block_size",
    "gpu_memory_utilization": "gpu_memory_utilization",
    "max_model_len": "max_model_len",
}
"""BLIS's names of what its header says of the server, and vLLM's."""


def write_blis(trace: Trace, folder: Path) -> list[str]:
    """Write a trace, whole or not at all; return sentences on what the format could not take.

    Raises
    ------
    InputError
        If arrivals are unknown, or the folder holds something else.
    """
    arrival = trace.column("arrival")
    if trace.clock == REQUEST_CLOCK or np.isnan(arrival).any():
        raise InputError(f"{trace.name} does not say when its requests were sent; --arrivals draws them")
    target = folder.resolve()
    try:
        foreign = target.exists() and (not target.is_dir() or any(one.name not in FILES for one in target.iterdir()))
        if foreign:
            raise InputError("is no folder of a BLIS trace; choose another", file=folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            new, old = scratch / "new", scratch / "old"
            new.mkdir()
            _write(trace, new)
            if target.exists():
                target.replace(old)
            new.replace(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", file=folder) from None
    lost = [name for name in ("block_hashes", "cached_tokens", "preemptions", "queued", "scheduled") if trace.has(name)]
    return [f"BLIS has no place for {', '.join(lost)}"] if lost else []


def _write(trace: Trace, folder: Path) -> None:
    header = yaml.safe_dump(_header(trace), sort_keys=False, allow_unicode=True)
    (folder / HEADER).write_text(header, encoding="utf-8")
    rows = _rows(trace)
    _table(folder / TABLE, list(rows[0]), [list(row.values()) for row in rows])
    begin = float(np.nanmin(trace.column("arrival")))
    chunks = [
        [row, chunk, _micros(time - begin)]
        for row, times in enumerate(trace.lists("token_times"))
        for chunk, time in enumerate(times or ())
    ]
    if chunks:
        _table(folder / CHUNKS, list(CHUNK_COLUMNS), chunks)


def _table(path: Path, names: list[str], rows: list[list[Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows([names, *rows])


def _micros(seconds: float) -> int:
    return round(seconds * 1e6)


def _mode(trace: Trace) -> str:
    """BLIS's word for where a trace is from."""
    if (trace.meta.get("source") or {}).get("format") == "servecal-replay":
        return "replayed"
    return "real" if trace.has("first_token") else "generated"


def _header(trace: Trace) -> dict[str, Any]:
    engine = trace.meta.get("engine") or {}
    arguments = engine.get("arguments") or {}
    server = {"type": engine.get("name"), "model": trace.meta.get("model")}
    server |= {theirs: arguments.get(ours) for theirs, ours in _SERVER.items()}
    told = {name: value for name, value in server.items() if isinstance(value, str | int | float)}
    return {
        "trace_version": VERSION,
        "time_unit": "microseconds",
        "mode": _mode(trace),
        "warm_up_requests": 0,
        **({"server": told} if told else {}),
    }


def _rows(trace: Trace) -> list[dict[str, Any]]:
    """Requests under BLIS's columns, in its order."""
    columns = {
        name: trace.requests.column(name).to_pylist()
        for name in ("id", "status", "error", "priority", "prompt_tokens", "output_tokens", "nominal_arrival")
    }
    stamps = {name: trace.column(name) for name in ("arrival", "first_token", "last_token")}
    begin = float(stamps["arrival"].min())
    real, prioritised = _mode(trace) == "real", trace.has("priority")
    rows = []
    for index in range(len(trace)):
        one = {name: values[index] for name, values in columns.items()}
        times = {name: float(values[index]) - begin for name, values in stamps.items()}
        wanted = one["nominal_arrival"]
        chunked = {name: 0 if np.isnan(times[name]) else _micros(times[name]) for name in ("first_token", "last_token")}
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
        row |= {name: 0 for name in COLUMNS if name.endswith(("_tokens", "_us", "_length", "_index", "_ratio"))}
        row |= {
            "request_id": index,
            "streaming": "true",
            "input_tokens": one["prompt_tokens"] or 0,
            "text_tokens": one["prompt_tokens"] or 0,
            "server_input_tokens": (one["prompt_tokens"] or 0) if real else 0,
            "output_tokens": 0 if one["status"] == "silent" else one["output_tokens"] or 0,
            "model": trace.meta.get("model") or "",
            "arrival_time_us": _micros(times["arrival"] if wanted is None else max(wanted - begin, 0.0)),
            "send_time_us": _micros(times["arrival"]),
            "first_chunk_time_us": chunked["first_token"],
            "last_chunk_time_us": chunked["last_token"],
            "num_chunks": len(trace.requests.column("token_times")[index].as_py() or ()),
            "status": _STATUS[one["status"]],
            "error_message": one["error"] or "",
        }
        if prioritised:
            row = _with_priority(row, one["priority"] or 0)
        rows.append(row | ({"x_request_id": one["id"]} if real else {}))
    return rows


def _with_priority(row: dict[str, Any], priority: int) -> dict[str, Any]:
    """The optional column stands behind ``slo_class``."""
    if priority < 0:
        raise InputError(
            f"expected priorities of at least 0, which BLIS takes; found {found(priority)}", field="priority"
        )
    place = list(row).index("slo_class") + 1
    items = list(row.items())
    return dict([*items[:place], ("vllm_priority", priority), *items[place:]])
