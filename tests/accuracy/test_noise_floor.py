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
QUIET = {"ttft": 0.16, "tpot": 0.10, "e2e": 0.11}
"""Distance of two runs of one workload when that machine did little else (README)."""


def capture(name):
    return read_trace(locate(name).path)


def apart(measured, other):
    """Mean absolute relative difference per request, by metric."""
    return {metric: np.nanmean(np.abs(other.latency(metric) / measured.latency(metric) - 1)) for metric in METRICS}


def block_hashes(trace):
    return trace.lists("block_hashes")


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
        # Hashes start anew where the prefix cache was emptied; who shares a prefix with the first stays.
        sharing = [[one[0] == hashes[0][0] for one in hashes] for hashes in map(block_hashes, (first, other))]
        assert sharing[0] == sharing[1]
        assert 10 < sum(sharing[0]) < len(first)


@pytest.mark.parametrize("name", ["vllm-cpu-shared-prefix", "vllm-cpu-served"])
def test_a_profile_of_one_capture_predicts_others_within_twice_the_noise(name, floor):
    trace = capture(name)
    predicted = replay(trace, resolve(load_profile(PROFILE), facts_of(trace))).predicted
    errors = apart(trace, predicted)
    for metric in METRICS:
        assert errors[metric] < 2 * floor[metric], (metric, errors, floor)
        assert errors[metric] < QUIET[metric], (metric, errors)
