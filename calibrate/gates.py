"""Gates: limits on errors, decided against the noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

VERDICTS = ("pass", "fail", "inconclusive")


@dataclass(frozen=True)
class GateResult:
    """One gate and what became of it.

    Parameters
    ----------
    metric : str
        Such as ``ttft``, ``throughput``, ``coverage``.
    statistic : str
        Such as ``p99`` or ``mape``.
    limit, value : float
        Fractions; ``value`` is what is judged, NaN if it cannot be had.
    ci95 : tuple of float
        Interval of the value by which the verdict was reached.
    verdict : {"pass", "fail", "inconclusive"}
    sentence : str
        Why.
    """

    metric: str
    statistic: str
    limit: float
    value: float
    ci95: tuple[float, float]
    verdict: str
    sentence: str

    @property
    def name(self) -> str:
        """As the user writes it: ``ttft.p99``."""
        return f"{self.metric}.{self.statistic}"


@dataclass(frozen=True)
class Judgement:
    """All gates of a report."""

    results: Sequence[GateResult]

    @property
    def verdict(self) -> str:
        """``fail`` if any fails, else ``inconclusive`` if any is, else ``pass``."""
        found = {one.verdict for one in self.results}
        return next((one for one in ("fail", "inconclusive") if one in found), "pass")
