"""Findings of measured data: none on honest runs, the right one where a fault was planted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiles.deployment import Facts, resolve
from profiles.profile import load_profile
from replay.checks.step_clock import departures
from replay.golden_schedules import GoldenStepTime, read_golden
from replay.quality import MOST_IDS, SEVERITIES, doubts, examine
from replay.run import _IterationLog
from replay.trace import TIMELINE, Trace, requests_table
from simulator.engine import NS, Engine
from simulator.engine_config import resolve_engine_config
from simulator.request import Request, Status

SCHEDULES = Path(__file__).resolve().parents[1] / "conformance/schedules"
STATUS = {Status.FINISHED: "ok", Status.REJECTED: "failed", Status.ABORTED: "unfinished"}
ENGINE_STAMPS = ("queued", "scheduled", "first_token", "last_token")
SEEDS = st.integers(0, 10_000)
# Uneven numbers, so that stamps lie on no grid.
STEP = GoldenStepTime(7_013, 211, 17, 90_001)


def served(requests: list[Request], config, step_time) -> Trace:
    """A run of the simulated engine as a recorder inside it would have it, every iteration included."""
    log = _IterationLog(list(range(len(requests))))
    run = Engine(config, step_time).run(requests, observe=log.add, record_token_times=True)
    rows = run.served
    columns = {
        name: [None if getattr(one, name) is None else getattr(one, name) / NS for one in rows]
        for name in ENGINE_STAMPS
    }
    ended = [one.status is Status.FINISHED for one in rows]
    size = config.block_size
    columns |= {
        "id": [one.id for one in requests],
        "status": [STATUS[one.status] for one in rows],
        "arrival": [one.arrival for one in requests],
        "prompt_tokens": [one.prompt_tokens for one in requests],
        # vLLM ends a request at max_model_len, whatever was asked for.
        "output_tokens": [
            len(one.token_times) if end else request.output_tokens
            for one, request, end in zip(rows, requests, ended, strict=True)
        ],
        "token_times": [[time / NS for time in one.token_times or []] or None for one in rows],
        "preemptions": [one.num_preemptions for one in rows],
        "cached_tokens": [one.num_cached_tokens for one in rows],
        "block_hashes": [
            None if one.block_hashes is None else list(one.block_hashes)[: one.prompt_tokens // size]
            for one in requests
        ],
    }
    names = ("num_gpu_blocks", "block_size", "async_scheduling", "enable_prefix_caching")
    meta = {
        "name": "served",
        "clock": {"kind": "run"},
        "vantage": "engine",
        "warmed_up": True,
        "engine": {"name": "vllm", "arguments": {name: getattr(config, name) for name in names}},
        "block_hash": {"block_size": size},
    }
    return Trace(requests_table(columns, len(requests)), meta, iterations=log.table())


def recorded(seed: int, count: int = 80, gap: float = 0.02) -> Trace:
    """Poisson arrivals at a small engine, with lengths of a chat; the front end takes 1 to 3 ms."""
    random = np.random.default_rng(seed)
    arrival = np.cumsum(random.exponential(gap, count))
    prompts, outputs = random.integers(20, 400, count), random.integers(30, 120, count)
    arguments = {"max_num_seqs": 32, "max_num_batched_tokens": 512, "num_gpu_blocks": 4000, "max_model_len": 1024}
    config = resolve_engine_config({**arguments, "enable_prefix_caching": False}, version="0.19.0").config
    trace = served(
        [
            Request(f"r{row}", float(arrival[row]), int(prompts[row]), int(outputs[row]), 0, None)
            for row in range(count)
        ],
        config,
        STEP,
    )
    return changed(trace, arrival=np.minimum(arrival - random.uniform(0.001, 0.003, count), trace.column("queued")))


def stamped(seed: int, count: int = 80, gap: float = 0.02) -> Trace:
    """The same as vLLM's own statistics have it: stamps, no iterations, no token times."""
    trace = recorded(seed, count, gap)
    nothing = [None] * count
    return replace(changed(trace, token_times=nothing, preemptions=nothing, cached_tokens=nothing), iterations=None)


def seen_by_client(seed: int, count: int = 80) -> Trace:
    """The same as a client has it: when it sent, and every token."""
    trace = changed(recorded(seed, count), **{name: [None] * count for name in ("queued", "scheduled", "preemptions")})
    return replace(trace, iterations=None).with_meta(vantage="client")


def changed(trace: Trace, **columns) -> Trace:
    """The trace with other columns."""
    table = trace.requests
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        kind = table.schema.field(place).type
        listed = values.tolist() if isinstance(values, np.ndarray) else values
        if pa.types.is_integer(kind):
            listed = [None if one is None else int(one) for one in listed]
        table = table.set_column(place, table.schema.field(place), pa.array(listed, kind, from_pandas=True))
    return replace(trace, requests=table, _columns={})


def some_rows(trace: Trace, rows) -> Trace:
    return replace(trace, requests=trace.requests.take(pa.array(rows)), _columns={})


def a_part(seed: int, count: int, share: int) -> np.ndarray:
    """A mask of one request in ``share``."""
    rows = np.zeros(count, dtype=bool)
    rows[np.random.default_rng(seed + 1).permutation(count)[: count // share]] = True
    return rows


def ids(trace: Trace, rows: np.ndarray) -> set[str]:
    return set(np.array(trace.ids)[rows])


def doubted(trace: Trace) -> dict[str, object]:
    """By check, the last finding that is a doubt."""
    return {one.check: one for one in doubts(examine(trace))}


def gauges(trace: Trace, tick: float = 0.25) -> Trace:
    """The trace with what a logger inside the engine would have sampled."""
    end = float(trace.column("last_token").max())
    times = np.arange(1, int(end / tick) + 3) * tick
    queued, scheduled, last = (np.sort(trace.column(name)) for name in ("queued", "scheduled", "last_token"))
    began, left = (np.searchsorted(one, times, side="right") for one in (scheduled, last))
    tokens = np.sort(np.concatenate([one for one in trace.lists("token_times") if one]))
    produced = np.searchsorted(tokens, times, side="right")
    prompts = np.cumsum(trace.column("prompt_tokens")[np.argsort(trace.column("first_token"), kind="stable")])
    computed = np.concatenate([[0], prompts])[
        np.searchsorted(np.sort(trace.column("first_token")), times, side="right")
    ]
    columns = {
        "time": times,
        "running": began - left,
        "waiting": np.searchsorted(queued, times, side="right") - began,
        "prompt_throughput": np.diff(computed, prepend=0) / tick,
        "generation_throughput": np.diff(produced, prepend=0) / tick,
    }
    empty = np.full(times.size, np.nan)
    arrays = [pa.array(np.asarray(columns.get(one.name, empty), dtype=float), from_pandas=True) for one in TIMELINE]
    return replace(trace, timeline=pa.table(arrays, schema=TIMELINE))


@settings(max_examples=12)
@given(SEEDS)
def test_honest_runs_raise_no_doubt_whoever_recorded_them(seed):
    for trace in (recorded(seed), gauges(recorded(seed)), stamped(seed), seen_by_client(seed)):
        assert doubted(trace) == {}


@pytest.mark.parametrize("file", sorted(SCHEDULES.glob("*.json.gz")), ids=lambda file: file.name)
def test_schedules_of_vllm_itself_raise_no_doubt(file):
    """Preemptions, priorities, prefix hits, bursts, chunked and unchunked prompts: odd, but honest."""
    golden = read_golden(file)
    if len(golden.requests) > 500:
        pytest.skip("large: test_a_burst_is_no_copy has one of these")
    trace = served(golden.requests, golden.config, golden.step_time)
    untold = ["preemptions", "cached_tokens", "token_times"]
    engine = replace(changed(trace, **{name: [None] * len(trace) for name in untold}), iterations=None)
    # Clients that gave up, and a virtual clock that ticks in milliseconds, are what they are.
    true = {"unfinished_requests", "coarse_stamps"}
    for view in (trace, engine):
        assert set(doubted(view)) <= true


def test_a_burst_is_no_copy():
    """Requests sent together, served together, of equal lengths: many rows are equal in every stamp."""
    golden = read_golden(SCHEDULES / "burst-2000.json.gz")
    trace = served(golden.requests, golden.config, golden.step_time)
    assert (
        len({tuple(row.values()) for row in trace.requests.drop_columns(["id", "block_hashes"]).to_pylist()[:0]}) == 0
    )
    assert doubted(trace) == {}
    assert doubted(replace(changed(trace, token_times=[None] * len(trace)), iterations=None)) == {}


@settings(max_examples=12)
@given(SEEDS, st.sampled_from([0.85, 0.9, 1.1, 1.2, 1.3]))
def test_re_tokenised_lengths_are_found_and_named(seed, scale):
    trace = stamped(seed, count=150)
    wrong = a_part(seed, 150, 3)
    length = trace.column("output_tokens")
    found = doubted(changed(trace, output_tokens=np.where(wrong, np.round(length * scale), length)))
    assert "output_lengths" in found
    named = set(found["output_lengths"].requests)
    truth = ids(trace, wrong)
    assert len(named & truth) >= 0.9 * len(truth)
    assert len(named - truth) <= 0.1 * len(truth)
    assert found["output_lengths"].values["by"] == pytest.approx(1 / scale - 1, abs=0.03)


@settings(max_examples=6)
@given(SEEDS)
def test_lengths_that_iterations_deny_are_found(seed):
    trace = recorded(seed)
    length = trace.column("output_tokens")
    found = doubted(changed(trace, output_tokens=np.where(np.arange(80) == 7, length + 3, length)))
    assert found["work_conservation"].requests == ("r7",)
    found = doubted(changed(trace, output_tokens=np.where(np.arange(80) == 7, length - 3, length)))
    assert found["output_lengths"].requests == ("r7",)
    assert "more chunks than they have output tokens" in found["output_lengths"].sentence


@settings(max_examples=12)
@given(SEEDS, st.floats(0.3, 3.0), st.sampled_from([-1, 1]))
def test_shifted_arrivals_are_found_and_named(seed, shift, side):
    trace = stamped(seed)
    moved = a_part(seed, 80, 10)
    arrival = np.where(moved, trace.column("arrival") + side * shift, trace.column("arrival"))
    found = doubted(changed(trace, arrival=arrival))
    assert set(found) == {"shifted_arrivals"}
    assert found["shifted_arrivals"].severity == "error"
    assert set(found["shifted_arrivals"].requests) == ids(trace, moved)
    assert found["shifted_arrivals"].values["shift"] == pytest.approx(side * shift, abs=0.05)


@settings(max_examples=6)
@given(SEEDS, st.sampled_from([-0.02, 0.02]))
def test_clocks_that_drift_are_found(seed, rate):
    trace = stamped(seed, count=160, gap=0.05)
    arrival = trace.column("arrival")
    drifting = arrival - rate * arrival if rate > 0 else arrival + rate * (arrival.max() - arrival)
    found = doubted(changed(trace, arrival=drifting))
    assert found["clock_drift"].values["per_second"] == pytest.approx(abs(rate) * np.sign(rate), rel=0.3)


@settings(max_examples=6)
@given(SEEDS)
def test_late_clients_are_found(seed):
    trace = stamped(seed)
    arrival = trace.column("arrival")
    on_time = changed(trace, nominal_arrival=arrival - 0.0005)
    assert doubted(on_time) == {}
    assert set(doubted(changed(trace, nominal_arrival=0.5 * arrival))) == {"late_sends"}
    # Without queue stamps the plan tells which ones were moved.
    client = seen_by_client(seed)
    moved = a_part(seed, 80, 10)
    planned = np.where(moved, client.column("arrival") - 0.5, client.column("arrival"))
    found = doubted(changed(client, nominal_arrival=planned))
    assert set(found["shifted_arrivals"].requests) == ids(client, moved)


@settings(max_examples=6)
@given(SEEDS)
def test_requests_that_are_missing_or_stand_twice_break_littles_law(seed):
    trace = gauges(recorded(seed))
    few = some_rows(trace, np.flatnonzero(~a_part(seed, 80, 4)))
    found = doubted(replace(few, iterations=None))
    assert {"littles_law", "token_totals"} <= set(found)
    assert found["littles_law"].values["told"] < 0.9 * found["littles_law"].values["counted"]
    copies = changed(some_rows(trace, np.arange(20)), id=[f"copy-{row}" for row in range(20)])
    twice = replace(trace, requests=pa.concat_tables([trace.requests, copies.requests]), iterations=None, _columns={})
    assert doubted(twice)["identical_rows"].values["requests"] == 20


@pytest.mark.parametrize(("computed", "fine"), [(1.0, True), (0.75, True), (0.5, True), (0.4, False), (1.1, False)])
def test_prefix_cache_hits_may_be_left_out_of_the_gauges_prompt_tokens(computed, fine):
    """vLLM 0.16 and later count what was computed, earlier ones all."""
    trace = gauges(recorded(3))
    rates = trace.timeline.column("prompt_throughput").to_numpy() * computed
    place = trace.timeline.column_names.index("prompt_throughput")
    timeline = trace.timeline.set_column(place, "prompt_throughput", pa.array(rates))
    cached = np.floor(trace.column("prompt_tokens") / 2).astype(int).tolist()
    found = examine(replace(changed(trace, cached_tokens=cached), timeline=timeline, iterations=None))
    assert ("token_totals" not in {one.check for one in found}) == fine


def test_an_id_that_stands_twice_is_an_error():
    trace = recorded(0)
    found = doubted(changed(trace, id=["r1", *trace.ids[1:]]))
    assert found["duplicate_ids"].severity == "error"
    assert found["duplicate_ids"].requests == ("r1", "r1")


@settings(max_examples=6)
@given(SEEDS, st.floats(2.0, 10.0))
def test_an_engine_that_stood_still_is_found(seed, pause):
    """Everything after an iteration in the middle comes later, arrivals too: only the engine's silence tells."""
    trace = recorded(seed)
    start = trace.iterations.column("start").to_numpy()
    at = start[start.size // 2]

    def later(values):
        return None if values is None else np.where(np.asarray(values) >= at, np.asarray(values) + pause, values)

    stamps = {name: later(trace.column(name)) for name in ("arrival", *ENGINE_STAMPS)}
    times = [later(one).tolist() for one in trace.lists("token_times")]
    table = trace.iterations
    for name in ("start", "scheduled_at"):
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(place), pa.array(later(table.column(name).to_numpy())))
    stopped = replace(changed(trace, **stamps, token_times=times), iterations=table)
    assert doubted(stopped)["work_conservation"].values["longest"] == pytest.approx(pause, abs=0.05)
    for view in (gauges(stopped), stopped):
        found = doubted(changed(replace(view, iterations=None), token_times=times if view is stopped else [None] * 80))
        assert found["work_conservation"].values["longest"] == pytest.approx(pause, abs=0.6)


@settings(max_examples=6)
@given(SEEDS)
def test_a_run_that_was_cut_off_is_found(seed):
    trace = stamped(seed)
    first, last = trace.column("first_token"), trace.column("last_token")
    cut = float(np.quantile(last, 0.5))
    stamps = {name: np.where(trace.column(name) <= cut, trace.column(name), np.nan) for name in ENGINE_STAMPS}
    status = ["ok" if one <= cut else "unfinished" for one in last]
    assert {"truncated", "unfinished_requests"} <= set(doubted(changed(trace, **stamps, status=status)))
    # The same, if the recorder closed the requests that were running.
    running = (first < cut) & (last > cut)
    share = np.clip((cut - first) / np.maximum(last - first, 1e-9), 0, 1)
    length = trace.column("output_tokens")
    closed = changed(
        trace,
        last_token=np.where(running, cut, last),
        output_tokens=np.where(running, np.maximum(2, np.floor(1 + (length - 1) * share)), length),
    )
    found = doubted(some_rows(closed, np.flatnonzero(first < cut)))
    assert set(found["truncated"].requests) >= ids(trace, running)


def test_a_recording_that_stops_early_is_found():
    trace = recorded(1)
    found = doubted(replace(trace, iterations=trace.iterations.slice(0, trace.iterations.num_rows // 2)))
    assert "leave out" in found["truncated"].sentence
    sampled = gauges(stamped_with_tokens(1))
    found = doubted(replace(sampled, timeline=sampled.timeline.slice(0, sampled.timeline.num_rows // 2)))
    assert "gauges stop" in found["truncated"].sentence
    short = trace.with_meta(load={"num_prompts": 100})
    assert doubted(short)["truncated"].values == {"sent": 100.0, "held": 80.0}


def stamped_with_tokens(seed: int) -> Trace:
    return replace(recorded(seed), iterations=None)


@pytest.mark.parametrize("grid", [1.0, 0.1, 0.01])
def test_rounded_stamps_are_found(grid):
    trace = stamped(2)
    rounded = {name: np.round(trace.column(name) / grid) * grid for name in ("arrival", *ENGINE_STAMPS)}
    found = doubted(changed(trace, **rounded))
    assert found["coarse_stamps"].values["resolution"] == grid
    assert doubted(changed(trace, **{name: np.round(trace.column(name), 6) for name in rounded})) == {}


@settings(max_examples=6)
@given(SEEDS)
def test_stamps_that_are_not_the_engines_are_found(seed):
    trace = stamped(seed, count=400, gap=0.01)
    late = np.random.default_rng(seed).uniform(0, 0.005, (2, 400))
    smeared = changed(
        trace, first_token=trace.column("first_token") + late[0], last_token=trace.column("last_token") + late[1]
    )
    assert "smeared_stamps" in doubted(smeared)


@settings(max_examples=6)
@given(SEEDS)
def test_what_a_stream_does_to_tokens_is_found(seed):
    trace = seen_by_client(seed)
    times = trace.lists("token_times")
    length = trace.column("output_tokens")
    role = changed(trace, token_times=[[one[0] - 1e-4, *one] for one in times], output_tokens=length + 1)
    found = doubted(role)
    assert set(found) == {"empty_first_chunk"}
    assert found["empty_first_chunk"].values["requests"] == 80
    held_up = changed(
        trace, token_times=[[one[min(place | 3, len(one) - 1)] for place in range(len(one))] for one in times]
    )
    assert "token_bursts" in doubted(held_up)
    doubled = changed(trace, token_times=[sorted([*one, *(time + 1e-4 for time in one)]) for one in times])
    assert doubted(doubled)["output_lengths"].values["chunks_per_token"] == pytest.approx(2)
    joined = changed(trace, token_times=[one[::2] for one in times])
    assert "several_tokens_a_chunk" in doubted(joined)


def test_failed_silent_and_few_requests_are_told_with_their_share():
    trace = stamped(3)
    status = np.array(["ok"] * 80, dtype=object)
    status[:2] = "failed"
    status[2:10] = "silent"
    errors = ["Traceback:\nServerDisconnectedError"] + [None] * 79
    findings = {one.check: one for one in examine(changed(trace, status=status, error=errors))}
    assert findings["failed_requests"].severity == "info"
    assert findings["failed_requests"].sentence.endswith("the first error: ServerDisconnectedError")
    assert findings["silent_requests"].severity == "warning"
    assert findings["silent_requests"].values["share"] == 0.1
    assert doubted(changed(trace, status=["failed"] * 80))["failed_requests"].severity == "error"
    assert "few_requests" in doubted(some_rows(trace, np.arange(5)))


def test_impossible_lengths_are_found():
    trace = stamped(4)
    length = trace.column("output_tokens")
    found = doubted(changed(trace, output_tokens=np.where(np.arange(80) == 3, 1, length)))
    assert found["impossible_lengths"].requests == ("r3",)
    none = changed(trace, prompt_tokens=np.where(np.arange(80) == 3, 0, trace.column("prompt_tokens")))
    assert doubted(none)["impossible_lengths"].severity == "error"
    at_once = changed(trace, first_token=trace.column("last_token"))
    assert "several tokens at one instant" in doubted(at_once)["impossible_lengths"].sentence


def test_a_cold_first_request_is_told():
    trace = recorded(5, gap=3.0)
    prompt = trace.column("prompt_tokens").copy()
    prompt[0] = prompt.min()
    first = trace.column("first_token").copy()
    first[0] = trace.column("scheduled")[0] + 0.25
    cold = replace(changed(trace, prompt_tokens=prompt, first_token=first, token_times=[None] * 80), iterations=None)
    assert set(doubted(cold)) <= {"warm_up"}
    told = {one.check: one.severity for one in examine(cold)}
    assert told["warm_up"] == "warning"
    imposed = {one.check: one.severity for one in examine(cold.with_meta(warmed_up=False))}
    assert imposed["warm_up"] == "info"


def test_blocks_that_nobody_can_hold_are_found():
    trace = recorded(6)
    arguments = {**trace.meta["engine"]["arguments"], "num_gpu_blocks": 9000}
    found = doubted(trace.with_meta(engine={"name": "vllm", "arguments": arguments}))
    assert set(found) == {"kv_use"}


def test_more_under_way_than_the_client_allowed_is_found():
    assert (
        "max_concurrency" in doubted(seen_by_client(7).with_meta(load={"max_concurrency": 2}))["littles_law"].sentence
    )


def test_prompts_that_repeat_are_told():
    golden = read_golden(SCHEDULES / "duplicates-together.json.gz")
    trace = served(golden.requests, golden.config, golden.step_time)
    told = {one.check: one for one in examine(trace)}["repeated_prompts"]
    assert told.severity == "info"
    assert 0 < told.values["blocks_share"] < 1
    assert told.values["whole_prompts"] > 0


def test_prefix_hits_that_nobody_tells_are_found():
    """Some prompts are said to be of 5,000 tokens: by its datasheet an H100 takes 70 ms for each."""
    arguments = {"max_num_seqs": 32, "max_num_batched_tokens": 8192, "max_model_len": 8192, "num_gpu_blocks": 9000}
    deployment = resolve(load_profile("roofline:h100-sxm"), Facts("llama-3.1-8b", None, "0.19.0", arguments))
    trace = stamped(8)
    assert [one.check for one in doubts(examine(trace, deployment))] == []
    hit = a_part(8, 80, 4)
    longer = changed(trace, prompt_tokens=np.where(hit, 5000, trace.column("prompt_tokens")))
    found = {one.check: one for one in doubts(examine(longer, deployment))}
    assert set(found["hidden_prefix_hits"].requests) == ids(trace, hit)
    assert found["hidden_prefix_hits"].values["least_cached_share"] > 0.3


def test_findings_are_ordered_bounded_and_repeatable():
    trace = stamped(9, count=1500, gap=0.01)
    arrival = trace.column("arrival")
    bad = changed(
        trace, status=["silent"] * 1200 + ["ok"] * 300, arrival=np.where(np.arange(1500) % 10, arrival, arrival + 5)
    )
    findings = examine(bad)
    assert findings == examine(bad)
    levels = [SEVERITIES.index(one.severity) for one in findings]
    assert levels == sorted(levels, reverse=True)
    silent = next(one for one in findings if one.check == "silent_requests")
    assert len(silent.requests) == MOST_IDS
    assert silent.values["requests"] == 1200
    assert all(isinstance(value, float) for one in findings for value in one.values.values())


MAYBE = st.one_of(st.none(), st.sampled_from([0.0, 1.0, 1.5]), st.floats(0, 100))
ROW = st.fixed_dictionaries(
    {
        "status": st.sampled_from(["ok", "ok", "failed", "unfinished", "silent"]),
        "nominal_arrival": MAYBE,
        "arrival": MAYBE,
        "stamps": st.lists(MAYBE, min_size=4, max_size=4),
        "token_times": st.one_of(st.none(), st.lists(st.floats(0, 100), max_size=4).map(sorted)),
        "prompt_tokens": st.integers(0, 5000),
        "output_tokens": st.integers(0, 50),
        "preemptions": st.one_of(st.none(), st.integers(0, 2)),
        "block_hashes": st.one_of(st.none(), st.lists(st.integers(0, 3), max_size=3)),
    }
)


@pytest.mark.filterwarnings("error")
@settings(max_examples=200)
@given(st.lists(ROW, min_size=1, max_size=60), st.booleans(), st.booleans())
def test_any_trace_can_be_examined(rows, one_clock, with_tables):
    """Whatever is null, equal, reversed or empty: findings, no exception, only finite figures or none."""
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "stamps"}
    columns |= {name: [row["stamps"][place] for row in rows] for place, name in enumerate(ENGINE_STAMPS)}
    columns["id"] = [f"r{place}" for place in range(len(rows))]
    nothing = recorded(0, count=2)
    trace = Trace(
        requests_table(columns, len(rows)),
        {"name": "any", "clock": {"kind": "run" if one_clock else "request"}},
        iterations=nothing.iterations.slice(0, 0) if with_tables else None,
        timeline=gauges(nothing).timeline.slice(0, 1) if with_tables else None,
    )
    for one in examine(trace):
        assert one.severity in SEVERITIES
        assert one.sentence
        assert all(np.isfinite(value) for name, value in one.values.items() if name != "token")


@pytest.mark.filterwarnings("error")
@settings(max_examples=60)
@given(st.integers(40, 120), st.integers(1, 6), SEEDS)
def test_the_clock_of_iterations_stands_any_stamps(count, distinct, seed):
    """All at once, in a few waves, or without rhyme: a number for each, and no exception."""
    random = np.random.default_rng(seed)
    first = random.integers(0, distinct, count).astype(float)
    ratio, deviation = departures(first, first + random.integers(1, 4, count), random.integers(20, 99, count) - 1.0)
    assert ratio.shape == (count,)
    assert np.isfinite(ratio).all()
    assert deviation >= 0
