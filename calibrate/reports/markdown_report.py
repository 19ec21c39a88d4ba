"""The report as GitHub-flavoured Markdown: a comment on a pull request, or a job's summary.

Names, ids and sentences may hold anything: all of them are escaped, so that they show as they are, ping nobody, and
become neither links nor HTML. The text stays far below the 65,536 characters that GitHub takes.
"""

from __future__ import annotations

import re

from calibrate.reports import tables
from calibrate.reports.report import Report
from calibrate.reports.tables import Table, short, with_ids

MOST_LINES = 20
"""Of one list; the rest is counted."""
VERDICTS = {"pass": "✅ pass", "fail": "❌ fail", "inconclusive": "⚠️ inconclusive"}
SEVERITIES = {"error": "❌ error", "warning": "⚠️ warning", "info": "info"}
_ACTIVE = re.compile(r"([\\`*_{}\[\]<>&|~$])")
_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")
# GitHub looks for mentions, issue numbers and bare addresses in what was rendered: an escape does not stop that, a
# character that shows nothing does.
_REFERENCE = re.compile(r"([@#])(?=\w)|(?<=\w)(:)(?=//)|(?<=[Ww]{3})(\.)")
_WORD_JOINER = "\u2060"


def render(report: Report) -> str:
    """Return the Markdown text."""
    parts = [_title(report), _bold(report.headline)]
    if report.judgement is not None:
        parts.append(_table(_with_signs(tables.gates(report.judgement.results))))
    parts.append(_table(tables.errors(report)))
    parts.append(_list([f"{one.sentence}." for one in report.comparison.worst_slices]))
    if report.attribution is not None:
        said = report.attribution.sentences or ((report.attribution.why_not,) if report.attribution.why_not else ())
        parts.append(_list(said))
    parts.append(_findings(report))
    parts.append(_details("Percentiles and the whole run", _table(tables.levels(report)), _whole_run(report)))
    if report.attribution is not None and report.attribution.parts:
        parts.append(_details("Where the error comes from", _table(tables.attribution(report))))
    parts.append(_details("Notes, conflicts and assumptions", _list(_remarks(report))))
    if report.command:
        parts.append(_details("How to reproduce", _code(report.command)))
    return "\n\n".join(part for part in parts if part) + "\n"


def escape(text: str) -> str:
    """Make a foreign text inert within a paragraph, a list item or a cell of a table, on one line."""
    line = _UNSEEN.sub(" ", short(text)).strip()
    line = _ACTIVE.sub(r"\\\1", line)
    line = _REFERENCE.sub(lambda found: found.group(0) + _WORD_JOINER, line)
    # What would begin a list, a heading or a rule where it stands first.
    line = re.sub(r"^([-+#=])(?=[-+#=\s]|$)", r"\\\1", line)
    return re.sub(r"^(\d{1,9})([.)])(?=\s|$)", r"\1\\\2", line)


def _title(report: Report) -> str:
    name = f"{escape(report.trace.name)} with {escape(report.deployment.loaded.profile.name)}"
    if report.judgement is None:
        return f"### servecal: {name}"
    return f"### servecal: {VERDICTS[report.judgement.verdict]}: {name}"


def _bold(text: str) -> str:
    first, dot, rest = text.partition(". ")
    return f"**{escape(first + dot.rstrip())}** {escape(rest)}".rstrip()


def _with_signs(table: Table) -> Table:
    return Table(table.columns, [(VERDICTS.get(row[0], row[0]), *row[1:]) for row in table.rows], table.align)


def _table(table: Table) -> str:
    if not table.rows:
        return ""
    lines = [table.columns, ["---:" if one == "r" else ":---" for one in table.align]]
    cells = [" | ".join(escape(cell) for cell in row) for row in table.rows]
    return "\n".join(f"| {line} |" for line in [*(" | ".join(line) for line in lines), *cells])


def _list(lines: list[str] | tuple[str, ...]) -> str:
    shown = [f"- {escape(line)}" for line in lines[:MOST_LINES]]
    if len(lines) > MOST_LINES:
        shown.append(f"- and {len(lines) - MOST_LINES} more")
    return "\n".join(shown)


def _findings(report: Report) -> str:
    """Errors and warnings where everybody sees them, the rest folded."""
    order = ("error", "warning", "info")
    lines = {
        severity: [
            f"- {SEVERITIES[severity]}: {escape(one.check)}: {escape(with_ids(one.sentence, one.requests))}"
            for one in report.findings
            if one.severity == severity
        ]
        for severity in order
    }
    grave = [*lines["error"], *lines["warning"]]
    more = [f"- and {len(grave) - MOST_LINES} more"] if len(grave) > MOST_LINES else []
    seen = "\n".join([*grave[:MOST_LINES], *more])
    folded = _details("More about the data", "\n".join(lines["info"][:MOST_LINES]))
    text = "\n\n".join(part for part in (seen, folded) if part)
    return f"Data quality:\n\n{text}" if seen else text


def _whole_run(report: Report) -> str:
    return _table(tables.whole_run(report))


def _remarks(report: Report) -> list[str]:
    assumed = [f"{name}={value}" for name, value in sorted(report.deployment.assumed.items())]
    assumed += [one for one in tables.other_assumptions(report) if one not in assumed]
    lines = [*report.deployment.conflicts, *report.notes]
    return [*lines, "assumed: " + ", ".join(assumed)] if assumed else lines


def _details(summary: str, *blocks: str) -> str:
    inner = "\n\n".join(block for block in blocks if block)
    return f"<details><summary>{summary}</summary>\n\n{inner}\n\n</details>" if inner else ""


def _code(text: str) -> str:
    """A fenced block; the fence is longer than any within."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{_UNSEEN.sub(' ', text)}\n{fence}"
