"""What docs/ci.md tells people to copy is YAML, and asks for formats that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from calibrate.reports.outputs import FORMATS

TEXT = (Path(__file__).parents[2] / "docs" / "ci.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("block", [text for kind, text in BLOCKS if kind == "yaml"])
def test_examples_are_yaml(block):
    assert yaml.safe_load(block)


def test_the_workflow_reports_comments_and_keeps_the_page():
    steps = yaml.safe_load(next(text for kind, text in BLOCKS if kind == "yaml"))["jobs"]["accuracy"]["steps"]
    runs = " ".join(step.get("run", "") for step in steps)
    assert "--format github" in runs
    assert "gh pr comment" in runs
    assert any("upload-artifact" in step.get("uses", "") for step in steps)
    assert any("actions/cache" in step.get("uses", "") for step in steps)


def test_formats_in_the_examples_exist():
    asked = set(re.findall(r"--(?:also|format) (\w+)", TEXT))
    assert {"github", "html", "junit", "markdown"} <= asked <= {"text", *FORMATS}
