import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiles.errors import InputError
from replay.joining import join, role_of
from replay.readers import read_trace
from replay.trace import Trace, requests_table
from tests.synthetic import changed
from tests.vantages import ENGINE_BOOT, WALL, Client, engine, gauges

SEEDS = st.integers(0, 2**32 - 1)
ENGINE_COLUMNS = ("arrival", "queued", "scheduled", "first_token", "last_token", "prompt_tokens", "output_tokens")


@pytest.fixture(scope="module")
def run():
    """80 requests in some 10 s."""
    return engine()


@pytest.fixture(scope="module")
def long_run():
    """A load that rises and falls for five minutes: its requests in flight tell when it was."""
    return engine(seed=4, count=400, rate=1.5, outputs=(100, 900))


def described(trace, label):
    return next(one for one in trace.meta["joined"]["sources"] if one["label"] == label)


@settings(max_examples=40)
@given(
    SEEDS, st.floats(-1e5, 1e5), st.floats(-9e-5, 9e-5), st.floats(0, 0.02), st.floats(0, 0.02), st.floats(0.0001, 0.02)
)
def test_client_stamps_lie_within_the_error_of_the_truth(run, seed, offset, drift, way_in, way_out, jitter):
    random = np.random.default_rng(seed)
    client = Client(offset, drift, way_in, way_out, jitter)
    keep = np.sort(random.permutation(len(run))[: int(random.integers(40, 81))])
    seen = client.sees(run, random, keep=keep, order=random.permutation(len(keep)))
    joined = join([seen, run])
    stated = described(joined, "client.json")["offset"]
    assert stated["contradiction"] == 0
    for name, theirs in (("client_sent", "arrival"), ("client_first_token", "first_token")):
        truth = dict(zip(seen.ids, seen.column(theirs) * (1 + drift) + offset, strict=True))
        moved = dict(zip(joined.ids, joined.column(name), strict=True))
        apart = [abs(moved[f"cmpl-bench-3f2a9c01-{one}-0"] - time) for one, time in truth.items()]
        assert max(apart) <= stated["error"] + 1e-6
    # What only the engine saw has nothing of the client's.
    assert np.isnan(joined.column("client_sent")).sum() == len(run) - len(keep)


def test_engine_stamps_stay_as_they_are_and_both_views_are_kept(run):
    joined = join([Client().sees(run, np.random.default_rng(1)), run])
    for name in ENGINE_COLUMNS:
        assert np.array_equal(joined.column(name), run.column(name), equal_nan=True)
    assert joined.meta["vantage"] == "engine"
    assert joined.meta["columns"]["queued"] == "measured, recording.jsonl"
    assert joined.meta["columns"]["client_sent"].endswith("client.json")
    client_ttft = joined.column("client_first_token") - joined.column("client_sent")
    assert (client_ttft > joined.latency("ttft")).all()


def test_the_order_of_the_sources_does_not_matter(run):
    client = Client().sees(run, np.random.default_rng(1))
    log, *_ = gauges(run)
    one, other = join([client, run, log]), join([log, run, client])
    assert one.requests.equals(other.requests)
    assert one.meta == other.meta
    json.dumps(one.meta, allow_nan=False)


def test_the_front_end_s_share_is_the_clients_ttft_less_the_engines_whatever_the_clocks(run):
    shares = []
    for offset in (0.0, 4321.0):
        joined = join([Client(offset, 0.0, 0.004, 0.003, 0.0).sees(run, np.random.default_rng(1)), run])
        shares.append(joined.meta["joined"]["front_end"])
    for share in shares:
        assert share["ttft"]["requests"] == len(run)
        assert share["ttft"]["min"] == pytest.approx(0.007, abs=1e-6)
        assert share["ttft"]["max"] == pytest.approx(0.007, abs=1e-6)
        # Without jitter nothing tells how it divides: the middle, within the error.
        assert abs(share["to_engine"]["mean"] - 0.004) <= share["error"] + 1e-6
        assert abs(share["to_client"]["mean"] - 0.003) <= share["error"] + 1e-6


def test_the_clients_vantage_takes_its_stamps_and_keeps_the_engines_queue(run):
    client = Client().sees(run, np.random.default_rng(1))
    joined = join([client, run], "client")
    assert joined.meta["vantage"] == "client"
    # The offset cancels out of durations, and the engine's stamps remain on its own clock.
    assert joined.latency("ttft") == pytest.approx(client.latency("ttft"), abs=1e-9)
    assert joined.latency("e2e") == pytest.approx(client.latency("e2e"), abs=1e-9)
    assert np.array_equal(joined.column("scheduled"), run.column("scheduled"))


def test_a_client_without_send_times_gets_the_engines_arrivals(run):
    client = Client().sees(run, np.random.default_rng(1))
    sent = client.column("arrival")
    without = changed(
        client,
        arrival=None,
        first_token=client.column("first_token") - sent,
        last_token=client.column("last_token") - sent,
    )
    without = without.with_meta(clock={"kind": "request"})
    joined = join([without, run])
    assert np.array_equal(joined.column("arrival"), run.column("arrival"))
    assert joined.column("client_sent") == pytest.approx(run.column("arrival"))
    assert joined.column("client_first_token") - joined.column("client_sent") == pytest.approx(client.latency("ttft"))
    assert joined.meta["columns"]["client_sent"].startswith("reconstructed")
    assert joined.meta["joined"]["front_end"].keys() == {"ttft"}
    fewer = join([without, Trace(run.requests.slice(0, 70), run.meta)])
    assert len(fewer) == 70
    assert any("10 requests of client.json" in note and "left out" in note for note in fewer.meta["notes"])


def test_clocks_of_one_machine_are_recognised_and_exact(run):
    client = Client(offset=-40.0).sees(
        run, np.random.default_rng(1), clock={"kind": "run", "origin": ENGINE_BOOT - 40.0}
    )
    stated = described(join([client, run]), "client.json")["offset"]
    assert (stated["seconds"], stated["error"]) == (-40.0, 0.0)
    assert "one clock" in stated["why"]
    assert abs(stated["by_events"]["seconds"] + 40.0) <= stated["by_events"]["error"]


def test_times_of_day_of_two_machines_are_compared_and_keep_their_error(run):
    away = 0.0005
    at_engine = run.with_meta(clock={"kind": "run", "origin": WALL})
    client = Client(offset=away).sees(run, np.random.default_rng(1), clock={"kind": "run", "origin": WALL})
    stated = described(join([client, at_engine]), "client.json")["offset"]
    assert stated["seconds"] == 0.0
    assert away <= stated["error"] < 0.01
    assert "1970" in stated["why"]


def test_requests_that_only_one_source_saw_are_kept_and_said(run):
    client = Client().sees(run, np.random.default_rng(1), keep=np.arange(10, 80))
    failed = np.array(client.requests.column("status").to_pylist(), dtype=object)
    failed[-1] = "failed"
    client = changed(client, status=failed.tolist(), error=[None] * 69 + ["refused"])
    keep = list(range(0, 75))
    part = Trace(run.requests.take(keep), run.meta)
    joined = join([client, part])
    assert len(joined) == 80
    assert joined.ids[75:] == [str(one) for one in range(75, 80)]
    assert joined.statuses[75:].tolist() == ["unfinished"] * 4 + ["failed"]
    assert not np.isnan(joined.column("arrival")).any()
    assert np.isnan(joined.column("first_token")[75:]).all()
    notes = " ".join(joined.meta["notes"])
    assert "10 requests of recording.jsonl are not in client.json" in notes
    assert "5 requests of client.json are not in recording.jsonl" in notes
    mine = join([client, part], "client")
    assert mine.statuses[:10].tolist() == ["unfinished"] * 10
    assert not np.isnan(mine.column("arrival")).any()


def test_counts_facts_and_statuses_that_differ_are_conflicts_with_all_values(run):
    client = Client().sees(run, np.random.default_rng(1))
    outputs = client.column("output_tokens").astype(int)
    outputs[3] += 2
    client = changed(client, output_tokens=outputs.tolist())
    client = client.with_meta(
        model="other", engine={"name": "vllm", "version": "0.31.0", "arguments": {"max_num_seqs": "16"}}
    )
    log, *_ = gauges(
        run, engine={"name": "vllm", "version": "0.32.0", "arguments": {"max_num_seqs": 8, "num_gpu_blocks": 99}}
    )
    joined = join([client, run, log])
    conflicts = {one["what"]: one for one in joined.meta["joined"]["conflicts"]}
    assert conflicts.keys() == {"output_tokens", "model", "engine.version", "engine.max_num_seqs"}
    assert conflicts["model"]["values"] == {"recording.jsonl": "llama-3.2-1b", "client.json": "other"}
    assert conflicts["engine.max_num_seqs"]["values"] == {"recording.jsonl": 16, "server.log": 8}
    assert conflicts["output_tokens"]["requests"] == 1
    assert "request cmpl-bench-3f2a9c01-3-0" in conflicts["output_tokens"]["extent"]
    assert joined.column("output_tokens")[3] == run.column("output_tokens")[3]
    assert joined.meta["engine"] == {
        "name": "vllm",
        "version": "0.32.0",
        "arguments": {"max_num_seqs": 16, "num_gpu_blocks": 99},
    }


def test_start_up_facts_of_a_log_fill_what_the_client_does_not_say(run):
    client = Client().sees(run, np.random.default_rng(1))
    log, *_ = gauges(run)
    joined = join([client, log])
    assert joined.meta["vantage"] == "client"
    assert joined.meta["engine"]["version"] == "0.32.0"
    assert joined.meta["engine"]["arguments"] == {"num_gpu_blocks": 4000, "max_num_seqs": 16}
    assert np.array_equal(joined.column("arrival"), client.column("arrival"))


def test_metrics_are_believed_before_a_log(run):
    metrics = {"format": "vllm-prometheus", "files": [{"name": "metrics.prom", "sha256": "3" * 64}]}
    log, *_ = gauges(run)
    exact = gauges(run)[0].with_meta(source=metrics, engine={"name": "vllm", "arguments": {"num_gpu_blocks": 4001}})
    for order in ([run, log, exact], [exact, log, run]):
        joined = join(order)
        assert joined.meta["engine"]["arguments"]["num_gpu_blocks"] == 4001
        (conflict,) = joined.meta["joined"]["conflicts"]
        assert conflict["values"] == {"metrics.prom": 4001, "server.log": 4000}


@pytest.mark.parametrize("zone", [0.0, 3600.0, -5.5 * 3600])
def test_a_logs_gauges_are_placed_by_the_time_of_day_in_any_zone(long_run, zone):
    at = long_run.with_meta(clock={"kind": "run", "origin": ENGINE_BOOT, "origin_wall": WALL})
    log, *_ = gauges(long_run, zone=zone)
    joined = join([at, log])
    told = described(joined, "server.log")["timeline"]
    assert told["error"] == 0.5
    times = joined.timeline.column("time").to_numpy()
    # Truly at ...37 s past whole tens, told in whole seconds.
    truth = long_run.column("scheduled").min() - 30 + 0.37 + 10 * np.arange(200)
    assert all(np.abs(truth - time).min() <= 0.5 for time in times)
    assert ("zones are" in told["how"]) == (zone != 0)


def test_a_logs_local_time_without_a_year_is_placed_too(long_run):
    at = long_run.with_meta(clock={"kind": "run", "origin": ENGINE_BOOT, "origin_wall": WALL})
    log, *_ = gauges(long_run)
    times = log.timeline.column("time").to_numpy()
    since = log.timeline.set_column(0, "time", [(times - times[0]).tolist()]).cast(log.timeline.schema)
    # 1 760 000 000 is 2025-10-09 08:53:20 UTC.
    first = times[0] - WALL
    local = f"10-09 08:{53 + int((20 + first) // 60)}:{int((20 + first) % 60):02d}"
    log = replace(log, timeline=since).with_meta(clock={"kind": "run", "origin": None, "origin_local": local})
    placed = join([at, log]).timeline.column("time").to_numpy()
    # Two samples lie more than one before the run.
    assert placed[0] == pytest.approx(first + 20.5)


@pytest.mark.parametrize("seed", [4, 5, 6])
def test_a_logs_gauges_are_placed_by_the_requests_in_flight_without_a_common_clock(seed):
    run = engine(seed=seed, count=400, rate=1.5, outputs=(100, 900))
    log, *_ = gauges(run, origin=WALL + 12345.0)
    joined = join([run, log])
    told = described(joined, "server.log")["timeline"]
    assert told["how"] == "by the requests in flight"
    # Samples are told in whole seconds: their middle is 0.5 s later.
    assert abs(told["offset"] + WALL + 12345.0 - 0.5) <= told["error"]
    assert told["error"] < 10
    assert joined.timeline.num_rows == pytest.approx(run.column("last_token").max() / 10, abs=3)


def test_gauges_that_cannot_be_placed_are_left_out_and_said(run):
    idle, *_ = gauges(run)
    zeros = [0.0] * idle.timeline.num_rows
    idle = replace(idle, timeline=idle.timeline.set_column(1, "running", [zeros]).set_column(2, "waiting", [zeros]))
    joined = join([run, idle])
    assert joined.timeline is None
    assert described(joined, "server.log")["timeline"]["samples"] == 0
    assert any("cannot be placed" in note for note in joined.meta["notes"])


def test_scrapes_in_several_files_are_one_timeline(long_run):
    at = long_run.with_meta(clock={"kind": "run", "origin": ENGINE_BOOT, "origin_wall": WALL})
    whole = gauges(long_run, rounded=False)[0]
    parts = [replace(whole, timeline=whole.timeline.slice(start, 10)) for start in (10, 0, 20)]
    times = join([at, *parts]).timeline.column("time").to_numpy()
    assert (np.diff(times) > 0).all()
    assert len(times) > 20


def test_a_workload_gives_nominal_arrivals_and_prompt_hashes(run):
    wanted = run.column("arrival") - np.abs(np.random.default_rng(1).normal(0, 0.01, len(run))) + 500.0
    columns = {
        "id": [str(one) for one in range(len(run))],
        "status": ["ok"] * len(run),
        "nominal_arrival": wanted,
        "prompt_tokens": run.column("prompt_tokens").astype(int).tolist(),
        "output_tokens": run.column("output_tokens").astype(int).tolist(),
        "block_hashes": [[one] for one in range(len(run))],
    }
    workload = Trace(requests_table(columns, len(run)), {"name": "workload", "block_hash": {"block_size": 16}})
    assert role_of(workload) == "workload"
    joined = join([workload, run])
    assert joined.lists("block_hashes") == columns["block_hashes"]
    assert joined.meta["block_hash"] == {"block_size": 16}
    late = joined.column("arrival") - joined.column("nominal_arrival")
    assert late.min() == pytest.approx(0, abs=1e-6)
    assert late == pytest.approx(
        run.column("arrival") - wanted + 500 - (run.column("arrival") - wanted + 500).min(), abs=2e-6
    )
    assert described(joined, "workload")["offset"]["error"] is None


def test_two_engine_sources_fill_each_others_gaps(run):
    moved = {name: run.column(name) - 77.0 for name in ("arrival", "queued", "scheduled", "first_token", "last_token")}
    spans = changed(run, **moved, preemptions=None, cached_tokens=[3] * len(run))
    spans = spans.with_meta(source={"format": "otlp", "files": [{"name": "spans.json", "sha256": "4" * 64}]})
    bare = changed(run, queued=None, cached_tokens=None)
    joined = join([bare, spans])
    # The spans have more stamps: it is their clock, and the other one's counts.
    assert np.array_equal(joined.column("queued"), spans.column("queued"))
    assert np.array_equal(joined.column("preemptions"), run.column("preemptions"))
    assert (joined.column("cached_tokens") == 3).all()
    stated = described(joined, "recording.jsonl")["offset"]
    assert stated["seconds"] == pytest.approx(-77.0, abs=1e-5)
    assert stated["error"] < 1e-4


def test_stamps_of_another_witness_do_not_cross_the_engines_by_their_noise(run):
    noise = np.random.default_rng(1).uniform(-2e-4, 2e-4, len(run))
    names = ("arrival", "queued", "scheduled", "first_token", "last_token")
    spans = changed(run, **{name: run.column(name) + noise for name in names}, preemptions=None)
    spans = spans.with_meta(source={"format": "otlp", "files": [{"name": "spans.json", "sha256": "4" * 64}]})
    joined = join([replace(changed(run, scheduled=None), iterations=run.iterations), changed(spans, queued=None)])
    assert not np.isnan(joined.column("queued")).any()
    assert (joined.column("queued") <= joined.column("scheduled")).all()
    assert (joined.column("scheduled") <= joined.column("first_token")).all()
    assert np.abs(joined.column("scheduled") - run.column("scheduled")).max() < 1e-3


def test_other_runs_are_refused_by_name(run):
    with pytest.raises(InputError, match=r"client.json and recording.jsonl hold other requests"):
        join([Client().sees(engine(seed=9, ids="x{}"), np.random.default_rng(1), ids="request-{}y"), run])


def test_an_impossible_order_of_events_is_said_with_its_extent(run):
    client = Client().sees(run, np.random.default_rng(1))
    set_back = np.where((np.arange(len(run)) >= 5) & (np.arange(len(run)) < 40), 3.0, 0.0)
    moved = {name: client.column(name) - set_back for name in ("arrival", "first_token", "last_token")}
    client = changed(client, **moved)
    stated = described(join([client, run]), "client.json")["offset"]
    assert stated["contradiction"] > 1.0


def test_a_vantage_that_nobody_had_is_refused(run):
    with pytest.raises(InputError, match="there is client"):
        join([Client().sees(run, np.random.default_rng(1)), gauges(run)[0]], "engine")


def test_one_source_is_itself_and_none_is_refused(run):
    assert join([run]) is run
    with pytest.raises(InputError, match="nothing to join"):
        join([])


def test_a_joined_trace_is_read_back_as_it_was_written(run, tmp_path):
    client = Client().sees(run, np.random.default_rng(1))
    joined = join([client, run, gauges(run)[0]])
    joined.save(tmp_path / "joined")
    again = read_trace(tmp_path / "joined")
    assert again.requests.equals(joined.requests)
    assert again.meta == joined.meta


def test_real_engine_stamps_seen_through_a_client_with_delays(traces):
    """Real arrivals and latencies of a public run; the client's view of them is made, so that the truth is known."""
    run = read_trace(traces / "rtxpro6000-llama-3.1-8b")
    client = Client(offset=-7.25, drift=2e-5, way_in=0.001, way_out=0.0005, jitter=0.002)
    seen = client.sees(run, np.random.default_rng(3), ids="run-{}")
    joined = join([seen, run])
    stated = described(joined, "client.json")["offset"]
    truth = seen.column("first_token") * (1 + 2e-5) - 7.25
    order = np.array([run.ids.index(f"bench-{one.removeprefix('run-')}") for one in seen.ids])
    assert np.abs(joined.column("client_first_token")[order] - truth).max() <= stated["error"]
    assert stated["error"] < 0.004
