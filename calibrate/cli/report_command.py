"""``servecal report``."""

from __future__ import annotations

from pathlib import Path

import click

from calibrate.aggregates import DRAWS, compare_aggregates, predict
from calibrate.attribution import attribute
from calibrate.cli.gate_options import gate_options
from calibrate.cli.options import (
    deploy,
    keep_trace,
    load_measured,
    output_options,
    progress,
    replay_options,
    strict_option,
    strictly,
)
from calibrate.cli.report_outputs import also_option, command_line, destinations, write_report
from calibrate.errors import Comparison, compare
from calibrate.estimates import figures_of
from calibrate.gates import Rules, judge
from calibrate.noise import with_repeats
from calibrate.reports.outputs import FORMATS
from calibrate.reports.report import Report
from calibrate.saved_reports import read_report
from profiles.deployment import Deployment
from profiles.errors import InputError
from replay.load_level import draws, holds_aggregates
from replay.quality import doubts, examine
from replay.run import Replay, replay
from replay.trace import Trace

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
@gate_options(baseline=True)
@strict_option
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
    attributed: bool | None,
    rules: Rules,
    repeat: tuple[str, ...],
    strict: bool,
    style: str,
    output: Path | None,
    also: tuple[str, ...],
) -> int:
    """Replay TRACE with a profile, compare request by request (a load level by its aggregates), print the report.

    With gates, the exit code is their verdict: 0 pass, 1 fail, 3 inconclusive.
    """
    wanted = destinations(style, output, also)
    baseline = read_report(Path(rules.baseline)) if rules.baseline else None
    measured = load_measured(trace, arrivals)
    for one in wanted:
        keep_trace(trace, one.output)
    deployment = deploy(measured, profile, settings, model, assume_defaults)
    findings = examine(measured, deployment)
    replayed, comparison = _predicted(measured, deployment, anchor, cold_start)
    causes = None
    if attributed or (attributed is None and len(measured) <= MOST_ATTRIBUTED):
        causes = attribute(measured, deployment, replayed, comparison, findings)

    def again(run: Trace) -> Comparison:
        return _predicted(run, deploy(run, profile, settings, model, assume_defaults), anchor, cold_start)[1]

    judgement = None
    if rules.any:
        if baseline is not None:
            baseline.check(measured, anchor)
        runs = [load_measured(one, arrivals) for one in repeat]
        figures, noise = with_repeats(figures_of(comparison), measured, runs, again)
        judgement = judge(figures, rules, baseline, noise)
    report = Report(measured, deployment, replayed, comparison, findings, causes, judgement, command=command_line())
    write_report(report, wanted)
    doubted = [f"{one.check} ({one.severity})" for one in doubts(findings)]
    if strict and doubted:
        return strictly(doubted)
    return judgement.exit_code(rules.inconclusive) if judgement else 0


def _predicted(measured: Trace, deployment: Deployment, anchor: str, cold_start: bool) -> tuple[Replay, Comparison]:
    """Replay a run and compare; of a load level, the first of its draws and the comparison with all."""
    if not holds_aggregates(measured):
        with progress(len(measured), "replaying") as advance:
            replayed = replay(measured, deployment, cold_start=cold_start, progress=advance)
        return replayed, compare(measured, replayed.predicted, anchor)
    if anchor != "arrival":
        raise InputError(f"{measured.name} holds aggregates, which count from the arrival", field="--anchor")
    with progress(len(measured) * len(draws(measured, DRAWS)), "replaying") as advance:
        replays = predict(measured, deployment, advance)
    return replays[0], compare_aggregates(measured, replays)
