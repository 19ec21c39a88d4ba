import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from profiles.errors import InputError
from replay.readers import read_trace
from replay.trace import REQUESTS, Trace

FILES = {"trace.json", "requests.parquet", "timeline.parquet"}


@pytest.fixture
def trace(bench_folder, tmp_path):
    return read_trace(bench_folder().write(tmp_path / "source"))


@pytest.fixture
def saved(trace, tmp_path):
    trace.save(tmp_path / "saved")
    return tmp_path / "saved"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rewrite(folder, change, stem="requests"):
    path = folder / f"{stem}.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    return path


def with_column(name, values, kind=None):
    def change(table):
        return table.set_column(table.column_names.index(name), name, pa.array(values, type=kind))

    return change


def edit_meta(folder, **changes):
    path = folder / "trace.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, **changes}))
    return path


def test_what_is_saved_reads_back_equal(trace, saved):
    back = read_trace(saved)
    assert back.requests.equals(trace.requests)
    assert back.timeline.equals(trace.timeline)
    assert back.iterations is None
    assert back.meta == trace.meta
    assert back.digest() == trace.digest()


def test_a_client_side_trace_with_failures_reads_back_equal(serve_result, tmp_path):
    path = serve_result(start_times=False, failed=(1,), silent=(2,)).write(tmp_path / "run.json")
    trace = read_trace(path)
    trace.save(tmp_path / "saved")
    back = read_trace(tmp_path / "saved")
    assert back.requests.equals(trace.requests)
    assert (back.clock, back.meta) == ("request", trace.meta)


def test_saving_twice_gives_the_same_bytes(trace, saved, tmp_path):
    trace.save(tmp_path / "again")
    read_trace(saved).save(tmp_path / "third")
    assert set(contents(saved)) == FILES
    assert contents(tmp_path / "again") == contents(saved)
    assert contents(tmp_path / "third") == contents(saved)


def test_saving_over_an_older_trace_replaces_it_whole(trace, saved):
    replace(trace, timeline=None).save(saved)
    assert set(contents(saved)) == FILES - {"timeline.parquet"}


def test_parents_of_the_folder_are_made(trace, tmp_path):
    trace.save(tmp_path / "a" / "b" / "saved")
    assert len(read_trace(tmp_path / "a" / "b" / "saved")) == 6


def test_a_trace_can_be_saved_into_an_empty_folder_and_through_a_link(trace, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    trace.save(tmp_path / "link")
    trace.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert set(contents(tmp_path / "real")) == FILES


def test_a_foreign_folder_or_file_is_not_overwritten(trace, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("words")
    (tmp_path / "letter.txt").write_text("words")
    for target in (tmp_path / "thesis", tmp_path / "letter.txt"):
        with pytest.raises(InputError, match=r"choose another folder") as caught:
            trace.save(target)
        assert caught.value.file == target
    assert contents(tmp_path / "thesis") == {"chapter.tex": b"words"}
    assert (tmp_path / "letter.txt").read_text() == "words"


def test_foreign_files_beside_an_older_trace_are_not_deleted(trace, saved):
    (saved / "notes.md").write_text("words")
    before = contents(saved)
    with pytest.raises(InputError, match=r"notes\.md"):
        trace.save(saved)
    assert contents(saved) == before


@pytest.mark.parametrize("stage", ["first table", "second table", "moving in"])
def test_an_interrupted_save_leaves_what_was_there(trace, saved, tmp_path, monkeypatch, stage):
    before = contents(saved)
    written, moved = [], []

    def write_table(*arguments, **options):
        if len(written) == {"first table": 0, "second table": 1}.get(stage, 9):
            raise KeyboardInterrupt
        written.append(arguments)
        real_write(*arguments, **options)

    def move(self, target):
        if stage == "moving in" and Path(target) in targets and not moved:
            moved.append(target)
            raise KeyboardInterrupt
        return real_move(self, target)

    targets = (saved, tmp_path / "new")
    real_write, real_move = pq.write_table, Path.replace
    monkeypatch.setattr(pq, "write_table", write_table)
    monkeypatch.setattr(Path, "replace", move)
    for target in targets:
        written.clear()
        moved.clear()
        with pytest.raises(KeyboardInterrupt):
            trace.with_meta(name="other").save(target)
    monkeypatch.undo()
    assert contents(saved) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved", "source"]


def test_a_full_disk_is_an_error_about_the_folder_not_a_crash(trace, tmp_path, monkeypatch):
    def write_table(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", write_table)
    with pytest.raises(InputError, match=r"cannot be written: No space left on device") as caught:
        trace.save(tmp_path / "saved")
    assert caught.value.file == tmp_path / "saved"
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("target", ["file/trace", "/proc/servecal/trace"])
def test_a_folder_that_cannot_be_made_is_named(trace, tmp_path, target):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be written") as caught:
        trace.save(tmp_path / target)
    assert caught.value.file == tmp_path / target


def test_meta_with_a_number_that_json_does_not_have_is_not_saved(trace, tmp_path):
    with pytest.raises(InputError, match=r"finite"):
        trace.with_meta(load=float("nan")).save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_optional_columns_and_tables_may_be_absent(saved):
    rewrite(saved, lambda table: table.select(["id", "status", "arrival", "prompt_tokens", "output_tokens"]))
    (saved / "timeline.parquet").unlink()
    trace = read_trace(saved)
    assert trace.requests.schema == REQUESTS
    assert not trace.has("first_token")
    assert trace.timeline is None


def test_narrower_types_are_widened_and_further_columns_passed_over(saved, trace):
    def change(table):
        narrow = table.set_column(
            table.column_names.index("prompt_tokens"), "prompt_tokens", table["prompt_tokens"].cast(pa.int16())
        )
        coded = narrow.set_column(
            table.column_names.index("status"), "status", table["status"].combine_chunks().dictionary_encode()
        )
        return coded.append_column("colour", pa.array(["red"] * 6))

    rewrite(saved, change)
    assert read_trace(saved).requests.equals(trace.requests)


@pytest.mark.parametrize("name", ["id", "status", "prompt_tokens", "output_tokens"])
def test_a_missing_column_is_named_with_those_that_are_there(saved, name):
    path = rewrite(saved, lambda table: table.drop_columns([name]))
    with pytest.raises(InputError, match=r"is missing; there are .*arrival") as caught:
        read_trace(saved)
    assert (caught.value.file, caught.value.field) == (path, name)


@pytest.mark.parametrize(
    ("name", "values", "kind"),
    [
        ("prompt_tokens", ["many"] * 6, None),
        ("prompt_tokens", ["48"] * 6, None),
        ("prompt_tokens", [48.5] * 6, None),
        ("prompt_tokens", [True] * 6, None),
        ("prompt_tokens", [[48]] * 6, None),
        ("prompt_tokens", [2**64 - 1] * 6, pa.uint64()),
        ("prompt_tokens", [{"n": 48}] * 6, None),
        ("arrival", ["0.5"] * 6, None),
        ("arrival", [[0.5]] * 6, None),
        ("arrival", [b"0"] * 6, None),
        ("priority", [2**40] * 6, None),
        ("status", [1] * 6, None),
        ("status", [b"\xff\xfe"] * 6, None),
        ("id", [1.5] * 6, None),
        ("id", [b"\xff\xfe"] * 6, None),
        ("block_hashes", [1] * 6, None),
        ("block_hashes", [["a"]] * 6, None),
        ("token_times", [["1.0"]] * 6, None),
    ],
)
def test_a_column_of_the_wrong_type_is_refused_with_both_types(saved, name, values, kind):
    path = rewrite(saved, with_column(name, values, kind))
    with pytest.raises(InputError, match=r"expected .*, found ") as caught:
        read_trace(saved)
    assert (caught.value.file, caught.value.field) == (path, name)


def test_a_column_that_stands_twice_is_refused(saved):
    rewrite(saved, lambda table: table.append_column("arrival", pa.array([0.0] * 6)))
    with pytest.raises(InputError) as caught:
        read_trace(saved)
    assert caught.value.file == saved / "requests.parquet"


@pytest.mark.parametrize("status", ["OK", "", "done", None, "ok "])
def test_a_status_outside_the_vocabulary_is_refused(saved, status):
    path = rewrite(saved, with_column("status", ["ok", "ok", status, "ok", "ok", "ok"], pa.string()))
    with pytest.raises(InputError, match=r"expected one of ok, failed, unfinished, silent") as caught:
        read_trace(saved)
    assert (caught.value.file, caught.value.row, caught.value.field) == (path, "request 3", "status")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("id", "bench-1", "'bench-1' stands in rows 2 and 3"),
        ("id", None, "is missing"),
        ("prompt_tokens", 0, "expected at least 1 token; found 0"),
        ("prompt_tokens", -4, "expected at least 1 token; found -4"),
        ("prompt_tokens", None, "expected at least 1 token; found None"),
        ("output_tokens", 0, "expected at least 1 token; found 0"),
        ("output_tokens", 10**12, "expected fewer than 1e9 tokens"),
        ("output_tokens", 2**62 + 1, "expected fewer than 1e9 tokens"),
        ("arrival", float("inf"), "expected a time in seconds; found inf"),
        ("nominal_arrival", 1e300, "expected a time in seconds; found 1e+300"),
        ("queued", float("-inf"), "expected a time in seconds; found -inf"),
        ("first_token", -1.0, "lies before"),
        ("last_token", 0.0, "lies before first_token"),
        ("token_times", [1.0, None], "expected times in seconds"),
        ("token_times", [1.0, float("inf")], "expected times in seconds"),
        ("token_times", [1.0, 0.5], "run back"),
        ("block_hashes", [1, None], "expected hashes of at least 0"),
        ("block_hashes", [-1], "expected hashes of at least 0"),
    ],
)
def test_a_bad_value_is_refused_with_file_row_and_column(saved, name, value, message):
    def change(table):
        values = table.column(name).to_pylist()
        values[2] = value
        return with_column(name, values, table.schema.field(name).type)(table)

    path = rewrite(saved, change)
    with pytest.raises(InputError) as caught:
        read_trace(saved)
    assert (caught.value.file, caught.value.row, caught.value.field) == (path, "request 3", name)
    assert message in caught.value.message


def test_a_first_token_before_the_arrival_is_refused(saved):
    rewrite(saved, lambda table: table.drop_columns(["queued", "scheduled"]))
    rewrite(saved, with_column("arrival", [0.0, 0.125, 99.0, 0.375, 0.5, 0.625]))
    with pytest.raises(InputError, match=r"lies before the arrival") as caught:
        read_trace(saved)
    assert (caught.value.row, caught.value.field) == ("request 3", "first_token")


def test_text_that_is_no_utf8_is_refused(saved):
    lengths = pa.array(range(7), type=pa.int32()).buffers()[1]
    path = rewrite(
        saved, with_column("id", pa.Array.from_buffers(pa.string(), 6, [None, lengths, pa.py_buffer(b"abc\xffef")]))
    )
    with pytest.raises(InputError, match=r"UTF8") as caught:
        read_trace(saved)
    assert caught.value.file == path


def test_a_nan_is_a_value_that_was_not_measured(saved, trace):
    rewrite(saved, with_column("nominal_arrival", [float("nan")] * 6))
    assert not read_trace(saved).has("nominal_arrival")


def test_a_table_without_rows_holds_no_requests(saved):
    rewrite(saved, lambda table: table.slice(0, 0))
    with pytest.raises(InputError, match=r"holds no requests"):
        read_trace(saved)


@pytest.mark.parametrize("stem", ["requests", "timeline"])
@pytest.mark.parametrize("content", [b"", b"PAR1", b"id,status\n1,ok\n", bytes(1000)])
def test_a_file_that_is_no_parquet_is_named(saved, stem, content):
    path = saved / f"{stem}.parquet"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"is no Parquet") as caught:
        read_trace(saved)
    assert caught.value.file == path


def test_a_truncated_parquet_is_named(saved):
    path = saved / "requests.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"is no Parquet") as caught:
        read_trace(saved)
    assert caught.value.file == path


@pytest.mark.parametrize("schema", [None, "servecal.trace/2", 1])
def test_another_schema_is_refused(saved, schema):
    path = edit_meta(saved, schema=schema)
    with pytest.raises(InputError, match=r"expected 'servecal.trace/1', found") as caught:
        read_trace(saved)
    assert (caught.value.file, caught.value.field) == (path, "schema")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("clock", "run"),
        ("clock", {"kind": "wall"}),
        ("columns", ["arrival"]),
        ("engine", [1]),
        ("engine", {"name": "vllm", "version": 19, "arguments": {}}),
        ("engine", {"name": "vllm", "version": "0.19.0", "arguments": [1]}),
        ("model", 5),
        ("hardware", ["h100"]),
        ("model_config", "config.json"),
        ("notes", "one"),
        ("notes", [1]),
        ("name", {}),
        ("block_hash", 16),
        ("block_hash", None),
        ("block_hash", {"block_size": 0}),
        ("block_hash", {"block_size": -16}),
        ("block_hash", {"block_size": "16"}),
        ("source", 5),
    ],
)
def test_meta_of_the_wrong_type_is_refused(saved, field, value):
    path = edit_meta(saved, **{field: value})
    with pytest.raises(InputError) as caught:
        read_trace(saved)
    assert caught.value.file == path
    assert caught.value.field.startswith(field)


def test_meta_needs_nothing_but_the_schema(saved):
    rewrite(saved, lambda table: table.drop_columns(["block_hashes"]))
    (saved / "trace.json").write_text('{"schema": "servecal.trace/1"}')
    trace = read_trace(saved)
    assert (len(trace), trace.clock, trace.name) == (6, "run", "trace")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e400", "9" * 5000])
def test_meta_with_a_number_beyond_a_double_is_refused(saved, number):
    path = saved / "trace.json"
    path.write_text(path.read_text().replace('"origin": 5000.265625', f'"origin": {number}'))
    with pytest.raises(InputError) as caught:
        read_trace(saved)
    assert caught.value.file == path


def test_a_trace_made_in_memory_knows_what_it_lacks():
    table = pa.table({name: pa.nulls(1, REQUESTS.field(name).type) for name in REQUESTS.names}, schema=REQUESTS)
    trace = Trace(table, {})
    assert (len(trace), trace.clock, trace.has("arrival")) == (1, "run", False)
