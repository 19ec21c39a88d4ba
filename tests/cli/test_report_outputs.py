"""``--format``, ``-o`` and ``--also``: which views are written, and where."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from xml.etree import ElementTree

import pyarrow.parquet as pq
import pytest

SUFFIXES = ("text", "json", "markdown", "github", "junit", "csv", "parquet", "html")


@pytest.fixture
def report(called, bench_folder, tmp_path):
    bench_folder().write(tmp_path / "run")
    return lambda *arguments, **environment: called(
        "report", "run", "--profile", "roofline:l4", *arguments, **environment
    )


def files(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "run")


def test_one_replay_writes_every_format(report, tmp_path, monkeypatch):
    import calibrate.cli.report_command as module

    replays = []
    original = module.replay
    monkeypatch.setattr(module, "replay", lambda *given, **named: replays.append(1) or original(*given, **named))
    also = [word for one in SUFFIXES for word in ("--also", f"{one}=out.{one}")]
    finished = report(*also)
    assert (finished.code, finished.err) == (0, "")
    assert len(replays) == 1
    assert files(tmp_path) == sorted(f"out.{one}" for one in SUFFIXES)
    assert (tmp_path / "out.text").read_text() == finished.out
    assert json.loads((tmp_path / "out.json").read_text())["schema"] == "servecal.report/1"
    assert (tmp_path / "out.markdown").read_text().startswith("### servecal: ")
    assert "\n::notice title=servecal::Mean error" in (tmp_path / "out.github").read_text()
    assert ElementTree.parse(tmp_path / "out.junit").getroot().tag == "testsuites"
    assert pq.read_table(tmp_path / "out.parquet").num_rows == len((tmp_path / "out.csv").read_text().splitlines()) - 1
    assert (tmp_path / "out.html").read_text().startswith("<!DOCTYPE html>")


def test_the_same_run_gives_the_same_bytes_wherever_they_go(report, tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        assert report(*(word for one in SUFFIXES for word in ("--also", f"{one}={folder}/{one}"))).code == 0
    for style in SUFFIXES:
        assert (tmp_path / "one" / style).read_bytes() == (tmp_path / "two" / style).read_bytes()
    for style in set(SUFFIXES) - {"parquet", "html"}:
        assert report("--format", style).out.encode() == (tmp_path / "one" / style).read_bytes()


def test_the_command_is_told_without_where_its_output_went(report):
    flags = ("--set", "engine.max_num_seqs=2", "--set", "host.per_step=0.001", "--no-cold-start")
    text = report(*flags, "--format", "markdown", "--also", "csv=a b.csv").out
    assert (
        "servecal report run --profile roofline:l4 --set engine.max_num_seqs=2 --set host.per_step=0.001 "
        "--no-cold-start\n" in text
    )


def test_github_adds_to_the_summary_of_its_job(report, tmp_path):
    summary = tmp_path / "summary.md"
    finished = report("--format", "github", GITHUB_STEP_SUMMARY=summary)
    assert "\n::notice title=servecal::Mean error" in finished.out
    assert summary.read_text().startswith("### servecal: run with roofline:l4")
    report("--also", "github=annotations", GITHUB_STEP_SUMMARY=summary)
    assert summary.read_text().count("### servecal: ") == 2
    report("--format", "json", GITHUB_STEP_SUMMARY=summary)
    assert summary.read_text().count("### servecal: ") == 2


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--also", "html"), ("--also", "'html'", "FORMAT=FILE")),
        (("--also", "pdf=x.pdf"), ("--also", "'pdf=x.pdf'", "markdown")),
        (("--also", "json="), ("--also", "FORMAT=FILE")),
        (("--also", "json=a", "--also", "csv=./a"), ("--also", "cannot share a file")),
        (("-o", "a", "--also", "csv=a"), ("--also", "cannot share a file")),
        (("--also", "json=run"), ("run", "is the trace itself")),
        (("--also", "json=no/such/a.json"), ("no/such/a.json", "cannot be written")),
    ],
)
def test_what_cannot_be_written_is_refused(report, tmp_path, arguments, parts):
    report(*arguments, "--format", "json", *(() if "-o" in arguments else ("-o", "b"))).refused(*parts)
    assert files(tmp_path) in ([], ["b"])


def test_a_page_without_its_extra_names_the_extra_before_replaying(report, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("calibrate.reports.outputs.find_spec", lambda name: None if name == "bokeh" else find(name))
    report("--also", "html=page.html").refused("bokeh", "pip install 'servecal[html]'")
    report("--format", "html").refused("bokeh", "pip install 'servecal[html]'")
    assert files(tmp_path) == []


@pytest.mark.parametrize("style", ["parquet", "html"])
def test_what_is_for_files_is_not_shown_on_a_terminal(style, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    from calibrate.cli.report_outputs import destinations
    from profiles.errors import InputError

    monkeypatch.setattr(sys, "stdout", Terminal())
    with pytest.raises(InputError, match="not for a terminal"):
        destinations(style, None, ())
    assert destinations("json", None, (f"{style}=out",))[1].style == style
