import json
import os
import subprocess

import pytest

LEVELS = {"mean", "p50", "p90", "p95", "p99"}
METRICS = {"ttft", "tpot", "itl", "e2e", "queue_time"}


@pytest.fixture
def bench(bench_folder, tmp_path):
    return bench_folder().write(tmp_path / "run")


@pytest.fixture
def report(called):
    return lambda trace, *arguments: called("report", trace, "--profile", "roofline:l4", *arguments)


@pytest.fixture
def report_apart(servecal):
    """The same as a process of its own."""

    def run(trace, *arguments, **environment):
        return servecal("report", trace, "--profile", "roofline:l4", *arguments, **environment)

    return run


def number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_report(document):
    """The contract: architecture.md, "JSON of a report". Null stands where a number cannot be told."""
    assert document["schema"] == "servecal.report/1"
    assert set(document) >= {
        *("trace", "profile", "coverage", "metrics", "throughput", "timeline", "gates", "verdict"),
    }
    assert isinstance(document["trace"]["name"], str)
    assert isinstance(document["profile"]["name"], str)

    coverage = document["coverage"]
    assert all(isinstance(coverage[side], int) for side in ("measured", "predicted", "paired"))
    assert all(isinstance(count, int) and count > 0 for count in coverage["excluded"].values())
    not_there = coverage["excluded"].get("only_predicted", 0)
    assert coverage["paired"] + sum(coverage["excluded"].values()) - not_there == coverage["measured"]

    metrics = document["metrics"]
    assert set(metrics) | set(coverage["unsupported"]) == METRICS
    assert not set(metrics) & set(coverage["unsupported"])
    for metric in metrics.values():
        assert isinstance(metric["n"], int)
        for name in ("mape", "median_ape", "bias"):
            assert metric[name] is None or number(metric[name])
        check_interval(metric["mape_ci95"], metric["mape"])
        assert set(metric["percentiles"]) == LEVELS
        for level in metric["percentiles"].values():
            assert set(level) == {"measured", "predicted", "error", "error_ci95"}
            assert number(level["measured"])
            assert number(level["predicted"])
            if level["error"] is not None:
                assert level["error"] == pytest.approx(level["predicted"] / level["measured"] - 1)
            check_interval(level["error_ci95"])

    assert set(document["throughput"]) == {"output_tokens_per_s", "makespan"}
    for one in document["throughput"].values():
        assert set(one) == {"measured", "predicted", "error"}
        assert one["error"] == pytest.approx(one["predicted"] / one["measured"] - 1)
    assert set(document["timeline"]) <= {"running", "waiting", "kv_usage"}
    for one in document["timeline"].values():
        assert set(one) == {"mae", "measured_mean", "predicted_mean"}
        assert all(map(number, one.values()))
    for gate in document["gates"]:
        assert set(gate) >= {"metric", "limit", "value", "ci95", "verdict"}
    assert document["verdict"] in ("pass", "fail", "inconclusive", None)


def check_interval(interval, inside=None):
    low, high = interval
    assert (low is None) == (high is None)
    if low is not None:
        assert low <= high
        assert inside is None or low <= inside <= high


def test_json_keeps_the_contract(report_apart, bench):
    finished = report_apart(bench, "--format", "json")
    assert (finished.code, finished.err) == (0, "")
    check_report(finished.json)
    assert finished.json["coverage"]["measured"] == 6
    assert finished.json["timeline"].keys() == {"running", "waiting", "kv_usage"}
    assert "itl" in finished.json["coverage"]["unsupported"]
    assert finished.json["trace"]["source"]["format"] == "llmservingsim-bench"


def test_measured_levels_are_those_of_the_file(report, bench, bench_folder):
    document = report(bench, "--format", "json", "--no-cold-start").json
    sample = bench_folder()
    ttft = [1 / 32 + sample.smallest_lag * (index % 3) for index in range(6)]
    e2e = [one + (output - 1) / 64 for one, output in zip(ttft, [6, 4, 9, 1, 5, 3], strict=True)]
    assert document["coverage"]["paired"] == 6
    for metric, seconds in (("ttft", ttft), ("e2e", e2e)):
        assert document["metrics"][metric]["percentiles"]["mean"]["measured"] == pytest.approx(sum(seconds) / 6)
    assert document["metrics"]["tpot"]["n"] == 5
    assert document["metrics"]["tpot"]["percentiles"]["p99"]["measured"] == pytest.approx(1 / 64)


def test_queued_anchor_measures_from_the_queue_stamp(report, bench):
    document = report(bench, "--format", "json", "--no-cold-start", "--anchor", "queued").json
    assert document["anchor"] == "queued"
    for level in document["metrics"]["ttft"]["percentiles"].values():
        assert level["measured"] == pytest.approx(1 / 32)


@pytest.mark.parametrize("style", ["text", "json"])
def test_two_runs_print_the_same_bytes_wherever_they_run(report_apart, bench, style):
    first = report_apart(bench, "--format", style, PYTHONHASHSEED=1, COLUMNS=40)
    second = report_apart(bench, "--format", style, PYTHONHASHSEED=2, COLUMNS=200, TZ="Asia/Tokyo", LC_ALL="C")
    assert (first.code, first.err) == (0, "")
    assert first.out == second.out


@pytest.mark.parametrize("style", ["text", "json"])
def test_the_output_file_is_what_would_have_been_printed(report_apart, bench, tmp_path, style):
    printed = report_apart(bench, "--format", style)
    written = report_apart(bench, "--format", style, "-o", "report.out")
    assert (written.code, written.out, written.err) == (0, "", "")
    assert (tmp_path / "report.out").read_text(encoding="utf-8") == printed.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.out", "run"]


def test_text_says_trace_profile_errors_and_coverage(report, bench):
    text = report(bench).out
    for part in ("run", "meta-llama/Llama-3.2-1B", "vLLM 0.19.0", "6 requests", "roofline:l4"):
        assert part in text.split("\n\n")[0]
    for part in ("Mean error per request", "TTFT", "TPOT", "E2E", "queue time", "of 6 requests compared", "assumed"):
        assert part in text
    assert "\x1b" not in text


def test_output_over_an_older_file_replaces_it_and_follows_links(report, bench, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "1.txt").write_text("old")
    (tmp_path / "latest.txt").symlink_to(tmp_path / "runs" / "1.txt")
    assert report(bench, "-o", "latest.txt").code == 0
    assert (tmp_path / "latest.txt").is_symlink()
    assert (tmp_path / "runs" / "1.txt").read_text().startswith("trace ")


def test_output_to_a_pipe_goes_through_it(report, bench, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE, text=True) as reader:
        finished = report(bench, "-o", "pipe")
        if not (tmp_path / "pipe").is_fifo():
            reader.kill()
        received = reader.communicate(timeout=30)[0]
    assert finished.code == 0
    assert received.startswith("trace ")
    assert (tmp_path / "pipe").is_fifo()


def test_a_report_is_not_written_over_its_trace(report, serve_result, tmp_path):
    path = serve_result().write(tmp_path / "run.json")
    before = path.read_bytes()
    flags = ("--set", "engine.version=0.16.0", "--assume-defaults")
    report("run.json", *flags, "-o", path).refused("run.json", "is the trace itself")
    assert path.read_bytes() == before


def test_settings_override_the_trace_and_say_so(report, bench):
    document = report(bench, "--format", "json", "--set", "engine.max_num_seqs=1").json
    assert document["profile"]["engine"]["arguments"]["max_num_seqs"] == 1
    assert any("max_num_seqs" in conflict for conflict in document["conflicts"])
    queue = document["metrics"]["queue_time"]["percentiles"]["p99"]["predicted"]
    slow = report(bench, "--format", "json", "--set", "engine.max_num_seqs=1", "--set", "host.per_step=0.1").json
    assert slow["metrics"]["queue_time"]["percentiles"]["p99"]["predicted"] > queue


def test_failed_and_silent_requests_are_counted_as_excluded(report, serve_result, tmp_path):
    path = serve_result(failed=(1,), silent=(2, 4)).write(tmp_path / "run.json")
    flags = ("--set", "engine.version=0.16.0", "--assume-defaults")
    document = report(path, *flags, "--format", "json").json
    check_report(document)
    assert document["coverage"]["excluded"] == {"failed": 1, "silent": 2}
    assert document["coverage"]["paired"] == 2
    assert "left out: 1 failed, 2 silent" in report(path, *flags).out


def test_unfinished_requests_are_counted_as_excluded(report, bench_folder, tmp_path):
    sample = bench_folder()
    sample.requests[3] |= {"first_token_ts": 0.0, "last_token_ts": 0.0}
    sample.requests[4] |= dict.fromkeys(("queued_ts", "scheduled_ts", "first_token_ts", "last_token_ts"), 0.0)
    document = report(sample.write(tmp_path / "run"), "--format", "json", "--no-cold-start").json
    check_report(document)
    assert document["coverage"]["excluded"] == {"unfinished": 2}
    assert document["coverage"]["paired"] == 4


def test_a_single_request_has_no_intervals(report, bench_folder, tmp_path):
    sample = bench_folder()
    sample.workload = None
    del sample.requests[1:]
    document = report(sample.write(tmp_path / "run"), "--format", "json", "--no-cold-start").json
    check_report(document)
    assert document["metrics"]["ttft"]["mape_ci95"] == [None, None]


def test_a_run_in_which_all_failed_cannot_be_reported(report, serve_result, tmp_path):
    path = serve_result(failed=(0, 1, 2, 3, 4)).write(tmp_path / "run.json")
    report(path, "--set", "engine.version=0.16.0", "--assume-defaults").refused("run", "failed")


def test_a_run_in_which_none_was_finished_cannot_be_compared(report, bench_folder, tmp_path):
    sample = bench_folder()
    for row in sample.requests:
        row["last_token_ts"] = 0.0
    report(sample.write(tmp_path / "run")).refused("run", "6 unfinished")


def test_a_trace_without_engine_arguments_names_the_flags_to_give(report, serve_result, tmp_path):
    path = serve_result().write(tmp_path / "run.json")
    report(path).refused(
        "--set engine.max_num_seqs=...",
        "--set engine.max_num_batched_tokens=...",
        "--set engine.version=...",
        "--assume-defaults",
    )
    given = ("engine.max_num_seqs=8", "engine.max_num_batched_tokens=512", "engine.version=0.16.0")
    assert report(path, *(part for one in given for part in ("--set", one))).code == 0


def test_a_missing_trace_is_said_by_a_process_of_its_own(report_apart):
    report_apart("nowhere").refused("nowhere", "no such file or folder")


def test_a_trace_without_model_names_the_flag_to_give(report, bench_folder, tmp_path):
    sample = bench_folder()
    sample.meta["model"] = None
    path = sample.write(tmp_path / "run")
    report(path).refused("which model was served", "--model NAME|config.json")
    assert report(path, "--model", "llama-3.2-1b").code == 0


def test_a_model_that_nobody_knows_names_the_flag_to_give(report, bench_folder, tmp_path):
    sample = bench_folder()
    sample.meta["model"] = "acme/secret-7b"
    report(sample.write(tmp_path / "run")).refused("'acme/secret-7b'", "--model NAME|config.json")


def test_unknown_send_times_name_the_flag_that_draws_them(report, serve_result, tmp_path):
    path = serve_result(start_times=False).write(tmp_path / "run.json")
    flags = ("--set", "engine.version=0.10.2", "--assume-defaults")
    report(path, *flags).refused("--arrivals poisson:rate=R,seed=S")
    drawn = report(path, *flags, "--arrivals", "poisson:rate=2,seed=0", "--format", "json")
    check_report(drawn.json)
    assert drawn.json["trace"]["columns"]["arrival"].startswith("assumed: drawn, poisson:rate=2,seed=0")


def test_nominal_arrivals_replay_the_workloads(report, bench):
    document = report(bench, "--arrivals", "nominal", "--no-cold-start", "--format", "json").json
    # The third request was sent 2 ms after its time, and everything counts from that.
    assert document["metrics"]["ttft"]["percentiles"]["p99"]["measured"] > 1 / 32 + 2 / 64 + 0.0018


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("nowhere",), ("nowhere", "no such file or folder")),
        (("nowhere/run.json",), ("nowhere/run.json", "no such file or folder")),
        (("x" * 5000,), ("File name too long",)),
        (("run", "--profile", "l5"), ("--profile", "no profile 'l5'")),
        (("run", "--profile", "no/such.yaml"), ("no profile 'no/such.yaml'",)),
        (("run", "--profile", "x" * 5000), ("File name too long",)),
        (("run", "--profile", "roofline:h999"), ("no hardware 'h999'", "h100-sxm")),
        (("run", "--profile", "roofline:"), ("roofline:<hardware>",)),
        (("run", "--profile", "run"), ("no profile 'run'",)),
        (("run", "--model", "gpt-5"), ("no model 'gpt-5'", "config.json")),
        (("run", "--set", "max_num_seqs=4"), ("--set", "'max_num_seqs=4'", "engine.<name>=<value>")),
        (("run", "--set", "engine.max_num_seqs"), ("--set", "engine.<name>=<value>")),
        (("run", "--set", "engine.max_nun_seqs=4"), ("--set", "'engine.max_nun_seqs=4'", "max_num_seqs")),
        (("run", "--set", "host.per_year=1"), ("--set", "per_step")),
        (("run", "--set", "engine.max_num_seqs=many"), ("engine.max_num_seqs='many'", "int")),
        (("run", "--set", "engine.max_num_seqs=0"), ("engine.max_num_seqs=0", "at least 1")),
        (("run", "--set", "engine.num_gpu_blocks=1"), ("engine.num_gpu_blocks=1", "at least 2")),
        (("run", "--set", "engine.num_gpu_blocks=3"), ("KV blocks", "raise engine.num_gpu_blocks")),
        (("run", "--set", "engine.scheduling_policy=lifo"), ("engine.scheduling_policy='lifo'", "fcfs")),
        (("run", "--set", "engine.version=new"), ("'new'", "0.19.0")),
        (("run", "--set", "engine.data_parallel_size=2"), ("data parallelism",)),
        (("run", "--set", "host.per_step=-1"), ("host.per_step=-1", "at least 0")),
        (("run", "--set", "host.per_step=soon"), ("host.per_step=soon", "seconds")),
        (("run", "--arrivals", "yesterday"), ("--arrivals", "'yesterday'", "poisson")),
        (("run", "--arrivals", "poisson:rate=0"), ("--arrivals", "'poisson:rate=0'")),
        (("run", "--arrivals", "poisson:rate=1,seed=0"), ("--arrivals", "has measured arrivals")),
        (("run", "-o", "no/such/folder/report.txt"), ("no/such/folder/report.txt", "cannot be written")),
        (("run", "-o", "/proc/servecal"), ("/proc/servecal", "cannot be written")),
    ],
    ids=lambda value: " ".join(one[:30] for one in value),
)
def test_bad_input_ends_in_one_line_and_exit_code_2(called, bench, tmp_path, arguments, parts):
    profile = () if "--profile" in arguments else ("--profile", "roofline:l4")
    called("report", *arguments, *profile).refused(*parts)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("requests.jsonl", b'{"request_id": "bench-0", "inp', ("line 1", "truncated")),
        ("requests.jsonl", b"", ("requests.jsonl", "is empty")),
        ("requests.jsonl", b"\x80\x81", ("requests.jsonl", "no UTF-8")),
        ("requests.jsonl", b"[" * 100_000, ("requests.jsonl", "nested too deeply")),
        ("meta.json", b"{}]", ("meta.json", "line 1", "no JSON")),
        ("workload.jsonl", b"{}\n", ("workload.jsonl", "holds 1 rows for 6 requests")),
        ("timeseries.csv", b"a,b\n1,2\n", ("timeseries.csv",)),
    ],
)
def test_a_broken_file_of_a_trace_is_named(report, bench, name, content, parts):
    (bench / name).write_bytes(content)
    report(bench).refused(*parts)


@pytest.mark.parametrize("name", ["profile.yaml", "model.json"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1, 2]", b"{", b"name: [", b"a: 1\n"])
def test_a_broken_profile_or_model_file_is_named(called, bench, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    flags = ("--profile", name) if name == "profile.yaml" else ("--profile", "roofline:l4", "--model", name)
    called("report", bench, *flags).refused(name)


def test_an_anchor_that_was_not_measured_is_refused(report, serve_result, tmp_path):
    path = serve_result().write(tmp_path / "run.json")
    flags = ("--set", "engine.version=0.16.0", "--assume-defaults")
    report(path, *flags, "--anchor", "queued").refused("--anchor", "no queue stamps")


def test_a_defect_of_servecal_is_one_line_and_a_traceback_only_on_demand(servecal, bench, tmp_path):
    # An accelerator plugin that breaks stands for a defect.
    site = tmp_path / "site"
    (site / "broken-1.0.dist-info").mkdir(parents=True)
    (site / "broken-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (site / "broken-1.0.dist-info" / "entry_points.txt").write_text("[servecal.accelerators]\nbroken = broken:build\n")
    (site / "broken.py").write_text("def build(options, context):\n    raise ZeroDivisionError('by design')\n")
    profile = {"schema": "servecal.profile/1", "name": "p", "hardware": "l4", "accelerator": {"kind": "broken"}}
    (tmp_path / "p.yaml").write_text(json.dumps(profile))
    run = ("report", bench, "--profile", "p.yaml")
    short, full = servecal(*run, PYTHONPATH=site), servecal(*run, PYTHONPATH=site, SERVECAL_DEBUG=1)
    assert (short.code, short.out) == (2, "")
    assert short.err.startswith("error: internal: ZeroDivisionError: by design")
    assert len(short.err.splitlines()) == 1
    assert "Traceback" in full.err


def test_a_public_trace_is_reported_by_name_and_by_path_alike(servecal, called, traces):
    name = "rtxpro6000-llama-3.1-8b"
    run = ("--profile", "roofline:rtx-pro-6000", "--format", "json")
    by_name = servecal("report", name, *run, SERVECAL_TRACES=traces)
    by_path = called("report", traces / name, *run)
    again = called("report", name, *run, SERVECAL_TRACES=traces)
    assert (by_name.code, by_name.err) == (0, "")
    check_report(by_name.json)
    assert by_name.json["metrics"] == by_path.json["metrics"]
    assert by_name.out == again.out
    assert by_name.json["coverage"]["measured"] == 300
    assert by_name.json["coverage"]["excluded"] == {"warmup": 1}


def test_a_public_trace_without_send_times_names_how_they_were_drawn(called, traces):
    name = "h100x8-llama-3.1-405b-fp8/qps16.json"
    run = ("report", name, "--profile", "roofline:h100-sxm")
    draw = "poisson:rate=16,seed=0,overhead=0.00079"
    called(*run, SERVECAL_TRACES=traces).refused(f"--arrivals {draw}")
    finished = called(*run, "--arrivals", draw, "--format", "json", SERVECAL_TRACES=traces)
    check_report(finished.json)
    assert finished.json["coverage"]["excluded"]["silent"] == 379
    assert finished.json["metrics"]["itl"]["n"] > 50_000


def test_a_public_trace_of_several_runs_asks_for_one(called, traces):
    called("report", "h100x8-llama-3.1-405b-fp8", "--profile", "roofline:h100-sxm", SERVECAL_TRACES=traces).refused(
        "h100x8-llama-3.1-405b-fp8/qps16.json", "h100x8-llama-3.1-405b-fp8/qps32.json"
    )


def test_findings_stand_in_the_json_and_before_the_figures(report, bench):
    document = report(bench, "--format", "json").json
    checks = {one["check"]: one for one in document["findings"]}
    assert set(checks["few_requests"]) == {"check", "severity", "sentence", "requests", "values"}
    assert checks["few_requests"]["values"] == {"served": 6.0}
    assert "bench-1" in checks["repeated_prompts"]["requests"]
    text = report(bench).out
    assert text.index("data warning: few_requests") < text.index("\nper request")
    assert "also noted: repeated prompts" in text


def test_strict_turns_doubts_into_exit_code_2_after_the_report(report, bench, tmp_path):
    finished = report(bench, "--strict", "-o", "report.txt")
    assert finished.code == 2
    assert (tmp_path / "report.txt").read_text() == report(bench).out
    assert finished.err == "error: --strict: the data have a finding: few_requests (warning)\n"
    assert report(bench).code == 0


def test_strict_lets_a_sound_run_pass(called, traces):
    finished = called("report", traces / "rtxpro6000-llama-3.1-8b", "--profile", "roofline:rtx-pro-6000", "--strict")
    assert (finished.code, finished.err) == (0, "")


def test_foreign_text_in_findings_cannot_steer_the_terminal(report, serve_result, tmp_path):
    sample = serve_result(failed=(0, 1))
    sample.document["errors"][0] = "\x1b[2J[red]boo"
    path = sample.write(tmp_path / "run.json")
    needed = ("--set", "engine.max_num_seqs=8", "--set", "engine.max_num_batched_tokens=512", "--assume-defaults")
    text = report(path, *needed).out
    assert "[red]boo" in text
    assert "\x1b" not in text
