"""The formats of a report beside the terminal's text, by the names that the command line knows."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec

from calibrate.reports.report import Report
from profiles.errors import InputError

FORMATS: Mapping[str, tuple[str, str]] = {
    "json": ("json_report", "render"),
    "markdown": ("markdown_report", "render"),
    "github": ("github_report", "render"),
    "junit": ("junit_report", "render"),
    "csv": ("requests_report", "render_csv"),
    "parquet": ("requests_report", "render_parquet"),
    "html": ("html_report", "render"),
}
"""Module and function of each; imported when it is asked for."""
NEEDS = {"html": ("bokeh", "html")}
"""Package and extra that a format needs beyond the core."""
FOR_FILES = ("parquet", "html")
"""Formats that nobody wants on a terminal."""


def require(style: str) -> None:
    """Check that a format can be made here, before anything is replayed.

    Raises
    ------
    InputError
        If a package that it needs is not installed.
    """
    package, extra = NEEDS.get(style, (None, None))
    if package is not None and find_spec(package) is None:
        raise InputError(
            f"{style} needs the package {package}, which is not installed: pip install 'servecal[{extra}]'",
            field="--format",
        )


def render(report: Report, style: str) -> str | bytes:
    """Return a report in one of ``FORMATS``.

    Raises
    ------
    InputError
        If a package that the format needs is not installed.
    """
    require(style)
    module, function = FORMATS[style]
    made: str | bytes = getattr(import_module(f"calibrate.reports.{module}"), function)(report)
    return made
