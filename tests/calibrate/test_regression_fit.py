"""Fitting boosted trees on top of a linear model, and ranking bases on the same held-out requests."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import synthetic
import yaml
from hypothesis import given
from hypothesis import strategies as st
from synthetic import Noisy, workload

from calibrate.fit import ProfileFit
from calibrate.holdout import hold_out, mean_errors, parts, score
from calibrate.learners import learner_for
from calibrate.model_comparison import rank
from calibrate.regression import RegressionFit
from profiles.deployment import resolve
from profiles.errors import InputError
from profiles.profile import Accelerator, Profile, load_profile
from replay.run import facts_of, replay
from replay.trace import requests_table
from simulator.accelerators.base import HostOverhead, WithHost
from simulator.accelerators.linear import Linear
from simulator.accelerators.regression import Regression
from simulator.batch import Batch

ARGUMENTS = synthetic.ARGUMENTS | {"max_num_seqs": 24, "async_scheduling": True}
LINEAR = {"step": 4e-3, "sequence": 2e-5, "token": 4e-5, "prefill_step": 2e-3, "decode_attention": 2e-7}


class Knee:
    """Up to 200 tokens a step costs the same, and one of more than 8 sequences twice that: no linear model."""

    components = ("all",)

    def step(self, batch):
        return (max(6e-3, 3e-5 * batch.num_tokens) + 6e-3 * (batch.num_seqs > 8) + 2e-7 * batch.decode_context,)


def run(device=None, seed=1, count=140, rate=12.0, noise=0.0, base="regression"):
    """A trace that the simulator made, with its recorded iterations, and the deployment of a base."""
    random = np.random.default_rng(seed)
    engine = {"version": "0.19.0", "arguments": ARGUMENTS}
    sent = workload(random, count, rate, name=f"synthetic-{seed}", model="llama-3.2-1b", engine=engine)
    deployment = resolve(load_profile(base), facts_of(sent))
    truth = WithHost(device or Knee(), HostOverhead(0.0))

    accelerator = Noisy(truth, random, noise)
    predicted = replay(sent, replace(deployment, accelerator=accelerator), record_iterations=True).predicted
    measured = replace(predicted, _columns={}).with_meta(**sent.meta)
    return measured, deployment


def seconds(deployment, batch):
    return sum(deployment.accelerator.step(batch))


@pytest.fixture(scope="module")
def knee():
    """Recorded iterations of a device with a knee, 3 % of noise, and the regression that was fitted to them."""
    trace, deployment = run(noise=0.03)
    return trace, deployment, RegressionFit().fit([(trace, deployment, None)])


def test_a_shape_that_no_linear_model_has_is_learned(knee):
    trace, deployment, fit = knee
    learned = fit.deployment(deployment)
    linear = ProfileFit().fit([(trace, resolve(load_profile("linear"), facts_of(trace)), None)])
    alone = linear.deployment(resolve(load_profile("linear"), facts_of(trace)))
    off = {"trees": [], "linear": []}
    for [batch], _ in fit.spans_:
        [truth] = Knee().step(batch)
        off["trees"].append(abs(seconds(learned, batch) / truth - 1))
        off["linear"].append(abs(seconds(alone, batch) / truth - 1))
    assert fit.num_trees_ > 0
    assert np.mean(off["trees"]) < 0.4 * np.mean(off["linear"])
    assert fit.cross_validation_["trees"] < fit.cross_validation_["linear"]
    assert fit.num_coefficients_ > len(fit.coefficients_) + fit.num_trees_
    # Past every batch that was seen, the linear model's slopes go on.
    large, larger = (seconds(learned, Batch([], [3000] * count)) for count in (600, 700))
    rates = fit.rates_
    expected = 100 * (rates["sequence"] + rates["token"] + 3000 * rates["decode_attention"])
    assert larger - large == pytest.approx(expected)


def test_compiled_trees_predict_what_those_of_scikit_learn_do(knee):
    from calibrate.regression import _compiled, _grown, _Spans

    rows = _Spans.of(knee[2].spans_)
    rates = np.array([knee[2].rates_.get(name, 0.0) for name in Linear.components])
    ensemble = _grown(rows, rates, 0.75, 40)
    trees = _compiled(ensemble)
    own = [trees.predict(row[1:]) for row in rows.features.tolist()]
    theirs = ensemble.staged(rows)[-1] - 0.75 * rows.linear(rates)
    assert own == pytest.approx(theirs.tolist(), rel=1e-9, abs=1e-12)


@given(data=st.data())
def test_fitted_trees_do_not_fall_along_any_feature(knee, data):
    trees = knee[2].correction_.trees
    limits = (40.0, 1200.0, 1.5, 1e6, 6e4, 1200.0, 2e3)
    features = [data.draw(st.floats(0, limit)) for limit in limits]
    place = data.draw(st.integers(0, len(limits) - 1))
    more = list(features)
    more[place] += data.draw(st.floats(0, limits[place]))
    assert trees.predict(more) >= trees.predict(features) - 1e-12


def test_a_linear_truth_needs_no_trees():
    trace, deployment = run(Linear(LINEAR), count=60, noise=0.05)
    fit = RegressionFit().fit([(trace, deployment, None)])
    assert (fit.num_trees_, fit.correction_) == (0, None)
    assert any("no trees" in line for line in fit.sentences_)
    assert fit.rates_["decode_attention"] == pytest.approx(2e-7, rel=0.1)
    profile, files = fit.written(Profile(name="x", accelerator=Accelerator(kind="regression")), "x")
    assert not files
    assert "correction" not in profile.accelerator.options


def test_a_profile_written_and_loaded_predicts_the_same(knee, tmp_path):
    trace, deployment, fit = knee
    profile, files = fit.written(deployment.loaded.profile, "mine")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "mine.yaml").write_text(profile.to_yaml())
    loaded = resolve(load_profile(str(tmp_path / "mine.yaml")), facts_of(trace))
    fitted = fit.deployment(deployment)
    assert isinstance(loaded.accelerator.device, Regression)
    for batches, _ in fit.spans_:
        for batch in batches:
            assert tuple(loaded.accelerator.step(batch)) == tuple(fitted.accelerator.step(batch))


def test_the_same_runs_give_the_same_trees(knee):
    trace, deployment, fit = knee
    again = RegressionFit().fit([(trace, deployment, None)])
    assert again.correction_ == fit.correction_


def test_spans_of_several_iterations_are_shared_among_them():
    trace, deployment = run()
    fit = RegressionFit().fit([(replace(trace, iterations=None, _columns={}), deployment, None)])
    assert max(len(batches) for batches, _ in fit.spans_) > 3
    assert fit.num_trees_ > 0
    errors = mean_errors(score([(trace, deployment)], fit, [np.ones(len(trace), dtype=bool)]))
    linear = learner_for(resolve(load_profile("linear"), facts_of(trace)))
    base = resolve(load_profile("linear"), facts_of(trace))
    linear.fit([(replace(trace, iterations=None, _columns={}), base, None)])
    without = mean_errors(score([(trace, base)], linear, [np.ones(len(trace), dtype=bool)]))
    assert errors["tpot"]["mape"] < 0.4 * without["tpot"]["mape"]


def test_held_out_requests_take_no_part_in_the_trees():
    trace, deployment = run(count=100)
    [part] = parts("time:0.5", [trace])
    known = part.fitted[0]
    spoilt = {name: trace.requests.column(name).combine_chunks() for name in trace.requests.column_names}
    for name in ("queued", "scheduled", "first_token", "last_token"):
        spoilt[name] = np.where(known, trace.column(name), trace.column(name) + 7.0)
    other = replace(trace, requests=requests_table(spoilt, len(trace)), iterations=None, _columns={})
    fits = [RegressionFit().fit([(one, deployment, known)]) for one in (trace, other)]
    assert fits[0].correction_ == fits[1].correction_
    assert fits[0].rates_ == fits[1].rates_


def test_a_base_that_is_no_regression_is_refused():
    trace, deployment = run(count=20, base="linear")
    with pytest.raises(InputError, match="no regression profile"):
        RegressionFit().fit([(trace, deployment, None)])
    assert type(learner_for(deployment)) is ProfileFit


def test_bases_are_ranked_by_what_they_predict_of_the_same_requests():
    trace, _ = run(count=100, rate=20.0, noise=0.02)
    ranking = rank([trace], ["linear", "roofline:h100-sxm", "regression"], "time:0.5")
    names = [one.base.origin for one in ranking.candidates]
    assert set(names) == {"linear", "roofline:h100-sxm", "regression"}
    assert names.index("regression") < names.index("linear")
    first, *others = ranking.candidates
    assert (first.behind, first.behind_ci95, first.tied) == (0.0, (0.0, 0.0), True)
    for one in ranking.candidates:
        assert {metric["n"] for metric in one.held_out.values()} == {50}
        assert {metric["n"] for metric in one.fitted_part.values()} == {50}
        assert one.criterion == pytest.approx(np.mean([metric["mape"] for metric in one.held_out.values()]))
        assert one.criterion_ci95[0] <= one.criterion <= one.criterion_ci95[1]
        assert one.behind == pytest.approx(one.criterion - first.criterion)
    assert [one.tied for one in ranking.candidates] == [one.behind_ci95[0] <= 0 for one in ranking.candidates]
    # The same figures as a fit of that base alone.
    alone = resolve(load_profile("linear"), facts_of(trace))
    [(_, comparisons)] = hold_out([(trace, alone)], "time:0.5", None)
    assert mean_errors(comparisons) == next(one for one in others if one.base.origin == "linear").held_out


def test_a_link_that_the_trace_states_is_no_engine_argument():
    trace, _ = run(count=60)
    arguments = ARGUMENTS | {"tensor_parallel_size": 2}
    link = {"bandwidth": 16e9, "latency": 20e-6, "source": "cluster_config.json"}
    trace = trace.with_meta(engine={"version": "0.19.0", "arguments": arguments}, link=link)
    ranking = rank([trace], ["roofline:h100-sxm", "linear"], "time:0.5")
    assert not ranking.failed
    assert len(ranking.candidates) == 2
    found = resolve(load_profile("roofline:h100-sxm"), facts_of(trace))
    assert found.hardware.interconnect.bandwidth == 16e9
    assert "link" not in found.assumed
    assert any("16 GB/s and 20 us (cluster_config.json); the trace's is used" in line for line in found.conflicts)


def test_a_base_that_the_run_contradicts_is_not_ranked():
    trace, _ = run(count=60)
    ranking = rank([trace], ["linear", "roofline:l4"], "time:0.5")
    assert [one.base.origin for one in ranking.candidates] == ["linear"]
    assert "faster than the weights can be read" in ranking.failed["roofline:l4"]


def test_all_bases_run_the_same_engine():
    trace, _ = run(count=60)
    arguments = {name: value for name, value in ARGUMENTS.items() if name != "num_gpu_blocks"}
    trace = trace.with_meta(engine={"version": "0.19.0", "arguments": arguments})
    with pytest.raises(InputError, match="num_gpu_blocks"):
        resolve(load_profile("linear"), facts_of(trace))
    ranking = rank([trace], ["linear", "roofline:h100-sxm"], "time:0.5")
    blocks = resolve(load_profile("roofline:h100-sxm"), facts_of(trace)).config.num_gpu_blocks
    assert ranking.assumed["synthetic-1"]["num_gpu_blocks"] == blocks
    assert not ranking.failed
    assert len(ranking.candidates) == 2


def test_a_base_that_cannot_be_fitted_is_named_with_the_reason(tmp_path):
    trace, _ = run(count=60)
    ranking = rank([trace], ["roofline:nothing", "linear"], "time:0.5")
    assert [one.base.origin for one in ranking.candidates] == ["linear"]
    assert "nothing" in ranking.failed["roofline:nothing"]
    with pytest.raises(InputError, match=r"none can be fitted: roofline:nothing: .*; no\.yaml: "):
        rank([trace], ["roofline:nothing", "no.yaml"], "time:0.5")
    with pytest.raises(InputError, match="twice"):
        rank([trace], ["linear", "linear"], "time:0.5")


def test_every_fold_and_every_run_counts():
    first, _ = run(Linear(LINEAR), seed=1, count=50)
    second, _ = run(Linear(LINEAR), seed=2, count=50)
    [one] = rank([first, second], ["linear"], "kfold-time:2").candidates
    assert {metric["n"] for metric in one.held_out.values()} == {100}
    [other] = rank([first, second], ["linear"], "trace:synthetic-2").candidates
    assert {metric["n"] for metric in other.held_out.values()} == {50}
    assert {metric["n"] for metric in other.fitted_part.values()} == {50}


def test_the_command_fits_a_regression_and_reports_use_it(servecal, tmp_path):
    fitted = servecal("fit", "vllm-cpu-shared-prefix-2", "--base", "regression", "-o", "cpu.yaml", "--format", "json")
    assert fitted.code == 0, fitted.err
    profile = yaml.safe_load((tmp_path / "cpu.yaml").read_text())
    assert profile["accelerator"]["kind"] == "regression"
    assert profile["accelerator"]["correction"]["trees"] == "cpu.trees.parquet"
    assert profile["domain"]
    assert [one["name"] for one in profile["provenance"]["traces"]] == ["vllm-cpu-shared-prefix-2"]
    report = servecal("report", "vllm-cpu-shared-prefix", "--profile", "cpu.yaml", "--format", "json")
    assert report.code == 0, report.err
    # Another run of the same engine; two real runs of it differ by 11 %.
    assert report.json["metrics"]["e2e"]["mape"] < 0.11
    assert report.json["simulation"]["component_seconds"]["learned"] > 0
    (tmp_path / "cpu.trees.parquet").write_bytes(b"something else")
    servecal("report", "vllm-cpu-shared-prefix", "--profile", "cpu.yaml").refused("cpu.trees.parquet", "sha256")


def test_the_command_ranks_bases(servecal, tmp_path):
    command = ("fit", "vllm-cpu-shared-prefix-2", "--compare", "linear", "--compare", "regression")
    ranked = servecal(*command, "--compare", "roofline:l4", "--format", "json")
    assert ranked.code == 0, ranked.err
    document = ranked.json
    assert document["schema"] == "servecal.fit-compare/1"
    assert document["holdout"] == "time:0.5"
    names = {one["base"] for one in document["ranking"]} | {one["base"] for one in document["failed"]}
    assert names == {"linear", "regression", "roofline:l4"}
    criteria = [one["criterion"] for one in document["ranking"]]
    assert criteria == sorted(criteria)
    assert len(document["sentences"]) == len(document["ranking"]) - 1
    text = servecal("fit", "vllm-cpu-shared-prefix-2", "--compare", "linear", "--compare", "no.yaml")
    assert text.code == 0, text.err
    for word in ("linear", "no.yaml: ", "TTFT", "ranked by the mean of the held-out MAPEs"):
        assert word in text.out
    assert not list(tmp_path.glob("*.yaml"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--compare", "linear", "--base", "linear"), "leave out --base and -o"),
        (("--compare", "linear", "-o", "x.yaml"), "leave out --base and -o"),
        (("--base", "linear"), "Missing option '--base' or '-o'"),
        (("-o", "x.yaml"), "Missing option '--base' or '-o'"),
    ],
)
def test_ranking_and_fitting_are_told_apart(called, arguments, message):
    finished = called("fit", "vllm-cpu-shared-prefix-2", *arguments)
    assert (finished.code, finished.out) == (2, "")
    assert message in finished.err


def test_wrong_input_to_a_ranking_is_explained(called):
    called("fit", "vllm-cpu-shared-prefix-2", "--compare", "linear", "--holdout", "half").refused("--holdout", "half")
    called("fit", "vllm-cpu-shared-prefix-2", "--compare", "no.yaml").refused("none can be fitted", "no.yaml")


def test_only_fitting_a_regression_imports_scikit_learn():
    script = (
        "import sys, calibrate.cli.fit_command, calibrate.cli.fit_compare, calibrate.cli.report_command\n"
        "sys.exit('sklearn' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0
