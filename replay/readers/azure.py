"""Azure's LLM inference traces: a CSV of ``TIMESTAMP``, ``ContextTokens`` and ``GeneratedTokens``.

2023 (CRLF, seven fractional digits), 2024 (a UTC offset, the fraction sometimes missing) and 2025 (``NumImages``
besides, which no simulation here takes into account). Format: Azure/AzurePublicDataset @b469a11.
"""

from __future__ import annotations

import datetime
from pathlib import Path

from replay.readers.opening import head
from replay.readers.streaming import NS, Column, csv_blocks, gathered, header_of
from replay.readers.workloads import workload_trace
from replay.trace import Trace

FORMAT = "azure-csv"
REQUESTS_FILE = ""
COLUMNS = (Column("TIMESTAMP", "moment"), Column("ContextTokens", "tokens"), Column("GeneratedTokens", "tokens"))


def detect(path: Path) -> bool:
    """Whether a file is of this format: its first line names the columns."""
    return path.is_file() and {one.name for one in COLUMNS} <= set(header_of(head(path)))


def read(path: Path) -> Trace:
    """Read a workload.

    Raises
    ------
    InputError
        Naming file, line and field of what cannot be used.
    """
    found, count = gathered(csv_blocks(path, COLUMNS))
    columns, origin = {}, ""
    if count:
        moments = found["TIMESTAMP"]
        first = int(moments.min())
        day, ns = divmod(first, 86400 * NS)
        date = datetime.date(1970, 1, 1) + datetime.timedelta(days=day)
        seconds, fraction = divmod(ns, NS)
        origin = f"{date}T{datetime.timedelta(seconds=seconds)!s:0>8}.{fraction:09d}Z"
        columns["arrival"] = (moments - first) / NS
    images = "NumImages" in header_of(head(path))
    return workload_trace(
        path,
        FORMAT,
        {
            **columns,
            "prompt_tokens": found.get("ContextTokens", ()),
            "output_tokens": found.get("GeneratedTokens", ()),
        },
        {"arrival": "measured: by the service", "prompt_tokens": "measured", "output_tokens": "measured"},
        clock={"origin_utc": origin, "note": "seconds from the first request; TIMESTAMP is taken as UTC"},
        notes=["images of the requests are left out"] if images else [],
    )
