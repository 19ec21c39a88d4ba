"""Findings on real traces: what is true of them, and faults planted in them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from replay.arrivals import with_arrivals
from replay.quality import doubts, examine
from replay.readers import batch_files, read_trace, selections
from replay.trace import Trace

CAPTURES = Path(__file__).resolve().parents[2] / "reference_traces/captures"
ENGINES = ("rtxpro6000-llama-3.1-8b", "rtxpro6000-qwen3-32b-tp2", "rtxpro6000-qwen3-30b-a3b-dp2ep2")
MAIN = ENGINES[0]
STAMPS = ("queued", "scheduled", "first_token", "last_token")


def changed(trace: Trace, **columns) -> Trace:
    table = trace.requests
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        kind = table.schema.field(place).type
        values = [int(one) for one in values] if pa.types.is_integer(kind) else values
        table = table.set_column(place, table.schema.field(place), pa.array(values, kind, from_pandas=True))
    return replace(trace, requests=table, _columns={})


def a_part(count: int, share: int, seed: int) -> np.ndarray:
    rows = np.zeros(count, dtype=bool)
    rows[np.random.default_rng(seed).permutation(count)[: count // share]] = True
    return rows


def ids(trace: Trace, rows: np.ndarray) -> set[str]:
    return set(np.array(trace.ids)[rows])


def doubted(trace: Trace) -> dict[str, object]:
    return {one.check: one for one in doubts(examine(trace))}


@pytest.mark.parametrize("name", ENGINES)
def test_engine_traces_raise_no_doubt(traces, name):
    findings = examine(read_trace(traces / name))
    assert [one.check for one in findings] == ["repeated_prompts"]
    assert findings[0].severity == "info"
    assert 0.07 < findings[0].values["blocks_share"] < 0.09


@pytest.mark.parametrize("name", sorted(one.name for one in CAPTURES.glob("vllm-cpu-*")))
def test_captures_raise_no_doubt(name):
    assert doubted(read_trace(CAPTURES / name)) == {}


@pytest.mark.parametrize(("name", "silent"), [("qps16", 379), ("qps32", 378)])
def test_more_than_a_third_of_a_public_benchmark_is_silent(traces, name, silent):
    trace = read_trace(traces / "h100x8-llama-3.1-405b-fp8" / f"{name}.json")
    for one in (trace, with_arrivals(trace, "poisson:rate=16,seed=0")):
        found = doubted(one)
        assert set(found) == {"silent_requests"}
        assert found["silent_requests"].values["requests"] == silent


def test_batches_raise_no_doubt_unless_none_was_served(traces):
    files = batch_files(traces / "l4-llama-3.2-1b-batches")
    table = traces / "splitwise-batches/perf_model.csv"
    runs = [read_trace(one) for one in files] + [read_trace(table, one) for one in selections(table)]
    assert len(runs) > 40
    for run in runs:
        assert set(doubted(run)) == (set() if (run.statuses == "ok").any() else {"failed_requests"})


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("scale", [1.1, 0.9])
def test_a_third_of_output_lengths_re_tokenised(traces, name, scale):
    trace = read_trace(traces / name)
    wrong = a_part(len(trace), 3, seed=1)
    length = trace.column("output_tokens")
    found = doubted(changed(trace, output_tokens=np.where(wrong, np.round(length * scale), length)))
    assert set(found) == {"output_lengths", "token_totals"}
    named = set(found["output_lengths"].requests)
    assert len(named & ids(trace, wrong)) >= 95
    assert len(named - ids(trace, wrong)) <= 6
    assert found["output_lengths"].severity == "error"
    assert found["output_lengths"].values["by"] == pytest.approx(1 / scale - 1, abs=0.01)
    assert found["token_totals"].values["off"] == pytest.approx(3 / (2 + scale) - 1, abs=0.005)


def test_some_lengths_that_contradict_each_other(traces):
    """Too few to stand out, but proof: two of one iteration ended in the wrong order."""
    trace = changed(read_trace(traces / MAIN), preemptions=np.zeros(300))
    first = trace.column("first_token")
    pair = next(np.flatnonzero(first == one) for one in np.unique(first) if np.count_nonzero(first == one) == 2)
    length = trace.column("output_tokens").copy()
    length[pair] = length[pair][::-1]
    found = doubted(changed(trace, output_tokens=length))
    assert set(found) == {"output_lengths"}
    assert set(found["output_lengths"].requests) >= set(np.array(trace.ids)[pair])


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("shift", [0.5, -0.5])
def test_arrivals_of_a_tenth_shifted(traces, name, shift):
    trace = read_trace(traces / name)
    moved = a_part(len(trace), 10, seed=2)
    arrival = trace.column("arrival")
    found = doubted(changed(trace, arrival=np.where(moved, arrival + shift, arrival)))
    assert set(found) == {"shifted_arrivals"}
    assert found["shifted_arrivals"].severity == "error"
    assert set(found["shifted_arrivals"].requests) == ids(trace, moved)
    assert found["shifted_arrivals"].values["shift"] == pytest.approx(shift, abs=0.05)


@pytest.mark.parametrize("shift", [0.5, -0.5])
def test_arrivals_shifted_in_the_file_before_clocks_are_aligned(traces, tmp_path, shift):
    """The reader takes the smallest queued - arrival for the clocks' offset: all others seem late then."""
    folder = tmp_path / MAIN
    shutil.copytree(traces / MAIN, folder)
    rows = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    moved = a_part(len(rows), 10, seed=3)
    for row, is_moved in zip(rows, moved, strict=True):
        row["arrival_time"] += shift * bool(is_moved)
    (folder / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trace = read_trace(folder)
    assert set(doubted(trace)["shifted_arrivals"].requests) == ids(trace, moved)


def test_requests_left_out_of_a_real_run(traces):
    trace = read_trace(traces / MAIN)
    kept = np.flatnonzero(~a_part(len(trace), 10, seed=4))
    found = doubted(replace(trace, requests=trace.requests.take(pa.array(kept)), _columns={}))
    assert set(found) == {"littles_law", "token_totals"}
    assert found["littles_law"].values["told"] == pytest.approx(0.9 * found["littles_law"].values["counted"], rel=0.03)


def test_gauges_of_another_clock(traces):
    trace = read_trace(traces / MAIN)
    times = pa.array(trace.timeline.column("time").to_numpy() + 2.0)
    assert "littles_law" in doubted(replace(trace, timeline=trace.timeline.set_column(0, "time", times)))


def test_a_pause_of_a_real_engine(traces):
    """Everything after 30 s comes 4 s later: requests were decoding, so an engine would have given tokens."""
    trace = read_trace(traces / MAIN)

    def later(values: np.ndarray) -> np.ndarray:
        return np.where(values > 30, values + 4, values)

    stamps = {name: later(trace.column(name)) for name in ("nominal_arrival", "arrival", *STAMPS)}
    times = pa.array(later(trace.timeline.column("time").to_numpy()))
    found = doubted(replace(changed(trace, **stamps), timeline=trace.timeline.set_column(0, "time", times)))
    assert set(found) == {"work_conservation"}
    assert found["work_conservation"].values["longest"] == pytest.approx(4, abs=0.01)


@pytest.mark.parametrize("name", ["vllm-cpu-preemption", "vllm-cpu-shared-prefix", "vllm-cpu-shared-prefix-2"])
def test_iterations_missing_from_a_capture(name):
    trace = read_trace(CAPTURES / name)
    kept = np.ones(trace.iterations.num_rows, dtype=bool)
    kept[1000:1100] = False
    found = doubted(replace(trace, iterations=trace.iterations.filter(pa.array(kept))))
    assert found["work_conservation"].values["iterations"] < found["work_conservation"].values["output_tokens"]


def test_lengths_of_a_capture_against_its_iterations():
    trace = read_trace(CAPTURES / "vllm-cpu-shared-prefix")
    length = trace.column("output_tokens")
    wrong = np.arange(len(trace)) % 3 == 0
    found = doubted(changed(trace, output_tokens=np.where(wrong, np.round(1.1 * length), length)))
    assert set(found["work_conservation"].requests) == ids(trace, wrong & (np.round(1.1 * length) != length))
