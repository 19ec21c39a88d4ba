"""Options of commands that judge: limits, a baseline, repeats, and how to exit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from calibrate.gate_settings import INCONCLUSIVE, rules_of
from profiles.errors import InputError

Command = TypeVar("Command", bound=Callable[..., Any])


def gate_options(*, baseline: bool) -> Callable[[Command], Command]:
    """Add options of gates; the command gets them as ``rules`` (``calibrate.gates.Rules``), and ``repeat``."""

    def add(command: Command) -> Command:
        @functools.wraps(command)
        def read(*arguments: Any, **named: Any) -> Any:
            rules = rules_of(
                named.pop("gates"),
                named.pop("fail_on"),
                named.pop("baseline", None),
                named.pop("worse_by", None),
                named.pop("inconclusive"),
            )
            if named["repeat"] and not rules.any:
                raise InputError("repeated runs say how sure a verdict is, but no gate was asked for", field="--repeat")
            return command(*arguments, rules=rules, **named)

        wrapped: Any = read
        for option in reversed(_options(baseline)):
            wrapped = option(wrapped)
        return wrapped  # type: ignore[no-any-return]

    return add


def _options(baseline: bool) -> list[Any]:
    options = [
        click.option(
            "--fail-on",
            multiple=True,
            metavar="METRIC.STATISTIC:LIMIT",
            help="Exit with 1 if it is off by more, beyond the noise: 'ttft.p99:10%', 'makespan:5%', 'coverage:99%'.",
        ),
        click.option(
            "--gates",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help='TOML file of such limits: ttft.p99 = "10%".',
        ),
        click.option(
            "--repeat",
            multiple=True,
            metavar="TRACE",
            help="A repeated run of the same workload: says what runs differ by. Several say it better.",
        ),
        click.option(
            "--inconclusive",
            type=click.Choice(INCONCLUSIVE),
            help="How to exit where the noise hides the answer: with 3 (report, the default), as pass, or as fail.",
        ),
    ]
    if baseline:
        options[2:2] = [
            click.option(
                "--baseline",
                metavar="REPORT.json",
                help="An earlier `--format json` report: exit with 1 if errors have grown since.",
            ),
            click.option(
                "--worse-by",
                metavar="POINTS,RELATIVE",
                help="What counts as grown: by both or more.  [default: 2%,10%]",
            ),
        ]
    return options
