"""The paired requests as a table for other programs: CSV and Parquet, in order of arrival, NaN as null."""

from __future__ import annotations

import io

import pyarrow.csv
import pyarrow.parquet

from calibrate.reports.report import Report


def render_csv(report: Report) -> str:
    """Return CSV with a header; text is quoted, null is empty."""
    stream = io.BytesIO()
    pyarrow.csv.write_csv(report.comparison.requests_table(), stream)
    return stream.getvalue().decode()


def render_parquet(report: Report) -> bytes:
    """Return one Parquet file, compressed with zstd."""
    stream = io.BytesIO()
    pyarrow.parquet.write_table(report.comparison.requests_table(), stream, compression="zstd")
    return stream.getvalue()
