"""``servecal ingest``: logs of any format to one canonical trace, and what is known and unknown of the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from calibrate.cli.options import parts_of, read_source, source_paths, strict_option, strictly
from calibrate.reports.json_report import clean
from profiles.errors import InputError
from replay.joining import VANTAGES, in_short, join, role_of
from replay.missing import Missing, missing
from replay.quality import Finding, doubts, examine
from replay.trace import REQUEST_CLOCK, Trace

SCHEMA = "servecal.ingest/1"
SHOWN_IDS = 8


@click.command("ingest")
@click.argument("sources", nargs=-1, required=True, metavar="SRC...")
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the trace (trace.json and Parquet). Without it, nothing is written.",
)
@click.option(
    "--vantage",
    type=click.Choice(VANTAGES),
    help="Whose first and last tokens the latencies mean, if both are known. [default: engine]",
)
@strict_option
@click.option("--format", "style", type=click.Choice(["text", "json"]), default="text", show_default=True)
def command(sources: tuple[str, ...], output: Path | None, vantage: str | None, strict: bool, style: str) -> int:
    """Read the sources of one run, join them, and write one trace.

    SRC is a file or folder of any format (client results, engine recordings, server logs, metrics, workloads), or the
    name of a trace. Says what was found, where each column comes from, and what would tell what remains unknown.
    """
    if output is not None:
        _keep_sources(sources, output)
    sources = tuple(part for one in sources for part in parts_of(one))
    traces = [read_source(one) for one in sources]
    trace = join(traces, vantage)
    findings = examine(trace) if len(trace) else ()
    unknown = missing(trace)
    if output is not None:
        trace.save(output)
    if style == "json":
        document = _document(trace, traces, sources, unknown, findings, output)
        click.echo(json.dumps(clean(document), indent=1, allow_nan=False, ensure_ascii=False))
    else:
        click.echo(_text(trace, traces, sources, unknown, findings, output), nl=False)
    if not strict:
        return 0
    conflicts = [f"conflict ({one['what']})" for one in _joined(trace).get("conflicts", [])]
    return strictly([*conflicts, *(f"{one.check} ({one.severity})" for one in doubts(findings))])


def _keep_sources(sources: Sequence[str], output: Path) -> None:
    """Refuse to write over, or into, what is read."""
    target = output.resolve()
    for name in sources:
        for path in source_paths(name):
            if target in (path.resolve(), path.resolve().parent):
                raise InputError(f"holds the source {name}; choose another folder", file=output)


def _joined(trace: Trace) -> dict[str, Any]:
    return dict(trace.meta.get("joined") or {})


def _span(trace: Trace) -> float | None:
    """Seconds from the first stamp to the last, None where they share no clock."""
    if trace.clock == REQUEST_CLOCK:
        return None
    stamps = [trace.column(name) for name in ("arrival", "queued", "first_token", "last_token")]
    if trace.timeline is not None and not len(trace):
        stamps.append(trace.timeline.column("time").to_numpy(zero_copy_only=False))
    there = np.concatenate(stamps)
    there = there[~np.isnan(there)]
    return float(np.ptp(there)) if there.size else None


def _found(trace: Trace, name: str) -> dict[str, Any]:
    """What one source holds."""
    return {
        "source": name,
        "format": (trace.meta.get("source") or {}).get("format"),
        "role": role_of(trace),
        "requests": len(trace),
        "seconds": _span(trace),
        "samples": 0 if trace.timeline is None else trace.timeline.num_rows,
        "iterations": 0 if trace.iterations is None else trace.iterations.num_rows,
        "iteration_counts": 0 if trace.iteration_counts is None else trace.iteration_counts.num_rows,
        "engine": trace.meta.get("engine"),
        "files": (trace.meta.get("source") or {}).get("files"),
    }


def _document(
    trace: Trace,
    traces: Sequence[Trace],
    names: Sequence[str],
    unknown: Sequence[Missing],
    findings: Sequence[Finding],
    output: Path | None,
) -> dict[str, Any]:
    meta = trace.meta
    return {
        "schema": SCHEMA,
        "output": None if output is None else str(output),
        "trace": {
            "name": trace.name,
            "requests": len(trace),
            "seconds": _span(trace),
            **{name: meta.get(name) for name in ("model", "hardware", "engine", "vantage", "clock", "notes")},
        },
        "sources": [_found(one, name) for one, name in zip(traces, names, strict=True)],
        "joined": meta.get("joined"),
        "columns": meta.get("columns"),
        "unknown": [asdict(one) for one in unknown],
        "findings": [asdict(one) for one in findings],
    }


def _text(
    trace: Trace,
    traces: Sequence[Trace],
    names: Sequence[str],
    unknown: Sequence[Missing],
    findings: Sequence[Finding],
    output: Path | None,
) -> str:
    """The same for people."""
    lines = ["sources"]
    lines += [f"  {name}: {_source_line(one)}" for one, name in zip(traces, names, strict=True)]
    notes = trace.meta.get("notes") or []
    if notes:
        lines += ["", "how they were joined" if len(traces) > 1 else "notes", *(f"  {one}" for one in notes)]
    lines += _front_end_lines(_joined(trace).get("front_end"))
    for one in _joined(trace).get("conflicts", []):
        lines.append(f"conflict: {_conflict_line(one)}")
    lines += ["", "columns", *_column_lines(trace), "", *_engine_lines(trace)]
    if unknown:
        lines += ["", "unknown, and what would tell"]
        for missed in unknown:
            lines += [f"  {missed.what}: {missed.costs}", f"    {missed.supply}"]
    lines += ["", *(_finding_line(one) for one in findings)] if findings else []
    if output is not None:
        lines += ["", f"{output}: {len(trace):,} requests"]
    return "".join(f"{_printable(line)}\n" for line in lines)


def _printable(text: str) -> str:
    """Foreign text without what would steer a terminal."""
    return "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in text)


def _source_line(trace: Trace) -> str:
    held = [f"{len(trace):,} requests"] if len(trace) else []
    if trace.iterations is not None:
        held.append(f"{trace.iterations.num_rows:,} iterations")
    if trace.timeline is not None:
        held.append(f"{trace.timeline.num_rows:,} samples of gauges")
    span = _span(trace)
    if span is not None:
        held.append(f"{span:,.1f} s")
    engine = trace.meta.get("engine") or {}
    if engine.get("version"):
        held.append(f"{engine.get('name') or 'engine'} {engine['version']}")
    told = len(engine.get("arguments") or {})
    if told:
        held.append(f"{told} engine arguments")
    kind = {"engine": "engine stamps", "client": "seen by a client", "workload": "a workload", "facts": "no requests"}
    form = (trace.meta.get("source") or {}).get("format") or "servecal"
    return f"{form}, {kind[role_of(trace)]}: {', '.join(held) or 'nothing'}"


def _front_end_lines(found: dict[str, Any] | None) -> list[str]:
    """What the client's latencies hold besides the engine's."""
    if not found:
        return []
    names = {
        "ttft": "client's TTFT less the engine's",
        "to_engine": "from client to engine",
        "to_client": "from engine to client",
    }
    lines = []
    for name, called in names.items():
        one = found.get(name)
        if not one:
            continue
        figures = ", ".join(f"{key} {1e3 * one[key]:.2f}" for key in ("mean", "min", "p50", "p90", "max") if key in one)
        off = f" (± {1e3 * found['error']:.2f})" if name != "ttft" and found.get("error") else ""
        lines.append(f"  {called}: {figures} ms{off}")
    return ["", f"front end ({found['of']})" if "of" in found else "front end", *lines]


def _conflict_line(one: dict[str, Any]) -> str:
    said: dict[str, list[str]] = {}
    for label, value in one["values"].items():
        said.setdefault(str(value), []).append(label)
    values = ", ".join(f"{value} ({in_short(labels)})" for value, labels in said.items())
    return f"{one['what']}: {values}; taken: that of {one['taken']}" + (f"; {one['extent']}" if one["extent"] else "")


def _column_lines(trace: Trace) -> list[str]:
    """Columns that hold anything, those of equal origin in one line."""
    by_origin: dict[str, list[str]] = {}
    for name, origin in (trace.meta.get("columns") or {}).items():
        if trace.has(name) and name not in ("id", "status"):
            by_origin.setdefault(str(origin), []).append(name)
    lines = [f"  {origin}: {', '.join(names)}" for origin, names in by_origin.items()]
    for name in ("iterations", "iteration_counts", "timeline", "batches"):
        table = getattr(trace, name)
        if table is not None:
            lines.append(f"  {name}: {table.num_rows:,} rows")
    return lines or ["  none"]


def _engine_lines(trace: Trace) -> list[str]:
    engine = trace.meta.get("engine") or {}
    version = engine.get("version") or "of unknown version"
    model, hardware = trace.meta.get("model") or "unknown", trace.meta.get("hardware") or "unknown"
    lines = [f"engine: {engine.get('name') or 'unknown'} {version}; model: {model}; hardware: {hardware}"]
    arguments = engine.get("arguments") or {}
    if arguments:
        lines.append("  " + ", ".join(f"{name}={value}" for name, value in sorted(arguments.items())))
    return lines


def _finding_line(one: Finding) -> str:
    ids = ", ".join(one.requests[:SHOWN_IDS]) + (", ..." if len(one.requests) > SHOWN_IDS else "")
    return f"data {one.severity}: {one.check}: {one.sentence}" + (f" [requests {ids}]" if ids else "")
