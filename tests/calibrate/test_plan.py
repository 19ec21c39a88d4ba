"""``fit --plan``: what a run would tell, said before it is measured."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from synthetic import TRUTH, Noisy, deployment, run, with_seconds

from calibrate.fit import ProfileFit
from calibrate.plan import plan
from calibrate.recipes import Recipe, recipes
from calibrate.space import LINEAR_UNITS
from profiles.errors import InputError
from replay.run import replay
from replay.trace import Trace, requests_table


def measured(recipe, base, seed, noise=0.03):
    """What is recorded if the recipe is sent to an engine of known coefficients."""
    truth = with_seconds(base, TRUTH)
    accelerator = Noisy(truth.accelerator, np.random.default_rng(seed), noise)
    requests = recipe.sent(recipe.simulate(accelerator, base.config, lambda _: None))
    columns = {
        "id": [one.id for one in requests],
        "status": ["ok"] * len(requests),
        "arrival": [one.arrival for one in requests],
        "prompt_tokens": [one.prompt_tokens for one in requests],
        "output_tokens": [one.output_tokens for one in requests],
    }
    workload = Trace(
        requests_table(columns, len(requests)), {"name": f"run-{seed}", "warmed_up": True, "clock": {"kind": "run"}}
    )
    predicted = replay(workload, replace(truth, accelerator=accelerator), record_iterations=True).predicted
    return predicted.with_meta(name=workload.name)


def of_full_batches(trace, sequences):
    """Its iterations of that many sequences alone."""
    full = np.array([len(row) == sequences for row in trace.iterations["requests"].to_pylist()])
    return replace(trace, iterations=trace.iterations.filter(full))


def half_widths(fit):
    return {one.name: one.ci95[1] - one.value for one in fit.coefficients_}


@pytest.mark.parametrize("seed", range(3))
def test_the_run_that_is_proposed_keeps_its_promise(seed):
    """All batches hold 16 sequences: a step costs as much as its sequences, and nobody knows which."""
    base = deployment()
    first = of_full_batches(measured(Recipe(300, 60, 64, 16, spread=0.3), base, seed), 16)
    fit = ProfileFit().fit([(first, base, None)])
    assert {"step", "sequence"} & {one for pair in fit.correlated_ for one in pair[:2]}
    proposed = plan(fit, first, base).proposals[0]
    assert {"step", "sequence"} <= set(proposed.told)
    second = measured(proposed.recipe, base, 100 + seed)
    both = ProfileFit().fit([(first, base, None), (second, base, None)])
    reached = half_widths(both)
    for name in ("step", "sequence"):
        now, promised = proposed.half_widths[name]
        assert promised < 0.5 * now
        assert promised / 2 < reached[name] < 2 * promised, name
        truth = TRUTH[name] / LINEAR_UNITS[name]
        value = next(one.value for one in both.coefficients_ if one.name == name)
        assert value == pytest.approx(truth, abs=2 * reached[name])
    assert second.column("last_token").max() == pytest.approx(proposed.seconds, rel=0.3)


def test_runs_are_ranked_and_said_in_words():
    base = deployment()
    first = of_full_batches(measured(Recipe(300, 60, 64, 16, spread=0.3), base, 0), 16)
    fit = ProfileFit().fit([(first, base, None)])
    seen = []
    found = plan(fit, first, base, progress=seen.append)
    scores = [math.log(found.spread / one.spread) / (one.seconds + 60) for one in found.proposals]
    assert scores == sorted(scores, reverse=True)
    assert seen == list(range(1, len(seen) + 1))
    best = found.proposals[0]
    assert str(best.recipe) in found.sentence
    assert best.told[0] in found.sentence
    assert f"--num-prompts {best.recipe.requests} " in best.recipe.command("m")


def test_a_long_and_varied_run_needs_no_other():
    trace, iterations, base = run(count=600, rate=6.0, noise=0.0)
    fit = ProfileFit().fit([(replace(trace, iterations=iterations), base, None)])
    found = plan(fit, trace, base)
    assert found.spread < 1e-3
    for one in found.proposals:
        assert one.spread <= 0.9 * found.spread


def test_recorded_iterations_tell_no_less_than_clients():
    trace, iterations, base = run(count=60, noise=0.05)
    measured_run = replace(trace, iterations=iterations)
    fit = ProfileFit().fit([(measured_run, base, None)])
    by_engine, by_client = (
        {str(one.recipe): one for one in plan(fit, seen, base).proposals} for seen in (measured_run, trace)
    )
    same = by_engine.keys() & by_client.keys()
    assert same
    # Iterations without decodes (a first prompt) are seen by nobody outside; weights differ a little.
    assert all(by_engine[one].spread <= 1.02 * by_client[one].spread for one in same)
    assert any(by_engine[one].spread < 0.98 * by_client[one].spread for one in same)


def test_recipes_keep_within_the_engine():
    for changes in ({}, {"max_model_len": 200}, {"num_gpu_blocks": 40}, {"max_num_seqs": 1}):
        config = deployment(**changes).config
        room = min(config.max_model_len, (config.num_gpu_blocks - 1) * config.block_size)
        found = recipes(config, lambda _: 5.0)
        assert found
        for one in found:
            assert (one.concurrency or 1) <= config.max_num_seqs
            for request in one.workload():
                assert 1 < request.prompt_tokens + request.output_tokens <= room, (changes, one)


def test_a_limited_concurrency_is_sent_as_a_client_would():
    base = deployment()
    trace = measured(Recipe(100, 20, 30, 3, spread=0.5), base, 1, noise=0.0)
    assert max(len(row) for row in trace.iterations["requests"].to_pylist()) == 3
    arrival, last = np.sort(trace.column("arrival")), np.sort(trace.column("last_token"))
    assert np.all(arrival[:3] == 0)
    assert arrival[3:] == pytest.approx(last[:-3], abs=1e-6)


def test_commands_are_the_benchmarks_own():
    assert Recipe(32, 256, 40, 1).command("org/model") == (
        "vllm bench serve --model org/model --dataset-name random --random-input-len 32 --random-output-len 256 "
        "--num-prompts 40 --request-rate inf --max-concurrency 1 --ignore-eos --save-result --save-detailed"
    )
    ramp = Recipe(512, 128, 100, rate=1.0, last_rate=19.0, spread=0.9).command("my model")
    assert "--model 'my model'" in ramp
    assert "--random-range-ratio 0.9 --num-prompts 100 --ramp-up-strategy linear" in ramp
    assert "--ramp-up-start-rps 1 --ramp-up-end-rps 19" in ramp
    assert "--request-rate" not in ramp


def test_without_a_known_schedule_there_is_no_plan():
    trace, _, base = run(count=20)
    with pytest.raises(InputError, match="record iterations"):
        plan(ProfileFit(), trace, base)


def test_alike_prompts_and_batches_are_named():
    base = deployment(max_num_seqs=4)
    # A base profile that weighs more than any data: nothing counts as identified.
    alike, varied = (
        ProfileFit(strength=1e9).fit([(measured(one, base, 0), base, None)]).sentences_[-1]
        for one in (Recipe(2200, 12, 20, 4, spread=0.05), Recipe(200, 40, 60, rate=6.0, spread=0.9))
    )
    assert alike.startswith("not identified")
    assert "every prompt is 2,0" in alike
    assert "tokens: add short ones" in alike
    assert "every prompt" not in varied
    assert "--plan says which run would tell more" in varied
