"""Each file is known by exactly one reader, whatever it is called and however it is packed."""

import json
import os

import pytest

from profiles.errors import InputError
from replay.readers import READERS, read_trace

PACKED = ["plain", "gzip", "zstd"]
KINDS = [
    "sglang",
    "sglang-summary",
    "aiperf",
    "aiperf-raw",
    "guidellm",
    "guidellm-old",
    "inference-perf",
    "inference-perf-stage",
    "perf-analyzer",
    "llmperf",
    "llmservingsim-sim",
    "vllm",
    "vllm-sorted",
    "vllm-summary",
    "vllm-appended",
    "bench-requests",
    "batches",
    "splitwise",
    "levels-json",
    "levels-csv",
]


@pytest.fixture(scope="module")
def known(samples, serve_result, bench_folder):
    """Files of all formats that are one file."""
    run = serve_result().document
    arrays = ("input_lens", "output_lens", "ttfts", "itls", "start_times", "errors")
    summary = {key: value for key, value in run.items() if key not in arrays}
    level = {"rate": 2.0, "requests": 8, "prompt_tokens": 64, "output_tokens": 16, "mean_ttft": 0.05}
    rows = bench_folder().requests
    others = {
        "vllm": ("vllm-bench", json.dumps(run)),
        "vllm-sorted": ("vllm-bench", json.dumps({**run, "generated_texts": ["x" * 10**5] * 5}, sort_keys=True)),
        "vllm-summary": ("vllm-bench", json.dumps(summary, indent=1)),
        "vllm-appended": ("vllm-bench", f"{json.dumps(run)}\n{json.dumps(run)}\n"),
        "bench-requests": ("llmservingsim-bench", "".join(json.dumps(row) + "\n" for row in rows)),
        "batches": ("batches-csv", 'status,batch_size,input_lens,output_lens,batch_e2e_ms\nOK,1,"[3]","[2]",2.5\n'),
        "splitwise": (
            "splitwise-perf-model",
            "model,hardware,prompt_size,batch_size,token_size,prompt_time,token_time,tensor_parallel\n"
            "m,h,512,2,4,100.0,20.5,8\n",
        ),
        "levels-json": ("load-levels", json.dumps({"schema": "servecal.load-levels/1", "levels": [level]})),
        "levels-csv": ("load-levels", ",".join(level) + "\n" + ",".join(map(str, level.values())) + "\n"),
    }
    return samples | {kind: (name, text.encode()) for kind, (name, text) in others.items()}


@pytest.mark.parametrize("name", ["data", "requests.jsonl", "trace.json", "table.csv.gz"])
@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("kind", KINDS)
def test_exactly_one_reader_knows_a_file(known, packer, tmp_path, kind, packed, name):
    expected, content = known[kind]
    path = tmp_path / name
    path.write_bytes(packer[packed](content))
    assert [reader.FORMAT for reader in READERS if reader.detect(path)] == [expected]


@pytest.mark.parametrize("packed", ["gzip", "zstd"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "vllm-appended"])
def test_a_packed_file_reads_like_a_plain_one(known, packer, tmp_path, kind, packed):
    plain, compressed = tmp_path / "a", tmp_path / "b"
    plain.write_bytes(known[kind][1])
    compressed.write_bytes(packer[packed](known[kind][1]))
    one, other = read_trace(plain), read_trace(compressed)
    assert one.requests.equals(other.requests)
    assert {**one.meta, "name": "", "source": ""} == {**other.meta, "name": "", "source": ""}


@pytest.mark.parametrize("kind", KINDS)
def test_a_byte_order_mark_and_windows_line_ends_change_nothing(known, tmp_path, kind):
    expected, content = known[kind]
    plain, windows = tmp_path / "a", tmp_path / "b"
    plain.write_bytes(content)
    windows.write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"))
    assert [reader.FORMAT for reader in READERS if reader.detect(windows)] == [expected]
    if kind != "vllm-appended":
        assert read_trace(windows).requests.equals(read_trace(plain).requests)


@pytest.mark.parametrize("quoted", [kind for kind in KINDS if kind not in ("levels-csv", "batches", "splitwise")])
def test_a_text_that_quotes_another_format_is_not_taken_for_it(known, serve_result, tmp_path, quoted):
    run = serve_result().document
    text = known[quoted][1].decode()
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"generated_texts": [text] * len(run["ttfts"]), **run}))
    assert [reader.FORMAT for reader in READERS if reader.detect(path)] == ["vllm-bench"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_breaks_off_in_its_first_bytes_is_known_by_one_reader_at_most(known, tmp_path, kind):
    content = known[kind][1]
    path = tmp_path / "cut"
    for size in range(1, min(len(content), 400), 23):
        path.write_bytes(content[:size])
        assert len([reader for reader in READERS if reader.detect(path)]) <= 1, content[:size]


@pytest.mark.parametrize("packed", ["gzip", "zstd"])
def test_a_damaged_packed_file_is_called_damaged(known, packer, tmp_path, packed):
    path = tmp_path / "cut"
    path.write_bytes(packer[packed](known["aiperf"][1])[:-20])
    with pytest.raises(InputError, match=r"cannot be unpacked") as caught:
        read_trace(path)
    assert caught.value.file == path


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_called_so(known, tmp_path):
    path = tmp_path / "closed"
    path.write_bytes(known["aiperf"][1])
    path.chmod(0)
    with pytest.raises(InputError, match=r"cannot be read"):
        read_trace(path)
