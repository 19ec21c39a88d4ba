"""Offline batches with exact lengths and one time each: a CSV of ``LLM.generate`` calls.

One row a call: ``status``, ``input_lens`` and ``output_lens`` (JSON lists), ``batch_size`` (the engine's
``max_num_seqs``) and ``batch_e2e_ms``, the time around the call. Format: swjeong9/LLMServingSim @cc591e8,
``studies/gpu_baseline``. A JSON of the same name (or beginning with it) beside the file describes the engine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from profiles.errors import InputError, found
from replay.readers.fields import Record, as_tokens, parse_json, read_object, read_rows
from replay.readers.opening import head
from replay.trace import BATCHES, Trace, file_facts, requests_table

FORMAT = "batches-csv"
REQUESTS_FILE = ""
COLUMNS = ("status", "batch_size", "input_lens", "output_lens", "batch_e2e_ms")
SERVED = "OK"
_DESCRIBED = {
    "max_model_len": "max_model_len",
    "tp_degree": "tensor_parallel_size",
    "enable_chunked_prefill": "enable_chunked_prefill",
    "enable_prefix_caching": "enable_prefix_caching",
}


def detect(path: Path) -> bool:
    """Whether a file is of this format: its first line names the columns."""
    if not path.is_file():
        return False
    names = head(path).partition(b"\n")[0].decode("utf-8-sig", "replace").strip().split(",")
    return {"input_lens", "output_lens", "batch_e2e_ms"} <= set(names)


def read(path: Path) -> Trace:
    """Read the calls of one file, which were made one after the other.

    A call that the source skipped or that failed is a batch without a time, its requests ``failed``.

    Raises
    ------
    InputError
        Naming file, line and field of what cannot be used.
    """
    columns: dict[str, list[Any]] = {name: [] for name in _REQUEST_COLUMNS}
    starts: list[float] = []
    makespans: list[float | None] = []
    sizes: set[int] = set()
    clock = 0.0
    for batch, record in enumerate(read_rows(path, COLUMNS)):
        makespan = _makespan(record)
        sizes.add(_number(record, "batch_size"))
        prompts, outputs = (_lengths(record, name) for name in ("input_lens", "output_lens"))
        if len(prompts) != len(outputs):
            raise record.error("output_lens", f"has {len(outputs)} lengths, input_lens has {len(prompts)}")
        count = len(prompts)
        values: dict[str, list[Any]] = {
            "id": [f"{batch}-{place}" for place in range(count)],
            "status": ["failed" if makespan is None else "ok"] * count,
            "error": [None if makespan is not None else record.get("error") or record.get("status")] * count,
            "arrival": [clock] * count,
            "prompt_tokens": prompts,
            "output_tokens": outputs,
            "batch": [batch] * count,
        }
        for name, listed in values.items():
            columns[name] += listed
        starts.append(clock)
        makespans.append(makespan)
        clock += makespan or 0.0
    if not starts:
        raise InputError("holds no calls", file=path)
    if len(sizes) > 1:
        raise InputError(
            f"holds calls of batch_size {', '.join(map(str, sorted(sizes)))}; expected one: it is max_num_seqs",
            file=path,
            field="batch_size",
        )
    described, files = _described(path)
    table = {"start": starts, "makespan": makespans}
    arrays = [pa.array(table.get(one.name, [None] * len(starts)), one.type) for one in BATCHES]
    arguments = {**described.pop("arguments"), "max_num_seqs": sizes.pop()}
    return Trace(
        requests_table(columns, len(columns["id"])),
        {
            "name": path.resolve().stem,
            "source": {"format": FORMAT, "files": file_facts([path, *files])},
            **described,
            "engine": {"name": "vllm", "version": None, "arguments": arguments},
            "clock": {"kind": "run", "note": "calls one after the other; when each began was not measured"},
            "vantage": "call",
            "warmed_up": True,
            "columns": {
                "arrival": "assumed: the start of its call, calls one after the other",
                "prompt_tokens": "measured",
                "output_tokens": "measured",
                "batch": "measured",
            },
            "notes": _notes(makespans),
        },
        batches=pa.table(arrays, schema=BATCHES),
    )


_REQUEST_COLUMNS = ("id", "status", "error", "arrival", "prompt_tokens", "output_tokens", "batch")


def _makespan(record: Record) -> float | None:
    """Seconds of a call that was served, None of one that was not."""
    status = str(record.need("status"))
    if status != SERVED:
        return None
    text = record.get("batch_e2e_ms")
    try:
        seconds = float(text) * 1e-3
    except (TypeError, ValueError):
        seconds = np.nan
    if not 0 < seconds < 1e9:
        raise record.error("batch_e2e_ms", f"expected milliseconds above 0, found {found(text)}")
    return seconds


def _number(record: Record, name: str) -> int:
    text = str(record.need(name))
    value = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0
    if not value:
        raise record.error(name, f"expected a whole number above 0, found {found(text)}")
    return value


def _lengths(record: Record, name: str) -> list[int]:
    values = parse_json(str(record.need(name)), record.file, int(record.row or 1))
    if not isinstance(values, list) or not values:
        raise record.error(name, f"expected a list of lengths in tokens, found {found(values)}")
    return [as_tokens(one, 1, lambda message: record.error(name, message)) for one in values]


def _described(path: Path) -> tuple[dict[str, Any], list[Path]]:
    """What the JSON beside the file says of model, device and engine, and that JSON."""
    beside = sorted(one for one in path.parent.glob("*.json") if one.stem == path.stem or _stamped(one, path))
    if len(beside) != 1:
        return {"model": None, "hardware": None, "arguments": {}}, []
    record = read_object(beside[0])
    arguments = {ours: record.get(theirs) for theirs, ours in _DESCRIBED.items() if record.get(theirs) is not None}
    return {"model": record.text("model"), "hardware": record.text("hardware"), "arguments": arguments}, beside


def _stamped(one: Path, path: Path) -> bool:
    """Whether a file's name is that of another and a time stamp."""
    rest = one.stem.removeprefix(f"{path.stem}_")
    return rest != one.stem and rest.replace("_", "").isdecimal()


def _notes(makespans: list[float | None]) -> list[str]:
    unserved = sum(one is None for one in makespans)
    return [f"{unserved} of {len(makespans)} calls were not served, and are left out"] if unserved else []
