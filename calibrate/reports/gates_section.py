"""Gates as a section of a text, and as JSON has them."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from calibrate.gates import UNSIGNED, GateResult, Judgement

STYLES = {"pass": "green", "fail": "red", "inconclusive": "yellow"}


def view(judgement: Judgement) -> RenderableType:
    """Return what rich shows: a line a gate, why those did not pass that did not, the verdict."""
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    table.add_column("gate", overflow="fold")
    for column in ("limit", "off by", "95 % interval"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for one in judgement.results:
        low, high = (value(one, bound) for bound in one.ci95)
        known = not math.isnan(one.ci95[0]) and one.metric != "coverage"
        verdict = Text(one.verdict, style=STYLES[one.verdict])
        table.add_row(Text(one.name), limit(one), value(one, one.value), f"{low} to {high}" if known else "", verdict)
    parts: list[RenderableType] = [table, Text(judgement.headline, style=f"bold {STYLES[judgement.verdict]}")]
    for one in judgement.results:
        if one.verdict != "pass":
            parts.append(Text.assemble((f"{one.name}: ", STYLES[one.verdict]), one.sentence))
    if judgement.noise:
        parts.append(Text(f"noise: {judgement.noise}", style="dim"))
    return Group(*parts, Text())


def as_dicts(judgement: Judgement | None) -> list[dict[str, Any]]:
    """Gates for JSON."""
    return [] if judgement is None else [asdict(one) for one in judgement.results]


def limit(one: GateResult) -> str:
    """Its limit in words: percent, or points against a baseline."""
    if one.against == "baseline":
        return f"+{100 * one.limit:.3g} points"
    return f"{100 * one.limit:.4g} %"


def value(one: GateResult, figure: float) -> str:
    """A figure of a gate in the unit of its limit."""
    if math.isnan(figure):
        return "-"
    if one.against == "baseline":
        return f"{100 * figure:+.2f}"
    signed = one.statistic not in UNSIGNED and one.metric != "coverage"
    return f"{100 * figure:+.2f} %" if signed else f"{100 * figure:.2f} %"
