"""Spans of an OpenTelemetry export as JSON: one export a line (file exporter, collector), or one document.

Format: OTLP 1.x JSON, where 64-bit integers are strings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profiles.errors import InputError, found
from replay.readers.fields import MOST_TOKENS, parse_json
from replay.readers.opening import open_text

LONGEST_DOCUMENT = 2**31
"""Characters of one document that is not one export a line."""


@dataclass(frozen=True, slots=True)
class Stamped:
    """Something with a name, a time (Unix ns, None if it has none) and attributes, and where it stands."""

    name: str
    time: int | None
    attributes: Mapping[str, Any]
    file: Path
    row: int

    def error(self, key: str | None, message: str) -> InputError:
        """Return an error about one attribute."""
        return InputError(message, file=self.file, row=self.row, field=key)

    def number(self, key: str, least: float = -math.inf) -> float | None:
        """Return a numeric attribute, None if it is absent or not finite.

        Raises
        ------
        InputError
            If it is no number, or below ``least``.
        """
        value = self.attributes.get(key)
        if isinstance(value, str):
            with suppress(ValueError):
                value = float(value)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
            raise self.error(key, f"expected a number, found {found(value)}")
        if value < least:
            raise self.error(key, f"expected a number of at least {least:g}, found {found(value)}")
        return float(value)

    def count(self, key: str) -> int | None:
        """Return a whole number of at least 0, None if it is absent."""
        value = self.number(key, 0)
        if value is not None and (not value.is_integer() or value > MOST_TOKENS):
            raise self.error(key, f"expected a whole number up to {MOST_TOKENS}, found {found(value)}")
        return None if value is None else int(value)

    def text(self, key: str) -> str | None:
        """Return a string, None if it is absent."""
        value = self.attributes.get(key)
        if value is not None and (not isinstance(value, str) or not value.isprintable()):
            raise self.error(key, f"expected printable text, found {found(value)}")
        return value


@dataclass(frozen=True, slots=True)
class Span(Stamped):
    """A span: ``time`` is its start."""

    scope: str = ""
    span_id: str = ""
    events: tuple[Stamped, ...] = ()


def spans(path: Path) -> Iterator[Span]:
    """Yield the spans of a file.

    Raises
    ------
    InputError
        Naming file and line of what is no export.
    """
    for row, document in _documents(path):
        for resource in _list(document, "resourceSpans", path, row):
            for scoped in _list(resource, "scopeSpans", path, row):
                scope = scoped.get("scope")
                called = scope.get("name") if isinstance(scope, dict) else ""
                for one in _list(scoped, "spans", path, row):
                    events = tuple(
                        Stamped(
                            _name(event),
                            _time(event, "timeUnixNano", path, row),
                            _attributes(event, path, row),
                            path,
                            row,
                        )
                        for event in _list(one, "events", path, row)
                    )
                    begin = _time(one, "startTimeUnixNano", path, row)
                    identity = one.get("spanId")
                    yield Span(
                        _name(one),
                        begin,
                        _attributes(one, path, row),
                        path,
                        row,
                        called if isinstance(called, str) else "",
                        identity if isinstance(identity, str) else "",
                        events,
                    )


def _documents(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Exports of a file: its lines, or, where the first line is none by itself, all of it."""
    try:
        with open_text(path) as stream:
            start = stream.readline()
            while start and not start.strip():
                start = stream.readline()
            if not _whole(start):
                text = start + stream.read(LONGEST_DOCUMENT)
                value = parse_json(text, path)
                for one in value if isinstance(value, list) else [value]:
                    yield 1, _object(one, path, 1)
                return
            yield 1, _object(parse_json(start, path), path, 1)
            for row, line in enumerate(stream, 2):
                if line.strip():
                    yield row, _object(parse_json(line, path, row), path, row)
    except UnicodeDecodeError as error:
        raise InputError(f"is no UTF-8 text: {error.reason} at byte {error.start}", file=path) from None


def _whole(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _object(value: Any, path: Path, row: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"expected an export of spans, found {found(value)}", file=path, row=row)
    return value


def _list(holder: dict[str, Any], key: str, path: Path, row: int) -> list[dict[str, Any]]:
    value = holder.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise InputError(f"expected a list of objects, found {found(value)}", file=path, row=row, field=key)
    return value


def _name(holder: dict[str, Any]) -> str:
    value = holder.get("name")
    return value if isinstance(value, str) else ""


def _time(holder: dict[str, Any], key: str, path: Path, row: int) -> int | None:
    value = holder.get(key)
    if value is None:
        return None
    text = str(value)
    if isinstance(value, bool) or not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise InputError(f"expected nanoseconds since 1970, found {found(value)}", file=path, row=row, field=key)
    return int(text)


def _attributes(holder: dict[str, Any], path: Path, row: int) -> dict[str, Any]:
    """Attributes as plain values; of lists and maps nothing is needed."""
    plain: dict[str, Any] = {}
    for one in _list(holder, "attributes", path, row):
        key, value = one.get("key"), one.get("value")
        if not isinstance(key, str) or not isinstance(value, dict):
            raise InputError(f"expected key and value, found {found(one)}", file=path, row=row, field="attributes")
        for kind in ("stringValue", "intValue", "doubleValue", "boolValue"):
            if kind in value:
                plain[key] = value[kind]
    return plain
