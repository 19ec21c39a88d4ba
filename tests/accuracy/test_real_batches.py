"""Fits to measured batches, scored on data that they have not seen."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from calibrate.cli.options import load_traces
from calibrate.fit import ProfileFit
from calibrate.holdout import hold_out, mean_errors, score
from profiles.deployment import resolve
from profiles.import_bundle import import_bundle
from profiles.profile import load_profile
from replay.run import facts_of

ROOT = Path(__file__).resolve().parents[2]
TRACES = Path(os.environ.get("SERVECAL_TRACES", ROOT / "../shared/traces"))
TABLES = Path(os.environ.get("SERVECAL_TABLES", ROOT / "../shared/operator_tables"))
L4, SPLITWISE = "l4-llama-3.2-1b-batches", "splitwise-batches"
DATA_SETS = ("arxiv", "cnn", "sharegpt", "writing_prompts")


@pytest.fixture(scope="module")
def deployed():
    """Traces by name with a base profile, the features of their batches computed once."""
    made = {}

    def get(name, base, **options):
        if not (TRACES / name.partition("/")[0].partition("#")[0]).is_dir():
            pytest.skip(f"{name} is not in {TRACES} (SERVECAL_TRACES)")
        if (name, base) not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("SERVECAL_TRACES", str(TRACES.resolve()))
                served = [one for one in load_traces(name) if (one.statuses == "ok").any()]
            loaded = load_profile(base)
            made[name, base] = [(one, resolve(loaded, facts_of(one), **options)) for one in served]
        return made[name, base]

    return get


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Operator tables of the L4, several prompts of a step priced one by one."""
    bundle = TABLES / "L4/meta-llama/Llama-3.2-1B-Instruct/bf16"
    if not bundle.is_dir():
        pytest.skip(f"no operator tables in {TABLES} (SERVECAL_TABLES)")
    path = tmp_path_factory.mktemp("l4") / "l4.yaml"
    import_bundle(bundle, 1, path)
    path.write_text(path.read_text().replace("  activation_bytes:", "  separate_prompts: true\n  activation_bytes:"))
    return str(path)


@pytest.mark.parametrize("data_set", DATA_SETS)
def test_static_batches_of_three_data_sets_predict_those_of_the_fourth(deployed, data_set):
    [(_, held)] = hold_out(deployed(f"{L4}/static", "roofline:l4"), f"trace:*/{data_set}", None)
    errors = mean_errors(held)["makespan"]
    assert errors["n"] == 300
    assert errors["mape"] < 0.02


@pytest.mark.parametrize(("data_set", "most"), [("arxiv", 0.03), ("cnn", 0.02), ("sharegpt", 0.02)])
def test_so_they_do_from_operator_tables(deployed, tables, data_set, most):
    [(_, held)] = hold_out(deployed(f"{L4}/static", tables), f"trace:*/{data_set}", None)
    assert mean_errors(held)["makespan"]["mape"] < most


def test_static_batches_predict_calls_of_many_more_requests_than_seats(deployed):
    static, continuous = (deployed(f"{L4}/{part}", "roofline:l4") for part in ("static", "continuous"))
    fit = ProfileFit().fit([(*run, None) for run in static])
    every = [trace.statuses == "ok" for trace, _ in continuous]
    errors = mean_errors(score(continuous, fit, every))["makespan"]
    assert errors["n"] == 19
    assert errors["mape"] < 0.03


@pytest.mark.parametrize(
    ("group", "base", "prompt", "token"),
    [
        pytest.param("llama2-70b/h100-80gb/2", "roofline:h100-sxm", 0.03, 0.04, id="llama-2-70b, 2 x H100"),
        pytest.param("bloom-176b/a100-80gb/8", "roofline:a100-80g", 0.13, 0.05, id="bloom-176b, 8 x A100"),
    ],
)
def test_prompt_and_token_times_of_equal_batches_in_five_parts(deployed, group, base, prompt, token):
    name = f"{SPLITWISE}/perf_model.csv#{group}"
    held = hold_out(deployed(name, base, assume_defaults=True), "kfold-time:5", None)
    errors = mean_errors([one for _, comparisons in held for one in comparisons])
    assert errors["prompt_time"]["mape"] < prompt
    assert errors["token_time"]["mape"] < token


def test_batches_that_were_not_computed_together_break_the_datasheet(deployed):
    # 64 prompts of 512 tokens in 0.8 s on two A100: 7 s at peak.
    [run] = deployed(f"{SPLITWISE}/perf_model.csv#llama2-70b/a100-80gb/2", "roofline:a100-80g", assume_defaults=True)
    fit = ProfileFit().fit([(*run, None)])
    assert any("5 of 105 batches" in one for one in fit.warnings_)
    assert fit.equations_ == 200
