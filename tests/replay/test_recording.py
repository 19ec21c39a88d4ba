"""Recordings as files: cut anywhere, damaged, of several processes; and the capture seen from both sides."""

import gzip
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiles.errors import InputError
from replay.readers import read_trace, recording

SERVED = Path(__file__).resolve().parents[2] / "reference_traces/captures/vllm-cpu-served"
HEADER = {
    "format": "servecal.recording/1",
    "run": "r",
    "rank": 0,
    "pid": 1,
    "engine": {"name": "vllm", "version": "0.32.0", "arguments": {"num_gpu_blocks": 9}},
    "loop": "synchronous",
    "model": "m",
    "machine": {"device": "cpu"},
    "clock": {"monotonic": 100.0, "wall": 1_700_000_100.0},
    "block_size": 4,
}


def request(handle, **changes):
    return {
        "request": handle,
        "id": f"q{handle}",
        "arrival": 1_700_000_100.0 + handle,
        "queued": 100.25 + handle,
        "prompt_tokens": 6,
        "max_tokens": 2,
        "priority": 0,
        "block_hashes": [5],
    } | changes


def step(at, handles, computed, scheduled, sampled, **changes):
    return {
        "scheduled_at": at,
        "update_at": at + 0.25,
        "end": at + 0.25,
        "requests": handles,
        "computed": computed,
        "scheduled": scheduled,
        "sampled": sampled,
        "running": len(handles),
        "waiting": 0,
        "free_blocks": 4,
    } | changes


RECORDS = [
    HEADER,
    request(0),
    step(100.5, [0], [0], [6], [1]),
    request(1),
    step(101.5, [0, 1], [6, 4], [1, 2], [1, 1], finished=[[0, "length"]]),
    step(102.0, [1], [6], [1], [1], finished=[[1, "stop"]]),
    {"end": 103.0, "idle_calls": 2, "noting_seconds": 3e-05},
]


def members(records):
    """One gzip member a record."""
    return [gzip.compress((json.dumps(one, separators=(",", ":")) + "\n").encode(), mtime=0) for one in records]


@pytest.fixture
def write(tmp_path):
    def written(records, name="engine-dp0-1.jsonl.gz"):
        path = tmp_path / "recording" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"".join(members(records)))
        return path

    return written


def test_a_recording_worked_out_by_hand(write):
    trace = read_trace(write(RECORDS))
    assert trace.requests.select(["id", "status", "arrival", "queued", "scheduled", "first_token"]).to_pylist() == [
        {"id": "q0", "status": "ok", "arrival": 0.0, "queued": 0.25, "scheduled": 0.5, "first_token": 0.75},
        {"id": "q1", "status": "ok", "arrival": 1.0, "queued": 1.25, "scheduled": 1.5, "first_token": 1.75},
    ]
    assert trace.lists("token_times") == [[0.75, 1.75], [1.75, 2.25]]
    assert list(trace.column("cached_tokens")) == [0, 4]
    assert trace.iterations.select(["start", "duration", "requests"]).to_pylist() == [
        {"start": 0.5, "duration": 0.25, "requests": [0]},
        {"start": 1.5, "duration": 0.25, "requests": [0, 1]},
        {"start": 2.0, "duration": 0.25, "requests": [1]},
    ]
    assert trace.timeline.to_pylist() == [
        {
            "time": time,
            "running": running,
            "waiting": 0.0,
            "kv_usage": 0.5,
            "prompt_throughput": prompts,
            "generation_throughput": tokens,
        }
        for time, running, prompts, tokens in ((1.0, 1.0, 6.0, 1.0), (2.0, 2.0, 6.0, 2.0), (3.0, 1.0, 0.0, 1.0))
    ]
    assert trace.meta["vantage"] == "engine"
    assert trace.meta["notes"] == ["Taking notes took 10 us an iteration in the engine's thread."]


def test_a_loop_that_schedules_ahead_starts_when_the_last_step_ends(write):
    ahead = [HEADER | {"loop": "asynchronous"}, request(0), step(100.5, [0], [0], [6], [1])]
    ahead.append(step(100.6, [0], [6], [1], [1], end=101.0))
    trace = read_trace(write(ahead))
    assert trace.iterations.column("scheduled_at").to_pylist() == [0.5, 0.6]
    assert trace.iterations.column("start").to_pylist() == [0.5, 0.75]
    assert trace.iterations.column("duration").to_pylist() == [0.25, 0.25]


def test_clocks_that_drift_are_followed_and_told(write):
    later = step(200.0, [0], [0], [6], [1], clock={"monotonic": 200.0, "wall": 1_700_000_200.5})
    trace = read_trace(write([HEADER, request(0), request(1, arrival=1_700_000_150.25, queued=150.0), later]))
    assert list(trace.column("arrival")) == pytest.approx([0, 50.00125], abs=1e-6)
    assert any("moved by 0.500 s" in note for note in trace.meta["notes"])


def test_the_prefix_cache_emptied_makes_equal_prompts_strangers(write):
    emptied = {"prefix_cache_reset": True, "at": 101.0}
    kept = {"prefix_cache_reset": False, "at": 101.0}
    hashes = read_trace(write([*RECORDS[:3], kept, *RECORDS[3:]])).lists("block_hashes")
    assert hashes == [[5], [5]]
    hashes = read_trace(write([*RECORDS[:3], emptied, *RECORDS[3:]])).lists("block_hashes")
    assert hashes[0] == [5]
    assert hashes[1] != [5]
    assert hashes[1][0] >= 0


def test_dropped_records_and_failures_are_told(write):
    records = [HEADER, *RECORDS[2:-1], {"dropped": 7}, {"failed": "KeyError: x"}, {"of a later version": 1}]
    trace = read_trace(write(records))
    assert trace.ids == ["unknown-0", "q1"]
    assert list(trace.statuses) == ["failed", "ok"]
    assert any(note.startswith("7 records were dropped") for note in trace.meta["notes"])
    assert any("KeyError: x" in note for note in trace.meta["notes"])


def test_an_id_that_is_used_again_stays_unique(write):
    again = [HEADER, *(request(handle, id="same") for handle in range(3)), request(3, id="same~2")]
    assert read_trace(write(again)).ids == ["same", "same~3", "same~4", "same~2"]


def test_the_engine_s_suffix_is_taken_off_only_if_all_have_it(write):
    names = ["a-0123abcd", "b-ffffffff"]
    assert read_trace(write([HEADER, *(request(n, id=one) for n, one in enumerate(names))])).ids == ["a", "b"]
    names[1] = "b"
    assert read_trace(write([HEADER, *(request(n, id=one) for n, one in enumerate(names))])).ids == names


@pytest.mark.parametrize("form", ["gzip", "plain", "one member"])
def test_any_packing_is_told_by_content(tmp_path, form):
    text = gzip.decompress(b"".join(members(RECORDS)))
    data = {"gzip": b"".join(members(RECORDS)), "plain": text, "one member": gzip.compress(text)}[form]
    path = tmp_path / "anything.bin"
    path.write_bytes(data)
    assert recording.detect(path)
    assert len(read_trace(path)) == 2


def test_several_runs_in_a_folder_must_be_chosen_from(write):
    write(RECORDS)
    folder = write([HEADER | {"run": "s", "pid": 2}, *RECORDS[1:]], "engine-dp0-2.jsonl.gz").parent
    assert recording.selections(folder) == ["r/dp0", "s/dp0"]
    with pytest.raises(InputError, match="several runs"):
        read_trace(folder)
    assert len(read_trace(folder, "s/dp0")) == 2
    with pytest.raises(InputError, match="holds no 'dp7'"):
        read_trace(folder, "dp7")


def attempt(path):
    """Return what is read if it can be saved too; None if it was refused in one printable line."""
    refusal = ""
    try:
        trace = read_trace(path)
        json.dumps(trace.meta, allow_nan=False)
        return trace
    except InputError as error:
        refusal = str(error)
    assert refusal.isprintable()
    assert len(refusal) < 1000
    return None


@pytest.mark.parametrize("whole", [True, False])
def test_cut_at_any_byte_every_whole_record_before_it_is_read(tmp_path, whole):
    """Flushes as the recorder makes them (a member a record here), and one member of everything."""
    parts = members(RECORDS) if whole else [gzip.compress(gzip.decompress(b"".join(members(RECORDS))))]
    data = b"".join(parts)
    ends = np.cumsum([len(one) for one in parts])
    path = tmp_path / "cut.jsonl.gz"
    for size in range(1, len(data)):
        path.write_bytes(data[:size])
        flushed = int(np.searchsorted(ends, size, side="right"))
        trace = attempt(path)
        if trace is None:  # no header, or no request yet
            assert flushed < 2
            continue
        steps = trace.iterations.num_rows if trace.iterations is not None else 0
        assert steps >= (sum("scheduled_at" in one for one in RECORDS[:flushed]) if whole else 0)
        # What is cut off may be the last member's check sum alone.
        told = any("no end mark" in note for note in trace.meta["notes"])
        assert told or (steps == 3 and size > len(data) - 10)


@settings(max_examples=100)
@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=6), st.booleans())
def test_damage_is_refused_in_one_line_or_gives_a_trace(tmp_path_factory, place, junk, packed):
    data = b"".join(members(RECORDS)) if packed else gzip.decompress(b"".join(members(RECORDS)))
    place %= len(data)
    path = tmp_path_factory.getbasetemp() / "damaged.jsonl"
    path.write_bytes(data[:place] + junk + data[place + len(junk) :])
    attempt(path)


JUNK = st.none() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=3) | st.lists(st.integers(-3, 9))


@settings(max_examples=120)
@given(st.integers(0, len(RECORDS) - 1), st.data())
def test_fields_of_other_kinds_are_named(tmp_path_factory, place, data):
    records = json.loads(json.dumps(RECORDS))
    key = data.draw(st.sampled_from(sorted(records[place])))
    if data.draw(st.booleans()):
        records[place][key] = data.draw(JUNK)
    else:
        del records[place][key]
    path = tmp_path_factory.getbasetemp() / "changed.jsonl"
    path.write_text("".join(json.dumps(one, separators=(",", ":")) + "\r\n" for one in records), encoding="utf-8")
    attempt(path)


@pytest.fixture(scope="module")
def both_sides():
    """The served capture as the engine and as the client saw it, rows in the client's order."""
    engine, client = read_trace(SERVED), read_trace(SERVED / "client.json")
    number = [int(re.search(r"-(\d+)-0$", one).group(1)) for one in engine.ids]
    assert sorted(number) == list(range(len(client)))
    return engine, client, np.argsort(number)


def test_engine_and_client_count_the_same_tokens(both_sides):
    engine, client, order = both_sides
    for name in ("prompt_tokens", "output_tokens"):
        np.testing.assert_array_equal(engine.column(name)[order], client.column(name))


def test_engine_and_client_agree_on_ttft_within_the_front_end_delay(both_sides):
    """What the client adds (sending, parsing, detokenising, streaming) is small, positive and alike."""
    engine, client, order = both_sides
    delay = client.latency("ttft") - engine.latency("ttft")[order]
    assert delay.min() > 0
    assert 0.002 < np.median(delay) < 0.006
    assert delay.max() < 0.015
    ends = client.latency("e2e") - engine.latency("e2e")[order]
    assert np.all((ends > 0) & (ends < 0.02))


def test_a_capture_cut_in_the_middle_is_read(tmp_path):
    (file,) = SERVED.glob("engine-dp*")
    half = tmp_path / file.name
    shutil.copy(file, half)
    with half.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)
    trace, whole = read_trace(half), read_trace(file)
    count = trace.iterations.num_rows
    assert 500 < count < whole.iterations.num_rows
    assert trace.iterations.select(["start", "requests"]).equals(whole.iterations.select(["start", "requests"])[:count])
    assert set(trace.statuses) <= {"ok", "unfinished"}
