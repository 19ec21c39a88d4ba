import json
import shutil
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from replay.readers import read_trace
from tests.vantages import Client, engine


@pytest.fixture(scope="module")
def served():
    """One real run of ``vllm serve`` under ``vllm bench serve``, captured from every side."""
    folder = Path(str(files("reference_traces"))) / "captures" / "vllm-cpu-served"
    if not (folder / "client.json").is_file():
        pytest.skip("no capture vllm-cpu-served")
    return folder


@pytest.fixture(scope="module")
def recording(served):
    return next(served.glob("engine-dp0-*.jsonl.gz"))


@pytest.fixture
def sources(tmp_path):
    """A simulated run as the engine and as a client saw it, in files."""
    run = engine()
    run.save(tmp_path / "engine")
    Client().sees(run, np.random.default_rng(1)).save(tmp_path / "client")
    return "engine", "client"


def test_all_sides_of_a_real_run_become_one_trace(servecal, served, recording, tmp_path):
    metrics = sorted(served.glob("metrics-*.prom"))[-1]
    every = (served / "client.json", recording, served / "server.log", metrics)
    done = servecal("ingest", *every, "-o", "joined")
    assert (done.code, done.err) == (0, "")
    trace, alone = read_trace(tmp_path / "joined"), read_trace(recording)
    assert len(trace) == len(alone) == 120
    assert trace.meta["engine"]["arguments"]["num_gpu_blocks"] == 4096
    for name in ("arrival", "queued", "scheduled", "first_token", "last_token", "output_tokens"):
        assert np.array_equal(trace.column(name), alone.column(name), equal_nan=True)
    assert "120 of 120 requests" in done.out
    assert "one clock: both count from a machine's start" in done.out
    assert "conflict: model: model (" in done.out
    assert "joined: 120 requests" in done.out


def test_client_and_recorder_agree_on_every_request_of_a_real_run(called, served, recording):
    document = called("ingest", served / "client.json", recording, "--format", "json").json
    assert document["schema"] == "servecal.ingest/1"
    conflicts = {one["what"] for one in document["joined"]["conflicts"]}
    assert conflicts == {"model"}  # a path, and the name under which it was served; no length differs
    shares = document["joined"]["front_end"]
    assert shares["ttft"]["requests"] == 120
    assert 0 < shares["to_engine"]["min"] < shares["to_engine"]["max"] < 0.1
    assert 0 < shares["to_client"]["min"] < shares["to_client"]["max"] < 0.1
    assert shares["ttft"]["mean"] == pytest.approx(shares["to_engine"]["mean"] + shares["to_client"]["mean"])
    # Both processes ran on one machine: what events alone tell must hold the true offset.
    offset = next(one for one in document["joined"]["sources"] if one["role"] == "client")["offset"]
    assert abs(offset["seconds"] - offset["by_events"]["seconds"]) <= offset["by_events"]["error"]


def test_a_real_log_is_placed_the_same_by_its_clock_and_by_the_requests_in_flight(called, served, recording):
    by_clock = called("ingest", recording, served / "server.log", "--format", "json").json["joined"]["sources"]
    by_load = called("ingest", served / "client.json", served / "server.log", "--format", "json").json["joined"][
        "sources"
    ]
    clock, load = (next(one for one in some if one["role"] == "facts")["timeline"] for some in (by_clock, by_load))
    assert "time of day" in clock["how"]
    assert load["how"] == "by the requests in flight"
    # The client's second 0 is its first sending, the recording's the first arrival, 2 ms later.
    assert abs(clock["offset"] - load["offset"]) <= clock["error"] + load["error"] + 0.01


def test_what_is_unknown_is_said_with_what_would_tell(called, served):
    told = called("ingest", served / "client.json", "--format", "json").json["unknown"]
    supply = {one["what"]: one["supply"] for one in told}
    assert "GPU KV cache size" in supply["engine.num_gpu_blocks"]
    assert "servecal record" in supply["queued, scheduled"]
    assert "non-default args" in supply["engine.max_num_seqs"]
    assert "token_times" not in supply
    assert "arrival" not in supply
    with_log = called("ingest", served / "client.json", served / "server.log", "--format", "json").json["unknown"]
    assert not {"engine.num_gpu_blocks", "engine.max_num_seqs", "engine.version", "timeline"} & {
        one["what"] for one in with_log
    }


def test_a_file_without_details_or_send_times_says_which_flags_it_lacks(called, serve_result, tmp_path):
    serve_result(start_times=False).write(tmp_path / "old.json")
    out = called("ingest", "old.json").out
    assert "arrival: when requests were sent must be drawn" in out
    assert "`vllm bench serve` 0.16 or later" in out


def test_text_and_json_say_the_same_and_twice_the_same(called, sources):
    first, again = called("ingest", *sources), called("ingest", *sources)
    assert first.out == again.out
    document = called("ingest", *sources, "--format", "json").json
    for one in document["unknown"]:
        assert f"  {one['what']}: {one['costs']}\n    {one['supply']}" in first.out
    for note in document["trace"]["notes"]:
        assert f"  {note}\n" in first.out
    assert document["output"] is None


def test_the_written_trace_is_the_same_to_the_byte(called, sources, tmp_path):
    for name in ("one", "two"):
        assert called("ingest", *sources, "-o", name).code == 0
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"trace.json", "requests.parquet"}
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_a_joined_trace_can_be_ingested_and_replayed(called, sources):
    assert called("ingest", *sources, "-o", "joined").code == 0
    assert "80 requests" in called("ingest", "joined").out
    done = called("replay", "joined", "--profile", "roofline:l4", "--assume-defaults", "-o", "predicted")
    assert (done.code, done.err) == (0, "")
    assert "80 requests" in done.out


def test_sources_joined_by_a_plus_are_taken_wherever_a_trace_is(called, sources):
    options = ("--profile", "roofline:l4", "--assume-defaults")
    joined = called("report", "engine+client", *options, "--format", "json")
    assert joined.code == 0, joined.err
    alone = called("report", "engine", *options, "--format", "json")
    assert joined.json["metrics"] == alone.json["metrics"]
    called("replay", "engine+client", *options, "-o", "client").refused("client", "is the trace itself")
    called("report", "engine+nothing", *options).refused("nothing", "no such file")


def test_the_vantage_decides_what_latencies_mean(called, sources, tmp_path):
    for vantage in ("engine", "client"):
        assert called("ingest", *sources, "--vantage", vantage, "-o", vantage[0]).code == 0
    inside, outside = read_trace(tmp_path / "e"), read_trace(tmp_path / "c")
    assert (outside.latency("ttft") > inside.latency("ttft")).all()
    assert np.array_equal(inside.column("client_first_token"), outside.column("client_first_token"))
    assert (inside.meta["vantage"], outside.meta["vantage"]) == ("engine", "client")


def test_strict_ends_with_2_after_all_output_where_sources_contradict(called, served, recording, tmp_path):
    done = called("ingest", served / "client.json", recording, "--strict", "-o", "joined")
    assert done.code == 2
    assert "conflict (model)" in done.err
    assert done.out
    assert (tmp_path / "joined" / "trace.json").is_file()


@pytest.mark.parametrize("output", ["engine", "folder", "client.json"])
def test_a_source_is_never_written_over(called, sources, serve_result, tmp_path, output):
    source = serve_result().write(tmp_path / "client.json")
    (tmp_path / "folder").mkdir()
    shutil.copy(source, tmp_path / "folder" / "client.json")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    name = {"engine": "engine", "folder": "folder/client.json", "client.json": "client.json"}[output]
    done = called("ingest", name, "-o", output)
    assert done.code == 2
    assert done.out == ""
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_sources_of_other_runs_are_refused_and_nothing_is_written(called, sources, serve_result, tmp_path):
    serve_result().write(tmp_path / "other.json")
    called("ingest", "engine", "other.json", "-o", "joined").refused("other.json", "hold other requests")
    assert not (tmp_path / "joined").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("nothing.json",), ("nothing.json", "no such file")),
        (("engine", "--vantage", "client"), ("--vantage", "there is engine")),
    ],
)
def test_bad_input_is_refused_in_one_line(called, sources, arguments, parts):
    called("ingest", *arguments, "-o", "joined").refused(*parts)


def test_foreign_names_steer_no_terminal(called, tmp_path, hostile):
    run = engine(count=20)
    run.with_meta(name=hostile, model=hostile, notes=[hostile]).save(tmp_path / "run")
    done = called("ingest", "run")
    assert done.code == 0
    assert all(one.isprintable() or one == "\n" for one in done.out)
    assert json.loads(called("ingest", "run", "--format", "json").out)["trace"]["model"] == hostile
