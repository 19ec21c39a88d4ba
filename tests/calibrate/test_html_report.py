"""The page as text; how a browser shows it is in ``tests/browser``."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

pytest.importorskip("bokeh", reason="the page needs the extra html")

from calibrate.errors import compare
from calibrate.reports import html_report
from calibrate.reports.charts import SAMPLES, STEPS, _steps, _thinned_series
from calibrate.reports.points import EXTREMES, MOST, points_of, thinned

VOID = {"meta", "link", "img", "br", "input"}


class Page(HTMLParser):
    """Reads a page strictly: every element is closed in order; counts elements, collects ids, scripts, text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict]] = []
        self.elements: list[tuple[str, dict]] = []
        self.scripts: list[tuple[dict, str]] = []
        self.seen: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append((dict(attributes), ""))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "script":
            attributes, before = self.scripts[-1]
            self.scripts[-1] = (attributes, before + data)
        elif data.strip():
            self.seen.append(data.strip())

    def named(self, tag: str) -> list[dict]:
        return [attributes for one, attributes in self.elements if one == tag]

    @property
    def charts(self) -> dict:
        return json.loads(next(text for attributes, text in self.scripts if attributes.get("id") == "charts"))


def models(value):
    """Every model of the charts, in the order in which BokehJS reads them."""
    if isinstance(value, dict):
        if value.get("type") == "object" and "name" in value:
            yield value
        for inner in value.values():
            yield from models(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from models(inner)


@pytest.fixture(scope="module")
def report(make_trace, make_report, judged):
    meta = {"model": "me/mine", "engine": {"version": "0.19.0", "arguments": {"max_num_seqs": 32}}}
    timeline = {"time": [0.0, 1.0, 2.0, 3.0], "running": [0.0, 1.0, 1.0, 0.0], "kv_usage": [0.0, 0.1, 0.2, 0.0]}
    ttft = [0.011, 0.010, 0.012, 0.010, 0.008]
    made = make_report(make_trace(ttft, timeline=timeline, meta=meta), coefficients={"step": 1.1})
    return replace(judged(made), command="servecal report x --profile y")


@pytest.fixture(scope="module")
def page(report):
    return Page(html_report.render(report))


def test_it_has_every_section_and_its_links_lead_somewhere(page):
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    for section in ("gates", "errors", "quality", "attribution", "distributions", "scatter", "arrival", "load"):
        assert section in ids
    assert {"series", "worst", "profile", "engine", "notes"} <= ids
    assert {one["href"].removeprefix("#") for one in page.named("a")} <= ids


def test_it_shows_headline_verdict_figures_and_command(page, report):
    assert report.headline in page.seen
    assert "Gates: fail" in page.seen
    assert "40.00 %" in page.seen
    assert "TTFT p99 +23 %: by hand" in page.seen
    assert "servecal report x --profile y" in page.seen
    assert page.seen.count("assumed") == len([one for one in report.deployment.assumed if one != "num_gpu_blocks"])


def test_every_chart_has_a_place_words_and_axes_with_units(page):
    charts = page.charts
    places = {one["id"]: one for one in page.named("div") if "chart" in one.get("class", "").split()}
    assert sorted(charts["roots"].values()) == sorted(places)
    assert all(one["role"] == "img" and len(one["aria-label"]) > 20 for one in places.values())
    axes = [one for one in models(charts["document"]) if one["name"] in ("LinearAxis", "LogAxis")]
    labels = {one["attributes"].get("axis_label") for one in axes}
    assert {"TTFT (ms)", "TTFT measured (ms)", "E2E (s)", "error of TTFT", "requests", "% of all blocks"} <= labels
    assert axes
    assert sum("axis_label" not in one["attributes"] for one in axes) == 0


def test_tables_have_headers_and_captions(page):
    assert len(page.named("caption")) == len(page.named("table")) > 5
    assert all(one.get("scope") in ("col", "row") for one in page.named("th"))
    assert len(page.named("h1")) == 1


def test_only_its_own_scripts_may_run_and_nothing_may_be_fetched(page):
    policy = next(one["content"] for one in page.named("meta") if one.get("http-equiv") == "Content-Security-Policy")
    allowed = set(re.findall(r"'(sha256-[^']+)'", policy))
    run = [text for attributes, text in page.scripts if "type" not in attributes]
    assert allowed == {"sha256-" + base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in run}
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    references = [
        value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href")
    ]
    assert all(one.startswith("#") or one == "data:," for one in references)
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_hostile_names_add_no_element(make_trace, make_report, judged, hostile):
    def make(text):
        trace = make_trace([0.011, 0.010], ids=[text, "b"], meta={"name": text, "model": text, "notes": [text]})
        provenance = {"traces": [{"name": text}], text: text, "mape": {text: {text: 0.1}}}
        made = make_report(trace, name=text, description=text, provenance=provenance, coefficients={"step": 1.1})
        return Page(html_report.render(replace(judged(made, text), command=text)))

    calm, attacked = make("x"), make(hostile)
    assert [tag for tag, _ in attacked.elements] == [tag for tag, _ in calm.elements]
    assert attacked.named("img") == []
    data = next(one for one in models(attacked.charts["document"]) if one["name"] == "ColumnDataSource")
    assert data is not None
    columns = [
        dict(one["attributes"]["data"]["entries"])
        for one in models(attacked.charts["document"])
        if one["name"] == "ColumnDataSource"
    ]
    assert any(hostile in one.get("request", ()) for one in columns)


def test_same_report_same_bytes_also_in_a_process_that_drew_before(report):
    assert html_report.render(report) == html_report.render(report)


def test_models_are_defined_before_they_are_referred_to(page):
    defined: set[str] = set()

    def walk(value):
        if isinstance(value, dict):
            if value.get("type") == "object" and "id" in value:
                defined.add(value["id"])
            elif set(value) == {"id"}:
                assert value["id"] in defined
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)

    walk(page.charts["document"])
    assert len(defined) > 100


def test_the_page_of_a_few_requests_is_below_two_megabytes(report):
    assert len(html_report.render(report).encode()) < 2_000_000


def test_many_requests_are_thinned_and_the_page_says_so(make_trace, make_report):
    count = 3 * MOST
    random = np.random.default_rng(0)
    ttft = random.uniform(0.02, 0.03, count)
    ttft[12_345] = 5.0
    meta = {"model": "me/mine"}
    measured = make_trace(ttft, ttft + 0.2, arrival=np.arange(count) / 10, meta=meta)
    base = make_report(make_trace([0.01, 0.011], meta=meta))
    predicted = make_trace(ttft * 1.01, ttft + 0.21, arrival=np.arange(count) / 10)
    comparison = compare(measured, predicted)
    points = points_of(comparison)
    assert points.total == count
    assert MOST <= len(points.ids) < MOST * 1.5
    assert "12345" in points.ids
    text = html_report.render(replace(base, trace=measured, comparison=comparison))
    assert len(text.encode()) < 4_000_000
    words = " ".join(" ".join(Page(text).seen).split())
    assert f"Charts of requests show {len(points.ids):,} of {count:,}" in words


def test_thinning_keeps_the_extremes_of_every_column_in_order():
    random = np.random.default_rng(1)
    columns = {"a": random.normal(size=100_000), "b": random.normal(size=100_000)}
    columns["b"][::2] = np.nan
    rows = thinned(columns, 100_000)
    assert (np.diff(rows) > 0).all()
    assert rows.size <= MOST + 1 + 2 * 2 * EXTREMES
    for values in columns.values():
        assert {int(np.nanargmin(values)), int(np.nanargmax(values))} <= set(rows.tolist())
    assert thinned(columns, 10).tolist() == list(range(10))


def test_ids_that_would_bloat_the_page_are_cut(make_trace, make_report):
    trace = make_trace([0.011, 0.010], ids=["x" * 1_000_000, "b"], meta={"model": "me/mine"})
    assert len(html_report.render(make_report(trace)).encode()) < 2_000_000


def test_a_distribution_on_a_log_axis_counts_the_values_at_zero():
    share, values = _steps(np.array([0.0, 0.0, 0.0, 1.0]), positive=True)
    assert (share.tolist(), values.tolist()) == ([1.0], [1.0])
    share, values = _steps(np.array([3.0, 0.0, 1.0, 2.0]), positive=False)
    assert (share.tolist(), values.tolist()) == ([0.25, 0.5, 0.75, 1.0], [0.0, 1.0, 2.0, 3.0])
    share, values = _steps(np.zeros(3), positive=True)
    assert share.size == values.size == 0


def test_a_distribution_of_many_values_keeps_its_ends():
    share, values = _steps(np.random.default_rng(0).permutation(100_000).astype(float), positive=False)
    assert share.size <= STEPS
    assert (values[0], values[-1], share[-1]) == (0.0, 99_999.0, 1.0)


def test_a_time_series_of_many_samples_keeps_its_extremes():
    measured = np.random.default_rng(0).normal(size=50_000)
    predicted = np.full(50_000, np.nan)
    rows = _thinned_series(measured, predicted)
    assert rows.size <= SAMPLES
    assert {int(measured.argmin()), int(measured.argmax())} <= set(rows.tolist())


def test_it_is_not_imported_by_the_other_formats():
    code = "import sys, calibrate.cli.report_command; sys.exit('bokeh' in sys.modules or 'jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
