"""A difference for a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from calibrate.differences import Difference, ProfileDifference, ReportDifference, TraceDifference
from calibrate.errors import Level
from calibrate.estimates import Interval
from calibrate.reports import gates_section
from calibrate.reports.text_report import NAMES, SHOWN
from calibrate.run_pairs import Unpaired
from profiles.profile import LoadedProfile
from replay.trace import Trace

PAIRED = {
    "id": "by id",
    "order": "in order of arrival",
    "none": "not at all: distributions side by side",
}


def view(found: Difference) -> RenderableType:
    """Return what rich shows."""
    if isinstance(found, TraceDifference):
        parts = [_sides(_trace(found.a), _trace(found.b)), *_differences(found)]
    elif isinstance(found, ProfileDifference):
        parts = _profiles(found)
    else:
        parts = _reports(found)
    if found.judgement is not None:
        parts.append(gates_section.view(found.judgement))
    return Group(*parts)


def _sides(a: Text, b: Text) -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column()
    grid.add_row("A", a)
    grid.add_row("B", b)
    return Group(grid, Text())


def _trace(trace: Trace) -> Text:
    engine = trace.meta.get("engine") or {}
    served = f"{trace.meta.get('model') or 'unknown model'}, vLLM {engine.get('version') or 'of unknown version'}"
    return Text.assemble((trace.name, "bold"), f"  {served}, {len(trace)} requests")


def _profile(loaded: LoadedProfile) -> Text:
    return Text.assemble((loaded.profile.name, "bold"), f"  {loaded.profile.accelerator.kind}")


def _differences(found: TraceDifference) -> list[RenderableType]:
    compared = found.pairing.compared
    paired = f"paired {PAIRED[found.pairing.kind]}"
    parts: list[RenderableType] = []
    if isinstance(compared, Unpaired):
        parts.append(_distances(compared))
    else:
        counts = compared.coverage
        paired += f", {counts['paired']} of {counts['measured']} requests"
        if counts["excluded"]:
            names = {"not_predicted": "not served in B", "only_predicted": "only in B"}
            said = [f"{count} {names.get(why, why)}" for why, count in counts["excluded"].items()]
            paired += f" (left out: {', '.join(said)})"
        table = _table("per request", "pairs", "mean abs", "95 % interval", "median", "bias")
        for name, errors in compared.metrics.items():
            bounds = _interval(errors.mape_ci95, _percent)
            table.add_row(
                NAMES[name],
                f"{errors.n:,}",
                _percent(errors.mape),
                bounds,
                _percent(errors.median_ape),
                _signed(errors.bias),
            )
        parts += [table, Text()]
    parts.append(_levels((name, one.percentiles) for name, one in compared.metrics.items()))
    labels = {"output_tokens_per_s": "output tokens/s", "makespan": "makespan, s"}
    for name, one in compared.throughput.items():
        parts.append(
            Text(f"{labels[name]}: {_plain(one['measured'])} A, {_plain(one['predicted'])} B, {_signed(one['error'])}")
        )
    notes = [Text(f"note: {note}") for note in found.pairing.notes]
    return [Text(paired), Text(), *parts, *notes, Text()]


def _distances(compared: Unpaired) -> RenderableType:
    table = _table("distribution", "A", "B", "KS distance")
    for name, one in compared.metrics.items():
        table.add_row(NAMES[name], f"{one.n[0]:,}", f"{one.n[1]:,}", f"{one.distance:.3f}")
    return Group(table, Text())


def _levels(metrics: Iterable[tuple[str, Mapping[str, Level]]]) -> RenderableType:
    table = _table("level", "A", "B", "difference", "95 % interval")
    for name, levels in metrics:
        unit, scale = ("ms", 1e3) if levels["p99"].measured < 1 else ("s", 1.0)
        for at in SHOWN:
            level = levels[at]
            values = (_plain(scale * value) for value in (level.measured, level.predicted))
            row = (*values, _signed(level.error), _interval(level.error_ci95, _signed))
            table.add_row(f"{NAMES[name]} {at}, {unit}", *row)
    return Group(table, Text())


def _profiles(found: ProfileDifference) -> list[RenderableType]:
    parts: list[RenderableType] = [_sides(_profile(found.a), _profile(found.b))]
    table = _table("coefficient", "A", "B", "difference", "95 % interval", "moved")
    for one in found.coefficients:
        moved = {True: Text("yes", style="yellow"), False: Text("no"), None: Text("?", style="dim")}[one.moved]
        table.add_row(
            Text(one.name),
            _number(one.a),
            _number(one.b),
            _number(one.difference, "+"),
            _interval(one.difference_ci95, lambda value: _number(value, "+")),
            moved,
        )
    parts += [table, Text()]
    if found.settings:
        table = _table("setting", "A", "B")
        for name, a, b in found.settings:
            table.add_row(Text(name), *(Text(_setting(value)) for value in (a, b)))
        parts += [table, Text()]
    parts += [Text(one) for one in found.sentences]
    if found.on is not None:
        parts += [Text(), Text(f"both replay {found.on.measured.name}:"), *_differences(found.on.between)]
        table = _table("error against the measured run", "A, MAPE", "B, MAPE")
        mine, theirs = (one.metrics for one in found.on.errors)
        for name in mine:
            if name in theirs:
                table.add_row(NAMES[name], _percent(mine[name].mape), _percent(theirs[name].mape))
        parts.append(table)
    return [*parts, Text()]


def _reports(found: ReportDifference) -> list[RenderableType]:
    titles = []
    for report in (found.a, found.b):
        trace, profile = report.document.trace, report.document.profile
        coverage = report.document.coverage
        titles.append(
            Text.assemble(
                (str(report.file), "bold"),
                f"  {trace.name} with {profile.name}, {coverage.paired} of {coverage.measured} requests compared",
            )
        )
    table = _table("error", "A", "B", "growth", "95 % interval", "beyond noise")
    for one in found.statistics:
        changed = {True: "yes", False: "no", None: "?"}[one.changed]
        bounds = _interval(one.growth_ci95, _points)
        growth = _points(one.growth)
        table.add_row(Text(f"{one.metric}.{one.statistic}"), _signed(one.a), _signed(one.b), growth, bounds, changed)
    return [
        _sides(*titles),
        table,
        Text("growth of the error's size in points; beyond noise: its interval leaves out 0"),
        Text(),
        *(Text(one) for one in found.sentences),
        Text(),
    ]


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _interval(bounds: Interval, shown: Callable[[float], str]) -> str:
    if math.isnan(bounds[0]):
        return "-"
    return f"{shown(bounds[0])} to {shown(bounds[1])}"


def _setting(value: object) -> str:
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _plain(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:,.2f}" if value < 100 else f"{value:,.1f}"


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None or math.isnan(value) else f"{value:{sign}.4g}"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.2f} %"


def _signed(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:+.2f} %"


def _points(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:+.2f}"
