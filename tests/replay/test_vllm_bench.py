import json

import numpy as np
import pytest

from profiles.errors import InputError
from replay.readers import read_trace, selections
from replay.trace import REQUESTS


@pytest.fixture
def read(tmp_path):
    return lambda sample: read_trace(sample.write(tmp_path / "run.json"))


def test_times_count_from_the_first_sending_and_chunks_accumulate(serve_result, read):
    trace = read(serve_result())
    assert trace.clock == "run"
    assert trace.ids == ["0", "1", "2", "3", "4"]
    assert trace.statuses.tolist() == ["ok"] * 5
    assert trace.column("arrival").tolist() == [0.125, 0.0, 0.5, 1.25, 2.0]
    assert trace.column("prompt_tokens").tolist() == [100, 200, 40, 64, 16]
    assert trace.column("output_tokens").tolist() == [4, 3, 2, 1, 3]
    assert trace.latency("ttft").tolist() == [0.0625, 0.09375, 0.03125, 0.046875, 0.0625]
    assert trace.latency("e2e").tolist() == [0.125, 0.15625, 0.09375, 0.046875, 0.09375]
    assert trace.lists("token_times")[0] == [0.1875, 0.203125, 0.234375, 0.25]


@pytest.mark.parametrize("start_times", [True, False])
def test_columns_not_measured_are_null_and_meta_says_unknown(serve_result, read, start_times):
    trace = read(serve_result(start_times=start_times))
    said = trace.meta["columns"]
    assert said["arrival"].startswith("measured") == start_times
    assert {name for name in REQUESTS.names if said[name] == "measured"} == {
        *("id", "status", "prompt_tokens", "output_tokens", "first_token", "last_token", "token_times"),
    }
    for name in REQUESTS.names:
        assert trace.has(name) != said[name].startswith("unknown"), name
    assert trace.meta["vantage"] == "client"


def test_without_send_times_arrivals_are_unknown_and_stamps_count_from_each_sending(serve_result, read):
    sent, unsent = read(serve_result()), read(serve_result(start_times=False))
    assert unsent.clock == "request"
    assert not unsent.has("arrival")
    assert unsent.meta["columns"]["arrival"].startswith("unknown")
    assert unsent.start.tolist() == [0.0] * 5
    for metric in ("ttft", "tpot", "e2e"):
        np.testing.assert_array_equal(unsent.latency(metric), sent.latency(metric))


@pytest.mark.parametrize("start_times", [True, False])
def test_the_role_chunk_of_a_chat_is_not_the_first_token(serve_result, read, start_times):
    plain, chat = read(serve_result(start_times=start_times)), read(serve_result(start_times=start_times, chat=True))
    assert chat.column("output_tokens").tolist() == [4, 3, 2, 1, 3]
    np.testing.assert_array_equal(chat.latency("ttft"), plain.latency("ttft") + 0.0078125)
    np.testing.assert_array_equal(chat.latency("tpot"), plain.latency("tpot"))
    assert [len(times) for times in chat.lists("token_times")] == [4, 3, 2, 1, 3]


def test_a_chat_that_got_its_role_with_the_first_token_keeps_its_times(serve_result, read):
    sample = serve_result()
    sample.document["backend"] = "openai-chat"
    assert read(sample).latency("ttft").tolist() == read(serve_result()).latency("ttft").tolist()


def test_the_endpoint_type_of_old_files_tells_a_chat_too(serve_result, read):
    sample = serve_result(chat=True)
    sample.document["endpoint_type"] = sample.document.pop("backend")
    assert read(sample).column("output_tokens").tolist() == [4, 3, 2, 1, 3]


def test_lengths_below_the_chunks_received_were_re_tokenised_and_chunks_are_taken(serve_result, read):
    sample = serve_result()
    sample.document["output_lens"][0] = 2
    trace = read(sample)
    assert trace.column("output_tokens").tolist() == [4, 3, 2, 1, 3]
    assert any("chunks are taken" in note and " 1 requests" in note for note in trace.meta["notes"])


def test_several_tokens_in_one_chunk_are_counted_and_said(serve_result, read):
    sample = serve_result()
    sample.document["output_lens"][4] = 9
    trace = read(sample)
    assert trace.column("output_tokens")[4] == 9
    assert len(trace.lists("token_times")[4]) == 3
    assert any("token_times are chunks" in note for note in trace.meta["notes"])


def test_failed_requests_keep_their_error_and_lose_their_times(serve_result, read):
    sample = serve_result(failed=(1, 3))
    sample.document["ttfts"][3] = 0.5  # it broke after its first token
    trace = read(sample)
    assert trace.statuses.tolist() == ["ok", "failed", "ok", "failed", "ok"]
    assert trace.requests.column("error").to_pylist()[1] == "Traceback: ServerDisconnectedError"
    for name in ("first_token", "last_token", "output_tokens"):
        assert np.isnan(trace.column(name)).tolist() == [False, True, False, True, False]
    assert trace.column("arrival").tolist() == [0.125, 0.0, 0.5, 1.25, 2.0]


def test_a_prompt_that_failed_may_be_empty(serve_result, read):
    sample = serve_result(failed=(1,))
    sample.document["input_lens"][1] = 0
    assert read(sample).statuses.tolist().count("failed") == 1


def test_silent_requests_are_prefills_of_one_token_without_times(serve_result, read):
    trace = read(serve_result(silent=(0, 2)))
    assert trace.statuses.tolist() == ["silent", "ok", "silent", "ok", "ok"]
    assert trace.column("output_tokens").tolist() == [1, 3, 1, 1, 3]
    assert np.isnan(trace.column("first_token")[[0, 2]]).all()
    assert any(note.startswith("2 requests ended without content") for note in trace.meta["notes"])


def test_a_file_without_errors_has_no_failures(serve_result, read):
    sample = serve_result()
    del sample.document["errors"]
    assert read(sample).statuses.tolist() == ["ok"] * 5


def test_what_the_file_says_of_load_and_deployment_is_kept(serve_result, read):
    sample = serve_result()
    sample.document |= {"max_num_seqs": "64", "vllm_version": "0.16.0", "request_rate": "inf"}
    meta = read(sample).meta
    assert meta["model"] == "meta-llama/Llama-3.2-1B"
    assert meta["engine"] == {"name": "vllm", "version": "0.16.0", "arguments": {"max_num_seqs": "64"}}
    assert meta["load"]["request_rate"] == "inf"
    assert "max_concurrency" not in meta["load"]


@pytest.mark.parametrize("rate", [float("inf"), float("nan")])
def test_a_load_that_no_json_number_holds_can_still_be_saved(serve_result, read, tmp_path, rate):
    sample = serve_result()
    sample.document["request_rate"] = rate
    read(sample).save(tmp_path / "saved")
    assert "request_rate" not in read_trace(tmp_path / "saved").meta["load"]


def test_windows_line_ends_and_a_byte_order_mark_change_nothing(serve_result, read, tmp_path):
    sample = serve_result()
    windows = tmp_path / "windows.json"
    windows.write_bytes(b"\xef\xbb\xbf" + json.dumps(sample.document, indent=1).replace("\n", "\r\n").encode())
    assert read_trace(windows).requests.equals(read(sample).requests)


def test_text_with_unicode_line_separators_reads(serve_result, read, tmp_path):
    sample = serve_result()
    sample.document["generated_texts"] = ["a\u2028b", "c\u0085d", "", "", ""]
    path = tmp_path / "texts.json"
    path.write_text(json.dumps(sample.document, ensure_ascii=False), encoding="utf-8")
    assert read_trace(path).requests.equals(read(sample).requests)


def test_public_run_has_silent_requests_and_every_gap(traces):
    trace = read_trace(traces / "h100x8-llama-3.1-405b-fp8" / "qps16.json")
    assert trace.clock == "request"
    assert (trace.statuses == "silent").sum() == 379
    assert (trace.statuses == "ok").sum() == 621
    assert trace.meta["engine"]["version"] is None or trace.meta["engine"]["version"].startswith("0.6.3")


def changed(name, value):
    return lambda document: document[name].__setitem__(2, value)


@pytest.mark.parametrize(
    ("break_it", "field", "message"),
    [
        (changed("ttfts", -0.5), "ttfts", "at least 0, found -0.5"),
        (changed("ttfts", "0.5"), "ttfts", "expected a number of seconds, found '0.5'"),
        (changed("ttfts", None), "ttfts", "expected a number of seconds, found None"),
        (changed("ttfts", True), "ttfts", "expected a number of seconds, found True"),
        (changed("ttfts", float("nan")), "ttfts", "finite"),
        (changed("ttfts", float("inf")), "ttfts", "finite"),
        (changed("ttfts", 10**30), "ttfts", "finite"),
        (changed("ttfts", 0.0), "ttfts", "is 0 although tokens followed"),
        (changed("itls", None), "itls", "expected an array of seconds, found None"),
        (changed("itls", {"0": 1}), "itls", "expected an array of seconds"),
        (changed("itls", [0.1, "x"]), "itls", "expected a number of seconds, found 'x'"),
        (changed("itls", [0.1, -0.1]), "itls", "at least 0"),
        (changed("itls", [[0.1]]), "itls", "expected a number of seconds, found [0.1]"),
        (changed("input_lens", 0), "input_lens", "expected at least 1 token"),
        (changed("input_lens", -1), "input_lens", "found -1"),
        (changed("input_lens", 1.5), "input_lens", "expected a whole number of tokens"),
        (changed("input_lens", 10**30), "input_lens", "expected 0 to 1000000000 tokens"),
        (changed("input_lens", False), "input_lens", "expected a whole number of tokens"),
        (changed("output_lens", "2"), "output_lens", "expected a whole number of tokens, found '2'"),
        (changed("output_lens", None), "output_lens", "expected a whole number of tokens, found None"),
        (changed("output_lens", float("nan")), "output_lens", "expected a whole number of tokens, found nan"),
        (changed("start_times", 0.0), "start_times", "above 0, found 0.0"),
        (changed("start_times", -1), "start_times", "above 0, found -1"),
        (changed("start_times", "now"), "start_times", "expected a number"),
        (changed("errors", 5), "errors", "expected a string, found 5"),
        (changed("errors", ["x"]), "errors", "expected a string, found ['x']"),
        (changed("errors", "\ud800"), "errors", "is no Unicode"),
    ],
)
def test_a_bad_value_is_refused_with_file_request_and_field(serve_result, read, tmp_path, break_it, field, message):
    sample = serve_result()
    break_it(sample.document)
    with pytest.raises(InputError) as caught:
        read(sample)
    error = caught.value
    assert (error.file, error.row, error.field) == (tmp_path / "run.json", "request 2", field)
    assert message in error.message


@pytest.mark.parametrize("name", ["input_lens", "output_lens", "ttfts", "itls"])
def test_a_result_without_details_is_refused_with_the_flags_that_write_them(serve_result, read, name):
    sample = serve_result()
    del sample.document[name]
    with pytest.raises(InputError, match=r"is missing; run `vllm bench serve` with --save-result --save-detailed"):
        read(sample)


@pytest.mark.parametrize("name", ["input_lens", "output_lens", "ttfts", "itls", "errors", "start_times"])
@pytest.mark.parametrize("value", [5, "0.1", {"0": 0.1}, [0.1, 0.2]])
def test_arrays_must_be_arrays_of_one_length(serve_result, read, tmp_path, name, value):
    sample = serve_result()
    sample.document[name] = value
    with pytest.raises(InputError) as caught:
        read(sample)
    assert caught.value.file == tmp_path / "run.json"
    assert caught.value.field in (name, "input_lens")


def test_a_run_of_no_requests_is_refused(serve_result, read):
    sample = serve_result()
    for name in ("input_lens", "output_lens", "ttfts", "itls", "errors", "start_times"):
        sample.document[name] = []
    with pytest.raises(InputError, match=r"holds no requests"):
        read(sample)


@pytest.mark.parametrize(("field", "value"), [("model_id", 7), ("vllm_version", [0, 16]), ("hardware", {})])
def test_a_description_of_the_wrong_type_is_refused(serve_result, read, field, value):
    sample = serve_result()
    sample.document[field] = value
    with pytest.raises(InputError, match=r"expected a string") as caught:
        read(sample)
    assert caught.value.field == field


def test_each_of_several_appended_runs_is_a_trace(serve_result, tmp_path):
    path = tmp_path / "runs.json"
    first, second = serve_result(), serve_result(failed=(1,))
    path.write_text("".join(json.dumps(one.document) + "\n" for one in (first, second)))
    with pytest.raises(
        InputError, match=r"holds 2 runs \(--append-result\); name one: runs.json#run-1, runs.json#run-2"
    ):
        read_trace(path)
    with pytest.raises(InputError, match=r"holds no 'run-3' among its 2 runs"):
        read_trace(path, "run-3")
    assert selections(path) == ["run-1", "run-2"]
    assert [(read_trace(path, one).statuses == "failed").sum() for one in selections(path)] == [0, 1]
    assert read_trace(path, "run-2").name == "runs#run-2"


def test_an_error_in_an_appended_run_names_its_line(serve_result, tmp_path):
    path = tmp_path / "runs.json"
    second = serve_result()
    second.document["ttfts"][2] = -1
    path.write_text(json.dumps(serve_result().document) + "\n" + json.dumps(second.document) + "\n")
    with pytest.raises(InputError) as caught:
        read_trace(path, "run-2")
    assert (caught.value.row, caught.value.field) == ("line 2: request 2", "ttfts")


def test_the_wait_for_a_place_gives_when_a_request_was_wanted(serve_result, read):
    sample = serve_result()
    sample.document |= {
        "queue_times": [0.0, 0.0, 0.25, 0.5, 0.0],
        "latencies": [0.125, 0.15625, 0.09375, 0.046875, 0.1],
    }
    trace = read(sample)
    assert trace.column("nominal_arrival").tolist() == [0.125, 0.0, 0.25, 0.75, 2.0]
    assert trace.column("arrival").tolist() == [0.125, 0.0, 0.5, 1.25, 2.0]
    assert trace.meta["columns"]["nominal_arrival"].startswith("reconstructed")


@pytest.mark.parametrize("kept", [0.5, 0.9, 0.999])
def test_a_truncated_result_is_refused_as_such(serve_result, tmp_path, kept):
    path = serve_result().write(tmp_path / "run.json")
    text = path.read_text()
    path.write_text(text[: int(kept * len(text))])
    with pytest.raises(InputError) as caught:
        read_trace(path)
    assert caught.value.file == path


@pytest.mark.parametrize("number", ["1e400", "NaN", "-Infinity", "1" * 5000])
def test_numbers_that_no_double_holds_are_refused(serve_result, tmp_path, number):
    path = serve_result().write(tmp_path / "run.json")
    path.write_text(path.read_text().replace("0.09375", number))
    with pytest.raises(InputError) as caught:
        read_trace(path)
    assert caught.value.file == path


def test_a_result_nested_too_deeply_is_refused(serve_result, tmp_path):
    path = serve_result().write(tmp_path / "run.json")
    path.write_text(path.read_text().replace("0.09375", "[" * 100_000))
    with pytest.raises(InputError, match=r"nested too deeply"):
        read_trace(path)
