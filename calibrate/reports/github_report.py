"""The report as GitHub workflow commands: gates and findings annotate the run; the job's summary is the Markdown.

Escaping as the runner undoes it (docs.github.com, "Workflow commands for GitHub Actions"): ``%``, CR and LF in data,
``:`` and ``,`` besides in properties.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from calibrate.reports import markdown_report
from calibrate.reports.report import Report
from calibrate.reports.tables import short, with_ids
from profiles.errors import InputError

SUMMARY = "GITHUB_STEP_SUMMARY"
"""Environment variable: the file that GitHub shows as the job's summary."""
_OF_VERDICT = {"fail": "error", "inconclusive": "warning"}
_OF_SEVERITY = {"error": "error", "warning": "warning", "info": "notice"}


def render(report: Report) -> str:
    """Return the commands, one a line, most urgent first: GitHub shows ten of a kind per step."""
    found = [*_gates(report), *_findings(report)]
    order = ("error", "warning", "notice")
    lines = [line for kind in order for one, line in found if one == kind]
    return "\n".join([*lines, _command("notice", "servecal", report.headline)]) + "\n"


def append_summary(report: Report, path: Path) -> None:
    """Add the Markdown to the job's summary.

    Raises
    ------
    InputError
        If the file cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(markdown_report.render(report) + "\n")
    except OSError as error:
        raise InputError(f"${SUMMARY} cannot be written: {error.strerror}", file=path) from None


def _gates(report: Report) -> Iterator[tuple[str, str]]:
    for one in report.judgement.results if report.judgement else ():
        kind = _OF_VERDICT.get(one.verdict)
        if kind:
            said = "failed" if one.verdict == "fail" else one.verdict
            yield kind, _command(kind, f"servecal: gate {one.name} {said}", one.sentence)


def _findings(report: Report) -> Iterator[tuple[str, str]]:
    for one in report.findings:
        kind = _OF_SEVERITY[one.severity]
        yield kind, _command(kind, f"servecal: data quality, {one.check}", with_ids(one.sentence, one.requests))


def _command(kind: str, title: str, message: str) -> str:
    return f"::{kind} title={_property(short(title))}::{_data(short(message))}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
