"""``servecal report``."""

from __future__ import annotations

from pathlib import Path

import click

from calibrate.cli.gate_options import gate_options
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
from calibrate.errors import Comparison, compare
from calibrate.estimates import Compared
from calibrate.gates import Rules, judge
from calibrate.noise import with_repeats
from calibrate.reports import json_report, text_report
from calibrate.reports.report import Report
from calibrate.saved_reports import read_report
from replay.run import replay
from replay.trace import Trace


@click.command("report")
@replay_options
@click.option(
    "--anchor",
    type=click.Choice(["arrival", "queued"]),
    default="arrival",
    show_default=True,
    help="What measured latencies count from; vLLM stamps `queued` only between steps.",
)
@gate_options(baseline=True)
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
    rules: Rules,
    repeat: tuple[str, ...],
    style: str,
    output: Path | None,
) -> int:
    """Replay TRACE with a profile, compare request by request, and print the error report.

    With gates, the exit code is their verdict: 0 pass, 1 fail, 3 inconclusive.
    """
    baseline = read_report(Path(rules.baseline)) if rules.baseline else None
    measured = load_trace(trace, arrivals)
    keep_trace(trace, output)
    deployment = deploy(measured, profile, settings, model, assume_defaults)
    with progress(len(measured), "replaying") as advance:
        replayed = replay(measured, deployment, cold_start=cold_start, progress=advance)
    comparison = compare(measured, replayed.predicted, anchor)

    def again(run: Trace) -> Comparison:
        other = deploy(run, profile, settings, model, assume_defaults)
        return compare(run, replay(run, other, cold_start=cold_start).predicted, anchor)

    judgement = None
    if rules.any:
        if baseline is not None:
            baseline.check(measured, anchor)
        runs = [load_trace(one, arrivals) for one in repeat]
        figures, noise = with_repeats(Compared(comparison), measured, runs, again)
        judgement = judge(figures, rules, baseline, noise)
    report = Report(measured, deployment, replayed, comparison, judgement=judgement)
    text = json_report.render(report) if style == "json" else render_text(text_report.view(report), output)
    if text is not None:
        write_output(text, output)
    return judgement.exit_code(rules.inconclusive) if judgement else 0
