"""Rows of long CSV and JSON-lines files, block by block: a million of them in seconds, in bounded memory.

Arrow parses a block of lines at once. Where it refuses a block, or a value in it is out of range, the block is read
again line by line, by the rules of ``replay.readers.fields``: that names file, line and field, or accepts what Arrow is
too strict for. So the slow way says what a row means, and the fast way only says it sooner.
"""

from __future__ import annotations

import csv
import datetime
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json

from profiles.errors import InputError, found
from replay.readers.fields import MOST_SECONDS, MOST_TOKENS, Record, parse_json
from replay.readers.opening import open_bytes

BLOCK = 2**23
"""Bytes that are parsed at once."""
LONGEST_LINE = 2**26
BOM = b"\xef\xbb\xbf"
NS = 10**9
Block = dict[str, Any]
Kind = Literal["tokens", "seconds", "whole", "text", "ids", "moment"]
_TYPES = {
    "tokens": pa.float64(),
    "seconds": pa.float64(),
    "whole": pa.int64(),
    "text": pa.string(),
    "ids": pa.list_(pa.int64()),
    "moment": pa.string(),
}


@dataclass(frozen=True)
class Column:
    """One column of a source.

    Parameters
    ----------
    name : str
        As the source calls it.
    kind : str
        ``tokens`` (a count, int64), ``seconds`` (at least 0, float64), ``whole`` (int64), ``text``, ``ids`` (a list of
        whole numbers at least 0, int64) or ``moment`` (date and time, int64 nanoseconds since 1970, UTC).
    unit : float
        Seconds that one of it is, for ``seconds``.
    optional : bool
        May be empty or absent in a row, for ``text`` (null) and ``ids`` (null).
    least : int
        Smallest value of ``tokens``.
    """

    name: str
    kind: Kind
    unit: float = 1.0
    optional: bool = False
    least: int = 0


def lines(path: Path, size: int = BLOCK) -> Iterator[tuple[int, bytes]]:
    """Yield whole lines of a file in blocks of about ``size`` bytes, each with the number of its first line (from 1).

    Raises
    ------
    InputError
        At a line of more than ``LONGEST_LINE`` bytes; if the file cannot be read or unpacked.
    """
    number, rest = 1, b""
    try:
        with open_bytes(path) as stream:
            while data := stream.read(size):
                if number == 1 and not rest:
                    data = data.removeprefix(BOM)
                whole, newline, tail = data.rpartition(b"\n")
                if not newline:
                    rest += data
                    if len(rest) > LONGEST_LINE:
                        raise InputError(f"is longer than {LONGEST_LINE:,} bytes", file=path, row=number)
                    continue
                block = rest + whole + newline
                yield number, block
                number, rest = number + block.count(b"\n"), tail
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", file=path) from None
    if rest.strip():
        yield number, rest


def header_of(data: bytes) -> list[str]:
    """Return the names in the first line of a CSV; empty if it is none."""
    line = data.removeprefix(BOM).partition(b"\n")[0].rstrip(b"\r")
    try:
        return [name.strip() for name in next(csv.reader([line.decode()]), [])]
    except (UnicodeDecodeError, csv.Error):
        return []


def objects_of(data: bytes, most: int = 20) -> list[dict[str, Any]]:
    """Return the JSON objects in the first whole lines of a file's head; empty if one of them is something else."""
    rows: list[dict[str, Any]] = []
    whole = data.removeprefix(BOM).split(b"\n")
    # The last line of a head may be cut off; a file of one line has no other.
    for line in (whole[:-1] or whole)[:most]:
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            return []
        if not isinstance(value, dict):
            return []
        rows.append(value)
    return rows


def csv_blocks(path: Path, columns: Sequence[Column], size: int = BLOCK) -> Iterator[Block]:
    """Yield the columns of a CSV with a header, a block of rows at a time.

    Raises
    ------
    InputError
        If a column is missing; naming line and field of a value that cannot be used.
    """
    names: list[str] = []
    for number, block in lines(path, size):
        if not names:
            names = header_of(block)
            _check_header(names, columns, path)
            number, block = number + 1, block.partition(b"\n")[2]
        if block.strip():
            yield _block(block, columns, _csv_reader(names, columns), _CsvRows(path, number, names))


def json_blocks(path: Path, columns: Sequence[Column], size: int = BLOCK) -> Iterator[Block]:
    """Yield the columns of a JSON-lines file, a block of rows at a time; fields that are not named are passed over.

    Raises
    ------
    InputError
        Naming line and field of a value that cannot be used.
    """
    read = _json_reader(columns)
    for number, block in lines(path, size):
        if block.strip():
            yield _block(block, columns, read, _JsonRows(path, number))


def gathered(blocks: Iterator[Block]) -> tuple[dict[str, Any], int]:
    """Return all blocks' columns as arrays (lists of ids stay chunked), and the number of rows; empty without rows."""
    parts: dict[str, list[Any]] = {}
    count = 0
    for block in blocks:
        count += len(next(iter(block.values())))
        for name, values in block.items():
            parts.setdefault(name, []).append(values)
    whole: dict[str, Any] = {}
    for name in list(parts):
        values = parts.pop(name)
        whole[name] = np.concatenate(values) if isinstance(values[0], np.ndarray) else pa.chunked_array(values)
    return whole, count


Rows = Callable[[bytes], Iterator[Record]]


def _block(block: bytes, columns: Sequence[Column], read: Callable[[bytes], pa.Table], rows: Rows) -> Block:
    try:
        table = read(block)
        values = {one.name: _fast(one, table.column(one.name).combine_chunks()) for one in columns}
        if all(one is not None for one in values.values()):
            return values
    except (pa.ArrowException, KeyError):
        pass
    return _slowly(block, columns, rows)


def _slowly(block: bytes, columns: Sequence[Column], rows: Rows) -> Block:
    listed: dict[str, list[Any]] = {one.name: [] for one in columns}
    for record in rows(block):
        for one in columns:
            listed[one.name].append(_slow(one, record))
    made: Block = {}
    for one in columns:
        if one.kind in ("text", "ids"):
            made[one.name] = pa.array(listed[one.name], _TYPES[one.kind])
        else:
            made[one.name] = np.array(listed[one.name], np.float64 if one.kind == "seconds" else np.int64)
    return made


def _csv_reader(names: list[str], columns: Sequence[Column]) -> Callable[[bytes], pa.Table]:
    options = pyarrow.csv.ConvertOptions(
        include_columns=[one.name for one in columns],
        column_types={one.name: pa.string() if one.kind == "ids" else _TYPES[one.kind] for one in columns},
        null_values=[""],
        strings_can_be_null=True,
    )

    def read(block: bytes) -> pa.Table:
        reading = pyarrow.csv.ReadOptions(column_names=names, block_size=len(block) + 1, use_threads=False)
        return pyarrow.csv.read_csv(pa.BufferReader(block), reading, convert_options=options)

    return read


def _json_reader(columns: Sequence[Column]) -> Callable[[bytes], pa.Table]:
    schema = pa.schema([(one.name, _TYPES[one.kind]) for one in columns])
    parsing = pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")

    def read(block: bytes) -> pa.Table:
        reading = pyarrow.json.ReadOptions(block_size=len(block) + 1, use_threads=False)
        return pyarrow.json.read_json(pa.BufferReader(block), reading, parsing)

    return read


def _fast(column: Column, values: pa.Array) -> npt.NDArray[Any] | pa.Array | None:
    """A block's values of one column, or None where one of them must be looked at by itself."""
    if column.kind == "text":
        return values if column.optional or not values.null_count else None
    if column.kind == "ids":
        return _fast_ids(column, values)
    if values.null_count:
        return None
    if column.kind == "whole":
        return np.asarray(values.to_numpy(zero_copy_only=False))
    if column.kind == "moment":
        return _fast_moments(values)
    numbers: npt.NDArray[np.float64] = values.to_numpy(zero_copy_only=False)
    if column.kind == "tokens":
        whole = numbers.astype(np.int64) if np.abs(numbers).max(initial=0.0) <= MOST_TOKENS else None
        fine = whole is not None and bool((whole == numbers).all()) and whole.min(initial=column.least) >= column.least
        return whole if fine else None
    seconds = numbers * column.unit
    return seconds if ((seconds >= 0) & (seconds <= MOST_SECONDS)).all() else None


def _fast_ids(column: Column, values: pa.Array) -> pa.Array | None:
    if pa.types.is_string(values.type):
        # "11|22", an empty cell holding none.
        parts = pc.split_pattern(pc.fill_null(values, ""), "|")
        if pc.any(pc.equal(values, "")).as_py() or values.null_count:
            return None
        values = pa.ListArray.from_arrays(parts.offsets, parts.values.cast(pa.int64()))
    flat = pc.list_flatten(values)
    if (values.null_count and not column.optional) or flat.null_count:
        return None
    return values if len(flat) == 0 or pc.min(flat).as_py() >= 0 else None


def _fast_moments(values: pa.Array) -> npt.NDArray[np.int64] | None:
    """Nanoseconds since 1970 of ISO dates and times, all with or all without a zone."""
    for kind in (pa.timestamp("ns"), pa.timestamp("ns", "UTC")):
        try:
            return np.asarray(values.cast(kind).cast(pa.int64()).to_numpy(zero_copy_only=False), dtype=np.int64)
        except pa.ArrowInvalid:
            continue
    return None


@dataclass(frozen=True)
class _CsvRows:
    """Rows of a block of a CSV, one by one, with numbers as numbers."""

    path: Path
    first: int
    names: list[str]

    def __call__(self, block: bytes) -> Iterator[Record]:
        for number, line in enumerate(block.split(b"\n"), self.first):
            text = _text(line.rstrip(b"\r"), self.path, number)
            if not text.strip():
                continue
            try:
                cells = next(csv.reader([text], strict=True))
            except csv.Error as error:
                raise InputError(f"is no CSV: {error}", file=self.path, row=number) from None
            if len(cells) != len(self.names):
                reason = f"expected {len(self.names)} values, found {len(cells)} (the file seems truncated)"
                raise InputError(reason, file=self.path, row=number)
            pairs = zip(self.names, cells, strict=True)
            yield Record({name: _Cell(cell) for name, cell in pairs if cell}, self.path, number)


class _Cell(str):
    """What stands in a cell of a CSV: text that may be meant as a number."""

    __slots__ = ()


@dataclass(frozen=True)
class _JsonRows:
    """Objects of a block of a JSON-lines file, one by one."""

    path: Path
    first: int

    def __call__(self, block: bytes) -> Iterator[Record]:
        for number, line in enumerate(block.split(b"\n"), self.first):
            if not line.strip():
                continue
            text = _text(line, self.path, number)
            try:
                value = parse_json(text, self.path, number, finite=True)
            except InputError as error:
                raise InputError(error.message, file=self.path, row=number) from None
            if not isinstance(value, dict):
                raise InputError(f"expected a JSON object, found {found(value)}", file=self.path, row=number)
            yield Record(value, self.path, number)


def _text(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"is no UTF-8 text: {error.reason}", file=path, row=number) from None


def _check_header(names: list[str], columns: Sequence[Column], path: Path) -> None:
    for one in columns:
        places = names.count(one.name)
        if places > 1:
            raise InputError("stands twice in the header", file=path, row=1, field=one.name)
        if not places:
            raise InputError(f"is missing; there are {found(', '.join(names))[1:-1]}", file=path, field=one.name)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError("stands twice in the header", file=path, row=1, field=twice)


def _slow(column: Column, record: Record) -> Any:
    """One value, by the rules that say what is accepted."""
    value = record.get(column.name)
    if value is None and column.optional:
        return None
    if column.kind == "text":
        return _as_text(record, column.name)
    if column.kind == "moment":
        return _as_moment(record, column.name)
    if column.kind == "ids":
        return _as_ids(record, column.name)
    if isinstance(value, _Cell):
        record = Record({**record.values, column.name: _as_number(record, column.name)}, record.file, record.row)
    if column.kind == "seconds":
        return record.seconds(column.name, unit=column.unit)
    if column.kind == "tokens":
        return record.tokens(column.name, column.least)
    whole = record.need(column.name)
    if type(whole) is not int or not -(2**63) <= whole < 2**63:
        raise record.error(column.name, f"expected a whole number of 64 bits, found {found(whole)}")
    return whole


def _as_number(record: Record, name: str) -> int | float:
    text = str(record.need(name))
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise record.error(name, f"expected a number, found {found(text)}") from None


def _as_text(record: Record, name: str) -> str:
    """Text; a whole number is accepted for it."""
    value = record.need(name)
    if type(value) is int:
        return str(value)
    if isinstance(value, _Cell):
        return str(value)
    return str(record.text(name))


def _as_ids(record: Record, name: str) -> list[int]:
    value = record.need(name)
    if isinstance(value, _Cell):
        value = [int(one) if one.isascii() and one.isdecimal() and len(one) < 20 else one for one in value.split("|")]
    fine = isinstance(value, list) and all(type(one) is int and 0 <= one < 2**63 for one in value)
    if not fine:
        raise record.error(name, f"expected a list of whole numbers of at least 0, found {found(value)}")
    return list(value)


def _as_moment(record: Record, name: str) -> int:
    """Nanoseconds since 1970; a time without zone is taken as UTC."""
    value = record.need(name)
    try:
        moment = datetime.datetime.fromisoformat(value.strip())
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=datetime.UTC)
        passed = moment - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
        ns = (passed.days * 86400 + passed.seconds) * NS + passed.microseconds * 1000
    except (ValueError, AttributeError, OverflowError):
        ns = 2**63
    if not -(2**62) < ns < 2**62:
        raise record.error(name, f"expected a date and time such as 2023-11-16 18:17:03.97, found {found(value)}")
    return ns
