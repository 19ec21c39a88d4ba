"""A difference as JSON, ``"schema": "servecal.compare/1"``. Fractions and seconds; NaN becomes null."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from calibrate.differences import Difference, ProfileDifference, ReportDifference, TraceDifference
from calibrate.errors import Comparison, Level
from calibrate.reports import gates_section
from calibrate.reports.json_report import clean
from calibrate.run_pairs import Unpaired
from profiles.profile import LoadedProfile
from replay.trace import Trace

SCHEMA = "servecal.compare/1"


def to_dict(found: Difference) -> dict[str, Any]:
    """Return the document; its shape is described in ``docs/gates.md``."""
    if isinstance(found, TraceDifference):
        document = {"kind": "traces", "a": _trace(found.a), "b": _trace(found.b), **_differences(found)}
    elif isinstance(found, ProfileDifference):
        document = _profiles(found)
    else:
        document = _reports(found)
    judgement = found.judgement
    verdict = {
        "noise": judgement.noise if judgement else None,
        "gates": gates_section.as_dicts(judgement),
        "verdict": judgement.verdict if judgement else None,
    }
    cleaned: dict[str, Any] = clean({"schema": SCHEMA, **document, **verdict})
    return cleaned


def render(found: Difference) -> str:
    """Return the JSON text."""
    return json.dumps(to_dict(found), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _trace(trace: Trace) -> dict[str, Any]:
    facts = {name: trace.meta.get(name) for name in ("model", "hardware", "engine")}
    return {"name": trace.name, "digest": trace.digest(), "requests": len(trace), **facts}


def _profile(loaded: LoadedProfile) -> dict[str, Any]:
    return {"name": loaded.profile.name, "digest": loaded.digest, "accelerator": loaded.profile.accelerator.kind}


def _differences(found: TraceDifference) -> dict[str, Any]:
    compared = found.pairing.compared
    return {
        "pairing": found.pairing.kind,
        "notes": list(found.pairing.notes),
        "coverage": None if isinstance(compared, Unpaired) else _coverage(compared),
        "metrics": _metrics(compared),
        "throughput": {
            name: {"a": one["measured"], "b": one["predicted"], "difference": one["error"]}
            for name, one in compared.throughput.items()
        },
    }


def _coverage(compared: Comparison) -> dict[str, Any]:
    own = compared.coverage
    names = {"measured": "a", "predicted": "b", "not_predicted": "not_in_b", "only_predicted": "only_in_b"}
    excluded = {names.get(why, why): count for why, count in own["excluded"].items()}
    return {names.get(name, name): count for name, count in own.items()} | {"excluded": excluded}


def _metrics(compared: Comparison | Unpaired) -> dict[str, Any]:
    if isinstance(compared, Unpaired):
        return {
            name: {"n": list(one.n), "ks_distance": one.distance, "percentiles": _levels(one.percentiles)}
            for name, one in compared.metrics.items()
        }
    return {
        name: {**asdict(errors), "percentiles": _levels(errors.percentiles)}
        for name, errors in compared.metrics.items()
    }


def _levels(percentiles: Any) -> dict[str, Any]:
    levels: dict[str, Level] = dict(percentiles)
    return {
        name: {"a": one.measured, "b": one.predicted, "difference": one.error, "difference_ci95": one.error_ci95}
        for name, one in levels.items()
    }


def _profiles(found: ProfileDifference) -> dict[str, Any]:
    document: dict[str, Any] = {
        "kind": "profiles",
        "a": _profile(found.a),
        "b": _profile(found.b),
        "sentences": found.sentences,
        "coefficients": [asdict(one) for one in found.coefficients],
        "settings": [{"field": name, "a": a, "b": b} for name, a, b in found.settings],
        "on": None,
    }
    if found.on is not None:
        errors = {
            side: {name: asdict(one) for name, one in compared.metrics.items()}
            for side, compared in zip(("a", "b"), found.on.errors, strict=True)
        }
        document["on"] = {"trace": _trace(found.on.measured), **_differences(found.on.between), "errors": errors}
    return document


def _reports(found: ReportDifference) -> dict[str, Any]:
    sides = {}
    for side, report in (("a", found.a), ("b", found.b)):
        trace, profile = report.document.trace, report.document.profile
        sides[side] = {
            "trace": {"name": trace.name, "digest": trace.digest, "model": trace.model},
            "profile": {"name": profile.name, "digest": profile.digest},
            "coverage": report.document.coverage.model_dump(),
            "verdict": report.document.verdict,
        }
    return {
        "kind": "reports",
        **sides,
        "same_run": found.same_run,
        "sentences": found.sentences,
        "statistics": [asdict(one) for one in found.statistics],
    }
