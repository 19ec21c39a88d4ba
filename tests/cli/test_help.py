import os
import subprocess
import sys

import click
import pytest

from calibrate.cli.main import cli


def commands(group, path=()):
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        yield (*path, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


ALL = list(commands(cli))


@pytest.mark.parametrize("command", [(), *ALL], ids=lambda command: " ".join(command) or "servecal")
def test_every_command_explains_itself(called, command):
    finished = called(*command, "--help")
    assert (finished.code, finished.err) == (0, "")
    assert finished.out.startswith("Usage: ")
    assert "  -h, --help" in finished.out or "  --help" in finished.out
    assert called(*command, "-h").out == finished.out


def test_help_lists_every_command_and_the_exit_codes(servecal):
    text = servecal("--help").out
    for command in ALL:
        if len(command) == 1:
            assert f"  {command[0]} " in text
    assert "0 fine, 1 a gate failed, 2 usage or input wrong, 3 inconclusive" in text


def test_help_and_version_load_no_numeric_library():
    for option in ("--help", "--version"):
        script = (
            "import sys; from calibrate.cli.main import main\n"
            f"sys.argv = ['servecal', '{option}']\n"
            "try:\n    main()\nfinally:\n"
            "    heavy = {'numpy', 'pyarrow', 'pydantic', 'rich', 'yaml'} & set(sys.modules)\n"
            "    print(heavy, file=sys.stderr)"
        )
        process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
        assert (process.returncode, process.stderr.strip()) == (0, "set()")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sing",), "No such command 'sing'"),
        (("report",), "Missing argument 'TRACE'"),
        (("report", "x"), "Missing option '--profile'"),
        (("replay", "x", "--profile", "roofline:l4"), "Missing option '-o'"),
        (("report", "x", "--profile", "roofline:l4", "--format", "xml"), "'xml' is not one of 'text', 'json'"),
        (("report", "x", "--profile", "roofline:l4", "--loud"), "No such option"),
        (("report", "x", "y", "--profile", "roofline:l4"), "Got unexpected extra argument"),
        (("traces", "fetch"), "Missing argument 'NAMES...'"),
        (("profiles", "import", "x"), "Missing option '-o'"),
        (("profiles", "import", "x", "-o", "y.yaml", "--tp", "0"), "0 is not in the range x>=1"),
    ],
)
def test_wrong_usage_is_explained_and_exits_with_2(called, arguments, message):
    finished = called(*arguments)
    assert (finished.code, finished.out) == (2, "")
    assert finished.err.startswith("Usage: ")
    assert message in finished.err
    assert "Traceback" not in finished.err


@pytest.mark.parametrize("arguments", [("--help",), ("profiles", "list"), ("profiles", "show", "l4")])
def test_the_reader_of_the_output_may_go_away(tmp_path, arguments):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "calibrate.cli.main", *arguments]
    process = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=tmp_path, timeout=60)
    os.close(writing)
    assert (process.returncode, process.stderr) == (0, "")


def test_a_full_disk_is_said_to_be_full(tmp_path):
    with open("/dev/full", "w") as full:  # noqa: PTH123
        process = subprocess.run(
            [sys.executable, "-m", "calibrate.cli.main", "traces", "list"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            timeout=60,
        )
    assert process.returncode == 2
    assert process.stderr == "error: No space left on device\n"
