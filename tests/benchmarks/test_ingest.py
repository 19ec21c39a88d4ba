"""Long workloads of every streamed form: rows a second of CPU time, and peak memory; short ones without
`--benchmark-enable`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

LEAST_RATE = 200_000
"""Rows per second of CPU time."""
MOST_ABOVE = 1.2
"""Bytes at the peak above those of an empty process, in bytes of the resulting table (and of a few blocks)."""
BLOCKS = 200e6
READ = """
import json, re, sys, time
from pathlib import Path
from replay.readers import read_trace, azure, mooncake
def peak():
    # Not ru_maxrss, which a process inherits from the one that started it.
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
empty, begun = peak(), time.process_time()
trace = read_trace(Path(sys.argv[1]))
seconds = time.process_time() - begun
print(json.dumps({"rows": len(trace), "seconds": seconds, "bytes": peak() - empty,
    "table": trace.requests.nbytes, "tokens": int(trace.column("prompt_tokens").sum())}))
"""


def azure(count: int, random: np.random.Generator) -> tuple[str, Callable[[int], str]]:
    times = np.datetime64("2024-05-12", "ns") + np.cumsum(random.integers(1, 10**8, count)).astype("timedelta64[ns]")
    text = np.char.replace(times.astype("datetime64[us]").astype(str), "T", " ")
    output = random.integers(1, 999, count)
    prompt = np.arange(count) % 8000 + 1
    return "TIMESTAMP,ContextTokens,GeneratedTokens\r\n", lambda i: f"{text[i]}0,{prompt[i]},{output[i]}\r\n"


def burstgpt(count: int, random: np.random.Generator) -> tuple[str, Callable[[int], str]]:
    header = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    return header, lambda i: f"{i // 3}.0,s{i // 5},3.0,ChatGPT,{i % 8000 + 1},18,{i % 8000 + 19},Conversation log\n"


def vidur(count: int, random: np.random.Generator) -> tuple[str, Callable[[int], str]]:
    return (
        "arrived_at,num_prefill_tokens,num_decode_tokens\n",
        lambda i: f"{i * 0.01:.6f},{i % 8000 + 1},{i % 300 + 1}\n",
    )


def mooncake(count: int, random: np.random.Generator) -> tuple[str, Callable[[int], str]]:
    def row(i: int) -> str:
        ids = [0, 1, *range(30 * i + 2, 30 * i + 30)][: -(-(i % 8000 + 1) // 512)]
        return f'{{"timestamp": {3 * i}, "input_length": {i % 8000 + 1}, "output_length": 300, "hash_ids": {ids}}}\n'

    return "", row


def bailian(count: int, random: np.random.Generator) -> tuple[str, Callable[[int], str]]:
    def row(i: int) -> str:
        tokens = i % 300 + 1
        turn = {"chat_id": i, "parent_chat_id": i - 1 if i % 4 else -1, "timestamp": i / 100, "input_length": tokens}
        ids = list(range(i, i - (-tokens // 16)))
        return json.dumps(turn | {"output_length": 9, "type": "text", "turn": 1, "hash_ids": ids}) + "\n"

    return "", row


FORMS = {"azure": azure, "burstgpt": burstgpt, "vidur": vidur, "mooncake": mooncake, "bailian": bailian}
LONG = {"azure": 5_000_000, "burstgpt": 5_000_000, "vidur": 5_000_000, "mooncake": 1_000_000, "bailian": 1_000_000}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is told by Linux only")
@pytest.mark.parametrize("form", FORMS)
def test_long_workloads_are_read_fast_and_in_bounded_memory(benchmark, form, tmp_path):
    count = LONG[form] if benchmark.enabled else 20_000
    header, row = FORMS[form](count, np.random.default_rng(0))
    path = tmp_path / "load"
    with path.open("w", newline="") as stream:
        stream.write(header)
        stream.writelines(row(i) for i in range(count))
    root = Path(__file__).resolve().parents[2]

    def read() -> dict[str, float]:
        run = subprocess.run(
            [sys.executable, "-c", READ, str(path)], cwd=root, capture_output=True, check=True, encoding="utf-8"
        )
        measured: dict[str, float] = json.loads(run.stdout)
        return measured

    measured = benchmark.pedantic(read, rounds=1)
    assert measured["rows"] == count
    assert measured["tokens"] == sum(i % (300 if form == "bailian" else 8000) + 1 for i in range(count))
    if benchmark.enabled:
        benchmark.extra_info |= {"rows_per_s": count / measured["seconds"], "peak_bytes": measured["bytes"]}
        print(
            f"\n{form}: {count / measured['seconds']:,.0f} rows/s, peak {measured['bytes'] / 1e6:,.0f} MB above empty,"
        )
        print(f"table {measured['table'] / 1e6:,.0f} MB, file {path.stat().st_size / 1e6:,.0f} MB")
        assert count / measured["seconds"] > LEAST_RATE
        assert measured["bytes"] < MOST_ABOVE * measured["table"] + BLOCKS
