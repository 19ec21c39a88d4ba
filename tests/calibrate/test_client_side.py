"""Fitting from what clients saw: token times, numbered into iterations, and the way to the engine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from calibrate.client_schedule import is_client_side, reconstruct_client_side
from calibrate.fit import LINEAR_UNITS, FittedCoefficient, ProfileFit, with_coefficients
from calibrate.front_end import Bounds, fit_front_end
from calibrate.holdout import hold_out, mean_errors, score
from calibrate.token_times import follow
from profiles.deployment import Facts, resolve
from profiles.errors import InputError
from profiles.profile import FrontEnd, load_profile
from replay.run import replay
from replay.trace import Trace, requests_table

TRUTH = {
    "step": 8e-3,
    "sequence": 2e-5,
    "token": 4e-5,
    "prefill_step": 2e-3,
    "prefill_attention": 1e-8,
    "decode_attention": 2e-7,
}
WAY = FrontEnd(per_request=0.012, per_prompt_token=10e-6)
ARGUMENTS = {
    "max_num_seqs": 32,
    "max_num_batched_tokens": 512,
    "max_model_len": 4096,
    "num_gpu_blocks": 4000,
    "block_size": 16,
}


def deployment(version="0.19.0", **changes):
    facts = Facts(model="llama-3.2-1b", version=version, arguments=ARGUMENTS | changes)
    return resolve(load_profile("linear"), facts)


def true_deployment(base, way=WAY):
    values = [
        FittedCoefficient(name, seconds / LINEAR_UNITS[name], (0.0, 0.0), 0.0, True) for name, seconds in TRUTH.items()
    ]
    return replace(with_coefficients(base, values), front_end=way)


def client_run(seed=1, count=150, rate=8.0, jitter=0.5e-3, version="0.19.0", stalls=(), way=WAY, **changes):
    """A run as its client saw it: every token late by its request's own lag and by jitter; stalls hold all back.

    Also return the iteration of every token, and the base deployment.
    """
    random = np.random.default_rng(seed)
    arrival = np.cumsum(random.exponential(1 / rate, count))
    columns = {
        "id": [f"r{place}" for place in range(count)],
        "status": ["ok"] * count,
        "arrival": arrival - arrival[0],
        "prompt_tokens": random.integers(20, 900, count),
        "output_tokens": random.integers(5, 120, count),
        "token_times": [[0.0]] * count,
    }
    meta = {"name": f"client-{seed}", "warmed_up": True, "clock": {"kind": "run"}, "vantage": "client"}
    base = deployment(version, **changes)
    workload = Trace(requests_table(columns, count), meta)
    predicted = replay(workload, true_deployment(base, way), record_iterations=True).predicted
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
    columns |= {
        "token_times": [one.tolist() for one in seen],
        "first_token": [one[0] for one in seen],
        "last_token": [one[-1] for one in seen],
    }
    return Trace(requests_table(columns, count), meta), numbers, base


def changed(trace, **columns):
    every = {name: trace.requests.column(name).combine_chunks() for name in trace.requests.column_names}
    return replace(trace, requests=requests_table(every | columns, len(trace)), _columns={})


def same_iterations(found, numbers):
    """Share of tokens that lie as many iterations after their request's first as they truly do, and how the requests
    lie against each other."""
    moved = np.concatenate([places - number for places, number in zip(found.places, numbers, strict=True)])
    # Idle iterations that only computed prompts show no token: the difference may step, but only there.
    steps = np.concatenate([np.diff(places) - np.diff(number) for places, number in zip(found.places, numbers)])
    return np.mean(steps == 0), moved


def test_iterations_are_numbered_by_following_each_requests_next_token():
    trace, numbers, _ = client_run()
    found = follow([np.array(one) for one in trace.lists("token_times")])
    share, moved = same_iterations(found, numbers)
    assert share > 0.999
    busy = np.concatenate([np.full(len(one), numbers[row][0]) for row, one in enumerate(numbers)])
    # Requests that decode at the same time agree on the numbering.
    for low in range(0, int(busy.max()), 200):
        near = moved[(busy >= low) & (busy < low + 20)]
        assert near.size == 0 or np.mean(near == np.median(near)) > 0.9


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
        assert values[name] == pytest.approx(TRUTH[name], rel=0.05)
    way = fit.front_end_
    assert way.per_request == pytest.approx(WAY.per_request, abs=0.003)
    assert way.per_prompt_token == pytest.approx(WAY.per_prompt_token, abs=5e-6)
    assert way.per_request_ci95[0] <= WAY.per_request + 0.001 <= way.per_request_ci95[1] + 0.001
    assert way.per_prompt_token_ci95[0] <= WAY.per_prompt_token <= way.per_prompt_token_ci95[1]
    errors = mean_errors(score([(trace, base)], fit, [np.ones(len(trace), dtype=bool)]))
    assert errors["ttft"]["mape"] < 0.07
    assert errors["tpot"]["mape"] < 0.01
    assert errors["e2e"]["mape"] < 0.01
