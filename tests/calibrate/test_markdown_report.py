"""What Markdown says is judged by how it renders, not by how it is written."""

from __future__ import annotations

import pytest
from markdown_it import MarkdownIt

from calibrate.reports import markdown_report


@pytest.fixture(scope="session")
def rendered():
    """Tokens of the Markdown with what GitHub adds to CommonMark: tables, strikethrough, and HTML within."""
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])

    def render(report):
        return parser.parse(markdown_report.render(report))

    return render


@pytest.fixture
def report(make_trace, make_report, judged):
    meta = {
        "model": "me/mine",
        "engine": {"version": "0.19.0", "arguments": {"max_num_seqs": 32}},
        "notes": ["half of it is guessed"],
    }
    return judged(make_report(make_trace([0.011, 0.010, 0.012], meta=meta)))


@pytest.fixture
def attacked(make_trace, make_report, judged, hostile):
    meta = {
        "name": hostile,
        "model": hostile,
        "notes": [hostile, "1. x", "- x", "# x", "===", "www.x.org http://x.org"],
    }
    trace = make_trace([0.011, 0.010], ids=[hostile, "b"], meta=meta)
    return judged(make_report(trace, name=hostile), hostile)


def texts(tokens) -> list[str]:
    """Text of every block, as a reader sees it."""
    return ["".join(part.content for part in one.children) for one in tokens if one.type == "inline"]


def kinds(tokens) -> set[str]:
    return {part.type for one in tokens for part in (one, *(one.children or ()))}


def rows(tokens) -> list[int]:
    """Cells of every table's row."""
    found: list[int] = []
    for one in tokens:
        if one.type == "tr_open":
            found.append(0)
        elif one.type in ("td_open", "th_open"):
            found[-1] += 1
    return found


def test_it_has_verdict_headline_gates_errors_and_findings(report, rendered):
    seen = texts(rendered(report))
    assert seen[0] == "servecal: ❌ fail: by-hand with ten-ms"
    assert seen[1] == report.headline
    assert seen.index("❌ fail") < seen.index("⚠️ inconclusive") < seen.index("✅ pass")
    assert "e2e.mape" in seen
    assert "40.00 %" in seen
    assert "30.00 % to 50.00 %" in seen
    assert "TTFT p99 +23 %: by hand" in seen
    assert any(one.startswith("⚠️ warning: littles_law: Requests are missing") for one in seen)
    assert any("half of it is guessed" in one for one in seen)


def test_every_row_has_the_cells_of_its_table(report, attacked, rendered):
    assert rows(rendered(attacked)) == rows(rendered(report))
    assert set(rows(rendered(report))) == {4, 6, 7, 8}


def test_details_are_folded_in_pairs(report, rendered):
    html = [one.content.strip() for one in rendered(report) if one.type == "html_block"]
    assert len(html) >= 6
    assert all(one.startswith("<details><summary>") for one in html[::2])
    assert all(one == "</details>" for one in html[1::2])


def test_a_report_without_gates_has_no_verdict(make_trace, make_report, rendered):
    seen = texts(rendered(make_report(make_trace([0.01, 0.011], meta={"model": "me/mine"}))))
    assert seen[0] == "servecal: by-hand with ten-ms"
    assert not any("pass" in one for one in seen)


def test_hostile_names_show_as_they_are_and_do_nothing(attacked, rendered, report):
    tokens = rendered(attacked)
    allowed = kinds(rendered(report)) | {"text_special"}
    assert kinds(tokens) <= allowed
    assert {"link_open", "image", "html_inline", "em_open", "code_inline", "s_open"}.isdisjoint(kinds(tokens))
    assert [one.type for one in tokens].count("heading_open") == 1
    shown = texts(tokens)[0].replace("\u2060", "")
    assert '</script><img src=x onerror="alert(1)">\'|`*_~ @team #12 [a](javascript:alert(2))' in shown
    assert "&amp;" in shown


@pytest.mark.parametrize(
    "text", ["@team", "#12", "http://x.org", "www.x.org", "a@b.org", "ftp://x", "HTTPS://X.ORG", "xhttp://y"]
)
def test_nothing_is_left_of_what_github_makes_a_link_or_a_mention(text):
    assert text not in markdown_report.escape(text)
    assert markdown_report.escape(text).replace("\u2060", "") == text


@pytest.mark.parametrize("text", ["1. x", "12) x", "- x", "+ x", "# x", "===", "---", "> x", "* x", "| a |", "    x"])
def test_no_foreign_text_begins_a_block(text):
    tokens = MarkdownIt("commonmark").parse(f"- {markdown_report.escape(text)}\n")
    assert [one.type for one in tokens] == [
        *("bullet_list_open", "list_item_open", "paragraph_open", "inline"),
        *("paragraph_close", "list_item_close", "bullet_list_close"),
    ]


def test_figures_are_not_escaped_into_something_unreadable(report):
    text = markdown_report.render(report)
    assert "| 10 % | 40.00 % |" in text
    assert "\\." not in text


def test_it_stays_below_what_github_takes(make_trace, make_report, judged):
    long = "x|" * 100_000
    meta = {"name": long, "model": "me/mine", "notes": [long] * 100}
    assert len(markdown_report.render(judged(make_report(make_trace([0.01], ids=[long], meta=meta)), long))) < 60_000


def test_the_command_is_code_that_no_backtick_ends(make_trace, make_report, rendered):
    from dataclasses import replace

    command = "servecal report 'a```\n</details>' --profile p"
    tokens = rendered(replace(make_report(make_trace([0.01], meta={"model": "me/mine"})), command=command))
    assert [one.content for one in tokens if one.type == "fence"] == ["servecal report 'a``` </details>' --profile p\n"]
