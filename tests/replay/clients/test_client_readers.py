"""What each client's file says, and what it cannot: send times, tokens counted from text, chunks of several tokens."""

import json

import numpy as np
import pytest
from client_samples import (
    FAILED_AIPERF,
    FAILED_INFERENCE_PERF,
    NS,
    SIM,
    aiperf,
    aiperf_raw,
    document,
    guidellm,
    guidellm_old,
    guidellm_request,
    inference_perf,
    lines,
    llmperf,
    perf_analyzer,
    perf_analyzer_request,
    sglang,
    stage,
)

from profiles.errors import InputError
from replay.load_level import holds_aggregates, level_of
from replay.readers import read_trace, selections


def origin(trace, column):
    return trace.meta["columns"][column]


def noted(trace, text):
    return any(text in note for note in trace.meta["notes"])


def refused(read, content, field, message):
    with pytest.raises(InputError) as caught:
        read(content)
    assert caught.value.field == field, caught.value
    assert message in caught.value.message


class TestSglang:
    def test_chunks_and_failures_are_read_and_send_times_are_unknown(self, read):
        trace = read(lines(sglang()))
        assert trace.clock == "request"
        assert trace.statuses.tolist() == ["ok", "ok", "failed"]
        assert trace.lists("token_times")[0] == [0.0625, 0.09375, 0.109375, 0.140625]
        assert trace.latency("e2e")[:2].tolist() == [0.140625, 0.09375]
        assert origin(trace, "arrival").startswith("unknown")
        assert trace.meta["model"] == "meta-llama/Llama-3.2-1B"
        assert trace.meta["engine"] == {"name": "sglang", "version": "0.5.3", "arguments": {}}

    def test_evenly_split_gaps_of_its_own_endpoint_are_said(self, read):
        assert not noted(read(lines(sglang())), "evenly")
        assert noted(read(lines(sglang(backend="sglang"))), "evenly")

    def test_the_role_of_a_chat_is_no_token(self, read):
        rows = {"output_lens": [3, 1, 0], "backend": "sglang-oai-chat"}
        assert read(lines(sglang(**rows))).column("first_token")[:2].tolist() == [0.09375, 0.09375]

    def test_cached_tokens_are_read(self, read):
        assert read(lines(sglang(cached_tokens=[16, 0, None]))).column("cached_tokens")[:2].tolist() == [16, 0]
        refused(read, lines(sglang(cached_tokens=[1])), "cached_tokens", "expected an array of 3 entries")
        refused(read, lines(sglang(cached_tokens=[1, -1, 0])), "cached_tokens", "expected 0 to")

    def test_each_line_is_a_run(self, read, tmp_path):
        content = lines(sglang(), sglang(ttfts=[0.25, 0.25, 0.0]))
        refused(read, content, None, "holds 2 runs; name one: data#run-1, data#run-2")
        assert read(content, selection="run-2").latency("ttft")[:2].tolist() == [0.25, 0.25]
        assert selections(tmp_path / "data") == ["run-1", "run-2"]

    def test_without_details_it_is_a_load_level(self, read, samples):
        trace = read(samples["sglang-summary"][1])
        assert holds_aggregates(trace)
        assert trace.meta["aggregates"]["ttft"] == {"mean": 0.046875, "p99": 0.0625}
        assert trace.meta["aggregates"]["e2e"] == {"mean": 0.09375}
        level = level_of(trace)
        assert (level.requests, level.prompt_tokens, level.output_tokens, level.rate) == (2, 64.0, 4.0, 4.0)
        assert noted(trace, "--output-details")

    @pytest.mark.parametrize(("rate", "expected"), [("inf", None), (float("inf"), None), (8.0, 8.0)])
    def test_an_infinite_rate_is_all_at_once(self, read, samples, rate, expected):
        row = json.loads(samples["sglang-summary"][1])
        assert level_of(read(lines({**row, "request_rate": rate}))).rate == expected

    def test_a_level_sent_by_a_workload_file_is_refused(self, read, samples):
        row = json.loads(samples["sglang-summary"][1])
        refused(read, lines({**row, "request_rate": "trace"}), "request_rate", "cannot be drawn")


class TestAiperf:
    def test_requests_are_in_order_of_sending_without_warm_up(self, read):
        trace = read(lines(aiperf(0), aiperf(2), aiperf(1)))
        assert trace.ids == ["id-1", "id-2"]
        assert trace.column("arrival").tolist() == [0.0, 0.0625]
        assert trace.column("nominal_arrival").tolist() == [-0.015625, 0.046875]
        assert trace.lists("token_times")[0] == [0.0625, 0.078125, 0.109375]
        assert trace.clock == "run"
        assert trace.meta["clock"]["origin"] == (NS + 62_500_000) / 1e9
        assert noted(trace, "1 warm-up requests are left out")
        assert trace.meta["warmed_up"] is True

    def test_the_servers_counts_go_before_those_of_the_text(self, read):
        trace = read(lines(aiperf(1)))
        assert [trace.column(name)[0] for name in ("prompt_tokens", "output_tokens", "cached_tokens")] == [13, 3, 2]
        assert origin(trace, "output_tokens") == "measured: by the server"
        record = aiperf(1)
        for name in ("usage_prompt_tokens", "usage_completion_tokens"):
            del record["metrics"][name]
        trace = read(lines(record))
        assert [trace.column(name)[0] for name in ("prompt_tokens", "output_tokens")] == [30, 5]
        assert origin(trace, "output_tokens").startswith("assumed")
        assert noted(trace, "1 requests received several tokens in one chunk")

    def test_failed_and_cancelled_requests_keep_what_is_known(self, read):
        cancelled = aiperf(3)
        cancelled["metadata"]["was_cancelled"] = True
        trace = read(lines(aiperf(1), aiperf(2, **FAILED_AIPERF), cancelled))
        assert trace.statuses.tolist() == ["ok", "failed", "unfinished"]
        assert trace.requests.column("error").to_pylist() == [None, "no", "cancelled by the client"]
        assert trace.column("prompt_tokens").tolist() == [13, 30, 13]
        assert np.isnan(trace.column("last_token")[1:]).all()

    def test_without_streaming_only_the_end_is_known(self, read):
        record = aiperf(1)
        for name in ("time_to_first_token", "inter_chunk_latency"):
            del record["metrics"][name]
        trace = read(lines(record))
        assert np.isnan(trace.latency("ttft")[0])
        assert trace.latency("e2e")[0] == 0.109375

    def test_units_are_read_and_early_names_too(self, read):
        record = aiperf(1)
        record["metrics"]["ttft"] = {"value": 62_500_000, "unit": "ns"}
        del record["metrics"]["time_to_first_token"]
        assert read(lines(record)).latency("ttft")[0] == 0.0625
        record["metrics"]["ttft"]["unit"] = "parsec"
        refused(read, lines(record), "metrics.ttft", "expected a unit of")

    def test_raw_records_give_the_same_as_the_stream_had(self, read):
        trace = read(lines(aiperf_raw(0), aiperf_raw(2), aiperf_raw(1)))
        assert trace.ids == ["id-1", "id-2"]
        # The role is no token, nor is the usage.
        assert trace.lists("token_times") == [[0.0625, 0.09375], [0.125, 0.15625]]
        assert trace.column("output_tokens").tolist() == [2, 2]
        assert trace.column("prompt_tokens").tolist() == [13, 13]

    def test_raw_records_without_usage_say_where_lengths_are(self, read):
        record = aiperf_raw(1)
        del record["responses"][3]
        refused(read, lines(record), "responses", "read profile_export.jsonl")

    def test_a_folder_of_artifacts_says_model_and_load(self, read, tmp_path):
        read(lines(aiperf(1)), "run/profile_export.jsonl")
        (tmp_path / "run" / "profile_export_raw.jsonl").write_bytes(lines(aiperf_raw(1)))
        phases = [{"kind": "warmup", "rate": 1.0}, {"kind": "profiling", "type": "poisson", "rate": 20.0}]
        config = {"models": {"items": [{"name": "m/x"}]}, "phases": phases}
        (tmp_path / "run" / "profile_export_aiperf.json").write_text(json.dumps({"input_config": config}))
        trace = read_trace(tmp_path / "run")
        assert (trace.name, trace.meta["model"]) == ("run", "m/x")
        assert trace.meta["load"] == {"type": "poisson", "rate": 20.0}
        assert [one["name"] for one in trace.meta["source"]["files"]] == [
            "profile_export.jsonl",
            "profile_export_aiperf.json",
        ]

    @pytest.mark.parametrize("broken", [b"{", b"[]", b"\xff\xfe", b'{"input_config": [1]}', b'{"input_config": {}}'])
    def test_a_summary_that_cannot_be_read_is_passed_over(self, read, tmp_path, broken):
        read(lines(aiperf(1)), "run/profile_export.jsonl")
        (tmp_path / "run" / "profile_export_aiperf.json").write_bytes(broken)
        assert read_trace(tmp_path / "run").meta["model"] is None

    def test_an_error_names_line_and_field(self, read, tmp_path):
        record = aiperf(2)
        record["metrics"]["inter_chunk_latency"]["value"][1] = -1
        with pytest.raises(InputError) as caught:
            read(lines(aiperf(1), record))
        assert (caught.value.row, caught.value.field) == (2, "metrics.inter_chunk_latency")
        assert str(caught.value).startswith(f"{tmp_path / 'data'}: line 2: field 'metrics.inter_chunk_latency'")

    def test_only_warm_up_is_no_trace(self, read):
        refused(read, lines(aiperf(0)), None, "holds no requests")


class TestGuidellm:
    def test_first_and_last_tokens_are_known_and_nothing_between(self, read):
        trace = read(document(guidellm()))
        assert trace.ids == ["r0", "r1", "r2", "r3"]
        assert trace.statuses.tolist() == ["ok", "ok", "unfinished", "failed"]
        assert trace.column("arrival").tolist() == [0.0, 0.125, 0.25, 0.375]
        assert trace.column("nominal_arrival").tolist() == [-0.0625, 0.0625, 0.1875, 0.3125]
        assert trace.latency("ttft")[:2].tolist() == [0.0625, 0.0625]
        assert trace.latency("tpot")[:2].tolist() == [0.0625, 0.0625]
        assert trace.column("cached_tokens")[0] == 2
        assert not trace.has("token_times")
        assert trace.requests.column("error").to_pylist()[3] == "HTTPStatusError"
        assert trace.meta["load"] == {"type_": "constant", "rate": 8.0}
        assert trace.meta["model"] == "m/x"

    def test_flat_fields_of_old_reports_are_read(self, read):
        trace = read(document(guidellm_old()))
        assert trace.statuses.tolist() == ["ok", "failed"]
        assert trace.latency("ttft")[0] == 0.0625
        assert trace.latency("e2e")[0] == 0.1875
        assert trace.column("prompt_tokens")[0] == 10

    def test_lists_beside_each_other_of_the_first_reports_are_read(self, read):
        report = guidellm_old()
        benchmark = report["benchmarks"][0]
        groups = benchmark.pop("requests")
        benchmark |= {f"{name}_requests": groups[old] for name, old in (("completed", "successful"), ("errored",) * 2)}
        assert read(document(report)).statuses.tolist() == ["ok", "failed"]

    def test_timings_in_scheduler_info_are_read(self, read):
        report = guidellm()
        for request in report["benchmarks"][0]["requests"]["successful"]:
            info = request.pop("info")
            timings = info.pop("timings")
            timings["first_iteration"] = timings.pop("first_token_iteration")
            timings["last_iteration"] = timings.pop("last_token_iteration")
            request["scheduler_info"] = {**info, "request_timings": timings}
        assert read(document(report)).latency("ttft")[:2].tolist() == [0.0625, 0.0625]

    def test_each_benchmark_is_a_trace_named_after_its_strategy(self, read, tmp_path):
        report = guidellm()
        second = json.loads(json.dumps(report["benchmarks"][0]))
        second["config"]["strategy"]["rate"] = 16.0
        report["benchmarks"].append(second)
        refused(read, document(report), None, "holds 2 benchmarks; name one: data#constant-8, data#constant-16")
        assert read(document(report), selection="constant-16").name == "data#constant-16"
        second["config"]["strategy"]["rate"] = 8.0
        (tmp_path / "data").write_bytes(document(report))
        assert selections(tmp_path / "data") == ["benchmark-1", "benchmark-2"]

    def test_a_sample_of_the_requests_is_said(self, read):
        report = guidellm()
        report["benchmarks"][0]["config"]["sample_size"] = 4
        assert noted(read(document(report)), "sample of 4 requests")

    def test_an_error_names_the_request(self, read):
        report = guidellm()
        report["benchmarks"][0]["requests"]["successful"][1]["info"]["timings"]["first_token_iteration"] = 1.0
        with pytest.raises(InputError, match=r"expected no time before the request was sent") as caught:
            read(document(report))
        assert caught.value.row == "benchmark 1: successful request 2"

    def test_turns_that_share_an_id_are_told_apart(self, read):
        report = guidellm()
        report["benchmarks"][0]["requests"]["successful"].append(guidellm_request(1))
        assert len(set(read(document(report)).ids)) == 5


class TestInferencePerf:
    def test_the_servers_counts_and_the_chunks_stamps_are_taken(self, read):
        trace = read(document([inference_perf(0), inference_perf(1, **FAILED_INFERENCE_PERF), inference_perf(2)]))
        assert trace.statuses.tolist() == ["ok", "failed", "ok"]
        assert trace.column("arrival").tolist() == [0.0, 0.25, 0.5]
        # The stamps of re-tokenised text stand twice, and there are twice as many.
        assert trace.lists("token_times")[0] == [0.0625, 0.09375, 0.125]
        assert trace.column("output_tokens")[0] == 3
        assert (trace.column("prompt_tokens")[0], trace.column("cached_tokens")[0]) == (17, 16)
        assert trace.requests.column("error").to_pylist()[1] == "no"

    def test_without_usage_the_length_asked_for_is_taken_if_it_had_to_be_met(self, read):
        record = inference_perf(0)
        record["info"]["response_metrics"]["server_usage"] = None
        trace = read(document([record]))
        assert trace.column("output_tokens")[0] == 3
        assert noted(trace, "max_tokens is taken")
        record["request"] = json.dumps({"max_tokens": 3})
        trace = read(document([record]))
        assert trace.column("output_tokens")[0] == 6
        assert noted(trace, "counted their text")
        assert origin(trace, "output_tokens").startswith("assumed")

    def test_fields_of_old_files_stand_in_info_itself(self, read):
        times = [812.0625, 812.0625, 812.09375, 812.125]
        info = {"input_tokens": 20, "output_tokens": 4, "output_token_times": times}
        trace = read(document([inference_perf(0, info=info, request="{}")]))
        assert trace.column("output_tokens")[0] == 4
        assert trace.lists("token_times")[0] == [0.0625, 0.09375, 0.125]
        assert noted(trace, "several tokens in one chunk")

    def test_every_second_of_doubled_events_is_taken(self, read):
        times = [812 + (1 + place) / 64 for place in range(12)]
        info = {"input_tokens": 20, "output_tokens": 6, "output_token_times": times}
        trace = read(document([inference_perf(0, info=info, request="{}")]))
        assert trace.column("output_tokens")[0] == 6
        assert trace.lists("token_times")[0] == [(1 + place) / 64 for place in range(0, 12, 2)]
        assert noted(trace, "every second one")

    def test_the_configuration_beside_says_model_and_load(self, read, tmp_path):
        read(document([inference_perf(0)]), "out/per_request_lifecycle_metrics.json")
        (tmp_path / "out" / "config.yaml").write_text("server: {model_name: m/x}\nload: {type: constant}\n")
        trace = read_trace(tmp_path / "out")
        assert (trace.name, trace.meta["model"], trace.meta["load"]) == ("out", "m/x", {"type": "constant"})

    def test_a_configuration_executes_nothing(self, read, tmp_path):
        read(document([inference_perf(0)]), "out/per_request_lifecycle_metrics.json")
        target = tmp_path / "touched"
        (tmp_path / "out" / "config.yaml").write_text(f"server: !!python/object/apply:os.mkdir ['{target}']\n")
        assert read_trace(tmp_path / "out").meta["model"] is None
        assert not target.exists()

    def test_a_stage_is_a_load_level(self, read):
        trace = read(document(stage()))
        level = level_of(trace)
        assert (level.requests, level.rate, level.prompt_tokens, level.output_tokens) == (10, 5.0, 100.0, 8.0)
        assert level.prompt_tokens_std == pytest.approx(100 / 2.563)
        assert level.output_tokens_std == 0.0
        aggregates = trace.meta["aggregates"]
        assert aggregates["ttft"] == {"mean": 0.0625, "p10": 0.03125, "p50": 0.0625, "p90": 0.09375, "p99": 0.125}
        assert aggregates["e2e"]["p99.9"] == 0.875
        # All outputs are alike, so the mean follows from the means; their own TPOT and ITL count events.
        assert aggregates["tpot"] == {"mean": (0.5 - 0.0625) / 7}
        assert "itl" not in aggregates
        assert aggregates["throughput"]["output_tokens_per_s"] == 20.0
        assert noted(trace, "1 requests failed")

    def test_a_stage_of_concurrent_clients_is_a_closed_loop(self, read):
        document_ = stage()
        document_["load_summary"]["concurrency"] = 4
        level = level_of(read(document(document_)))
        assert (level.rate, level.max_concurrency) == (None, 4)

    def test_a_summary_of_several_stages_names_the_files_of_each(self, read):
        document_ = stage()
        del document_["load_summary"]["requested_rate"]
        refused(read, document(document_), "requested_rate", "stage_0_lifecycle_metrics.json")

    def test_an_array_that_breaks_off_is_refused_with_the_request(self, read):
        content = document([inference_perf(0), inference_perf(1)])
        with pytest.raises(InputError, match=r"the file seems truncated") as caught:
            read(content[:-40])
        assert caught.value.row == "request 2"


class TestPerfAnalyzer:
    def test_roles_usage_and_the_end_are_no_chunks_and_a_cut_event_is_one(self, read):
        trace = read(document(perf_analyzer()))
        assert trace.column("arrival").tolist() == [0.0, 0.125]
        assert trace.lists("token_times")[0] == [0.03125, 0.0625]
        assert trace.column("prompt_tokens").tolist() == [9, 9]
        assert trace.column("output_tokens").tolist() == [2, 2]
        assert trace.meta["load"] == {"endpoint": "v1/chat/completions", "mode": "concurrency", "value": 2}
        assert trace.meta["model"] == "m/x"

    def test_without_usage_it_says_how_to_get_the_prompts_length(self, read):
        report = perf_analyzer()
        report["experiments"][0]["requests"] = [perf_analyzer_request(0, usage=False)]
        refused(read, document(report), "usage", "include_usage")

    def test_token_ids_are_counted(self, read):
        report = perf_analyzer()
        inputs = {"payload": json.dumps({"prompt": [5, 6, 7]})}
        report["experiments"][0]["requests"] = [perf_analyzer_request(0, usage=False, request_inputs=inputs)]
        trace = read(document(report))
        assert (trace.column("prompt_tokens")[0], trace.column("output_tokens")[0]) == (3, 2)
        assert origin(trace, "output_tokens").startswith("reconstructed")
        assert noted(trace, "one token each")

    def test_triton_s_own_outputs_are_read(self, read):
        request = {
            "timestamp": NS,
            "request_inputs": {"input_ids": [1, 2, 3, 4]},
            "response_timestamps": [NS + 62_500_000, NS + 125_000_000],
            "response_outputs": [{"output_ids": [7]}, {"output_ids": 8}],
        }
        report = {**perf_analyzer(), "service_kind": "triton_c_api"}
        report["experiments"][0]["requests"] = [request]
        trace = read(document(report))
        assert (trace.column("prompt_tokens")[0], trace.column("output_tokens")[0]) == (4, 2)
        assert trace.latency("ttft")[0] == 0.0625

    def test_each_experiment_is_a_trace(self, read, tmp_path):
        report = perf_analyzer()
        report["experiments"].append({**report["experiments"][0], "experiment": {"mode": "request_rate", "value": 2.5}})
        refused(read, document(report), None, "name one: data#concurrency-2, data#request_rate-2.5")
        assert len(read(document(report), selection="request_rate-2.5")) == 2

    def test_stamps_that_run_back_are_refused(self, read):
        report = perf_analyzer()
        report["experiments"][0]["requests"][1]["response_timestamps"][2] = NS
        refused(read, document(report), "response_timestamps", "ascend")


class TestLlmperf:
    def test_its_inter_token_latency_is_not_taken_for_one(self, read):
        trace = read(document([llmperf(), llmperf(error_code=500, error_msg="no", number_output_tokens=0)]))
        assert trace.statuses.tolist() == ["ok", "failed"]
        assert trace.clock == "request"
        assert trace.latency("ttft")[0] == 0.25
        assert trace.latency("tpot")[0] == 0.75 / 9
        assert origin(trace, "output_tokens").startswith("assumed")
        assert noted(trace, "closed loop")

    def test_a_ttft_after_the_end_is_refused(self, read):
        refused(read, document([llmperf(ttft_s=2.0)]), "ttft_s", "at most end_to_end_latency_s")


class TestLlmservingsimSim:
    def test_a_prediction_is_read_in_order_of_arrival_and_called_one(self, read):
        trace = read(SIM.encode())
        assert trace.ids == ["0", "1"]
        assert trace.column("arrival").tolist() == [0.0, 0.0625]
        assert trace.latency("ttft").tolist() == [0.25, 0.09375]
        assert trace.lists("token_times")[1] == [0.15625, 0.171875, 0.21875]
        assert trace.latency("tpot")[1] == 0.03125
        assert origin(trace, "first_token").startswith("assumed: predicted")
        assert trace.meta["model"] == "m/x"
        assert trace.meta["vantage"] == "engine"

    def test_requests_of_several_instances_are_told_apart(self, read):
        trace = read(SIM.replace("0,0,m", "1,1,m").encode())
        assert sorted(trace.ids) == ["0/1", "1/1"]
        assert noted(trace, "2 engine instances")

    @pytest.mark.parametrize(
        ("old", "new", "field"),
        [
            (",281250000,", ",381250000,", "end_time"),
            (",20,3,", ",20,0,", "output"),
            (",20,3,", ",x,3,", "input"),
            ("[15625000, 46875000]", "15625000", "ITL"),
            ("[15625000, 46875000]", "[1.5]", "ITL"),
            ("request id", "id", None),
        ],
    )
    def test_bad_values_are_refused_with_line_and_field(self, read, old, new, field):
        with pytest.raises(InputError) as caught:
            read(SIM.replace(old, new).encode())
        assert caught.value.field == field
        if field:
            assert caught.value.row == 2
