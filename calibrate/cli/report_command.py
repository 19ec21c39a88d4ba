"""``servecal report``."""

from __future__ import annotations

from pathlib import Path

import click

from calibrate.cli.options import (
    deploy,
    keep_trace,
    load_trace,
    output_options,
    progress,
    render_text,
    replay_options,
    strict_option,
    strictly,
    write_output,
)
from calibrate.errors import compare
from calibrate.reports import json_report, text_report
from calibrate.reports.report import Report
from replay.quality import doubts, examine
from replay.run import replay


@click.command("report")
@replay_options
@click.option(
    "--anchor",
    type=click.Choice(["arrival", "queued"]),
    default="arrival",
    show_default=True,
    help="What measured latencies count from; vLLM stamps `queued` only between steps.",
)
@strict_option
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
    strict: bool,
    style: str,
    output: Path | None,
) -> int:
    """Replay TRACE with a profile, compare request by request, and print the error report."""
    measured = load_trace(trace, arrivals)
    keep_trace(trace, output)
    deployment = deploy(measured, profile, settings, model, assume_defaults)
    with progress(len(measured), "replaying") as advance:
        replayed = replay(measured, deployment, cold_start=cold_start, progress=advance)
    report = Report(
        measured,
        deployment,
        replayed,
        compare(measured, replayed.predicted, anchor),
        findings=examine(measured, deployment),
    )
    text = json_report.render(report) if style == "json" else render_text(text_report.view(report), output)
    if text is not None:
        write_output(text, output)
    return strictly([f"{one.check} ({one.severity})" for one in doubts(report.findings)]) if strict else 0
