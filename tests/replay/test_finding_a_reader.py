import os

import pytest

from profiles.errors import InputError
from replay.readers import read_trace


@pytest.mark.parametrize("name", ["missing", "missing/requests.jsonl", "missing.json"])
def test_a_path_that_is_not_there_is_named(tmp_path, name):
    with pytest.raises(InputError, match=r"no such file or folder") as caught:
        read_trace(tmp_path / name)
    assert caught.value.file == tmp_path / name


@pytest.mark.parametrize("name", ["run.json", "requests.jsonl", "trace.json", "data.parquet"])
def test_an_empty_file_is_called_empty(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"is empty") as caught:
        read_trace(tmp_path / name)
    assert caught.value.file == tmp_path / name


@pytest.mark.parametrize("name", ["run.json", "requests.jsonl", "trace.csv", "trace.parquet"])
@pytest.mark.parametrize(
    "content",
    [
        b"hello\n",
        b"{}",
        b"[]",
        b'{"schema": "servecal.trace/1"}',
        b'{"request_id": "a"}\n',
        bytes(range(256)) * 20,
        b"PAR1\x00\x00PAR1",
    ],
)
def test_a_file_of_an_unknown_format_is_refused_with_the_formats_that_are_read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=r"servecal, llmservingsim-bench, vllm-bench") as caught:
        read_trace(tmp_path / name)
    assert caught.value.file == tmp_path / name


def test_an_empty_folder_is_of_no_format(tmp_path):
    with pytest.raises(InputError, match=r"of no format that servecal reads"):
        read_trace(tmp_path)


@pytest.mark.parametrize("name", ["requests.jsonl", "trace.json"])
def test_a_folder_where_a_file_should_be_is_of_no_format(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=r"of no format that servecal reads"):
        read_trace(tmp_path)


def test_a_pipe_is_of_no_format_and_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(InputError):
        read_trace(tmp_path / "pipe.json")


def test_formats_are_told_by_content_not_by_name(bench_folder, serve_result, tmp_path):
    folder = bench_folder().write(tmp_path / "trace.json")
    assert read_trace(folder).meta["source"]["format"] == "llmservingsim-bench"
    path = serve_result().write(tmp_path / "anything.at-all")
    assert read_trace(path).meta["source"]["format"] == "vllm-bench"
    read_trace(path).save(tmp_path / "saved")
    assert read_trace(tmp_path / "saved").ids == read_trace(path).ids
    assert read_trace(tmp_path / "saved" / "trace.json").ids == read_trace(path).ids
