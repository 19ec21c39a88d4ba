"""Readers of offline batches, the table that they fill, and their replay."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from profiles.errors import InputError
from replay.readers import batch_files, read_trace, selections
from replay.run import replay
from replay.trace import BATCHES

NAMES = ["run_id", "status", "batch_size", "input_lens", "output_lens", "batch_ttft_ms", "batch_e2e_ms", "error"]


def call(status="OK", size="2", inputs="[30, 20]", outputs="[5, 9]", milliseconds="250.5", error=""):
    return ["0", status, size, inputs, outputs, "", milliseconds, error]


def write(path, rows, names=NAMES):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([names, *rows])
    return path


SPLITWISE = ["model", "hardware", "prompt_size", "batch_size", "token_size", "peak_power", "average_power"]
SPLITWISE += ["prompt_time", "token_time", "e2e_time", "tensor_parallel"]


def measured(**changes):
    row = {
        "model": "llama2-70b",
        "hardware": "h100-80gb",
        "prompt_size": "512",
        "batch_size": "2",
        "token_size": "4",
        "peak_power": "0.9",
        "average_power": "0.0",
        "prompt_time": "100.0",
        "token_time": "20.5",
        "e2e_time": "1",
        "tensor_parallel": "8",
    }
    return [(row | changes)[name] for name in SPLITWISE]


@pytest.fixture
def calls(tmp_path):
    rows = [call(), call("SKIPPED_TOO_LONG", milliseconds="", error="too long"), call(inputs="[7]", outputs="[1]")]
    return write(tmp_path / "bs2" / "mine.csv", rows)


def test_each_call_is_a_batch_of_requests_that_arrive_together(calls):
    trace = read_trace(calls)
    assert trace.meta["source"]["format"] == "batches-csv"
    assert trace.ids == ["0-0", "0-1", "1-0", "1-1", "2-0"]
    assert trace.statuses.tolist() == ["ok", "ok", "failed", "failed", "ok"]
    assert trace.column("prompt_tokens").tolist() == [30, 20, 30, 20, 7]
    assert trace.column("arrival").tolist() == [0.0, 0.0, 0.2505, 0.2505, 0.2505]
    assert trace.rows_of_batches() == [[0, 1], [2, 3], [4]]
    assert trace.batches.column("makespan").to_pylist() == [pytest.approx(0.2505), None, pytest.approx(0.2505)]
    assert trace.meta["engine"]["arguments"] == {"max_num_seqs": 2}
    assert "1 of 3 calls were not served" in trace.meta["notes"][0]
    for name in ("first_token", "last_token", "scheduled"):
        assert not trace.has(name)


def test_a_description_beside_the_file_is_taken_if_there_is_one_only(calls):
    described = {"model": "m", "hardware": "L4", "max_model_len": 512, "tp_degree": 1, "enable_prefix_caching": False}
    (calls.parent / "mine_20260513_094956.json").write_text(json.dumps(described))
    (calls.parent / "mine_too.json").write_text("{}")
    trace = read_trace(calls)
    assert (trace.meta["model"], trace.meta["hardware"]) == ("m", "L4")
    assert trace.meta["engine"]["arguments"] == {
        "max_model_len": 512,
        "tensor_parallel_size": 1,
        "enable_prefix_caching": False,
        "max_num_seqs": 2,
    }
    (calls.parent / "mine_20260513_094957.json").write_text(json.dumps(described))
    assert read_trace(calls).meta["model"] is None


@pytest.mark.parametrize(
    ("row", "line", "field", "message"),
    [
        (call(milliseconds="-3"), 3, "batch_e2e_ms", "above 0, found '-3'"),
        (call(milliseconds=""), 3, "batch_e2e_ms", "above 0, found ''"),
        (call(milliseconds="nan"), 3, "batch_e2e_ms", "found 'nan'"),
        (call(outputs="[5]"), 3, "output_lens", "has 1 lengths, input_lens has 2"),
        (call(inputs="[30, 0]"), 3, "input_lens", "1 to 1000000000 tokens, found 0"),
        (call(inputs="[30, 2.5]"), 3, "input_lens", "a whole number"),
        (call(inputs="[]", outputs="[]"), 3, "input_lens", "expected a list of lengths"),
        (call(inputs="30"), 3, "input_lens", "expected a list of lengths"),
        (call(inputs="[30, 20"), 3, None, "is no JSON"),
        (call(size="two"), 3, "batch_size", "a whole number above 0, found 'two'"),
        (call(size="0"), 3, "batch_size", "a whole number above 0"),
        (call()[:5], 3, None, "expected 8 values, found 5"),
    ],
)
def test_a_call_that_cannot_be_used_is_named_by_line_and_field(tmp_path, row, line, field, message):
    path = write(tmp_path / "mine.csv", [call(), row])
    with pytest.raises(InputError, match=message.replace("[", r"\[")) as caught:
        read_trace(path)
    assert (caught.value.file, caught.value.row, caught.value.field) == (path, line, field)


def test_files_without_calls_or_columns_or_with_mixed_sizes_are_refused(tmp_path):
    with pytest.raises(InputError, match="holds no calls"):
        read_trace(write(tmp_path / "none.csv", []))
    with pytest.raises(InputError, match="is missing") as caught:
        read_trace(write(tmp_path / "less.csv", [call()[2:]], NAMES[2:]))
    assert caught.value.field == "status"
    with pytest.raises(InputError, match="batch_size 2, 4"):
        read_trace(write(tmp_path / "mixed.csv", [call(), call(size="4")]))


def test_a_folder_of_batches_is_found_by_content_and_sorted(tmp_path, calls):
    other = write(tmp_path / "bs1" / "other.csv", [call(size="1")])
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    assert batch_files(tmp_path) == [other, calls]
    read_trace(calls).save(tmp_path / "own")
    assert batch_files(tmp_path / "own") == []


@pytest.fixture
def perf_model(tmp_path):
    rows = [measured(), measured(batch_size="1", token_size="1"), measured(tensor_parallel="2")]
    rows += [measured(hardware="h100-80gb-pcap"), measured(model="bloom-176b")]
    return write(tmp_path / "perf.csv", rows, SPLITWISE)


def test_a_file_of_several_deployments_is_read_one_at_a_time(perf_model):
    assert selections(perf_model) == ["bloom-176b/h100-80gb/8", "llama2-70b/h100-80gb/2", "llama2-70b/h100-80gb/8"]
    trace = read_trace(perf_model, "llama2-70b/*/8")
    assert trace.name == "perf#llama2-70b/h100-80gb/8"
    assert trace.rows_of_batches() == [[0, 1], [2]]
    assert trace.column("prompt_tokens").tolist() == [512] * 3
    first = trace.batches.to_pylist()[0]
    assert (first["prompt_seconds"], first["token_seconds"]) == (pytest.approx(0.1), pytest.approx(0.0205))
    assert first["makespan"] is None
    assert (first["peak_power"], first["average_power"]) == (0.9, None)
    assert trace.meta["engine"]["arguments"]["tensor_parallel_size"] == 8
    assert trace.meta["engine"]["arguments"]["max_num_batched_tokens"] == 1024


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (None, "holds several; name one.*bloom-176b/h100-80gb/8, llama2-70b/h100-80gb/2"),
        ("llama2-70b/*", "2 of its deployments fit 'llama2-70b/"),
        ("gpt/h100/8", "none of its deployments fit"),
        ("llama2-70b/h100-80gb-pcap/8", "is not measured"),
    ],
)
def test_a_selection_that_fits_none_or_several_lists_what_there_is(perf_model, selection, message):
    with pytest.raises(InputError, match=message):
        read_trace(perf_model, selection)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"prompt_time": "-1"}, "prompt_time"),
        ({"token_time": "soon"}, "token_time"),
        ({"token_time": "inf"}, "token_time"),
        ({"batch_size": "0"}, "batch_size"),
        ({"prompt_size": "1.5"}, "prompt_size"),
        ({"tensor_parallel": ""}, "tensor_parallel"),
        ({"model": "a/b"}, "model"),
        ({"average_power": "-2"}, "average_power"),
    ],
)
def test_a_measurement_that_cannot_be_used_is_named(tmp_path, change, field):
    path = write(tmp_path / "perf.csv", [measured(), measured(**change)], SPLITWISE)
    with pytest.raises(InputError) as caught:
        read_trace(path)
    assert (caught.value.file, caught.value.row, caught.value.field) == (path, 3, field)


def test_nothing_can_be_selected_in_a_file_of_one_trace(calls):
    with pytest.raises(InputError, match="#x selects nothing"):
        read_trace(calls, "x")


def test_batches_survive_saving_and_decide_the_digest(calls, tmp_path):
    trace = read_trace(calls)
    trace.save(tmp_path / "saved")
    again = read_trace(tmp_path / "saved")
    assert again.batches.equals(trace.batches)
    assert again.rows_of_batches() == trace.rows_of_batches()
    assert again.digest() == trace.digest()
    columns = trace.batches.to_pydict() | {"makespan": [1.0, None, 1.0]}
    assert replace(trace, batches=pa.table(columns, schema=BATCHES)).digest() != trace.digest()


@pytest.mark.parametrize(
    ("stem", "column", "values", "field"),
    [
        ("batches", "makespan", [1.0, -1.0, 2.0], "makespan"),
        ("batches", "start", [0.0, float("inf"), 2.0], "start"),
        ("requests", "batch", [0, 0, 1, 1, 7], "batch"),
        ("requests", "batch", [0, 0, 0, 0, 2], "batch"),
    ],
)
def test_a_saved_trace_whose_batches_contradict_themselves_is_refused(calls, tmp_path, stem, column, values, field):
    read_trace(calls).save(tmp_path / "saved")
    path = tmp_path / "saved" / f"{stem}.parquet"
    table = pq.read_table(path)
    place = table.column_names.index(column)
    pq.write_table(table.set_column(place, column, pa.array(values, table.schema.field(column).type)), path)
    with pytest.raises(InputError) as caught:
        read_trace(tmp_path / "saved")
    assert caught.value.field == field


def test_batches_are_replayed_one_by_one_on_an_idle_engine(calls, deployed):
    trace = read_trace(calls)
    replayed = replay(trace, deployed("engine.async_scheduling=true"), record_iterations=True)
    predicted = replayed.predicted
    # 10 ms an iteration, 1 us a token. The first request is scheduled alone and gets 5 tokens; the second begins an
    # iteration later and gets 9: 10 iterations of 30, 1 + 20 and 2 * 3 + 5 tokens.
    assert predicted.of_batches("makespan")[0] == pytest.approx(10 * 0.01 + (30 + 21 + 6 + 5) * 1e-6)
    assert predicted.of_batches("prompt_seconds")[0] == pytest.approx(2 * 0.01 + 51e-6)
    assert predicted.of_batches("token_seconds")[0] == pytest.approx(0.01 + 11e-6 / 8)
    # The skipped one has no prediction, the third begins where it was placed.
    assert predicted.batches.column("makespan").to_pylist()[1] is None
    assert predicted.column("first_token")[4] == pytest.approx(0.2505 + 0.01 + 7e-6)
    assert predicted.iterations.num_rows == 11
    assert predicted.iterations.column("requests").to_pylist()[-1] == [4]
    assert replayed.summary["requests"] == 3


def test_a_call_takes_its_own_time_beside_the_iterations(calls, deployed, tmp_path):
    from profiles.deployment import Facts, resolve
    from profiles.profile import load_profile

    trace = read_trace(calls)
    plain = replay(trace, deployed()).predicted.of_batches("makespan")
    text = deployed().loaded.profile.to_yaml() + "call: {per_call: 0.5, per_request: 0.125}\n"
    (tmp_path / "p.yaml").write_text(text)
    deployment = resolve(load_profile(str(tmp_path / "p.yaml")), Facts(model="nobody/knows-it"))
    assert replay(trace, deployment).predicted.of_batches("makespan")[[0, 2]] == pytest.approx(
        plain[[0, 2]] + [0.75, 0.625]
    )


def test_of_engines_other_than_vllm_the_whole_batch_is_scheduled_at_once(perf_model, deployed):
    trace = read_trace(perf_model, "llama2-70b/h100-80gb/8")
    settings = ("max_model_len=1024", "num_gpu_blocks=200", "max_num_batched_tokens=1024", "async_scheduling=false")
    predicted = replay(trace, deployed(*(f"engine.{one}" for one in settings))).predicted
    assert predicted.of_batches("prompt_seconds") == pytest.approx([0.01 + 1024e-6, 0.01 + 512e-6])
    assert predicted.of_batches("token_seconds")[0] == pytest.approx(0.01 + 2e-6)
