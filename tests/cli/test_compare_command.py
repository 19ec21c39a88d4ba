"""``servecal compare`` of traces, profiles and saved reports."""

from __future__ import annotations

import json

import pytest

SMALL = "rtx-pro-6000-llama-3.1-8b"


@pytest.fixture
def bench(bench_folder, tmp_path):
    return bench_folder().write(tmp_path / "run")


@pytest.fixture
def compare(called, bench):
    return lambda *arguments, **environment: called("compare", *arguments, **environment)


@pytest.fixture
def predicted(called, bench, tmp_path):
    """Predictions of the run, by the datasheet and with a slower host."""
    for name, host in (("one", 0.0), ("two", 0.002)):
        options = ("--profile", "roofline:l4", "--no-cold-start", "--set", f"host.per_step={host}")
        assert called("replay", bench, *options, "-o", name).code == 0
        assert called("report", bench, *options, "--format", "json", "-o", f"{name}.json").code == 0
    return tmp_path


def test_a_measured_and_a_predicted_run_are_paired_by_id(compare, bench, predicted):
    finished = compare(bench, "one", "--format", "json")
    document = finished.json
    assert (finished.code, finished.err) == (0, "")
    assert (document["schema"], document["kind"], document["pairing"]) == ("servecal.compare/1", "traces", "id")
    assert (document["coverage"]["a"], document["coverage"]["paired"]) == (6, 6)
    report = json.loads((predicted / "one.json").read_text())
    for metric, errors in report["metrics"].items():
        found = document["metrics"][metric]
        assert found["mape"] == errors["mape"]
        for at, level in errors["percentiles"].items():
            assert found["percentiles"][at]["a"] == level["measured"]
            assert found["percentiles"][at]["difference"] == level["error"]
    assert (document["gates"], document["verdict"]) == ([], None)
    text = compare(bench, "one").out
    assert "paired by id, 6 of 6 requests" in text
    assert "E2E mean" in text


def test_a_run_does_not_differ_from_itself(compare, bench):
    finished = compare(bench, bench, "--fail-on", "e2e.mean:0%", "--fail-on", "tpot.mape:0%", "--format", "json")
    assert (finished.code, finished.json["verdict"]) == (0, "pass")
    assert {one["mape"] for one in finished.json["metrics"].values()} == {0.0}


def test_two_measured_runs_with_other_ids_are_paired_in_order(compare, bench, bench_folder, tmp_path):
    sample = bench_folder()
    for place, row in enumerate(sample.requests):
        row["request_id"] = f"again-{place}"
    again = sample.write(tmp_path / "again")
    document = compare(bench, again, "--format", "json").json
    assert document["pairing"] == "order"
    assert document["metrics"]["e2e"]["mape"] == 0.0
    assert "note: ids differ" in compare(bench, again).out


def test_gates_bound_the_difference_of_traces(compare, predicted):
    assert compare("one", "two", "--fail-on", "e2e.mean:1%").code in (1, 3)
    assert compare("one", "two", "--fail-on", "e2e.mean:500%").code == 0
    assert compare("one", "two", "--fail-on", "itl.mean:1%").code == 3
    assert compare("one", "two", "--fail-on", "itl.mean:1%", "--inconclusive", "pass").code == 0


def test_unpaired_runs_are_said_to_be_unpaired(compare):
    names = ("vllm-cpu-shared-prefix", "vllm-cpu-shared-prefix-2")
    finished = compare(*names, "--fail-on", "tpot.mean:80%", "--format", "json")
    document = finished.json
    assert (document["pairing"], document["coverage"]) == ("none", None)
    assert "mape" not in document["metrics"]["ttft"]
    assert 0 < document["metrics"]["ttft"]["ks_distance"] < 1
    # Nothing is paired, so nobody can say that nothing is lost; who does not mind says so.
    assert (finished.code, document["gates"][0]["verdict"]) == (3, "inconclusive")
    assert compare(*names, "--fail-on", "tpot.mean:80%", "--fail-on", "coverage:0%").code == 0
    text = compare(*names).out
    assert "paired not at all" in text
    assert "a difference may be the workload's" in text


def test_saved_reports_are_compared_statistic_by_statistic(compare, predicted):
    finished = compare("one.json", "two.json", "--format", "json")
    document = finished.json
    assert (finished.code, document["kind"], document["same_run"]) == (0, "reports", True)
    first, second = (json.loads((predicted / f"{name}.json").read_text()) for name in ("one", "two"))
    found = {(one["metric"], one["statistic"]): one for one in document["statistics"]}
    assert len(found) == 8 * len(first["metrics"]) + 2
    mape = found["e2e", "mape"]
    assert (mape["a"], mape["b"]) == (first["metrics"]["e2e"]["mape"], second["metrics"]["e2e"]["mape"])
    assert mape["growth"] == pytest.approx(mape["b"] - mape["a"])
    assert "e2e.mape" in compare("one.json", "two.json").out


def test_gates_bound_the_growth_of_errors_of_saved_reports(compare, predicted):
    def worse(by):
        document = json.loads((predicted / "one.json").read_text())
        e2e = document["metrics"]["e2e"]
        e2e["mape"] += by
        e2e["mape_ci95"] = [one + by for one in e2e["mape_ci95"]]
        (predicted / "worse.json").write_text(json.dumps(document))
        return "worse.json"

    assert compare("one.json", "one.json", "--fail-on", "e2e.mape:0%").code == 0
    assert compare("one.json", worse(0.03), "--fail-on", "e2e.mape:2%").code == 1
    assert compare("one.json", worse(0.01), "--fail-on", "e2e.mape:2%").code == 0
    document = json.loads((predicted / "one.json").read_text())
    document["coverage"]["paired"] -= 1
    (predicted / "lost.json").write_text(json.dumps(document))
    assert compare("one.json", "lost.json", "--fail-on", "e2e.mape:2%").code == 1


def test_profiles_are_compared_by_coefficient(compare, called, tmp_path):
    text = called("profiles", "show", SMALL).out
    finished = compare(SMALL, SMALL, "--format", "json")
    assert finished.json["kind"] == "profiles"
    assert {one["moved"] for one in finished.json["coefficients"]} == {False}
    assert {one["name"] for one in finished.json["coefficients"]} >= {"dense_compute", "decode_attention"}
    assert all(one["name"] in text for one in finished.json["coefficients"])
    assert finished.json["settings"] == []


def test_profiles_are_compared_by_what_they_predict(compare, traces):
    finished = compare(
        SMALL,
        "roofline:rtx-pro-6000",
        "--on",
        "rtxpro6000-llama-3.1-8b",
        *("--fail-on", "tpot.mean:10%"),
        *("--format", "json"),
        SERVECAL_TRACES=traces,
    )
    document = finished.json
    assert (finished.code, document["verdict"]) == (1, "fail")
    assert document["on"]["trace"]["name"] == "rtxpro6000-llama-3.1-8b"
    assert document["on"]["metrics"]["tpot"]["bias"] < -0.1
    errors = {side: one["e2e"]["mape"] for side, one in document["on"]["errors"].items()}
    assert errors["a"] < 0.01 < 0.3 < errors["b"]


def test_a_name_of_both_a_profile_and_a_trace_is_what_the_other_is(compare):
    name = "h100x8-llama-3.1-405b-fp8"
    assert compare(name, SMALL, "--format", "json").json["kind"] == "profiles"
    compare(name, "run").refused("holds several runs")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("run", "nowhere"), ("nowhere", "no such file or folder")),
        (("run", SMALL), ("run is a trace", "is a profile", "two of a kind")),
        (("run", "one.json"), ("run is a trace", "one.json is a saved report")),
        (("run", "one", "--on", "run"), ("--on", "are traces")),
        (("roofline:l4", "roofline:h100-sxm", "--fail-on", "e2e.mean:5%"), ("--fail-on", "--on TRACE")),
        (("one.json", "two.json", "--fail-on", "e2e.mean:5%", "--repeat", "run"), ("--repeat", "are saved reports")),
        (("run", "one", "--fail-on", "e2e.meen:5%"), ("did you mean e2e.mean?",)),
        (("run", "one", "--gates", "base.toml"), ("--gates", "A is the baseline here")),
        (("one.json", "two.json", "-o", "one.json"), ("one.json", "choose another output")),
    ],
    ids=lambda value: " ".join(value[:3]),
)
def test_wrong_use_ends_in_one_line_and_exit_code_2(compare, predicted, arguments, parts):
    (predicted / "base.toml").write_text('[baseline]\nreport = "one.json"\n')
    compare(*arguments).refused(*parts)


@pytest.mark.parametrize("style", ["text", "json"])
def test_the_same_input_prints_the_same_bytes(servecal, bench, predicted, style):
    command = ("compare", bench, "one", "--fail-on", "e2e.mean:5%", "--format", style)
    first, second = (servecal(*command, PYTHONHASHSEED=seed, COLUMNS=50 * seed) for seed in (1, 2))
    assert first.err == ""
    assert (first.out, first.code) == (second.out, second.code)
