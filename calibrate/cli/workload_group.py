"""``servecal workload``: workloads made out of others before a replay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from calibrate.cli.options import Command, keep_trace, read_source
from replay import workload
from replay.draws import SHAPE as ARRIVALS
from replay.length_draws import SHAPE as LENGTHS
from replay.length_draws import LengthDraw, parse_lengths
from replay.trace import Trace

SECONDS = click.FloatRange(-1e12, 1e12)
SEED = click.IntRange(0, 2**32 - 1)
COUNT = click.IntRange(1, 10**8)


@click.group("workload")
def command() -> None:
    """Make a workload out of another before a replay: cut, shift, scale, merge, sample, or draw it anew.

    Each writes a trace in servecal's own form, which says of every column whether it is measured or made, and lists the
    steps that made it. Latencies measured under another load are dropped.
    """


def _output(command: Command) -> Command:
    return click.option(
        "-o",
        "--output",
        required=True,
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder for the new trace (trace.json and Parquet).",
    )(command)


def _seed(command: Command) -> Command:
    return click.option("--seed", type=SEED, default=0, show_default=True)(command)


def _write(trace: Trace, output: Path, *sources: str) -> None:
    for source in sources:
        keep_trace(source, output)
    trace.save(output)
    arrival = trace.column("arrival")
    arrival = arrival[~np.isnan(arrival)]
    span = float(np.ptp(arrival)) if arrival.size else 0.0
    rate = f", {(arrival.size - 1) / span:.3g} requests/s over {span:.1f} s" if span > 0 else ""
    prompt, output_tokens = (np.nanmean(trace.column(name)) for name in ("prompt_tokens", "output_tokens"))
    click.echo(
        f"{output}: {len(trace):,} requests{rate}, mean {prompt:,.0f} prompt and {output_tokens:,.0f} output tokens"
    )


@command.command("cut")
@click.argument("trace")
@click.option("--start", type=SECONDS, help="Seconds on the trace's clock from which requests are kept.")
@click.option("--end", type=SECONDS, help="Seconds before which they arrive.")
@click.option("--first", type=COUNT, help="How many, in the order of their arrivals.")
@click.option("--skip", type=click.IntRange(0, 10**8), default=0, help="How many to leave out before that.")
@_output
def cut(trace: str, output: Path, **bounds: Any) -> None:
    """Keep the requests of a stretch of time, or so many."""
    _write(workload.cut(read_source(trace), **bounds), output, trace)


@command.command("shift")
@click.argument("trace")
@click.option("--by", type=SECONDS, help="Seconds to add to all times.")
@click.option("--to", type=SECONDS, help="Where the first request shall arrive.")
@_output
def shift(trace: str, by: float | None, to: float | None, output: Path) -> None:
    """Move all times; the only step that keeps measured latencies."""
    _write(workload.shift(read_source(trace), by=by, to=to), output, trace)


@command.command("scale")
@click.argument("trace")
@click.option("--factor", type=click.FloatRange(1e-6, 1e6), help="How many times as often requests shall come.")
@click.option("--rate", type=click.FloatRange(1e-6, 1e9), help="Requests per second in the mean.")
@_output
def scale(trace: str, factor: float | None, rate: float | None, output: Path) -> None:
    """Change the rate of requests; the pattern of bursts stays."""
    _write(workload.scale(read_source(trace), factor=factor, rate=rate), output, trace)


@command.command("merge")
@click.argument("traces", nargs=-1, required=True)
@_output
def merge(traces: tuple[str, ...], output: Path) -> None:
    """Bring several workloads to one engine, each on its own clock (`shift --to 0` lets them begin together)."""
    _write(workload.merge([read_source(one) for one in traces]), output, *traces)


@command.command("sample")
@click.argument("trace")
@click.option("--fraction", type=click.FloatRange(0, 1, min_open=True), help="The part to keep.")
@click.option("--count", type=COUNT, help="How many to keep.")
@click.option("--by", type=click.Choice(["request", "session"]), default="request", show_default=True)
@_seed
@_output
def sample(trace: str, output: Path, **choice: Any) -> None:
    """Keep a random part of the requests, or of the sessions with all their requests."""
    _write(workload.sample(read_source(trace), **choice), output, trace)


@command.command("redraw")
@click.argument("trace")
@click.option("--arrivals", required=True, metavar="SCHEME", help=ARRIVALS)
@_output
def redraw(trace: str, arrivals: str, output: Path) -> None:
    """Draw arrivals anew: Poisson, gamma (CV = burstiness ** -0.5) or constant."""
    _write(workload.redraw(read_source(trace), arrivals), output, trace)


@command.command("lengths")
@click.argument("trace")
@click.option("--prompt", metavar="LENGTHS", help=LENGTHS)
@click.option("--output-tokens", metavar="LENGTHS", help="The same, of outputs.")
@_seed
@_output
def lengths(trace: str, prompt: str | None, output_tokens: str | None, seed: int, output: Path) -> None:
    """Draw the lengths of prompts or outputs anew."""
    drawn = workload.with_lengths(
        read_source(trace),
        prompt=_lengths("prompt", prompt),
        output=_lengths("output", output_tokens),
        seed=seed,
    )
    _write(drawn, output, trace)


@command.command("prefixes")
@click.argument("trace")
@click.option("--tokens", type=COUNT, required=True, help="Length of a shared prefix.")
@click.option("--groups", type=COUNT, default=1, show_default=True, help="How many different ones.")
@click.option("--share", type=click.FloatRange(0, 1), default=1.0, show_default=True, help="Part of the requests.")
@click.option("--block-size", type=click.IntRange(1, 2**16), default=16, show_default=True)
@_seed
@_output
def prefixes(trace: str, output: Path, **choice: Any) -> None:
    """Let prompts begin alike, in groups; lengths stay as they are."""
    _write(workload.with_prefixes(read_source(trace), **choice), output, trace)


@command.command("make")
@click.option("--requests", type=COUNT, required=True)
@click.option("--arrivals", required=True, metavar="SCHEME", help=ARRIVALS)
@click.option("--prompt", required=True, metavar="LENGTHS", help=LENGTHS)
@click.option("--output-tokens", required=True, metavar="LENGTHS", help="The same, of outputs.")
@_seed
@_output
def make(requests: int, arrivals: str, prompt: str, output_tokens: str, seed: int, output: Path) -> None:
    """Make a workload out of nothing: arrivals and lengths by distributions."""
    draws = _lengths("prompt", prompt), _lengths("output", output_tokens)
    assert draws[0] is not None
    assert draws[1] is not None
    _write(workload.made(requests, arrivals, draws[0], draws[1], seed), output)


_OPTIONS: dict[str, tuple[str, str]] = {
    "prompt": ("prompt_tokens", "--prompt"),
    "output": ("output_tokens", "--output-tokens"),
}


def _lengths(what: str, text: str | None) -> LengthDraw | None:
    column, option = _OPTIONS[what]
    load: Callable[[str], Trace] = read_source
    return None if text is None else parse_lengths(text, column, load, option)
