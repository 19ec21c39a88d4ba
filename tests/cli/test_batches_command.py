"""Batches as a user names them: by catalogue, part of it, path, and file with selection."""

from __future__ import annotations

import pytest

L4 = "l4-llama-3.2-1b-batches"


@pytest.fixture
def command(servecal, traces):
    if not (traces / L4).is_dir() or not (traces / "splitwise-batches").is_dir():
        pytest.skip(f"no batches in {traces} (SERVECAL_TRACES)")
    return lambda *arguments: servecal(*arguments, SERVECAL_TRACES=traces)


def test_a_name_needs_no_suffix_and_a_path_in_the_cache_is_known(command, traces):
    by_name, by_file, by_path = (
        command("report", name, "--profile", "roofline:l4", "--format", "json")
        for name in (f"{L4}/static/bs4/cnn", f"{L4}/static/bs4/cnn.csv", traces / L4 / "static/bs4/cnn.csv")
    )
    assert by_name.code == 0, by_name.err
    assert by_name.out == by_file.out == by_path.out
    document = by_name.json
    assert document["trace"]["name"] == f"{L4}/static/bs4/cnn"
    assert document["trace"]["engine"]["version"] == "0.19.0"
    assert document["profile"]["engine"]["arguments"]["max_num_seqs"] == 4
    assert document["metrics"]["makespan"]["n"] == 50
    assert document["profile"]["call"] == {"per_call": 0.0, "per_request": 0.0}
    assert document["coverage"]["unsupported"]["ttft"]


def test_a_part_of_the_catalogue_or_its_folder_stands_for_its_files(command, traces, tmp_path):
    for name in (f"{L4}/static/bs1", traces / L4 / "static/bs1"):
        fitted = command("fit", name, "--base", "roofline:l4", "--holdout", "trace:*/cnn", "-o", "p.yaml")
        assert fitted.code == 0, fitted.err
        assert "held out, trace:*/cnn" in fitted.out
    profile = (tmp_path / "p.yaml").read_text()
    for data_set in ("arxiv", "cnn", "sharegpt", "writing_prompts"):
        assert f"{L4}/static/bs1/{data_set}" in profile
    command("report", f"{L4}/static", "--profile", "p.yaml").refused("holds 24 runs", f"{L4}/static/bs1/arxiv")
    command("fit", f"{L4}/dynamic", "--base", "roofline:l4", "-o", "p.yaml").refused("has no file 'dynamic'")
    command("fit", f"{L4}/static/bs1", "--base", "roofline:l4", "--holdout", "trace:x/*", "-o", "p.yaml").refused(
        "some, not all, of several traces", f"{L4}/static/bs1/arxiv"
    )


def test_deployments_of_one_file_are_selected_by_name_or_pattern(command, traces):
    path = traces / "splitwise-batches" / "perf_model.csv"
    options = ("--base", "roofline:h100-sxm", "--assume-defaults", "-o", "p.yaml", "--format", "json")
    fitted = command("fit", "splitwise-batches#llama2-70b/h100-80gb/[48]", *options)
    assert fitted.code == 0, fitted.err
    assert [one["name"] for one in fitted.json["traces"]] == [
        "splitwise-batches#llama2-70b/h100-80gb/4",
        "splitwise-batches#llama2-70b/h100-80gb/8",
    ]
    report = command("report", f"{path}#llama2-70b/h100-80gb/8", "--profile", "p.yaml", "--assume-defaults")
    assert report.code == 0, report.err
    assert "unknown engine" in report.out
    assert "prompt time" in report.out
    listed = "bloom-176b/a100-80gb/8, bloom-176b/h100-80gb/8, llama2-70b/a100-80gb/2"
    command("fit", path, *options).refused("holds several", listed)
    command("fit", f"{path}#gpt/h100/8", *options).refused("none of its deployments fit 'gpt/h100/8'", listed)
    command("fit", f"{path}#llama2-70b/h100-80gb-pcap/8", *options).refused("is not measured")
    command("fit", "splitwise-batches#llama2-70b/h100-80gb/8", *options[:2], "-o", "p.yaml").refused("engine.version")
