"""Requests as a client's benchmark tool saw them, and the trace that they make.

A tool's file differs from another's in names, units and clocks, not in what a client can see: when a request was sent,
when chunks came, how many tokens went in and out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from profiles.errors import InputError, found
from replay.readers.fields import MOST_SECONDS, Record, as_seconds, as_text
from replay.trace import REQUEST_CLOCK, RUN_CLOCK, Floats, Trace, file_facts, requests_table

MOST_NANOSECONDS = 2**63


@dataclass(slots=True)
class ClientRequest:
    """One request.

    Parameters
    ----------
    id : str
    prompt, output : int, optional
        Tokens that the file states; an output of which more chunks were received is their number.
    status : {"ok", "failed", "unfinished"}
    error : str, optional
    sent : float, optional
        Seconds on the file's clock; None in a file that does not say when requests were sent.
    nominal : float, optional
        When the workload wanted it sent, on the same clock.
    times : array, optional
        Seconds from its sending to each chunk with content, ascending.
    first, last : float, optional
        The same for the first and last chunk, where the others are not known.
    cached : int, optional
        Prompt tokens that the server found in its prefix cache.
    """

    id: str
    prompt: int | None
    output: int | None
    status: str = "ok"
    error: str | None = None
    sent: float | None = None
    nominal: float | None = None
    times: Floats | None = None
    first: float | None = None
    last: float | None = None
    cached: int | None = None


def client_trace(
    path: Path,
    requests: Sequence[ClientRequest],
    meta: Mapping[str, Any],
    *,
    clock: str,
    base: float = 0.0,
    origins: Mapping[str, str],
    notes: Sequence[str] = (),
    files: Sequence[Path] = (),
    format: str,
) -> Trace:
    """Return the trace of one run.

    Requests stand in the order in which they were sent. One that is ``ok`` and has neither output nor stamps of tokens
    is ``silent``.

    Parameters
    ----------
    path : Path
        The file that holds the requests.
    requests : sequence of ClientRequest
    meta : mapping
        What the file says besides: ``model``, ``engine``, ``load``, ...
    clock : str
        What the send times were read from.
    base : float
        Seconds on that clock from which the send times count.
    origins : mapping
        Of columns that are not plainly measured.
    notes : sequence of str
    files : sequence of Path
        Further files that were read.
    format : str
        The reader's name.

    Raises
    ------
    InputError
        If there are no requests, or only some say when they were sent.
    """
    if not requests:
        raise InputError("holds no requests", file=path)
    sent = [one.sent for one in requests if one.sent is not None]
    if sent and len(sent) < len(requests):
        missing = next(one for one in requests if one.sent is None)
        raise InputError("is not said to have been sent, others are", file=path, row=f"request {found(missing.id)}")
    origin = min(sent, default=0.0)
    if sent:
        requests = sorted(requests, key=lambda one: one.sent or 0.0)
    counts: dict[str, int] = {}
    columns: dict[str, Any] = {}
    for one in requests:
        for name, value in _row(one, origin if sent else None, counts).items():
            columns.setdefault(name, []).append(value)
    kind = RUN_CLOCK if sent else REQUEST_CLOCK
    unknown = {} if sent else {"arrival": "unknown: the file does not say when requests were sent"}
    columns["token_times"] = list_column(columns["token_times"])
    return Trace(
        requests_table(columns, len(requests)),
        {
            "name": name_of(path),
            "source": {"format": format, "files": file_facts([path, *files])},
            "model": None,
            "hardware": None,
            "engine": {"name": None, "version": None, "arguments": {}},
            "vantage": "client",
            "warmed_up": None,
            **meta,
            "clock": {"kind": kind, "origin": base + origin if sent else 0.0, "note": clock},
            "columns": {**unknown, **origins},
            "notes": [*notes, *(_SAID[key].format(count) for key, count in counts.items() if key in _SAID)],
        },
    )


_SAID = {
    "silent": "{} requests ended without content or error; they are replayed as prefills of one output token and have "
    "no latency to compare",
    "recounted": "the output length said is less than the chunks received in {} requests: chunks are taken",
    "coalesced": "{} requests received several tokens in one chunk: token_times are chunks",
}


def _row(one: ClientRequest, origin: float | None, counts: dict[str, int]) -> dict[str, Any]:
    status, output = one.status, one.output
    times = one.times if status == "ok" and one.times is not None and one.times.size else None
    first = one.first if times is None else float(times[0])
    last = one.last if times is None else float(times[-1])
    if status == "failed":
        output = first = last = None
    elif status == "unfinished":
        last = None
    elif not output and first is None:
        status, output, last = "silent", 1, None
        counts["silent"] = counts.get("silent", 0) + 1
    elif times is not None:
        if output is not None and output < len(times):
            counts["recounted"] = counts.get("recounted", 0) + 1
        output = max(output or 0, len(times))
        if output > len(times):
            counts["coalesced"] = counts.get("coalesced", 0) + 1
    begin = 0.0 if origin is None else (one.sent or 0.0) - origin
    return {
        "id": one.id,
        "status": status,
        "error": one.error,
        "nominal_arrival": None if one.nominal is None or origin is None else one.nominal - origin,
        "arrival": None if origin is None else begin,
        "first_token": None if first is None else begin + first,
        "last_token": None if last is None else begin + last,
        "token_times": None if times is None else times + begin,
        "prompt_tokens": one.prompt,
        "output_tokens": output,
        "cached_tokens": one.cached,
    }


def name_of(path: Path) -> str:
    """Return what a trace is called after its file: the name without its endings."""
    name = path.resolve()
    if name.is_dir():
        return name.name
    return Path(name.stem).stem if name.suffix in (".gz", ".zst") else name.stem


def name_run(number: int) -> str:
    """Return what one of several runs in a file is called (from 0)."""
    return f"run-{number + 1}"


def list_column(rows: Sequence[Floats | None]) -> pa.Array:
    """Return a column of lists, without a Python object for each value."""
    present = [row for row in rows if row is not None]
    ends = np.cumsum([0, *(0 if row is None else row.size for row in rows)])
    values = pa.array(np.concatenate(present) if present else np.empty(0), pa.float64())
    missing = pa.array([row is None for row in rows], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), values, mask=missing)


def as_times(values: list[Any], error: Callable[[str], InputError], unit: float = 1.0) -> Floats:
    """Check foreign values to be sensible times, and return them in seconds, shape (n,)."""
    if {type(value) for value in values} <= {float}:
        times: Floats = np.asarray(values, dtype=np.float64) * unit
        if np.all((times >= 0) & (times <= MOST_SECONDS)):
            return times
    return np.array([as_seconds(value, False, error, unit) for value in values], dtype=np.float64)


def choose(path: Path, names: Sequence[str], selection: str | None, what: str) -> int:
    """Return the place of the trace that is meant among those of one file.

    Raises
    ------
    InputError
        If there are several and none was named, or there is none of that name.
    """
    if selection is None and len(names) == 1:
        return 0
    if selection is None:
        choices = ", ".join(f"{path.name}#{name}" for name in names[:8]) + (", ..." if len(names) > 8 else "")
        raise InputError(f"holds {len(names)} {what}; name one: {choices}", file=path)
    if selection not in names:
        raise InputError(f"holds no {selection!r} among its {len(names)} {what}: {', '.join(names[:8])}", file=path)
    return list(names).index(selection)


def nanoseconds(record: Record, key: str) -> int:
    """Return a time stamp in whole nanoseconds, at least 0."""
    value = record.need(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MOST_NANOSECONDS:
        raise record.error(key, f"expected whole nanoseconds of at least 0, found {found(value)}")
    return value


def below(record: Record, key: str, *, optional: bool = False) -> Record:
    """Return the object that is a field of a record; an empty one where it may be absent and is."""
    value = record.get(key) if optional else record.need(key)
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise record.error(key, f"expected an object, found {found(value)}")
    return Record(value, record.file, record.row)


def listed(record: Record, key: str) -> list[Any]:
    """Return the array that is a field of a record, an empty one if it is absent."""
    value = record.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise record.error(key, f"expected an array, found {found(value)}")
    return value


def optional_tokens(record: Record, key: str) -> int | None:
    """Return a count of tokens, or None where it is absent."""
    return None if record.get(key) is None else record.tokens(key)


def message_of(record: Record, *keys: str) -> str:
    """Return what a request's error says: the first of the fields that is a text."""
    for key in keys:
        value = record.get(key)
        if isinstance(value, str) and value:
            return as_text(value, lambda message, key=key: record.error(key, message))[:1000]
    return "unknown error"
