"""The report for a terminal."""

from __future__ import annotations

import math

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from calibrate.aggregates import AggregateComparison
from calibrate.attribution import PART_LABELS, PARTS
from calibrate.attribution import SHOWN as ATTRIBUTED
from calibrate.errors import Comparison, MetricErrors
from calibrate.metric_errors import LABELS
from calibrate.reports import gates_section
from calibrate.reports.report import Report
from replay.load_level import percentile
from replay.quality import doubts

NAMES = LABELS
SHOWN = ("mean", "p50", "p90", "p95", "p99")


def view(report: Report) -> RenderableType:
    """Return what rich shows."""
    parts: list[RenderableType] = [
        _title(report),
        Text(report.headline),
        Text(),
        *_findings(report),
        *([] if _aggregates(report) else [_requests(report), Text()]),
        _levels(report),
        Text(),
        *_details(report.comparison),
        _run(report),
        *_attribution(report),
    ]
    if report.judgement is not None:
        parts.append(gates_section.view(report.judgement))
    for label, lines, style in (
        ("conflict", report.deployment.conflicts, "yellow"),
        ("note", report.notes, ""),
        ("data", _remarks(report), ""),
    ):
        parts += [_labelled(label, line, style or "dim") for line in lines]
    return Group(*parts)


def print_report(report: Report, console: Console) -> None:
    """Print it."""
    console.print(view(report))


def _title(report: Report) -> RenderableType:
    trace, deployment = report.trace, report.deployment
    engine = trace.meta.get("engine") or {}
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column()
    version = f"vLLM {engine.get('version') or 'of unknown version'}"
    if engine.get("version") is None and engine.get("name", "vllm") is None:
        version = "unknown engine"
    served = f"{trace.meta.get('model') or 'unknown model'}, {version}"
    grid.add_row("trace", Text.assemble((trace.name, "bold"), f"  {served}, {len(trace)} requests"))
    device = deployment.hardware.name if deployment.hardware else "no hardware"
    degree = deployment.config.tensor_parallel_size
    kind = deployment.loaded.profile.accelerator.kind
    where = f"{degree} x {device}" if degree > 1 else device
    grid.add_row("profile", Text.assemble((deployment.loaded.profile.name, "bold"), f"  {kind}, {where}"))
    return Group(grid, Text())


SHOWN_IDS = 20


def _findings(report: Report) -> list[RenderableType]:
    """What makes the figures below unsure or wrong."""
    parts: list[RenderableType] = []
    for one in doubts(report.findings):
        grid = Table.grid(padding=(0, 1))
        grid.add_column(no_wrap=True)
        grid.add_column()
        style = "red" if one.severity == "error" else "yellow"
        ids = ", ".join(one.requests[:SHOWN_IDS])
        more = ", ..." if len(one.requests) > SHOWN_IDS else ""
        text = Text(_printable(one.sentence + (f" [requests {ids}{more}]" if ids else "")))
        grid.add_row(Text(f"data {one.severity}:", style=style), Text(one.check, style="dim"))
        grid.add_row("", text)
        parts.append(grid)
    return [*parts, Text()] if parts else []


def _remarks(report: Report) -> list[str]:
    """In one line, what else there is to know of the data."""
    names = [one.check.replace("_", " ") for one in report.findings if one.severity == "info"]
    return [f"also noted: {', '.join(names)} (findings in --format json)"] if names else []


def _printable(text: str) -> str:
    """Foreign text without what would steer a terminal."""
    return "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in text)


def _requests(report: Report) -> RenderableType:
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    first = "per request" if report.trace.batches is None else "per batch"
    for column in (first, "pairs", "MAPE", "95 % interval", "median", "bias", "distance"):
        table.add_column(column, justify="left" if column == first else "right", no_wrap=True)
    for name, errors in report.comparison.metrics.items():
        low, high = errors.mape_ci95
        table.add_row(
            NAMES[name],
            f"{errors.n:,}",
            Text(_percent(errors.mape), style="bold"),
            f"{_percent(low)} to {_percent(high)}",
            _percent(errors.median_ape),
            _signed(errors.bias),
            _percent(report.comparison.distances[name].wasserstein),
        )
    for name in report.comparison.unsupported:
        table.add_row(Text(NAMES[name], style="dim"), "-", Text("not measured", style="dim"), "", "", "", "")
    return table


def _levels(report: Report) -> RenderableType:
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    table.add_column("", no_wrap=True)
    metrics = report.comparison.metrics
    shown: tuple[str, ...] = SHOWN
    if _aggregates(report):
        there = {at for errors in metrics.values() for at in errors.percentiles}
        shown = tuple(sorted(there, key=lambda at: percentile(at) or 0.0))
    for name in shown:
        table.add_column(name, justify="right", no_wrap=True)
    anchors = report.comparison.anchors
    served = anchors[report.comparison.anchor].served if anchors else None
    for name, errors in metrics.items():
        unit, scale = _unit(errors)
        table.add_row(f"{NAMES[name]} measured, {unit}", *(_figure(errors, at, "measured", scale) for at in shown))
        table.add_row("  predicted", *(_figure(errors, at, "predicted", scale) for at in shown))
        table.add_row("  error", *(_signed_text(_error(errors, at)) for at in shown))
        if _aggregates(report):
            table.add_row("  of one draw, 95 %", *(_interval(errors, at) for at in shown))
        levels = served.levels.get(name) if served is not None else None
        if served is not None and levels is not None and served.n > report.comparison.num_paired:
            figures = (f"{1e3 * levels[at]:,.1f}" for at in SHOWN)
            table.add_row(f"  all {served.n:,} measured, ms", *figures, style="dim")
    lines = []
    for name, values in report.comparison.throughput.items():
        whole = "makespan, s" if report.trace.batches is None else "all batches, s"
        label = {"output_tokens_per_s": "output tokens/s", "makespan": whole}[name]
        measured, predicted = (_plain(values[side]) for side in ("measured", "predicted"))
        low, high = report.comparison.throughput_ci95.get(name, (math.nan, math.nan))
        within = "" if math.isnan(low) else f" ({_signed(low)} to {_signed(high)})"
        lines.append(f"{label}: {measured} measured, {predicted} predicted, {_signed(values['error'])}{within}")
    return Group(table, Text("\n".join(lines)))


def _aggregates(report: Report) -> bool:
    return isinstance(report.comparison, AggregateComparison)


def _error(errors: MetricErrors, at: str) -> float:
    return errors.percentiles[at].error if at in errors.percentiles else math.nan


def _interval(errors: MetricErrors, at: str) -> str:
    """Errors within which one draw of the same requests would lie."""
    if at not in errors.percentiles:
        return "-"
    low, high = errors.percentiles[at].error_ci95
    return f"{100 * low:+.0f} to {100 * high:+.0f} %"


def _details(comparison: Comparison) -> list[RenderableType]:
    """The worst slices, and both anchors where the trace has them."""
    lines = [f"{one.sentence}." for one in comparison.worst_slices]
    gap = comparison.anchor_gap
    if gap is not None:
        for name, one in comparison.anchors.items():
            errors = (f"{LABELS[metric]} {_percent(found.mape)}" for metric, found in one.metrics.items())
            lines.append(f"mean error per request, counted from {name}: {', '.join(errors)}")
        lines.append(gap.sentence)
    return [Padding(Text("\n".join(lines)), (0, 0, 1, 0))] if lines else []


def _run(report: Report) -> RenderableType:
    coverage, summary = report.comparison.coverage, report.replay.summary
    lines = [f"{coverage['paired']} of {coverage['measured']} requests compared"]
    if _aggregates(report):
        drawn = f"{coverage['draws']} draws" if coverage["draws"] > 1 else "one run"
        lines = [f"mean of {drawn} of {coverage['predicted']} requests; of the first:"]
    excluded = coverage["excluded"]
    if excluded:
        lines[0] += " (left out: " + ", ".join(f"{count} {reason}" for reason, count in excluded.items()) + ")"
    lines.append(
        f"{summary['iterations']:,} iterations, {summary['simulated_seconds']:.1f} s simulated, device busy "
        f"{100 * summary['device_busy']:.0f} %, {summary['cached_tokens']:,} of {summary['prompt_tokens']:,} prompt "
        f"tokens from the prefix cache, {summary['preemptions']} preemptions"
    )
    total = sum(summary["component_seconds"].values()) or 1.0
    shares = sorted(summary["component_seconds"].items(), key=lambda item: -item[1])
    lines.append("time in " + ", ".join(f"{name} {100 * part / total:.1f} %" for name, part in shares if part > 0))
    for name, values in report.comparison.timeline.items():
        label = {"running": "running requests", "waiting": "waiting requests", "kv_usage": "KV use"}[name]
        scale, unit = (100.0, " %") if name == "kv_usage" else (1.0, "")
        lines.append(
            f"{label}: measured mean {scale * values['measured_mean']:.1f}{unit}, predicted "
            f"{scale * values['predicted_mean']:.1f}{unit}, mean absolute difference {scale * values['mae']:.1f}{unit}"
        )
    assumed = report.deployment.assumed
    if assumed:
        lines.append("assumed: " + ", ".join(f"{name}={value}" for name, value in sorted(assumed.items())))
    host = report.deployment.accelerator.host
    if "default" in report.deployment.loaded.profile.host.source:
        lines.append(
            f"assumed: host overhead {1e3 * host.per_step:g} ms per step, {1e6 * host.per_sequence:g} us per sequence"
        )
    return Padding(Text("\n".join(lines)), (0, 0, 1, 0))


def _attribution(report: Report) -> list[RenderableType]:
    """Where errors come from: a table in points, and the sentences."""
    found = report.attribution
    if found is None:
        return []
    parts: list[RenderableType] = []
    if found.parts:
        table = Table(box=None, padding=(0, 2), pad_edge=False, header_style="dim")
        names = [
            name for name in PARTS if any(one.part == name for one in found.parts[next(iter(found.parts))]["mean"])
        ]
        for column in ("error, points", "in all", *(PART_LABELS.get(name, name) for name in names), "+1 % step time"):
            table.add_column(column, justify="left" if column == "error, points" else "right")
        for metric, statistics in found.parts.items():
            for name in ATTRIBUTED:
                points = {share.part: share.points for share in statistics[name]}
                slope = found.load.get(f"sensitivity.{metric}.{name}", math.nan)
                figures = [sum(points.values()), *points.values(), 0.01 * slope]
                table.add_row(f"{NAMES[metric]} {ATTRIBUTED[name]}", *map(_points, figures))
        parts.append(Padding(table, (0, 0, 1, 0)))
    if found.why_not:
        parts.append(_labelled("cause", f"no schedule to hold the prediction against: {found.why_not}"))
    parts += [_labelled("cause", line) for line in found.sentences]
    return [*parts, Text()]


def _labelled(label: str, line: str, style: str = "dim") -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column()
    grid.add_row(Text(f"{label}:", style=style), Text(line))
    return grid


def _points(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:+.1f}"


def _unit(errors: MetricErrors) -> tuple[str, float]:
    return ("ms", 1e3) if max(level.measured for level in errors.percentiles.values()) < 1 else ("s", 1.0)


def _figure(errors: MetricErrors, at: str, side: str, scale: float) -> str:
    value = scale * float(getattr(errors.percentiles[at], side)) if at in errors.percentiles else math.nan
    return "-" if math.isnan(value) else f"{value:,.2f}" if value < 100 else f"{value:,.1f}"


def _plain(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:,.1f}"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:,.{_digits(value)}f} %"


def _signed(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:+,.{_digits(value)}f} %"


def _digits(value: float) -> int:
    """Two, but none from 100 % on: tables stay within 80 columns."""
    return 2 if abs(value) < 0.99995 else 0


def _signed_text(value: float) -> Text:
    if math.isnan(value):
        return Text("-")
    style = "" if abs(value) < 0.05 else "yellow" if abs(value) < 0.15 else "red"
    return Text(f"{100 * value:+.1f} %", style=style)
