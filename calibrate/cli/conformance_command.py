"""``servecal conformance``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from calibrate.cli.options import load_trace, output_options, render_text, write_output
from calibrate.conformance import Conformance, Divergence, check_golden, check_recording
from profiles.errors import InputError
from replay.golden_schedules import is_golden, read_golden
from replay.run import facts_of
from simulator.engine_config import resolve_engine_config
from simulator.errors import SimulationError

DIFFERENT = 1
SHOWN_EQUAL = 3
"""Equal items of two batches that are shown in a row before the rest of them is left out."""


@click.command("conformance")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@output_options("text", "json")
def command(files: tuple[str, ...], style: str, output: Path | None) -> int:
    """Compare the simulated schedule with vLLM's own, iteration by iteration.

    FILE is a golden schedule (made by vLLM's scheduler under a virtual clock), or a trace with recorded
    iterations: path, or name from `servecal traces list`. Exits 1 if any differs.
    """
    results = [_check(name) for name in files]
    identical = all(one.identical for one in results)
    if style == "json":
        document = {
            "schema": "servecal.conformance/1",
            "identical": identical,
            "schedules": len(results),
            "iterations": sum(one.iterations for one in results),
            "files": [one.as_dict() for one in results],
        }
        write_output(json.dumps(document, indent=1) + "\n", output)
    else:
        text = render_text(_view(results), output)
        if text is not None:
            write_output(text, output)
    return 0 if identical else DIFFERENT


def _check(name: str) -> Conformance:
    path = Path(name)
    if is_golden(path) and path.name != "trace.json":
        return check_golden(read_golden(path))
    trace = load_trace(name)
    if trace.iterations is None:
        raise InputError("has no recorded iterations, and is no golden schedule", file=name)
    facts = facts_of(trace)
    arguments = facts.arguments or {}
    if not arguments.get("num_gpu_blocks"):
        raise InputError("does not say the engine's num_gpu_blocks", file=name, field="engine.arguments")
    try:
        config = resolve_engine_config(arguments, version=facts.version).config.validate()
    except SimulationError as error:
        raise InputError(str(error), file=name) from None
    return check_recording(trace, config, name)


def _view(results: list[Conformance]) -> Any:
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = []
    for one in results:
        if one.divergence is not None:
            parts += [Text(f"{one.file} ({one.engine})", style="bold"), *_explain(one.divergence), Text()]
    same = [one for one in results if one.identical]
    iterations = sum(one.iterations for one in same)
    if len(same) == len(results):
        parts.append(Text(f"identical: {iterations} iterations in {len(same)} schedules"))
    else:
        parts.append(
            Text(
                f"different: {len(results) - len(same)} of {len(results)} schedules; the others are identical "
                f"({iterations} iterations)"
            )
        )
    return Group(*parts)


def _explain(divergence: Divergence) -> list[Any]:
    from rich.text import Text

    where = "in a request's result" if divergence.iteration is None else f"at iteration {divergence.iteration}"
    lines: list[Any] = [Text(f"first differs {where}, in {', '.join(divergence.fields)}")]
    if divergence.reason:
        lines.append(Text(f"the simulation ended there: {divergence.reason}"))
    if divergence.before is not None:
        lines += [Text("state before (the last iteration on which both agree):"), _state(divergence.before)]
    lines.append(_side_by_side(divergence))
    return lines


def _state(iteration: Mapping[str, Any]) -> Any:
    from rich.text import Text

    counts = ", ".join(f"{key} {value}" for key, value in iteration.items() if key != "items")
    items = "  ".join(_item(item) for item in iteration.get("items", ()))
    return Text(f"  {counts}\n  {items}")


def _item(item: Any) -> str:
    name, computed, scheduled = item
    return f"{name} {computed}+{scheduled}"


def _side_by_side(divergence: Divergence) -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2), pad_edge=False, header_style="dim")
    for column in ("", "vLLM", "simulated"):
        table.add_column(column)
    left, right = divergence.expected or {}, divergence.simulated or {}
    for key in [key for key in (left or right) if key != "items"]:
        mark = "bold" if key in divergence.fields else ""
        table.add_row(key, str(left.get(key, "-")), str(right.get(key, "-")), style=mark)
    mine, theirs = left.get("items", ()), right.get("items", ())
    label, same = "batch", 0
    for place in range(max(len(mine), len(theirs))):
        pair = [_item(side[place]) if place < len(side) else "-" for side in (mine, theirs)]
        same = same + 1 if pair[0] == pair[1] else 0
        if same <= SHOWN_EQUAL:
            table.add_row(label, *pair, style="" if same else "bold")
        elif same == SHOWN_EQUAL + 1:
            table.add_row("", "...", "...", style="dim")
        label = ""
    return table
