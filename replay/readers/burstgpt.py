"""BurstGPT: a CSV of requests to ChatGPT and GPT-4 over months, one second of resolution.

Six columns in the first version (``Timestamp, Model, Request tokens, Response tokens, Total tokens, Log Type``), eight
later (``Session ID`` and ``Elapsed time``). Read by its header: positions differ. Format: HPMLL/BurstGPT @5d93d82.

Not read: ``Elapsed time``, whole seconds of whole requests on unknown hardware.
"""

from __future__ import annotations

from pathlib import Path

from replay.readers.opening import head
from replay.readers.streaming import Column, csv_blocks, gathered, header_of
from replay.readers.workloads import from_first, workload_trace
from replay.trace import Trace

FORMAT = "burstgpt-csv"
REQUESTS_FILE = ""
COLUMNS = (Column("Timestamp", "seconds"), Column("Request tokens", "tokens"), Column("Response tokens", "tokens"))
SESSION = Column("Session ID", "text", optional=True)


def detect(path: Path) -> bool:
    """Whether a file is of this format: its first line names the columns."""
    return path.is_file() and {one.name for one in COLUMNS} <= set(header_of(head(path)))


def read(path: Path) -> Trace:
    """Read a workload; requests without response tokens failed.

    Raises
    ------
    InputError
        Naming file, line and field of what cannot be used.
    """
    with_sessions = SESSION.name in header_of(head(path))
    found, count = gathered(csv_blocks(path, (*COLUMNS, SESSION) if with_sessions else COLUMNS))
    columns, origin = {}, 0.0
    if count:
        columns["arrival"], origin = from_first(found["Timestamp"])
    if with_sessions and count:
        columns["session"] = found[SESSION.name]
    return workload_trace(
        path,
        FORMAT,
        {
            **columns,
            "prompt_tokens": found.get("Request tokens", ()),
            "output_tokens": found.get("Response tokens", ()),
        },
        {
            "arrival": "measured: by the service, in whole seconds",
            "prompt_tokens": "measured",
            "output_tokens": "measured",
        },
        clock={"origin": origin, "note": "seconds from the first request; requests of one second arrive together"},
        notes=["requests went to several models (column Model), which one deployment is taken to serve"],
    )
