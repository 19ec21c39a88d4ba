"""The report as one HTML page that needs nothing else: no network, no other file.

A trace is foreign input. The template escapes all text (Jinja2, autoescape), data in the page are JSON in which ``<``,
``>``, ``&`` and ``'`` are escaped, and the page's own content security policy lets no script run but the two that
servecal put there, and nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
from bokeh.resources import Resources

from calibrate.reports import tables
from calibrate.reports.charts import Chart, draw
from calibrate.reports.figures import number, percent, plain, signed
from calibrate.reports.points import Points, points_of
from calibrate.reports.report import Report
from calibrate.reports.tables import Table, named, short, with_ids

FOLDER = Path(__file__).with_name("page")
WORST = 10
COMPONENTS = 4
MOST_FINDINGS = 100
SEVERITIES = ("error", "warning", "info")


@dataclass(frozen=True)
class Section:
    """A part of the page with charts."""

    id: str
    title: str
    text: str
    charts: list[Chart]


TEXTS = {
    "distributions": (
        "Measured against predicted",
        "Share of {many} (of gaps between tokens for ITL) at or below a value. Where the lines lie on each other, "
        "the distribution is predicted well, even if single {many} are not.",
    ),
    "scatter": (
        "Every {one}",
        "On the dashed line, a {one} is predicted exactly. Point at one to see which it is; the box tool selects "
        "{many} in all charts of {many} at once.",
    ),
    "arrival": ("Error against the arrival time", "Above zero: predicted too long. Errors that grow queue up."),
    "load": (
        "Error against the load",
        "Near saturation a small error of the step time becomes a large one of waiting.",
    ),
    "series": ("Over time", "What the engine was doing, on one time axis."),
}


def render(report: Report) -> str:
    """Return the page."""
    points = points_of(report.comparison)
    provenance = report.deployment.loaded.profile.provenance
    charts = draw(report, points)
    load = report.attribution.load if report.attribution else {}
    one, many = ("request", "requests") if report.trace.batches is None else ("batch", "batches")
    scripts = [*Resources(mode="inline", components=["bokeh"]).js_raw, _read("page.js")]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    # In its own order: BokehJS wants a model defined before it is referred to.
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    environment.globals |= {"named": named, "short": short, "plain": plain, "with_ids": with_ids}
    return environment.from_string(_read("page.html.jinja")).render(
        report=report,
        tables=_tables(report, points),
        slices=tables.slices(report),
        sections=[_section(name, list(charts.sections.get(name, ())), one, many) for name in TEXTS],
        many=many,
        attribution_charts=charts.sections.get("attribution", ()),
        findings=list(_findings(report)),
        facts=_facts(report),
        domain=_domain(report),
        provenance=list(tables.flat({name: one for name, one in provenance.items() if name != "mape"})),
        other_assumptions=tables.other_assumptions(report),
        load=[(name.replace("_", " "), number(one)) for name, one in load.items()],
        points=points,
        charts={"document": charts.document, "roots": charts.roots},
        scripts=scripts,
        style=_read("page.css"),
        hashes=[_hash(script) for script in scripts],
        version=version("servecal"),
    )


def _section(name: str, charts: list[Chart], one: str, many: str) -> Section:
    title, text = (words.format(one=one, many=many) for words in TEXTS[name])
    return Section(name, title, text, charts)


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """What a content security policy calls a script by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _tables(report: Report, points: Points) -> dict[str, Table]:
    provenance = report.deployment.loaded.profile.provenance
    return {
        "gates": tables.gates(report.judgement.results if report.judgement else ()),
        "errors": tables.errors(report),
        "levels": tables.levels(report),
        "whole_run": tables.whole_run(report),
        "attribution": tables.attribution(report),
        "fitted": tables.fitted_errors(provenance),
        "coefficients": tables.coefficients(report),
        "engine": tables.engine_arguments(report),
        "worst": _worst(points),
    }


def _worst(points: Points) -> Table:
    """The requests with the largest errors, so that a reader without a mouse finds them too."""
    if not points.metrics:
        return Table((), (), "")
    metric = points.metrics[-1]
    facts = {
        "arrival_s": ("arrival, s", _two_digits),
        "prompt_tokens": ("prompt tokens", number),
        "output_tokens": ("output tokens", number),
        "concurrency": ("running at arrival", number),
    }
    shown = {name: one for name, one in facts.items() if name in points.columns}
    columns = ("request", *(label for label, _ in shown.values()), *(f"{named(one)} error" for one in points.metrics))
    rows = []
    for row in points.worst(metric, WORST):
        cells = [show(float(points.columns[name][row])) for name, (_, show) in shown.items()]
        errors = [signed(float(points.columns[f"{one}_error"][row])) for one in points.metrics]
        rows.append((short(points.ids[row]), *cells, *errors))
    return Table(columns, rows, "l" + "r" * (len(columns) - 1))


def _two_digits(value: float) -> str:
    return f"{value:,.2f}"


def _findings(report: Report) -> Iterator[tuple[str, str, str]]:
    """Severity, check and sentence, the gravest first."""
    order = sorted(report.findings, key=lambda one: SEVERITIES.index(one.severity))
    for one in order[:MOST_FINDINGS]:
        yield one.severity, short(one.check), with_ids(one.sentence, one.requests)


def _facts(report: Report) -> list[tuple[str, str]]:
    """What was compared, as label and text."""
    trace, deployment = report.trace, report.deployment
    engine = trace.meta.get("engine") or {}
    coverage, summary = report.comparison.coverage, report.replay.summary
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in coverage["excluded"].items())
    compared = f"{coverage['paired']:,} of {coverage['measured']:,} requests" + (f" ({left_out})" if left_out else "")
    degree = deployment.config.tensor_parallel_size
    device = deployment.hardware.name if deployment.hardware else "no hardware"
    return [
        ("trace", trace.name),
        (
            "served",
            f"{trace.meta.get('model') or 'unknown model'}, vLLM {engine.get('version') or 'of unknown version'}",
        ),
        ("measured on", str(trace.meta.get("hardware") or "unknown hardware")),
        (
            "profile",
            f"{deployment.loaded.profile.name} ({deployment.loaded.profile.accelerator.kind}, {degree} x {device})",
        ),
        ("compared", f"{compared}, latencies from the {report.comparison.anchor}"),
        (
            "simulated",
            f"{summary['iterations']:,} iterations, {summary['simulated_seconds']:,.1f} s, device busy "
            f"{percent(summary['device_busy'], 0)}, {summary['preemptions']:,} preemptions",
        ),
        ("device time", _components(summary["component_seconds"])),
    ]


def _components(spent: Mapping[str, float]) -> str:
    """The largest parts of the device's time."""
    total = sum(spent.values()) or 1.0
    parts = sorted(spent.items(), key=lambda item: -item[1])
    shown = [f"{name.replace('_', ' ')} {percent(value / total, 0)}" for name, value in parts[:COMPONENTS] if value > 0]
    rest = sum(value for _, value in parts[COMPONENTS:]) / total
    return ", ".join([*shown, f"other {percent(rest, 0)}"] if rest > 0 else shown)


def _domain(report: Report) -> list[tuple[str, str]]:
    """What the profile was fitted to, by axis, and whether the replay left it."""
    outside: dict[str, Any] = report.replay.summary["outside_domain"] or {}
    return [
        (
            axis.replace("_", " "),
            f"{plain(least)} to {plain(most)}" + (" (left by this replay)" if axis in outside else ""),
        )
        for axis, (least, most) in report.deployment.loaded.profile.domain.items()
    ]
