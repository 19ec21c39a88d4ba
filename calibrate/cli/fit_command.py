"""``servecal fit``."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np

from calibrate.aggregates import AggregateComparison
from calibrate.bootstrap import LEAST_RESAMPLES, SEED, Bootstrap, bootstrap
from calibrate.cli.options import check_output, load_runs, progress, render_text, strict_option, strictly, write_output
from calibrate.errors import BATCH_METRICS, Comparison
from calibrate.fit import ProfileFit
from calibrate.holdout import Run, hold_out, mean_errors, score
from calibrate.inference import resolved
from calibrate.learners import learner_for
from calibrate.plan import SIMULATIONS, Plan, plan
from calibrate.sanity import refuse_nonsense
from calibrate.space import CALL_UNITS, HOST_UNITS, LINEAR_UNITS, call_units
from profiles.deployment import Deployment
from profiles.errors import InputError
from profiles.profile import Accelerator, Call, Coefficient, FrontEnd, Host, LoadedProfile, Profile, load_profile
from replay.trace import Trace
from simulator.accelerators.base import HOST_COMPONENTS
from simulator.accelerators.linear import Linear

SCHEMA = "servecal.fit/1"
NAMES = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "E2E"} | {name: name.replace("_", " ") for name in BATCH_METRICS}
PROPOSALS = 4
"""Runs of a plan that are shown."""


@click.command("fit")
@click.argument("traces", nargs=-1, required=True, metavar="TRACE...")
@click.option(
    "--base", help="Profile to start from: YAML, library name, roofline:<hardware>, linear, or regression (learned)."
)
@click.option(
    "--compare",
    "bases",
    multiple=True,
    metavar="BASE",
    help="Instead of --base and -o, several times: rank these bases by what they predict of held-out requests.",
)
@click.option(
    "--holdout",
    help="Also fit a part and score the rest: time:0.5 (what --compare does if nothing is said), kfold-time:5 or "
    "trace:PATTERN.",
)
@click.option(
    "-o",
    "--profile",
    "target",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where the fitted profile goes (YAML).",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="Override engine.<vLLM argument>, or link.bandwidth and link.latency.",
)
@click.option("--model", help="Library name or config.json of the model that was served.")
@click.option("--assume-defaults", is_flag=True, help="Take vLLM's defaults for engine arguments nobody says.")
@click.option(
    "--strength",
    type=click.FloatRange(min=1e-9, max=1e9),
    help="Weight of the base profile; chosen by cross-validation if absent.",
)
@click.option(
    "--arrivals",
    multiple=True,
    metavar="SCHEME|TRACE=SCHEME",
    help="For all traces or for one: measured (default), nominal, catalogue, or poisson:rate=R,seed=S.",
)
@click.option(
    "--cold-start/--no-cold-start",
    default=True,
    show_default=True,
    help="Impose the measured cold start of a run that was not warmed up, where errors are told.",
)
@click.option(
    "--bootstrap",
    "resamples",
    type=click.IntRange(min=LEAST_RESAMPLES),
    metavar="N",
    help="Also tell intervals from N resamples over arrival time, e.g. 200.",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Processes for the bootstrap; it tells the same with any number.",
)
@click.option(
    "--plan",
    "planned",
    is_flag=True,
    help="Also say which further run would tell most for the time it takes; needs no -o.",
)
@strict_option
@click.option("--format", "style", type=click.Choice(["text", "json"]), default="text", show_default=True)
def command(
    traces: tuple[str, ...],
    base: str | None,
    bases: tuple[str, ...],
    holdout: str | None,
    target: Path | None,
    settings: tuple[str, ...],
    model: str | None,
    assume_defaults: bool,
    strength: float | None,
    arrivals: tuple[str, ...],
    cold_start: bool,
    resamples: int | None,
    jobs: int,
    planned: bool,
    strict: bool,
    style: str,
) -> int:
    """Fit a profile's coefficients to TRACEs: recorded iterations, engine stamps, client times, batches, or aggregates.

    A folder of batches, a part of a catalogued trace, or a table of load levels stands for all that are in it;
    FILE#LEVEL for one.
    """
    if bases:
        if base is not None or target is not None:
            raise click.UsageError("--compare writes no profile: leave out --base and -o, then fit the one you choose")
        if resamples is not None or planned or strict:
            raise click.UsageError("--bootstrap, --plan and --strict are of one fit: leave them out with --compare")
        from calibrate.cli.fit_compare import compare

        measured, notes = load_runs(traces, arrivals)
        options = {"settings": settings, "model": model, "assume_defaults": assume_defaults, "strength": strength}
        compare(measured, bases, holdout or "time:0.5", notes, style, cold_start=cold_start, **options)
        return 0
    if base is None or (target is None and not planned):
        raise click.UsageError("Missing option '--base' or '-o' (or --compare BASE, several times)")
    begun = time.monotonic()
    loaded = load_profile(base)
    if target is not None:
        check_output(target)
    runs: list[Run] = []
    doubts: list[str] = []
    measured, notes = load_runs(traces, arrivals)
    for trace in measured:
        deployment = resolved(loaded, trace, settings=settings, model=model, assume_defaults=assume_defaults)
        doubts += refuse_nonsense(trace, deployment)
        runs.append((trace, deployment))
    held = hold_out(runs, holdout, strength, cold_start) if holdout else []
    fit = learner_for(runs[0][1], strength).fit([(trace, deployment, None) for trace, deployment in runs])
    everything = [np.ones(len(trace), dtype=bool) for trace, _ in runs]
    scored = score(runs, fit, everything, cold_start)
    in_sample = mean_errors(scored)
    out_of_sample = mean_errors([one for _, comparisons in held for one in comparisons]) if held else None
    resampled = _resampled(fit, resamples, jobs) if resamples else None
    proposed, unplanned = _planned(fit, runs) if planned else (None, [])
    document = {
        "schema": SCHEMA,
        "traces": [{"name": trace.name, "digest": trace.digest()} for trace, _ in runs],
        "base": {"name": loaded.profile.name, "digest": loaded.digest},
        "coefficients": {
            one.name: {"value": one.value, "ci95": list(one.ci95), "prior": one.prior, "identified": one.identified}
            | ({"ci95_bootstrap": list(resampled.ci95[one.name])} if resampled else {})
            for one in fit.coefficients_
        },
        "identifiability": {
            "singular_values": fit.singular_values_,
            "correlated": [list(pair) for pair in fit.correlated_],
            "sentences": fit.sentences_ + (resampled.sentences if resampled else []),
        },
        "bootstrap": resampled and {"resamples": len(resampled.values), "seed": SEED},
        "plan": proposed and proposed.as_dict(runs[0][0].meta.get("model")),
        "front_end": None if fit.front_end_ is None else asdict(fit.front_end_),
        "warnings": [*doubts, *fit.warnings_, *unplanned],
        "findings": [asdict(one) for one in fit.findings_],
        "equations": fit.equations_,
        "iterations": fit.iterations_,
        "misplaced": fit.misplaced_,
        "simulations": fit.simulations_,
        "residual": fit.residual_,
        "strength": fit.strength_,
        "in_sample": in_sample,
        "holdout": {"scheme": holdout, "metrics": out_of_sample} if held else None,
        "load_levels": [
            *_levels(scored, "in sample"),
            *_levels([one for _, comparisons in held for one in comparisons], "held out"),
        ],
        "notes": notes,
        "conflicts": sorted({line for _, deployment in runs for line in deployment.conflicts}),
        "seconds": round(time.monotonic() - begun, 3),
        "profile": None if target is None else str(target),
    }
    if target is not None:
        _write(loaded, runs, fit, document, target)
    if style == "json":
        click.echo(json.dumps(document, indent=1))
    else:
        text = render_text(_view(document, fit), None)
        if text is not None:
            click.echo(text, nl=False)
    return strictly(doubts) if strict else 0


def _resampled(fit: ProfileFit, resamples: int, jobs: int) -> Bootstrap:
    with progress(resamples, "resamples") as advance:
        return bootstrap(fit, resamples, jobs=jobs, progress=advance)


def _planned(fit: ProfileFit, runs: list[Run]) -> tuple[Plan | None, list[str]]:
    """A plan for the engine of the first trace, or why there is none: a fit is not lost for that."""
    try:
        with progress(SIMULATIONS, "simulations") as advance:
            return plan(fit, *runs[0], progress=advance), []
    except InputError as error:
        return None, [str(error)]


def _write(loaded: LoadedProfile, runs: list[Run], fit: ProfileFit, document: dict[str, Any], target: Path) -> None:
    stem = target.name.removesuffix(".yaml").removesuffix(".yml")
    profile, files = fit.written(_profile(loaded, runs, fit, document, target), stem)
    for name, content in files.items():
        write_output(content, target.parent / name)
    write_output(profile.to_yaml(), target)


def _levels(comparisons: Sequence[Comparison], part: str) -> list[dict[str, Any]]:
    """Errors of the statistics of load levels."""
    return [
        {
            "name": one.measured.name,
            "part": part,
            "metrics": {
                metric: {statistic: asdict(level) for statistic, level in errors.percentiles.items()}
                for metric, errors in one.metrics.items()
            },
            "throughput": one.throughput,
        }
        for one in comparisons
        if isinstance(one, AggregateComparison)
    ]


def _levels_view(levels: Sequence[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2), pad_edge=False, header_style="dim")
    columns = [(metric, statistic) for metric in ("ttft", "tpot", "e2e") for statistic in ("mean", "p99")]
    for column in (
        "load level, errors",
        "",
        *(f"{statistic} {NAMES[metric]}" for metric, statistic in columns),
        "tokens/s",
    ):
        table.add_column(column, justify="left" if not table.columns else "right", no_wrap=True)
    for one in levels:
        found = [one["metrics"].get(metric, {}).get(statistic) for metric, statistic in columns]
        found.append(one["throughput"].get("output_tokens_per_s"))
        table.add_row(one["name"], one["part"], *(f"{100 * own['error']:+.1f} %" if own else "-" for own in found))
    return table


def _profile(
    loaded: LoadedProfile, runs: list[Run], fit: ProfileFit, document: dict[str, Any], target: Path
) -> Profile:
    """The base profile with what was learned, where it came from and how far it was tested."""
    base = loaded.profile
    device = runs[0][1].accelerator.device
    options = dict(base.accelerator.options)
    if "tables" in options:
        tables = (loaded.folder / options["tables"]).resolve()
        options["tables"] = Path(os.path.relpath(tables, target.resolve().parent)).as_posix()
    fitted = {one.name for one in fit.coefficients_}
    units = {term: HOST_UNITS[name] if name in fitted else 0.0 for name, term in HOST_COMPONENTS.items()}
    host = Host.model_validate({**units, "source": "units of the fitted coefficients of the same terms"})
    if isinstance(device, Linear):
        options["seconds"] = {name: LINEAR_UNITS[name] for name in Linear.components if name in fitted}
        host = Host(per_step=0.0, per_sequence=0.0, source="part of the fitted coefficients")
    metrics = {"in_sample": {key: round(value["mape"], 5) for key, value in document["in_sample"].items()}}
    held = document["holdout"]
    if held:
        metrics["holdout " + held["scheme"]] = {key: round(value["mape"], 5) for key, value in held["metrics"].items()}
    configs = [fit.inferred(deployment.config) for _, deployment in runs]
    return Profile(
        name=target.name.removesuffix(".yaml").removesuffix(".yml"),
        description=f"{base.name}, fitted to {_called([trace.name for trace, _ in runs])}.",
        model=base.model,
        hardware=base.hardware,
        engine=base.engine,
        accelerator=Accelerator.model_validate({"kind": base.accelerator.kind, **options}),
        coefficients={
            one.name: Coefficient(
                value=_short(one.value),
                ci95=(_short(one.ci95[0]), _short(one.ci95[1])),
                ci95_bootstrap=_interval(document["coefficients"][one.name].get("ci95_bootstrap")),
                prior=_short(one.prior),
                identified=one.identified,
            )
            for one in fit.coefficients_
        },
        host=host,
        front_end=_front_end(fit, base),
        call=Call(**asdict(call_units(fitted))) if fitted & set(CALL_UNITS) else None,
        domain=fit.domain_,
        provenance={
            "method": (
                "least squares on iterations (recorded, or reconstructed from stamps or token times) or batches"
                if fit.equations_
                else "least squares on simulated latencies"
            ),
            "base": {"name": base.name, "digest": loaded.digest},
            "traces": document["traces"],
            "engine": {
                "version": _alike([_version(*run) for run in runs]),
                "arguments": {
                    name: _alike([config.arguments.get(name) for config in configs]) for name in configs[0].arguments
                },
            },
            "equations": fit.equations_,
            "inferred": {one.name: one.value for one in fit.findings_ if one.source not in ("stated", "assumed")},
            "mape": metrics,
            "servecal": version("servecal"),
        },
    )


def _version(trace: Trace, deployment: Deployment) -> str:
    """As the trace says it, else what is simulated."""
    said = (trace.meta.get("engine") or {}).get("version")
    return str(said) if said else ".".join(map(str, deployment.config.version))


def _alike(values: Sequence[Any]) -> Any:
    """The value that all runs have, or a list of those that they have."""
    several = list(dict.fromkeys(values))
    return several[0] if len(several) == 1 else several


def _front_end(fit: ProfileFit, base: Profile) -> FrontEnd | None:
    learned = fit.front_end_
    if learned is None:
        return base.front_end
    return FrontEnd(
        per_request=_short(learned.per_request),
        per_request_ci95=(_short(learned.per_request_ci95[0]), _short(learned.per_request_ci95[1])),
        per_prompt_token=_short(learned.per_prompt_token),
        per_prompt_token_ci95=(_short(learned.per_prompt_token_ci95[0]), _short(learned.per_prompt_token_ci95[1])),
    )


def _called(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{len(names)} traces from {names[0]} to {names[-1]}"


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _interval(found: list[float] | None) -> tuple[float, float] | None:
    return None if found is None else (_short(found[0]), _short(found[1]))


def _view(document: dict[str, Any], fit: ProfileFit) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2), pad_edge=False, header_style="dim")
    resampled = ["by bootstrap"] if document["bootstrap"] else []
    for column in ("coefficient", "value", "95 % interval", *resampled, "base", ""):
        table.add_column(column, justify="left" if column in ("coefficient", "") else "right", no_wrap=True)
    for one in fit.coefficients_:
        intervals = [
            document["coefficients"][one.name][key] for key in ("ci95", "ci95_bootstrap")[: 1 + len(resampled)]
        ]
        table.add_row(
            one.name,
            f"{one.value:.3f}",
            *(f"{low:.3f} to {high:.3f}" for low, high in intervals),
            f"{one.prior:.3f}",
            "" if one.identified else "not identified",
        )
    parts: list[Any] = [table, Text()]
    way = fit.front_end_
    if way is not None:
        (low, high), (least, most) = way.per_request_ci95, way.per_prompt_token_ci95
        if way.from_latencies:
            told = "told by latencies" if way.identified else "not identified"
        else:
            told = (
                f"{1e6 * way.per_prompt_token:.2f} us a prompt token ({1e6 * least:.2f} to {1e6 * most:.2f}); told by "
                f"{way.requests} requests that did not queue"
            )
        constant = f"{1e3 * way.per_request:.2f} ms a request ({1e3 * low:.2f} to {1e3 * high:.2f})"
        parts += [Text(f"front end: {constant}, {told}"), Text()]
    levels = document["load_levels"]
    errors = Table(box=None, padding=(0, 2), pad_edge=False, header_style="dim")
    rows = [("in sample", document["in_sample"])]
    if document["holdout"]:
        rows.append((f"held out, {document['holdout']['scheme']}", document["holdout"]["metrics"]))
    shown = {name: label for name, label in NAMES.items() if any(name in metrics for _, metrics in rows)}
    each = "batch" if set(shown) <= set(BATCH_METRICS) else "request"
    first = f"mean error per {each}" if len(levels) < len(document["traces"]) else "mean error of the levels' means"
    for column in (first, *shown.values(), "n"):
        errors.add_column(column, justify="left" if column == first else "right", no_wrap=True)
    for label, metrics in rows:
        figures = [f"{100 * metrics[name]['mape']:.2f} %" if name in metrics else "-" for name in shown]
        errors.add_row(label, *figures, str(max((one["n"] for one in metrics.values()), default=0)))
    parts += [errors, Text()]
    if levels:
        parts += [_levels_view(levels), Text()]
    spans = Text(f"{fit.simulations_} simulations; weight of the base profile {fit.strength_:g}")
    parts.append(
        spans
        if not fit.equations_
        else Text(
            f"{fit.equations_} measured spans of {fit.iterations_} iterations, median error of a span "
            f"{100 * fit.residual_:.1f} %; weight of the base profile {fit.strength_:g}"
        )
    )
    if fit.misplaced_:
        parts.append(Text(f"{fit.misplaced_} first tokens lie in another iteration than the engine arguments say"))
    parts += [Text(f"warning: {line}") for line in document["warnings"]]
    several = len(document["traces"]) > 1
    parts += [
        Text(f"inferred: {one.trace + ': ' if several else ''}{one.sentence}")
        for one in fit.findings_
        if one.source != "stated"
    ]
    parts += [Text(f"note: {line}") for line in document["identifiability"]["sentences"]]
    parts += [Text(f"note: {line}") for line in document["notes"]]
    parts += [Text(f"conflict: {line}") for line in document["conflicts"]]
    if document["plan"]:
        parts += [Text(), *_proposals(document["plan"]), Text()]
    where = f"written to {document['profile']}" if document["profile"] else "no profile written (no -o)"
    parts.append(Text(f"{where} in {document['seconds']:.1f} s"))
    return Group(*parts)


def _proposals(proposed: dict[str, Any]) -> list[Any]:
    """The best runs to record next as a table, and how to send the best one."""
    from rich.table import Table
    from rich.text import Text

    shown = proposed["runs"][:PROPOSALS]
    if not shown:
        return [Text(f"plan: {proposed['sentence']}")]
    table = Table(box=None, padding=(0, 2), pad_edge=False, header_style="dim")
    for column in ("run to record next", "time", "predictions", "95 % interval it narrows most"):
        table.add_column(column, justify="right" if column in ("time", "predictions") else "left")
    for one in shown:
        names = one["tells"][:3]
        narrowed = (
            f"{name} +-{one['half_widths'][name][0]:.2g} -> {one['half_widths'][name][1]:.2g}" for name in names
        )
        errors = f"+-{100 * proposed['prediction_error']:.2g} -> {100 * one['prediction_error']:.2g} %"
        table.add_row(one["recipe"], f"{one['seconds']:.0f} s", errors, ", ".join(narrowed) or "-")
    return [table, Text(), Text(f"plan: {proposed['sentence']}"), Text(f"  {shown[0]['command']}")]
