"""``vllm bench serve --save-result --save-detailed``: a client's view of a run, one JSON object.

Without ``--save-detailed`` it holds aggregates only (``vllm_bench_summary``).

Versions: 0.6 to 0.32. ``start_times`` came with 0.16; before it a file does not say when requests were sent,
and the trace's stamps count from each request's own sending.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from profiles.errors import InputError
from replay.readers.bench_arrays import MEASURED, STARTS, request_columns, request_notes, request_rows
from replay.readers.client_requests import choose, name_of, name_run
from replay.readers.fields import Record
from replay.readers.json_records import LONGEST, keys_of, read_run, runs
from replay.readers.opening import BUFFER, open_bytes
from replay.readers.vllm_bench_summary import is_summary, summary_trace
from replay.trace import REQUEST_CLOCK, RUN_CLOCK, Trace, file_facts, requests_table

FORMAT = "vllm-bench"
REQUESTS_FILE = ""
_OWN_KEYS = frozenset(
    {"model_id", "request_throughput", "date", "backend", "burstiness", "completed", "input_lens", "generated_texts"}
)
"""At least one of them begins a result, however its keys are sorted."""
SGLANG_KEYS = frozenset({"total_output_tokens_retokenized", "sharegpt_output_len", "random_range_ratio"})
"""What SGLang's benchmark writes, whose result is otherwise alike."""
_DEPLOYMENT = (
    "max_num_seqs",
    "max_num_batched_tokens",
    "tensor_parallel_size",
    "max_model_len",
    "num_gpu_blocks",
)
_LOAD = ("request_rate", "burstiness", "max_concurrency", "duration", "num_prompts")


def detect(path: Path) -> bool:
    """Whether a file is a result of ``vllm bench serve``."""
    keys = keys_of(path)
    if not keys & _OWN_KEYS or keys & SGLANG_KEYS:
        return False
    if {"request_throughput", "model_id"} <= keys:
        return True
    # Keys may stand behind the arrays, where somebody has sorted them.
    return _holds(path, (b'"request_throughput"', b'"model_id"'))


def _holds(path: Path, needles: tuple[bytes, ...]) -> bool:
    """Whether all of some strings stand somewhere in a file."""
    left, overlap = set(needles), b""
    try:
        with open_bytes(path, LONGEST) as stream:
            while left and (data := stream.read(BUFFER)):
                left -= {one for one in left if one in overlap + data}
                overlap = data[-max(map(len, needles)) :]
    except (OSError, InputError):
        return False
    return not left


def selections(path: Path) -> list[str]:
    """Names of the runs that one file holds (``--append-result``)."""
    return [name_run(number) for number in range(runs(path))]


def read(path: Path, selection: str | None = None) -> Trace:
    """Read a run; ``selection`` names one of a file to which several were appended.

    Raises
    ------
    InputError
        Naming file, request and field of what cannot be used.
    """
    names = selections(path)
    place = choose(path, names, selection, "runs (--append-result)")
    record = read_run(path, place, len(names) > 1)
    meta = {**_described(path, record), "name": f"{name_of(path)}#{names[place]}" if len(names) > 1 else name_of(path)}
    if is_summary(record):
        return summary_trace(record, meta)
    chat = "chat" in str(record.get("backend") or record.get("endpoint_type") or "")
    command = "`vllm bench serve` with --save-result --save-detailed"
    rows = request_rows(record, command=command, chat=chat, optional=STARTS)
    starts = record.get("start_times") is not None
    origin = min(row["sent"] for row in rows) if starts else None
    columns = request_columns(rows, origin)
    nominal = {"nominal_arrival": "reconstructed: sent, less the wait for one of max_concurrency places"}
    return Trace(
        requests_table(columns, len(rows)),
        {
            **meta,
            "clock": {
                "kind": RUN_CLOCK if starts else REQUEST_CLOCK,
                "origin": origin or 0.0,
                "note": "the client's performance counter",
            },
            # Every version sends a test request before it measures.
            "warmed_up": True,
            "columns": {
                "arrival": "measured: when the client sent it" if starts else "unknown: the file has no start_times",
                **(nominal if columns["nominal_arrival"] is not None else {}),
                **dict.fromkeys(MEASURED, "measured"),
            },
            "notes": request_notes(rows),
        },
    )


def _described(path: Path, record: Record) -> dict[str, Any]:
    """What the file says besides its requests."""
    load = {key: record.get(key) for key in _LOAD}
    return {
        "source": {"format": FORMAT, "files": file_facts([path])},
        "model": record.text("model_id"),
        "hardware": record.text("hardware"),
        "engine": {
            "name": "vllm",
            "version": record.text("vllm_version") or record.text("engine_version"),
            "arguments": {key: record.get(key) for key in _DEPLOYMENT if record.get(key) is not None},
        },
        "vantage": "client",
        "load": {key: value for key, value in load.items() if _plain(value)},
    }


def _plain(value: Any) -> bool:
    """Whether a value can stand in ``meta``: text, or a number that JSON has."""
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
