"""Reading reports that were saved as JSON. Keys that a later servecal adds are left alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt

from calibrate.estimates import NONE, OF_REQUESTS, Coverage, Estimate, Interval, coverage_of, widened
from profiles.errors import InputError, found
from profiles.yaml_files import validate
from replay.readers.fields import read_object
from replay.trace import Trace

SCHEMA = "servecal.report/1"
Bounds = tuple[float | None, float | None]
UNKNOWN: Bounds = (None, None)


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=False, allow_inf_nan=False, protected_namespaces=())


class SavedTrace(_Part):
    """What was measured."""

    name: str
    digest: str
    model: str | None = None
    hardware: str | None = None
    engine: dict[str, Any] | None = None


class SavedProfile(_Part):
    """What predicted it."""

    name: str
    digest: str


class SavedCoverage(_Part):
    """Counts of requests."""

    measured: NonNegativeInt
    predicted: NonNegativeInt
    paired: NonNegativeInt
    excluded: dict[str, NonNegativeInt] = {}
    unsupported: dict[str, str] = {}


class SavedLevel(_Part):
    """A statistic in seconds, or tokens per second, on both sides."""

    measured: float | None
    predicted: float | None
    error: float | None
    error_ci95: Bounds = UNKNOWN


class SavedMetric(_Part):
    """Errors of one metric."""

    n: NonNegativeInt
    mape: float | None
    median_ape: float | None
    bias: float | None
    mape_ci95: Bounds = UNKNOWN
    median_ape_ci95: Bounds = UNKNOWN
    bias_ci95: Bounds = UNKNOWN
    percentiles: dict[str, SavedLevel]


class SavedGate(_Part):
    """A gate of that time; its interval is kept, since the table of metrics does not have them all."""

    metric: str
    statistic: str = ""
    value: float | None
    ci95: Bounds = UNKNOWN
    verdict: str
    against: str = "limit"


class SavedDocument(_Part):
    """What of ``servecal.report/1`` is relied on."""

    schema_: str = Field(alias="schema", pattern=r"^servecal\.report/1$")
    trace: SavedTrace
    profile: SavedProfile
    anchor: str = "arrival"
    coverage: SavedCoverage
    metrics: dict[str, SavedMetric]
    throughput: dict[str, SavedLevel] = {}
    gates: list[SavedGate] = []
    verdict: str | None = None


@dataclass(frozen=True)
class SavedReport:
    """Figures of a saved report.

    Parameters
    ----------
    document : SavedDocument
    file : Path
    """

    document: SavedDocument
    file: Path

    @property
    def trace(self) -> str:
        """Digest of the measured trace."""
        return self.document.trace.digest

    @property
    def coverage(self) -> Coverage:
        """How much was compared."""
        return coverage_of(self.document.coverage.paired, dict(self.document.coverage.excluded))

    def check(self, measured: Trace, anchor: str) -> None:
        """Refuse to be the baseline of what cannot be held to it.

        Raises
        ------
        InputError
            If it is of another model, or its latencies count from something else.
        """
        if self.document.anchor != anchor:
            message = f"expected {anchor!r}, found {found(self.document.anchor)}"
            raise InputError(message, file=self.file, field="anchor")
        mine, model = self.document.trace.model, measured.meta.get("model")
        if mine is not None and model is not None and mine != model:
            raise InputError(f"expected {found(model)}, found {found(mine)}", file=self.file, field="trace.model")

    @property
    def names(self) -> list[tuple[str, str]]:
        """All statistics that the report has a value of."""
        found = [
            (metric, one)
            for metric, errors in self.document.metrics.items()
            for one in (*OF_REQUESTS, *errors.percentiles)
        ] + [("throughput", one) for one in self.document.throughput]
        return [one for one in found if not math.isnan(self.estimate(*one).value)]

    def estimate(self, metric: str, statistic: str) -> Estimate:
        """One statistic with the interval that the report has of it."""
        if metric == "throughput":
            level = self.document.throughput.get(statistic)
            return self._estimate(metric, statistic, level.error if level else None, _of(level), 0)
        errors = self.document.metrics.get(metric)
        if errors is None:
            reason = self.document.coverage.unsupported.get(metric, f"{self.file.name} does not have it")
            return Estimate(math.nan, reason=reason)
        if statistic in OF_REQUESTS:
            bounds = _interval(getattr(errors, f"{statistic}_ci95"))
            return self._estimate(metric, statistic, getattr(errors, statistic), bounds, errors.n)
        level = errors.percentiles.get(statistic)
        return self._estimate(metric, statistic, level.error if level else None, _of(level), errors.n)

    def _estimate(self, metric: str, statistic: str, value: float | None, bounds: Interval, count: int) -> Estimate:
        if value is None:
            return Estimate(math.nan, reason=f"{self.file.name} does not have it")
        interval = widened(value, bounds, count)
        if math.isnan(interval[0]):
            interval = self._judged.get((metric, statistic), NONE)
        return Estimate(value, interval, reason="" if interval != NONE else f"{self.file.name} has no interval of it")

    @cached_property
    def _judged(self) -> dict[tuple[str, str], Interval]:
        limits = [one for one in self.document.gates if one.against == "limit"]
        return {(one.metric, one.statistic): _interval(one.ci95) for one in limits}


def _of(level: SavedLevel | None) -> Interval:
    return NONE if level is None else _interval(level.error_ci95)


def _interval(bounds: Bounds) -> Interval:
    low, high = bounds
    return NONE if low is None or high is None else (low, high)


def is_report(path: Path) -> bool:
    """Whether a file looks like a saved report: a JSON object whose schema is one of a report."""
    if not path.is_file():
        return False
    try:
        with path.open(encoding="utf-8") as stream:
            head = stream.read(2**20)
    except (OSError, UnicodeDecodeError):
        return False
    return head.lstrip().startswith("{") and '"servecal.report/' in head


def read_report(path: Path) -> SavedReport:
    """Read what ``servecal report --format json`` wrote.

    Raises
    ------
    InputError
        If it cannot be read, or is no such report: naming the file and the first field that does not fit.
    """
    record = read_object(path)
    schema = record.get("schema")
    if schema != SCHEMA:
        raise InputError(f"expected {SCHEMA!r}, found {found(schema)}", file=path, field="schema")
    return SavedReport(validate(SavedDocument, record.values, path), path)
