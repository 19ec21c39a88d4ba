"""Mooncake's traces: JSON lines of ``timestamp`` (ms), ``input_length``, ``output_length`` and ``hash_ids``.

An id stands for a block of 512 prompt tokens, the last one of a row for what is left of it; equal ids are equal
contents only after an equal prefix. Dialects add ``session_id``. Format: kvcache-ai/Mooncake @3b5a594,
``FAST25-release/traces``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from replay.readers.opening import head
from replay.readers.streaming import Column, gathered, json_blocks, objects_of
from replay.readers.workloads import from_first, prompt_hashes, workload_trace
from replay.trace import Trace

FORMAT = "mooncake-jsonl"
REQUESTS_FILE = ""
BLOCK_SIZE = 512
FIELDS = ("timestamp", "input_length", "output_length", "hash_ids")


def looks_like(row: dict[str, Any], block_size: int) -> bool:
    """Whether a row has a prompt's ids, as many as blocks of that size that it takes."""
    tokens, ids = row.get("input_length"), row.get("hash_ids")
    return type(tokens) is int and isinstance(ids, list) and len(ids) == -(-tokens // block_size)


def detect(path: Path) -> bool:
    """Whether a file is of this format: whole milliseconds, and blocks of 512 tokens in its first rows."""
    rows = objects_of(head(path)) if path.is_file() else []
    known = all(set(FIELDS) <= set(row) and "chat_id" not in row for row in rows)
    times = all(type(row.get("timestamp")) is int for row in rows)
    return bool(rows) and known and times and all(looks_like(row, BLOCK_SIZE) for row in rows)


def read(path: Path) -> Trace:
    """Read a workload.

    Raises
    ------
    InputError
        Naming file, line and field of what cannot be used.
    """
    wanted = [
        Column("timestamp", "seconds", unit=1e-3),
        Column("input_length", "tokens"),
        Column("output_length", "tokens"),
        Column("hash_ids", "ids"),
    ]
    with_sessions = any("session_id" in row for row in objects_of(head(path)))
    if with_sessions:
        wanted.append(Column("session_id", "text", optional=True))
    found, _ = gathered(json_blocks(path, wanted))
    arrival, origin = from_first(found["timestamp"])
    columns = {
        "arrival": arrival,
        "prompt_tokens": found["input_length"],
        "output_tokens": found["output_length"],
        "block_hashes": prompt_hashes(found["hash_ids"], found["input_length"], BLOCK_SIZE, path),
    }
    if with_sessions:
        columns["session"] = found["session_id"]
    return workload_trace(
        path,
        FORMAT,
        columns,
        {
            "arrival": "measured: by the service, in whole milliseconds",
            "prompt_tokens": "measured",
            "output_tokens": "measured",
            "block_hashes": "measured: hash_ids, chained",
        },
        clock={"origin": origin, "note": "seconds from the first request"},
        block_size=BLOCK_SIZE,
        notes=[f"prompts share whole blocks of {BLOCK_SIZE} tokens; what they share of a partial one is left out"],
    )
