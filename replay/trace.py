"""The Trace: one run of a serving engine, measured or predicted, in one form.

Two traces of the same requests are all that a comparison needs. Stamps are seconds on one clock, null where
the source did not measure. Durations are derived from them, never stored beside them.
"""

from __future__ import annotations

import hashlib
import json
import math
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
import pyarrow.compute as pc
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
        ("batch", pa.int32()),
        ("client_sent", pa.float64()),
        ("client_first_token", pa.float64()),
        ("client_last_token", pa.float64()),
        ("client_token_times", pa.list_(pa.float64())),
        ("session", pa.string()),
    ]
)
"""One row a request. ``status``: ``ok`` (served to the end), ``failed`` (the source says so), ``unfinished``
(no last token), ``silent`` (served, but the client saw no token). ``nominal_arrival`` is when the workload
wanted it sent, ``arrival`` when the engine's front end got it. ``token_times`` are output tokens or chunks as
the source saw them, the first one included. ``block_hashes`` are chained: each stands for a block and all
before it. ``batch`` is the row of ``batches`` with which it was handed over in one call. ``client_*`` are what the
client saw of a run whose other stamps are the engine's, on the same clock (``replay.joining``). ``session`` is the
conversation that it is a turn of."""

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

BATCHES = pa.schema(
    [
        ("start", pa.float64()),
        ("makespan", pa.float64()),
        ("prompt_seconds", pa.float64()),
        ("token_seconds", pa.float64()),
        ("average_power", pa.float64()),
        ("peak_power", pa.float64()),
    ]
)
"""One row a call that handed over requests together to an idle engine: when it began, how long it lasted, the
time until all prompts were computed, the mean time of an iteration after that, watts (or shares of the source's)."""

ITERATION_COUNTS = pa.schema(
    [
        ("iteration", pa.int64()),
        ("engine", pa.int32()),
        ("start", pa.float64()),
        ("duration", pa.float64()),
        ("logged", pa.float64()),
        ("context_requests", pa.int64()),
        ("context_tokens", pa.int64()),
        ("generation_requests", pa.int64()),
        ("generation_tokens", pa.int64()),
        ("running", pa.int64()),
        ("waiting", pa.int64()),
        ("preempted", pa.int64()),
        ("free_blocks", pa.int64()),
        ("kv_usage", pa.float64()),
    ]
)
"""One row an engine iteration of which the source told counts, and not which requests: its number (-1 if not told) and
engine (data parallel rank), when it began, how long it took, when that was logged; requests and tokens scheduled for
prompts (context) and for output (generation); gauges after it. A schedule cannot be told from them: ``iterations`` are
those with their requests."""

_TABLES = ("requests", "iterations", "timeline", "batches", "iteration_counts")
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
        ``block_hash`` (``block_size``); ``vantage`` (``engine``, ``client``, or ``call``: around an offline call);
        ``warmed_up`` (whether requests were served before the first one here); ``aggregates`` and ``workload`` where
        only statistics of a load level are known (``replay.load_level``); ``facts_only`` (a server's log or metrics:
        true, and no requests; what else they say is in ``facts``); ``notes``.
    iterations, timeline, batches, iteration_counts : pyarrow.Table, optional
        Columns of ``ITERATIONS``, ``TIMELINE``, ``BATCHES`` and ``ITERATION_COUNTS``.
    """

    requests: pa.Table
    meta: dict[str, Any]
    iterations: pa.Table | None = None
    timeline: pa.Table | None = None
    batches: pa.Table | None = None
    iteration_counts: pa.Table | None = None
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
        return str((self.meta.get("clock") or {}).get("kind", RUN_CLOCK))

    def column(self, name: str) -> Floats:
        """One numeric column as floats, NaN where null."""
        if name not in self._columns:
            values = self.requests.column(name).cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
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

    def of_batches(self, name: str) -> Floats:
        """One column of ``batches`` as floats, NaN where null; empty without batches."""
        if self.batches is None:
            return np.empty(0)
        return np.asarray(self.batches.column(name).to_numpy(zero_copy_only=False), dtype=np.float64)

    def rows_of_batches(self) -> list[list[int]]:
        """Rows of the requests of each batch, in the order handed over."""
        found: list[list[int]] = [[] for _ in range(self.batches.num_rows if self.batches is not None else 0)]
        for row, batch in enumerate(self.requests.column("batch").to_pylist()):
            if batch is not None:
                found[batch].append(row)
        return found

    def with_meta(self, **changes: Any) -> Trace:
        """Return the same trace with entries of ``meta`` replaced."""
        return replace(self, meta={**self.meta, **changes}, _columns=self._columns)

    def digest(self) -> str:
        """Sha256 over the requests and the engine's description: equal for equal traces."""
        hasher = hashlib.sha256()
        for column in ("id", "arrival", "first_token", "last_token", "prompt_tokens", "output_tokens"):
            hasher.update(json.dumps(self.requests.column(column).to_pylist()).encode())
        if self.batches is not None:
            for column in ("start", "makespan", "prompt_seconds", "token_seconds"):
                hasher.update(json.dumps(self.batches.column(column).to_pylist()).encode())
            hasher.update(json.dumps(self.requests.column("batch").to_pylist()).encode())
        described = {key: self.meta.get(key) for key in ("model", "hardware", "engine")}
        described |= {key: self.meta[key] for key in ("aggregates", "workload") if key in self.meta}
        hasher.update(json.dumps(described, sort_keys=True, default=str).encode())
        return hasher.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write the canonical form: a folder with ``trace.json`` and Parquet tables; whole or not at all.

        Raises
        ------
        InputError
            If the folder exists and holds something else than a trace, or cannot be written.
        """
        target = Path(folder).resolve()
        try:
            _refuse_foreign(target, folder)
            text = json.dumps({"schema": SCHEMA, **self.meta}, indent=1, sort_keys=True, allow_nan=False)
            target.parent.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            try:
                self._write(scratch / "new", text)
                _swap(scratch / "new", target, scratch / "old")
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
        except OSError as error:
            raise InputError(f"cannot be written: {error.strerror}", file=folder) from None
        except ValueError:
            raise InputError("cannot be written: meta holds a number that is not finite", file=folder) from None

    def _write(self, folder: Path, meta: str) -> None:
        folder.mkdir()
        for stem in _TABLES:
            table = getattr(self, stem)
            if table is not None:
                pq.write_table(table, folder / f"{stem}.parquet", compression="zstd")
        (folder / "trace.json").write_text(meta + "\n", encoding="utf-8")


def _refuse_foreign(target: Path, called: str | Path) -> None:
    """Refuse to replace what ``Trace.save`` did not write."""
    if not target.exists():
        return
    own = {"trace.json", *(f"{stem}.parquet" for stem in _TABLES)} if target.is_dir() else set()
    foreign = sorted(path.name for path in target.iterdir() if path.name not in own) if own else [target.name]
    if foreign:
        raise InputError(f"holds {found(foreign[0])}, which is no part of a trace; choose another folder", file=called)


def _swap(new: Path, target: Path, old: Path) -> None:
    """Put a folder in the place of another, or leave that as it was."""
    if not target.exists():
        new.replace(target)
        return
    target.replace(old)
    try:
        new.replace(target)
    except BaseException:
        old.replace(target)
        raise


def is_canonical(folder: Path) -> bool:
    """Whether a folder looks like one that ``Trace.save`` wrote."""
    return (folder / "trace.json").is_file() and (folder / "requests.parquet").is_file()


def requests_table(columns: Mapping[str, Sequence[Any] | Floats | pa.Array], length: int) -> pa.Table:
    """Build the ``requests`` table; columns not given are null, NaN becomes null."""
    arrays = []
    for column in REQUESTS:
        values = columns.get(column.name)
        if values is None:
            arrays.append(_nothing(length, column.type))
        elif isinstance(values, pa.Array | pa.ChunkedArray):
            arrays.append(values.cast(column.type))
        else:
            listed = values.tolist() if isinstance(values, np.ndarray) else values
            if pa.types.is_floating(column.type):
                listed = [None if one is None or math.isnan(one) else one for one in listed]
            arrays.append(pa.array(listed, type=column.type))
    return pa.table(arrays, schema=REQUESTS)


def table_of(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Build a table of a schema from rows; what a row lacks is null.

    Raises
    ------
    ValueError
        If a whole number does not fit its column (``pyarrow.ArrowInvalid``, ``OverflowError``).
    """
    return pa.table([pa.array([row.get(one.name) for row in rows], type=one.type) for one in schema], schema=schema)


def _nothing(length: int, kind: pa.DataType) -> pa.Array:
    """A column of nulls whose memory nobody writes: in a long trace most columns are empty."""
    if pa.types.is_nested(kind) or not length:
        return pa.nulls(length, kind)
    zeros = pa.py_buffer(bytes(8 * (length + 1)))
    return pa.Array.from_buffers(kind, length, [zeros, zeros, *[zeros] * (kind.num_buffers - 2)], null_count=length)


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
        places = table.schema.get_all_field_indices(column.name)
        if len(places) > 1:
            raise InputError(f"stands {len(places)} times", file=file, field=column.name)
        if not places:
            if column.name in needed:
                have = ", ".join(found(one)[1:-1] for one in table.column_names)
                raise InputError(f"is missing; there are {have}", file=file, field=column.name)
            arrays.append(pa.nulls(table.num_rows, column.type))
            continue
        values = table.column(places[0])
        try:
            if _family(values.type) not in (_family(column.type), "null"):
                raise pa.ArrowInvalid
            cast = values.cast(column.type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise InputError(f"expected {column.type}, found {values.type}", file=file, field=column.name) from None
        arrays.append(pc.if_else(pc.is_nan(cast), None, cast) if pa.types.is_floating(column.type) else cast)
    return pa.table(arrays, schema=schema)


def _family(kind: pa.DataType) -> str:
    """What may become what: Arrow would also turn text and truth values into numbers."""
    if pa.types.is_dictionary(kind):
        return _family(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return f"list of {_family(kind.value_type)}"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return "number"
    return "string" if pa.types.is_large_string(kind) else str(kind)


def check_requests(trace: Trace, file: Path) -> Trace:
    """Refuse a trace whose requests contradict themselves; every reader ends here.

    Raises
    ------
    InputError
        Naming row and field: an id twice, a length that is not positive, a time that is not finite, a stamp
        before the one that precedes it.
    """
    if not len(trace) and trace.meta.get("facts_only") is not True:
        raise InputError("holds no requests", file=file)
    _check_ids(trace, file)
    status = trace.requests.column("status")
    served = np.asarray(pc.fill_null(pc.equal(status, "ok"), False).to_numpy(zero_copy_only=False), dtype=np.bool_)
    for name in ("prompt_tokens", "output_tokens"):
        values = trace.column(name)
        _refuse(trace, file, name, served & ~(values >= 1), "expected at least 1 token")
        _refuse(trace, file, name, values > 1e9, "expected fewer than 1e9 tokens")
    stamps = ("arrival", "queued", "scheduled", "first_token", "last_token")
    for name in filter(
        trace.has, ("nominal_arrival", *stamps, "client_sent", "client_first_token", "client_last_token")
    ):
        values = trace.column(name)
        _refuse(trace, file, name, np.isinf(values) | (np.abs(values) > 1e12), "expected a time in seconds")
    for before, after in pairwise(stamps[1:]):
        if not (trace.has(before) and trace.has(after)):
            continue
        late = trace.column(after) < trace.column(before)
        _refuse(trace, file, after, served & late, f"lies before {before}")
    if trace.has("first_token"):
        first = trace.column("first_token")
        _refuse(trace, file, "first_token", served & (first < trace.start), "lies before the arrival")
    _check_lists(trace, file)
    _check_batches(trace, file)
    return trace


def _check_ids(trace: Trace, file: Path) -> None:
    """Refuse an id that is missing or stands twice."""
    column = trace.requests.column("id")
    _refuse(trace, file, "id", pc.is_null(column).to_numpy(zero_copy_only=False), "is missing")
    if _all_differ(column):
        return
    seen: dict[str, int] = {}
    for row, one in enumerate(trace.ids):
        if one in seen:
            raise InputError(
                f"{one!r} stands in rows {seen[one] + 1} and {row + 1}; ids must be unique",
                file=file,
                row=f"request {row + 1}",
                field="id",
            )
        seen[one] = row


def _all_differ(ids: pa.ChunkedArray) -> bool:
    """Whether no id stands twice; of ids that are numbers, told without a copy of each."""
    try:
        numbers = np.sort(ids.cast(pa.int64()).to_numpy())
    except pa.ArrowInvalid:
        return bool(pc.count_distinct(ids).as_py() == len(ids))
    return bool((np.diff(numbers) > 0).all()) or bool(pc.count_distinct(ids).as_py() == len(ids))


def _check_batches(trace: Trace, file: Path) -> None:
    """Refuse batches without requests, requests of batches that are not there, times that are none."""
    if trace.batches is None and not trace.has("batch"):
        return
    count = trace.batches.num_rows if trace.batches is not None else 0
    batch = trace.column("batch")
    _refuse(trace, file, "batch", (batch < 0) | (batch >= count), f"expected a row of the {count} batches")
    if trace.batches is None:
        return
    empty = np.setdiff1d(np.arange(count), batch[~np.isnan(batch)])
    if empty.size:
        raise InputError(f"batch {int(empty[0]) + 1} has no requests", file=file, field="batch")
    for name in BATCHES.names:
        values = trace.of_batches(name)
        bad = np.isinf(values) | (np.abs(values) > 1e12) | ((values <= 0) if name != "start" else False)
        if bad.any():
            row = int(np.argmax(bad))
            raise InputError(
                f"expected a finite number{'' if name == 'start' else ' above 0'}; found {found(float(values[row]))}",
                file=file,
                row=f"batch {row + 1}",
                field=name,
            )


def _check_lists(trace: Trace, file: Path) -> None:
    """The same for what stands in lists: null or odd values, token times that run back."""
    rows = np.arange(len(trace))
    seconds = "expected times in seconds"
    expected = {"token_times": seconds, "client_token_times": seconds, "block_hashes": "expected hashes of at least 0"}
    for name, why in expected.items():
        column = trace.requests.column(name)
        if not trace.has(name) or (name == "block_hashes" and _all_hashes(column)):
            continue
        values = pc.list_flatten(column).cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        owner = pc.list_parent_indices(column).to_numpy()
        odd = ~(values >= 0) if name == "block_hashes" else ~(np.abs(values) <= 1e12)
        _refuse(trace, file, name, np.isin(rows, owner[odd]), why)
        if name != "block_hashes":
            back = (np.diff(values) < 0) & (owner[1:] == owner[:-1])
            _refuse(trace, file, name, np.isin(rows, owner[1:][back]), "run back")


def _all_hashes(column: pa.ChunkedArray) -> bool:
    """Whether all hashes are there and at least 0; seen without a copy of them, which may be most of a trace."""
    for chunk in column.chunks:
        flat = pc.list_flatten(chunk)
        if flat.null_count or (len(flat) and pc.min(flat).as_py() < 0):
            return False
    return True


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
