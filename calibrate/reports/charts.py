"""Charts of the HTML page, drawn by Bokeh.

Colours come from the page's style sheet once it is shown (``page/page.js``), so that charts follow light and dark; a
glyph's tag names its role there. Text of a trace appears in hover boxes only, which Bokeh fills as text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from bokeh.core.json_encoder import serialize_json
from bokeh.document import Document
from bokeh.models import ColumnDataSource, HoverTool, Legend, LegendItem, NumeralTickFormatter, Span
from bokeh.plotting import figure

from calibrate.attribution import PARTS, Attribution
from calibrate.reports.figures import number, percent, seconds, signed
from calibrate.reports.points import Points
from calibrate.reports.report import Report
from calibrate.reports.tables import named, points_by_part

Floats = npt.NDArray[np.float64]
Figure = Any

HEIGHT = 300
STEPS = 500
"""Points of a distribution function; its least and its greatest value are among them."""
SAMPLES = 2_000
"""Points of a time series."""
CROWDED = 2_000
"""Points of a chart beyond which they are drawn smaller and paler."""
MEDIANS = 20
"""Groups of neighbours of which a running median is drawn."""
SIDES = ("measured", "predicted")
SERIES = {
    "running": ("Running requests", "requests", 1.0),
    "waiting": ("Waiting requests", "requests", 1.0),
    "in_flight": ("Requests in flight", "requests", 1.0),
    "kv_usage": ("KV blocks in use", "% of all blocks", 100.0),
    "output_tokens_per_s": ("Throughput", "output tokens/s", 1.0),
}
STACKED = ("mean", "p50", "p99")
"""Statistics whose error is drawn by cause."""
_MODEL_ID = re.compile(r"p\d+")


@dataclass(frozen=True)
class Chart:
    """One chart: its element's id, heading, what it shows in words, a remark, its height in pixels."""

    id: str
    title: str
    alternative: str
    note: str
    height: int


@dataclass(frozen=True)
class Charts:
    """All charts, by section of the page, and what BokehJS draws them from."""

    sections: Mapping[str, Sequence[Chart]]
    document: Mapping[str, Any]
    roots: Mapping[str, str]


class _Drawing:
    """Collects figures and their charts."""

    def __init__(self) -> None:
        self.document = Document()
        self.sections: dict[str, list[Chart]] = {}
        self._places: list[str] = []

    def add(self, section: str, plot: Figure, title: str, alternative: str, note: str = "") -> None:
        place = f"chart-{len(self._places) + 1}"
        self._places.append(place)
        self.document.add_root(plot)
        self.sections.setdefault(section, []).append(Chart(place, title, alternative, note, plot.height))

    def finished(self) -> Charts:
        """Bokeh numbers its models as long as the process lives; here they count from 1, so that bytes repeat."""
        document = json.loads(serialize_json(self.document.to_json(deferred=False)))
        numbers: dict[str, str] = {}
        _renumber(document, numbers)
        roots = {root["id"]: place for root, place in zip(document["roots"], self._places, strict=True)}
        return Charts(self.sections, document, roots)


def draw(report: Report, points: Points) -> Charts:
    """Draw all charts that the data allow."""
    drawing = _Drawing()
    if report.attribution is not None:
        _attribution(drawing, report.attribution)
    _distributions(drawing, report)
    _requests(drawing, points)
    _series(drawing, report)
    return drawing.finished()


def _renumber(value: Any, numbers: dict[str, str]) -> None:
    if isinstance(value, dict):
        one = value.get("id")
        if isinstance(one, str) and _MODEL_ID.fullmatch(one):
            value["id"] = numbers.setdefault(one, f"m{len(numbers) + 1}")
        for inner in value.values():
            _renumber(inner, numbers)
    elif isinstance(value, list):
        for inner in value:
            _renumber(inner, numbers)


def _plot(x_label: str, y_label: str | None, tools: str = "box_zoom,reset", **options: Any) -> Figure:
    plot = figure(
        height=HEIGHT,
        sizing_mode="stretch_width",
        x_axis_label=x_label,
        y_axis_label=y_label,
        tools=tools,
        # Nothing follows a finger by itself: it scrolls the page.
        active_drag=None,
        toolbar_location="above",
        **options,
    )
    plot.toolbar.logo = None
    plot.toolbar.group = False
    plot.outline_line_color = plot.background_fill_color = plot.border_fill_color = None
    for axis in plot.axis:
        axis.axis_label_text_font_style = "normal"
    return plot


def _distributions(drawing: _Drawing, report: Report) -> None:
    for metric in report.comparison.metrics:
        measured, predicted = (one[~np.isnan(one)] for one in report.comparison.samples(metric))
        if not (measured.size and predicted.size):
            continue  # a load level: statistics, and no values
        unit, scale = _unit(measured)
        kind = "log" if _wide(measured, predicted) else "linear"
        plot = _plot(f"{named(metric)} ({unit})", "share of all", x_axis_type=kind, y_range=(0, 1.02))
        plot.yaxis.formatter = NumeralTickFormatter(format="0%")
        _plain_ticks(plot.xaxis)
        lines = {}
        for side, values in zip(SIDES, (measured, predicted), strict=True):
            share, at = _steps(values, kind == "log")
            lines[side] = plot.step(at * scale, share, mode="after", line_width=2, line_dash=_dash(side), tags=[side])
        _legend(plot, lines)
        tips = [(named(metric), f"@x{{0,0.00}} {unit}"), ("share", "@y{0.0%}")]
        plot.add_tools(HoverTool(tooltips=tips, renderers=list(lines.values()), mode="mouse"))
        drawing.add("distributions", plot, named(metric), _told_levels(metric, measured, predicted))


def _steps(values: Floats, positive: bool) -> tuple[Floats, Floats]:
    """Shares and values of a distribution function, at most ``STEPS`` of them; a log axis cannot show those at 0."""
    ordered = np.sort(values)
    first = int(np.searchsorted(ordered, 0.0, side="right")) if positive else 0
    rows = np.unique(np.linspace(first, ordered.size - 1, min(ordered.size - first, STEPS)).round().astype(np.intp))
    return (rows + 1) / ordered.size, ordered[rows]


def _told_levels(metric: str, measured: Floats, predicted: Floats) -> str:
    told = [
        f"{label} {seconds(float(np.percentile(measured, at)))} measured and "
        f"{seconds(float(np.percentile(predicted, at)))} predicted"
        for label, at in (("median", 50), ("99th percentile", 99))
    ]
    return f"Distribution of {named(metric)}: {', '.join(told)}."


def _requests(drawing: _Drawing, points: Points) -> None:
    """Charts with a point a request. They share their data, so what is selected in one is so in all."""
    if not points.metrics:
        return
    units = {metric: _unit(points.every[f"{metric}_measured"]) for metric in points.metrics}
    data: dict[str, Any] = {"request": points.ids}
    for name, values in points.columns.items():
        metric, _, side = name.rpartition("_")
        scale = units[metric][1] if side in SIDES else 1.0
        data[name] = (scale * values).astype(np.float32)
    source = ColumnDataSource(data)
    tips = _tips(points, units)
    for metric in points.metrics:
        _predicted_over_measured(drawing, points, source, metric, units[metric], tips)
    against = {"arrival_s": "arrival (s from the first)", "concurrency": "requests running at the arrival"}
    for name, label in against.items():
        if name in points.columns:
            for metric in points.metrics:
                _error_against(drawing, points, source, metric, name, label, tips)


def _tips(points: Points, units: Mapping[str, tuple[str, float]]) -> list[tuple[str, str]]:
    facts = {
        "arrival_s": ("arrival", "{0,0.00} s"),
        "prompt_tokens": ("prompt tokens", "{0,0}"),
        "output_tokens": ("output tokens", "{0,0}"),
        "cached_tokens": ("cached tokens", "{0,0}"),
        "concurrency": ("running at arrival", "{0,0}"),
    }
    tips = [("request", "@request")]
    tips += [(label, f"@{name}{form}") for name, (label, form) in facts.items() if name in points.columns]
    for metric, (unit, _) in units.items():
        shown = f"@{metric}_measured{{0,0.00}} / @{metric}_predicted{{0,0.00}} {unit}, @{metric}_error{{+0.0%}}"
        tips.append((named(metric), shown))
    return tips


def _scatter(plot: Figure, source: ColumnDataSource, x: str, y: str, tips: list[tuple[str, str]]) -> None:
    many = len(source.data["request"]) > CROWDED
    look = {"size": 4, "alpha": 0.3, "nonselection_alpha": 0.05} if many else {"size": 6, "alpha": 0.55}
    dots = plot.scatter(x, y, source=source, line_alpha=0, tags=["point"], name="requests", **look)
    plot.add_tools(HoverTool(tooltips=tips, renderers=[dots], point_policy="snap_to_data"))


def _predicted_over_measured(
    drawing: _Drawing,
    points: Points,
    source: ColumnDataSource,
    metric: str,
    unit: tuple[str, float],
    tips: list[tuple[str, str]],
) -> None:
    measured, predicted = (points.every[f"{metric}_{side}"] for side in SIDES)
    kind = "log" if _wide(measured, predicted) else "linear"
    label = named(metric)
    tools = "box_zoom,box_select,reset"
    plot = _plot(
        f"{label} measured ({unit[0]})", f"{label} predicted ({unit[0]})", tools, x_axis_type=kind, y_axis_type=kind
    )
    _plain_ticks(plot.axis)
    both = unit[1] * np.concatenate([measured, predicted])
    both = both[~np.isnan(both) & ((both > 0) | (kind == "linear"))]
    ends = [float(both.min()), float(both.max())] if both.size else [0.0, 1.0]
    line = plot.line(ends, ends, line_dash="dashed", tags=["zero"])
    _scatter(plot, source, f"{metric}_measured", f"{metric}_predicted", tips)
    _legend(plot, {"predicted = measured": line})
    error = points.every[f"{metric}_error"]
    near = float(np.mean(np.abs(error[~np.isnan(error)]) <= 0.1))
    drawing.add("scatter", plot, label, f"Predicted over measured {label}: {percent(near, 0)} within 10 % of it.")


def _error_against(
    drawing: _Drawing,
    points: Points,
    source: ColumnDataSource,
    metric: str,
    name: str,
    label: str,
    tips: list[tuple[str, str]],
) -> None:
    x, error = points.every[name], points.every[f"{metric}_error"]
    fine = ~(np.isnan(x) | np.isnan(error))
    if not fine.any():
        return
    low, high, beyond = _range(error[fine])
    tools = "box_zoom,box_select,reset"
    plot = _plot(label, f"error of {named(metric)}", tools, y_range=(low, high))
    _plain_ticks(plot.xaxis)
    plot.yaxis.formatter = NumeralTickFormatter(format="+0.[0]%")
    plot.add_layout(Span(location=0, dimension="width", line_dash="dashed", tags=["zero"]))
    _scatter(plot, source, name, f"{metric}_error", tips)
    at, median = _medians(x[fine], error[fine])
    line = plot.line(at, median, line_width=2.5, tags=["predicted"])
    _legend(plot, {"running median": line})
    told = f"Error of {named(metric)} against {label}: median {signed(float(np.median(error[fine])))}"
    told += f", between {signed(float(error[fine].min()))} and {signed(float(error[fine].max()))}."
    note = f"{beyond:,} with larger errors lie beyond this axis." if beyond else ""
    drawing.add("arrival" if name == "arrival_s" else "load", plot, named(metric), told, note)


def _range(error: Floats) -> tuple[float, float, int]:
    """Limits of an axis of errors that a few extremes do not flatten, and how many requests lie beyond them."""
    low, high = np.percentile(error, [1, 99])
    room = max(high - low, 0.02)
    low, high = max(low - room, float(error.min())), min(high + room, float(error.max()))
    low, high = min(low, 0.0), max(high, 0.0)
    edge = 0.05 * max(high - low, 0.01)
    beyond = int(((error < low) | (error > high)).sum())
    return float(low - edge), float(high + edge), beyond


def _medians(x: Floats, error: Floats) -> tuple[Floats, Floats]:
    order = np.argsort(x, kind="stable")
    groups = [one for one in np.array_split(order, MEDIANS) if one.size]
    return np.array([np.median(x[one]) for one in groups]), np.array([np.median(error[one]) for one in groups])


def _series(drawing: _Drawing, report: Report) -> None:
    shared = None
    for name, one in report.comparison.series().items():
        title, unit, scale = SERIES.get(name, (name, "", 1.0))
        rows = _thinned_series(one.measured, one.predicted)
        if not rows.size:
            continue
        plot = _plot("time (s from the first arrival)", unit, **({"x_range": shared} if shared is not None else {}))
        shared = plot.x_range
        # At least to 1, so that a gauge that stays at 0 is not drawn at the scale of its rounding.
        top = scale * max(float(np.nanmax([one.measured, one.predicted])), 0.01 if scale > 1 else 1.0)
        plot.y_range.start, plot.y_range.end = 0, 1.05 * top
        source = ColumnDataSource(
            {
                "time": one.time[rows].astype(np.float32),
                **{side: (scale * getattr(one, side)[rows]).astype(np.float32) for side in SIDES},
            }
        )
        lines = {
            side: plot.line("time", side, source=source, line_width=2, line_dash=_dash(side), tags=[side])
            for side in SIDES
        }
        _legend(plot, lines)
        tips = [("time", "@time{0,0.00} s"), *((side, f"@{side}{{0,0.0}} {unit}") for side in SIDES)]
        plot.add_tools(HoverTool(tooltips=tips, renderers=[lines["measured"]], mode="vline"))
        _plain_ticks(plot.axis)
        means = [number(scale * _mean(getattr(one, side))) for side in SIDES]
        told = f"{title} over time: mean {means[0]} measured and {means[1]} predicted {unit}."
        note = "Told by the requests' stamps." if one.source == "stamps" else "The engine's gauge."
        drawing.add("series", plot, title, told, note)


def _mean(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else np.nan


def _thinned_series(measured: Floats, predicted: Floats) -> npt.NDArray[np.intp]:
    """Rows of a time series: all, or the least and greatest of each side in every stretch."""
    known = np.flatnonzero(~(np.isnan(measured) & np.isnan(predicted)))
    if known.size <= SAMPLES:
        return known
    kept = []
    for some in np.array_split(known, SAMPLES // 4):
        for values in (measured[some], predicted[some]):
            if not np.isnan(values).all():
                kept += [some[np.nanargmin(values)], some[np.nanargmax(values)]]
    return np.unique(np.array(kept, dtype=np.intp))


def _attribution(drawing: _Drawing, found: Attribution) -> None:
    """Stacked bars: parts that lengthen to the right of zero, parts that shorten to the left. The table has all."""
    bars = [
        (f"{named(metric)} {statistic}", points_by_part(shares))
        for metric, statistics in found.parts.items()
        for statistic, shares in statistics.items()
        if statistic in STACKED
    ]
    if not bars:
        return
    names = [name for name, _ in bars]
    plot = _plot("points of the measured value", None, y_range=names[::-1], x_axis_type="linear")
    plot.height = max(220, 110 + 34 * len(names))
    plot.xaxis.formatter = NumeralTickFormatter(format="+0.[0]%")
    plot.add_layout(Span(location=0, dimension="height", tags=["zero"]))
    ends = {name: {True: 0.0, False: 0.0} for name in names}
    legend = {}
    for part in PARTS:
        rows = [(name, points[part]) for name, points in bars if points.get(part)]
        if not rows:
            continue
        left = [ends[name][value > 0] for name, value in rows]
        right = [start + value for start, (_, value) in zip(left, rows, strict=True)]
        for (name, value), end in zip(rows, right, strict=True):
            ends[name][value > 0] = end
        label = part.replace("_", " ")
        data = {
            "y": [name for name, _ in rows],
            "left": left,
            "right": right,
            "points": [value for _, value in rows],
            "part": [label] * len(rows),
        }
        legend[label] = plot.hbar(
            "y", left="left", right="right", height=0.6, source=ColumnDataSource(data), tags=[f"part-{part}"]
        )
    _legend(plot, legend, columns=3)
    tips = [("error of", "@y"), ("part", "@part"), ("points", "@points{+0.0%}")]
    plot.add_tools(HoverTool(tooltips=tips, renderers=list(legend.values())))
    told = [f"{name} {signed(float(sum(points.values())))}" for name, points in bars]
    drawing.add("attribution", plot, "Error by cause", f"Errors split by cause: {', '.join(told)}.")


def _legend(plot: Figure, lines: Mapping[str, Any], columns: int | None = None) -> None:
    items = [LegendItem(label=label, renderers=[line]) for label, line in lines.items()]
    legend = Legend(items=items, orientation="horizontal", margin=0, padding=2, border_line_alpha=0, location="left")
    if columns is not None:
        legend.ncols = min(columns, len(items))
    plot.add_layout(legend, "above")


def _dash(side: str) -> str:
    return "solid" if side == "measured" else "dashed"


def _unit(values: Floats) -> tuple[str, float]:
    return ("ms", 1e3) if values.size and np.nanpercentile(values, 99) < 1 else ("s", 1.0)


def _wide(*sides: Floats) -> bool:
    """Whether values spread so far that a linear axis would crowd most of them."""
    values = np.concatenate(sides)
    values = values[values > 0]
    return bool(values.size) and bool(np.percentile(values, 99) > 30 * np.percentile(values, 1))


def _plain_ticks(axes: Any) -> None:
    for axis in axes:
        axis.formatter = NumeralTickFormatter(format="0,0.[000000]")
