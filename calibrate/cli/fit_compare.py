"""``servecal fit --compare``."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import click

from calibrate.cli.options import progress, render_text
from calibrate.errors import BATCH_METRICS
from calibrate.holdout import parts
from calibrate.model_comparison import Candidate, Ranking, rank
from replay.trace import Trace

SCHEMA = "servecal.fit-compare/1"
NAMES = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "E2E"} | {name: name.replace("_", " ") for name in BATCH_METRICS}


def compare(
    traces: Sequence[Trace], bases: Sequence[str], scheme: str, notes: Sequence[str], style: str, **options: Any
) -> None:
    """Fit each base to the same part of the traces, print them ranked; ``options`` are those of ``rank``."""
    begun = time.monotonic()
    with progress(len(bases) * len(parts(scheme, traces)), "fits") as advance:
        ranking = rank(traces, bases, scheme, progress=advance, **options)
    document = {
        "schema": SCHEMA,
        "traces": [{"name": trace.name, "digest": trace.digest()} for trace in traces],
        "holdout": scheme,
        "criterion": f"mean of the held-out MAPEs of {', '.join(NAMES[name] for name in ranking.metrics)}",
        "ranking": [_entry(one) for one in ranking.candidates],
        "failed": [{"base": name, "reason": why} for name, why in ranking.failed.items()],
        "sentences": _sentences(ranking),
        "warnings": ranking.warnings,
        "notes": list(notes),
        "assumed": ranking.assumed,
        "seconds": round(time.monotonic() - begun, 3),
    }
    if style == "json":
        click.echo(json.dumps(document, indent=1))
        return
    text = render_text(_view(document), None)
    if text is not None:
        click.echo(text, nl=False)


def _entry(one: Candidate) -> dict[str, Any]:
    return {
        "base": one.base.origin,
        "digest": one.base.digest,
        "kind": one.base.profile.accelerator.kind,
        "criterion": one.criterion,
        "criterion_ci95": list(one.criterion_ci95),
        "behind": one.behind,
        "behind_ci95": list(one.behind_ci95),
        "tied": one.tied,
        "holdout": one.held_out,
        "in_sample": one.fitted_part,
        "coefficients": one.coefficients,
        "fit_seconds": round(one.seconds, 3),
    }


def _sentences(ranking: Ranking) -> list[str]:
    """Say what the intervals allow to say."""
    first, *others = ranking.candidates
    count = max(one["n"] for one in first.held_out.values())
    held = f"{count} {'batches' if set(ranking.metrics) <= set(BATCH_METRICS) else 'requests'}"
    said = []
    for one in others:
        low, high = (100 * bound for bound in one.behind_ci95)
        difference = f"{100 * one.behind:.2f} points, 95 % interval {low:+.2f} to {high:+.2f}"
        if one.tied:
            said.append(
                f"{one.base.origin} and {first.base.origin} cannot be told apart on these {held} ({difference})"
            )
        else:
            said.append(f"{one.base.origin} is worse than {first.base.origin} by {difference}")
    return said


def _view(document: dict[str, Any]) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2), pad_edge=False, header_style="dim")
    table.add_column("")
    table.add_column(f"held out, {document['holdout']}", overflow="fold")
    names = document["ranking"][0]["holdout"]
    for column in (*(NAMES[name] for name in names), "mean", "in sample", "numbers", "fit"):
        table.add_column(column, justify="right", no_wrap=True)
    for place, one in enumerate(document["ranking"], start=1):
        held, fitted = one["holdout"], one["in_sample"]
        sample = [fitted[name]["mape"] for name in names if name in fitted]
        table.add_row(
            str(place),
            one["base"],
            *(_percent(held[name]["mape"], held[name]["mape_ci95"]) if name in held else "-" for name in names),
            _percent(one["criterion"], one["criterion_ci95"]),
            f"{100 * sum(sample) / len(sample):.2f} %" if sample else "-",
            f"{one['coefficients']:,}",
            f"{one['fit_seconds']:.1f} s",
        )
    parts: list[Any] = [table]
    parts += [Text(f"-  {one['base']}: {one['reason']}") for one in document["failed"]]
    parts += [Text(), Text(f"ranked by the {document['criterion']}; below each its 95 % interval")]
    parts += [Text(line) for line in document["sentences"]]
    parts += [Text(f"warning: {line}") for line in document["warnings"]]
    parts += [Text(f"note: {line}") for line in document["notes"]]
    for name, values in document["assumed"].items():
        parts.append(Text(f"assumed for all: {', '.join(f'{key}={values[key]}' for key in sorted(values))} ({name})"))
    return Group(*parts)


def _percent(value: float, interval: list[float] | None) -> str:
    """A share, and in a line of its own where it lies."""
    if interval is None:
        return f"{100 * value:.2f} %"
    return f"{100 * value:.2f} %\n{100 * interval[0]:.2f}-{100 * interval[1]:.2f}"
