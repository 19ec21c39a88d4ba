"""Lines of a server's log: text of any encoding, colours removed, each with its time if it says one.

vLLM's own prefix has neither year nor zone nor fractions of a second; containers and JSON logging put better ones
before it, which are taken where they stand.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from replay.readers.opening import head, open_bytes
from replay.trace import TIMELINE, table_of

LONGEST_LINE = 2**20
"""Characters of a line; what is longer goes on as another line."""
LOG_HEAD = 2**18
"""Bytes of a log among which a line must tell its format: other programs may write before the server does."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_STAMP = re.compile(
    r"(?P<year>\d{4})-(?P<date>\d\d-\d\d)[ T](?P<time>\d\d:\d\d:\d\d)(?P<fraction>[.,]\d+)?(?P<zone>Z|[+-]\d\d:?\d\d)?"
)
_YEARLESS = re.compile(r"\b(?P<date>\d\d-\d\d) (?P<time>\d\d:\d\d:\d\d)(?P<fraction>[.,]\d+)?")
_LEAP_YEAR = 2024
"""What a date without a year is put into, so that 29 February is a day."""


def log_head(path: Path) -> str:
    """Text of a log's beginning, without colours; empty where a file cannot be read."""
    content = head(path, LOG_HEAD)
    return _COLOUR.sub("", content.decode(_encoding(content), "replace"))


def _encoding(content: bytes) -> str:
    return "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def looks_like_a_log(text: str) -> bool:
    """Whether a file's beginning is lines of text, and not JSON (of which only log records may be), XML or a page."""
    start = text.lstrip()[:2000]
    if start.startswith("{"):
        return '"levelname"' in start.split("\n", 1)[0] and '"message"' in start
    return bool(start) and not start.startswith(("[{", '["', "[\n", "<")) and "\0" not in start


def log_lines(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield (number, line, message) of a log: the message is the line, or what a JSON record says in it.

    Raises
    ------
    InputError
        If the file is damaged or unpacks to too much.
    """
    with open_bytes(path) as raw:
        text = io.TextIOWrapper(raw, encoding=_encoding(head(path, 2)), errors="replace")
        for number, line in enumerate(iter(lambda: text.readline(LONGEST_LINE), ""), 1):
            line = _COLOUR.sub("", line).rstrip("\r\n")
            yield number, *((_of_json(line)) if line.startswith("{") else (line, line))


def _of_json(line: str) -> tuple[str, str]:
    """A record of ``pythonjsonlogger`` as a line with its stamp, and its message."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return line, line
    message = record.get("message") if isinstance(record, dict) else None
    if not isinstance(message, str):
        return line, line
    process = record.get("processName")
    prefix = f"({process} pid={record.get('process')}) " if isinstance(process, str) else ""
    return f"{prefix}{record.get('asctime')} {message}", message


@dataclass
class LogClock:
    """Seconds since a log's first stamp.

    ``origin`` is that stamp as Unix seconds where it has a zone; ``local`` its text where it has none. ``resolution``
    is the smallest step that any stamp showed, in seconds.
    """

    origin: float | None = None
    local: str | None = None
    resolution: float = 1.0
    _first: float | None = field(default=None, repr=False)
    _last: float = field(default=0.0, repr=False)
    _zoned: bool = field(default=False, repr=False)

    def read(self, text: str) -> float | None:
        """Return the time of a line (its part before the message), or None if it says none."""
        match = _STAMP.search(text)
        year, zone = (match["year"], match["zone"]) if match else (None, None)
        match = match or _YEARLESS.search(text)
        if match is None:
            return None
        seconds = _seconds(year, match["date"], match["time"], zone)
        if seconds is None:
            return None
        if match["fraction"]:
            seconds += float(f"0.{match['fraction'][1:10]}")
            self.resolution = 0.001
        if self._first is None:
            self._first, self._zoned = seconds, zone is not None
            self.local = match.group(0).strip() if zone is None else None
            self.origin = seconds if zone is not None else None
        elif (zone is not None) != self._zoned:
            return None  # another writer's clock: its distance to this one is unknown
        since = seconds - self._first
        if year is None and since < self._last - 180 * 86400:
            since += 366 * 86400  # the year turned (a year of no leap day is a day shorter only after February)
        self._last = max(self._last, since)
        return since

    @property
    def note(self) -> dict[str, Any]:
        """For ``meta.clock``."""
        said = "seconds since the log's first stamp"
        if self.origin is None:
            said += f", {self.local} local time: zone (and perhaps year) unknown" if self.local else ": it has none"
        return {
            "kind": "run",
            "origin": self.origin,
            "origin_local": self.local,
            "resolution": self.resolution,
            "note": said,
        }


def _seconds(year: str | None, date: str, time: str, zone: str | None) -> float | None:
    try:
        moment = datetime.fromisoformat(f"{year or _LEAP_YEAR}-{date}T{time}{zone or ''}")
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def gauges_table(samples: Iterable[tuple[float | None, int, Mapping[str, float]]]) -> pa.Table | None:
    """Return ``timeline`` of periodic lines, or None without any.

    Parameters
    ----------
    samples : iterable of (seconds, engine, columns of ``TIMELINE``)
        In the log's order. Of several engines the last known values are added up, from when all have been heard;
        the share of KV blocks is their mean.
    """
    known = [(time, engine, values) for time, engine, values in samples if time is not None]
    engines = {engine for _, engine, _ in known}
    rows: list[dict[str, Any]] = []
    latest: dict[int, Mapping[str, float]] = {}
    for time, engine, values in known:
        latest[engine] = values
        if len(latest) < len(engines):
            continue
        row: dict[str, Any] = {"time": max(time, rows[-1]["time"]) if rows else time}
        for name in TIMELINE.names[1:]:
            numbers = [one[name] for one in latest.values() if name in one]
            if len(numbers) == len(engines):
                row[name] = sum(numbers) / (len(numbers) if name == "kv_usage" else 1)
        if rows and len(engines) > 1 and rows[-1]["time"] == row["time"]:
            rows.pop()
        rows.append(row)
    return table_of(rows, TIMELINE) if rows else None


class Facts:
    """What a log says once at start-up, and where it says different things."""

    def __init__(self) -> None:
        self._said: dict[str, list[Any]] = {}

    def note(self, name: str, value: Any) -> None:
        """Take in one statement."""
        said = self._said.setdefault(name, [])
        if value in said:
            said.remove(value)
        if len(said) < 100:
            said.append(value)

    def get(self, name: str, default: Any = None) -> Any:
        """The last statement."""
        return self._said[name][-1] if name in self._said else default

    def pop(self, name: str) -> Any:
        """The last statement, taken out."""
        return self._said.pop(name, [None])[-1]

    def taken(self) -> dict[str, Any]:
        """All that were not taken out, the last statement of each."""
        return {name: values[-1] for name, values in sorted(self._said.items())}

    @property
    def conflicts(self) -> list[str]:
        """Sentences on what was said in several ways: several starts or engines in one log."""
        return [
            f"the log says {name} in {len(values)} ways ({', '.join(map(str, values[:5]))[:200]}): the last is taken"
            for name, values in sorted(self._said.items())
            if len(values) > 1
        ]
