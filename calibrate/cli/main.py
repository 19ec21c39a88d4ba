"""The ``servecal`` command: finds its sub-commands without importing them, so that it starts quickly."""

from __future__ import annotations

import importlib
import os
import sys

import click

COMMANDS = {
    "compare": ("calibrate.cli.compare_command", "Compare two traces, two profiles, or two saved reports."),
    "conformance": ("calibrate.cli.conformance_command", "Compare the simulated schedule with vLLM's own."),
    "fit": ("calibrate.cli.fit_command", "Fit a profile to measured runs, with intervals and held-out error."),
    "ingest": ("calibrate.cli.ingest_command", "Join logs and results of one run into a trace; say what is unknown."),
    "profiles": ("calibrate.cli.profiles_group", "List, show and import profiles, models and hardware."),
    "record": ("calibrate.cli.record_command", "Say how to record a vLLM engine, or what a recording holds."),
    "replay": ("calibrate.cli.replay_command", "Simulate a trace's requests and write the predicted trace."),
    "report": ("calibrate.cli.report_command", "Replay a trace, compare, and print the error report."),
    "traces": ("calibrate.cli.traces_group", "List, show and fetch reference traces."),
    "workload": ("calibrate.cli.workload_group", "Cut, scale, merge, sample or redraw a workload before a replay."),
}
INPUT_WRONG = 2


class _LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(COMMANDS[cmd_name][0])
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in sorted(COMMANDS.items())])


@click.command(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="servecal")
def cli() -> None:
    """Tells whether an LLM-serving simulation can be trusted.

    TRACE is a path that any reader recognises, or the name of a trace from `servecal traces list`.
    PROFILE is a YAML file, a name from `servecal profiles list`, or roofline:<hardware>.

    Exit codes: 0 fine, 1 a gate failed, 2 usage or input wrong, 3 inconclusive.
    """


def main() -> None:
    """Run the command line; every failure ends in one message and an exit code."""
    try:
        result = cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(INPUT_WRONG)
    except SystemExit:
        # So click ends, with 1, where the reader of our output went away, as `head` does. That is no failed gate.
        sys.exit(0)
    except Exception as error:
        sys.exit(_explain(error))
    sys.exit(result if isinstance(result, int) else 0)


def _explain(error: Exception) -> int:
    """Say what went wrong; what is not the user's doing keeps its traceback behind SERVECAL_DEBUG."""
    from profiles.errors import InputError
    from simulator.errors import SimulationError

    if isinstance(error, InputError | SimulationError):
        click.echo(f"error: {error}", err=True)
        return INPUT_WRONG
    if os.environ.get("SERVECAL_DEBUG"):
        raise error
    if isinstance(error, OSError) and error.strerror:
        # A full disk, a name too long: nothing that servecal could have foreseen, or mend.
        where = f"{str(error.filename)[:200]}: " if error.filename else ""
        click.echo(f"error: {where}{error.strerror}", err=True)
        return INPUT_WRONG
    click.echo(
        f"error: internal: {type(error).__name__}: {error} (a defect of servecal; set SERVECAL_DEBUG=1 for the "
        "traceback, and please report it)",
        err=True,
    )
    return INPUT_WRONG


if __name__ == "__main__":
    main()
