"""The report as JSON, ``"schema": "servecal.report/1"``. Fractions and seconds; NaN becomes null."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

from calibrate.errors import Comparison
from calibrate.load import Series
from calibrate.reports.report import Report

SCHEMA = "servecal.report/1"


def to_dict(report: Report) -> dict[str, Any]:
    """Return the document; its shape is described in ``docs/report-json.md``."""
    trace, deployment, comparison = report.trace, report.deployment, report.comparison
    profile = deployment.loaded.profile
    document = {
        "schema": SCHEMA,
        "trace": {
            "name": trace.name,
            "digest": trace.digest(),
            "source": trace.meta.get("source"),
            "model": trace.meta.get("model"),
            "hardware": trace.meta.get("hardware"),
            "engine": trace.meta.get("engine"),
            "clock": trace.meta.get("clock"),
            "columns": trace.meta.get("columns"),
        },
        "profile": {
            "name": profile.name,
            "digest": deployment.loaded.digest,
            "model": deployment.model.name if deployment.model else None,
            "hardware": deployment.hardware.name if deployment.hardware else None,
            "accelerator": profile.accelerator.kind,
            "coefficients": deployment.accelerator.coefficients,
            "host": asdict(deployment.accelerator.host),
            "call": asdict(deployment.accelerator.call),
            "engine": report.replay.predicted.meta["engine"],
            "assumed": dict(deployment.assumed),
        },
        "headline": report.headline,
        "conflicts": list(deployment.conflicts),
        "notes": report.notes,
        "cold_start": report.cold_start,
        "anchor": comparison.anchor,
        "coverage": comparison.coverage,
        "metrics": {name: asdict(errors) for name, errors in comparison.metrics.items()},
        "throughput": comparison.throughput,
        "timeline": comparison.timeline,
        **_comparison_details(comparison),
        "simulation": report.replay.summary,
        "gates": [],
        "verdict": None,
    }
    cleaned: dict[str, Any] = _clean(document)
    return cleaned


def _comparison_details(comparison: Comparison) -> dict[str, Any]:
    """Distances, intervals of the throughput, slices, anchors and series."""
    gap = comparison.anchor_gap
    return {
        "throughput_ci95": comparison.throughput_ci95,
        "distances": {name: asdict(one) for name, one in comparison.distances.items()},
        "slices": {
            metric: {name: [asdict(one) for one in slices] for name, slices in by.items()}
            for metric, by in comparison.slices.items()
        },
        "worst_slices": [asdict(one) for one in comparison.worst_slices],
        "anchors": {name: asdict(one) for name, one in comparison.anchors.items()},
        "anchor_gap": asdict(gap) if gap else None,
        "series": {name: _series(one.thinned()) for name, one in comparison.series().items()},
    }


def _series(series: Series) -> dict[str, Any]:
    """Six significant digits, to keep the document small."""
    sides = {"time": series.time, "measured": series.measured, "predicted": series.predicted}
    return {"source": series.source} | {name: [float(f"{one:.6g}") for one in side] for name, side in sides.items()}


def render(report: Report) -> str:
    """Return the JSON text."""
    return json.dumps(to_dict(report), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _clean(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
