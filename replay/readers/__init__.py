"""One module a format, found by content.

Each has ``FORMAT``, ``detect(path)``, ``read(path)`` and, where it reads a folder, ``REQUESTS_FILE`` in it. One whose
files hold several traces also has ``selections(path)``, and ``read`` takes one of them.
"""

from __future__ import annotations

from pathlib import Path

from profiles.errors import InputError
from replay.readers import (
    aiperf,
    azure,
    bailian,
    batches_csv,
    blis_trace,
    burstgpt,
    canonical,
    guidellm,
    inference_perf,
    llmperf,
    llmservingsim_bench,
    llmservingsim_sim,
    load_levels,
    mooncake,
    perf_analyzer,
    prometheus_range,
    prometheus_text,
    recording,
    sglang_bench,
    sglang_log,
    sharegpt,
    splitwise,
    timed_trace,
    vidur,
    vllm_bench,
    vllm_log,
    vllm_otlp,
    vllm_vcr,
)
from replay.readers.opening import HEAD, open_bytes
from replay.trace import Trace, check_requests

WORKLOADS = (azure, burstgpt, mooncake, vidur, sharegpt, bailian, timed_trace)
"""Readers of arrivals and lengths without latencies."""
READERS = (
    canonical,
    llmservingsim_bench,
    vllm_bench,
    batches_csv,
    splitwise,
    load_levels,
    # Clients' benchmark tools, and another simulator.
    sglang_bench,
    aiperf,
    guidellm,
    inference_perf,
    perf_analyzer,
    llmperf,
    llmservingsim_sim,
    # What engines and servers write.
    recording,
    blis_trace,
    vllm_vcr,
    vllm_otlp,
    vllm_log,
    sglang_log,
    prometheus_text,
    prometheus_range,
    *WORKLOADS,
)
WITH_SELECTIONS = (
    splitwise,
    load_levels,
    vllm_bench,
    sglang_bench,
    guidellm,
    perf_analyzer,
    recording,
    sharegpt,
)
"""Readers of files that hold several traces."""


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
                for several in WITH_SELECTIONS:
                    if reader is several:
                        return check_requests(_with_origins(several.read(path, selection)), requests)
                if selection is not None:
                    raise InputError(f"holds one trace: #{selection} selects nothing", file=path)
                return check_requests(_with_origins(reader.read(path)), requests)
        if path.is_file():
            # One that is damaged, or may not be read, shows no reader anything: say that instead.
            with open_bytes(path) as stream:
                stream.read(HEAD)
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
    return next((one.selections(path) for one in WITH_SELECTIONS if path.is_file() and one.detect(path)), [])


def levels_of(path: Path) -> list[str]:
    """Names of the load levels in a table of them, all of which a fit takes; none if it is something else."""
    return load_levels.selections(path) if path.is_file() and load_levels.detect(path) else []
