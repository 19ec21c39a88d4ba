from __future__ import annotations

import re

import pytest

from calibrate.reports import github_report, markdown_report
from profiles.errors import InputError

COMMAND = re.compile(r"^::(error|warning|notice) title=([^:,\r\n]*)::([^\r\n]*)$")


def commands(text: str) -> list[tuple[str, str, str]]:
    """What the runner reads: kind, title, message, with its escapes undone in its order."""

    def undone(one: str) -> str:
        for code, plain in (("%0D", "\r"), ("%0A", "\n"), ("%3A", ":"), ("%2C", ","), ("%25", "%")):
            one = one.replace(code, plain)
        return one

    lines = text.removesuffix("\n").split("\n")
    return [(kind, undone(title), undone(said)) for kind, title, said in (COMMAND.match(one).groups() for one in lines)]


@pytest.fixture
def report(make_trace, make_report, judged):
    return judged(make_report(make_trace([0.011, 0.010, 0.012], meta={"model": "me/mine"})))


def test_gates_and_findings_become_annotations_gravest_first(report):
    found = commands(github_report.render(report))
    assert found[0] == ("error", "servecal: gate e2e.mape failed", "40 % is above 10 %: by hand")
    assert [kind for kind, _, _ in found] == ["error", "error", "warning", "warning", "notice", "notice"]
    assert ("warning", "servecal: gate tpot.p50 inconclusive", "holds the limit: by hand") in found
    assert found[-1] == ("notice", "servecal", report.headline)


def test_a_gate_that_passes_is_no_annotation(report):
    assert "ttft.p99" not in github_report.render(report)


def test_hostile_text_is_one_command_of_its_own_kind(make_trace, make_report, judged, hostile):
    plain = make_report(make_trace([0.011, 0.010], meta={"model": "me/mine"}))
    calm, attacked = (commands(github_report.render(judged(plain, text))) for text in ("x", hostile))
    assert [kind for kind, _, _ in attacked] == [kind for kind, _, _ in calm]
    assert attacked[0][2] == f"40 % is above 10 %: {hostile}"


def test_escapes_in_foreign_text_stay_as_they_are(make_trace, make_report, judged):
    report = judged(make_report(make_trace([0.011, 0.010], meta={"model": "me/mine"})), "100%0A::error::planted%25")
    assert commands(github_report.render(report))[0][2] == "40 % is above 10 %: 100%0A::error::planted%25"


def test_the_summary_is_added_to_what_a_job_already_wrote(report, tmp_path):
    path = tmp_path / "summary.md"
    path.write_text("before\n", encoding="utf-8")
    github_report.append_summary(report, path)
    assert path.read_text(encoding="utf-8") == f"before\n{markdown_report.render(report)}\n"


def test_a_summary_that_cannot_be_written_is_named(report, tmp_path):
    with pytest.raises(InputError, match="GITHUB_STEP_SUMMARY cannot be written"):
        github_report.append_summary(report, tmp_path / "no" / "summary.md")
