"""The Trace: one run of a serving engine, measured or predicted, in one form.

Two traces of the same requests are all that a comparison needs. Stamps are seconds on one clock, null where
the source did not measure. Durations are derived from them, never stored beside them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from profiles.errors import InputError, found

Floats = npt.NDArray[np.float64]

SCHEMA = "servecal.trace/1"

REQUESTS = pa.schema(
    [
        ("id", pa.string()),
        ("status", pa.string()),
        ("error", pa.string()),
        ("nominal_arrival", pa.float64()),
        ("arrival", pa.float64()),
        ("queued", pa.float64()),
        ("scheduled", pa.float64()),
        ("first_token", pa.float64()),
        ("last_token", pa.float64()),
        ("token_times", pa.list_(pa.float64())),
        ("priority", pa.int32()),
        ("prompt_tokens", pa.int64()),
        ("output_tokens", pa.int64()),
        ("cached_tokens", pa.int64()),
        ("preemptions", pa.int32()),
        ("block_hashes", pa.list_(pa.int64())),
    ]
)
"""One row a request. ``status``: ``ok`` (served to the end), ``failed`` (the source says so), ``unfinished``
(no last token), ``silent`` (served, but the client saw no token). ``nominal_arrival`` is when the workload
wanted it sent, ``arrival`` when the engine's front end got it. ``token_times`` are output tokens or chunks as
the source saw them, the first one included. ``block_hashes`` are chained: each stands for a block and all
before it."""

ITERATIONS = pa.schema(
    [
        ("start", pa.float64()),
        ("duration", pa.float64()),
        ("scheduled_at", pa.float64()),
        ("requests", pa.list_(pa.int32())),
        ("computed", pa.list_(pa.int32())),
        ("scheduled", pa.list_(pa.int32())),
        ("preempted", pa.list_(pa.int32())),
        ("running", pa.int32()),
        ("waiting", pa.int32()),
        ("free_blocks", pa.int32()),
    ]
)
"""One row an executed engine iteration: when it began and how long it took, when it was scheduled; rows of
``requests`` (in schedule order), tokens computed before and scheduled in it; requests preempted by that
schedule call; counts right after it."""

TIMELINE = pa.schema(
    [
        ("time", pa.float64()),
        ("running", pa.float64()),
        ("waiting", pa.float64()),
        ("kv_usage", pa.float64()),
        ("prompt_throughput", pa.float64()),
        ("generation_throughput", pa.float64()),
    ]
)
"""Samples of engine gauges: requests, share of KV blocks in use (0 to 1), tokens per second."""

STATUSES = ("ok", "failed", "unfinished", "silent")
RUN_CLOCK, REQUEST_CLOCK = "run", "request"


@dataclass(frozen=True)
class Trace:
    """One run.

    Parameters
    ----------
    requests : pyarrow.Table
        Columns of ``REQUESTS``.
    meta : dict
        ``name``; ``source`` (format, files with sha256); ``model``; ``hardware``; ``engine`` (``name``,
        ``version``, ``arguments`` by vLLM's names); ``clock`` (``kind`` ``"run"``: stamps share one clock;
        ``"request"``: stamps count from each request's own sending, and arrivals are unknown; ``note`` how it
        was aligned); ``columns`` (per column ``measured``, ``reconstructed``, ``assumed`` or ``unknown``);
        ``block_hash`` (``block_size``); ``vantage`` (``engine`` or ``client``); ``warmed_up`` (whether requests
        were served before the first one here); ``notes``.
    iterations, timeline : pyarrow.Table, optional
        Columns of ``ITERATIONS`` and ``TIMELINE``.
    """

    requests: pa.Table
    meta: dict[str, Any]
    iterations: pa.Table | None = None
    timeline: pa.Table | None = None
    _columns: dict[str, Floats] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return int(self.requests.num_rows)

    @property
    def name(self) -> str:
        """What the trace is called in reports."""
        return str(self.meta.get("name", "trace"))

    @property
    def ids(self) -> list[str]:
        """Request ids, in row order."""
        return list(self.requests.column("id").to_pylist())

    @property
    def statuses(self) -> npt.NDArray[np.str_]:
        """Status per request."""
        return np.asarray(self.requests.column("status").to_pylist(), dtype=np.str_)

    @property
    def clock(self) -> str:
        """``"run"`` or ``"request"``."""
        return str(self.meta.get("clock", {}).get("kind", RUN_CLOCK))

    def column(self, name: str) -> Floats:
        """One numeric column as floats, NaN where null."""
        if name not in self._columns:
            values = self.requests.column(name).cast(pa.float64()).to_numpy(zero_copy_only=False)
            self._columns[name] = np.asarray(values, dtype=np.float64)
        return self._columns[name]

    def lists(self, name: str) -> list[list[Any] | None]:
        """One list column."""
        return list(self.requests.column(name).to_pylist())

    def has(self, name: str) -> bool:
        """Whether any request has a value in that column."""
        column = self.requests.column(name)
        return bool(column.null_count < len(column))

    @property
    def start(self) -> Floats:
        """What a request's latencies count from: its arrival, or 0 on a per-request clock."""
        return np.zeros(len(self)) if self.clock == REQUEST_CLOCK else self.column("arrival")

    def latency(self, metric: str, anchor: str = "arrival") -> Floats:
        """Seconds per request, NaN where not measured.

        Parameters
        ----------
        metric : {"ttft", "tpot", "e2e", "queue_time"}
            First token less start; mean gap of the tokens after the first (needs two); last token less
            start; scheduled less start.
        anchor : {"arrival", "queued"}
            What "start" is: the arrival at the front end, or the engine's own queue stamp.
        """
        begin = self.start if anchor == "arrival" else self.column("queued")
        first, last = self.column("first_token"), self.column("last_token")
        if metric == "ttft":
            return first - begin
        if metric == "e2e":
            return last - begin
        if metric == "queue_time":
            return self.column("scheduled") - begin
        if metric == "tpot":
            gaps = self.column("output_tokens") - 1
            return np.where(gaps > 0, (last - first) / np.maximum(gaps, 1), np.nan)
        raise ValueError(f"latency {metric!r}")

    def with_meta(self, **changes: Any) -> Trace:
        """Return the same trace with entries of ``meta`` replaced."""
        return replace(self, meta={**self.meta, **changes}, _columns=self._columns)

    def digest(self) -> str:
        """Sha256 over the requests and the engine's description: equal for equal traces."""
        hasher = hashlib.sha256()
        for column in ("id", "arrival", "first_token", "last_token", "prompt_tokens", "output_tokens"):
            hasher.update(json.dumps(self.requests.column(column).to_pylist()).encode())
        described = {key: self.meta.get(key) for key in ("model", "hardware", "engine")}
        hasher.update(json.dumps(described, sort_keys=True, default=str).encode())
        return hasher.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write the canonical form: a folder with ``trace.json`` and Parquet tables; whole or not at all.

        Raises
        ------
        InputError
            If the folder exists and holds something else than a trace, or cannot be written.
        """
        target = Path(folder)
        if target.exists() and not is_canonical(target) and (target.is_file() or any(target.iterdir())):
            raise InputError("exists and is no trace of servecal; choose another folder", file=target)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        except OSError as error:
            raise InputError(f"cannot be written: {error.strerror}", file=target) from None
        try:
            for stem in ("requests", "iterations", "timeline"):
                table = getattr(self, stem)
                if table is not None:
                    pq.write_table(table, scratch / f"{stem}.parquet", compression="zstd")
            text = json.dumps({"schema": SCHEMA, **self.meta}, indent=1, sort_keys=True, allow_nan=False)
            (scratch / "trace.json").write_text(text + "\n", encoding="utf-8")
            scratch.chmod(0o777 & ~_umask())
            if target.exists():
                shutil.rmtree(target)
            scratch.replace(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def is_canonical(folder: Path) -> bool:
    """Whether a folder looks like one that ``Trace.save`` wrote."""
    return (folder / "trace.json").is_file() and (folder / "requests.parquet").is_file()


def requests_table(columns: Mapping[str, Sequence[Any] | Floats | pa.Array], length: int) -> pa.Table:
    """Build the ``requests`` table; columns not given are null, NaN becomes null."""
    arrays = []
    for column in REQUESTS:
        values = columns.get(column.name)
        if values is None:
            arrays.append(pa.nulls(length, column.type))
        elif isinstance(values, pa.Array):
            arrays.append(values.cast(column.type))
        else:
            listed = values.tolist() if isinstance(values, np.ndarray) else values
            if pa.types.is_floating(column.type):
                listed = [None if one is None or math.isnan(one) else one for one in listed]
            arrays.append(pa.array(listed, type=column.type))
    return pa.table(arrays, schema=REQUESTS)


def check_table(table: pa.Table, schema: pa.Schema, file: Path) -> pa.Table:
    """Return a table with exactly the schema's columns, null where it lacks optional ones.

    Raises
    ------
    InputError
        If a column has a type that cannot become the schema's, or ``id``, a length or ``start`` is missing.
    """
    needed = {"id", "prompt_tokens", "output_tokens", "status"} if schema is REQUESTS else {schema[0].name}
    arrays = []
    for column in schema:
        if column.name not in table.column_names:
            if column.name in needed:
                raise InputError(f"is missing; there are {', '.join(table.column_names)}", file=file, field=column.name)
            arrays.append(pa.nulls(table.num_rows, column.type))
            continue
        try:
            arrays.append(table.column(column.name).cast(column.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            have = table.column(column.name).type
            raise InputError(f"expected {column.type}, found {have}", file=file, field=column.name) from None
    return pa.table(arrays, schema=schema)


def check_requests(trace: Trace, file: Path) -> Trace:
    """Refuse a trace whose requests contradict themselves; every reader ends here.

    Raises
    ------
    InputError
        Naming row and field: an id twice, a length that is not positive, a time that is not finite, a stamp
        before the one that precedes it.
    """
    if not len(trace):
        raise InputError("holds no requests", file=file)
    ids = trace.ids
    seen: dict[str, int] = {}
    for row, one in enumerate(ids):
        if one in seen:
            raise InputError(
                f"{one!r} stands in rows {seen[one] + 1} and {row + 1}; ids must be unique",
                file=file,
                row=f"request {row + 1}",
                field="id",
            )
        seen[one] = row
    statuses = trace.statuses
    served = statuses == "ok"
    for name in ("prompt_tokens", "output_tokens"):
        values = trace.column(name)
        _refuse(trace, file, name, served & ~(values >= 1), "expected at least 1 token")
        _refuse(trace, file, name, values > 1e9, "expected fewer than 1e9 tokens")
    stamps = ("arrival", "queued", "scheduled", "first_token", "last_token")
    for name in ("nominal_arrival", *stamps):
        values = trace.column(name)
        _refuse(trace, file, name, np.isinf(values) | (np.abs(values) > 1e12), "expected a time in seconds")
    for before, after in pairwise(stamps[1:]):
        late = trace.column(after) < trace.column(before)
        _refuse(trace, file, after, served & late, f"lies before {before}")
    first = trace.column("first_token")
    _refuse(trace, file, "first_token", served & (first < trace.start), "lies before the arrival")
    return trace


def _refuse(trace: Trace, file: Path, name: str, bad: npt.NDArray[np.bool_], why: str) -> None:
    if bad.any():
        row = int(np.argmax(bad))
        value = trace.requests.column(name)[row].as_py()
        raise InputError(
            f"{why}; found {found(value)} (request {trace.ids[row]!r})",
            file=file,
            row=f"request {row + 1}",
            field=name,
        )


def file_facts(paths: Sequence[Path]) -> list[dict[str, str]]:
    """Name and sha256 of each source file, for ``meta["source"]["files"]``."""
    facts = []
    for path in paths:
        with path.open("rb") as stream:
            facts.append({"name": path.name, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()})
    return facts


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
