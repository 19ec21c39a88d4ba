"""servecal's own form: a folder with ``trace.json``, ``requests.parquet`` and optional tables."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from profiles.errors import InputError, found
from replay.readers.fields import read_object
from replay.trace import ITERATIONS, REQUESTS, SCHEMA, STATUSES, TIMELINE, Trace, check_table, is_canonical

FORMAT = "servecal"
REQUESTS_FILE = "requests.parquet"


def detect(path: Path) -> bool:
    """Whether a folder, or its ``trace.json``, is of this form."""
    return is_canonical(path if path.is_dir() else path.parent) and (path.is_dir() or path.name == "trace.json")


def read(path: Path) -> Trace:
    """Read a trace.

    Raises
    ------
    InputError
        Naming file and field of what cannot be used.
    """
    folder = path if path.is_dir() else path.parent
    record = read_object(folder / "trace.json")
    schema = record.get("schema")
    if schema != SCHEMA:
        raise record.error("schema", f"expected {SCHEMA!r}, found {found(schema)}")
    meta = {key: value for key, value in record.values.items() if key != "schema"}
    tables = {}
    for stem, form in (("requests", REQUESTS), ("iterations", ITERATIONS), ("timeline", TIMELINE)):
        file = folder / f"{stem}.parquet"
        if file.is_file():
            tables[stem] = check_table(_parquet(file), form, file)
    requests = tables["requests"]
    for row, status in enumerate(requests.column("status").to_pylist(), 1):
        if status not in STATUSES:
            raise InputError(
                f"expected one of {', '.join(STATUSES)}, found {found(status)}",
                file=folder / REQUESTS_FILE,
                row=f"request {row}",
                field="status",
            )
    return Trace(requests, meta, tables.get("iterations"), tables.get("timeline"))


def _parquet(file: Path) -> pa.Table:
    try:
        return pq.read_table(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"is no Parquet: {str(error).splitlines()[0]}", file=file) from None
