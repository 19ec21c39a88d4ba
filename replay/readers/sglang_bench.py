"""SGLang's ``python -m sglang.bench_serving --output-file F [--output-details]``: one line a run, appended.

Arrays of the requests come with ``--output-details``; else it is a load level. It keeps neither send times nor request
latencies. Through SGLang's own ``/generate`` the gap before a chunk of k tokens is written as k equal parts.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from profiles.errors import InputError, found
from replay.readers.bench_arrays import MEASURED, request_columns, request_notes, request_rows
from replay.readers.client_requests import choose, name_of, name_run
from replay.readers.fields import Record, as_tokens
from replay.readers.json_records import keys_of, read_run, runs
from replay.readers.vllm_bench import SGLANG_KEYS
from replay.readers.vllm_bench_summary import is_summary, summary_trace
from replay.trace import REQUEST_CLOCK, Trace, file_facts, requests_table

FORMAT = "sglang-bench"
REQUESTS_FILE = ""
OWN_ENDPOINT = ("sglang", "sglang-native", "srt")
_LOAD = ("request_rate", "max_concurrency", "duration", "completed", "dataset_name", "random_range_ratio")


def detect(path: Path) -> bool:
    """Whether a file is a result of SGLang's ``bench_serving``."""
    keys = keys_of(path)
    return "backend" in keys and "request_rate" in keys and bool(keys & SGLANG_KEYS) and "model_id" not in keys


def selections(path: Path) -> list[str]:
    """Names of the runs that one file holds."""
    return [name_run(number) for number in range(runs(path))]


def read(path: Path, selection: str | None = None) -> Trace:
    """Read a run; ``selection`` names one of several.

    Raises
    ------
    InputError
        Naming file, line, request and field of what cannot be used.
    """
    names = selections(path)
    place = choose(path, names, selection, "runs")
    record = read_run(path, place, len(names) > 1)
    meta = {**_described(path, record), "name": f"{name_of(path)}#{names[place]}" if len(names) > 1 else name_of(path)}
    if is_summary(record):
        return summary_trace(record, meta, "--output-details")
    backend = record.text("backend") or ""
    rows = request_rows(record, command="`bench_serving` with --output-details", chat="chat" in backend)
    columns = request_columns(rows, None)
    columns["cached_tokens"] = _cached(record, len(rows))
    notes = request_notes(rows)
    if backend in OWN_ENDPOINT:
        notes.append(
            "SGLang's client splits the gap before a chunk of several tokens evenly among them: gaps that are equal to "
            "the last digit were one chunk"
        )
    return Trace(
        requests_table(columns, len(rows)),
        {
            **meta,
            "clock": {"kind": REQUEST_CLOCK, "origin": 0.0, "note": "the client's performance counter"},
            # A test request goes out before the run is measured.
            "warmed_up": True,
            "columns": {"arrival": "unknown: the file has no send times", **dict.fromkeys(MEASURED, "measured")},
            "notes": notes,
        },
    )


def _cached(record: Record, count: int) -> list[int | None] | None:
    """Cached prompt tokens of each request (``--cache-report``)."""
    values = record.get("cached_tokens")
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != count:
        raise record.error("cached_tokens", f"expected an array of {count} entries, found {found(values)}")
    kept: list[int | None] = []
    for index, value in enumerate(values):

        def error(message: str, index: int = index) -> InputError:
            return InputError(message, file=record.file, row=f"request {index}", field="cached_tokens")

        kept.append(None if value is None else as_tokens(value, 0, error))
    return kept


def _described(path: Path, record: Record) -> dict[str, Any]:
    server = record.get("server_info")
    info = Record(server if isinstance(server, dict) else {}, path, record.row)
    load = {key: record.get(key) for key in _LOAD}
    plain = {key: value for key, value in load.items() if isinstance(value, str | int | float)}
    return {
        "source": {"format": FORMAT, "files": file_facts([path])},
        "model": info.text("model_path") or info.text("served_model_name"),
        "hardware": None,
        "engine": {
            "name": "sglang" if "sglang" in str(record.get("backend")) else None,
            "version": info.text("version"),
            "arguments": {},
        },
        "vantage": "client",
        "load": {key: value for key, value in plain.items() if not isinstance(value, float) or math.isfinite(value)},
    }
