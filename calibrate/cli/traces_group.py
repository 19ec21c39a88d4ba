"""``servecal traces``: the library of reference traces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pyarrow.parquet as pq

from calibrate.cli.options import keep_trace, load_trace, output_options, render_text, write_output
from profiles.errors import InputError
from reference_traces.library import Entry, cache_folder, captures, catalogue, fetch, find_entry, is_complete
from replay.readers import read_trace


@click.group("traces")
def command() -> None:
    """List, show and fetch reference traces.

    Downloads go to the folder in SERVECAL_TRACES, else to the user's cache; a folder that already holds the
    files needs no network.
    """


@command.command("list")
@output_options("text", "json")
def list_traces(style: str, output: Path | None) -> None:
    """List the captures in the package and the catalogued public traces."""
    rows = [_capture_row(path) for path in captures()] + [_entry_row(entry) for entry in catalogue()]
    if style == "json":
        write_output(json.dumps({"schema": "servecal.traces/1", "traces": rows}, indent=1) + "\n", output)
        return
    from rich.table import Table

    table = Table(box=None, padding=(0, 2), pad_edge=False, header_style="dim")
    for column in ("name", "here", "requests", "size", "licence", "title"):
        table.add_column(
            column, no_wrap=column != "title", justify="right" if column in ("requests", "size") else "left"
        )
    for row in rows:
        size = f"{row['bytes'] / 1e6:.1f} MB" if row["bytes"] else "?"
        here = "bundled" if row["bundled"] else "yes" if row["here"] else "no"
        count = "?" if row["requests"] is None else f"{row['requests']:,}"
        table.add_row(row["name"], here, count, size, row["licence"], row["title"])
    text = render_text(table, output)
    if text is not None:
        write_output(text, output)


@command.command("show")
@click.argument("name")
@output_options("text", "json")
def show(name: str, style: str, output: Path | None) -> None:
    """Show one trace: source, licence, engine arguments, files."""
    for path in captures():
        if path.name == name:
            document = {"name": name, "path": str(path), **read_trace(path).meta}
            break
    else:
        document = _entry(name).model_dump(by_alias=True, mode="json")
        document |= {"here": is_complete(_entry(name)), "folder": str(cache_folder() / name)}
    if style == "json":
        write_output(json.dumps(document, indent=1) + "\n", output)
        return
    import yaml

    write_output(yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=110), output)


@command.command("fetch")
@click.argument("names", nargs=-1, required=True)
def fetch_traces(names: tuple[str, ...]) -> None:
    """Download traces and check their sha256; files that are there already are only checked.

    A download that broke off is continued by the next.
    """
    for name in names:
        entry = _entry(name)
        folder, unverified = fetch(entry)
        click.echo(f"{name}: {len(entry.files)} files in {folder} ({entry.licence}, {entry.attribution})")
        for one in unverified:
            click.echo(f"not verified: the catalogue knows no checksum of {one}")


@command.command("export")
@click.argument("trace")
@click.option("--format", "style", type=click.Choice(["blis"]), default="blis", show_default=True)
@click.option("--arrivals", default="measured", show_default=True, help="As for `servecal replay`.")
@click.option(
    "-o", "--output", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder to write."
)
def export(trace: str, style: str, arrivals: str, output: Path) -> None:
    """Write TRACE, measured or predicted, in another tool's format.

    blis: TraceV2 of inference-sim (trace.yaml, trace.csv, and trace.itl.csv with the times of tokens).
    """
    from replay.writers.blis_trace import write_blis

    loaded = load_trace(trace, arrivals)
    keep_trace(trace, output)
    lost = write_blis(loaded, output)
    click.echo(f"{output}: {len(loaded)} requests as {style}")
    for sentence in lost:
        click.echo(sentence)


def _entry(name: str) -> Entry:
    entry = find_entry(name)
    if entry is None:
        raise InputError(f"no trace {name!r} in the catalogue (`servecal traces list`)")
    return entry


def _entry_row(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "title": entry.title,
        "bundled": False,
        "here": is_complete(entry),
        "requests": entry.requests,
        "bytes": entry.size,
        "licence": entry.licence,
        "format": entry.format,
        "model": entry.model,
        "hardware": entry.hardware,
    }


def _capture_row(path: Path) -> dict[str, Any]:
    canonical = (path / "trace.json").is_file()
    # Of a canonical trace the tables are not needed.
    trace = None if canonical else read_trace(path)
    meta = trace.meta if trace else json.loads((path / "trace.json").read_text(encoding="utf-8"))
    return {
        "name": path.name,
        "title": meta.get("title") or ("one run recorded by engine and client" if trace else meta.get("name", "")),
        "bundled": True,
        "here": True,
        "requests": len(trace) if trace else pq.read_metadata(path / "requests.parquet").num_rows,
        "bytes": sum(file.stat().st_size for file in path.iterdir()),
        "licence": "Apache-2.0",
        "format": "servecal" if canonical else str(meta["source"]["format"]),
        "model": meta.get("model"),
        "hardware": meta.get("hardware"),
    }
