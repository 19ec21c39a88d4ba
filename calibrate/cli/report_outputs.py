"""Where the views of one report go: ``--format``, ``-o`` and ``--also``, without replaying again."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from click.core import ParameterSource

from calibrate.cli.options import Command, check_output, render_text, write_output
from calibrate.reports import github_report, text_report
from calibrate.reports.outputs import FOR_FILES, FORMATS, render, require
from calibrate.reports.report import Report
from profiles.errors import InputError

TEXT = "text"
_NOT_REPEATED = ("style", "output", "also")


@dataclass(frozen=True)
class Destination:
    """One view: its format and its file, None for the standard output."""

    style: str
    output: Path | None


def also_option(command: Command) -> Command:
    """Add ``--also``."""
    return click.option(
        "--also",
        multiple=True,
        metavar="FORMAT=FILE",
        help="Write another format of the same report too; may be given several times.",
    )(command)


def destinations(style: str, output: Path | None, also: Sequence[str]) -> list[Destination]:
    """Read what ``--format``, ``-o`` and ``--also`` ask for, before anything is replayed.

    Raises
    ------
    InputError
        If a format is unknown or cannot be made here, two views share a file, a terminal should show what is not for
        one, or a file has no folder.
    """
    wanted = [Destination(style, output)]
    for given in also:
        name, equals, file = given.partition("=")
        if name not in (TEXT, *FORMATS) or not equals or not file:
            names = ", ".join((TEXT, *FORMATS))
            raise InputError(f"{given!r}: expected FORMAT=FILE, with a format of: {names}", field="--also")
        wanted.append(Destination(name, Path(file)))
    for one in wanted:
        require(one.style)
    files = [one.output.resolve() for one in wanted if one.output is not None]
    twice = next((file for file in files if files.count(file) > 1), None)
    if twice is not None:
        raise InputError("two formats cannot share a file", file=twice.name, field="--also")
    if style in FOR_FILES and output is None and sys.stdout.isatty():
        raise InputError(f"{style} is not for a terminal: -o FILE", field="--format")
    for one in wanted:
        if one.output is not None:
            check_output(one.output)
    return wanted


def write_report(report: Report, wanted: Sequence[Destination]) -> None:
    """Make every view, and only then write them, so that a failure leaves no half of them behind.

    Raises
    ------
    InputError
        If a file cannot be written.
    """
    made = [(one, _rendered(report, one)) for one in wanted]
    for one, content in made:
        if content is not None:
            write_output(content, one.output)
    summary = os.environ.get(github_report.SUMMARY)
    if summary and any(one.style == "github" for one in wanted):
        github_report.append_summary(report, Path(summary))


def _rendered(report: Report, wanted: Destination) -> str | bytes | None:
    if wanted.style == TEXT:
        return render_text(text_report.view(report), wanted.output)
    return render(report, wanted.style)


def command_line() -> str:
    """The running command as a user would give it again, without where its output goes."""
    context = click.get_current_context()
    words = ["servecal", str(context.info_name)]
    for parameter in context.command.params:
        name = str(parameter.name)
        if name in _NOT_REPEATED or context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = context.params[name]
        if isinstance(parameter, click.Argument):
            words += [str(one) for one in (value if isinstance(value, tuple) else (value,))]
        elif isinstance(parameter, click.Option) and parameter.is_flag:
            words.append((parameter.opts if value else parameter.secondary_opts or parameter.opts)[0])
        else:
            flag = max(parameter.opts, key=len)
            words += [word for one in (value if isinstance(value, tuple) else (value,)) for word in (flag, str(one))]
    return shlex.join(words)
