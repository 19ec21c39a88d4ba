"""What engine-side sources say: own captures of a real vLLM 0.32 on the CPU, and samples made by hand."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from profiles.errors import InputError
from replay.quality import examine
from replay.readers import read_trace
from replay.readers.vllm_log import received_requests

SAMPLES = Path(__file__).parent / "engine_samples"


def read(name):
    return read_trace(SAMPLES / name)


@pytest.fixture
def changed(tmp_path):
    """Copy a sample with something replaced, and read it."""

    def make(name, *replacements):
        text = (SAMPLES / name).read_text()
        for old, new in replacements:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / name).write_text(text)
        return read_trace(tmp_path / name)

    return make


def test_a_real_server_log_says_the_engine_its_series_and_its_iterations():
    trace = read("vllm-0.32.log")
    assert len(trace) == 0
    assert trace.meta["facts_only"] is True
    engine = trace.meta["engine"]
    assert (engine["name"], engine["version"], trace.meta["model"]) == ("vllm", "0.32.0", "model")
    said = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 256,
        "max_model_len": 1024,
        "block_size": 32,
        "num_gpu_blocks": 64,
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "async_scheduling": False,
        "dtype": "bfloat16",
    }
    assert said.items() <= engine["arguments"].items()
    assert trace.meta["facts"]["cudagraph_mode"] == "NONE"
    assert trace.meta["clock"]["origin_local"] == "11-23 04:29:31"
    assert trace.timeline.to_pylist()[0] == {
        "time": 31.0,
        "running": 1.0,
        "waiting": 0.0,
        "kv_usage": pytest.approx(0.159),
        "prompt_throughput": 449.4,
        "generation_throughput": 25.5,
    }
    counts = trace.iteration_counts.to_pylist()
    assert [row["iteration"] for row in counts] == list(range(30))
    first = {"context_requests": 1, "context_tokens": 256, "generation_tokens": 0, "logged": 31.0}
    assert first.items() <= counts[0].items()
    assert counts[0]["duration"] == pytest.approx(0.01181)
    assert counts[0]["kv_usage"] == pytest.approx(0.127)
    assert trace.iterations is None  # nothing takes counts for a schedule


def test_requests_that_a_log_names_can_be_joined_by_id():
    named = list(received_requests(SAMPLES / "vllm-0.32.log"))
    assert [one.id for one in named[1:3]] == ["cmpl-bench-c9269d81-0-0", "cmpl-bench-c9269d81-1-0"]
    assert [(one.time, one.max_tokens) for one in named[1:3]] == [(31.0, 24), (31.0, 24)]
    assert read("vllm-0.32.log").meta["facts"]["received_requests"] == {"count": 6, "first": 30.0, "last": 32.0}


def test_a_prompt_that_quotes_a_log_changes_nothing(tmp_path):
    quoted = "GPU KV cache size: 16 tokens, Iteration(1): 9 context requests, Avg prompt throughput: 5.0 tokens/s"
    prefix = "(APIServer pid=1) INFO 11-23 04:30:02 [logger.py:41] "
    lines = [f"{prefix}Received request cmpl-9: prompt: '{quoted}', params: SamplingParams(n=1)"]
    lines += [f"{prefix}Generated response cmpl-9: output: '{quoted}', finish_reason: stop"]
    text = (SAMPLES / "vllm-0.32.log").read_text()
    (tmp_path / "log").write_text(text + "\n".join(lines))
    trace, whole = read_trace(tmp_path / "log"), read("vllm-0.32.log")
    assert trace.meta["engine"] == whole.meta["engine"]
    assert trace.timeline.equals(whole.timeline)
    assert trace.iteration_counts.equals(whole.iteration_counts)
    assert trace.meta["facts"]["received_requests"]["count"] == 7


def test_engines_of_a_data_parallel_log_are_added_up_and_secrets_left_out():
    trace = read("vllm-0.19-dp2.log")
    rows = trace.timeline.to_pylist()
    assert [row["time"] for row in rows] == [30.0, 40.0]  # over new year
    assert [row["running"] for row in rows] == [4.0, 1.0]
    assert [row["kv_usage"] for row in rows] == pytest.approx([0.3, 0.05])
    assert rows[0]["generation_throughput"] == 200.0
    arguments = trace.meta["engine"]["arguments"]
    assert arguments["num_gpu_blocks"] == 28250
    assert arguments["max_num_seqs"] == 32  # beside a value that is no literal
    assert "hf_token" not in arguments
    assert "secret" not in json.dumps(trace.meta)
    assert trace.meta["facts"]["cudagraph_capture_sizes"] == [1, 2, 4, 8]
    assert trace.meta["facts"]["attention_backend"] == "FLASH_ATTN"
    assert [(row["engine"], row["iteration"]) for row in trace.iteration_counts.to_pylist()] == [(1, 515)]
    notes = " ".join(trace.meta["notes"])
    assert "kv_cache_tokens in 2 ways (452090, 452000)" in notes
    assert "async scheduling" in notes


@pytest.mark.parametrize(
    ("line", "origin", "local"),
    [
        ("INFO 11-22 10:10:31 [loggers.py:116] {}", None, "11-22 10:10:31"),
        ("2026-01-02T03:04:05.250Z (APIServer pid=3) INFO 01-02 04:04:05 [loggers.py:116] {}", 1767323045.25, None),
        ("2026-01-02 03:04:05,250 - INFO - vllm.v1.metrics: {}", None, "2026-01-02 03:04:05,250"),
        (
            '{{"asctime": "2026-01-02 03:04:05,250", "levelname": "INFO", "message": "{}"}}',
            None,
            "2026-01-02 03:04:05,250",
        ),
    ],
)
def test_every_prefix_is_read(tmp_path, line, origin, local):
    message = (
        "Engine 000: Avg prompt throughput: 1.0 tokens/s, Avg generation throughput: 2.0 tokens/s, Running: 3 reqs, "
        "Swapped: 0 reqs, Pending: 4 reqs, GPU KV cache usage: 5.0%, CPU KV cache usage: 9.0%."
    )
    path = tmp_path / "log"
    path.write_bytes(("﻿" + line.format(message) + "\n").encode("utf-16"))  # as PowerShell writes
    trace = read_trace(path)
    assert trace.meta["clock"]["origin"] == origin
    assert trace.meta["clock"]["origin_local"] == local
    row = trace.timeline.to_pylist()[0]
    assert (row["time"], row["running"], row["waiting"], row["kv_usage"]) == (0.0, 3.0, 4.0, 0.05)


def test_an_sglang_log_says_the_engine_and_its_series():
    trace = read("sglang-0.5.log")
    engine = trace.meta["engine"]
    assert engine["name"] == "sglang"
    said = {
        "tensor_parallel_size": 2,
        "block_size": 64,
        "num_gpu_blocks": 1024,
        "max_num_seqs": 33,
        "max_model_len": 32768,
    }
    assert said.items() <= engine["arguments"].items()
    assert "secret" not in json.dumps(trace.meta)
    assert trace.column("arrival").size == 0
    rows = trace.timeline.to_pylist()
    assert [row["time"] for row in rows] == [31.0, 32.0, 34.0, 35.0]
    assert [row["kv_usage"] for row in rows] == [0.02, 0.04, 0.03, 0.05]
    assert [row["generation_throughput"] for row in rows] == [None, 144.95, 90.1, None]
    assert trace.meta["facts"]["prefill_tokens"] == 2062 + 291


def test_scrapes_of_a_real_server_become_gauges_rates_and_percentiles_with_their_bins():
    trace = read("vllm-0.32.prom")
    assert len(trace) == 0
    assert trace.meta["engine"]["arguments"] == {
        "block_size": 32,
        "num_gpu_blocks": 64,
        "enable_prefix_caching": True,
        "gpu_memory_utilization": 0.92,
    }
    rows = trace.timeline.to_pylist()
    assert [row["running"] for row in rows] == [0.0, 1.0, 0.0]
    assert rows[1]["kv_usage"] == pytest.approx(10 / 63)
    seconds = 1795408203.535001874 - 1795408201.491307341
    assert rows[1]["time"] == pytest.approx(seconds, abs=1e-6)
    assert rows[1]["prompt_throughput"] == pytest.approx(1800 / seconds)
    ttft = trace.meta["aggregates"]["ttft"]
    assert ttft["mean"] == pytest.approx(0.2004551887512207 / 10)
    # 7 of 10 within 20 ms, all within 40 ms: the median is the 5th of 7 in the bin from 10 to 20 ms.
    assert ttft["p50"] == pytest.approx(0.01 + 0.01 * 5 / 7)
    assert trace.meta["aggregate_intervals"]["ttft"]["p50"] == [0.01, 0.02]
    assert trace.meta["facts"]["histograms"]["queue_time"]["count"] == 10
    assert trace.meta["facts"]["counters"]["request_success.length"] == 10


def test_one_scrape_is_since_the_servers_start(tmp_path):
    text = (SAMPLES / "vllm-0.32.prom").read_text()
    (tmp_path / "last").write_text(text[text.rindex("# scraped_at") :].split("\n", 1)[1])
    trace = read_trace(tmp_path / "last")
    assert trace.timeline is None
    assert trace.meta["aggregates"]["itl"]["mean"] == pytest.approx(0.5784043019993987 / 230)
    assert "since the server's start" in trace.meta["notes"][0]


def test_a_range_query_becomes_the_same_and_a_restart_is_no_loss():
    trace = read("range.json")
    rows = trace.timeline.to_pylist()
    assert [row["generation_throughput"] for row in rows] == [None, 100.0, 100.0]
    assert [row["prompt_throughput"] for row in rows] == [None, 200.0, None]  # the counter fell: a restart
    assert trace.meta["facts"]["counters"]["prompt_tokens"] == 3000 + 1500
    assert trace.meta["aggregates"]["ttft"] == pytest.approx({"mean": 0.1, "p50": 0.032, "p90": 0.088, "p95": 0.1})
    assert trace.meta["aggregate_intervals"]["ttft"]["p90"] == [0.04, 0.1]
    assert any("p99 of ttft" in note for note in trace.meta["notes"])
    assert trace.meta["aggregates"]["throughput"]["output_tokens_per_s"] == 100.0


def test_percentiles_of_bins_lie_where_the_latencies_do(tmp_path):
    """Latencies drawn, binned as vLLM bins them: each true percentile lies within the interval that is told."""
    latencies = np.random.default_rng(1).lognormal(-3, 1, 4000)
    edges = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, np.inf]
    name = "vllm:time_to_first_token_seconds"
    counts = {"+Inf" if edge == np.inf else edge: (latencies <= edge).sum() for edge in edges}
    lines = [f'{name}_bucket{{le="{edge}"}} {count}' for edge, count in counts.items()]
    lines += [f"{name}_sum {latencies.sum()}", f"{name}_count 4000"]
    (tmp_path / "metrics").write_text("\n".join(lines))
    meta = read_trace(tmp_path / "metrics").meta
    assert meta["aggregates"]["ttft"]["mean"] == pytest.approx(latencies.mean())
    for percentile in (50, 90, 95, 99):
        low, high = meta["aggregate_intervals"]["ttft"][f"p{percentile}"]
        assert low <= np.percentile(latencies, percentile, method="inverted_cdf") <= high
        assert low <= meta["aggregates"]["ttft"][f"p{percentile}"] <= high


def test_expressions_that_lost_their_names_are_refused_with_the_way_out(tmp_path):
    answer = {"status": "success", "data": {"resultType": "matrix", "result": [{"metric": {}, "values": [[1, "2"]]}]}}
    (tmp_path / "rate.json").write_text(json.dumps(answer))
    with pytest.raises(InputError, match=r"query the metrics themselves"):
        read_trace(tmp_path / "rate.json")


def test_spans_of_a_real_server_hold_every_request_of_the_run():
    trace = read("vllm-0.32-spans.jsonl")
    assert len(trace) == 12
    assert trace.column("prompt_tokens").tolist() == [300] * 12
    assert trace.column("output_tokens").tolist() == [24] * 12
    assert trace.ids[0] == "cmpl-bench-c9269d81-0-0"
    assert trace.meta["clock"]["origin"] == pytest.approx(1795408202.238734)
    assert trace.latency("ttft")[0] == pytest.approx(0.03328108787536621)
    stamps = [trace.column(name) for name in ("arrival", "queued", "scheduled", "first_token", "last_token")]
    assert (np.diff(stamps, axis=0) >= 0).all()
    # The same ten requests were counted by /metrics (two came later): their mean TTFT is the spans'.
    scraped = read("vllm-0.32.prom").meta["aggregates"]["ttft"]["mean"]
    assert trace.latency("ttft")[:10].mean() == pytest.approx(scraped, rel=1e-3)


def test_spans_of_requests_that_never_ran_have_no_stamps(changed):
    old = '"key":"gen_ai.latency.time_in_model_prefill","value":{"doubleValue":0.015170967002632096}'
    trace = changed("vllm-0.32-spans.jsonl", (old, old.replace("0.015", "-27536.015")))
    assert trace.statuses.tolist().count("unfinished") == 1
    assert "1 requests ended without tokens" in trace.meta["notes"][0]


def test_journeys_hold_the_engines_stamps_and_counts_of_each_step():
    trace = read("journeys.jsonl")
    assert trace.ids == ["r1aa", "r2bb", "r3cc"]
    assert trace.statuses.tolist() == ["ok", "ok", "unfinished"]
    assert trace.latency("ttft")[:2].tolist() == [0.5, 0.625]
    assert trace.latency("e2e")[:2].tolist() == [1.25, 1.375]
    assert trace.column("scheduled")[:2].tolist() == [0.25, 0.5]  # not when it was resumed
    assert trace.column("preemptions").tolist() == [0, 1, 0]
    assert trace.column("cached_tokens")[0] == 16
    assert trace.meta["clock"]["origin"] == 1760000000.25
    counts = trace.iteration_counts.to_pylist()
    assert [(row["start"], row["duration"], row["context_tokens"]) for row in counts] == [
        (0.25, 0.25, 48),
        (0.5, 0.125, 32),
    ]
    assert trace.meta["engine"]["arguments"] == {"num_gpu_blocks": 100}


def test_steps_without_requests_are_facts(tmp_path):
    (tmp_path / "steps.json").write_text((SAMPLES / "journeys.jsonl").read_text().splitlines()[0])
    shutil.copy(tmp_path / "steps.json", tmp_path / "one.json")
    document = json.loads((tmp_path / "one.json").read_text())
    spans = document["resourceSpans"][0]["scopeSpans"][0]["spans"]
    spans[0]["events"] = [event for event in spans[0]["events"] if event["name"] == "step.BATCH_SUMMARY"]
    (tmp_path / "one.json").write_text(json.dumps(document, indent=1))
    trace = read_trace(tmp_path / "one.json")
    assert len(trace) == 0
    assert trace.meta["facts_only"] is True
    assert trace.iteration_counts.num_rows == 2


def test_a_vcr_capture_holds_tokens_hashes_and_what_ran_beside_them():
    trace = read("vcr.jsonl")
    assert trace.statuses.tolist() == ["ok", "ok", "ok", "unfinished", "ok"]
    assert trace.column("arrival").tolist() == pytest.approx([1.0345, 1.0, 1.2, 1.3, 1.4])
    assert trace.latency("ttft")[0] == pytest.approx(0.04125)
    assert trace.latency("e2e")[:3] == pytest.approx([0.07775, 0.048, 0.045])
    assert trace.lists("token_times")[0] == pytest.approx([1.07575, 1.08375, 1.09225, 1.11225])
    assert trace.lists("block_hashes")[0] == [1234567890123, 2**63 - 1]
    assert trace.column("cached_tokens").tolist() == [16, 0, 0, 0, 0]
    assert trace.timeline.column("running").to_pylist() == [2.0, 2.0, 1.0]
    assert trace.meta["engine"]["arguments"] == {"tensor_parallel_size": 1, "max_num_seqs": 16, "block_size": 16}


def test_a_vcr_capture_without_arrivals_counts_from_each_request(tmp_path):
    lines = [json.loads(line) for line in (SAMPLES / "vcr.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in line.items() if key != "arrival_ms"} for line in lines]
    (tmp_path / "v").write_text("\n".join(map(json.dumps, kept)))
    trace = read_trace(tmp_path / "v")
    assert trace.clock == "request"
    assert trace.latency("ttft")[0] == pytest.approx(0.04125)
    (tmp_path / "v").write_text(json.dumps(kept[3]))  # no meta, and a prompt without a full block
    read_trace(tmp_path / "v").save(tmp_path / "saved")
    assert read_trace(tmp_path / "saved").column("prompt_tokens").tolist() == [10]
    (tmp_path / "v").write_text("\n".join(map(json.dumps, [kept[1], lines[2]])))
    with pytest.raises(InputError, match=r"line 1: field 'arrival_ms': is missing"):
        read_trace(tmp_path / "v")


def test_a_blis_trace_is_read_from_its_folder_table_or_header():
    trace = read("blis")
    assert trace.ids == ["u-0", "u-1", "u-2", "u-3", "u-4"]
    assert trace.statuses.tolist() == ["ok", "ok", "ok", "failed", "unfinished"]
    assert trace.column("arrival").tolist() == [0.0, 0.052, 0.1005, 0.1505, 0.2005]
    assert trace.column("nominal_arrival").tolist() == [0.0, 0.05, 0.1, 0.15, 0.2]
    assert trace.column("prompt_tokens").tolist() == [591, 200, 42, 40, 41]
    assert trace.latency("ttft")[:2] == pytest.approx([0.045, 0.038])
    assert np.isnan(trace.column("first_token")[2])  # not streamed
    assert trace.lists("token_times")[0] == pytest.approx([0.045, 0.055, 0.065])
    shared = [hashes[:6] for hashes in trace.lists("block_hashes")[:2]]
    assert shared[0] == shared[1]
    assert trace.lists("block_hashes")[0][6] != trace.lists("block_hashes")[1][6]
    assert trace.meta["engine"]["arguments"] == {"max_num_seqs": 64}
    for name in ("blis/run.csv", "blis/run.yaml"):
        assert read(name).requests.equals(trace.requests)


def test_an_older_blis_table_without_the_later_columns_is_read(tmp_path):
    later = {"vllm_priority", "reason_ratio", "model", "deadline_us", "server_input_tokens", "finish_reason"}
    rows = [line.split(",") for line in (SAMPLES / "blis" / "run.csv").read_text().splitlines() if '"' not in line]
    kept = [place for place, name in enumerate(rows[0]) if name not in {*later, "x_request_id"}]
    (tmp_path / "old.csv").write_text("\n".join(",".join(row[place] for place in kept) for row in rows))
    trace = read_trace(tmp_path / "old.csv")
    assert trace.ids == ["0", "1", "2", "4"]
    assert trace.column("prompt_tokens").tolist() == [566, 200, 40, 40]
    assert trace.latency("ttft")[0] == pytest.approx(0.045)


def test_a_blis_request_that_was_never_sent_stands_where_it_was_wanted(tmp_path):
    shutil.copytree(SAMPLES / "blis", tmp_path / "b")
    text = (tmp_path / "b" / "run.csv").read_text()
    assert "151000,1760000000150500,0,0" in text
    (tmp_path / "b" / "run.csv").write_text(text.replace("151000,1760000000150500,0,0", "151000,0,0,0"))
    trace = read_trace(tmp_path / "b")
    # Requests were sent 0.5 ms late at most: the constant is that of the most punctual.
    assert trace.column("arrival").tolist() == [0.0, 0.052, 0.1005, 0.15, 0.2005]
    assert trace.statuses[3] == "failed"


def test_a_blis_header_runs_and_unfolds_nothing(tmp_path):
    shutil.copytree(SAMPLES / "blis", tmp_path / "b")
    header = (tmp_path / "b" / "run.yaml").read_text()
    marker = tmp_path / "ran"
    (tmp_path / "b" / "run.yaml").write_text(header + f"x: !!python/object/apply:os.mkdir ['{marker}']\n")
    with pytest.raises(InputError, match=r"is no YAML"):
        read_trace(tmp_path / "b")
    assert not marker.exists()
    bomb = "a0: &a0 [x]\n" + "".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1, 9))
    (tmp_path / "b" / "run.yaml").write_text(header.replace("max_num_seqs: 64", "max_num_seqs: *a8"))
    (tmp_path / "b" / "run.yaml").write_text(bomb + (tmp_path / "b" / "run.yaml").read_text())
    with pytest.raises(InputError, match=r"aliases"):
        read_trace(tmp_path / "b")


def test_what_servecal_writes_for_blis_it_reads_again(bench_folder, called, tmp_path):
    measured = read_trace(bench_folder().write(tmp_path / "bench"))
    ended = called("traces", "export", tmp_path / "bench", "-o", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert "BLIS has no place for block_hashes, queued, scheduled" in ended.out
    back = read_trace(tmp_path / "out")
    assert back.ids == measured.ids
    for name in ("prompt_tokens", "output_tokens"):
        assert back.column(name).tolist() == measured.column(name).tolist()
    for metric in ("ttft", "e2e"):
        assert back.latency(metric) == pytest.approx(measured.latency(metric), abs=2e-6)
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert called("traces", "export", tmp_path / "bench", "-o", tmp_path / "out").code == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == first
    called("traces", "export", tmp_path / "bench", "-o", tmp_path / "bench").refused("is the trace itself")
    (tmp_path / "out" / "notes.txt").touch()
    called("traces", "export", tmp_path / "bench", "-o", tmp_path / "out").refused("is no folder of a BLIS trace")


def test_times_of_tokens_and_failures_survive_the_way_through_blis(serve_result, called, tmp_path):
    path = serve_result(failed=(1,), silent=(2,)).write(tmp_path / "run.json")
    measured = read_trace(path)
    assert called("traces", "export", path, "-o", tmp_path / "out").code == 0
    back = read_trace(tmp_path / "out")
    assert back.statuses.tolist() == measured.statuses.tolist()
    for mine, theirs in zip(back.lists("token_times"), measured.lists("token_times"), strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or mine == pytest.approx(theirs, abs=2e-6)


@pytest.mark.parametrize("name", ["vllm-0.32.log", "sglang-0.5.log", "vllm-0.32.prom", "range.json"])
def test_sources_without_requests_are_saved_read_again_and_not_replayed(called, tmp_path, name):
    trace = read(name)
    trace.save(tmp_path / "saved")
    back = read_trace(tmp_path / "saved")
    assert back.meta == trace.meta
    assert back.timeline.equals(trace.timeline)
    assert (back.iteration_counts is None) == (trace.iteration_counts is None)
    assert trace.iteration_counts is None or back.iteration_counts.equals(trace.iteration_counts)
    examine(trace)
    for path in (SAMPLES / name, tmp_path / "saved"):
        called("report", path, "--profile", "roofline:h100-80gb").refused("holds no requests", "servecal ingest")
