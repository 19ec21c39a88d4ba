"""Gates: limits on errors, decided against the noise.

A statistic is known up to a 95 % interval. A gate passes if all of the interval lies within its limit, fails if all
of it lies beyond, and is inconclusive otherwise: another run of the same engine could have come out on the other side.
``docs/gates.md`` says where intervals come from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from scipy.stats import norm as normal

from calibrate.estimates import Estimate, Figures, Interval

VERDICTS = ("pass", "fail", "inconclusive")
EXIT_CODES = {"pass": 0, "fail": 1, "inconclusive": 3}
NAMED = 4
"""Gates in a headline."""
COVERAGE = ("coverage", "paired")
UNSIGNED = ("mape", "median_ape")
"""Statistics that have no sign, and that noise alone makes larger than 0."""
BASELINE_STATISTICS = ("mape", "mean", "p99")
"""What is held against a baseline, of every metric, unless the user says otherwise."""


@dataclass(frozen=True)
class Gate:
    """A limit: the statistic may be off by at most this fraction, up or down.

    ``coverage.paired`` is the other way round: the least share of requests that must have a prediction.
    """

    metric: str
    statistic: str
    limit: float

    @property
    def name(self) -> str:
        """As the user writes it: ``ttft.p99``."""
        return f"{self.metric}.{self.statistic}"

    @property
    def text(self) -> str:
        """As ``--fail-on`` takes it: ``ttft.p99:10%``."""
        short = f"{100 * self.limit:g}%"
        return f"{self.name}:{short if float(short[:-1]) / 100 == self.limit else repr(self.limit)}"


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
        Fractions; ``value`` is what is judged, NaN if it cannot be had. Against a baseline: by how much the error grew.
    ci95 : tuple of float
        Interval of the value by which the verdict was reached.
    verdict : {"pass", "fail", "inconclusive"}
    sentence : str
        Why.
    against : {"limit", "baseline"}
    baseline : float
        What the statistic was in the baseline, of gates against one.
    """

    metric: str
    statistic: str
    limit: float
    value: float
    ci95: tuple[float, float]
    verdict: str
    sentence: str
    against: str = "limit"
    baseline: float = math.nan

    @property
    def name(self) -> str:
        """As the user writes it: ``ttft.p99``; of gates against a baseline ``ttft.p99 vs baseline``."""
        return f"{self.metric}.{self.statistic}" + (" vs baseline" if self.against == "baseline" else "")


@dataclass(frozen=True)
class Judgement:
    """All gates of a report, and where their intervals come from."""

    results: Sequence[GateResult]
    noise: str = ""

    @property
    def verdict(self) -> str:
        """``fail`` if any fails, else ``inconclusive`` if any is, else ``pass``."""
        found = {one.verdict for one in self.results}
        return next((one for one in ("fail", "inconclusive") if one in found), "pass")

    @property
    def headline(self) -> str:
        """The verdict, and which gates it is due to."""
        verdict = self.verdict
        if verdict == "pass":
            return f"Gates: pass ({len(self.results)} of {len(self.results)})."
        names = [one.name for one in self.results if one.verdict == verdict]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        return f"Gates: {verdict} ({', '.join(names[:NAMED])}{more})."

    def exit_code(self, inconclusive: str = "report") -> int:
        """0 pass, 1 fail, 3 inconclusive; ``inconclusive`` may be counted as ``pass`` or ``fail``."""
        verdict = self.verdict
        if verdict == "inconclusive" and inconclusive != "report":
            verdict = inconclusive
        return EXIT_CODES[verdict]


@dataclass(frozen=True)
class Allowance:
    """How much worse than a baseline is still no regression: up to ``points``, or ``relative`` of the baseline's error.

    Both as fractions; a regression exceeds both. ``statistics`` names what is compared, the usual ones if empty.
    """

    points: float = 0.02
    relative: float = 0.10
    statistics: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Rules:
    """All that a user asked to be judged, and how to exit where nothing can be said."""

    gates: tuple[Gate, ...] = ()
    baseline: str | None = None
    allowance: Allowance = field(default_factory=Allowance)
    inconclusive: str = "report"

    @property
    def any(self) -> bool:
        """Whether there is anything to judge."""
        return bool(self.gates) or self.baseline is not None


def verdict(value: float, interval: Interval, limit: float, *, floor: float = 0.0, gates: int = 1) -> str:
    """Judge a signed value by a limit to both sides.

    Several gates all pass only if each does, and one that fails is enough to fail: so each passes by its own 95 %
    interval (intersection-union test, Berger 1982), and fails by one that is wider for being one of many (Bonferroni).

    Parameters
    ----------
    value : float
    interval : tuple of float
        95 % interval; NaN if there is none.
    limit : float
    floor : float
        Where two runs of the same engine differ by more than the limit, beyond what no prediction can be blamed.
    gates : int
        How many are judged together.
    """
    high = folded(interval)[1]
    if math.isnan(high):
        return "inconclusive"
    if high <= limit:
        return "pass"
    return "fail" if folded(for_one_of(gates, value, interval))[0] > max(limit, floor) else "inconclusive"


def for_one_of(gates: int, value: float, interval: Interval) -> Interval:
    """Stretch a 95 % interval of one value so that those of so many hold together at 95 %."""
    factor = float(normal.isf(0.025 / gates) / normal.isf(0.025))
    return value - factor * (value - interval[0]), value + factor * (interval[1] - value)


def folded(interval: Interval) -> Interval:
    """Interval of the absolute value of what lies in an interval."""
    low, high = interval
    if low <= 0 <= high:
        return 0.0, max(-low, high)
    return min(abs(low), abs(high)), max(abs(low), abs(high))


def judge(figures: Figures, rules: Rules, baseline: Figures | None = None, noise: str = "") -> Judgement:
    """Judge figures by limits and, if there is one, against a baseline; coverage is always judged along.

    Parameters
    ----------
    figures : Figures
    rules : Rules
    baseline : Figures, optional
        Of an earlier report.
    noise : str
        Where the intervals come from, for readers.
    """
    known = set(baseline.names) if baseline else set()
    own = [one for one in rules.gates if (one.metric, one.statistic) == COVERAGE]
    others = [one for one in rules.gates if one not in own]
    held = (rules.allowance.statistics or _usual(baseline)) if baseline else ()
    count = len(others) + len(held)
    results = [_coverage(figures, own[0].limit if own else 1.0, baseline)]
    results += [_absolute(one, figures, (one.metric, one.statistic) in known, count) for one in others]
    if baseline is not None:
        results += [_relative(*one, figures, baseline, rules.allowance, count) for one in held]
        same = baseline.trace == figures.trace
        noise += f"; the baseline is of {'the same run: its noise is common to both' if same else 'another run'}"
    return Judgement(tuple(results), noise)


def _usual(baseline: Figures) -> Sequence[tuple[str, str]]:
    """What is held against a baseline unless the user says otherwise.

    Queue times are left out: half of them are close to 0, and TTFT holds them.
    """
    metrics = [one for one in baseline.names if one[0] != "queue_time" and one[1] in BASELINE_STATISTICS]
    return [*metrics, *(one for one in baseline.names if one[0] == "throughput")]


def judge_change(before: Figures, now: Figures, gates: Sequence[Gate]) -> Judgement:
    """Judge two reports: the limit of a gate is by how much an error may have grown, in fractions (0.02: 2 points)."""
    own = [one for one in gates if (one.metric, one.statistic) == COVERAGE]
    others = [one for one in gates if one not in own]
    results = [_coverage(now, own[0].limit if own else 1.0, before)]
    for one in others:
        allowance = Allowance(points=one.limit, relative=0.0)
        results.append(_relative(one.metric, one.statistic, now, before, allowance, len(others)))
    return Judgement(tuple(results), "intervals that the reports hold")


def _coverage(figures: Figures, least: float, baseline: Figures | None) -> GateResult:
    """A prediction that is not there is a failure: else refusing hard requests would improve every error."""
    now = figures.coverage
    share = now.share
    said = f"{now.paired} of {now.paired + now.lost} requests have a prediction ({_percent(share)})"
    lost = baseline.coverage.paired - now.paired if baseline and baseline.trace == figures.trace else 0
    if baseline is not None:
        # Sampling does not change it: the share is counted, not estimated.
        least = min(least, baseline.coverage.share)
    if math.isnan(share):
        outcome, said = ("inconclusive" if least > 0 else "pass"), "no request is paired with another"
    elif lost > 0:
        outcome, said = "fail", f"{said}; {lost} that the baseline compared are not compared any more"
    elif share < least:
        outcome, said = "fail", f"{said}; expected at least {_percent(least)}"
    else:
        outcome, said = "pass", f"{said}, as asked for" if least < 1 else said
    return GateResult(*COVERAGE, least, share, (share, share), outcome, said)


def _absolute(gate: Gate, figures: Figures, was_there: bool, count: int) -> GateResult:
    estimate = figures.estimate(gate.metric, gate.statistic)
    if math.isnan(estimate.value):
        return _unknown(gate.metric, gate.statistic, gate.limit, estimate.reason, was_there)
    floor = estimate.floor if gate.statistic in UNSIGNED else 0.0
    outcome = verdict(estimate.value, estimate.ci95, gate.limit, floor=floor, gates=count)
    said = _said(estimate, gate.statistic)
    limit = _percent(gate.limit)
    if math.isnan(estimate.ci95[0]):
        why = f"{estimate.reason or 'there is no interval'}, so its noise is unknown; repeated runs tell (--repeat)"
    elif outcome == "pass":
        why = f"all of it is within {limit}"
    elif outcome == "fail":
        why = f"all of it is beyond {limit}"
    elif folded(estimate.ci95)[0] <= gate.limit:
        why = f"{limit} lies within it: the noise hides on which side; more requests or repeated runs would tell"
    elif folded(estimate.ci95)[0] <= floor:
        why = f"beyond {limit}, but two runs of the engine itself differ by {_percent(floor)}"
    else:
        why = f"beyond {limit}, but so little that one of {count} gates may be by chance"
    return GateResult(gate.metric, gate.statistic, gate.limit, estimate.value, estimate.ci95, outcome, f"{said}; {why}")


def _relative(
    metric: str, statistic: str, figures: Figures, baseline: Figures, allowance: Allowance, count: int
) -> GateResult:
    before, now = baseline.estimate(metric, statistic), figures.estimate(metric, statistic)
    limit = max(allowance.points, allowance.relative * abs(before.value))
    if math.isnan(before.value):
        reason = f"the baseline has none: {before.reason}"
        return _unknown(metric, statistic, allowance.points, reason, False, "baseline")
    if math.isnan(now.value):
        return _unknown(metric, statistic, limit, now.reason, True, "baseline", before.value)
    low, high = worsening(before, now, same_run=baseline.trace == figures.trace)
    value = abs(now.value) - abs(before.value)
    outcome = "pass" if high < limit or high <= 0 else "inconclusive"
    least = for_one_of(count, value, (low, high))[0]
    if least >= limit and least > 0:
        outcome = "fail"
    said = f"{_figure(before.value, statistic)} before, {_figure(now.value, statistic)} now"
    margin = f"{100 * limit:.1f} points"
    if math.isnan(low):
        why = f"{now.reason or before.reason or 'there is no interval'}, so the noise of the difference is unknown"
    else:
        why = {
            "pass": f"not worse by {margin}",
            "fail": f"worse by {margin} or more",
            "inconclusive": f"whether worse by {margin} is hidden by the noise",
        }[outcome] + f" ({100 * value:+.1f} points, 95 % interval {100 * low:+.1f} to {100 * high:+.1f})"
    return GateResult(metric, statistic, limit, value, (low, high), outcome, f"{said}; {why}", "baseline", before.value)


def worsening(before: Estimate, now: Estimate, *, same_run: bool) -> Interval:
    """95 % interval of how much an absolute error grew.

    Of two predictions of the same measured run the noise is common: the bounds are subtracted. Else the noises are
    independent, and distances of bounds add in squares (MOVER: Zou and Donner 2008, Statistics in Medicine 27).
    A baseline without interval is taken to be as unsure as what is compared to it.
    """
    difference = abs(now.value) - abs(before.value)
    low, high = folded(now.ci95)
    if math.isnan(before.ci95[0]):
        old_low, old_high = (max(bound - difference, 0.0) for bound in (low, high))
    else:
        old_low, old_high = folded(before.ci95)
    if math.isnan(low) or math.isnan(old_low):
        # The same run and the same prediction: nothing changed, whatever the noise.
        return (0.0, 0.0) if same_run and difference == 0 else (math.nan, math.nan)
    if same_run:
        moved = (difference, low - old_low, high - old_high)
        return min(moved), max(moved)
    down = math.hypot(abs(now.value) - low, old_high - abs(before.value))
    up = math.hypot(high - abs(now.value), abs(before.value) - old_low)
    return difference - down, difference + up


def _unknown(
    metric: str,
    statistic: str,
    limit: float,
    reason: str,
    was_there: bool,
    against: str = "limit",
    baseline: float = math.nan,
) -> GateResult:
    """What cannot be measured is no pass; and a loss if it could be before."""
    reason = reason or "it is not in the report"
    outcome, said = ("fail", "is lost, the baseline has it") if was_there else ("inconclusive", "cannot be judged")
    nothing = (math.nan, math.nan)
    return GateResult(metric, statistic, limit, math.nan, nothing, outcome, f"{said}: {reason}", against, baseline)


def _said(estimate: Estimate, statistic: str) -> str:
    said = f"off by {_figure(estimate.value, statistic)}"
    if math.isnan(estimate.ci95[0]):
        return said
    low, high = (_figure(bound, statistic) for bound in estimate.ci95)
    return f"{said}, 95 % interval {low} to {high}"


def _figure(value: float, statistic: str) -> str:
    return _percent(value) if statistic in UNSIGNED else f"{100 * value:+.2f} %"


def _percent(value: float) -> str:
    return f"{100 * value:.4g} %"
