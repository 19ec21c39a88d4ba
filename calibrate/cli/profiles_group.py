"""``servecal profiles``: the library of models, hardware and profiles, and the import of operator tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from calibrate.cli.options import output_options, render_text, write_output
from profiles.errors import InputError
from profiles.import_bundle import LINK_BANDWIDTH, LINK_LATENCY, import_bundle
from profiles.library import find_hardware_entry, hardware_entries, library_folder, models, names
from profiles.profile import ROOFLINE, load_profile


@click.group("profiles")
def command() -> None:
    """List, show and import profiles, models and hardware."""


@command.command("list")
@output_options("text", "json")
def list_profiles(style: str, output: Path | None) -> None:
    """List what the library knows."""
    fitted = [load_profile(name).profile for name in names("fitted")]
    document: dict[str, list[dict[str, Any]]] = {
        "profiles": [{"name": one.name, "description": one.description.strip()} for one in fitted],
        "models": [{"name": one.name, "aliases": one.aliases} for one in models()],
        "hardware": [
            {
                "name": one.name,
                "aliases": one.aliases,
                "memory_bytes": one.memory_bytes.value,
                "memory_bandwidth": one.memory_bandwidth.value,
                "bf16_flops": one.peak_flops["bf16"].value if "bf16" in one.peak_flops else None,
            }
            for one in hardware_entries()
        ],
    }
    if style == "json":
        write_output(json.dumps({"schema": "servecal.profiles/1", **document}, indent=1) + "\n", output)
        return
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = []
    for title, columns in (
        ("profiles", ("name", "description")),
        ("models", ("name", "aliases")),
        ("hardware", ("name", "GiB", "GB/s", "bf16 TFLOPS", "aliases")),
    ):
        table = Table(box=None, padding=(0, 2), pad_edge=False, header_style="dim")
        for column in columns:
            table.add_column(column, justify="right" if column[0] in "Gb" else "left")
        for row in document[title]:
            table.add_row(*_cells(title, row))
        parts += [Text(title, style="bold"), table, Text()]
    parts.append(Text("roofline:<hardware> makes a profile of any hardware"))
    text = render_text(Group(*parts), output)
    if text is not None:
        write_output(text, output)


def _cells(title: str, row: dict[str, Any]) -> tuple[str, ...]:
    if title == "profiles":
        return row["name"], row["description"]
    aliases = ", ".join(row["aliases"])
    if title == "models":
        return row["name"], aliases
    flops = row["bf16_flops"]
    return (
        row["name"],
        f"{row['memory_bytes'] / 2**30:.0f}",
        f"{row['memory_bandwidth'] / 1e9:.0f}",
        "-" if flops is None else f"{flops / 1e12:.0f}",
        aliases,
    )


@command.command("show")
@click.argument("name")
def show(name: str) -> None:
    """Show a profile, model or hardware as YAML, each figure with its source."""
    for kind in ("fitted", "models", "hardware"):
        path = library_folder(kind) / f"{name}.yaml"
        if "/" not in name and path.is_file():
            click.echo(path.read_text(encoding="utf-8"), nl=False)
            return
    for entry in models():
        if name.lower() in (alias.lower() for alias in entry.aliases):
            click.echo((library_folder("models") / f"{entry.name}.yaml").read_text(encoding="utf-8"), nl=False)
            return
    if name.startswith(ROOFLINE):
        find_hardware_entry(name.removeprefix(ROOFLINE))
    if Path(name).is_file() or name.startswith(ROOFLINE):
        click.echo(load_profile(name).profile.to_yaml(), nl=False)
        return
    try:
        hardware = find_hardware_entry(name).name
    except InputError:
        raise InputError(f"no profile, model or hardware {name!r} (`servecal profiles list`)") from None
    click.echo((library_folder("hardware") / f"{hardware}.yaml").read_text(encoding="utf-8"), nl=False)


@command.command("import")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--tp", "tensor_parallel_size", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option("--model", help="Library name or config.json, where the bundle's model is not in the library.")
@click.option("--hardware", help="Library name, where the bundle's hardware is not in the library.")
@click.option(
    "--link-latency",
    type=click.FloatRange(min=0),
    default=LINK_LATENCY,
    show_default=True,
    help="Seconds per hop of an all-reduce (only with --tp > 1).",
)
@click.option(
    "--link-bandwidth",
    type=click.FloatRange(min=1),
    default=LINK_BANDWIDTH,
    show_default=True,
    help="Bytes/s of the link between devices (only with --tp > 1).",
)
def import_profile(
    folder: Path,
    tensor_parallel_size: int,
    output: Path,
    model: str | None,
    hardware: str | None,
    link_latency: float,
    link_bandwidth: float,
) -> None:
    """Make a profile of an LLMServingSim operator-table bundle (a folder with meta.yaml and tp<N>/)."""
    profile = import_bundle(
        folder,
        tensor_parallel_size,
        output,
        model=model,
        hardware=hardware,
        link_latency=link_latency,
        link_bandwidth=link_bandwidth,
    )
    click.echo(f"{output}: {profile.name}, tables in {profile.accelerator.options['tables']}/ beside it")
