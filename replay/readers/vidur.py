"""Vidur's processed traces: a CSV of ``num_prefill_tokens``, ``num_decode_tokens`` and, if known, ``arrived_at``.

Frontier adds ``session_id`` and ``block_hash_ids`` (``11|22``). Vidur's own loader cuts prompts that are too long; here
they stay as they are. Format: microsoft/vidur, ``data/processed_traces``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from replay.readers.opening import head
from replay.readers.streaming import Column, csv_blocks, gathered, header_of
from replay.readers.workloads import from_first, workload_trace
from replay.trace import Trace

FORMAT = "vidur-csv"
REQUESTS_FILE = ""
LENGTHS = (Column("num_prefill_tokens", "tokens"), Column("num_decode_tokens", "tokens"))
ARRIVAL = Column("arrived_at", "seconds")
SESSION = Column("session_id", "text", optional=True)


def detect(path: Path) -> bool:
    """Whether a file is of this format: its first line names the columns, and no latency of a simulation."""
    names = set(header_of(head(path))) if path.is_file() else set()
    simulated = any(name.startswith(("request_e2e", "prefill_e2e", "request_execution")) for name in names)
    return {one.name for one in LENGTHS} <= names and not simulated


def read(path: Path) -> Trace:
    """Read a workload.

    Raises
    ------
    InputError
        Naming file, line and field of what cannot be used.
    """
    names = header_of(head(path))
    wanted = [*LENGTHS, *(one for one in (ARRIVAL, SESSION) if one.name in names)]
    found, _ = gathered(csv_blocks(path, wanted))
    columns: dict[str, Any] = {
        "prompt_tokens": found.get(LENGTHS[0].name, ()),
        "output_tokens": found.get(LENGTHS[1].name, ()),
    }
    origins = {"prompt_tokens": "measured", "output_tokens": "measured"}
    notes = []
    clock = None
    if ARRIVAL.name in found:
        columns["arrival"], origin = from_first(found[ARRIVAL.name])
        clock = {"origin": origin, "note": "seconds from the first request"}
        origins["arrival"] = "measured: by the service that Vidur took the trace from"
    if SESSION.name in found:
        columns["session"] = found[SESSION.name]
    if "block_hash_ids" in names:
        notes.append("block_hash_ids are left out: the file does not say how many tokens a block has")
    return workload_trace(path, FORMAT, columns, origins, clock=clock, notes=notes)
