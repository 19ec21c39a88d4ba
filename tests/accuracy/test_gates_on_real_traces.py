"""Gates on a real run: noise as it was measured must not fail them, an engine that is 10 % slower must.

Nobody published two runs of one workload on this GPU, so repeats are drawn. A run is a replay with the profile that was
fitted to the measured one; its noise is what separates measured from predicted TTFTs and decode times, request by
request, drawn anew in blocks of neighbours: those that wait in one queue err together. The slower engine is the same
replay with every coefficient 10 % up, and the same noise.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from calibrate.errors import compare
from calibrate.estimates import Compared
from calibrate.gate_settings import parse_gate
from calibrate.gates import Rules, judge
from calibrate.run_pairs import pair
from profiles.deployment import resolve
from profiles.profile import LoadedProfile, Profile, load_profile
from replay.readers import read_trace
from replay.run import facts_of, replay
from replay.trace import Trace, requests_table

NAME, PROFILE = "rtxpro6000-llama-3.1-8b", "rtx-pro-6000-llama-3.1-8b"
DRAWS = 100
LIMITS = ("e2e.mean:5%", "tpot.mean:5%", "ttft.mape:10%")


@dataclass(frozen=True)
class Runs:
    """A measured run and its replay, by an engine as fitted and by a slower one."""

    measured: Trace
    fitted: Trace
    slower: Trace

    def draw(self, engine: Trace, random: np.random.Generator) -> Trace:
        """A run on that engine, with noise as measured."""
        measured, fitted = ((one.latency("ttft"), one.latency("e2e")) for one in (self.measured, self.fitted))
        early = measured[0] / fitted[0]
        late = (measured[1] - measured[0]) / (fitted[1] - fitted[0])
        count, block = len(engine), 30
        # The first request is the cold one; it is no noise.
        starts = random.integers(0, count - 1, -(-count // block))
        rows = 1 + (starts[:, None] + np.arange(block)).ravel()[:count] % (count - 1)
        ttft, e2e = engine.latency("ttft"), engine.latency("e2e")
        first = engine.start + ttft * early[rows]
        columns = {name: engine.column(name) for name in ("arrival", "prompt_tokens", "output_tokens")}
        columns |= {"first_token": first, "last_token": first + (e2e - ttft) * late[rows]}
        table = requests_table({"id": engine.ids, "status": engine.statuses, **columns}, count)
        return Trace(table, {"name": "drawn", "clock": {"kind": "run"}})

    def draws(self, engine: Trace) -> list[Trace]:
        random = np.random.default_rng(20261123)
        return [self.draw(engine, random) for _ in range(DRAWS)]


@pytest.fixture(scope="module")
def runs(traces):
    measured = read_trace(traces / NAME)
    loaded = load_profile(PROFILE)
    document = loaded.profile.model_dump(by_alias=True)
    for coefficient in document["coefficients"].values():
        coefficient["value"] *= 1.1
    slow = LoadedProfile(Profile.model_validate(document), loaded.folder, "slow", "slow")
    predicted = [replay(measured, resolve(one, facts_of(measured))).predicted for one in (loaded, slow)]
    return Runs(measured, *predicted)


@pytest.fixture(scope="module")
def counts(runs):
    """How often each gate, and all together, were judged how: by limits and against a baseline, for both engines."""
    limits = Rules(tuple(map(parse_gate, LIMITS)))
    baseline = Compared(compare(runs.measured, runs.fitted))
    found = {}
    for engine in ("fitted", "slower"):
        found[engine] = Counter()
        for run in runs.draws(getattr(runs, engine)):
            figures = Compared(compare(run, runs.fitted))
            for by, judgement in (
                ("limits", judge(figures, limits)),
                ("baseline", judge(figures, Rules(baseline="old"), baseline)),
            ):
                found[engine].update((one.name, one.verdict) for one in judgement.results)
                found[engine][by, judgement.verdict] += 1
    return found


def test_the_slower_engine_is_ten_percent_slower(runs):
    steps = runs.slower.latency("tpot") / runs.fitted.latency("tpot")
    assert np.nanmean(steps) == pytest.approx(1.11, abs=0.01)


def test_drawn_runs_are_as_noisy_as_the_measured_one(runs):
    drawn = [compare(run, runs.fitted).metrics for run in runs.draws(runs.fitted)[:20]]
    real = compare(runs.measured, runs.fitted).metrics
    for metric in ("ttft", "tpot"):
        assert np.mean([one[metric].mape for one in drawn]) == pytest.approx(real[metric].mape, rel=0.35)


def test_a_repeated_run_does_not_fail_and_a_slower_engine_does(counts):
    same, slower = counts["fitted"], counts["slower"]
    assert same["limits", "fail"] <= 1
    assert same["limits", "pass"] >= 60
    assert slower["limits", "fail"] >= 95
    for name in ("e2e.mean", "tpot.mean", "ttft.mape"):
        assert slower[name, "fail"] >= 95


def test_the_same_against_a_baseline(counts):
    same, slower = counts["fitted"], counts["slower"]
    assert same["baseline", "fail"] <= 1
    assert slower["baseline", "fail"] >= 95
    for name in ("e2e.mean vs baseline", "tpot.mean vs baseline"):
        assert same[name, "pass"] >= 60
        assert slower[name, "fail"] >= 95


def test_the_same_between_two_measured_runs(runs):
    rules = Rules(tuple(map(parse_gate, LIMITS[:2])))
    found = {}
    for engine in (runs.fitted, runs.slower):
        old, new = runs.draws(runs.fitted)[::-1], runs.draws(engine)
        judged = [judge(Compared(pair(*both).compared), rules) for both in zip(old, new, strict=True)]
        found[engine is runs.slower] = Counter(one.verdict for one in judged)
    assert found[False]["fail"] <= 1
    assert found[True]["fail"] >= 95
