from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrate.errors import compare
from calibrate.estimates import STATISTICS, Compared, Coverage, Estimate, Repeated, widened
from calibrate.gates import (
    Allowance,
    Gate,
    Judgement,
    Rules,
    folded,
    for_one_of,
    judge,
    judge_change,
    verdict,
    worsening,
)

ORDER = {"fail": 0, "inconclusive": 1, "pass": 2}
FRACTIONS = st.floats(-2, 2, allow_subnormal=False)
LIMITS = st.floats(0, 3, allow_subnormal=False)


@dataclass
class Given:
    """Figures as a test states them."""

    estimates: dict[tuple[str, str], Estimate]
    paired: int = 100
    lost: int = 0
    trace: str = "one run"
    names: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self):
        self.names = list(self.estimates)

    @property
    def coverage(self):
        return Coverage(self.paired, self.lost)

    def estimate(self, metric, statistic):
        return self.estimates.get((metric, statistic), Estimate(math.nan, reason="nobody measured it"))


def about(value, reach=0.01, **fields):
    return Estimate(value, (value - reach, value + reach), **fields)


def outcome(figures, *gates, **options):
    return {one.name: one.verdict for one in judge(figures, Rules(gates), **options).results}


@st.composite
def intervals(draw):
    low, value, high = sorted(draw(st.tuples(FRACTIONS, FRACTIONS, FRACTIONS)))
    return value, (low, high)


@given(intervals(), LIMITS, LIMITS, st.integers(1, 40), LIMITS)
def test_a_wider_limit_is_never_judged_worse(known, one, other, gates, floor):
    value, interval = known
    tight, wide = sorted((one, other))
    verdicts = [verdict(value, interval, limit, floor=floor, gates=gates) for limit in (tight, wide)]
    assert ORDER[verdicts[0]] <= ORDER[verdicts[1]]


@given(intervals(), LIMITS, st.integers(1, 40))
def test_a_verdict_is_what_the_whole_interval_says(known, limit, gates):
    value, (low, high) = known
    inside = -limit <= low and high <= limit
    found = verdict(value, (low, high), limit, gates=gates)
    assert (found == "pass") == inside
    if found == "fail":
        assert low > limit or high < -limit


@given(intervals(), LIMITS, st.integers(1, 40))
def test_more_gates_need_more_evidence_to_fail(known, limit, gates):
    value, interval = known
    if verdict(value, interval, limit, gates=gates + 1) == "fail":
        assert verdict(value, interval, limit, gates=gates) == "fail"


@given(intervals(), LIMITS)
def test_verdicts_do_not_depend_on_the_sign(known, limit):
    value, (low, high) = known
    assert verdict(value, (low, high), limit) == verdict(-value, (-high, -low), limit)


@given(intervals(), st.floats(0, 1))
def test_the_folded_interval_holds_the_size_of_all_that_was_in_it(known, share):
    _, (low, high) = known
    inside = abs(low + share * (high - low))
    least, most = folded((low, high))
    assert least - 1e-12 <= inside <= most + 1e-12


def test_one_gate_has_its_own_interval_and_ten_have_wider_ones():
    assert for_one_of(1, 0.0, (-0.1, 0.2)) == pytest.approx((-0.1, 0.2))
    # z(0.9975) / z(0.975) = 2.8070 / 1.9600
    assert for_one_of(10, 0.0, (-0.1, 0.2)) == pytest.approx((-0.14322, 0.28643), rel=1e-4)


def test_pass_fail_and_between():
    figures = Given({("ttft", "mean"): about(-0.05), ("ttft", "p99"): about(0.2), ("e2e", "mean"): about(0.1)})
    gates = [Gate("ttft", "mean", 0.1), Gate("ttft", "p99", 0.1), Gate("e2e", "mean", 0.1)]
    judgement = judge(figures, Rules(tuple(gates)))
    assert [one.verdict for one in judgement.results] == ["pass", "pass", "fail", "inconclusive"]
    assert judgement.verdict == "fail"
    assert "e2e.mean" not in judgement.headline
    assert judgement.headline == "Gates: fail (ttft.p99)."
    ttft = judgement.results[1]
    assert (ttft.limit, ttft.value, ttft.ci95) == (0.1, -0.05, pytest.approx((-0.06, -0.04)))
    assert "off by -5.00 %, 95 % interval -6.00 % to -4.00 %; all of it is within 10 %" in ttft.sentence


@pytest.mark.parametrize(
    ("verdicts", "codes"),
    [
        (("pass", "pass"), {"report": 0, "pass": 0, "fail": 0}),
        (("pass", "inconclusive"), {"report": 3, "pass": 0, "fail": 1}),
        (("inconclusive", "fail"), {"report": 1, "pass": 1, "fail": 1}),
    ],
)
def test_exit_codes(verdicts, codes):
    figures = Given({("e2e", "mean"): Estimate(0.0, {"pass": (-0.01, 0.01)}.get(verdicts[1], (-0.2, 0.2)))})
    if verdicts[1] == "fail":
        figures = Given({("e2e", "mean"): about(0.5)})
    judgement = judge(figures, Rules((Gate("e2e", "mean", 0.1),)))
    assert {way: judgement.exit_code(way) for way in codes} == codes


def test_coverage_is_judged_whatever_was_asked_for():
    whole = Given({("e2e", "mean"): about(0.0)})
    lost = Given({("e2e", "mean"): about(0.0)}, paired=99, lost=1)
    gate = Gate("e2e", "mean", 0.1)
    assert outcome(whole, gate) == {"coverage.paired": "pass", "e2e.mean": "pass"}
    assert outcome(lost, gate) == {"coverage.paired": "fail", "e2e.mean": "pass"}
    assert outcome(lost, gate, Gate("coverage", "paired", 0.99))["coverage.paired"] == "pass"


def test_a_request_that_the_baseline_compared_must_still_be():
    before = Given({("e2e", "mape"): about(0.1)}, paired=100)
    now = Given({("e2e", "mape"): about(0.05)}, paired=98)
    result = judge(now, Rules(baseline="b"), before).results[0]
    assert (result.name, result.verdict) == ("coverage.paired", "fail")
    assert "2 that the baseline compared" in result.sentence
    # Another run may be shorter; then only its share counts.
    other = Given({("e2e", "mape"): about(0.05)}, paired=50, trace="another run")
    assert judge(other, Rules(baseline="b"), before).results[0].verdict == "pass"


def test_what_cannot_be_measured_is_inconclusive_and_a_loss_if_it_could_be_before():
    now = Given({("e2e", "mape"): about(0.1)})
    gate = Gate("itl", "mape", 0.1)
    result = judge(now, Rules((gate,))).results[1]
    assert (result.verdict, result.sentence) == ("inconclusive", "cannot be judged: nobody measured it")
    assert math.isnan(result.value)
    before = Given({("e2e", "mape"): about(0.1), ("itl", "mape"): about(0.1)})
    results = judge(now, Rules((gate,), baseline="b"), before).results
    assert {one.name: one.verdict for one in results} == {
        "coverage.paired": "pass",
        "itl.mape": "fail",
        "e2e.mape vs baseline": "pass",
        "itl.mape vs baseline": "fail",
    }


def test_a_value_without_interval_is_inconclusive():
    figures = Given({("throughput", "makespan"): Estimate(0.5, reason="2 pairs allow no interval")})
    result = judge(figures, Rules((Gate("throughput", "makespan", 0.1),))).results[1]
    assert result.verdict == "inconclusive"
    assert "2 pairs allow no interval, so its noise is unknown" in result.sentence


def test_no_prediction_is_blamed_for_what_two_runs_differ_by():
    gate = Gate("ttft", "mape", 0.05)
    assert outcome(Given({("ttft", "mape"): about(0.1, floor=0.0)}), gate)["ttft.mape"] == "fail"
    noisy = judge(Given({("ttft", "mape"): about(0.1, floor=0.15)}), Rules((gate,))).results[1]
    assert noisy.verdict == "inconclusive"
    assert "two runs of the engine itself differ by 15 %" in noisy.sentence


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        (0.05, 0.05, "pass"),
        (0.05, 0.02, "pass"),
        # 1.5 points are 30 % of it, but no 2 points.
        (0.05, 0.065, "pass"),
        # 3 points are no 10 % of it.
        (0.50, 0.53, "pass"),
        (0.05, 0.08, "fail"),
        (-0.05, 0.08, "fail"),
        (0.50, 0.58, "fail"),
    ],
)
def test_worse_than_the_baseline_is_by_two_points_and_a_tenth(before, now, expected):
    reach = 0.001
    figures = [Given({("e2e", "mean"): about(value, reach)}) for value in (now, before)]
    results = judge(figures[0], Rules(baseline="b"), figures[1]).results
    assert results[1].name == "e2e.mean vs baseline"
    assert results[1].verdict == expected
    assert results[1].baseline == before


def test_noise_hides_a_regression_between_runs_but_not_on_the_same_run():
    before, now = about(0.05, 0.03), about(0.09, 0.03)
    same, other = (worsening(before, now, same_run=same) for same in (True, False))
    assert same == pytest.approx((0.04, 0.04))
    # Independent: 3 points of both add in squares.
    assert other == pytest.approx((0.04 - 0.03 * 2**0.5, 0.04 + 0.03 * 2**0.5))
    figures = Given({("e2e", "mape"): now}), Given({("e2e", "mape"): before})
    assert judge(figures[0], Rules(baseline="b"), figures[1]).results[1].verdict == "fail"
    figures[1].trace = "another run"
    assert judge(figures[0], Rules(baseline="b"), figures[1]).results[1].verdict == "inconclusive"


def test_the_same_report_is_never_worse_than_itself():
    unsure = Given({("ttft", "mape"): about(0.1, 0.09), ("ttft", "mean"): Estimate(0.3)})
    assert judge(unsure, Rules(baseline="b"), unsure).verdict == "pass"


@given(intervals(), intervals(), st.booleans())
def test_the_growth_lies_in_its_interval(one, other, same_run):
    before, now = (Estimate(value, interval) for value, interval in (one, other))
    low, high = worsening(before, now, same_run=same_run)
    assert low - 1e-12 <= abs(now.value) - abs(before.value) <= high + 1e-12


def test_what_is_held_against_a_baseline_can_be_chosen():
    now = Given({("e2e", "mape"): about(0.5), ("e2e", "p90"): about(0.1)})
    before = Given({("e2e", "mape"): about(0.1), ("e2e", "p90"): about(0.1)})
    allowance = Allowance(points=0.5, statistics=(("e2e", "p90"), ("e2e", "p95")))
    results = judge(now, Rules(baseline="b", allowance=allowance), before).results[1:]
    assert [(one.name, one.verdict) for one in results] == [
        ("e2e.p90 vs baseline", "pass"),
        ("e2e.p95 vs baseline", "inconclusive"),
    ]


def test_of_two_reports_a_limit_bounds_the_growth():
    before, now = Given({("e2e", "mape"): about(0.30)}), Given({("e2e", "mape"): about(0.34)})
    for limit, expected in ((0.03, "fail"), (0.05, "pass")):
        assert judge_change(before, now, [Gate("e2e", "mape", limit)]).results[1].verdict == expected
    better = judge_change(now, before, [Gate("e2e", "mape", 0.0)])
    assert better.verdict == "pass"


# Figures of real comparisons.


@pytest.fixture(scope="module")
def runs(make_trace):
    """A hundred requests; a prediction 4 % too long, with noise."""
    random = np.random.default_rng(3)
    ttft, tail = random.uniform(0.1, 0.4, 100), random.uniform(1.0, 3.0, 100)
    noise = 1 + 0.02 * random.standard_normal((2, 100))
    measured = make_trace(ttft * noise[0], ttft * noise[0] + tail * noise[1])
    return measured, make_trace(1.04 * ttft, 1.04 * (ttft + tail)), (ttft, tail, random)


def test_every_statistic_of_a_comparison_has_its_interval_around_it(runs):
    figures = Compared(compare(*runs[:2]))
    for metric, statistic in figures.names:
        one = figures.estimate(metric, statistic)
        assert one.ci95[0] <= one.value <= one.ci95[1], (metric, statistic)
        assert one.ci95[1] - one.ci95[0] > 1e-4, (metric, statistic)
    assert {name for metric, name in figures.names if metric == "ttft"} == set(STATISTICS)


def test_estimates_are_those_of_the_comparison(runs):
    comparison = compare(*runs[:2])
    figures = Compared(comparison)
    measured, predicted = comparison.pairs("e2e")
    relative = predicted / measured - 1
    assert figures.estimate("e2e", "bias").value == pytest.approx(relative.mean())
    assert figures.estimate("e2e", "median_ape").value == pytest.approx(np.median(np.abs(relative)))
    assert figures.estimate("e2e", "p90").value == comparison.metrics["e2e"].percentiles["p90"].error
    # A bootstrap knows the mean of 100 about as well as the textbook, widened for 10 blocks: t(9) / z * sqrt(10 / 9).
    low, high = figures.estimate("e2e", "bias").ci95
    textbook = 1.96 * relative.std() / 10 * 2.262 / 1.96 * (10 / 9) ** 0.5
    assert (high - low) / 2 == pytest.approx(textbook, rel=0.4)


def test_throughput_is_sure_where_last_tokens_are(make_trace):
    """Requests a second apart for 100 s, the last one of 2 s; noise of 0.1 s moves the makespan by 0.1 %."""
    random = np.random.default_rng(0)
    still, noisy = make_trace([0.1] * 100, [2.0] * 100), make_trace([0.1] * 100, 2 + 0.1 * random.standard_normal(100))
    one = Compared(compare(noisy, still)).estimate("throughput", "makespan")
    assert 0 < one.ci95[1] - one.ci95[0] < 0.03
    rate = Compared(compare(noisy, still)).estimate("throughput", "output_tokens_per_s")
    assert rate.value == pytest.approx(1 / (1 + one.value) - 1)
    assert rate.ci95 == pytest.approx((1 / (1 + one.ci95[1]) - 1, 1 / (1 + one.ci95[0]) - 1), abs=1e-4)


def test_an_interval_of_few_blocks_is_widened():
    low, high = widened(0.0, (-1.0, 1.0), 16)
    # 4 blocks: sqrt(4 / 3) * t(0.975, 3) / z(0.975)
    assert (low, high) == pytest.approx((-1.8750, 1.8750), rel=1e-3)
    assert widened(0.0, (-1.0, 1.0), 10**6)[1] == pytest.approx(1.0, rel=2e-3)
    assert math.isnan(widened(0.0, (-1.0, 1.0), 1)[0])


def test_repeats_widen_the_interval_to_what_runs_differ_by(runs, make_trace):
    measured, predicted, (ttft, tail, _) = runs
    first = Compared(compare(measured, predicted))
    factors = (1.03, 0.98)
    repeats = [make_trace(factor * ttft, factor * (ttft + tail)) for factor in factors]
    others = [Compared(compare(one, predicted)) for one in repeats]
    between = [Compared(compare(measured, one)) for one in repeats]
    one = Repeated(first, others, between).estimate("e2e", "mean")
    values = [one.value, *(other.estimate("e2e", "mean").value for other in others)]
    # Student's t for 2 degrees of freedom.
    reach = 4.3027 * np.std(values, ddof=1)
    assert one.ci95 == pytest.approx((one.value - reach, one.value + reach), rel=1e-4)
    assert one.value == first.estimate("e2e", "mean").value
    floor = Repeated(first, others, between).estimate("e2e", "mape").floor
    assert floor == max(other.estimate("e2e", "mape").value for other in between)
    # Ten percent lie beyond 5 for one run, but runs that differ by 5 points cannot tell that.
    assert outcome(first, Gate("e2e", "mean", 0.02))["e2e.mean"] == "fail"
    assert outcome(Repeated(first, others, between), Gate("e2e", "mean", 0.02))["e2e.mean"] == "inconclusive"


def test_a_judgement_of_nothing_passes():
    assert Judgement(()).verdict == "pass"
