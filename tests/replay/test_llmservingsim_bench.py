import json
from itertools import takewhile

import numpy as np
import pytest

from profiles.errors import InputError
from replay.readers import read_trace
from replay.trace import REQUESTS

STAMPS = ("queued_ts", "scheduled_ts", "first_token_ts", "last_token_ts")


@pytest.fixture
def sample(bench_folder):
    return bench_folder()


@pytest.fixture
def read(sample, tmp_path):
    return lambda: read_trace(sample.write(tmp_path / "run"))


def common_prefix(left, right):
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


def test_ids_lengths_and_engine_stamps_are_those_of_the_file(sample, read):
    trace = read()
    origin = trace.meta["clock"]["origin"]
    assert trace.ids == [row["request_id"] for row in sample.requests]
    assert trace.statuses.tolist() == ["ok"] * 6
    assert trace.column("prompt_tokens").tolist() == [48, 52, 46, 40, 64, 9]
    assert trace.column("output_tokens").tolist() == [6, 4, 9, 1, 5, 3]
    for name in STAMPS:
        stamps = trace.column(name.removesuffix("_ts")) + origin
        assert stamps.tolist() == [row[name] for row in sample.requests]


def test_wall_clock_arrivals_are_moved_onto_the_engines_clock(sample, read):
    trace = read()
    lag = trace.column("queued") - trace.column("arrival")
    assert lag.tolist() == [sample.smallest_lag * (index % 3) for index in range(6)]
    assert trace.column("arrival").tolist() == [index / 8 for index in range(6)]
    assert trace.meta["clock"]["arrival_to_queued"] == {"median": 1 / 64, "mean": 1 / 64, "max": 2 / 64}


def test_moving_either_clock_changes_no_stamp(sample, read, tmp_path):
    still = read()
    for row in sample.requests:
        row["arrival_time"] += 4096.0
        for name in STAMPS:
            row[name] += 512.0
    moved = read_trace(sample.write(tmp_path / "moved"))
    assert moved.requests.equals(still.requests)


def test_nominal_arrivals_are_never_after_the_true_ones_and_keep_the_workloads_gaps(sample, read):
    trace = read()
    nominal = trace.column("nominal_arrival")
    assert (nominal <= trace.column("arrival")).all()
    wanted = np.array([row["arrival_time_ns"] for row in sample.workload]) * 1e-9
    np.testing.assert_allclose(nominal - nominal[0], wanted - wanted[0], atol=1e-9)
    # All but the third were sent in time.
    np.testing.assert_allclose((trace.column("arrival") - nominal)[[0, 1, 2]], [0.0, 0.0, 0.002], atol=1e-9)


def test_a_workload_may_last_longer_than_a_quarter_of_an_hour(sample, read):
    sample.workload[5]["arrival_time_ns"] = 3_600_000_000_000
    sample.requests[5]["arrival_time"] += 3600.0
    for name in STAMPS:
        sample.requests[5][name] += 3600.0
    nominal = read().column("nominal_arrival")
    assert nominal[5] - nominal[0] == pytest.approx(3600.0 - 0.125)


def test_block_hashes_are_equal_exactly_where_prompts_are(sample, read):
    trace = read()
    hashes = trace.lists("block_hashes")
    assert trace.meta["block_hash"] == {"block_size": 16}
    for left, ours in zip(sample.prompts, hashes, strict=True):
        assert len(ours) == len(left) // 16
        for right, theirs in zip(sample.prompts, hashes, strict=True):
            assert common_prefix(ours, theirs) == common_prefix(left, right) // 16


def test_columns_not_measured_are_null_and_meta_says_unknown(read):
    trace = read()
    said = trace.meta["columns"]
    assert said["arrival"].startswith("reconstructed")
    assert {name for name in REQUESTS.names if said[name] == "measured"} == {
        *("id", "status", "queued", "scheduled", "first_token", "last_token"),
        *("prompt_tokens", "output_tokens", "nominal_arrival", "block_hashes"),
    }
    for name in REQUESTS.names:
        assert trace.has(name) != said[name].startswith("unknown"), name


def test_engine_model_and_version_come_from_meta(sample, read):
    sample.meta["kv_cache"] = {"num_gpu_blocks": 2588, "block_size": 16, "enable_prefix_caching": True}
    sample.meta["hardware"] = {"device_name": "NVIDIA L4"}
    meta = read().meta
    assert meta["model"] == "meta-llama/Llama-3.2-1B"
    assert meta["hardware"] == "NVIDIA L4"
    assert meta["engine"] == {
        "name": "vllm",
        "version": "0.19.0",
        "arguments": {
            "tensor_parallel_size": 1,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 256,
            "dtype": "bfloat16",
            "num_gpu_blocks": 2588,
            "block_size": 16,
            "enable_prefix_caching": True,
        },
    }


def test_everything_but_the_requests_may_be_absent(sample, read):
    sample.workload = sample.meta = sample.timeseries = None
    trace = read()
    assert len(trace) == 6
    assert trace.timeline is None
    assert not trace.has("nominal_arrival")
    assert not trace.has("block_hashes")
    assert trace.meta["block_hash"] is None
    assert trace.meta["model"] is None
    assert trace.meta["engine"] == {"name": "vllm", "version": None, "arguments": {}}


def test_a_workload_without_token_ids_gives_nominal_arrivals_only(sample, read):
    for row in sample.workload:
        del row["input_tok_ids"]
    trace = read()
    assert trace.has("nominal_arrival")
    assert not trace.has("block_hashes")
    assert trace.meta["block_hash"] is None


def test_the_requests_file_alone_reads_like_its_folder(sample, tmp_path):
    folder = sample.write(tmp_path / "run")
    assert read_trace(folder / "requests.jsonl").requests.equals(read_trace(folder).requests)


def test_gauges_are_placed_on_the_requests_clock(sample, read):
    trace = read()
    logger = sample.engine_start + sample.smallest_lag - trace.meta["clock"]["origin"]
    assert trace.timeline.column("time").to_pylist() == [logger + 0.5, logger + 1.0, logger + 1.5]
    assert trace.timeline.column("running").to_pylist() == [1.0, 2.0, 1.0]
    assert trace.timeline.column("waiting").to_pylist() == [0.0, 1.0, 0.0]
    assert trace.timeline.column("kv_usage").to_pylist() == [0.25, 0.5, 0.125]
    assert trace.timeline.column("generation_throughput").to_pylist() == [10.0, 20.0, 5.0]


def test_kv_usage_that_is_zero_throughout_was_not_measured(sample, read):
    sample.timeseries = "t,prompt_throughput,gen_throughput,running,waiting,kv_cache_pct\n1.0,1,1,1,0,0.0\n"
    trace = read()
    assert trace.timeline.column("kv_usage").to_pylist() == [None]
    assert any("kv_cache_pct is 0 throughout" in note for note in trace.meta["notes"])


def test_gauges_without_the_loggers_start_are_left_out_and_said_so(sample, read):
    del sample.meta["started_at"]
    trace = read()
    assert trace.timeline is None
    assert any("timeseries.csv is left out" in note for note in trace.meta["notes"])


@pytest.mark.parametrize("reached", [0, 1, 2, 3])
def test_a_request_that_never_got_to_its_last_token_is_unfinished(sample, read, reached):
    for name in STAMPS[reached:]:
        sample.requests[2][name] = 0.0
    trace = read()
    assert trace.statuses.tolist() == ["ok", "ok", "unfinished", "ok", "ok", "ok"]
    assert trace.column("arrival")[2] == 0.25
    known = [not np.isnan(trace.column(name.removesuffix("_ts"))[2]) for name in STAMPS]
    assert known == [place < reached for place in range(4)]


def test_an_unfinished_request_may_have_no_output(sample, read):
    sample.requests[2] |= {**dict.fromkeys(STAMPS, 0.0), "output_toks": 0}
    assert read().statuses.tolist().count("unfinished") == 1


def test_windows_line_ends_a_byte_order_mark_and_blank_lines_change_nothing(sample, read, tmp_path):
    plain = read()
    folder = sample.write(tmp_path / "windows")
    for path in folder.iterdir():
        content = path.read_bytes().replace(b"\n", b"\r\n")
        path.write_bytes(b"\xef\xbb\xbf" + content + (b"" if path.suffix == ".json" else b"\r\n"))
    windows = read_trace(folder)
    assert windows.requests.equals(plain.requests)
    assert windows.timeline.equals(plain.timeline)
    assert windows.meta["engine"] == plain.meta["engine"]


def test_request_ids_may_hold_any_unicode(sample, read):
    ids = ["日本", "line\u2028separator", "next\u0085line", "\U0001f600", "tab\t", "z"]
    for row, one in zip(sample.requests, ids, strict=True):
        row["request_id"] = one
    assert read().ids == ids


def test_line_separators_inside_strings_do_not_end_a_json_line(sample, tmp_path):
    folder = sample.write(tmp_path / "run")
    sample.requests[1]["request_id"] = "a\u2028b\u0085c"
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in sample.requests)
    (folder / "requests.jsonl").write_text(text, encoding="utf-8")
    assert read_trace(folder).ids[1] == "a\u2028b\u0085c"


def test_same_folder_twice_gives_the_same_trace(sample, tmp_path):
    folder = sample.write(tmp_path / "run")
    first, second = read_trace(folder), read_trace(folder)
    assert first.requests.equals(second.requests)
    assert first.meta == second.meta
    assert first.digest() == second.digest()


def test_files_of_the_source_are_listed_with_their_checksums(read):
    facts = read().meta["source"]
    assert facts["format"] == "llmservingsim-bench"
    assert sorted(one["name"] for one in facts["files"]) == [
        "meta.json",
        "requests.jsonl",
        "timeseries.csv",
        "workload.jsonl",
    ]
    assert all(len(one["sha256"]) == 64 for one in facts["files"])


def test_public_run_reads_whole_with_arrivals_before_queue_stamps(traces):
    trace = read_trace(traces / "rtxpro6000-llama-3.1-8b")
    assert len(trace) == 300
    lag = trace.column("queued") - trace.column("arrival")
    assert lag.min() >= 0
    # trace-formats.md, section 1: median 16 ms, max 108 ms.
    assert np.median(lag) == pytest.approx(0.016, abs=0.001)
    assert lag.max() == pytest.approx(0.108, abs=0.001)
    assert (trace.column("nominal_arrival") <= trace.column("arrival")).all()
    assert trace.column("prompt_tokens").sum() == 257_239
    assert trace.column("output_tokens").sum() == 195_753


def without(name):
    return lambda row: row.pop(name)


def with_value(name, value):
    return lambda row: row.update({name: value})


@pytest.mark.parametrize(
    ("break_it", "field", "message"),
    [
        (without("request_id"), "request_id", "is missing"),
        (without("queued_ts"), "queued_ts", "is missing"),
        (without("input_toks"), "input_toks", "is missing"),
        (with_value("arrival_time", None), "arrival_time", "is missing"),
        (with_value("arrival_time", 0.0), "arrival_time", "above 0, found 0.0"),
        (with_value("arrival_time", -1.0), "arrival_time", "above 0, found -1.0"),
        (with_value("queued_ts", 0.0), "queued_ts", "is 0 although scheduled_ts is"),
        (with_value("scheduled_ts", 0.0), "scheduled_ts", "is 0 although first_token_ts is"),
        (with_value("first_token_ts", 0), "first_token_ts", "is 0 although last_token_ts is"),
        (with_value("scheduled_ts", -5000.0), "scheduled_ts", "at least 0, found -5000.0"),
        (with_value("last_token_ts", "5000.5"), "last_token_ts", "expected a number of seconds, found '5000.5'"),
        (with_value("last_token_ts", True), "last_token_ts", "expected a number of seconds, found True"),
        (with_value("last_token_ts", [5000.5]), "last_token_ts", "expected a number of seconds, found [5000.5]"),
        (with_value("last_token_ts", float("nan")), "last_token_ts", "finite"),
        (with_value("last_token_ts", float("inf")), "last_token_ts", "finite"),
        (with_value("last_token_ts", 10**400), "last_token_ts", "finite"),
        (with_value("input_toks", "48"), "input_toks", "expected a whole number of tokens, found '48'"),
        (with_value("input_toks", 48.5), "input_toks", "expected a whole number of tokens, found 48.5"),
        (with_value("input_toks", True), "input_toks", "expected a whole number of tokens, found True"),
        (with_value("input_toks", {}), "input_toks", "expected a whole number of tokens, found {}"),
        (with_value("input_toks", float("nan")), "input_toks", "expected a whole number of tokens, found nan"),
        (with_value("input_toks", 0), "input_toks", "expected 1 to 1000000000 tokens, found 0"),
        (with_value("input_toks", -3), "input_toks", "expected 1 to 1000000000 tokens, found -3"),
        (with_value("input_toks", 10**30), "input_toks", "expected 1 to 1000000000 tokens"),
        (with_value("input_toks", 1e300), "input_toks", "expected 1 to 1000000000 tokens"),
        (with_value("output_toks", 0), "output_toks", "expected 1 to 1000000000 tokens, found 0"),
        (with_value("request_id", ["x"]), "request_id", "expected a string, found ['x']"),
        (with_value("request_id", False), "request_id", "expected a string, found False"),
        (with_value("request_id", "\ud800"), "request_id", "is no Unicode"),
    ],
)
def test_a_bad_field_is_refused_with_file_line_and_field(sample, read, tmp_path, break_it, field, message):
    break_it(sample.requests[3])
    with pytest.raises(InputError) as caught:
        read()
    error = caught.value
    assert (error.file, error.row, error.field) == (tmp_path / "run" / "requests.jsonl", 4, field)
    assert message in error.message


@pytest.mark.parametrize("number", ["1e400", "-1e400", "NaN", "Infinity", "1" * 5000, "1" * 31])
def test_numbers_that_no_double_holds_are_refused(sample, tmp_path, number):
    folder = sample.write(tmp_path / "run")
    lines = (folder / "requests.jsonl").read_text().splitlines()
    row = dict(sample.requests[2])
    lines[2] = json.dumps(row | {"queued_ts": "@"}).replace('"@"', number)
    (folder / "requests.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError) as caught:
        read_trace(folder)
    assert caught.value.file == folder / "requests.jsonl"
    assert caught.value.row == 3


@pytest.mark.parametrize(
    ("order", "field", "message"),
    [
        ({"scheduled_ts": 5000.001}, "scheduled", "lies before queued"),
        ({"first_token_ts": 5000.001}, "first_token", "lies before scheduled"),
        ({"last_token_ts": 5000.001}, "last_token", "lies before first_token"),
    ],
)
def test_stamps_out_of_order_are_refused(sample, read, tmp_path, order, field, message):
    sample.requests[3] |= order
    with pytest.raises(InputError) as caught:
        read()
    error = caught.value
    assert (error.file, error.row, error.field) == (tmp_path / "run" / "requests.jsonl", "request 4", field)
    assert message in error.message
    assert "'bench-3'" in error.message


def test_an_id_that_stands_twice_is_refused_with_both_rows(sample, read, tmp_path):
    sample.requests[4]["request_id"] = "bench-1"
    with pytest.raises(InputError, match=r"'bench-1' stands in rows 2 and 5") as caught:
        read()
    assert caught.value.file == tmp_path / "run" / "requests.jsonl"
    assert caught.value.field == "id"


def test_a_run_that_was_never_queued_measured_nothing(sample, read):
    for row in sample.requests:
        row |= dict.fromkeys(STAMPS, 0.0)
    with pytest.raises(InputError, match=r"no request was ever queued"):
        read()


@pytest.mark.parametrize("name", ["requests.jsonl", "workload.jsonl", "meta.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b'{"request_id": "a", "input_', "truncated"),
        (b"[1, 2]\n", "expected a JSON object, found [1, 2]"),
        (b"null\n", "expected a JSON object, found None"),
        (b'{"request_id": "\xff"}\n', "is no UTF-8 text"),
        (b"\x00\x01\x02\x03", "is no JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "too many digits"),
    ],
)
def test_a_file_that_holds_no_records_is_refused_by_name(sample, tmp_path, name, content, message):
    folder = sample.write(tmp_path / "run")
    (folder / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_trace(folder)
    assert caught.value.file == folder / name
    assert message in caught.value.message


def test_a_truncated_line_is_named(sample, tmp_path):
    folder = sample.write(tmp_path / "run")
    path = folder / "requests.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match=r"truncated") as caught:
        read_trace(folder)
    assert (caught.value.file, caught.value.row) == (path, 6)


@pytest.mark.parametrize("depth", range(950, 1000, 3))
def test_values_nested_nearly_too_deep_are_refused_too(sample, tmp_path, depth):
    folder = sample.write(tmp_path / "run")
    row = json.dumps(sample.requests[0] | {"queued_ts": "@"})
    (folder / "requests.jsonl").write_text(row.replace('"@"', "[" * depth + "]" * depth))
    with pytest.raises(InputError):
        read_trace(folder)


@pytest.mark.parametrize(
    ("break_it", "field", "message"),
    [
        (with_value("input_toks", 47), "input_toks", "is 47, the request has 40"),
        (with_value("arrival_time_ns", -1), "arrival_time_ns", "at least 0"),
        (with_value("arrival_time_ns", "1"), "arrival_time_ns", "expected a number"),
        (with_value("arrival_time_ns", 10**40), "arrival_time_ns", "finite"),
        (without("arrival_time_ns"), "arrival_time_ns", "is missing"),
        (with_value("input_tok_ids", [1, 2]), "input_tok_ids", "has 2 ids for 40 prompt tokens"),
        (with_value("input_tok_ids", "abc"), "input_tok_ids", "expected a list of token ids"),
        (with_value("input_tok_ids", [1.5] * 40), "input_tok_ids", "expected a list of token ids"),
        (with_value("input_tok_ids", [-1] * 40), "input_tok_ids", "expected a list of token ids"),
        (with_value("input_tok_ids", [True] * 40), "input_tok_ids", "expected a list of token ids"),
        (with_value("input_tok_ids", [2**70] * 40), "input_tok_ids", "expected a list of token ids"),
    ],
)
def test_a_workload_that_contradicts_its_run_is_refused(sample, read, tmp_path, break_it, field, message):
    break_it(sample.workload[3])
    with pytest.raises(InputError) as caught:
        read()
    error = caught.value
    assert (error.file, error.row, error.field) == (tmp_path / "run" / "workload.jsonl", 4, field)
    assert message in error.message


def test_a_workload_with_another_number_of_rows_is_refused(sample, read, tmp_path):
    del sample.workload[-1]
    with pytest.raises(InputError, match=r"holds 5 rows for 6 requests in requests.jsonl") as caught:
        read()
    assert caught.value.file == tmp_path / "run" / "workload.jsonl"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("engine_kwargs", [1]),
        ("model", 5),
        ("model", ["meta-llama/Llama-3.2-1B"]),
        ("vllm_version", {"major": 0}),
        ("started_at", "yesterday"),
        ("started_at", "0001-01-01T00:00:00"),
    ],
)
def test_meta_of_the_wrong_type_is_refused(sample, read, tmp_path, field, value):
    sample.meta[field] = value
    with pytest.raises(InputError) as caught:
        read()
    assert (caught.value.file, caught.value.field) == (tmp_path / "run" / "meta.json", field)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_meta_with_a_number_that_json_does_not_have_is_refused(sample, tmp_path, number):
    folder = sample.write(tmp_path / "run")
    text = (folder / "meta.json").read_text().replace('"tick_seconds": 0.5', f'"tick_seconds": {number}')
    (folder / "meta.json").write_text(text)
    with pytest.raises(InputError, match=r"finite") as caught:
        read_trace(folder)
    assert caught.value.file == folder / "meta.json"


HEADER = "t,prompt_throughput,gen_throughput,running,waiting,kv_cache_pct\n"


def test_gauges_that_were_not_sampled_are_null(sample, read):
    sample.timeseries = HEADER + "1,,5,1,nan,25\n"
    assert read().timeline.select(["waiting", "prompt_throughput"]).to_pylist() == [
        {"waiting": None, "prompt_throughput": None}
    ]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "\n",
        "t,running\n1,2\n",
        HEADER + "1,2,3\n",
        HEADER + "soon,1,1,1,0,0\n",
        HEADER + "1,1,1,many,0,0\n",
        HEADER + "inf,1,1,1,0,0\n",
        HEADER + "1,1,1,1e400,0,0\n",
        HEADER + ",1,1,1,0,0\n",
        "\x00\x01\x02",
        "t;running;waiting\n1;2;3\n",
    ],
)
def test_gauges_that_cannot_be_read_are_refused_by_file(sample, read, tmp_path, content):
    sample.timeseries = content
    with pytest.raises(InputError) as caught:
        read()
    assert caught.value.file == tmp_path / "run" / "timeseries.csv"
    assert "\n" not in str(caught.value)
