"""Recordings of a vLLM engine by servecal's own recorder (``replay.recorder``).

A file is JSON lines in gzip members, one file an engine core, and may end anywhere: what was flushed before the
server was killed is read. A folder with the files of one run's engine cores (data parallel ranks) is one trace of
requests; iterations belong to one engine core, and are read with ``FOLDER#dp0`` and so on.
"""

from __future__ import annotations

import re
import zlib
from bisect import bisect
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from profiles.errors import InputError, found
from replay.readers.fields import MOST_SECONDS, MOST_TOKENS, parse_json
from replay.readers.opening import HEAD, MOST_BYTES, compression_of, head, open_bytes
from replay.trace import ITERATIONS, TIMELINE, Trace, file_facts, requests_table

FORMAT = "servecal-recording"
REQUESTS_FILE = ""
SCHEMA = "servecal.recording/1"
MOST_FILES = 1024
"""Files of a folder that are looked at."""
SAMPLE_SECONDS = 1.0
"""Between two samples of the timeline that is made of the iterations."""
CLOCKS_AGREE = 0.001
"""Seconds by which the two clocks may drift apart in a run without a word of it."""
SUFFIX = re.compile(r"-[0-9a-f]{8}$")
"""What newer vLLM appends to a request's id inside the engine."""
_LONGEST_LINE = 2**28
_INFLATED = 2**20

_Time = Annotated[float, Field(ge=-MOST_SECONDS, le=MOST_SECONDS, allow_inf_nan=False)]
_Handle = Annotated[int, Field(ge=0, le=2**31 - 1)]
_Hash = Annotated[int, Field(ge=0, le=2**63 - 1)]
_Tokens = Annotated[int, Field(ge=0, le=MOST_TOKENS)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


class _Clock(_Part):
    monotonic: _Time
    wall: float = Field(ge=0, le=1e11, allow_inf_nan=False)


class _Engine(_Part):
    name: str = "vllm"
    version: str | None = None
    arguments: dict[str, Any] = {}


class _Header(_Part):
    format: str
    run: str
    rank: int = Field(0, ge=0, le=2**20)
    pid: int = 0
    engine: _Engine
    loop: str = "synchronous"
    model: str | None = None
    shape: dict[str, Any] | None = Field(None, alias="model_config")
    machine: dict[str, Any] = {}
    clock: _Clock
    block_size: int = Field(ge=1, le=2**20)


class _Request(_Part):
    request: _Handle
    id: str
    arrival: float = Field(ge=0, le=1e11, allow_inf_nan=False)
    queued: _Time
    prompt_tokens: _Tokens
    max_tokens: int | None = None
    priority: int = Field(0, ge=-(2**31), le=2**31 - 1)
    block_hashes: list[_Hash] | None = None


class _Step(_Part):
    scheduled_at: _Time
    end: _Time
    requests: list[_Handle]
    computed: list[Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]]
    scheduled: list[Annotated[int, Field(ge=0, le=2**31 - 1)]]
    sampled: list[Annotated[int, Field(ge=0, le=2**20)]]
    preempted: list[_Handle] = []
    output_hashes: list[Annotated[tuple[_Handle, list[_Hash]], Field(strict=False)]] = []
    finished: list[Annotated[tuple[_Handle, str], Field(strict=False)]] = []
    running: int = Field(ge=0, le=2**31 - 1)
    waiting: int = Field(ge=0, le=2**31 - 1)
    free_blocks: int | None = Field(None, ge=0, le=2**31 - 1)
    clock: _Clock | None = None


class _Aborted(_Part):
    aborted: list[_Handle]
    status: str = "FINISHED_ABORTED"
    at: _Time


class _Reset(_Part):
    prefix_cache_reset: bool
    at: _Time


class _Idle(_Part):
    """Preemptions by a call that then scheduled nothing."""

    preempted_idle: list[_Handle]
    at: _Time


class _Dropped(_Part):
    dropped: int = Field(ge=0)


class _Failed(_Part):
    failed: str


class _End(_Part):
    end: _Time
    idle_calls: int = 0
    noting_seconds: float = 0.0
    clock: _Clock | None = None


_KINDS: tuple[tuple[str, TypeAdapter[Any]], ...] = tuple(
    (key, TypeAdapter(kind))
    for key, kind in (
        ("scheduled_at", _Step),
        ("request", _Request),
        ("aborted", _Aborted),
        ("prefix_cache_reset", _Reset),
        ("preempted_idle", _Idle),
        ("dropped", _Dropped),
        ("failed", _Failed),
        ("end", _End),
    )
)
"""Records by the key that only they have; others, of later versions, are passed over."""
_HEADER = TypeAdapter(_Header)


@dataclass
class _Recording:
    """What one file holds."""

    file: Path
    header: _Header
    requests: dict[int, _Request] = field(default_factory=dict)
    steps: list[_Step] = field(default_factory=list)
    outcomes: dict[int, str] = field(default_factory=dict)
    resets: list[_Reset] = field(default_factory=list)
    clocks: list[_Clock] = field(default_factory=list)
    idle_preemptions: list[int] = field(default_factory=list)
    dropped: int = 0
    failures: list[str] = field(default_factory=list)
    end: _End | None = None
    cut: bool = False

    @property
    def emptied(self) -> list[float]:
        """When the prefix cache was emptied."""
        return [one.at for one in self.resets if one.prefix_cache_reset]

    @property
    def name(self) -> str:
        """What selects it in its folder."""
        return f"dp{self.header.rank}"


def detect(path: Path) -> bool:
    """Whether a file is a recording, or a folder holds one."""
    if path.is_dir():
        return bool(_files(path))
    return path.is_file() and _is_recording(path)


def _is_recording(path: Path) -> bool:
    if compression_of(path) == "gzip":
        # Cut files too: what `head` reads fails at the cut.
        with path.open("rb") as stream:
            start = _inflated(stream.read(HEAD))
    else:
        start = head(path, 4096)
    return start[:4096].lstrip().startswith(b'{"format":"' + SCHEMA.encode() + b'"')


def _inflated(data: bytes) -> bytes:
    try:
        return zlib.decompressobj(31).decompress(data, 4096)
    except zlib.error:
        return b""


def _files(folder: Path) -> list[Path]:
    try:
        inside = sorted(folder.iterdir())[:MOST_FILES]
        return [path for path in inside if path.is_file() and path.stat().st_size and _is_recording(path)]
    except OSError:
        return []


def selections(path: Path) -> list[str]:
    """Names of the engine cores whose recordings a folder holds."""
    return [name for name, _ in _named(path)] if path.is_dir() else []


def _named(folder: Path) -> list[tuple[str, Path]]:
    """Files of a folder with the names that select them: ``dp<rank>``, with the run before it where there are several.

    A name that would stand twice (a server restarted under one name) has the process id behind it.
    """
    headers = [(file, _header(file)) for file in _files(folder)]
    runs = {header.run for _, header in headers}
    names = [f"{header.run}/dp{header.rank}" if len(runs) > 1 else f"dp{header.rank}" for _, header in headers]
    unique = [
        name if names.count(name) == 1 else f"{name}-{header.pid}"
        for name, (_, header) in zip(names, headers, strict=True)
    ]
    return sorted(zip(unique, (file for file, _ in headers), strict=True))


def read(path: Path, selection: str | None = None) -> Trace:
    """Read a recording.

    Parameters
    ----------
    path : Path
        A file, or a folder of files.
    selection : str, optional
        The engine core of a folder, such as ``dp0``.

    Raises
    ------
    InputError
        Naming file, row and field of what cannot be used; if a folder holds several runs and none is selected.
    """
    if path.is_file():
        if selection is not None:
            raise InputError(f"holds one engine core: #{selection} selects nothing", file=path)
        return _trace([_load(path)], _plain_name(path))
    named = _named(path)
    names = ", ".join(name for name, _ in named)
    if selection is not None:
        chosen = [file for name, file in named if name == selection]
        if not chosen:
            raise InputError(f"holds no {selection!r}; it has {names}", file=path)
        return _trace([_load(chosen[0])], f"{path.resolve().name}#{selection}")
    recordings = [_load(file) for _, file in named]
    runs = {one.header.run for one in recordings}
    if len(runs) > 1 or len({one.header.rank for one in recordings}) < len(recordings):
        raise InputError(f"holds several runs; name one: {path.name}#... of {names}", file=path)
    return _trace(recordings, path.resolve().name)


def _plain_name(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".jsonl")


def _lines(path: Path) -> Iterator[tuple[int, bytes, bool]]:
    """Yield row, line and whether the file goes on; a last line without its end is left out.

    Raises
    ------
    InputError
        If the file is damaged before its end.
    """
    rest, row = b"", 0
    for data in _unpacked(path):
        if len(rest) > _LONGEST_LINE:
            raise InputError(f"has a line of more than {_LONGEST_LINE:,} bytes", file=path, row=row + 1)
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            row += 1
            if line.strip():
                yield row, line, True
    if rest.strip():
        yield row + 1, rest, False


def _unpacked(path: Path) -> Iterator[bytes]:
    """Yield what a file holds; gzip members one after the other, a last one that is cut as far as it goes."""
    if compression_of(path) != "gzip":
        with open_bytes(path) as stream:
            while data := stream.read(_INFLATED):
                yield data
        return
    left = MOST_BYTES
    with path.open("rb") as stream:
        data = stream.read(_INFLATED)
        member = zlib.decompressobj(31)
        while data or (data := stream.read(_INFLATED)):
            if member.eof:
                if not data.strip(b"\0"):  # What a file system may leave behind a crash.
                    data = b""
                    continue
                member = zlib.decompressobj(31)
            try:
                out = member.decompress(data, _INFLATED)
            except zlib.error as error:
                raise InputError(f"is damaged: {error} near byte {stream.tell() - len(data):,}", file=path) from None
            left -= len(out)
            if left < 0:
                raise InputError(f"unpacks to more than {MOST_BYTES:,} bytes", file=path)
            yield out
            data = member.unused_data if member.eof else member.unconsumed_tail


def _header(path: Path) -> _Header:
    for row, line, _ in _lines(path):
        header = _validated(_HEADER, _parsed(line, path, row), path, row)
        if header.format != SCHEMA:
            raise InputError(f"expected {SCHEMA!r}, found {found(header.format)}", file=path, row=row, field="format")
        return header  # type: ignore[no-any-return]
    raise InputError("is cut before the end of its first line", file=path)


def _parsed(line: bytes, path: Path, row: int) -> dict[str, Any]:
    try:
        value = parse_json(line.decode(), path, row, finite=True)
    except UnicodeDecodeError as error:
        raise InputError(f"is no UTF-8 text: {error.reason}", file=path, row=row) from None
    if not isinstance(value, dict):
        raise InputError(f"expected a JSON object, found {found(value)}", file=path, row=row)
    return value


def _validated(kind: TypeAdapter[Any], value: dict[str, Any], path: Path, row: int) -> Any:
    try:
        return kind.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = f"{first['msg'][0].lower()}{first['msg'][1:]}; found {found(first.get('input'))}"
        raise InputError(reason, file=path, row=row, field=where) from None


def _load(path: Path) -> _Recording:
    """Read one file."""
    recording = _Recording(path, _header(path))
    recording.clocks.append(recording.header.clock)
    for row, line, whole in _lines(path):
        if row == 1:
            continue
        if not whole:
            recording.cut = True
            break
        value = _parsed(line, path, row)
        for key, kind in _KINDS:
            if key in value:
                _take(recording, _validated(kind, value, path, row), path, row)
                break
    return recording


def _take(recording: _Recording, one: Any, path: Path, row: int) -> None:
    """Add a record to what is known."""
    if isinstance(one, _Step):
        lengths = {len(values) for values in (one.requests, one.computed, one.scheduled, one.sampled)}
        if len(lengths) > 1 or len(set(one.requests)) != len(one.requests):
            reason = "expected requests, computed, scheduled and sampled of one length, no request twice"
            raise InputError(reason, file=path, row=row)
        if one.end < one.scheduled_at:
            raise InputError(f"lies before scheduled_at; found {one.end}", file=path, row=row, field="end")
        recording.steps.append(one)
        recording.outcomes.update(one.finished)
    elif isinstance(one, _Request):
        if one.request in recording.requests:
            raise InputError(f"stands twice; found {one.request}", file=path, row=row, field="request")
        recording.requests[one.request] = one
    elif isinstance(one, _Aborted):
        for handle in one.aborted:
            recording.outcomes.setdefault(handle, one.status)
    elif isinstance(one, _Reset):
        recording.resets.append(one)
    elif isinstance(one, _Idle):
        recording.idle_preemptions += one.preempted_idle
    elif isinstance(one, _Dropped):
        recording.dropped = one.dropped
    elif isinstance(one, _Failed):
        recording.failures.append(one.failed)
    else:
        recording.end = one
    clock = getattr(one, "clock", None)
    if clock is not None:
        recording.clocks.append(clock)


@dataclass
class _Served:
    """What the iterations say of a request."""

    scheduled: float | None = None
    cached: int | None = None
    preemptions: int = 0
    token_times: list[float] = field(default_factory=list)
    output_hashes: list[int] = field(default_factory=list)


def _served(recording: _Recording) -> dict[int, _Served]:
    served: dict[int, _Served] = defaultdict(_Served)
    for step in recording.steps:
        for handle, computed, new in zip(step.requests, step.computed, step.sampled, strict=True):
            one = served[handle]
            if one.scheduled is None:
                one.scheduled, one.cached = step.scheduled_at, max(computed, 0)
            one.token_times.extend([step.end] * new)
        for handle, hashes in step.output_hashes:
            served[handle].output_hashes = hashes
        for handle in step.preempted:
            served[handle].preemptions += 1
    for handle in recording.idle_preemptions:
        served[handle].preemptions += 1
    return served


def _to_monotonic(recording: _Recording, wall: list[float], near: list[float]) -> np.ndarray[Any, Any]:
    """Put wall-clock stamps on the monotonic clock, by the readings of both that lie nearest in time."""
    at = np.array([one.monotonic for one in recording.clocks])
    ahead = np.array([one.wall for one in recording.clocks]) - at
    order = np.argsort(at, kind="stable")
    moved: np.ndarray[Any, Any] = np.asarray(wall) - np.interp(near, at[order], ahead[order])
    return moved


def _status(outcome: str | None, tokens: int) -> tuple[str, str | None]:
    if outcome is None:
        return "unfinished", None
    if outcome in ("stop", "length", "repetition"):
        return ("ok" if tokens else "silent"), None
    aborted = outcome in ("abort", "FINISHED_ABORTED")
    return "failed", "aborted" if aborted else outcome


def _trace(recordings: list[_Recording], name: str) -> Trace:
    """Bring recordings of one run into the canonical form; the requests in the order in which they were queued."""
    rows: list[dict[str, Any]] = []
    for place, recording in enumerate(recordings):
        rows.extend(_rows(recording, place))
    if not rows:
        raise InputError("holds no requests", file=recordings[0].file)
    rows.sort(key=lambda row: (row["queued"], row["place"], row["handle"]))
    origin = min(row["arrival"] for row in rows)
    for row in rows:
        for stamp in ("arrival", "queued", "scheduled", "first_token", "last_token"):
            row[stamp] = None if row[stamp] is None else _since(row[stamp], origin)
        row["token_times"] = [_since(one, origin) for one in row["token_times"]]
    stripped = _without_suffix([row["id"] for row in rows])
    places = {(row["place"], row["handle"]): number for number, row in enumerate(rows)}
    columns = {column: [row[column] for row in rows] for column in rows[0] if column not in ("place", "handle")}
    columns["id"] = stripped or _unique([row["id"] for row in rows])
    only = recordings[0] if len(recordings) == 1 else None
    iterations = _iterations(only, origin, places) if only and only.steps else None
    return Trace(
        requests_table(columns, len(rows)),
        _meta(recordings, name, origin, stripped is not None),
        iterations=iterations,
        timeline=_timeline(only, origin) if only and only.steps else None,
    )


def _since(stamp: float, origin: float) -> float:
    return round(stamp - origin, 7)


def _without_suffix(ids: list[str]) -> list[str] | None:
    """Return the ids as the front end knew them, if the engine's all have its suffix; None otherwise."""
    if not all(SUFFIX.search(one) for one in ids):
        return None
    short = [SUFFIX.sub("", one) for one in ids]
    return short if len(set(short)) == len(short) else None


def _unique(ids: list[str]) -> list[str]:
    """Number the later uses of an id: vLLM lets a client use one again."""
    seen: dict[str, int] = defaultdict(int)
    taken = set(ids)
    result = []
    for one in ids:
        seen[one] += 1
        name = one
        while seen[one] > 1 and name in taken:
            name = f"{one}~{seen[one]}"
            seen[one] += name in taken
        taken.add(name)
        result.append(name)
    return result


def _rows(recording: _Recording, place: int) -> list[dict[str, Any]]:
    """Rows of one engine core's requests, on its monotonic clock."""
    served = _served(recording)
    known = recording.requests
    # A request whose own record was dropped is still part of the schedule.
    for handle in sorted((set(served) | set(recording.outcomes)) - set(known)):
        first = served[handle].scheduled
        at = recording.clocks[0].monotonic if first is None else first
        wall = recording.clocks[0].wall + at - recording.clocks[0].monotonic
        lost = _Request(request=handle, id=f"unknown-{handle}", arrival=wall, queued=at, prompt_tokens=0, priority=0)
        known = known | {handle: lost}
        recording.outcomes[handle] = "its record was dropped"
    requests = [known[handle] for handle in sorted(known)]
    near = [one.queued for one in requests]
    arrivals = _to_monotonic(recording, [one.arrival for one in requests], near)
    emptied = recording.emptied
    rows = []
    for request, arrival in zip(requests, arrivals, strict=True):
        one = served.get(request.request) or _Served()
        times = one.token_times
        # Chained hashes may go on over the output, which the next turn of a conversation repeats.
        own, epoch = request.block_hashes, bisect(emptied, one.scheduled or request.queued)
        status, error = _status(recording.outcomes.get(request.request), len(times))
        rows.append(
            {
                "place": place,
                "handle": request.request,
                "id": request.id,
                "status": status,
                "error": error,
                # Two clocks, read one after the other, differ by microseconds.
                "arrival": min(float(arrival), request.queued),
                "queued": request.queued,
                "scheduled": one.scheduled,
                "first_token": times[0] if times else None,
                "last_token": times[-1] if times and status == "ok" else None,
                "token_times": times,
                "priority": request.priority,
                "prompt_tokens": request.prompt_tokens,
                "output_tokens": max(len(times), 1),
                "cached_tokens": one.cached,
                "preemptions": one.preemptions,
                "block_hashes": None if own is None else _after_emptying(own + one.output_hashes, epoch),
            }
        )
    return rows


def _after_emptying(hashes: list[int], times: int) -> list[int]:
    """Return other hashes for prompts that came after the prefix cache was emptied: nothing before is found again."""
    if not times:
        return hashes
    key = times.to_bytes(4, "little")
    digests = (blake2b(one.to_bytes(8, "little"), digest_size=8, key=key).digest() for one in hashes)
    return [int.from_bytes(one, "little") >> 1 for one in digests]


def _iterations(recording: _Recording, origin: float, places: dict[tuple[int, int], int]) -> pa.Table:
    """The iterations' table: one begins when it is scheduled, and not before the one before it has ended."""
    columns: dict[str, list[Any]] = {one.name: [] for one in ITERATIONS}
    before = -np.inf
    for step in recording.steps:
        start = max(step.scheduled_at, min(before, step.end))
        before = step.end
        columns["start"].append(_since(start, origin))
        columns["duration"].append(round(step.end - start, 7))
        columns["scheduled_at"].append(_since(step.scheduled_at, origin))
        columns["requests"].append([places[0, one] for one in step.requests])
        columns["preempted"].append([places[0, one] for one in step.preempted])
        for name in ("computed", "scheduled", "running", "waiting", "free_blocks"):
            columns[name].append(getattr(step, name))
    return pa.table([pa.array(columns[one.name], type=one.type) for one in ITERATIONS], schema=ITERATIONS)


def _timeline(recording: _Recording, origin: float) -> pa.Table:
    """Gauges after the last schedule call, and tokens, of every ``SAMPLE_SECONDS`` in which an iteration ended."""
    total = recording.header.engine.arguments.get("num_gpu_blocks")
    samples: dict[int, list[_Step]] = defaultdict(list)
    prompts: dict[int, int] = defaultdict(int)
    begun: set[int] = set()
    for step in recording.steps:
        second = int((step.end - origin) // SAMPLE_SECONDS)
        samples[second].append(step)
        # As vLLM counts: a whole prompt, cached or not, when its first token is there.
        first = {one for one, new in zip(step.requests, step.sampled, strict=True) if new} - begun
        begun |= first
        prompts[second] += sum(recording.requests[one].prompt_tokens for one in first if one in recording.requests)
    rows = []
    for second in sorted(samples):
        steps = samples[second]
        last, new = steps[-1], sum(sum(step.sampled) for step in steps)
        usable = isinstance(total, int) and total > 1 and last.free_blocks is not None
        # One block is vLLM's null block, never free.
        usage = 1 - last.free_blocks / (total - 1) if usable else None  # type: ignore[operator]
        values = (float(last.running), float(last.waiting), None if usage is None else round(max(usage, 0.0), 6))
        speeds = (prompts[second] / SAMPLE_SECONDS, new / SAMPLE_SECONDS)
        rows.append((round((second + 1) * SAMPLE_SECONDS, 6), *values, *speeds))
    arrays = [pa.array([row[place] for row in rows], type=one.type) for place, one in enumerate(TIMELINE)]
    return pa.table(arrays, schema=TIMELINE)


def _meta(recordings: list[_Recording], name: str, origin: float, stripped: bool) -> dict[str, Any]:
    first = recordings[0]
    header = first.header
    clock = next((one for one in first.clocks), header.clock)
    measured = (
        "id status arrival queued scheduled first_token last_token token_times priority prompt_tokens output_tokens "
        "cached_tokens preemptions block_hashes"
    )
    meta: dict[str, Any] = {
        "name": name,
        "source": {"format": FORMAT, "files": file_facts([one.file for one in recordings]), "run": header.run},
        "model": header.model,
        "hardware": header.machine.get("device"),
        "machine": header.machine,
        "vantage": "engine",
        "engine": header.engine.model_dump(),
        "clock": {
            "kind": "run",
            "origin_monotonic": origin,
            "origin_wall": round(clock.wall - clock.monotonic + origin, 6),
            "drift": round(max(_drift(one) for one in recordings), 7),
            "note": "Stamps are time.monotonic() of the engine's process, less that of the first arrival. Arrivals "
            "were stamped by the front end on the wall clock and are moved by the difference of the two clocks, which "
            "the recorder read about every second.",
        },
        "columns": dict.fromkeys(measured.split(), "measured"),
        "block_hash": {"block_size": header.block_size},
        "notes": [note for one in recordings for note in _notes(one, len(recordings) > 1)],
    }
    if stripped:
        meta["notes"].append("The engine's own suffix was taken from the request ids.")
    if header.shape:
        meta["model_config"] = header.shape
    if len(recordings) > 1:
        ranks = ", ".join(one.name for one in recordings)
        meta["notes"].append(
            f"Requests of several engine cores; their iterations are in the traces {name}#... {ranks}."
        )
    return meta


def _drift(recording: _Recording) -> float:
    """By how many seconds the distance of the two clocks varied."""
    ahead = [one.wall - one.monotonic for one in recording.clocks]
    return max(ahead) - min(ahead)


def _notes(recording: _Recording, several: bool) -> list[str]:
    """What a user must know of how complete a recording is."""
    notes = []
    if recording.end is None or recording.cut:
        left = len(set(recording.requests) - set(recording.outcomes))
        notes.append(
            "It has no end mark: the engine was killed or still ran. What had been flushed is here"
            + (f"; {left} requests had not ended." if left else ", and every request in it had ended.")
        )
    if recording.dropped:
        notes.append(f"{recording.dropped} records were dropped, as the disk was too slow: iterations are missing.")
    notes += [f"A record failed: {one}." for one in recording.failures[:5]]
    if recording.emptied:
        notes.append(
            f"The prefix cache was emptied {len(recording.emptied)} times; hashes of prompts scheduled after it have "
            "nothing in common with those before."
        )
    if _drift(recording) > CLOCKS_AGREE:
        notes.append(f"The wall clock moved by {_drift(recording):.3f} s against the monotonic one.")
    if recording.header.loop == "asynchronous":
        notes.append(
            "The engine schedules ahead: an iteration is taken to begin when it is scheduled or when the one before "
            "it ends, whichever is later."
        )
    if recording.end is not None and recording.steps:
        spent = 1e6 * recording.end.noting_seconds / len(recording.steps)
        notes.append(f"Taking notes took {spent:.0f} us an iteration in the engine's thread.")
    return [f"{recording.name}: {one}" for one in notes] if several else notes
