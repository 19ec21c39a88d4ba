"""Timed traces as ``vllm bench serve --dataset-name timed_trace`` takes them.

JSON lines of ``timestamp`` (seconds, its ``--timed-trace-sec-multiplier`` being 1), ``input_length``, ``output_length``
and ``hash_ids`` of blocks of 16 tokens (its ``--timed-trace-chunk-hash-size``), of which a file says neither: the block
size is taken from the numbers of ids. Rows without ``hash_ids`` (GuideLLM's ``trace_synthetic``) share nothing. Files
of whole milliseconds and blocks of 512 tokens are Mooncake's. Seen in vLLM 0.24 and later.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from profiles.errors import InputError
from replay.readers import mooncake
from replay.readers.opening import head
from replay.readers.streaming import Column, gathered, json_blocks, objects_of
from replay.readers.workloads import from_first, prompt_hashes, workload_trace
from replay.trace import Trace

FORMAT = "vllm-timed-trace"
REQUESTS_FILE = ""
NEEDED = ("timestamp", "input_length", "output_length")
BLOCK_SIZES = (16, 512, 8, 32, 64, 128, 256, 1024)
"""In the order in which they are tried: vLLM's default, Mooncake's, and other powers of 2."""


def detect(path: Path) -> bool:
    """Whether a file is of this format."""
    rows = objects_of(head(path)) if path.is_file() else []
    known = all(set(NEEDED) <= set(row) and "chat_id" not in row for row in rows)
    return bool(rows) and known and not mooncake.detect(path)


def read(path: Path) -> Trace:
    """Read a workload.

    Raises
    ------
    InputError
        Naming file, line and field of what cannot be used, or if no block size fits the ids.
    """
    first = objects_of(head(path))
    hashed = all("hash_ids" in row for row in first)
    wanted = [Column("timestamp", "seconds"), Column("input_length", "tokens"), Column("output_length", "tokens")]
    found, _ = gathered(json_blocks(path, [*wanted, Column("hash_ids", "ids")] if hashed else wanted))
    arrival, origin = from_first(found["timestamp"])
    columns = {
        "nominal_arrival": arrival,
        "arrival": arrival,
        "prompt_tokens": found["input_length"],
        "output_tokens": found["output_length"],
    }
    origins = {
        "nominal_arrival": "measured: the workload's",
        "arrival": "assumed: sent when the workload says",
        "prompt_tokens": "measured",
        "output_tokens": "measured",
    }
    block_size = _block_size(first, path) if hashed else None
    notes = ["timestamps are taken as seconds, vLLM's default for such a file"]
    if block_size is not None:
        columns["block_hashes"] = prompt_hashes(found["hash_ids"], found["input_length"], block_size, path)
        origins["block_hashes"] = f"measured: hash_ids, chained; blocks of {block_size} tokens fit their number"
    clock = {"origin": origin, "note": "seconds from the first request"}
    return workload_trace(path, FORMAT, columns, origins, clock=clock, block_size=block_size, notes=notes)


def _block_size(rows: list[dict[str, Any]], path: Path) -> int:
    for size in BLOCK_SIZES:
        if all(mooncake.looks_like(row, size) for row in rows):
            return size
    raise InputError(
        f"no block size of {', '.join(map(str, sorted(BLOCK_SIZES)))} tokens fits the number of ids of its first rows",
        file=path,
        field="hash_ids",
    )
