from dataclasses import replace as dataclass_replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiles.errors import InputError
from replay.readers import read_trace
from replay.run import replay
from replay.trace import TIMELINE

STAMPS = ("queued", "scheduled", "first_token", "last_token")
rows = st.fixed_dictionaries(
    {
        # Multiples of 1/512 s are whole nanoseconds.
        "arrival": st.integers(0, 400).map(lambda ticks: ticks / 512),
        "prompt": st.tuples(st.integers(1, 2), st.integers(0, 70), st.integers(1, 40)),
        "output": st.integers(1, 20),
    }
)
workloads = st.lists(rows, min_size=1, max_size=8)
engines = st.sampled_from([(), ("engine.async_scheduling=false",), ("engine.num_gpu_blocks=10",)])


def nanoseconds(trace, name):
    return [None if one is None else round(one * 1e9) for one in trace.requests.column(name).to_pylist()]


@given(workloads, engines)
def test_every_request_is_paired_and_served_to_its_last_token(deployed, made, workload, engine):
    trace = made(workload)
    predicted = replay(trace, deployed(*engine)).predicted
    assert predicted.ids == trace.ids
    assert predicted.statuses.tolist() == ["ok"] * len(trace)
    np.testing.assert_array_equal(predicted.column("arrival"), trace.column("arrival"))
    for before, after in zip(("arrival", *STAMPS), STAMPS, strict=False):
        assert (predicted.column(before) <= predicted.column(after)).all()
    assert (predicted.column("scheduled") < predicted.column("first_token")).all()
    for row, times in enumerate(predicted.lists("token_times")):
        assert len(times) == workload[row]["output"]
        assert times == sorted(times)
        assert (times[0], times[-1]) == (predicted.column("first_token")[row], predicted.column("last_token")[row])
    assert (predicted.column("cached_tokens") < trace.column("prompt_tokens")).all()


@given(workloads, engines, st.integers(1, 100_000))
def test_moving_all_arrivals_moves_all_stamps_and_nothing_else(deployed, made, workload, engine, seconds):
    deployment = deployed(*engine)
    still = replay(made(workload), deployment).predicted
    moved = replay(made([row | {"arrival": row["arrival"] + seconds} for row in workload]), deployment).predicted
    for name in ("arrival", *STAMPS):
        later = [one + seconds * 10**9 for one in nanoseconds(still, name)]
        # A double holds 1e5 s to 15 ps.
        assert nanoseconds(moved, name) == later
    for name in ("status", "cached_tokens", "preemptions"):
        assert moved.requests.column(name).equals(still.requests.column(name))


@given(st.lists(rows, min_size=1, max_size=8, unique_by=lambda row: row["arrival"]), st.randoms(), engines)
def test_the_order_of_the_rows_does_not_matter(deployed, made, workload, random, engine):
    workload = [row | {"id": str(index), "prompt": (*row["prompt"][:2], 1)} for index, row in enumerate(workload)]
    shuffled = random.sample(workload, len(workload))
    first, second = (
        replay(made(one), deployed(*engine)).predicted.requests.drop_columns(["block_hashes"]).sort_by("id")
        for one in (workload, shuffled)
    )
    assert first.equals(second)


@given(workloads, engines)
@settings(max_examples=20)
def test_same_input_gives_the_same_bytes(deployed, made, tmp_path_factory, workload, engine):
    folder = tmp_path_factory.mktemp("twice")
    for name in ("one", "two"):
        replay(made(workload), deployed(*engine), record_iterations=True).predicted.save(folder / name)
    for path in (folder / "one").iterdir():
        assert path.read_bytes() == (folder / "two" / path.name).read_bytes(), path.name


@given(workloads, engines)
def test_a_prediction_replayed_predicts_itself(deployed, made, workload, engine):
    deployment = deployed(*engine)
    trace = made(workload)
    first = replay(trace, deployment)
    columns = first.predicted.requests.drop_columns(["block_hashes"]).append_column(
        "block_hashes", trace.requests.column("block_hashes")
    )
    measured = dataclass_replace(trace, requests=columns, meta={**trace.meta, "warmed_up": False}, _columns={})
    second = replay(measured, deployment)
    assert second.predicted.meta["cold_start"] is None
    for name in STAMPS:
        assert nanoseconds(second.predicted, name) == nanoseconds(first.predicted, name)
    assert second.summary == first.summary


@given(workloads)
def test_iterations_compute_every_token_that_is_not_cached_once(deployed, made, workload):
    trace = made(workload)
    predicted = replay(trace, deployed("engine.num_gpu_blocks=500"), record_iterations=True).predicted
    computed = np.zeros(len(trace))
    for requests, scheduled in zip(
        predicted.iterations.column("requests").to_pylist(),
        predicted.iterations.column("scheduled").to_pylist(),
        strict=True,
    ):
        np.add.at(computed, requests, scheduled)
    total = trace.column("prompt_tokens") + trace.column("output_tokens") - 1
    np.testing.assert_array_equal(computed, total - predicted.column("cached_tokens"))


def test_a_lone_request_takes_one_iteration_a_token(deployed, made):
    summary = replay(made([{"arrival": 1.5, "prompt": (1, 0, 30), "output": 5}]), deployed()).summary
    assert summary["iterations"] == 5
    assert summary["simulated_seconds"] == pytest.approx(0.05 + 34e-6)
    assert summary["device_busy"] == 1.0


def test_shared_prefixes_are_found_at_any_block_size_that_the_hashes_can_become(deployed, made):
    shared = [{"arrival": float(index), "prompt": (1, 70, 10), "output": 2} for index in range(3)]
    cached = {
        size: replay(made(shared), deployed(f"engine.block_size={size}")).predicted.column("cached_tokens").tolist()
        for size in (8, 16, 32)
    }
    assert cached == {8: [0, 64, 64], 16: [0, 64, 64], 32: [0, 64, 64]}
    with pytest.raises(InputError, match=r"blocks of 16 tokens") as caught:
        replay(made(shared), deployed("engine.block_size=24"))
    assert caught.value.field == "engine.block_size"


def test_without_prefix_caching_nothing_is_cached(deployed, made):
    shared = [{"arrival": float(index), "prompt": (1, 70, 10), "output": 2} for index in range(3)]
    replayed = replay(made(shared), deployed("engine.enable_prefix_caching=false"))
    assert replayed.summary["cached_tokens"] == 0


def test_unknown_prompts_share_nothing_and_the_prediction_says_so(deployed, serve_result, tmp_path):
    trace = read_trace(serve_result().write(tmp_path / "run.json"))
    predicted = replay(trace, deployed("engine.num_gpu_blocks=100")).predicted
    assert any("prompt contents are unknown" in note for note in predicted.meta["notes"])


def test_failed_requests_and_those_without_arrival_are_left_out_and_counted(deployed, made):
    row = {"arrival": 0.0, "prompt": (1, 0, 20), "output": 3}
    trace = made([row, row | {"status": "failed"}, row | {"arrival": None}, row | {"output": None}, row])
    replayed = replay(trace, deployed())
    assert replayed.predicted.statuses.tolist() == ["ok", "failed", "failed", "failed", "ok"]
    assert replayed.predicted.requests.column("last_token").null_count == 3
    assert (replayed.summary["requests"], replayed.summary["left_out"]) == (2, 3)


def test_silent_and_unfinished_requests_load_the_engine(deployed, made):
    row = {"arrival": 0.0, "prompt": (1, 0, 64), "output": 1}
    alone = replay(made([row]), deployed()).predicted.column("first_token")[0]
    for status in ("silent", "unfinished"):
        crowded = replay(made([row | {"status": status}, row]), deployed()).predicted.column("first_token")[1]
        assert crowded > 1.5 * alone


def test_a_trace_of_which_nothing_can_be_replayed_is_refused(deployed, made):
    row = {"arrival": 0.0, "prompt": (1, 0, 20), "output": 3, "status": "failed"}
    with pytest.raises(InputError, match=r"made has no request that can be replayed"):
        replay(made([row, row]), deployed())


def test_a_request_too_large_for_the_cache_is_named(deployed, made):
    trace = made([{"id": "giant", "arrival": 0.0, "prompt": (1, 0, 400), "output": 3}])
    with pytest.raises(InputError, match=r"'giant' needs 26 KV blocks .* the cache has 23"):
        replay(trace, deployed())


def test_a_prompt_longer_than_the_model_is_rejected_not_served(deployed, made):
    row = {"arrival": 0.0, "prompt": (1, 0, 20), "output": 3}
    replayed = replay(made([row, row | {"prompt": (1, 0, 600)}]), deployed())
    assert replayed.predicted.statuses.tolist() == ["ok", "failed"]
    assert replayed.summary["rejected"] == 1


def test_gauges_are_sampled_at_the_measured_instants_and_zero_when_idle(deployed, made):
    sync = deployed("engine.async_scheduling=false")
    trace = made([{"arrival": 1.0, "prompt": (1, 0, 32), "output": 10}] * 6)
    times = [0.0, 1.005, 1.02, 9.0]
    empty = pa.nulls(4, pa.float64())
    timeline = pa.table([pa.array(times), *[empty] * 5], TIMELINE)
    predicted = replay(dataclass_replace(trace, timeline=timeline, _columns={}), sync).predicted.timeline
    assert predicted.column("time").to_pylist() == times
    assert predicted.column("running").to_pylist() == [0.0, 2.0, 4.0, 0.0]
    assert predicted.column("waiting").to_pylist() == [0.0, 4.0, 2.0, 0.0]
    usage = predicted.column("kv_usage").to_pylist()
    assert usage[0] == usage[3] == 0.0
    assert 0 < usage[1] < usage[2] < 1


def test_a_prediction_of_a_trace_that_says_nothing_of_its_clock_can_be_read_again(deployed, made, tmp_path):
    replay(made([{"arrival": 0.0, "prompt": (1, 0, 20), "output": 3}]), deployed()).predicted.save(tmp_path / "saved")
    assert read_trace(tmp_path / "saved").clock == "run"


def test_progress_counts_every_request_once(deployed, made):
    seen = []
    replay(made([{"arrival": 0.0, "prompt": (1, 0, 20), "output": 3}] * 9), deployed(), progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 9


def test_the_prediction_says_what_it_was_made_of(deployed, made):
    trace = made([{"arrival": 0.0, "prompt": (1, 0, 20), "output": 3}])
    deployment = deployed("engine.max_num_seqs=3")
    meta = replay(trace, deployment).predicted.meta
    assert meta["source"] == {
        "format": "servecal-replay",
        "trace": trace.digest(),
        "profile": deployment.loaded.digest,
    }
    assert meta["engine"]["arguments"]["max_num_seqs"] == 3
    assert meta["engine"]["version"] == "0.19"
