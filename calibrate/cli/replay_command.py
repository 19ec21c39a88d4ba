"""``servecal replay``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from calibrate.cli.options import deploy, keep_trace, load_trace, progress, replay_options
from replay.domain import outside_sentences
from replay.run import replay


@click.command("replay")
@replay_options
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the predicted trace (trace.json and Parquet).",
)
@click.option("--iterations", is_flag=True, help="Keep every engine iteration with its batch.")
@click.option("--format", "style", type=click.Choice(["text", "json"]), default="text", show_default=True)
def command(
    trace: str,
    profile: str,
    settings: tuple[str, ...],
    model: str | None,
    assume_defaults: bool,
    arrivals: str,
    cold_start: bool,
    output: Path,
    iterations: bool,
    style: str,
) -> None:
    """Simulate the requests of TRACE and write the predicted trace."""
    measured = load_trace(trace, arrivals)
    keep_trace(trace, output)
    deployment = deploy(measured, profile, settings, model, assume_defaults)
    with progress(len(measured), "replaying") as advance:
        replayed = replay(measured, deployment, record_iterations=iterations, cold_start=cold_start, progress=advance)
    replayed.predicted.save(output)
    summary = {**replayed.summary, "conflicts": deployment.conflicts, "assumed": deployment.assumed}
    if style == "json":
        click.echo(json.dumps({"schema": "servecal.replay/1", "output": str(output), **summary}, indent=1))
        return
    click.echo(
        f"{output}: {summary['requests']} requests, {summary['iterations']} iterations, "
        f"{summary['simulated_seconds']:.3f} s simulated, device busy {100 * summary['device_busy']:.1f} %"
    )
    for line in deployment.conflicts:
        click.echo(f"conflict: {line}")
    for line in outside_sentences(summary["outside_domain"]):
        click.echo(line)
    if deployment.assumed:
        click.echo("assumed: " + ", ".join(f"{name}={value}" for name, value in deployment.assumed.items()))
