from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from calibrate.differences import ReportDifference
from calibrate.estimates import Compared
from calibrate.gates import Gate, Rules, judge
from calibrate.reports import json_report
from calibrate.saved_reports import is_report, read_report
from profiles.errors import InputError

ARGUMENTS = {"max_num_seqs": 32, "max_num_batched_tokens": 1024, "num_gpu_blocks": 999}


@pytest.fixture(scope="module")
def report(make_trace, make_report):
    """Fifty requests, replayed at 10 ms a step; measured they were a little slower, each in its way."""
    ttft = [0.010 + 0.0001 * (place % 7) for place in range(50)]
    meta = {"model": "me/mine", "engine": {"version": "0.19.0", "arguments": ARGUMENTS}}
    return make_report(make_trace(ttft, [one + 0.101 for one in ttft], meta=meta))


@pytest.fixture
def saved(report, tmp_path):
    def write(change=None, judged=report):
        document = json_report.to_dict(judged)
        if change is not None:
            change(document)
        path = tmp_path / "report.json"
        path.write_text(json.dumps(document), encoding="utf-8")
        return path

    return write


def test_a_saved_report_has_the_figures_of_the_comparison(report, saved):
    figures, live = read_report(saved()), Compared(report.comparison)
    assert figures.names == live.names
    assert figures.trace == live.trace
    assert figures.coverage == live.coverage
    for metric, statistic in figures.names:
        one, other = figures.estimate(metric, statistic), live.estimate(metric, statistic)
        assert one.value == pytest.approx(other.value)
        if statistic in ("mape", "mean", "p99"):
            assert one.ci95 == pytest.approx(other.ci95)
    assert math.isnan(figures.estimate("itl", "mape").value)
    assert "token times" in figures.estimate("itl", "mape").reason


def test_intervals_that_only_gates_have_are_kept(report, saved):
    rules = Rules((Gate("e2e", "bias", 0.1), Gate("throughput", "makespan", 0.1)))
    judged = replace(report, judgement=judge(Compared(report.comparison), rules))
    assert math.isnan(read_report(saved()).estimate("e2e", "bias").ci95[0])
    figures = read_report(saved(judged=judged))
    for gate in rules.gates:
        live = Compared(report.comparison).estimate(gate.metric, gate.statistic)
        assert figures.estimate(gate.metric, gate.statistic).ci95 == pytest.approx(live.ci95)


def test_what_a_later_servecal_adds_is_left_alone(saved):
    def add(document):
        document["attribution"] = {"parts": []}
        document["metrics"]["ttft"] |= {"wasserstein": 0.1, "slices": [{"by": "prompt"}]}
        document["metrics"]["ttft"]["percentiles"]["p99"]["unit"] = "s"
        document["metrics"]["goodput"] = document["metrics"]["e2e"]
        document["coverage"]["asked"] = 7
        document["gates"] = [{"metric": "x", "statistic": "y", "value": None, "verdict": "unsure", "by": "p"}]

    figures = read_report(saved(add))
    assert ("goodput", "mape") in figures.names
    assert figures.estimate("ttft", "p99").value == read_report(saved()).estimate("ttft", "p99").value


@pytest.mark.parametrize(
    ("change", "field", "part"),
    [
        (lambda one: one.update(schema="servecal.report/2"), "schema", "'servecal.report/2'"),
        (lambda one: one.pop("coverage"), "coverage", "is missing"),
        (lambda one: one["metrics"]["e2e"].update(mape="much"), "metrics.e2e.mape", "'much'"),
        (lambda one: one["metrics"]["e2e"]["percentiles"].update(p99=3), "metrics.e2e.percentiles.p99", "3"),
        (lambda one: one["metrics"]["e2e"].update(n=-1), "metrics.e2e.n", "-1"),
        (lambda one: one["coverage"].update(paired=None), "coverage.paired", "None"),
        (lambda one: one["metrics"]["e2e"].update(mape_ci95=[0.1]), "metrics.e2e.mape_ci95.1", "missing"),
        (lambda one: one["trace"].pop("digest"), "trace.digest", "is missing"),
    ],
)
def test_a_report_that_is_none_is_refused_with_its_field(saved, change, field, part):
    with pytest.raises(InputError) as caught:
        read_report(saved(change))
    assert (caught.value.field, caught.value.file.name) == (field, "report.json")
    assert part in caught.value.message


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"schema": 3}', b"\xff"])
def test_a_file_that_is_no_report_is_refused(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    assert not is_report(path)
    with pytest.raises(InputError):
        read_report(path)


def test_reports_are_known_by_content(saved, tmp_path):
    assert is_report(saved())
    assert not is_report(tmp_path)
    assert not is_report(tmp_path / "nowhere.json")


def test_a_baseline_must_be_about_the_same_thing(report, saved):
    figures = read_report(saved())
    figures.check(report.trace, "arrival")
    with pytest.raises(InputError, match="'queued'"):
        figures.check(report.trace, "queued")
    with pytest.raises(InputError, match="'me/other'"):
        figures.check(report.trace.with_meta(model="me/other"), "arrival")


def test_a_report_does_not_differ_from_itself(saved):
    figures = read_report(saved())
    found = ReportDifference(figures, figures)
    assert found.same_run
    assert {one.growth for one in found.statistics} == {0.0}
    assert not any(one.changed for one in found.statistics)


def test_growth_beyond_the_noise_is_said(saved):
    before = read_report(saved())

    def worse(document):
        document["metrics"]["e2e"] |= {"mape": 0.3, "mape_ci95": [0.29, 0.31]}
        document["trace"]["engine"]["version"] = "0.20.0"

    now = read_report(saved(worse))
    found = ReportDifference(before, now)
    change = next(one for one in found.statistics if (one.metric, one.statistic) == ("e2e", "mape"))
    assert change.changed
    assert change.growth == pytest.approx(0.3 - before.estimate("e2e", "mape").value)
    assert "the engine's version changed from 0.19.0 to 0.20.0" in found.sentences
