"""The file: bounded memory, whole flushes, readable wherever it ends."""

import errno
import gzip
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from replay.recorder.writer import FORMAT, Writer

FIRST = {"format": FORMAT}


def records(path):
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def test_what_is_put_is_written_in_order(tmp_path):
    writer = Writer(tmp_path / "a", FIRST)
    for number in range(1000):
        writer.put(lambda number=number: {"n": number}, 1)
    writer.put(lambda: None, 1)
    writer.close({"end": 1})
    writer.close({"end": 2})
    assert records(tmp_path / "a") == [FIRST, *({"n": number} for number in range(1000)), {"end": 1}]


def test_a_flush_is_on_the_disk_without_a_close(tmp_path):
    writer = Writer(tmp_path / "a", FIRST, flush_seconds=0.02)
    writer.put(lambda: {"n": 1}, 1)
    end = time.monotonic() + 10
    while len(records(tmp_path / "a")) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    assert records(tmp_path / "a") == [FIRST, {"n": 1}]
    writer.close()


def test_what_does_not_fit_is_dropped_and_counted(tmp_path):
    writer = Writer(tmp_path / "a", FIRST, flush_seconds=3600, most_pending=10)
    for number in range(5):
        writer.put(lambda number=number: {"n": number}, 4)
    assert writer.dropped == 3
    writer.close()
    assert records(tmp_path / "a") == [FIRST, {"n": 0}, {"n": 1}, {"dropped": 3}]


def test_room_that_was_written_is_free_again(tmp_path):
    writer = Writer(tmp_path / "a", FIRST, flush_seconds=0.01, most_pending=10)
    for number in range(20):
        writer.put(lambda number=number: {"n": number}, 10)
        end = time.monotonic() + 10
        while writer._size and time.monotonic() < end:
            time.sleep(0.002)
    writer.close()
    assert writer.dropped == 0
    assert len(records(tmp_path / "a")) == 21


def test_a_record_that_fails_says_so_in_its_place(tmp_path):
    writer = Writer(tmp_path / "a", FIRST)
    writer.put(lambda: {"n": 1 / 0}, 1)
    writer.put(lambda: {"n": 2}, 1)
    writer.close()
    assert records(tmp_path / "a")[1:] == [{"failed": "ZeroDivisionError: division by zero"}, {"n": 2}]


def test_a_full_disk_costs_records_and_not_the_file(tmp_path, monkeypatch):
    writer = Writer(tmp_path / "a", FIRST, flush_seconds=3600)
    write, full = os.write, [True]

    def halved(file, data):
        if full[0] and len(data) > 1:
            return write(file, data[: len(data) // 2])
        if full[0]:
            raise OSError(errno.ENOSPC, "no space left on device")
        return write(file, data)

    monkeypatch.setattr("replay.recorder.writer.os.write", halved)
    writer.put(lambda: {"n": 1}, 1)
    writer._flush()
    full[0] = False
    writer.put(lambda: {"n": 2}, 1)
    writer.close()
    assert records(tmp_path / "a") == [FIRST, {"n": 2}, {"dropped": 1}]


def test_an_existing_file_is_not_touched(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(FileExistsError):
        Writer(tmp_path / "a", FIRST)
    assert (tmp_path / "a").read_text() == "mine"


def test_a_killed_process_leaves_what_it_flushed(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from replay.recorder.writer import Writer\n"
        f"writer = Writer(Path(sys.argv[1]), {FIRST!r}, flush_seconds=0.02)\n"
        "for n in range(10**9):\n"
        "    writer.put(lambda n=n: {'n': n}, 1); time.sleep(0.0005)\n"
        "    if n == 400: print('go', flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "a"], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"go\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
    found = []
    try:
        with gzip.open(tmp_path / "a") as stream:
            for line in stream:
                found.append(json.loads(line))
    except (EOFError, ValueError):  # at most the flush that was under way
        pass
    assert found[0] == FIRST
    assert [one["n"] for one in found[1:]] == list(range(len(found) - 1))
    assert len(found) > 400
