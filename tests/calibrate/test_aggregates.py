"""Fitting from aggregates per load level: the simulator's own runs from known coefficients, reduced to statistics."""

from __future__ import annotations

import csv
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import yaml

from calibrate.aggregates import AggregateRun, compare_aggregates, contradiction, predict
from calibrate.fit import ProfileFit
from calibrate.holdout import hold_out, mean_errors, parts
from calibrate.simulated import FrontEndTerm
from calibrate.space import CoefficientSpace, FittedCoefficient, with_coefficients
from profiles.deployment import Facts, resolve
from profiles.errors import InputError
from profiles.profile import FrontEnd, load_profile
from replay.load_level import LoadLevel, draw
from replay.run import replay

ARGUMENTS = {"max_num_seqs": 64, "max_num_batched_tokens": 1024, "num_gpu_blocks": 8000, "max_model_len": 4096}
ENGINE = {"name": "vllm", "version": "0.19.0", "arguments": ARGUMENTS}
WAY = 0.02
TRUTH = {
    "dense_compute": 1.35,
    "weight_traffic": 1.3,
    "decode_attention": 1.4,
    "output_head": 1.2,
    "embedding": 2.0,
    "prefill_attention": 3.3,
    "dense_exposed": 0.5,
    "tile_padding": 1.3,
    "decode_kernels": 1.3,
    "host_step": 3.0,
    "host_sequence": 1.0,
    "host_prefill_layer": 0.1,
}
STATISTICS = ("mean", "p50", "p99")


def base(kind="roofline:l4"):
    return resolve(load_profile(kind), Facts(model="llama-3.2-1b", version="0.19.0", arguments=ARGUMENTS))


def true_deployment(deployment, way=WAY):
    values = [FittedCoefficient(name, value, (0.0, 0.0), 0.0, True) for name, value in TRUTH.items()]
    return replace(with_coefficients(deployment, values), front_end=FrontEnd(per_request=way))


def reduced(trace, metrics=("ttft", "tpot", "e2e"), statistics=STATISTICS):
    found = {}
    for metric in metrics:
        values = trace.latency(metric)
        found[metric] = {
            one: float(values.mean() if one == "mean" else np.percentile(values, float(one[1:]))) for one in statistics
        }
    return found | {"throughput": {"duration": float(trace.column("last_token").max())}}


def level(name, seed=11, requests=150, way=WAY, prompt=300.0, output=60.0, **load):
    """A load level as a client measured it: one draw, of which only statistics are left."""
    recipe = LoadLevel(requests, prompt, output, **load)
    meta = {"name": name, "model": "llama-3.2-1b", "vantage": "client", "engine": ENGINE, "aggregates": {}}
    trace = recipe.trace(meta, {})
    measured = replay(draw(trace, seed), true_deployment(base(), way)).predicted
    return draw(trace.with_meta(aggregates=reduced(measured)), 0)


def errors(trace, deployment):
    found = compare_aggregates(trace, predict(trace, deployment)).metrics
    return {(metric, at): level.error for metric, one in found.items() for at, level in one.percentiles.items()}


@pytest.fixture(scope="module")
def levels():
    return [level(f"rate-{rate:g}", seed=20 + place, rate=rate) for place, rate in enumerate((1.5, 5.0, 9.0))]


def test_a_load_level_in_between_is_predicted_within_a_few_percent(levels):
    low, middle, high = levels
    before = errors(middle, base())
    assert before["e2e", "mean"] < -0.2
    [(fit, comparisons)] = hold_out([(one, base()) for one in levels], "trace:rate-5", None)
    assert fit.simulations_ < 100
    held = {metric: one["bias"] for metric, one in mean_errors(comparisons).items()}
    assert held == {
        "ttft": pytest.approx(0, abs=0.06),
        "tpot": pytest.approx(0, abs=0.03),
        "e2e": pytest.approx(0, abs=0.03),
    }
    for one in (low, high):
        assert abs(errors(one, fit.deployment(base()))["e2e", "mean"]) < 0.03


def test_few_numbers_leave_most_coefficients_at_the_base_and_say_so(levels):
    fit = ProfileFit().fit([(levels[0], base(), None)])
    unsure = {one.name: one for one in fit.coefficients_ if not one.identified}
    assert {"prefill_attention", "embedding", "longest_context"} <= set(unsure)
    assert len(unsure) > len(fit.coefficients_) / 2
    for name in ("prefill_attention", "embedding", "longest_context"):
        assert unsure[name].ci95[0] <= unsure[name].prior <= unsure[name].ci95[1]
    assert any("aggregates tell few" in line and "prefill_attention" in line for line in fit.sentences_)
    assert "front_end" not in {one.name for one in fit.coefficients_}


def test_clients_in_a_closed_loop_are_fitted_and_predicted():
    few, many, unseen = (level(f"clients-{one}", max_concurrency=one, requests=6 * one + 40) for one in (1, 24, 8))
    fit = ProfileFit().fit([(one, base(), None) for one in (few, many)])
    found = errors(unseen, fit.deployment(base()))
    assert abs(found["tpot", "mean"]) < 0.03
    assert abs(found["e2e", "mean"]) < 0.03
    throughput = compare_aggregates(unseen, predict(unseen, fit.deployment(base()))).throughput
    assert abs(throughput["output_tokens_per_s"]["error"]) < 0.03


def statistics_and_slopes(trace, values, seeds):
    space = CoefficientSpace(base(), client=True)
    run = AggregateRun(trace, base(), space.features, FrontEndTerm(space.front_end_place))
    run.draws = [draw(trace, seed) for seed in range(seeds)]
    run.seeds = seeds
    found = run.residuals(values)
    return run, found.values, found.jacobian


def true_values():
    space = CoefficientSpace(base(), client=True)
    known = TRUTH | {"front_end": 1e3 * WAY}
    return space.names, np.array([known.get(name, 0.0) for name in space.names])


def test_the_derivatives_of_a_closed_loop_are_exact():
    trace = level("loop", max_concurrency=8, requests=60, way=0.0)
    names, values = true_values()
    values[names.index("front_end")] = 0.0
    for name in ("weight_traffic", "host_step", "host_prefill_layer"):
        place = names.index(name)
        ends = []
        for side in (-1e-4, 1e-4):
            moved = values.copy()
            moved[place] += side
            ends.append(statistics_and_slopes(trace, moved, 1)[1])
        run, _, jacobian = statistics_and_slopes(trace, values, 1)
        measured = (ends[1] - ends[0]) / 2e-4
        assert jacobian[:, place] == pytest.approx(measured, rel=0.02, abs=2e-3), (name, run.targets)


def test_the_derivatives_of_an_open_loop_are_those_of_the_expected_statistics():
    # Of one draw every statistic jumps as the schedule does; of many the average is smooth.
    trace = level("open", rate=5.0, requests=120)
    names, values = true_values()
    for name in ("host_step", "weight_traffic"):
        place, step = names.index(name), 0.1
        ends = []
        for side in (-step, step):
            moved = values.copy()
            moved[place] += side * values[place]
            ends.append(statistics_and_slopes(trace, moved, 16)[1])
        run, _, jacobian = statistics_and_slopes(trace, values, 16)
        measured = (ends[1] - ends[0]) / (2 * step * values[place])
        for row, target in enumerate(run.targets):
            if target.statistic == "mean" and target.metric != "duration":
                assert jacobian[row, place] == pytest.approx(measured[row], rel=0.35), (name, target)


def test_a_percentile_is_known_less_well_than_a_mean_and_a_short_run_less_than_a_long_one():
    noise = {}
    for requests in (60, 600):
        run = AggregateRun(level("one", rate=5.0, requests=requests), base(), CoefficientSpace(base()).features)
        run.seeds = 1
        found = run.residuals(CoefficientSpace(base()).prior).noise
        noise |= {(requests, one.metric, one.statistic): value for one, value in zip(run.targets, found, strict=True)}
    assert noise[60, "ttft", "p99"] > 1.3 * noise[60, "ttft", "mean"]
    assert noise[60, "ttft", "mean"] > 1.3 * noise[600, "ttft", "mean"]


def test_lengths_of_which_only_means_are_known_leave_percentiles_out():
    trace = level("guessed", rate=5.0)
    unsure = trace.with_meta(workload=trace.meta["workload"] | {"lengths_known": False})
    run = AggregateRun(unsure, base(), CoefficientSpace(base()).features)
    assert {one.statistic for one in run.targets} == {"mean", ""}
    fit = ProfileFit().fit([(unsure, base(), None)])
    assert any("percentiles take no part" in line for line in fit.warnings_)


def test_means_that_contradict_each_other_are_warned_of():
    trace = level("one", rate=2.0, requests=60)
    assert contradiction(trace) is None
    said = trace.meta["aggregates"]
    wrong = trace.with_meta(aggregates=said | {"e2e": {"mean": 1e3 * said["e2e"]["mean"]}})
    fit = ProfileFit().fit([(wrong, base(), None)])
    assert any("contradict each other" in line for line in fit.warnings_)


def test_intervals_of_a_report_hold_one_draw_most_of_the_time():
    trace = level("one", rate=6.0, requests=120)
    inside = []
    for seed in range(30, 50):
        measured = replay(draw(trace, seed), true_deployment(base())).predicted
        other = trace.with_meta(aggregates=reduced(measured))
        found = compare_aggregates(other, predict(trace, true_deployment(base()))).metrics
        inside += [one.percentiles["mean"].error_ci95 for one in found.values()]
    share = np.mean([low <= 0 <= high for low, high in inside])
    assert 0.85 <= share <= 1.0
    assert np.mean([high - low for low, high in inside]) < 0.4


def test_what_aggregates_cannot_do_is_refused_with_the_reason(levels):
    run = [(levels[0], base(), None)]
    with pytest.raises(InputError, match="whole run; expected trace:NAME"):
        parts("time:0.5", levels)
    linear = resolve(load_profile("linear"), Facts(model="llama-3.2-1b", version="0.19.0", arguments=ARGUMENTS))
    bare = levels[0].with_meta(aggregates={"ttft": {"mean": 0.1}})
    with pytest.raises(InputError, match="1 aggregates cannot tell 7 coefficients of a base without physics"):
        ProfileFit().fit([(bare, linear, None)])
    with pytest.raises(InputError, match="none of its aggregates can be fitted"):
        ProfileFit().fit([(levels[0].with_meta(aggregates={"ttft": {"std": 0.1}}), base(), None)])
    forest = resolve(load_profile("regression"), Facts(model="llama-3.2-1b", version="0.19.0", arguments=ARGUMENTS))
    from calibrate.learners import learner_for

    with pytest.raises(InputError, match="trees take iterations"):
        learner_for(forest).fit([(run[0][0], forest, None)])


def servecal(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "calibrate.cli.main", *arguments], cwd=folder, capture_output=True, text=True
    )


def test_the_commands_take_a_table_of_load_levels(levels, tmp_path):
    with (tmp_path / "levels.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["rate", "requests", "prompt_tokens", "output_tokens", "mean_ttft", "p99_ttft", "mean_tpot_ms"])
        for one in levels:
            said, recipe = one.meta["aggregates"], one.meta["workload"]
            statistics = said["ttft"]["mean"], said["ttft"]["p99"], 1e3 * said["tpot"]["mean"]
            table.writerow([recipe["rate"], recipe["requests"], 300, 60, *statistics])
    settings = [part for name, value in ARGUMENTS.items() for part in ("--set", f"engine.{name}={value}")]
    settings += ["--set", "engine.version=0.19.0", "--model", "llama-3.2-1b"]
    held_out = ("--holdout", "trace:levels#rate-5")
    fitted = servecal(tmp_path, "fit", "levels.csv", "--base", "roofline:l4", "-o", "f.yaml", *held_out, *settings)
    assert fitted.returncode == 0, fitted.stderr
    assert "mean error of the levels' means" in fitted.stdout
    rows = [line.split()[1:3] for line in fitted.stdout.splitlines() if line.startswith("levels#rate-5")]
    assert rows == [["in", "sample"], ["held", "out"]]
    profile = yaml.safe_load((tmp_path / "f.yaml").read_text())
    assert "front_end" not in profile["coefficients"]
    assert profile["front_end"]["per_request"] == pytest.approx(WAY, abs=0.01)
    report = servecal(tmp_path, "report", "levels.csv#rate-9", "--profile", "f.yaml", *settings)
    assert report.returncode == 0, report.stderr
    assert "Errors of the load level: mean TTFT" in report.stdout
    assert "MAPE" not in report.stdout
    several = servecal(tmp_path, "report", "levels.csv", "--profile", "f.yaml", *settings)
    assert several.returncode == 2
    assert "name one" in several.stderr
