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
    replay_options,
)
from calibrate.cli.report_outputs import also_option, command_line, destinations, write_report
from calibrate.errors import compare
from calibrate.reports.outputs import FORMATS
from calibrate.reports.report import Report
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
@output_options("text", *FORMATS)
@also_option
def command(
    trace: str,
    profile: str,
    settings: tuple[str, ...],
    model: str | None,
    assume_defaults: bool,
    arrivals: str,
    cold_start: bool,
    anchor: str,
    style: str,
    output: Path | None,
    also: tuple[str, ...],
) -> None:
    """Replay TRACE with a profile, compare request by request, and print the error report."""
    wanted = destinations(style, output, also)
    measured = load_trace(trace, arrivals)
    for one in wanted:
        keep_trace(trace, one.output)
    deployment = deploy(measured, profile, settings, model, assume_defaults)
    with progress(len(measured), "replaying") as advance:
        replayed = replay(measured, deployment, cold_start=cold_start, progress=advance)
    comparison = compare(measured, replayed.predicted, anchor)
    write_report(Report(measured, deployment, replayed, comparison, command=command_line()), wanted)
