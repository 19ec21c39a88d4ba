"""The report for a terminal."""

from __future__ import annotations

import math

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from calibrate.errors import Comparison, MetricErrors
from calibrate.metric_errors import LABELS
from calibrate.reports.report import Report

NAMES = LABELS
SHOWN = ("mean", "p50", "p90", "p95", "p99")


def view(report: Report) -> RenderableType:
    """Return what rich shows."""
    parts: list[RenderableType] = [
        _title(report),
        Text(report.headline),
        Text(),
        _requests(report),
        Text(),
        _levels(report),
        Text(),
        *_details(report.comparison),
        _run(report),
    ]
    for label, lines, style in (
        ("conflict", report.deployment.conflicts, "yellow"),
        ("note", report.notes, ""),
    ):
        for line in lines:
            grid = Table.grid(padding=(0, 1))
            grid.add_column(no_wrap=True)
            grid.add_column()
            grid.add_row(Text(f"{label}:", style=style or "dim"), Text(line))
            parts.append(grid)
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
    for name in SHOWN:
        table.add_column(name, justify="right", no_wrap=True)
    served = report.comparison.anchors[report.comparison.anchor].served
    for name, errors in report.comparison.metrics.items():
        unit, scale = _unit(errors)
        table.add_row(f"{NAMES[name]} measured, {unit}", *(_figure(errors, at, "measured", scale) for at in SHOWN))
        table.add_row("  predicted", *(_figure(errors, at, "predicted", scale) for at in SHOWN))
        table.add_row("  error", *(_signed_text(errors.percentiles[at].error) for at in SHOWN))
        levels = served.levels.get(name)
        if levels is not None and served.n > report.comparison.num_paired:
            figures = (f"{1e3 * levels[at]:,.1f}" for at in SHOWN)
            table.add_row(f"  all {served.n:,} measured, ms", *figures, style="dim")
    lines = []
    for name, values in report.comparison.throughput.items():
        whole = "makespan, s" if report.trace.batches is None else "all batches, s"
        label = {"output_tokens_per_s": "output tokens/s", "makespan": whole}[name]
        measured, predicted = (_plain(values[side]) for side in ("measured", "predicted"))
        low, high = report.comparison.throughput_ci95[name]
        within = "" if math.isnan(low) else f" ({_signed(low)} to {_signed(high)})"
        lines.append(f"{label}: {measured} measured, {predicted} predicted, {_signed(values['error'])}{within}")
    return Group(table, Text("\n".join(lines)))


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


def _unit(errors: MetricErrors) -> tuple[str, float]:
    return ("ms", 1e3) if errors.percentiles["p99"].measured < 1 else ("s", 1.0)


def _figure(errors: MetricErrors, at: str, side: str, scale: float) -> str:
    value = scale * float(getattr(errors.percentiles[at], side))
    return "-" if math.isnan(value) else f"{value:,.2f}" if value < 100 else f"{value:,.1f}"


def _plain(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:,.1f}"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.2f} %"


def _signed(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:+.2f} %"


def _signed_text(value: float) -> Text:
    if math.isnan(value):
        return Text("-")
    style = "" if abs(value) < 0.05 else "yellow" if abs(value) < 0.15 else "red"
    return Text(f"{100 * value:+.1f} %", style=style)
