"""What the readers of workloads share: traces of arrivals and lengths, of which nobody measured a latency.

The rows stay in the order of the file. Arrivals count from the earliest one; ``meta.clock.origin`` is where that stood
on the source's own clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from profiles.errors import InputError
from replay.block_hashes import chained_ids
from replay.trace import REQUEST_CLOCK, RUN_CLOCK, Floats, Trace, file_facts, requests_table

STATUS = "assumed: a request to be served"
NO_TOKENS = "the source counts no tokens of its prompt or output"


def workload_trace(
    path: Path,
    form: str,
    columns: Mapping[str, Any],
    origins: Mapping[str, str],
    *,
    clock: Mapping[str, Any] | None,
    block_size: int | None = None,
    notes: Sequence[str] = (),
) -> Trace:
    """Return a trace of requests that were, or shall be, sent.

    Parameters
    ----------
    path : Path
        The file that was read.
    form : str
        ``FORMAT`` of its reader.
    columns : mapping of str to array
        Of ``REQUESTS``: ``prompt_tokens`` and ``output_tokens`` (shape (n,)), and what else there is. Requests without
        prompt or output tokens are ``failed``; ids are row numbers where none are given.
    origins : mapping of str to str
        For ``meta.columns``.
    clock : mapping, optional
        What to say of the arrivals' clock; None where there are no arrivals.
    block_size : int, optional
        Tokens of a block of ``block_hashes``.
    notes : sequence of str

    Raises
    ------
    InputError
        If there are no requests.
    """
    prompt, output = columns["prompt_tokens"], columns["output_tokens"]
    count = len(prompt)
    if not count:
        raise InputError("holds no requests", file=path)
    empty = (prompt < 1) | (output < 1)
    arrays = {name: _array(values) for name, values in columns.items()}
    arrays.setdefault("id", pa.array(np.arange(count)).cast(pa.string()))
    arrays["status"] = _choice(empty, "failed", "ok")
    notes = list(notes)
    if empty.any():
        arrays["error"] = _choice(empty, NO_TOKENS, None)
        notes.append(f"{int(empty.sum()):,} of {count:,} requests are failed: {NO_TOKENS}")
    said = {"id": "assumed: row numbers"} if "id" not in columns else {}
    kind = {"kind": RUN_CLOCK, **clock} if clock is not None else {"kind": REQUEST_CLOCK, "note": "no arrivals"}
    return Trace(
        requests_table(arrays, count),
        {
            "name": _stem(path),
            "source": {"format": form, "files": file_facts([path])},
            "model": None,
            "hardware": None,
            "engine": {"name": None, "version": None, "arguments": {}},
            "clock": kind,
            "vantage": None,
            "columns": {"status": STATUS, **said, **origins},
            "block_hash": {"block_size": block_size} if "block_hashes" in columns and block_size else None,
            "notes": ["a workload: arrivals and lengths without measured latencies", *notes],
        },
    )


def from_first(seconds: Floats) -> tuple[Floats, float]:
    """Return arrivals that count from the earliest one, and where that stood."""
    origin = float(seconds.min(initial=np.inf)) if len(seconds) else 0.0
    return seconds - origin, origin


def prompt_hashes(ids: pa.ChunkedArray, prompt_tokens: npt.NDArray[np.int64], block_size: int, path: Path) -> Any:
    """Return chained hashes of the full blocks of prompts, from ids that stand for blocks of ``block_size`` tokens.

    Parameters
    ----------
    ids : pyarrow.ChunkedArray of lists, shape (n,)
        The last one of a row may stand for a block that is not full: it is left out.
    prompt_tokens : array, shape (n,)
    block_size : int
    path : Path

    Returns
    -------
    pyarrow.ChunkedArray

    Raises
    ------
    InputError
        If a prompt has other than ``ceil(prompt_tokens / block_size)`` ids.
    """
    chunks, begin = [], 0
    for chunk in ids.chunks:
        tokens = prompt_tokens[begin : begin + len(chunk)]
        lengths = np.diff(chunk.offsets.to_numpy())
        wrong = lengths != -(-tokens // block_size)
        if wrong.any():
            row = int(np.argmax(wrong))
            raise InputError(
                f"has {lengths[row]} ids for {tokens[row]} prompt tokens; expected {-(-tokens[row] // block_size)} of "
                f"{block_size} tokens each",
                file=path,
                row=f"request {begin + row + 1}",
                field="hash_ids",
            )
        chunks.append(chained_ids(chunk, tokens // block_size))
        begin += len(chunk)
    return pa.chunked_array(chunks, pa.list_(pa.int64()))


def _array(values: Any) -> Any:
    return pa.array(values) if isinstance(values, np.ndarray) else values


def _choice(where: npt.NDArray[np.bool_], yes: str, no: str | None) -> pa.Array:
    """Text by a condition, without an object a row."""
    return pa.DictionaryArray.from_arrays(pa.array(where.astype(np.int8)), pa.array([no, yes])).cast(pa.string())


def _stem(path: Path) -> str:
    """The file's name without what says its form: ``trace.jsonl.gz`` is ``trace``."""
    name = path.resolve().name
    for suffix in (".gz", ".zst", ".zstd", ".jsonl", ".json", ".csv", ".txt"):
        name = name.removesuffix(suffix)
    return name or path.name
