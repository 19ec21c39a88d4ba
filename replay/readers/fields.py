"""Typed access to the fields of foreign records, with errors that name file, row and field."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profiles.errors import InputError, found
from replay.readers.opening import open_text

MOST_TOKENS = 10**9
MOST_SECONDS = 1e12
LONGEST_FIELD = 2**24
"""Characters of one field of a CSV; lists of lengths are long."""
LONGEST_TEXT = 2**32
"""Bytes of a packed file that is read whole."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a source, and where it stands."""

    values: Mapping[str, Any]
    file: Path
    row: int | str | None = None

    def get(self, key: str) -> Any:
        """Return a field, or None."""
        return self.values.get(key)

    def need(self, key: str) -> Any:
        """Return a field.

        Raises
        ------
        InputError
            If it is absent or null.
        """
        value = self.values.get(key)
        if value is None:
            have = ", ".join(found(one)[1:-1] for one in list(self.values)[:12]) or "none"
            raise self.error(key, f"is missing; fields here: {have}")
        return value

    def error(self, key: str | None, message: str) -> InputError:
        """Return an error about one field of this record."""
        return InputError(message, file=self.file, row=self.row, field=key)

    def tokens(self, key: str, least: int = 0) -> int:
        """Return a count of tokens."""
        return as_tokens(self.need(key), least, lambda message: self.error(key, message))

    def seconds(self, key: str, *, positive: bool = False, unit: float = 1.0) -> float:
        """Return a time or duration in seconds, at least 0 (or above 0), of a field in units of ``unit`` seconds."""
        return as_seconds(self.need(key), positive, lambda message: self.error(key, message), unit)

    def text(self, key: str) -> str | None:
        """Return a string, or None if the field is absent or null."""
        value = self.values.get(key)
        return None if value is None else as_text(value, lambda message: self.error(key, message))


def as_tokens(value: Any, least: int, error: Any) -> int:
    """Check a foreign value to be a sensible count of tokens."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise error(f"expected a whole number of tokens, found {found(value)}")
    if not least <= value <= MOST_TOKENS:
        raise error(f"expected {least} to {MOST_TOKENS} tokens, found {found(value)}")
    return value


def as_seconds(value: Any, positive: bool, error: Any, unit: float = 1.0) -> float:
    """Check a foreign value to be a sensible time, and return it in seconds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise error(f"expected a number of seconds, found {found(value)}")
    try:
        seconds = float(value) * unit
    except OverflowError:
        seconds = math.inf
    if not math.isfinite(seconds) or seconds > MOST_SECONDS:
        raise error(f"expected a finite number of seconds below {MOST_SECONDS:g}, found {found(value)}")
    if seconds < 0 or (positive and seconds == 0):
        raise error(f"expected a number of seconds {'above' if positive else 'at least'} 0, found {found(value)}")
    return seconds


def as_text(value: Any, error: Any) -> str:
    """Check a foreign value to be a string that can be written again."""
    if not isinstance(value, str):
        raise error(f"expected a string, found {found(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise error(f"is no Unicode text: {found(value)}") from None
    return value


def first_line(error: Exception) -> str:
    """Return what a library says of a file it cannot read, as one printable line."""
    text = str(error.args[0] if error.args else error)
    return "".join(one if one.isprintable() else " " for one in text.splitlines()[0]) if text else repr(error)


def read_text(path: Path) -> str:
    """Return a UTF-8 file's text, unpacked if it is compressed.

    Raises
    ------
    InputError
        If it cannot be read, is not UTF-8 or is empty.
    """
    try:
        with open_text(path, LONGEST_TEXT) as stream:
            text = stream.read()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=path) from None
    except UnicodeDecodeError as error:
        raise InputError(f"is no UTF-8 text: {error.reason} at byte {error.start}", file=path) from None
    if not text.strip():
        raise InputError("is empty", file=path)
    return text


def parse_json(text: str, path: Path, first_line: int = 1, *, finite: bool = False) -> Any:
    """Parse JSON; with ``finite``, numbers beyond a double's range and NaN are refused wherever they stand.

    Raises
    ------
    InputError
        With the line at which it ends or breaks.
    """
    try:
        return json.loads(text, **(_FINITE if finite else {}))
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        cut = error.pos >= len(text.rstrip()) - 1 or error.msg.startswith("Unterminated string")
        truncated = " (the file seems truncated)" if cut else ""
        raise InputError(f"is no JSON: {error.msg} at column {error.colno}{truncated}", file=path, row=line) from None
    except OverflowError as error:
        raise InputError(f"expected finite numbers, found {error}", file=path) from None
    except (RecursionError, ValueError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"
        raise InputError(f"is no JSON for a trace: {reason}", file=path, row=first_line) from None


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise OverflowError(text[:80])
    return value


_FINITE: dict[str, Any] = {"parse_float": _finite, "parse_constant": _finite}


def read_object(path: Path) -> Record:
    """Return the JSON object that a file holds.

    Raises
    ------
    InputError
        If it holds something else.
    """
    value = parse_json(read_text(path), path, finite=True)
    if not isinstance(value, dict):
        raise InputError(f"expected a JSON object, found {found(value)}", file=path)
    return Record(value, path)


def read_lines(path: Path) -> Iterator[Record]:
    """Yield the objects of a JSON-lines file, blank lines passed over.

    Raises
    ------
    InputError
        At the first line that holds no JSON object.
    """
    # Not splitlines: JSON strings may hold line separators of Unicode.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        value = parse_json(line, path, number)
        if not isinstance(value, dict):
            raise InputError(f"expected a JSON object, found {found(value)}", file=path, row=number)
        yield Record(value, path, number)


def read_rows(path: Path, needed: Sequence[str]) -> list[Record]:
    """Return the rows of a CSV file whose first line names its columns, values as text.

    Raises
    ------
    InputError
        If a needed column is missing, or a row has more or fewer values than there are columns.
    """
    csv.field_size_limit(LONGEST_FIELD)
    lines = csv.reader(read_text(path).splitlines())
    rows = []
    try:
        names = next(lines)
        for name in needed:
            if name not in names:
                raise InputError(f"is missing; there are {found(', '.join(names))[1:-1]}", file=path, field=name)
        for values in lines:
            if len(values) != len(names):
                reason = f"expected {len(names)} values, found {len(values)} (the file seems truncated)"
                raise InputError(reason, file=path, row=lines.line_num)
            rows.append(Record(dict(zip(names, values, strict=True)), path, lines.line_num))
    except csv.Error as error:
        raise InputError(f"is no CSV: {error}", file=path, row=lines.line_num) from None
    return rows
