"""``servecal report``."""

from __future__ import annotations

from pathlib import Path

import click

from calibrate.aggregates import DRAWS, compare_aggregates, predict
from calibrate.attribution import attribute
from calibrate.cli.options import (
    deploy,
    keep_trace,
    load_trace,
    output_options,
    progress,
    render_text,
    replay_options,
    write_output,
)
from calibrate.errors import compare
from calibrate.reports import json_report, text_report
from calibrate.reports.report import Report
from profiles.errors import InputError
from replay.load_level import draws, holds_aggregates
from replay.run import replay

MOST_ATTRIBUTED = 20_000
"""Requests up to which errors are split by cause without being asked for."""


@click.command("report")
@replay_options
@click.option(
    "--anchor",
    type=click.Choice(["arrival", "queued"]),
    default="arrival",
    show_default=True,
    help="What measured latencies count from; vLLM stamps `queued` only between steps.",
)
@click.option(
    "--attribution/--no-attribution",
    "attributed",
    default=None,
    help=f"Split errors by cause; takes several replays. [default: up to {MOST_ATTRIBUTED:,} requests]",
)
@output_options("text", "json")
def command(
    trace: str,
    profile: str,
    settings: tuple[str, ...],
    model: str | None,
    assume_defaults: bool,
    arrivals: str,
    cold_start: bool,
    anchor: str,
    attributed: bool | None,
    style: str,
    output: Path | None,
) -> None:
    """Replay TRACE with a profile, compare request by request (a load level by its aggregates), print the report."""
    measured = load_trace(trace, arrivals)
    keep_trace(trace, output)
    deployment = deploy(measured, profile, settings, model, assume_defaults)
    if holds_aggregates(measured):
        if anchor != "arrival":
            raise InputError(f"{measured.name} holds aggregates, which count from the arrival", field="--anchor")
        with progress(len(measured) * len(draws(measured, DRAWS)), "replaying") as advance:
            replays = predict(measured, deployment, advance)
        report = Report(measured, deployment, replays[0], compare_aggregates(measured, replays))
    else:
        with progress(len(measured), "replaying") as advance:
            replayed = replay(measured, deployment, cold_start=cold_start, progress=advance)
        comparison = compare(measured, replayed.predicted, anchor)
        causes = None
        if attributed or (attributed is None and len(measured) <= MOST_ATTRIBUTED):
            causes = attribute(measured, deployment, replayed, comparison)
        report = Report(measured, deployment, replayed, comparison, attribution=causes)
    text = json_report.render(report) if style == "json" else render_text(text_report.view(report), output)
    if text is not None:
        write_output(text, output)
