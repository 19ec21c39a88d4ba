"""Load levels typed in by hand, from a vendor's table or a paper: CSV, or JSON ``"schema": "servecal.load-levels/1"``.

One row a level, one trace a row. ``docs/formats.md`` has the columns.
"""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

from profiles.errors import InputError, found
from replay.load_level import METRICS, MOST_REQUESTS, LoadLevel
from replay.readers.fields import MOST_TOKENS, Record, parse_json, read_text
from replay.readers.opening import head
from replay.trace import Trace, file_facts

FORMAT = "load-levels"
REQUESTS_FILE = ""
SCHEMA = "servecal.load-levels/1"
LOAD = ("level", "rate", "burstiness", "concurrency", "requests")
LENGTHS = ("prompt_tokens", "prompt_tokens_std", "output_tokens", "output_tokens_std")
THROUGHPUT = {
    "duration": "duration",
    "output_throughput": "output_tokens_per_s",
    "request_throughput": "requests_per_s",
}
STATISTIC = re.compile(rf"(mean|median|std|p\d{{1,2}}(?:\.\d+)?)_({'|'.join(METRICS)})(_ms)?")
FEWEST = 200
PER_CLIENT = 10
"""Requests of a level that does not say how many it had: at least ``FEWEST``, and ``PER_CLIENT`` a client."""


def detect(path: Path) -> bool:
    """Whether a file holds a table of load levels."""
    if not path.is_file():
        return False
    start = head(path, 4096).decode("utf-8-sig", errors="replace").lstrip()
    if start.startswith("{"):
        return f'"{SCHEMA}"' in start
    names = [name.strip() for name in start.partition("\n")[0].split(",")]
    return bool({"rate", "concurrency"} & set(names)) and any(map(_is_measured, names))


def selections(path: Path) -> list[str]:
    """Names of the levels of a file."""
    return [_name(row, number) for number, row in enumerate(_rows(path)[1], 1)]


def read(path: Path, selection: str | None = None) -> Trace:
    """Read one level.

    Raises
    ------
    InputError
        Naming file, row and field of what cannot be used, or if the file holds several levels and none was selected.
    """
    document, rows = _rows(path)
    names = [_name(row, number) for number, row in enumerate(rows, 1)]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{names.count(name)} levels are called {name!r}: name each", file=path, field="level")
    if selection is None and len(rows) > 1:
        choices = ", ".join(f"{path.name}#{name}" for name in names)
        raise InputError(f"holds several load levels; name one: {choices}", file=path)
    if selection is not None and selection not in names:
        raise InputError(f"holds no load level {selection!r}; it has {', '.join(names)}", file=path)
    row = rows[names.index(selection) if selection is not None else 0]
    engine = document.get("engine") or {}
    if not isinstance(engine, dict) or not isinstance(engine.get("arguments") or {}, dict):
        raise document.error("engine", 'expected {"version": ..., "arguments": {...}}')
    vantage = document.text("vantage") or "client"
    if vantage not in ("client", "engine"):
        raise document.error("vantage", f"expected client or engine, found {found(vantage)}")
    version = Record(engine, path).text("version")
    meta = {
        "name": f"{path.resolve().stem}#{names[rows.index(row)]}",
        "source": {"format": FORMAT, "files": file_facts([path])},
        "model": document.text("model"),
        "hardware": document.text("hardware"),
        "engine": {"name": "vllm", "version": version, "arguments": engine.get("arguments") or {}},
        "vantage": vantage,
    }
    return _trace(row, meta)


def _rows(path: Path) -> tuple[Record, list[Record]]:
    """The document (empty for a CSV) and its rows."""
    text = read_text(path)
    if not text.lstrip().startswith("{"):
        return Record({}, path), _csv_rows(text, path)
    document = Record(parse_json(text, path, finite=True), path)
    unknown = set(document.values) - {"schema", "model", "hardware", "engine", "vantage", "levels"}
    if unknown:
        raise document.error(min(unknown), "is unknown; expected schema, model, hardware, engine, vantage, levels")
    levels = document.need("levels")
    if not isinstance(levels, list) or not levels or not all(isinstance(one, dict) for one in levels):
        raise document.error("levels", f"expected objects, one a load level, found {found(levels)}")
    return document, [Record(one, path, f"level {place}") for place, one in enumerate(levels, 1)]


def _csv_rows(text: str, path: Path) -> list[Record]:
    lines = csv.reader(io.StringIO(text))
    try:
        header = [name.strip() for name in next(lines)]
        rows = [_record(header, cells, path, lines.line_num) for cells in lines if any(map(str.strip, cells))]
    except csv.Error as error:
        raise InputError(f"is no CSV: {error}", file=path, row=lines.line_num) from None
    if not rows:
        raise InputError("holds no load level, only a header", file=path)
    return rows


def _record(header: list[str], cells: list[str], path: Path, line: int) -> Record:
    """One row of a CSV; empty cells were not measured."""
    if len(cells) != len(header):
        raise InputError(f"has {len(cells)} cells, the header {len(header)}", file=path, row=line)
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise InputError("stands twice in the header", file=path, row=1, field=twice)
    values: dict[str, Any] = {}
    for name, cell in zip(header, map(str.strip, cells), strict=True):
        if not cell:
            continue
        try:
            values[name] = cell if name == "level" or cell == "inf" else float(cell)
        except ValueError:
            raise InputError(f"expected a number, found {found(cell)}", file=path, row=line, field=name) from None
    return Record(values, path, line)


def _is_measured(name: str) -> bool:
    return name in THROUGHPUT or STATISTIC.fullmatch(name) is not None


def _name(row: Record, number: int) -> str:
    for key, label in (("level", ""), ("rate", "rate-"), ("concurrency", "concurrency-")):
        value = row.get(key)
        if value is not None and not (key == "rate" and value == "inf"):
            return f"{label}{value:g}" if isinstance(value, int | float) else label + str(row.text(key))
    return f"level-{number}"


def _trace(row: Record, meta: dict[str, Any]) -> Trace:
    for name in row.values:
        if name not in (*LOAD, *LENGTHS) and not _is_measured(name):
            raise row.error(
                name,
                f"is no column of load levels: expected {', '.join((*LOAD, *LENGTHS, *THROUGHPUT))}, or a statistic "
                "such as mean_ttft, p99_tpot (s) or median_e2e_ms (ms)",
            )
    rate = None if row.get("rate") in (None, "inf") else _number(row, "rate", 1e-6, 1e6)
    clients = None if row.get("concurrency") is None else _whole(row, "concurrency", MOST_REQUESTS)
    if rate is None and clients is None and row.get("rate") is None:
        raise row.error("rate", "is missing, and so is concurrency: expected one of them (rate inf: all at once)")
    said = row.get("requests") is not None
    count = _whole(row, "requests", MOST_REQUESTS) if said else max(FEWEST, PER_CLIENT * (clients or 0))
    means = [_number(row, name, 1.0, MOST_TOKENS) for name in ("prompt_tokens", "output_tokens")]
    spreads = [_number(row, f"{name}_std", 0.0, MOST_TOKENS, 0.0) for name in ("prompt_tokens", "output_tokens")]
    for name, mean, spread in zip(("prompt_tokens", "output_tokens"), means, spreads, strict=True):
        if spread > 5 * mean:
            raise row.error(f"{name}_std", f"expected at most five times the mean ({mean:g}), found {spread:g}")
    level = LoadLevel(
        requests=count,
        prompt_tokens=means[0],
        output_tokens=means[1],
        rate=rate,
        burstiness=_number(row, "burstiness", 1e-3, 1e6, 1.0),
        max_concurrency=clients,
        prompt_tokens_std=spreads[0],
        output_tokens_std=spreads[1],
        lengths_known=all(spread > 0 or mean.is_integer() for mean, spread in zip(means, spreads, strict=True)),
    )
    notes = ["load level of a table: requests are drawn, and compared as aggregates only"]
    if not said:
        notes.append(f"the table does not say how many requests were sent: {count} are assumed")
    lengths = {
        name: f"assumed: drawn, gamma of mean {mean:g} and deviation {spread:g}"
        if spread
        else f"assumed: {mean:g} each"
        for name, mean, spread in zip(("prompt_tokens", "output_tokens"), means, spreads, strict=True)
    }
    return level.trace({**meta, "aggregates": _aggregates(row), "notes": notes}, lengths)


def _aggregates(row: Record) -> dict[str, dict[str, float]]:
    aggregates: dict[str, dict[str, float]] = {}
    for key, value in row.values.items():
        match = STATISTIC.fullmatch(key)
        if value is None or not _is_measured(key):
            continue
        if match is None:
            aggregates.setdefault("throughput", {})[THROUGHPUT[key]] = row.seconds(key, positive=True)
            continue
        statistic = {"median": "p50"}.get(match[1], match[1])
        own = aggregates.setdefault(match[2], {})
        if statistic in own:
            raise row.error(key, f"gives {statistic} of {match[2]} a second time")
        own[statistic] = row.seconds(key, positive=match[1] != "std", unit=1e-3 if match[3] else 1.0)
    if not aggregates:
        raise row.error(None, "holds no statistic: expected such as mean_ttft, p99_tpot_ms or output_throughput")
    return aggregates


def _number(row: Record, name: str, least: float, most: float, default: float | None = None) -> float:
    value = row.get(name)
    if value is None and default is not None:
        return default
    if value is None:
        raise row.error(name, "is missing")
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise row.error(name, f"expected a number from {least:g} to {most:g}, found {found(value)}")
    return float(value)


def _whole(row: Record, name: str, most: int) -> int:
    value = _number(row, name, 1, most)
    if not value.is_integer():
        raise row.error(name, f"expected a whole number, found {found(value)}")
    return int(value)
