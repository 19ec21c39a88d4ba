"""``servecal fit --bootstrap`` and ``--plan``."""

from __future__ import annotations

import pytest
import yaml

from profiles.profile import load_profile

FIT = ("fit", "vllm-cpu-shared-prefix-2", "--base", "linear")


def test_bootstrap_and_plan_as_json_and_in_the_profile(servecal, tmp_path):
    done = servecal(*FIT, "-o", "cpu.yaml", "--bootstrap", "60", "--plan", "--format", "json")
    assert done.code == 0, done.err
    assert done.err == ""  # no bar where nobody looks
    told = done.json
    assert told["bootstrap"]["resamples"] == 60
    stored = yaml.safe_load((tmp_path / "cpu.yaml").read_text())["coefficients"]
    for name, one in told["coefficients"].items():
        low, high = one["ci95_bootstrap"]
        assert low <= one["value"] <= high
        assert stored[name]["ci95_bootstrap"] == pytest.approx([low, high], rel=1e-5)
        assert stored[name]["ci95"] == pytest.approx(one["ci95"], rel=1e-5)
    engine = yaml.safe_load((tmp_path / "cpu.yaml").read_text())["provenance"]["engine"]
    assert engine["version"] == "0.32.0"
    assert engine["arguments"]["max_num_seqs"] == 16
    assert load_profile(str(tmp_path / "cpu.yaml")).profile.coefficients["step"].ci95_bootstrap is not None
    best = told["plan"]["runs"][0]
    assert best["prediction_error"] < told["plan"]["prediction_error"]
    assert best["recipe"] in told["plan"]["sentence"]
    now, after = best["half_widths"][best["tells"][0]]
    assert after <= 0.5 * now


def test_a_fit_that_cannot_be_written_is_refused_before_it_begins(called, tmp_path):
    called(*FIT, "-o", "missing/cpu.yaml").refused("missing/cpu.yaml: cannot be written: there is no such folder")


def test_a_plan_needs_no_profile_to_write(servecal, tmp_path):
    done = servecal(*FIT, "--bootstrap", "60", "--plan")
    assert done.code == 0, done.err
    assert "by bootstrap" in done.out
    assert "plan: Send " in done.out
    assert "vllm bench serve --model servecal/cpu-llama-8x512" in done.out
    assert "no profile written" in done.out
    assert list(tmp_path.glob("*.yaml")) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--base", "linear"), "Missing option"),
        (("--base", "linear", "-o", "x.yaml", "--bootstrap", "5"), "5 is not in the range x>=40"),
        (("--base", "linear", "-o", "x.yaml", "--bootstrap", "50", "--jobs", "0"), "0 is not in the range"),
        (("--compare", "linear", "--plan"), "leave them out with --compare"),
        (("--compare", "linear", "--bootstrap", "50"), "leave them out with --compare"),
    ],
)
def test_what_does_not_go_together_is_refused(called, arguments, message):
    finished = called("fit", "vllm-cpu-shared-prefix-2", *arguments)
    assert (finished.code, finished.out) == (2, "")
    assert message in finished.err
