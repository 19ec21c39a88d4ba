"""``servecal fit --compare``."""

from __future__ import annotations

import json
import time
from typing import Any

import click

from calibrate.cli.options import load_traces, progress, render_text
from calibrate.holdout import parts
from calibrate.model_comparison import Candidate, Ranking, rank

SCHEMA = "servecal.fit-compare/1"
CRITERION = "mean of the held-out MAPEs of TTFT, TPOT and E2E"
NAMES = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "E2E"}


def compare(
    names: tuple[str, ...],
    bases: tuple[str, ...],
    scheme: str,
    settings: tuple[str, ...],
    model: str | None,
    assume_defaults: bool,
    strength: float | None,
    style: str,
) -> None:
    """Fit each base to the same part of the traces, print them ranked."""
    begun = time.monotonic()
    traces = [trace for name in names for trace in load_traces(name)]
    with progress(len(bases) * len(parts(scheme, traces)), "fits") as advance:
        ranking = rank(
            traces,
            bases,
            scheme,
            settings=settings,
            model=model,
            assume_defaults=assume_defaults,
            strength=strength,
            progress=advance,
        )
    document = {
        "schema": SCHEMA,
        "traces": [{"name": trace.name, "digest": trace.digest()} for trace in traces],
        "holdout": scheme,
        "criterion": CRITERION,
        "ranking": [_entry(one) for one in ranking.candidates],
        "failed": [{"base": name, "reason": why} for name, why in ranking.failed.items()],
        "sentences": _sentences(ranking),
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
    requests = max(one["n"] for one in first.held_out.values())
    said = []
    for one in others:
        low, high = (100 * bound for bound in one.behind_ci95)
        difference = f"{100 * one.behind:.2f} points, 95 % interval {low:+.2f} to {high:+.2f}"
        if one.tied:
            said.append(
                f"{one.base.origin} and {first.base.origin} cannot be told apart on these {requests} requests "
                f"({difference})"
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
    for column in (*NAMES.values(), "mean", "in sample", "numbers", "fit"):
        table.add_column(column, justify="right", no_wrap=True)
    for place, one in enumerate(document["ranking"], start=1):
        held, fitted = one["holdout"], one["in_sample"]
        sample = [fitted[name]["mape"] for name in NAMES if name in fitted]
        table.add_row(
            str(place),
            one["base"],
            *(_percent(held[name]["mape"], held[name]["mape_ci95"]) if name in held else "-" for name in NAMES),
            _percent(one["criterion"], one["criterion_ci95"]),
            f"{100 * sum(sample) / len(sample):.2f} %" if sample else "-",
            f"{one['coefficients']:,}",
            f"{one['fit_seconds']:.1f} s",
        )
    parts: list[Any] = [table]
    parts += [Text(f"-  {one['base']}: {one['reason']}") for one in document["failed"]]
    parts += [Text(), Text(f"ranked by the {document['criterion']}; below each its 95 % interval")]
    parts += [Text(line) for line in document["sentences"]]
    for name, values in document["assumed"].items():
        parts.append(Text(f"assumed for all: {', '.join(f'{key}={values[key]}' for key in sorted(values))} ({name})"))
    return Group(*parts)


def _percent(value: float, interval: list[float] | None) -> str:
    """A share, and in a line of its own where it lies."""
    if interval is None:
        return f"{100 * value:.2f} %"
    return f"{100 * value:.2f} %\n{100 * interval[0]:.2f}-{100 * interval[1]:.2f}"
