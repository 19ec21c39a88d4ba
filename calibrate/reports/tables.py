"""Tables of a report as plain text, for the views that lay them out: Markdown and the HTML page."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from calibrate.attribution import PARTS, Share
from calibrate.gates import GateResult
from calibrate.metric_errors import LABELS, PERCENTILES
from calibrate.reports import gates_section
from calibrate.reports.figures import NONE, interval, number, percent, plain, seconds, shortened, signed
from calibrate.reports.report import Report
from calibrate.slices import describe

LEVELS = tuple(PERCENTILES)
IDS_SHOWN = 5
_DIGEST = re.compile("[0-9a-f]{64}")
LONGEST = 400
"""Characters of one foreign text in a view; what is longer is cut, so that no trace can bloat a page."""


@dataclass(frozen=True)
class Table:
    """Cells of text. ``align`` has one letter a column: l for text, r for figures."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    align: str


def named(metric: str) -> str:
    """``ttft`` as people write it."""
    return LABELS.get(metric, metric.replace("_", " "))


def short(text: object) -> str:
    """One foreign text, cut to ``LONGEST`` characters."""
    return shortened(str(text), LONGEST)


def gates(results: Sequence[GateResult]) -> Table:
    """One row a gate; failures first."""
    order = {"fail": 0, "inconclusive": 1, "pass": 2}
    rows = [
        (
            one.verdict,
            short(one.name),
            gates_section.limit(one),
            gates_section.value(one, one.value),
            NONE if math.isnan(one.ci95[0]) else " to ".join(gates_section.value(one, bound) for bound in one.ci95),
            short(one.sentence),
        )
        for one in sorted(results, key=lambda one: order.get(one.verdict, 3))
    ]
    return Table(("verdict", "gate", "limit", "value", "95 % interval", "why"), rows, "llrrrl")


def errors(report: Report) -> Table:
    """Errors over the pairs, one row a metric; those not measured say so."""
    first = "per request" if report.trace.batches is None else "per batch"
    rows = [
        (
            named(name),
            f"{one.n:,}",
            percent(one.mape, 2),
            interval(one.mape_ci95, 2),
            percent(one.median_ape, 2),
            signed(one.bias, 2),
            percent(report.comparison.distances[name].wasserstein, 2),
        )
        for name, one in report.comparison.metrics.items()
        if name in report.comparison.distances  # of a load level there are only statistics
    ]
    rows += [(named(name), NONE, NONE, NONE, NONE, NONE, "not measured") for name in report.comparison.unsupported]
    return Table((first, "pairs", "MAPE", "95 % interval", "median", "bias", "distance"), rows, "lrrrrrr")


def levels(report: Report) -> Table:
    """Measured, predicted and signed error of each statistic, three rows a metric, and of the throughput."""
    rows: list[tuple[str, ...]] = []
    for name, one in report.comparison.metrics.items():
        found = [one.percentiles.get(at) for at in LEVELS]
        rows.append((f"{named(name)}, measured", *(seconds(one.measured) if one else NONE for one in found)))
        rows.append((f"{named(name)}, predicted", *(seconds(one.predicted) if one else NONE for one in found)))
        rows.append((f"{named(name)}, error", *(signed(one.error) if one else NONE for one in found)))
    return Table(("", *LEVELS), rows, "l" + "r" * len(LEVELS))


def whole_run(report: Report) -> Table:
    """Throughput, makespan and engine gauges: measured, predicted, difference."""
    rows = []
    for name, values in report.comparison.throughput.items():
        label = {"output_tokens_per_s": "output tokens/s", "makespan": "makespan, s"}.get(name, name)
        rows.append((label, number(values["measured"]), number(values["predicted"]), signed(values["error"])))
    for name, values in report.comparison.timeline.items():
        show = percent if name == "kv_usage" else number
        label = {"running": "running requests", "waiting": "waiting requests", "kv_usage": "KV use"}.get(name, name)
        rows.append(
            (
                f"{label}, mean",
                show(values["measured_mean"]),
                show(values["predicted_mean"]),
                f"{show(values['mae'])} apart on average",
            )
        )
    return Table(("whole run", "measured", "predicted", "difference"), rows, "lrrr")


def slices(report: Report) -> dict[str, Table]:
    """Errors by slices of the requests, a table a metric."""
    columns = ("requests", "pairs", "MAPE", "95 % interval", "bias", "MAPE of the others")
    found = {}
    for metric, by in report.comparison.slices.items():
        rows = [
            (
                describe(name, one),
                f"{one.n:,}",
                percent(one.mape),
                interval(one.mape_ci95),
                signed(one.bias),
                percent(one.rest_mape),
            )
            for name, some in by.items()
            for one in some
        ]
        found[named(metric)] = Table(columns, rows, "lrrrrr")
    return found


def attribution(report: Report) -> Table:
    """Points of each part by metric and statistic; empty without an attribution."""
    found = report.attribution
    rows = []
    for metric, statistics in (found.parts if found else {}).items():
        for statistic, shares in statistics.items():
            points = points_by_part(shares)
            cells = [signed(points[part]) if part in points else NONE for part in PARTS]
            rows.append((f"{named(metric)} {statistic}", *cells, signed(math.fsum(points.values()))))
    columns = ("error of", *(part.replace("_", " ") for part in PARTS), "sum")
    return Table(columns, rows, "l" + "r" * (len(PARTS) + 1))


def points_by_part(shares: Sequence[Share]) -> dict[str, float]:
    """Sum the points of each part."""
    found: dict[str, float] = {}
    for one in shares:
        found[one.part] = found.get(one.part, 0.0) + one.points
    return found


def coefficients(report: Report) -> Table:
    """The profile's coefficients with their intervals."""

    def limits(one: tuple[float, float] | None) -> str:
        return f"{one[0]:.4g} to {one[1]:.4g}" if one else NONE

    rows = [
        (
            short(name),
            f"{one.value:.5g}",
            limits(one.ci95),
            limits(one.ci95_bootstrap),
            NONE if one.prior is None else f"{one.prior:.4g}",
            {True: "yes", False: "no: held by its prior", None: NONE}[one.identified],
        )
        for name, one in report.deployment.loaded.profile.coefficients.items()
    ]
    return Table(("coefficient", "value", "95 % interval", "by bootstrap", "prior", "told by the data"), rows, "lrrrrl")


def fitted_errors(provenance: Mapping[str, Any]) -> Table:
    """The profile's own errors when it was fitted: in sample and held out, one row each."""
    kept = provenance.get("mape")
    found = {str(name): one for name, one in kept.items() if isinstance(one, Mapping)} if isinstance(kept, dict) else {}
    metrics = list(dict.fromkeys(str(metric) for one in found.values() for metric in one))
    rows = []
    for name, one in found.items():
        values = [one.get(metric) for metric in metrics]
        rows.append((short(name), *(percent(value, 2) if isinstance(value, float) else NONE for value in values)))
    return Table(("scored on", *(named(short(metric)) for metric in metrics)), rows, "l" + "r" * len(metrics))


def engine_arguments(report: Report) -> Table:
    """vLLM's arguments in force, and which of them nobody stated."""
    engine = report.replay.predicted.meta["engine"]
    assumed = report.deployment.assumed
    rows = [("version", short(engine["version"]), "assumed" if "version" in assumed else "")]
    rows += [
        (name, short(plain(value)), "assumed" if name in assumed else "") for name, value in engine["arguments"].items()
    ]
    return Table(("vLLM argument", "value", ""), rows, "lll")


def other_assumptions(report: Report) -> list[str]:
    """What was assumed beside engine arguments, as ``name=value``."""
    arguments = report.replay.predicted.meta["engine"]["arguments"]
    found = [
        f"{name}={plain(value)}"
        for name, value in sorted(report.deployment.assumed.items())
        if name not in arguments and name != "version"
    ]
    host = report.deployment.loaded.profile.host
    if "default" in host.source:
        found.append(f"host overhead {1e3 * host.per_step:g} ms a step, {1e6 * host.per_sequence:g} us a sequence")
    return found


def flat(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Walk a nested mapping as ``a.b`` and one line of text."""
    for key, value in document.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flat(value, f"{name}.")
        elif isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
            for place, one in enumerate(value, 1):
                yield from flat(one if isinstance(one, Mapping) else {"": one}, f"{name} {place}.")
        else:
            text = plain(value)
            yield name, text[:12] if _DIGEST.fullmatch(text) else short(text)


def with_ids(sentence: str, requests: Sequence[str]) -> str:
    """A finding's sentence, and the first of the requests that it is about."""
    if not requests:
        return short(sentence)
    shown = ", ".join(shortened(one, 60) for one in requests[:IDS_SHOWN])
    more = f" and {len(requests) - IDS_SHOWN:,} more" if len(requests) > IDS_SHOWN else ""
    return f"{short(sentence)} (requests: {shown}{more})"
