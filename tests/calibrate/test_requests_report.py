from __future__ import annotations

import csv
import io
import math

import pyarrow.parquet as pq
import pytest

from calibrate.reports import requests_report


@pytest.fixture
def report(make_trace, make_report, hostile):
    nan = math.nan
    meta = {"model": "me/mine"}
    return make_report(make_trace([0.011, 0.010, nan], [0.5, 0.6, 0.7], ids=["b", hostile, "c"], meta=meta))


def test_csv_has_a_row_a_pair_and_keeps_every_id(report, hostile):
    text = requests_report.render_csv(report)
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert [row["id"] for row in rows] == ["b", hostile, "c"]
    assert float(rows[0]["ttft_measured"]) == pytest.approx(0.011)
    assert float(rows[0]["ttft_error"]) == pytest.approx(0.010 / 0.011 - 1)
    assert rows[2]["ttft_measured"] == ""
    assert "nan" not in text.replace(hostile, "").lower()


def test_parquet_holds_the_same(report):
    table = pq.read_table(io.BytesIO(requests_report.render_parquet(report)))
    assert table.equals(report.comparison.requests_table())
    assert table.column("ttft_measured").null_count == 1


def test_same_report_same_bytes(report):
    assert requests_report.render_csv(report) == requests_report.render_csv(report)
    assert requests_report.render_parquet(report) == requests_report.render_parquet(report)
