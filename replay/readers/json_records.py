"""JSON of foreign tools, plain or packed: what it looks like from its head, and its records one by one.

Nothing larger than ``LONGEST`` is held as text, whatever a file unpacks to.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from profiles.errors import InputError, found
from replay.readers.fields import Record, parse_json
from replay.readers.opening import head, open_text

LONGEST = 2**30
"""Characters of one record, or of a document that has to be read whole."""
CHUNK = 2**16
DEEPEST = 4
"""Levels of the first record at which keys are told."""
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*+"|[{}\[\]:,]|[^\s{}\[\]:,"]+', re.DOTALL)


def keys_of(path: Path) -> frozenset[str]:
    """Paths of the keys in the head of a JSON file, such as ``metadata.version`` and ``[].start_time``.

    Strings are passed over, so that a text which quotes another format is not taken for it; a file that breaks off, or
    whose head ends within a value, shows the keys until there. Of JSON lines only the first is looked at.
    """
    return _keys(head(path)) if path.is_file() else frozenset()


@lru_cache(maxsize=8)
def _keys(start: bytes) -> frozenset[str]:
    text = start.decode("utf-8-sig", errors="replace").lstrip()
    if not text.startswith(("{", "[")):
        return frozenset()
    keys: set[str] = set()
    inside: list[str] = []
    names: list[str] = []
    previous = ""
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in "{[":
            inside.append(token)
            names.append("[]" if token == "[" else "")
        elif token in "}]":
            if not inside:
                break
            inside.pop()
            names.pop()
            if not inside:
                break
        elif token == ":" and inside and inside[-1] == "{" and previous.startswith('"'):
            names[-1] = previous[1:-1]
            if len(names) <= DEEPEST:
                keys.add(".".join(names))
        previous = token
    return frozenset(keys)


@contextmanager
def _readable(path: Path) -> Iterator[io.TextIOWrapper]:
    try:
        with open_text(path) as stream:
            yield stream
    except UnicodeDecodeError as error:
        raise InputError(f"is no UTF-8 text: {error.reason} at byte {error.start}", file=path) from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=path) from None


def _too_long(path: Path, row: int | str | None = None) -> InputError:
    return InputError(f"holds a record of more than {LONGEST:,} characters", file=path, row=row)


def read_document(path: Path) -> Record:
    """Return the object that a file holds.

    Raises
    ------
    InputError
        If it holds something else, or more than ``LONGEST`` characters.
    """
    with _readable(path) as stream:
        text = stream.read(LONGEST + 1)
    if len(text) > LONGEST:
        raise _too_long(path)
    return _record(parse_json(text, path), path, None)


def _record(value: Any, path: Path, row: int | str | None) -> Record:
    if not isinstance(value, dict):
        raise InputError(f"expected a JSON object, found {found(value)}", file=path, row=row)
    return Record(value, path, row)


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield number (from 1) and text of every line that is not blank, one at a time."""
    with _readable(path) as stream:
        number = 0
        while line := stream.readline(LONGEST + 1):
            number += 1
            if len(line) > LONGEST:
                raise _too_long(path, number)
            if line.strip():
                yield number, line


def stream_lines(path: Path) -> Iterator[Record]:
    """Yield the objects of a JSON-lines file, one at a time.

    Raises
    ------
    InputError
        At the first line that holds no JSON object.
    """
    for number, line in text_lines(path):
        yield _record(parse_json(line, path, number), path, number)


def runs(path: Path) -> int:
    """Count the results that were appended to one file, one a line; 1 where the file is one document."""
    lines = text_lines(path)
    first = next(lines, (0, ""))[1]
    if next(lines, None) is None or not _whole(first):
        return 1
    return 2 + sum(1 for _ in lines)


def read_run(path: Path, place: int, several: bool) -> Record:
    """Return the result at a place (from 0) of those that ``runs`` counts, or the file's only one."""
    if not several:
        return read_document(path)
    for index, (line, text) in enumerate(text_lines(path)):
        if index == place:
            return _record(parse_json(text, path, line), path, line)
    raise InputError(f"holds no run {place + 1}", file=path)


def _whole(line: str) -> bool:
    """Whether a line is an object of its own, and not the beginning of a document."""
    if not (line.startswith("{") and line.rstrip().endswith("}")):
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def stream_array(path: Path) -> Iterator[Record]:
    """Yield the objects of a file that holds one JSON array, one at a time; ``row`` is ``"request N"``, from 1.

    Raises
    ------
    InputError
        At the first element that is no object, or where the file breaks off.
    """
    decoder = json.JSONDecoder()
    with _readable(path) as stream:
        text, place, number = stream.read(CHUNK).lstrip(), 0, 1
        if not text.startswith("["):
            raise InputError(f"expected a JSON array, found {found(text[:40])}", file=path)
        place = 1
        while True:
            text, place = _next(stream, text, place)
            row = f"request {number}"
            if text[place : place + 1] == "]":
                return
            if number > 1:
                if text[place : place + 1] != ",":
                    raise _broken(path, row, text, place, "expected , or ]")
                text, place = _next(stream, text, place + 1)
            size = CHUNK
            while True:
                try:
                    value, end = decoder.raw_decode(text, place)
                    break
                except json.JSONDecodeError as error:
                    # Only what may go on beyond the text at hand is worth another look.
                    open_end = error.pos > len(text) - 32 or error.msg.startswith("Unterminated string")
                    more = stream.read(size) if open_end else ""
                    if not more:
                        raise _broken(path, row, text, error.pos, error.msg) from None
                    text, place, size = text[place:] + more, 0, 2 * size
                    if len(text) > LONGEST:
                        raise _too_long(path, row) from None
                except (RecursionError, ValueError) as error:
                    reason = "nested too deeply" if isinstance(error, RecursionError) else "too many digits"
                    raise InputError(f"is no JSON for a trace: {reason}", file=path, row=row) from None
            place = end
            yield _record(value, path, row)
            number += 1


def _next(stream: io.TextIOWrapper, text: str, place: int) -> tuple[str, int]:
    """Move to the next character that is not blank, reading on if need be."""
    while True:
        while place < len(text) and text[place] in " \t\r\n":
            place += 1
        if place < len(text):
            return text, place
        text, place = stream.read(CHUNK), 0
        if not text:
            return "", 0


def _broken(path: Path, row: str, text: str, place: int, message: str) -> InputError:
    truncated = " (the file seems truncated)" if place >= len(text) - 1 or message.startswith("Unterminated") else ""
    return InputError(f"is no JSON: {message}{truncated}", file=path, row=row)
