"""Intervals from a block bootstrap over arrival time, of fits to recorded and to reconstructed iterations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from synthetic import TRUTH, run

from calibrate.bootstrap import LEAST_RESAMPLES, bootstrap
from calibrate.fit import ProfileFit
from calibrate.space import LINEAR_UNITS
from profiles.errors import InputError


def recorded(seed=1, count=40, noise=0.05, shared=None):
    """A fit to recorded iterations; ``shared`` is a factor on their durations, from their shares of the run."""
    trace, iterations, base = run(seed=seed, count=count, noise=noise)
    if shared is not None:
        factor = shared(np.linspace(0, 1, len(iterations)))
        place = iterations.schema.get_field_index("duration")
        seconds = pa.array(iterations["duration"].to_numpy() * factor)
        iterations = iterations.set_column(place, iterations.schema.field(place), seconds)
    return ProfileFit().fit([(replace(trace, iterations=iterations), base, None)])


def covered(fits):
    """How many true coefficients lie within the intervals of Jacobian and bootstrap, of how many."""
    inside, total = np.zeros(2, dtype=int), 0
    for fit in fits:
        resampled = bootstrap(fit, 200).ci95
        for one in fit.coefficients_:
            truth = TRUTH[one.name] / LINEAR_UNITS[one.name]
            for kind, (low, high) in enumerate((one.ci95, resampled[one.name])):
                inside[kind] += low <= truth <= high
            total += 1
    return inside, total


def test_both_kinds_of_interval_cover_the_truth_where_iterations_were_recorded():
    inside, total = covered(recorded(seed) for seed in range(24))
    # 144 intervals: fewer than 0.88, or all, would be as rare as 1 in 1,000 if each covered 90 to 99 %.
    assert all(0.88 * total <= one < total for one in inside), f"{inside} of {total}"


def test_both_kinds_of_interval_cover_the_truth_where_the_schedule_was_reconstructed():
    def fits():
        for seed in range(6):
            trace, _, base = run(seed=seed, count=60, noise=0.02)
            yield ProfileFit().fit([(trace, base, None)])

    inside, total = covered(fits())
    # 36 intervals: fewer than 30 are less likely than 1 in 100 if each covers 92 %.
    assert all(one >= 30 for one in inside), f"{inside} of {total}"


def test_neighbours_that_err_together_widen_the_interval():
    def slow_spells(share):
        return 1 + 0.15 * np.sign(np.sin(40 * share))

    def shuffled(share):
        return np.random.default_rng(0).permutation(slow_spells(share))

    together, apart = (bootstrap(recorded(noise=0.02, shared=one)).ci95["step"] for one in (slow_spells, shuffled))
    assert together[1] - together[0] > 2 * (apart[1] - apart[0])


def test_what_only_the_base_profile_says_is_not_certain():
    # One request at a time: the data do not tell a step from its sequence, whatever is resampled.
    trace, _, base = run(count=40, rate=0.05)
    fit = ProfileFit().fit([(trace, base, None)])
    resampled = bootstrap(fit)
    place = {one.name: one for one in fit.coefficients_}
    low, high = resampled.ci95["sequence"]
    assert not place["sequence"].identified
    assert high - low > 0.3 * (place["sequence"].ci95[1] - place["sequence"].ci95[0])


def test_intervals_stay_within_the_bounds_and_hold_the_value():
    fit = recorded(seed=3)
    for one in fit.coefficients_:
        low, high = bootstrap(fit).ci95[one.name]
        assert 0 <= low <= one.value <= high


def test_the_number_of_jobs_changes_nothing():
    fit = recorded()
    seen = []
    alone = bootstrap(fit, 50, progress=seen.append)
    assert np.array_equal(alone.values, bootstrap(fit, 50, jobs=2).values)
    assert seen == sorted(seen)
    assert seen[-1] == 50
    assert not np.array_equal(alone.values, bootstrap(fit, 50, seed=2).values)


def test_an_interval_much_wider_than_the_jacobians_is_said_to_be():
    fit = recorded()
    assert bootstrap(fit).sentences == []
    narrow = [replace(one, ci95=(one.value, one.value * (1 + 1e-9))) for one in fit.coefficients_]
    fit.coefficients_ = narrow
    [sentence] = bootstrap(fit).sentences
    assert "more than twice as wide" in sentence
    assert "step" in sentence


def test_too_few_resamples_and_an_unfitted_fit_are_refused():
    with pytest.raises(InputError, match=f"at least {LEAST_RESAMPLES}"):
        bootstrap(recorded(), LEAST_RESAMPLES - 1)
    with pytest.raises(InputError, match="fit first"):
        bootstrap(ProfileFit())


def test_latencies_of_a_request_are_drawn_together(monkeypatch):
    """A fit refined on simulated latencies: its bootstrap resamples both spans and requests, of each run."""
    monkeypatch.setattr("calibrate.fit.SYSTEMATIC", 0.0)
    trace, _, base = run(count=60, noise=0.02)
    fit = ProfileFit().fit([(trace, base, None), (run(seed=2, count=60, noise=0.02)[0], base, None)])
    assert fit.simulations_ > 0
    equations, latencies = fit.evidence_.groups
    assert set(np.floor(latencies.place)) == set(np.floor(equations.place)) == {0, 1}
    # TTFT, end-to-end and decode time of a request are at one place.
    assert np.unique(latencies.place).size <= 120 < latencies.place.size
    assert len(bootstrap(fit, 50).values) == 50
