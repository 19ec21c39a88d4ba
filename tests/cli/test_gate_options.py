"""Gates of ``servecal report``: options, exit codes, and what is printed."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def bench(bench_folder, tmp_path):
    """Sixty requests: enough that an interval says something."""
    return write(bench_folder(), tmp_path / "run")


def write(sample, folder, slower=1.0, name="bench"):
    """The sample's requests again and again, 4 s apart; decoding a little unsteady."""
    requests, workload = [], []
    for turn in range(10):
        for place, (request, row) in enumerate(zip(sample.requests, sample.workload, strict=True)):
            number = 6 * turn + place
            stamps = {key: request[key] + 4 * turn for key in request if key.endswith(("_ts", "_time"))}
            decoding = stamps["last_token_ts"] - stamps["first_token_ts"]
            stamps["last_token_ts"] = stamps["first_token_ts"] + slower * decoding * (1 + number % 4 / 64)
            requests.append({**request, **stamps, "request_id": f"{name}-{number}"})
            workload.append({**row, "arrival_time_ns": row["arrival_time_ns"] + 4_000_000_000 * turn})
    sample.requests, sample.workload, sample.timeseries = requests, workload, None
    return sample.write(folder)


PROFILE = """
schema: servecal.profile/1
name: sixteen-ms
accelerator: {kind: linear, seconds: {step: STEP}}
host: {per_step: 0.0, per_sequence: 0.0, source: by hand}
engine: {num_gpu_blocks: 999, max_model_len: 4096}
"""


@pytest.fixture
def report(called, bench, tmp_path):
    """Report the run with steps of 1 / 64 s, which is what it has."""

    def run(*arguments, step=1 / 64, trace=bench):
        (tmp_path / "p.yaml").write_text(PROFILE.replace("STEP", str(step)))
        return called("report", trace, "--profile", "p.yaml", "--no-cold-start", *arguments)

    return run


def test_without_gates_nothing_is_judged(report):
    finished = report("--format", "json")
    assert (finished.code, finished.json["gates"], finished.json["verdict"]) == (0, [], None)
    assert "Gates:" not in report().out


@pytest.mark.parametrize(
    ("options", "code", "verdict"),
    [
        (("--fail-on", "tpot.mean:5%"), 0, "pass"),
        (("--fail-on", "tpot.mean:0.1%"), 1, "fail"),
        (("--fail-on", "tpot.mean:0.1%", "--inconclusive", "pass"), 1, "fail"),
        (("--fail-on", "itl.mean:5%"), 3, "inconclusive"),
        (("--fail-on", "itl.mean:5%", "--inconclusive", "report"), 3, "inconclusive"),
        (("--fail-on", "itl.mean:5%", "--inconclusive", "pass"), 0, "inconclusive"),
        (("--fail-on", "itl.mean:5%", "--inconclusive", "fail"), 1, "inconclusive"),
        (("--fail-on", "itl.mean:5%", "--fail-on", "tpot.mean:0.1%"), 1, "fail"),
        (("--fail-on", "tpot.mean:5%", "--fail-on", "makespan:5%", "--fail-on", "coverage:100%"), 0, "pass"),
    ],
)
def test_exit_code_and_verdict(report, options, code, verdict):
    finished = report(*options, "--format", "json")
    assert (finished.code, finished.err) == (code, "")
    assert finished.json["verdict"] == verdict
    assert finished.json["headline"].endswith(").")
    text = report(*options)
    assert text.code == code
    assert f"Gates: {verdict}" in text.out


def test_a_gate_in_json_has_what_the_contract_names(report):
    gates = report("--fail-on", "tpot.mean:5%", "--format", "json").json["gates"]
    assert [gate["metric"] for gate in gates] == ["coverage", "tpot"]
    tpot = gates[1]
    assert (tpot["statistic"], tpot["limit"], tpot["verdict"], tpot["against"]) == ("mean", 0.05, "pass", "limit")
    assert tpot["ci95"][0] <= tpot["value"] <= tpot["ci95"][1]
    assert tpot["sentence"].startswith("off by -")
    assert tpot["baseline"] is None


def test_a_gates_file_decides_and_the_command_line_overrides_it(report, tmp_path):
    (tmp_path / "gates.toml").write_text('[tpot]\nmean = "0.1%"\n')
    assert report("--gates", "gates.toml").code == 1
    assert report("--gates", "gates.toml", "--fail-on", "tpot.mean:5%").code == 0


def test_a_baseline_on_the_same_run_sees_a_worse_profile(report, tmp_path):
    assert report("--format", "json", "-o", "old.json", "--fail-on", "tpot.mean:5%").code == 0
    same = report("--baseline", "old.json")
    assert (same.code, "Gates: pass" in same.out) == (0, True)
    worse = report("--baseline", "old.json", "--format", "json", step=1.2 / 64)
    assert worse.code == 1
    failed = [gate for gate in worse.json["gates"] if gate["verdict"] == "fail"]
    assert {("tpot", "mape"), ("tpot", "mean")} <= {(gate["metric"], gate["statistic"]) for gate in failed}
    assert all(gate["against"] == "baseline" and gate["baseline"] is not None for gate in failed)
    assert report("--baseline", "old.json", "--worse-by", "50%,10%", step=1.2 / 64).code == 0
    (tmp_path / "gates.toml").write_text('[baseline]\nreport = "old.json"\nstatistics = ["tpot.mape"]\n')
    chosen = report("--gates", "gates.toml", "--format", "json", step=1.2 / 64)
    assert [gate["metric"] for gate in chosen.json["gates"]] == ["coverage", "tpot"]
    assert chosen.code == 1


def test_a_lost_prediction_is_a_failure_however_good_the_others_are(report, tmp_path):
    report("--format", "json", "-o", "old.json")
    lost = ("--set", "engine.max_model_len=60")
    assert report("--fail-on", "tpot.mean:5%", *lost).code == 1
    assert report("--fail-on", "tpot.mean:5%", "--fail-on", "coverage:50%", *lost).code == 0
    finished = report("--baseline", "old.json", "--format", "json", *lost)
    assert finished.code == 1
    gate = finished.json["gates"][0]
    assert (gate["metric"], gate["verdict"]) == ("coverage", "fail")
    assert "that the baseline compared are not compared any more" in gate["sentence"]


def test_repeats_make_a_verdict_as_unsure_as_runs_are(report, bench_folder, tmp_path):
    again = write(bench_folder(), tmp_path / "again", slower=1.1, name="again")
    third = write(bench_folder(), tmp_path / "third", slower=0.9, name="third")
    gate = ("--fail-on", "tpot.mean:1%", "--format", "json")
    alone, repeated = report(*gate), report(*gate, "--repeat", again, "--repeat", third)
    assert (alone.code, repeated.code) == (1, 3)
    assert repeated.json["gates"][1]["ci95"][0] < alone.json["gates"][1]["ci95"][0] - 0.1
    assert "noise: 3 runs of the same workload" in report(*gate[:2], "--repeat", again, "--repeat", third).out


def test_a_repeat_of_another_workload_is_refused(report, bench_folder, tmp_path):
    sample = bench_folder()
    for request, row in zip(sample.requests, sample.workload, strict=True):
        row["input_tok_ids"] = row["input_tok_ids"][:-1]
        request["input_toks"] = row["input_toks"] = len(row["input_tok_ids"])
    other = sample.write(tmp_path / "other")
    report("--fail-on", "e2e.mean:5%", "--repeat", other).refused("--repeat", "is no repeat of run")
    report("--repeat", other).refused("--repeat", "no gate was asked for")
    report("--fail-on", "e2e.mean:5%", "--repeat", "run").refused("--repeat", "is run itself")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--fail-on", "ttft.p99"), ("--fail-on", "METRIC.STATISTIC:LIMIT")),
        (("--fail-on", "ttft.p98:1%"), ("--fail-on", "did you mean ttft.p99?")),
        (("--fail-on", "e2e.mean:1%", "--fail-on", "e2e.mean:2%"), ("--fail-on", "has a limit already")),
        (("--gates", "nowhere.toml"), ("nowhere.toml", "cannot be read")),
        (("--gates", "bad.toml"), ("bad.toml: line 2: field 'e2e.maen'", "did you mean e2e.mean?")),
        (("--baseline", "nowhere.json"), ("nowhere.json", "No such file")),
        (("--baseline", "bad.toml"), ("bad.toml", "no JSON")),
        (("--baseline", "old.json"), ("old.json", "field 'schema'", "servecal.report/1")),
        (("--worse-by", "2%,10%"), ("--worse-by", "--baseline")),
    ],
    ids=lambda value: " ".join(value[:2]),
)
def test_wrong_gates_end_in_one_line_and_exit_code_2(report, tmp_path, options, parts):
    (tmp_path / "bad.toml").write_text("[e2e]\nmaen = 0.1\n")
    (tmp_path / "old.json").write_text(json.dumps({"schema": "servecal.fit/1"}))
    report(*options).refused(*parts)


def test_a_baseline_with_another_anchor_or_model_is_refused(report, tmp_path):
    report("--format", "json", "-o", "old.json")
    report("--baseline", "old.json", "--anchor", "queued").refused("old.json", "field 'anchor'", "'arrival'")
    document = json.loads((tmp_path / "old.json").read_text())
    document["trace"]["model"] = "me/other"
    (tmp_path / "old.json").write_text(json.dumps(document))
    report("--baseline", "old.json").refused("old.json", "field 'trace.model'", "'me/other'")


def test_two_runs_with_gates_print_the_same_bytes(servecal, bench, tmp_path):
    (tmp_path / "p.yaml").write_text(PROFILE.replace("STEP", str(1 / 64)))
    command = ("report", bench, "--profile", "p.yaml", "--fail-on", "e2e.mean:5%", "--fail-on", "makespan:5%")
    first, second = (servecal(*command, PYTHONHASHSEED=seed, COLUMNS=40 * seed) for seed in (1, 2))
    assert (first.out, first.code) == (second.out, second.code)
    assert "Gates: " in first.out
