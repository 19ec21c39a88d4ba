"""Fitting from what clients saw: token times, numbered into iterations, and the way to the engine."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import yaml
from synthetic import ARGUMENTS, TRUTH, changed, deployment, with_seconds, workload

from calibrate.cli.options import arrivals_of
from calibrate.client_schedule import is_client_side
from calibrate.fit import ProfileFit
from calibrate.front_end import Bounds, fit_front_end
from calibrate.holdout import hold_out, mean_errors, score
from calibrate.space import LINEAR_UNITS
from calibrate.token_times import follow
from profiles.errors import InputError
from profiles.profile import FrontEnd
from replay.run import replay
from replay.trace import Trace, requests_table

SECONDS = TRUTH | {"step": 8e-3}
WAY = FrontEnd(per_request=0.012, per_prompt_token=10e-6)


def served(base, way=WAY):
    """The engine behind what clients see."""
    return replace(with_seconds(base, SECONDS), front_end=way)


def client_run(seed=1, count=150, rate=8.0, jitter=0.5e-3, version="0.19.0", stalls=(), way=WAY, **changes):
    """A run as its client saw it: every token late by its request's own lag and by jitter; stalls hold all back.

    Also return the iteration of every token, and the base deployment.
    """
    random = np.random.default_rng(seed)
    sent = workload(
        random,
        count,
        rate,
        columns=lambda _: {"token_times": [[0.0]] * count},
        name=f"client-{seed}",
        vantage="client",
    )
    base = deployment(version, max_num_seqs=32, **changes)
    predicted = replay(sent, served(base, way), record_iterations=True).predicted
    produced = [np.array(one) for one in predicted.lists("token_times")]
    table = predicted.iterations
    ends = np.round((table["start"].to_numpy() + table["duration"].to_numpy()) * 1e9).astype(int)
    numbers = [np.searchsorted(ends, np.round(one * 1e9).astype(int)) for one in produced]
    seen = []
    for times in produced:
        late = times + abs(random.normal(0, jitter)) + np.abs(random.normal(0, jitter, times.size))
        for begin, length in stalls:
            late = np.where((late > begin) & (late < begin + length), begin + length, late)
        seen.append(np.maximum.accumulate(late))
    times = {
        "token_times": [one.tolist() for one in seen],
        "first_token": [one[0] for one in seen],
        "last_token": [one[-1] for one in seen],
    }
    return changed(sent, **times), numbers, base


def same_iterations(found, numbers):
    """Share of tokens that follow their request's last one by as many iterations as they truly do, and by how many
    iterations each token is numbered apart from the truth."""
    pairs = list(zip(found.places, numbers, strict=True))
    moved = np.concatenate([places - number for places, number in pairs])
    steps = np.concatenate([np.diff(places) - np.diff(number) for places, number in pairs])
    return np.mean(steps == 0), moved


def test_iterations_are_numbered_by_following_each_requests_next_token():
    trace, numbers, _ = client_run()
    found = follow([np.array(one) for one in trace.lists("token_times")])
    share, moved = same_iterations(found, numbers)
    assert share > 0.999
    # Tokens of one iteration are numbered alike, whichever request they belong to.
    truly = np.concatenate(numbers)
    groups = [moved[truly == one] for one in np.unique(truly)]
    alike = [np.count_nonzero(group == np.median(group)) for group in groups if group.size > 1]
    assert sum(alike) > 0.98 * sum(group.size for group in groups if group.size > 1)


@pytest.mark.parametrize("length", [0.06, 0.25])
def test_a_stalled_client_does_not_change_the_numbering(length):
    stalls = [(float(begin), length) for begin in np.arange(1.0, 20.0, 1.3)]
    trace, numbers, _ = client_run(stalls=stalls)
    share, _ = same_iterations(follow([np.array(one) for one in trace.lists("token_times")]), numbers)
    assert share > 0.98


def test_a_token_that_never_came_alone_moves_only_its_request():
    trace, numbers, _ = client_run()
    times = [np.array(one) for one in trace.lists("token_times")]
    times[40], numbers[40] = np.delete(times[40], 25), np.delete(numbers[40], 25)
    found = follow(times)
    late = np.median(found.places[40][30:] - numbers[40][30:]) - np.median(found.places[40][:20] - numbers[40][:20])
    assert late == 0
    assert same_iterations(found, numbers)[0] > 0.998


@pytest.mark.parametrize(("version", "asynchronous"), [("0.19.0", True), ("0.19.0", False), ("0.6.3", False)])
def test_known_coefficients_and_the_way_are_found_from_token_times(version, asynchronous):
    trace, _, base = client_run(count=250, version=version, async_scheduling=asynchronous)
    assert is_client_side(trace)
    fit = ProfileFit().fit([(trace, base, None)])
    values = {one.name: one.value * LINEAR_UNITS[one.name] for one in fit.coefficients_}
    for name in ("step", "token", "decode_attention"):
        assert values[name] == pytest.approx(SECONDS[name], rel=0.05)
    way = fit.front_end_
    assert way.per_request == pytest.approx(WAY.per_request, abs=0.003)
    assert way.per_prompt_token == pytest.approx(WAY.per_prompt_token, abs=5e-6)
    assert way.per_request_ci95[0] <= WAY.per_request + 0.001 <= way.per_request_ci95[1] + 0.001
    assert way.per_prompt_token_ci95[0] <= WAY.per_prompt_token <= way.per_prompt_token_ci95[1]
    errors = mean_errors(score([(trace, base)], fit, [np.ones(len(trace), dtype=bool)]))
    assert errors["ttft"]["mape"] < 0.07
    assert errors["tpot"]["mape"] < 0.01
    assert errors["e2e"]["mape"] < 0.01


def test_the_late_half_is_predicted_from_the_early_one():
    trace, _, base = client_run(count=200)
    [(fit, comparisons)] = hold_out([(trace, base)], "time:0.5", None)
    assert fit.front_end_ is not None
    assert comparisons[0].coverage["excluded"]["training"] == 100
    errors = mean_errors(comparisons)
    assert errors["ttft"]["mape"] < 0.1
    assert errors["e2e"]["mape"] < 0.02


def test_held_out_token_times_take_no_part_in_the_fit():
    trace, _, base = client_run(count=80)
    known = np.arange(80) < 40
    times = trace.lists("token_times")
    spoilt = [one if use else [time + 7.0 for time in one] for one, use in zip(times, known, strict=True)]
    fits = [ProfileFit().fit([(one, base, known)]) for one in (trace, changed(trace, token_times=spoilt))]
    assert fits[0].coefficients_ == fits[1].coefficients_
    assert fits[0].front_end_ == fits[1].front_end_


def test_intervals_of_the_front_end_cover_the_truth():
    inside = 0
    for seed in range(20):
        random = np.random.default_rng(seed)
        prompts = random.integers(20, 4000, 120).astype(float)
        way = 0.03 + 5e-6 * prompts + random.normal(0, 1e-3, prompts.size)
        step = random.uniform(0.01, 0.03, prompts.size)
        before = random.uniform(0, 1, prompts.size) * step
        least = np.where(random.uniform(size=prompts.size) < 0.3, -np.inf, way - before)
        found = fit_front_end(Bounds(least, way - before + step, prompts, 5e-4))
        inside += found.per_request_ci95[0] <= 0.03 <= found.per_request_ci95[1]
        inside += found.per_prompt_token_ci95[0] <= 5e-6 <= found.per_prompt_token_ci95[1]
    # 40 intervals of 95 %: fewer than 33 covered is less likely than 1 in 1,000.
    assert inside >= 33


def test_a_queue_hides_the_way_to_the_engine_and_the_fit_says_so():
    trace, _, base = client_run(count=60, rate=2000.0, way=FrontEnd(per_request=0.012))
    fit = ProfileFit().fit([(trace, base, None)])
    assert fit.front_end_ is None
    assert any("nearly every request queued" in line for line in fit.sentences_)


def test_requests_that_come_before_they_are_sent_are_named():
    trace, _, base = client_run(way=FrontEnd(), jitter=1e-5)
    late = changed(trace, arrival=trace.column("arrival") + 0.008)
    fit = ProfileFit().fit([(late, base, None)])
    assert any("before they were sent" in line for line in fit.sentences_)
    with pytest.raises(InputError, match="not of one clock"):
        ProfileFit().fit([(changed(trace, arrival=trace.column("arrival") + 5.0), base, None)])


def test_a_client_that_cannot_tell_iterations_apart_is_refused():
    trace, _, base = client_run(jitter=40e-3)
    with pytest.raises(InputError, match="too slow to tell iterations apart"):
        ProfileFit().fit([(trace, base, None)])


def test_a_saturated_client_is_warned_of():
    stalls = [(float(begin), 0.05) for begin in np.arange(0.5, 30.0, 0.15)]
    trace, _, base = client_run(stalls=stalls)
    fit = ProfileFit().fit([(trace, base, None)])
    assert any("saturated" in line for line in fit.warnings_)


@pytest.mark.parametrize("rate", [3.0, 12.0])
def test_without_single_tokens_latencies_are_fitted_with_a_constant_front_end(rate):
    trace, _, base = client_run(way=FrontEnd(per_request=0.03), rate=rate, count=120)
    blunt = changed(trace, token_times=[None] * len(trace))
    fit = ProfileFit().fit([(blunt, base, None)])
    assert any("no times of single tokens" in line for line in fit.warnings_)
    assert fit.simulations_ > 0
    assert "front_end" not in {one.name for one in fit.coefficients_}
    way = fit.front_end_
    assert way.from_latencies
    assert way.per_request_ci95[0] < way.per_request < way.per_request_ci95[1]
    assert way.per_request == pytest.approx(0.03, abs=0.008)
    unseen, _, _ = client_run(seed=9, way=FrontEnd(per_request=0.03), rate=8.0, count=120)
    found = mean_errors(score([(unseen, base)], fit, [np.ones(len(unseen), dtype=bool)]))
    assert found["e2e"]["mape"] < 0.02
    assert found["tpot"]["mape"] < 0.02


def test_too_few_requests_with_token_times_are_refused_with_the_reason():
    trace, _, base = client_run(count=30)
    one = [times if row == 0 else None for row, times in enumerate(trace.lists("token_times"))]
    with pytest.raises(InputError, match="too few"):
        ProfileFit().fit([(changed(trace, token_times=one), base, None)])


def test_a_run_in_which_every_request_failed_is_refused():
    trace, _, base = client_run(count=10)
    with pytest.raises(InputError, match="all failed"):
        ProfileFit().fit([(changed(trace, status=["failed"] * 10), base, None)])


def test_the_front_end_delays_requests_of_client_side_traces_only():
    trace, _, base = client_run(count=5, rate=0.1)
    slow = replace(base, front_end=FrontEnd(per_request=0.5, per_prompt_token=1e-3))
    plain, delayed = (replay(trace, one).predicted.latency("ttft") for one in (base, slow))
    assert delayed - plain == pytest.approx(0.5 + 1e-3 * trace.column("prompt_tokens"))
    engine = trace.with_meta(vantage="engine")
    assert (replay(engine, slow).predicted.latency("ttft") == replay(engine, base).predicted.latency("ttft")).all()


def test_old_engines_hand_tokens_on_when_the_next_step_is_launched():
    columns = {
        "id": ["first", "second"],
        "status": ["ok", "ok"],
        "arrival": [0.0, 0.001],
        "prompt_tokens": [100, 100],
        "output_tokens": [3, 2],
        "token_times": [[0.0]] * 2,
    }
    trace = Trace(requests_table(columns, 2), {"name": "two", "warmed_up": True, "clock": {"kind": "run"}})
    truth = [served(deployment(version, async_scheduling=False)) for version in ("0.6.3", "0.8.0", "0.5.0")]
    old, new, oldest = (replay(trace, one, record_iterations=True).predicted for one in truth)
    times, ends = old.lists("token_times"), np.cumsum(old.iterations["duration"].to_numpy())
    # The second prompt's step hands on the first's first token; a step of decodes is launched at once.
    assert times[0] == pytest.approx([ends[1], ends[1], ends[2]])
    assert times[1] == pytest.approx([ends[1], ends[2]])
    assert old.column("first_token") == pytest.approx([one[0] for one in times])
    assert new.lists("token_times")[0] == pytest.approx([ends[0], ends[1], ends[2]])
    assert oldest.lists("token_times") == new.lists("token_times")


def serve_result(trace):
    """The trace as ``vllm bench serve --save-detailed`` writes it."""
    arrival = trace.column("arrival")
    times = [np.array(one) for one in trace.lists("token_times")]
    return {
        "request_throughput": 1.0,
        "model_id": "meta-llama/Llama-3.2-1B",
        "vllm_version": "0.19.0",
        "backend": "openai",
        "input_lens": trace.column("prompt_tokens").astype(int).tolist(),
        "output_lens": [one.size for one in times],
        "ttfts": [float(one[0] - sent) for one, sent in zip(times, arrival, strict=True)],
        "itls": [np.diff(one).tolist() for one in times],
        "start_times": (100.0 + arrival).tolist(),
        "errors": [""] * len(trace),
        "generated_texts": [""] * len(trace),
    }


def servecal(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "calibrate.cli.main", *arguments], cwd=folder, capture_output=True, text=True
    )


def test_the_command_fits_a_clients_file_and_reports_use_its_front_end(tmp_path):
    trace, _, _ = client_run(count=150)
    (tmp_path / "run.json").write_text(json.dumps(serve_result(trace)))
    settings = [
        part
        for name, value in (ARGUMENTS | {"max_num_seqs": 32}).items()
        for part in ("--set", f"engine.{name}={value}")
    ]
    fitted = servecal(tmp_path, "fit", "run.json", "--base", "linear", "-o", "fit.yaml", *settings)
    assert fitted.returncode == 0, fitted.stderr
    assert "front end: 1" in fitted.stdout
    assert "only the sum of both ways" in fitted.stdout
    way = yaml.safe_load((tmp_path / "fit.yaml").read_text())["front_end"]
    assert way["per_request"] == pytest.approx(WAY.per_request, abs=0.003)
    report = servecal(tmp_path, "report", "run.json", "--profile", "fit.yaml", "--format", "json", *settings)
    assert report.returncode == 0, report.stderr
    assert json.loads(report.stdout)["metrics"]["ttft"]["mape"] < 0.07


def test_arrivals_are_chosen_for_all_traces_or_for_one():
    names = ("a.json", "b/c.json")
    assert arrivals_of(names, ()) == ["measured", "measured"]
    assert arrivals_of(names, ("catalogue",)) == ["catalogue", "catalogue"]
    draw = "poisson:rate=16,seed=0"
    assert arrivals_of(names, (draw, "b/c.json=nominal")) == [draw, "nominal"]
    assert arrivals_of(names, (f"a.json={draw}",)) == [draw, "measured"]
    with pytest.raises(InputError, match="NAME=SCHEME"):
        arrivals_of(names, ("c.json=nominal",))
