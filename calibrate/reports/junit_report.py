"""The gates as JUnit XML: one test case a gate.

What all readers take: the intersection of the schemas of Jenkins' xUnit plugin (``junit-10.xsd``) and of Ant
(Windyroad's ``JUnit.xsd``). A gate that fails is a ``failure``; one that is inconclusive is ``skipped``: it has not
been decided, and the exit code 3 tells those who want to stop at that. Times are 0 and the time stamp is the epoch,
since identical input must give identical bytes.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree

from calibrate.reports.report import Report

EPOCH = "1970-01-01T00:00:00"
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render(report: Report) -> str:
    """Return the XML text."""
    results = list(report.judgement.results) if report.judgement else []
    verdicts = [one.verdict for one in results]
    root = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(
        root,
        "testsuite",
        {
            "name": "servecal",
            "package": "servecal",
            "id": "0",
            "tests": str(len(results)),
            "failures": str(verdicts.count("fail")),
            "errors": "0",
            "skipped": str(verdicts.count("inconclusive")),
            "time": "0",
            "timestamp": EPOCH,
            "hostname": "localhost",
        },
    )
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in _properties(report).items():
        ElementTree.SubElement(properties, "property", {"name": name, "value": _clean(value)})
    group = f"servecal.{_token(report.trace.name)}"
    for one in results:
        case = ElementTree.SubElement(suite, "testcase", {"name": _token(one.name), "classname": group, "time": "0"})
        said = {"message": _clean(one.sentence)}
        if one.verdict == "fail":
            ElementTree.SubElement(case, "failure", {**said, "type": "gate"}).text = _clean(one.sentence)
        elif one.verdict == "inconclusive":
            ElementTree.SubElement(case, "skipped", said)
    lines = [report.headline, *(f"{one.name}: {one.verdict}: {one.sentence}" for one in results)]
    ElementTree.SubElement(suite, "system-out").text = _clean("\n".join(lines) + "\n")
    warned = [f"{one.severity}: {one.check}: {one.sentence}" for one in report.findings]
    ElementTree.SubElement(suite, "system-err").text = _clean("\n".join(warned))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _properties(report: Report) -> dict[str, str]:
    found = {
        "trace": report.trace.name,
        "trace.digest": report.trace.digest(),
        "profile": report.deployment.loaded.profile.name,
        "profile.digest": report.deployment.loaded.digest,
        "anchor": report.comparison.anchor,
        "verdict": report.judgement.verdict if report.judgement else "no gates",
    }
    return found | ({"command": report.command} if report.command else {})


def _clean(text: str) -> str:
    """Replace what XML 1.0 cannot hold, not even escaped."""
    return _NOT_XML.sub("\ufffd", text)


def _token(text: str) -> str:
    """One line without blanks at the ends or in a row (``xs:token``)."""
    return " ".join(_clean(text).split()) or "-"
