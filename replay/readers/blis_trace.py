"""BLIS TraceV2 (inference-sim): a YAML header and a CSV of requests as ``blis observe`` and ``blis run`` write them.

A trace is the CSV, the header, or a folder with both. Times are whole microseconds; ``send_time_us`` may count from
1970 while ``arrival_time_us`` (when the workload wanted it sent) counts from the run's start. Beside them there may be
a CSV of chunk times (``request_id,chunk_index,timestamp_us``). Format: BLIS @f90a1e3 ``sim/workload/tracev2.go``.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from profiles.errors import InputError, found
from profiles.yaml_files import parse_mapping
from replay.block_hashes import chain
from replay.readers.fields import LONGEST_FIELD, MOST_SECONDS, MOST_TOKENS, Record
from replay.readers.opening import head, open_text
from replay.trace import REQUEST_CLOCK, RUN_CLOCK, Trace, file_facts, requests_table

FORMAT = "blis"
REQUESTS_FILE = ""
COLUMNS = [
    "request_id",
    "client_id",
    "tenant_id",
    "slo_class",
    "session_id",
    "round_index",
    "prefix_group",
    "prefix_length",
    "streaming",
    "input_tokens",
    "output_tokens",
    "text_tokens",
    "image_tokens",
    "audio_tokens",
    "video_tokens",
    "reason_ratio",
    "model",
    "deadline_us",
    "server_input_tokens",
    "arrival_time_us",
    "send_time_us",
    "first_chunk_time_us",
    "last_chunk_time_us",
    "num_chunks",
    "status",
    "error_message",
    "finish_reason",
]
"""In BLIS's order, by which it reads them."""
NEEDED = ("request_id", "input_tokens", "output_tokens", "arrival_time_us", "send_time_us")
CHUNK_COLUMNS = ("request_id", "chunk_index", "timestamp_us")
VERSION = 3
HASHED = 16
"""Tokens of a block of the prompt hashes that stand for prefix groups; it divides every block size in use."""
FAR = 10**12
"""Microseconds (12 days) by which two columns of times differ only where they count from different origins."""
_LARGEST_HEADER = 2**20
_MOST_FILES = 1000
_SERVER = {
    "tensor_parallel": "tensor_parallel_size",
    "max_num_seqs": "max_num_seqs",
    "block_size": "block_size",
    "gpu_memory_utilization": "gpu_memory_utilization",
    "max_model_len": "max_model_len",
}
_STATUS = {"ok": "ok", "error": "failed", "timeout": "unfinished", "incomplete": "unfinished", "": "unfinished"}


def detect(path: Path) -> bool:
    """Whether a file is such a CSV or header, or a folder holds such a CSV."""
    if path.is_dir():
        return any(map(_is_table, _files(path)))
    return path.is_file() and (_is_table(path) or _is_header(path))


def _files(folder: Path) -> list[Path]:
    return sorted(one for one in itertools.islice(folder.iterdir(), _MOST_FILES) if one.is_file())


def _first_line(path: Path) -> list[str]:
    return head(path, 2048).decode("utf-8-sig", "replace").partition("\n")[0].strip().split(",")


def _is_table(path: Path) -> bool:
    names = _first_line(path)
    return names[:4] == COLUMNS[:4] and "arrival_time_us" in names


def _is_chunks(path: Path) -> bool:
    return tuple(_first_line(path)) == CHUNK_COLUMNS


def _is_header(path: Path) -> bool:
    text = "\n" + head(path, 4096).decode("utf-8-sig", "replace")
    return "\ntrace_version:" in text and "\ntime_unit:" in text


def read(path: Path) -> Trace:
    """Read a trace.

    Raises
    ------
    InputError
        Naming file, line and field of what cannot be used, or saying which of several tables is meant.
    """
    table, header, chunks = _parts(path)
    said = Record(_header(header), header) if header else Record({}, table)
    chunk_times = _chunks(chunks) if chunks else {}
    rows = [_request(record, chunk_times) for record in _rows(table, NEEDED)]
    if not rows:
        raise InputError("holds no requests", file=table)
    sent = [row for row in rows if row["sent"] > 0]
    clock = _place(rows, bool(sent))
    hashes = _prefixes(rows)
    columns: dict[str, Any] = {name: [row.get(name) for row in rows] for name in _KEPT}
    if hashes is not None:
        columns["block_hashes"] = pa.array(hashes, pa.list_(pa.int64()))
    meta = _meta(said, [table, *filter(None, (header, chunks))], rows, clock)
    if hashes is not None:
        meta["block_hash"] = {"block_size": HASHED}
        meta["columns"]["block_hashes"] = "assumed: requests of a prefix group share its prefix and nothing else"
    return Trace(requests_table(columns, len(rows)), meta)


_KEPT = (
    "id",
    "status",
    "error",
    "nominal_arrival",
    "arrival",
    "first_token",
    "last_token",
    "token_times",
    "priority",
    "prompt_tokens",
    "output_tokens",
)


def _parts(path: Path) -> tuple[Path, Path | None, Path | None]:
    """The CSV of requests, its header and its chunk times, from any of them or their folder."""
    beside = _files(path if path.is_dir() else path.parent)
    tables = [path] if path.is_file() and _is_table(path) else [one for one in beside if _is_table(one)]
    stem = _stem(path) if path.is_file() else None
    tables = [one for one in tables if stem is None or _stem(one) == stem] or tables
    if len(tables) != 1:
        names = ", ".join(one.name for one in tables) or "none"
        raise InputError(f"expected one CSV of requests, found {names}; name the one that is meant", file=path)
    table = tables[0]
    header = (
        [path] if path.is_file() and _is_header(path) else _matching([one for one in beside if _is_header(one)], table)
    )
    chunks = _matching([one for one in beside if _is_chunks(one)], table)
    return table, header[0] if header else None, chunks[0] if chunks else None


def _stem(path: Path) -> str:
    return path.name.partition(".")[0]


def _matching(files: list[Path], table: Path) -> list[Path]:
    """Those of a table's name, or the only one."""
    same = [one for one in files if _stem(one) == _stem(table)]
    return same or (files if len(files) == 1 else [])


def _header(path: Path) -> dict[str, Any]:
    try:
        with open_text(path, _LARGEST_HEADER) as stream:
            text = stream.read(_LARGEST_HEADER)
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise InputError("is no header of BLIS: it refers to itself (YAML aliases)", file=path)
    except UnicodeDecodeError as error:
        raise InputError(f"is no UTF-8 text: {error.reason} at byte {error.start}", file=path) from None
    except (yaml.YAMLError, RecursionError, ValueError):
        pass  # parse_mapping says what is wrong with it
    try:
        return parse_mapping(text, path)
    except ValueError:
        # A date that is none, a number too long: well-formed, and no value.
        raise InputError("is no header of BLIS: a value cannot be read", file=path) from None


def _rows(path: Path, needed: Iterable[str]) -> Iterator[Record]:
    """Rows of a CSV, its columns by name; one at a time."""
    csv.field_size_limit(LONGEST_FIELD)
    try:
        with open_text(path) as stream:
            lines = csv.reader(stream)
            names = next(lines, [])
            for name in needed:
                if name not in names:
                    raise InputError(f"is missing; there are {found(', '.join(names))[1:-1]}", file=path, field=name)
            for values in lines:
                if values and len(values) != len(names):
                    why = f"expected {len(names)} values, found {len(values)} (the file seems truncated)"
                    raise InputError(why, file=path, row=lines.line_num)
                if values:
                    yield Record(dict(zip(names, values, strict=True)), path, lines.line_num)
    except csv.Error as error:
        raise InputError(f"is no CSV: {error}", file=path) from None
    except UnicodeDecodeError as error:
        raise InputError(f"is no UTF-8 text: {error.reason} at byte {error.start}", file=path) from None


def _whole(record: Record, name: str, most: float = MOST_TOKENS) -> int:
    text = str(record.get(name) or "0").strip()
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 19) or not 0 <= int(text) <= most:
        raise record.error(name, f"expected a whole number from 0 to {most:g}, found {found(text)}")
    return int(text)


def _micros(record: Record, name: str) -> int:
    """A time in whole microseconds, kept so until the run's start is known: seconds since 1970 are coarser."""
    return _whole(record, name, MOST_SECONDS * 1e6)


def _request(record: Record, chunks: dict[str, list[int]]) -> dict[str, Any]:
    said = str(record.get("status") or "").strip()
    if said not in _STATUS:
        raise record.error("status", f"expected ok, error, timeout or incomplete, found {found(said)}")
    identity = str(record.need("request_id")).strip()
    prefix = _whole(record, "prefix_length")
    group = str(record.get("prefix_group") or "")
    # The client counts what it adds to the shared prefix; what the server counted is all of it.
    prompt = _whole(record, "server_input_tokens") or _whole(record, "input_tokens") + (prefix if group else 0)
    row: dict[str, Any] = {
        "id": str(record.get("x_request_id") or "").strip() or identity,
        "status": _STATUS[said],
        "error": str(record.get("error_message") or "").strip() or None,
        "wanted": _micros(record, "arrival_time_us"),
        "sent": _micros(record, "send_time_us"),
        "prompt_tokens": prompt,
        "output_tokens": _whole(record, "output_tokens"),
        "priority": _whole(record, "vllm_priority") if record.get("vllm_priority") is not None else None,
        "group": (group, prefix) if group and prefix else None,
        "model": str(record.get("model") or ""),
        "streamed": str(record.get("streaming") or "true").strip().lower() != "false",
    }
    first, last = _micros(record, "first_chunk_time_us"), _micros(record, "last_chunk_time_us")
    row["told"] = first > 0
    if row["status"] == "ok" and first > 0 and row["output_tokens"] > 0:
        if not row["sent"] <= first <= last:
            raise record.error("first_chunk_time_us", "expected send, first chunk and last chunk in this order")
        # An answer that is not streamed comes whole: that is no first token.
        row |= {"last_token": last, "first_token": first if row["streamed"] else None}
        times = chunks.get(identity)
        if times and row["streamed"] and abs(times[0] - first) < 1000:
            row["token_times"] = times
    elif row["status"] == "ok" and row["output_tokens"] == 0:
        row |= {"status": "silent", "output_tokens": 1}
    return row


def _chunks(path: Path) -> dict[str, list[int]]:
    """Times (us) of each request's chunks, in order."""
    listed: dict[str, list[tuple[int, int]]] = {}
    for record in _rows(path, CHUNK_COLUMNS):
        one = (_whole(record, "chunk_index"), _micros(record, "timestamp_us"))
        listed.setdefault(str(record.need("request_id")).strip(), []).append(one)
    return {identity: sorted(time for _, time in sorted(times)) for identity, times in listed.items()}


def _place(rows: list[dict[str, Any]], sent: bool) -> dict[str, Any]:
    """Put all stamps on one clock; return ``meta.clock``."""
    # Of requests that were never sent, a run that counts from 1970 says 0.
    since_1970 = max(row["sent"] for row in rows) > FAR
    known = [row for row in rows if row["sent"] > 0 or not since_1970] if sent else []
    wanted = min(row["wanted"] for row in rows)
    begin = min(row["sent"] for row in known) if known else wanted
    # Where the two count from different origins, the constant that makes no request early.
    apart = sent and abs(begin - wanted) > FAR
    shift = min(row["sent"] - row["wanted"] for row in known) if apart else 0
    for row in rows:
        told = sent and (row["sent"] > 0 or not since_1970)
        row["arrival"] = ((row["sent"] if told else row["wanted"] + shift) - begin) / 1e6
        row["nominal_arrival"] = (row["wanted"] + shift - begin) / 1e6
        for name in ("first_token", "last_token"):
            if row.get(name) is not None:
                row[name] = (row[name] - begin) / 1e6
        if row.get("token_times"):
            row["token_times"] = [(time - begin) / 1e6 for time in row["token_times"]]
    note = "the client's wall clock" if begin > FAR else "the run's start"
    return {"kind": RUN_CLOCK, "origin": begin / 1e6, "note": note if sent else "the workload's; nothing was sent"}


def _prefixes(rows: list[dict[str, Any]]) -> list[list[int]] | None:
    """Prompt hashes that say what the prefix groups say: so many first tokens alike."""
    if not any(row["group"] for row in rows):
        return None
    numbers = {name: index for index, name in enumerate(sorted({row["group"][0] for row in rows if row["group"]}))}
    hashes = []
    for index, row in enumerate(rows):
        own = len(numbers) + index
        prompt = min(row["prompt_tokens"], 2**20)
        shared = min(row["group"][1], prompt) if row["group"] else 0
        tokens = ([numbers[row["group"][0]]] * shared if shared else []) + [own] * (prompt - shared)
        hashes.append(chain(tokens, HASHED))
    return hashes


def _meta(said: Record, files: list[Path], rows: list[dict[str, Any]], clock: dict[str, Any]) -> dict[str, Any]:
    server = said.get("server")
    if server is not None and not isinstance(server, dict):
        raise said.error("server", f"expected a mapping, found {found(server)}")
    server = server or {}
    unit = said.get("time_unit")
    if unit not in (None, "microseconds", "us"):
        raise said.error("time_unit", f"expected microseconds, found {found(unit)}")
    arguments = {}
    for theirs, ours in _SERVER.items():
        value = server.get(theirs)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12
        ):
            raise said.error(f"server.{theirs}", f"expected a number above 0, found {found(value)}")
        if value is not None:
            arguments[ours] = value
    models = {row["model"] for row in rows if row["model"]}
    model = server.get("model") if isinstance(server.get("model"), str) else None
    observed = any(row["told"] for row in rows)
    made = "measured" if said.get("mode") in (None, "real") else "simulated by BLIS"
    notes = [] if made == "measured" else [f"mode {said.get('mode')}: not measured, BLIS made it"]
    warm = said.get("warm_up_requests")
    if isinstance(warm, int) and warm > 0:
        notes.append(f"the first {warm} requests are the client's warm-up; they are kept, for they loaded the engine")
    whole = sum(not row["streamed"] for row in rows)
    if whole:
        notes.append(f"{whole} requests were not streamed: they have no first token")
    return {
        "name": files[0].resolve().name.partition(".")[0],
        "source": {"format": FORMAT, "files": file_facts(files)},
        "model": model or (models.pop() if len(models) == 1 else None),
        "hardware": None,
        "engine": {
            "name": server.get("type") if isinstance(server.get("type"), str) else None,
            "version": None,
            "arguments": arguments,
        },
        "clock": clock,
        "vantage": "client",
        "columns": {
            "arrival": f"{made}: when the client sent it"
            if clock["kind"] != REQUEST_CLOCK and observed
            else "measured",
            "nominal_arrival": "measured: when the workload wanted it sent",
        },
        "notes": notes,
    }
