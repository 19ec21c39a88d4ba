"""One module a format, found by content.

Each has ``FORMAT``, ``detect(path)``, ``read(path)`` and, where it reads a folder, ``REQUESTS_FILE`` in it. One whose
files hold several traces also has ``selections(path)``, and ``read`` takes one of them.
"""

from __future__ import annotations

from pathlib import Path

from profiles.errors import InputError
from replay.readers import batches_csv, canonical, llmservingsim_bench, splitwise, vllm_bench
from replay.trace import Trace, check_requests

READERS = (canonical, llmservingsim_bench, vllm_bench, batches_csv, splitwise)


def _with_origins(trace: Trace) -> Trace:
    """Say of every column whether it was measured."""
    said = trace.meta.get("columns") or {}
    origins = {
        name: said.get(name) or ("measured" if trace.has(name) else "unknown") for name in trace.requests.column_names
    }
    return trace.with_meta(columns=origins)


def read_trace(path: Path, selection: str | None = None) -> Trace:
    """Read a trace of any known format.

    Parameters
    ----------
    path : Path
    selection : str, optional
        Which of the traces that a file holds, for formats that have several in one.

    Raises
    ------
    InputError
        If there is no such file, no reader knows it, or it cannot be used.
    """
    if not path.exists():
        raise InputError("no such file or folder", file=path)
    if path.is_file() and not path.stat().st_size:
        raise InputError("is empty", file=path)
    try:
        for reader in READERS:
            if reader.detect(path):
                requests = path / reader.REQUESTS_FILE if path.is_dir() else path
                if selection is not None and reader is not splitwise:
                    raise InputError(f"holds one trace: #{selection} selects nothing", file=path)
                read = splitwise.read(path, selection) if reader is splitwise else reader.read(path)
                return check_requests(_with_origins(read), requests)
    except PermissionError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=path) from None
    known = ", ".join(reader.FORMAT for reader in READERS)
    raise InputError(f"is of no format that servecal reads ({known})", file=path)


def batch_files(folder: Path) -> list[Path]:
    """Files below a folder that hold offline batches, by path; none if the folder is a trace of its own."""
    if any(reader.detect(folder) for reader in READERS):
        return []
    return sorted(path for path in folder.rglob("*.csv") if batches_csv.detect(path))


def selections(path: Path) -> list[str]:
    """Names of the traces that one file holds; none if it is one trace."""
    return splitwise.selections(path) if splitwise.detect(path) else []
