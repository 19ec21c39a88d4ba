"""What a real engine repeats of itself, and what a profile fitted to one of its runs predicts of others."""

from itertools import permutations

import numpy as np
import pytest

from profiles.deployment import resolve
from profiles.profile import load_profile
from reference_traces.library import locate
from replay.readers import read_trace
from replay.run import facts_of, replay

METRICS = ("ttft", "tpot", "e2e")
PROFILE = "vllm-cpu-llama-8x512"
"""Fitted to the recorded iterations of vllm-cpu-shared-prefix-2."""


def capture(name):
    return read_trace(locate(name).path)


def apart(measured, other):
    """Mean absolute relative difference per request, by metric."""
    return {metric: np.nanmean(np.abs(other.latency(metric) / measured.latency(metric) - 1)) for metric in METRICS}


@pytest.fixture(scope="module")
def repeats():
    return [capture(f"vllm-cpu-repeat-{number}") for number in range(1, 6)]


@pytest.fixture(scope="module")
def floor(repeats):
    """Mean distance of two runs of one workload on one engine, by metric."""
    pairs = [apart(*two) for two in permutations(repeats, 2)]
    return {metric: float(np.mean([one[metric] for one in pairs])) for metric in METRICS}


def test_repeats_are_one_workload(repeats):
    first = repeats[0]
    for other in repeats[1:]:
        assert other.ids == first.ids
        for name in ("prompt_tokens", "output_tokens"):
            np.testing.assert_array_equal(other.column(name), first.column(name))
        np.testing.assert_allclose(other.column("nominal_arrival"), first.column("nominal_arrival"), atol=0.05)
        # Hashes start anew where the prefix cache was emptied; who shares a prefix with whom stays.
        shared = [
            [one[:1] == two[:1] for two in trace.lists("block_hashes")]
            for trace in (first, other)
            for one in trace.lists("block_hashes")[:1]
        ]
        assert shared[0] == shared[1]


@pytest.mark.parametrize("name", ["vllm-cpu-shared-prefix", "vllm-cpu-served"])
def test_a_profile_of_one_capture_predicts_others_within_twice_the_noise(name, floor):
    trace = capture(name)
    predicted = replay(trace, resolve(load_profile(PROFILE), facts_of(trace))).predicted
    errors = apart(trace, predicted)
    for metric in METRICS:
        assert errors[metric] < 2 * floor[metric], (metric, errors, floor)
        assert errors[metric] < 0.15
