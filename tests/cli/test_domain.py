"""A replay says for which share of its requests it leaves what the profile was fitted to."""

from __future__ import annotations

import json

import numpy as np
import pytest

from replay.trace import Trace, requests_table

PROFILE = """schema: servecal.profile/1
name: fitted
accelerator: {kind: linear, seconds: {step: 0.01}}
engine: {version: '0.19.0', max_num_seqs: 8, max_num_batched_tokens: 256, num_gpu_blocks: 999, async_scheduling: false}
host: {per_step: 0.0, source: by hand}
domain: {sequences: [1, 2], tokens: [1, 200], context: [50, 150], prompt_tokens: [50, 140]}
"""


@pytest.fixture
def replayed(called, tmp_path):
    """Replay requests of (arrival, prompt, output) with a profile of 10 ms a step."""

    def run(requests, command="replay", profile=PROFILE, style="json"):
        arrival, prompt, output = np.array(requests, dtype=float).T
        count = len(requests)
        columns = {
            "id": [f"r{place}" for place in range(count)],
            "status": ["ok"] * count,
            "arrival": arrival,
            "first_token": arrival + 0.01,
            "last_token": arrival + 0.01 * output,
            "prompt_tokens": prompt.astype(int),
            "output_tokens": output.astype(int),
        }
        meta = {"name": "few", "model": "llama-3.2-1b", "warmed_up": True, "clock": {"kind": "run"}}
        Trace(requests_table(columns, count), meta).save(tmp_path / "few")
        (tmp_path / "fitted.yaml").write_text(profile)
        wanted = ("-o", "out") if command == "replay" else ()
        return called(command, "few", "--profile", "fitted.yaml", "--format", style, *wanted)

    return run


INSIDE = [(0.0, 60, 5), (1.0, 100, 5)]


def test_a_replay_inside_says_nothing(replayed):
    assert replayed(INSIDE).json["outside_domain"] == {}
    assert "outside" not in replayed(INSIDE, style="text").out


def test_a_profile_without_a_domain_cannot_tell(replayed):
    profile = PROFILE[: PROFILE.index("domain")]
    assert replayed(INSIDE, profile=profile).json["outside_domain"] is None


@pytest.mark.parametrize(
    ("more", "axes"),
    [
        # Three together, of 50 tokens each: more sequences than fitted, no other axis.
        ([(5.0, 50, 5), (5.0, 50, 5), (5.0, 50, 5)], {"sequences": (0.6, 0.0, [1, 3])}),
        ([(5.0, 120, 5), (5.0, 120, 5)], {"tokens": (0.5, 0.0, [1, 240])}),
        # Decodes see 130 to 227 tokens.
        ([(5.0, 130, 99), (9.0, 100, 9)], {"context": (0.25, 0.0, [60, 227])}),
        ([(5.0, 145, 5)], {"prompt_tokens": (1 / 3, 0.0, [60, 145])}),
        ([(5.0, 40, 5)], {"context": (0.0, 1 / 3, [40, 103]), "prompt_tokens": (0.0, 1 / 3, [40, 100])}),
        # A prompt whose first token is its last never decodes.
        ([(5.0, 40, 1)], {"prompt_tokens": (0.0, 1 / 3, [40, 100])}),
    ],
)
def test_the_share_outside_is_told_by_axis(replayed, more, axes):
    outside = replayed([*INSIDE, *more]).json["outside_domain"]
    found = {axis: (one["above"], one["below"], one["reached"]) for axis, one in outside.items()}
    assert found == {
        axis: (pytest.approx(above), pytest.approx(below), reached) for axis, (above, below, reached) in axes.items()
    }


def test_text_and_report_say_it_in_sentences(replayed):
    requests = [*INSIDE, *[(5.0, 50, 5)] * 3]
    sentence = (
        "outside the fit's domain: 60 % of the requests were served in batches of more sequences than the fit has seen "
        "(2); here up to 3"
    )
    assert sentence in replayed(requests, style="text").out
    report = json.loads(replayed(requests, command="report").out)
    assert sentence in report["notes"]
    assert report["simulation"]["outside_domain"]["sequences"]["fitted"] == [1, 2]


@pytest.mark.parametrize("wrong", ["[1]", "[5, 2]", "[a, b]", "3"])
def test_a_domain_that_is_no_range_is_refused(replayed, wrong):
    replayed(INSIDE, profile=PROFILE.replace("[1, 2]", wrong)).refused(
        "fitted.yaml", "sequences: expected [least, most]"
    )


def test_a_fit_writes_the_domain_that_its_replay_stays_in(servecal):
    trace = "vllm-cpu-shared-prefix"
    assert servecal("fit", trace, "--base", "linear", "-o", "cpu.yaml", "--strength", "1").code == 0
    stays = servecal("replay", trace, "--profile", "cpu.yaml", "-o", "same", "--format", "json").json["outside_domain"]
    assert {"prompt_tokens", "sequences", "tokens"}.isdisjoint(stays)
    wider = ("--set", "engine.max_num_seqs=32")
    leaves = servecal("replay", trace, "--profile", "cpu.yaml", "-o", "more", "--format", "json", *wider).json
    assert leaves["outside_domain"]["sequences"]["above"] > 0.1
    assert leaves["outside_domain"]["sequences"]["reached"][1] > 16
