import json

import pytest

from calibrate.errors import compare
from replay.readers import read_trace


@pytest.fixture
def bench(bench_folder, tmp_path):
    return bench_folder().write(tmp_path / "run")


@pytest.fixture
def replayed(called):
    return lambda trace, *arguments: called("replay", trace, "--profile", "roofline:l4", *arguments)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_predicted_trace_pairs_every_measured_request(servecal, bench, tmp_path):
    finished = servecal("replay", bench, "--profile", "roofline:l4", "-o", "predicted")
    assert (finished.code, finished.err) == (0, "")
    assert finished.out.startswith("predicted: 6 requests, ")
    predicted, measured = read_trace(tmp_path / "predicted"), read_trace(bench)
    assert predicted.ids == measured.ids
    assert compare(measured, predicted).coverage["paired"] == 5
    assert predicted.meta["cold_start"]["request"] == "bench-0"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["predicted", "run"]


def test_two_runs_write_the_same_bytes(servecal, bench, tmp_path):
    for name, seed in (("one", 1), ("two", 2)):
        run = ("replay", bench, "--profile", "roofline:l4", "--iterations", "-o", name)
        assert servecal(*run, PYTHONHASHSEED=seed).code == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert set(contents(tmp_path / "one")) == {
        *("trace.json", "requests.parquet", "timeline.parquet", "iterations.parquet"),
    }


def test_json_is_the_summary_of_the_run(replayed, bench):
    document = replayed(bench, "-o", "predicted", "--format", "json", "--assume-defaults").json
    assert document["schema"] == "servecal.replay/1"
    assert (document["output"], document["requests"], document["left_out"]) == ("predicted", 6, 0)
    assert document["iterations"] > 0
    assert 0 < document["device_busy"] <= 1
    assert sum(document["component_seconds"].values()) == pytest.approx(
        document["device_busy"] * document["simulated_seconds"], rel=0.5
    )


def test_iterations_are_kept_when_asked_for(replayed, bench, tmp_path):
    replayed(bench, "-o", "without")
    summary = replayed(bench, "-o", "with", "--iterations", "--format", "json").json
    assert read_trace(tmp_path / "without").iterations is None
    assert read_trace(tmp_path / "with").iterations.num_rows == summary["iterations"]


def test_a_replay_over_an_older_replay_replaces_it(replayed, bench, tmp_path):
    replayed(bench, "-o", "predicted", "--iterations")
    assert replayed(bench, "-o", "predicted").code == 0
    assert read_trace(tmp_path / "predicted").iterations is None


def test_a_canonical_trace_is_not_replaced_by_its_prediction(replayed, bench, tmp_path):
    read_trace(bench).save(tmp_path / "measured")
    before = contents(tmp_path / "measured")
    replayed("measured", "-o", tmp_path / "measured").refused("measured", "is the trace itself")
    assert contents(tmp_path / "measured") == before


def test_a_source_folder_is_not_replaced_by_its_prediction(replayed, bench):
    before = contents(bench)
    replayed(bench / "requests.jsonl", "-o", bench).refused("run", "choose another folder")
    assert contents(bench) == before


def test_a_foreign_folder_is_left_alone(replayed, bench, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("words")
    replayed(bench, "-o", "thesis").refused("thesis", "'chapter.tex'", "choose another folder")
    assert contents(tmp_path / "thesis") == {"chapter.tex": b"words"}


def test_a_folder_that_cannot_be_written_is_named(replayed, bench, tmp_path):
    replayed(bench, "-o", "/proc/servecal/predicted").refused("/proc/servecal/predicted", "cannot be written")
    (tmp_path / "file").touch()
    replayed(bench, "-o", "file/predicted").refused("file/predicted", "cannot be written")


def test_a_prediction_can_be_replayed_and_reported_in_turn(called, replayed, bench, tmp_path):
    replayed(bench, "-o", "predicted")
    assert replayed("predicted", "-o", "again").code == 0
    assert read_trace(tmp_path / "again").ids == read_trace(bench).ids
    report = called("report", "predicted", "--profile", "roofline:l4", "--format", "json", "--no-cold-start").json
    assert report["coverage"]["paired"] == 6


def test_a_failed_replay_writes_nothing(replayed, bench, tmp_path):
    replayed(bench, "-o", "predicted", "--set", "engine.num_gpu_blocks=3").refused("KV blocks")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_bundled_captures_replay_without_network(called, tmp_path):
    captures = [row for row in called("traces", "list", "--format", "json").json["traces"] if row["bundled"]]
    assert captures
    for row in captures:
        run = ("replay", row["name"], "--profile", "vllm-cpu-llama-8x512", "-o", row["name"], "--format", "json")
        assert called(*run).json["requests"] == row["requests"]
        meta = json.loads((tmp_path / row["name"] / "trace.json").read_text())
        assert meta["name"].startswith(row["name"])
