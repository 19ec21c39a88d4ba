"""What the recorder notes of a scheduler, read back by the reader."""

import gzip
import json
import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest

from replay.readers import read_trace
from replay.recorder import hashes
from replay.recorder.scheduler import TOKEN_IDS


def test_the_recorder_needs_the_standard_library_only():
    heavy = "numpy pyarrow pydantic click yaml rich scipy sklearn vllm torch"
    code = f"import sys, replay.recorder; print(sorted(set({heavy.split()!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_iteration_and_request_is_recorded(recorded, make_request):
    requests = [make_request("a", list(range(10))), make_request("b", list(range(10)), max_tokens=1, priority=2)]
    scheduler = recorded(requests)
    scheduler.shutdown()
    assert scheduler.closed
    trace = read_trace(recorded.folder)
    assert trace.ids == ["a", "b"]
    assert list(trace.statuses) == ["ok", "ok"]
    rows = trace.requests.to_pylist()
    assert [row["prompt_tokens"] for row in rows] == [10, 10]
    assert [row["output_tokens"] for row in rows] == [3, 1]
    assert [row["priority"] for row in rows] == [0, 2]
    # Two full blocks of the prompt; with its three tokens of output "a" fills a third.
    assert rows[0]["block_hashes"][:2] == rows[1]["block_hashes"]
    assert rows[0]["block_hashes"] == hashes.chain([*range(10), 7, 7], 4, hashes.salt())
    steps = trace.iterations.to_pylist()
    # 8 tokens a step: prompts of 10, then decodes; "b" has its one token in the third step.
    assert [(step["requests"], step["computed"], step["scheduled"]) for step in steps] == [
        ([0], [0], [8]),
        ([0, 1], [8, 0], [2, 6]),
        ([0, 1], [10, 6], [1, 4]),
        ([0], [11], [1]),
    ]
    assert [step["running"] for step in steps] == [2, 2, 2, 1]
    assert [step["free_blocks"] for step in steps] == [37, 34, 33, 36]
    for row in rows:
        assert row["arrival"] <= row["queued"] <= row["scheduled"] < row["first_token"] <= row["last_token"]
        assert len(row["token_times"]) == row["output_tokens"]
    assert trace.meta["engine"]["arguments"]["num_gpu_blocks"] == 40
    assert trace.meta["engine"]["version"] == "0.32.0"
    assert not any("end mark" in note for note in trace.meta["notes"])


@pytest.mark.parametrize("says", [True, False])
def test_preemptions_are_seen_whether_the_output_says_so_or_not(recorded, make_request, monkeypatch, says):
    monkeypatch.setattr(sys.modules["vllm.v1.core.sched.scheduler"].Scheduler, "says_preempted", says)
    recorded([make_request(name, [1, 2], max_tokens=6) for name in "ab"], preempt_at=2).shutdown()
    trace = read_trace(recorded.folder)
    assert list(trace.column("preemptions")) == [0, 1]
    assert [step["preempted"] for step in trace.iterations.to_pylist()].count([1]) == 1
    assert list(trace.column("output_tokens")) == [6, 6]


def test_an_abort_is_a_failed_request(recorded, make_request):
    recorded([make_request(name, [1, 2], max_tokens=6) for name in "ab"], abort_at=2).shutdown()
    trace = read_trace(recorded.folder)
    assert list(trace.statuses) == ["ok", "failed"]
    assert trace.requests.column("error").to_pylist() == [None, "aborted"]


def test_what_still_runs_is_unfinished(recorded, make_request):
    recorded([make_request("a", [1, 2], max_tokens=60), make_request("b", None)], steps=3).recorder.close()
    trace = read_trace(recorded.folder)
    assert list(trace.statuses) == ["unfinished", "unfinished"]
    assert trace.requests.column("last_token").to_pylist() == [None, None]


def test_the_loop_decides_which_scheduler_is_subclassed(recorded, make_request):
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    scheduler = recorded([make_request("a", [1])], async_scheduling=True)
    assert isinstance(scheduler, AsyncScheduler)
    assert not isinstance(recorded([make_request("a", [1])]), AsyncScheduler)


def test_token_ids_are_kept_only_if_asked(recorded, make_request, monkeypatch):
    recorded([make_request("a", [11, 22, 33])]).shutdown()
    (file,) = recorded.folder.iterdir()
    assert "token_ids" not in gzip.decompress(file.read_bytes()).decode()
    file.unlink()
    monkeypatch.setenv(TOKEN_IDS, "1")
    recorded([make_request("a", [11, 22, 33])]).shutdown()
    records = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
    assert records[1]["prompt_token_ids"] == [11, 22, 33]
    assert [one["token_ids"] for one in records if "token_ids" in one] == [[[0, [7]]]] * 3


def test_a_scheduler_that_cannot_be_noted_still_serves(recorded, make_request, caplog):
    broken = make_request("a", [1, 2])
    del broken.priority, broken.arrival_time
    with caplog.at_level(logging.WARNING):
        scheduler = recorded([broken, make_request("b", [1])])
    assert not scheduler.requests
    assert "recording ended" in caplog.text
    scheduler.shutdown()


def test_a_folder_that_cannot_be_made_does_not_stop_the_server(recorded, make_request, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SERVECAL_RECORDING", str(tmp_path / "file" / "below"))
    scheduler = recorded([make_request("a", [1])])
    assert not scheduler.requests
    scheduler.shutdown()


def test_ranks_are_files_of_one_run(recorded, make_request, make_config, monkeypatch):
    from replay.recorder import RecordingScheduler

    for rank in (0, 1):
        config = make_config()
        config.parallel_config.data_parallel_rank = rank
        scheduler = RecordingScheduler(vllm_config=config)
        scheduler.add_request(make_request(f"r{rank}", [1, 2]))
        while scheduler.requests:
            scheduler.update_from_output(scheduler.schedule(), None)
        scheduler.shutdown()
    assert [file.name.partition("-")[2].partition("-")[0] for file in sorted(recorded.folder.iterdir())] == [
        "dp0",
        "dp1",
    ]
    both = read_trace(recorded.folder)
    assert both.ids == ["r0", "r1"]
    assert both.iterations is None
    one = read_trace(recorded.folder, "dp1")
    assert one.ids == ["r1"]
    assert one.iterations.num_rows == 3


def test_hashes_tell_equal_prompts_and_no_more(make_request):
    tokens = list(range(12))
    key = hashes.salt()
    same = hashes.chain(tokens, 4, key)
    assert same == hashes.chain([*tokens, 99], 4, key)
    assert len(set(same)) == 3
    assert not set(same) & set(hashes.chain(tokens, 4, b"another key"))
    other = hashes.chain([*tokens[:4], 0, *tokens[5:]], 4, key)
    assert [a == b for a, b in zip(same, other, strict=True)] == [True, False, False]
    image = SimpleNamespace(mm_position=SimpleNamespace(offset=5, length=2), identifier="img")
    seen = hashes.chain(tokens, 4, key, hashes.extra_of(make_request("a", tokens, mm_features=[image])))
    assert [a == b for a, b in zip(same, seen, strict=True)] == [True, False, False]
    salted = hashes.chain(tokens, 4, key, hashes.extra_of(make_request("a", tokens, cache_salt="tenant")))
    adapted = make_request("a", tokens, lora_request=SimpleNamespace(lora_name="l"))
    assert not set(same) & (set(salted) | set(hashes.chain(tokens, 4, key, hashes.extra_of(adapted))))


def test_the_salt_is_of_the_environment_or_of_the_boot(monkeypatch):
    assert hashes.salt() == hashes.salt()
    monkeypatch.setenv(hashes.SALT, "one")
    first = hashes.salt()
    monkeypatch.setenv(hashes.SALT, "two")
    assert hashes.salt() != first
    assert len(first) <= 64
