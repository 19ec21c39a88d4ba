"""Reconstructing schedules from stamps, and fitting coefficients to them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import yaml
from synthetic import TRUTH, changed, deployment, run, with_seconds

from calibrate.fit import ProfileFit
from calibrate.gauss_newton import Prior, refine
from calibrate.holdout import hold_out, mean_errors, parts, score
from calibrate.reconstruction import reconstruct
from calibrate.simulated import SimulatedRun
from calibrate.space import LINEAR_UNITS, CoefficientSpace, with_coefficients
from profiles.errors import InputError
from replay.trace import requests_table


def iterations_only(space):
    """The coefficients that an iteration's time has; those of offline calls are not among them."""
    return space.only(np.isin(space.names, list(TRUTH)))


def true_values(space):
    return np.array([TRUTH[name] / LINEAR_UNITS[name] for name in space.names])


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_schedule_is_recovered_from_the_stamps_alone(asynchronous):
    trace, iterations, base = run(asynchronous=asynchronous, rate=15.0)
    # The very batches that the engine computed, from the first stamp to the last.
    space = with_seconds(base, TRUTH).accelerator
    found = reconstruct(
        trace, base.config, lambda batch: sum(space.step(batch)), lambda _: lambda b: sum(space.step(b))
    )
    ends = np.round((iterations["start"].to_numpy() + iterations["duration"].to_numpy()) * 1e6).astype(int)
    stamps = np.round(found.stamps * 1e6).astype(int)
    place = np.searchsorted(ends, stamps)
    assert np.array_equal(ends[place], stamps)
    right = np.diff(found.numbers) == np.diff(place)
    # A prompt's chunk can trade places with a few decodes of the same length: rare, and what the fit is robust to.
    assert right.mean() > 0.95
    tokens = [sum(row) for row in iterations["scheduled"].to_pylist()]
    same = 0
    for gap in np.flatnonzero(right & ~found.quiet):
        inside = found.batches[found.numbers[gap] + 1 - found.first : found.numbers[gap + 1] + 1 - found.first]
        same += [batch.num_tokens for batch in inside if batch] == tokens[place[gap] + 1 : place[gap + 1] + 1]
    assert same > 0.95 * (right & ~found.quiet).sum()


def test_known_coefficients_are_found_from_a_start_without_physics():
    trace, _, base = run()
    fit = ProfileFit().fit([(trace, base, None)])
    values = {one.name: one.value * LINEAR_UNITS[one.name] for one in fit.coefficients_}
    for name in ("step", "token", "decode_attention", "prefill_step"):
        assert values[name] == pytest.approx(TRUTH[name], rel=0.02)
    errors = mean_errors(score([(trace, base)], fit, [np.ones(len(trace), dtype=bool)]))
    assert all(errors[metric]["mape"] < 0.005 for metric in ("ttft", "tpot", "e2e"))


def test_intervals_cover_the_truth_as_often_as_they_say():
    inside = total = 0
    for seed in range(16):
        trace, iterations, base = run(seed=seed, count=40, noise=0.05)
        fit = ProfileFit().fit([(replace(trace, iterations=iterations), base, None)])
        for one in fit.coefficients_:
            truth = TRUTH[one.name] / LINEAR_UNITS[one.name]
            inside += one.ci95[0] <= truth <= one.ci95[1]
            total += 1
    # 96 intervals of 95 %: fewer than 84 covered is less likely than 1 in 1,000.
    assert inside >= 84, f"{inside} of {total}"


def test_intervals_hold_where_the_schedule_had_to_be_reconstructed():
    inside = total = 0
    for seed in range(12):
        trace, _, base = run(seed=seed, count=60, noise=0.05)
        for one in ProfileFit().fit([(trace, base, None)]).coefficients_:
            truth = TRUTH[one.name] / LINEAR_UNITS[one.name]
            inside += one.ci95[0] <= truth <= one.ci95[1]
            total += 1
    assert inside >= 62, f"{inside} of {total}"


def test_what_the_data_cannot_tell_is_named():
    # One request at a time: a step always holds one sequence and one token more or less.
    trace, _, base = run(count=40, rate=0.05)
    fit = ProfileFit().fit([(trace, base, None)])
    named = {one for pair in fit.correlated_ for one in pair[:2]} | {
        one.name for one in fit.coefficients_ if not one.identified
    }
    assert {"step", "sequence"} & named
    assert fit.sentences_


def test_held_out_requests_take_no_part_in_the_fit():
    trace, _, base = run(count=100)
    [part] = parts("time:0.5", [trace])
    known = part.fitted[0]
    spoilt = {name: trace.requests.column(name).combine_chunks() for name in trace.requests.column_names}
    for name in ("queued", "scheduled", "first_token", "last_token"):
        spoilt[name] = np.where(known, trace.column(name), trace.column(name) + 7.0)
    other = replace(trace, requests=requests_table(spoilt, len(trace)), _columns={})
    fits = [ProfileFit().fit([(one, base, known)]).coefficients_ for one in (trace, other)]
    assert fits[0] == fits[1]


def test_a_fit_of_the_first_half_predicts_the_second():
    trace, _, base = run(count=160, noise=0.03)
    [(fit, comparisons)] = hold_out([(trace, base)], "time:0.5", None)
    assert fit.misplaced_ <= 1
    assert comparisons[0].coverage["excluded"]["training"] == 80
    assert mean_errors(comparisons)["e2e"]["mape"] < 0.02


def test_schemes_split_by_time_and_by_trace():
    first, _, _ = run(seed=1, count=20)
    second, _, _ = run(seed=2, count=20)
    folds = parts("kfold-time:4", [first])
    assert sum(part.scored[0].astype(int) for part in folds).tolist() == [1] * 20
    for part in folds:
        assert not (part.fitted[0] & part.scored[0]).any()
    [part] = parts("trace:synthetic-2", [first, second])
    assert part.fitted[1] is None
    assert part.scored[0] is None
    for wrong in ("time:2", "time:x", "kfold-time:1", "random:3", "trace:nobody", ""):
        with pytest.raises(InputError, match="expected"):
            parts(wrong, [first, second])


def test_engine_arguments_that_contradict_the_stamps_are_refused():
    trace, _, _ = run(count=120, rate=12.0)
    with pytest.raises(InputError, match="check the engine arguments"):
        ProfileFit().fit([(trace, deployment(max_num_seqs=4, max_num_batched_tokens=64), None)])


@pytest.mark.parametrize("count", [1, 2])
def test_too_little_data_is_refused(count):
    trace, _, base = run(count=count)
    with pytest.raises(InputError):
        ProfileFit().fit([(trace, base, None)])


@pytest.mark.parametrize("told", [True, False], ids=["preemptions told", "not told"])
def test_a_run_with_preemptions_is_fitted_all_the_same(told):
    trace, _, base = run(count=150, rate=9.0, noise=0.02, num_gpu_blocks=120)
    assert trace.column("preemptions").sum() > 10
    if not told:
        trace = changed(trace, preemptions=None)
    fit = ProfileFit().fit([(trace, base, None)])
    assert fit.simulations_ > 0
    errors = mean_errors(score([(trace, base)], fit, [np.ones(len(trace), dtype=bool)]))
    assert errors["ttft"]["mape"] < 0.06
    assert errors["tpot"]["mape"] < 0.015
    assert errors["e2e"]["mape"] < 0.02


def test_latencies_alone_tell_the_coefficients_if_the_start_is_near(monkeypatch):
    # Nothing but first and last tokens, as a client without token times has them.
    trace, _, base = run(count=150, rate=12.0, noise=0.01)
    trace = changed(trace, queued=None, scheduled=None)
    learned = ProfileFit().fit([(*run(count=60)[::2], None)]).coefficients_
    start = with_coefficients(base, [replace(one, value=1.3 * one.value) for one in learned])
    fit = ProfileFit().fit([(trace, start, None)])
    assert fit.simulations_ > 0
    assert any("simulated latencies" in line for line in fit.warnings_)
    errors = mean_errors(score([(trace, base)], fit, [np.ones(len(trace), dtype=bool)]))
    assert errors["e2e"]["mape"] < 0.02
    assert errors["tpot"]["mape"] < 0.01


def test_the_jacobian_is_that_of_the_simulation():
    trace, _, base = run(count=60, rate=8.0)
    truth = with_seconds(base, TRUTH)
    space = iterations_only(CoefficientSpace(truth))
    simulated = SimulatedRun(trace, base.config, space.features)
    values = true_values(space)
    here = simulated.residuals(values)
    assert np.abs(here.values).max() < 1e-6
    for place in range(values.size):
        moved = values.copy()
        moved[place] += 1e-5
        slope = (simulated.residuals(moved).values - here.values) / 1e-5
        # Where an arrival lies that near to the end of a step, it catches another; elsewhere they are the same.
        close = np.isclose(slope, here.jacobian[:, place], rtol=0.02, atol=0.01)
        assert close.mean() > 0.9


def test_steps_count_only_if_the_simulated_loss_falls():
    trace, _, base = run(count=80, rate=12.0, noise=0.05)
    space = iterations_only(CoefficientSpace(with_seconds(base, TRUTH)))
    simulated = SimulatedRun(trace, base.config, space.features)
    start = 1.2 * true_values(space)
    prior = Prior(start, space.spread, space.least, 1.0)
    found = refine([simulated], start, prior, None)
    before, after = (np.abs(simulated.residuals(values).values).mean() for values in (start, found.values))
    assert after < 0.9 * before
    assert (found.values >= space.least).all()
    assert found.simulations <= 35


def test_the_command_writes_a_profile_that_reports_use(tmp_path):
    def servecal(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "calibrate.cli.main", *arguments], cwd=tmp_path, capture_output=True, text=True
        )

    fitted = servecal("fit", "vllm-cpu-shared-prefix-2", "--base", "linear", "-o", "cpu.yaml", "--format", "json")
    assert fitted.returncode == 0, fitted.stderr
    document = json.loads(fitted.stdout)
    assert document["schema"] == "servecal.fit/1"
    profile = yaml.safe_load((tmp_path / "cpu.yaml").read_text())
    assert profile["coefficients"]["step"]["value"] == pytest.approx(
        document["coefficients"]["step"]["value"], rel=1e-5
    )
    report = servecal("report", "vllm-cpu-shared-prefix", "--profile", "cpu.yaml", "--format", "json")
    assert report.returncode == 0, report.stderr
    # Another run of the same engine; two real runs of it differ by 11 %.
    assert json.loads(report.stdout)["metrics"]["e2e"]["mape"] < 0.11
    wrong = servecal("fit", "vllm-cpu-shared-prefix-2", "--base", "linear", "--holdout", "half", "-o", "no.yaml")
    assert wrong.returncode == 2
    assert not (tmp_path / "no.yaml").exists()
