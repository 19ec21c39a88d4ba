"""Options and habits that commands share: traces, profiles, output, progress."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import click

from profiles.deployment import Deployment, resolve
from profiles.errors import InputError
from profiles.profile import load_profile
from reference_traces.library import WORKLOADS, Located, locate, names_below
from replay.arrivals import with_arrivals
from replay.draws import DISTRIBUTIONS
from replay.joining import join
from replay.readers import batch_files, levels_of, read_trace, selections
from replay.run import facts_of
from replay.trace import REQUEST_CLOCK, Trace
from replay.workload import is_workload

CATALOGUE = "catalogue"
"""Choice of ``--arrivals``: as the catalogue says they were drawn, else as measured."""
Command = TypeVar("Command", bound=Callable[..., Any])


def replay_options(command: Command) -> Command:
    """Add what every command that replays a trace takes."""
    for option in reversed(
        (
            click.argument("trace"),
            click.option("--profile", required=True, help="YAML file, library name, or roofline:<hardware>."),
            click.option(
                "--set",
                "settings",
                multiple=True,
                metavar="NAME=VALUE",
                help="Override engine.<vLLM argument>, engine.version, host.<term> (seconds), link.bandwidth|latency.",
            ),
            click.option("--model", help="Library name or Hugging Face config.json of the model that was served."),
            click.option(
                "--assume-defaults",
                is_flag=True,
                help="Take vLLM's defaults for engine arguments that neither trace nor profile says.",
            ),
            click.option(
                "--arrivals",
                default="measured",
                show_default=True,
                help="measured, nominal (the workload's), catalogue, or poisson:rate=R,seed=S to draw them anew.",
            ),
            click.option(
                "--cold-start/--no-cold-start",
                default=True,
                show_default=True,
                help="Impose the measured cold start of a run that was not warmed up.",
            ),
        )
    ):
        command = option(command)
    return command


def output_options(*formats: str) -> Callable[[Command], Command]:
    """Add ``--format`` and ``-o``."""

    def add(command: Command) -> Command:
        command = click.option(
            "-o",
            "--output",
            type=click.Path(dir_okay=False, path_type=Path),
            help="Write here instead of printing.",
        )(command)
        return click.option("--format", "style", type=click.Choice(formats), default=formats[0], show_default=True)(
            command
        )

    return add


def strict_option(command: Command) -> Command:
    """Add ``--strict``."""
    return click.option(
        "--strict", is_flag=True, help="Exit with 2, after all output, if a warning or error is found in the data."
    )(command)


def strictly(found: Sequence[str]) -> int:
    """Return the exit code of ``--strict``, and say why it is not 0."""
    if not found:
        return 0
    several = f"{len(found)} findings" if len(found) > 1 else "a finding"
    click.echo(f"error: --strict: the data have {several}: {', '.join(found)}", err=True)
    return 2


def load_trace(name: str, arrivals: str = "measured") -> Trace:
    """Read a trace by path or name, with the arrivals asked for.

    Raises
    ------
    InputError
        If it cannot be found or used.
    """
    trace = read_source(name)
    located, _ = _select(parts_of(name)[0])
    if not len(trace):
        raise InputError(
            f"{trace.meta['source']['format']} tells of an engine and holds no requests; join it with a file of "
            "requests (`servecal ingest`)",
            file=located.path,
        )
    drawn = located.file.arrivals if located.file and len(parts_of(name)) == 1 else None
    scheme = drawn and f"{drawn.distribution}:rate={drawn.rate:g},seed={drawn.seed},overhead={drawn.overhead:g}"
    if arrivals == CATALOGUE:
        return with_arrivals(trace, scheme or "measured")
    if trace.clock == REQUEST_CLOCK and arrivals == "measured" and scheme:
        raise InputError(
            f"{name} does not say when its requests were sent; the catalogue says how they were drawn: "
            f"--arrivals {CATALOGUE} takes that, which is --arrivals {scheme}",
            field="--arrivals",
        )
    return with_arrivals(trace, arrivals)


def read_source(name: str) -> Trace:
    """Read a trace by path or name as it stands, whether or not it says when requests were sent.

    ``A+B`` are sources of one run, which are joined (``replay.joining``).

    Raises
    ------
    InputError
        If it cannot be found or used.
    """
    parts = parts_of(name)
    if len(parts) > 1:
        return join([read_source(one) for one in parts])
    located, selection = _select(name)
    return _with_catalogue(read_trace(located.path, selection), located)


def parts_of(name: str) -> list[str]:
    """Sources that a name stands for: ``A+B`` are two, if no file is called so."""
    return [name] if "+" not in name or Path(name).exists() else name.split("+")


def source_paths(name: str) -> list[Path]:
    """Where a trace's sources lie, by path or name."""
    return [_select(one)[0].path for one in parts_of(name)]


def load_measured(name: str, arrivals: str = "measured") -> Trace:
    """The same as ``load_trace``, of a trace with something that a prediction can be compared with.

    Raises
    ------
    InputError
        If it is a workload only.
    """
    return _measured(load_trace(name, arrivals))


def _measured(trace: Trace) -> Trace:
    if not is_workload(trace):
        return trace
    raise InputError(
        f"{trace.name} is a workload, of which no latency was measured: there is nothing to compare with; "
        "`servecal replay` predicts how it would be served"
    )


def arrivals_of(names: Sequence[str], choices: Sequence[str]) -> list[str]:
    """Say which arrivals each of several traces takes.

    Parameters
    ----------
    names : sequence of str
        Traces, as the user calls them.
    choices : sequence of str
        Options: a scheme for all, or ``NAME=SCHEME`` for one.

    Raises
    ------
    InputError
        If one names a trace that is not among them.
    """
    general = "measured"
    own: dict[str, str] = {}
    for choice in choices:
        name, equals, scheme = choice.partition("=")
        if not equals or (":" in name and name.partition(":")[0] in DISTRIBUTIONS):
            general = choice
            continue
        if name not in names:
            raise InputError(
                f"{choice!r}: expected SCHEME or NAME=SCHEME, with a name of: {', '.join(names)}", field="--arrivals"
            )
        own[name] = scheme
    return [own.get(name, general) for name in names]


def _select(name: str) -> tuple[Located, str | None]:
    """Where a trace lies, and which one of its file is meant: ``FILE#SELECTION``."""
    head, mark, selection = name.rpartition("#")
    if not mark or Path(name).exists():
        return locate(name), None
    return locate(head), selection


def load_traces(name: str, arrivals: str = "measured") -> list[Trace]:
    """Read a trace, or all that a name stands for.

    That is a folder of batches, a part of the catalogue, a table of load levels, or ``FILE#PATTERN``.

    Raises
    ------
    InputError
        If there is none, or one cannot be used.
    """
    if len(parts_of(name)) > 1:
        return [load_trace(name, arrivals)]
    path = Path(name)
    files = batch_files(path) if path.is_dir() else []
    if files:
        root = path.resolve()
        called = [f"{root.name}/{one.resolve().relative_to(root).with_suffix('').as_posix()}" for one in files]
        found = [load_trace(str(one), arrivals) for one in files]
        # Those of the catalogue have their own names.
        return [one if "/" in one.name else one.with_meta(name=own) for one, own in zip(found, called, strict=True)]
    below = [] if path.exists() else names_below(name)
    if below:
        return [load_trace(one, arrivals) for one in below]
    head, mark, pattern = name.rpartition("#")
    if mark and not path.exists():
        inside = [one for one in selections(locate(head).path) if fnmatchcase(one, pattern)]
        return [load_trace(f"{head}#{one}", arrivals) for one in inside or [pattern]]
    levels = levels_of(locate(name).path)
    return [load_trace(f"{name}#{one}" if len(levels) > 1 else name, arrivals) for one in levels or [""]]


def load_runs(names: Sequence[str], arrivals: Sequence[str]) -> tuple[list[Trace], list[str]]:
    """Read all traces that are to be fitted, and say what was left out of them.

    Parameters
    ----------
    names : sequence of str
    arrivals : sequence of str
        As for ``arrivals_of``.

    Raises
    ------
    InputError
        As ``load_traces``.
    """
    chosen = zip(names, arrivals_of(names, arrivals), strict=True)
    traces = [_measured(trace) for name, choice in chosen for trace in load_traces(name, choice)]
    empty = [one.name for one in traces if one.batches is not None and not (one.statuses == "ok").any()]
    if not empty or len(empty) == len(traces):
        return traces, []
    return [one for one in traces if one.name not in empty], [f"left out, as no batch was served: {', '.join(empty)}"]


def _with_catalogue(trace: Trace, located: Located) -> Trace:
    """Fill in what the trace does not say of its engine and the catalogue does."""
    entry = located.entry
    if entry is None:
        return trace
    alone = located.file is None or (entry.format in WORKLOADS and len(entry.files) == 1)
    name = entry.name if alone or located.file is None else f"{entry.name}/{located.file.name.removesuffix('.csv')}"
    if entry.format == "splitwise-perf-model":
        name = trace.name.replace(trace.name.partition("#")[0], entry.name)
    meta: dict[str, Any] = {"name": name}
    if trace.meta.get("model") is None:
        meta["model"] = entry.model
    if trace.meta.get("hardware") is None:
        meta["hardware"] = entry.hardware
    engine = dict(trace.meta.get("engine") or {})
    if entry.engine is not None:
        engine["version"] = engine.get("version") or entry.engine.version
        engine["arguments"] = {**entry.engine.arguments, **(engine.get("arguments") or {})}
    return trace.with_meta(**meta, engine=engine)


def keep_trace(name: str, output: Path | None) -> None:
    """Refuse to write a result over the trace that it is made of.

    Raises
    ------
    InputError
        If they are the same file or folder.
    """
    if output is not None and output.exists() and any(output.samefile(one) for one in source_paths(name)):
        raise InputError("is the trace itself; choose another output", file=output)


def deploy(
    trace: Trace, profile: str, settings: tuple[str, ...], model: str | None, assume_defaults: bool
) -> Deployment:
    """Bring profile, trace and command line together."""
    return resolve(
        load_profile(profile),
        facts_of(trace),
        settings=settings,
        model=model,
        assume_defaults=assume_defaults,
    )


@contextmanager
def progress(total: int, label: str) -> Iterator[Callable[[int], None] | None]:
    """Give a callback that shows a bar on a terminal once a second has passed; None where nobody looks."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    begun = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(label, total=total)

    def advance(done: int) -> None:
        if bar.live.is_started:
            bar.update(task, completed=done)
        elif time.monotonic() - begun > 1:
            bar.start()

    try:
        yield advance
    finally:
        bar.stop()


def check_output(output: Path) -> None:
    """Refuse an output that cannot be written, before work is done for it.

    Raises
    ------
    InputError
        If there is no folder to write it to, or none that may be written.
    """
    if output.exists() and not output.is_file():
        return  # a pipe or a device
    folder = output.resolve().parent
    if not folder.is_dir():
        raise InputError("cannot be written: there is no such folder", file=output)
    if not os.access(folder, os.W_OK):
        raise InputError("cannot be written: the folder is read-only", file=output)


def write_output(content: str | bytes, output: Path | None) -> None:
    """Print a content, or write it to a file whole or not at all.

    Raises
    ------
    InputError
        If the file cannot be written.
    """
    if output is None:
        click.echo(content, nl=False)
        return
    data = content.encode() if isinstance(content, str) else content
    try:
        if output.exists() and not output.is_file():
            output.write_bytes(data)  # a pipe or a device
            return
        target = output.resolve()
        handle, scratch = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
            mask = os.umask(0)
            os.umask(mask)
            Path(scratch).chmod(0o666 & ~mask)
            Path(scratch).replace(target)
        except BaseException:
            Path(scratch).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", file=output) from None


def render_text(renderable: Any, output: Path | None) -> str | None:
    """Print something rich renders, or return it as plain text for a file."""
    from rich.console import Console

    if output is None and sys.stdout.isatty():
        Console().print(renderable)
        return None
    import io

    stream = io.StringIO()
    Console(file=stream, width=120, no_color=True, highlight=False).print(renderable)
    lines = (line.rstrip() for line in stream.getvalue().splitlines())
    return "\n".join(lines) + "\n"
