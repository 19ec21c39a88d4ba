"""``servecal compare``."""

from __future__ import annotations

from pathlib import Path

import click

from calibrate.cli.gate_options import gate_options
from calibrate.cli.options import (
    deploy,
    keep_trace,
    load_measured,
    load_trace,
    output_options,
    progress,
    render_text,
    write_output,
)
from calibrate.differences import Difference, ProfileDifference, Replayed, ReportDifference, TraceDifference
from calibrate.errors import Comparison, compare
from calibrate.estimates import Compared, Figures
from calibrate.gates import Judgement, Rules, judge, judge_change
from calibrate.noise import with_repeats
from calibrate.reports import compare_json, compare_text
from calibrate.run_pairs import Unpaired, pair
from calibrate.saved_reports import is_report, read_report
from profiles.errors import InputError
from profiles.library import names
from profiles.profile import ROOFLINE, WITHOUT_PHYSICS, load_profile
from reference_traces.library import find_entry
from replay.run import replay
from replay.trace import Trace

REPORTS, PROFILES, TRACES = "saved report", "profile", "trace"


@click.command("compare")
@click.argument("a")
@click.argument("b")
@click.option("--on", metavar="TRACE", help="Of two profiles: replay this with both, and compare the predictions.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="With --on: as in `servecal report`.")
@click.option("--model", help="With --on: as in `servecal report`.")
@click.option("--assume-defaults", is_flag=True, help="With --on: as in `servecal report`.")
@click.option("--arrivals", default="measured", show_default=True, help="Of traces: as in `servecal report`.")
@gate_options(baseline=False)
@output_options("text", "json")
def command(
    a: str,
    b: str,
    on: str | None,
    settings: tuple[str, ...],
    model: str | None,
    assume_defaults: bool,
    arrivals: str,
    rules: Rules,
    repeat: tuple[str, ...],
    style: str,
    output: Path | None,
) -> int:
    """Compare A and B: two traces, two profiles, or two saved reports (JSON).

    Differences are B's from A. Of traces and predictions, limits bound the relative difference; of saved reports,
    by how much an error may have grown.
    """
    kind = _kind(a, b)
    if rules.baseline is not None:
        raise InputError("A is the baseline here; remove the report from the table [baseline]", field="--gates")
    if on is not None and kind != PROFILES:
        raise InputError(f"replays a trace with two profiles; {a} and {b} are {kind}s", field="--on")
    if repeat and kind != TRACES:
        raise InputError(f"takes repeated runs of a trace; {a} and {b} are {kind}s", field="--repeat")
    for one in (a, b):
        _keep(one, kind, output)
    if kind == REPORTS:
        found: Difference = _reports(a, b, rules)
    elif kind == PROFILES:
        found = _profiles(a, b, on, rules, (settings, model, assume_defaults, arrivals))
    else:
        first, second, *runs = (load_measured(one, arrivals) for one in (a, b, *repeat))
        found = _traces(first, second, rules, runs)
    text = compare_json.render(found) if style == "json" else render_text(compare_text.view(found), output)
    if text is not None:
        write_output(text, output)
    return found.judgement.exit_code(rules.inconclusive) if found.judgement else 0


def _kind(a: str, b: str) -> str:
    """What both are; some names are those of a profile and of a trace.

    Raises
    ------
    InputError
        If they are not two of a kind.
    """
    mine, theirs = _kinds(a), _kinds(b)
    both = [one for one in mine if one in theirs]
    if not both:
        raise InputError(
            f"{a} is a {mine[0]} and {b} is a {theirs[0]}: expected two of a kind (`servecal report TRACE --profile "
            "PROFILE` holds a trace against a profile)"
        )
    return both[0]


def _kinds(name: str) -> list[str]:
    path = Path(name)
    if is_report(path):
        return [REPORTS]
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        return [PROFILES]
    if path.exists():
        return [TRACES]
    if name.startswith(ROOFLINE) or name in WITHOUT_PHYSICS:
        return [PROFILES]
    if name not in names("fitted"):
        return [TRACES]
    return [PROFILES, TRACES] if find_entry(name) else [PROFILES]


def _keep(name: str, kind: str, output: Path | None) -> None:
    """Refuse to write a result over what it is made of."""
    if kind == TRACES:
        keep_trace(name, output)
    elif output is not None and output.exists() and Path(name).exists() and output.samefile(name):
        raise InputError(f"is the {kind} itself; choose another output", file=output)


def _reports(a: str, b: str, rules: Rules) -> ReportDifference:
    before, now = read_report(Path(a)), read_report(Path(b))
    return ReportDifference(before, now, judge_change(before, now, rules.gates) if rules.any else None)


def _traces(a: Trace, b: Trace, rules: Rules, runs: list[Trace]) -> TraceDifference:
    pairing = pair(a, b)
    judgement: Judgement | None = None
    if rules.any:
        figures: Figures
        if isinstance(pairing.compared, Unpaired):
            if runs:
                raise InputError(f"the requests of {a.name} and {b.name} differ: repeats say nothing", field="--repeat")
            figures, noise = pairing.compared, "block bootstrap over arrival time within each run"
        else:
            figures, noise = with_repeats(Compared(pairing.compared), a, runs, lambda run: _paired(run, b))
            if not runs and all("predicted" in (one.meta.get("columns") or {}).values() for one in (a, b)):
                noise = "block bootstrap over arrival time; a simulation has no noise of its own"
        judgement = judge(figures, rules, noise=noise)
    return TraceDifference(a, b, pairing, judgement)


def _paired(run: Trace, other: Trace) -> Comparison:
    found = pair(run, other).compared
    if isinstance(found, Unpaired):
        raise InputError(f"the requests of {run.name} and {other.name} differ", field="--repeat")
    return found


def _profiles(
    a: str, b: str, on: str | None, rules: Rules, options: tuple[tuple[str, ...], str | None, bool, str]
) -> ProfileDifference:
    both = (load_profile(a), load_profile(b))
    if on is None:
        if rules.any:
            raise InputError(
                "two profiles have no latencies to judge; --on TRACE replays one with both", field="--fail-on"
            )
        return ProfileDifference(*both)
    settings, model, assume_defaults, arrivals = options
    measured = load_trace(on, arrivals)
    predicted = []
    for profile in (a, b):
        with progress(len(measured), "replaying") as advance:
            deployment = deploy(measured, profile, settings, model, assume_defaults)
            predicted.append(replay(measured, deployment, progress=advance).predicted)
    errors = (compare(measured, predicted[0]), compare(measured, predicted[1]))
    between = _traces(predicted[0], predicted[1], rules, [])
    return ProfileDifference(*both, Replayed(measured, between, errors))
