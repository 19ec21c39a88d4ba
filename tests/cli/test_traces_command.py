import hashlib
import http.server
import json
import shutil
import threading
from functools import partial

import pytest
import yaml

from calibrate.cli.options import load_trace
from profiles.errors import InputError
from reference_traces.library import READABLE, Entry, captures, catalogue, fetch, find_entry, is_complete, locate
from reference_traces.library import WORKLOADS as WORKLOAD_FORMATS
from replay.readers import READERS, WORKLOADS

NAMES = [entry.name for entry in catalogue()]


def test_every_entry_is_pinned_to_a_commit_with_checksums_and_a_licence():
    assert len(NAMES) == len(set(NAMES)) > 10
    for entry in catalogue():
        assert entry.commit in entry.base_url
        assert len(entry.commit) == 40
        assert entry.base_url.startswith("https://")
        assert entry.licence
        assert entry.files
        assert len({file.name for file in entry.files}) == len(entry.files)


def test_list_names_every_capture_and_entry_with_its_licence(called):
    rows = called("traces", "list", "--format", "json").json
    assert rows["schema"] == "servecal.traces/1"
    assert [row["name"] for row in rows["traces"]] == [path.name for path in captures()] + NAMES
    assert {row["here"] for row in rows["traces"] if not row["bundled"]} == {False}
    text = called("traces", "list").out
    for row in rows["traces"]:
        assert f"{row['name']} " in text
        assert row["licence"] in text


def test_list_is_the_same_twice_and_goes_to_a_file_whole(servecal, tmp_path):
    printed = servecal("traces", "list")
    assert (printed.code, printed.err) == (0, "")
    assert servecal("traces", "list", "-o", "list.txt").out == ""
    assert (tmp_path / "list.txt").read_text() == printed.out


@pytest.mark.parametrize("name", [*NAMES, *(path.name for path in captures())])
def test_show_says_the_same_as_yaml_and_as_json(called, name):
    document = called("traces", "show", name, "--format", "json").json
    assert document["name"] == name
    assert yaml.safe_load(called("traces", "show", name).out) == document


@pytest.mark.parametrize("command", ["show", "fetch"])
@pytest.mark.parametrize("name", ["nothing", "../catalogue/azure-2023-code", "azure-2023-code.yaml", "", "a/b"])
def test_a_name_that_is_not_in_the_catalogue_is_refused(called, command, name):
    called("traces", command, name).refused(repr(name), "`servecal traces list`")


def test_a_trace_that_was_not_fetched_says_how_to_fetch_it(called):
    called("report", "rtxpro6000-llama-3.1-8b", "--profile", "roofline:l4").refused(
        "rtxpro6000-llama-3.1-8b", "`servecal traces fetch rtxpro6000-llama-3.1-8b`"
    )


def test_a_file_that_a_trace_has_not_is_refused_with_those_it_has(called):
    called("report", "rtxpro6000-llama-3.1-8b/x.json", "--profile", "roofline:l4").refused("x.json", "requests.jsonl")


def test_without_network_fetching_fails_and_leaves_nothing(servecal, tmp_path):
    finished = servecal("traces", "fetch", "splitwise-batches")
    assert (finished.code, finished.out) == (2, "")
    last = finished.err.splitlines()[-1]
    assert last.startswith("error: perf_model.csv: cannot be downloaded from https://")
    assert "Traceback" not in finished.err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_files_of_another_content_are_refused_and_kept(called, tmp_path):
    path = tmp_path / "cache" / "splitwise-batches" / "perf_model.csv"
    path.parent.mkdir(parents=True)
    path.write_text("model,hardware\n")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    called("traces", "fetch", "splitwise-batches").refused(str(path), digest, "remove it to download it anew")
    assert path.read_text() == "model,hardware\n"


def test_a_cache_that_is_no_folder_is_refused(called, tmp_path):
    (tmp_path / "cache").touch()
    finished = called("traces", "fetch", "splitwise-batches")
    assert finished.code == 2
    assert "cannot be downloaded" in finished.err.splitlines()[-1]


@pytest.mark.parametrize(
    "name", ["rtxpro6000-llama-3.1-8b", "splitwise-batches", "h100x8-llama-3.1-405b-fp8", "azure-2023-code"]
)
def test_files_that_are_there_are_checked_without_network(servecal, traces, name):
    finished = servecal("traces", "fetch", name, SERVECAL_TRACES=traces)
    assert (finished.code, finished.err) == (0, "")
    assert finished.out.startswith(f"{name}: ")
    assert str(traces) in finished.out


def test_list_says_which_traces_are_there(called, traces):
    rows = called("traces", "list", "--format", "json", SERVECAL_TRACES=traces).json["traces"]
    here = {row["name"] for row in rows if row["here"]}
    assert {"rtxpro6000-llama-3.1-8b", "splitwise-batches", "mooncake-conversation"} <= here
    assert "rtx4090-llama-3.1-8b" not in here


def test_a_file_that_was_tampered_with_is_refused(called, traces, tmp_path):
    source = traces / "rtxpro6000-llama-3.1-8b"
    shutil.copytree(source, tmp_path / "cache" / source.name)
    path = tmp_path / "cache" / source.name / "meta.json"
    path.chmod(0o644)
    path.write_text(path.read_text() + " ")
    called("traces", "fetch", source.name).refused(str(path), "has sha256", "the catalogue says")


class Served:
    """A server of files that counts what it was asked for."""

    def __init__(self, folder):
        self.requests = requests = []

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *_):
                requests.append(self.path)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An entry with two files, one in a sub-folder, on a server of our own."""
    (tmp_path / "site" / "raw" / "b").mkdir(parents=True)
    files = {"raw/a.csv": b"a\n1\n", "raw/b/c.json": b"{}\n"}
    for name, content in files.items():
        (tmp_path / "site" / name).write_bytes(content)
    served = Served(tmp_path / "site")
    listed = [
        {"name": name.removeprefix("raw/"), "path": name, "bytes": len(content), "sha256": sha256(content)}
        for name, content in files.items()
    ]
    document = find_entry("splitwise-batches").model_dump(by_alias=True)
    entry = Entry(**document | {"name": "ours", "base_url": served.url, "files": listed})
    monkeypatch.setenv("SERVECAL_TRACES", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield entry, served
    served.server.shutdown()
    served.server.server_close()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def test_fetching_downloads_each_file_once(site, tmp_path):
    entry, served = site
    assert not is_complete(entry)
    folder, unverified = fetch(entry)
    assert unverified == []
    assert folder == tmp_path / "cache" / "ours"
    assert (folder / "a.csv").read_bytes() == b"a\n1\n"
    assert (folder / "b" / "c.json").read_bytes() == b"{}\n"
    assert is_complete(entry)
    assert fetch(entry) == (folder, [])
    assert len(served.requests) == 2


def test_a_download_of_another_content_is_refused_and_not_kept(site, tmp_path):
    entry, _ = site
    (tmp_path / "site" / "raw" / "a.csv").write_bytes(b"something else\n")
    with pytest.raises(InputError, match=r"cannot be downloaded") as caught:
        fetch(entry)
    assert caught.value.file.name == "a.csv"
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_file_that_the_server_has_not_is_refused(site, tmp_path):
    entry, _ = site
    (tmp_path / "site" / "raw" / "b" / "c.json").unlink()
    with pytest.raises(InputError, match=r"cannot be downloaded from .*404"):
        fetch(entry)
    assert not is_complete(entry)


def test_a_path_wins_over_a_name(bench_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bench_folder().write(tmp_path / "azure-2023-code")
    assert locate("azure-2023-code").entry is None


def test_catalogue_arguments_fill_in_what_a_trace_does_not_say(called, traces):
    run = ("report", "rtxpro6000-llama-3.1-8b", "--profile", "roofline:rtx-pro-6000", "--format", "json")
    document = called(*run, SERVECAL_TRACES=traces).json
    assert document["trace"]["hardware"] == "rtx-pro-6000"
    assert document["trace"]["engine"]["arguments"]["max_num_seqs"] == 128
    assert json.dumps(document["profile"]["engine"]["arguments"]["max_num_batched_tokens"]) == "2048"


def test_every_format_that_is_called_readable_has_a_reader():
    assert set(READABLE) <= {reader.FORMAT for reader in READERS}
    assert {reader.FORMAT for reader in WORKLOADS} - {"vllm-timed-trace"} == set(WORKLOAD_FORMATS)


@pytest.mark.parametrize("name", [entry.name for entry in catalogue() if entry.format in WORKLOAD_FORMATS])
def test_catalogued_workloads_that_are_here_are_read_by_name(traces, monkeypatch, name):
    monkeypatch.setenv("SERVECAL_TRACES", str(traces))
    entry = find_entry(name)
    if not is_complete(entry):
        pytest.skip(f"{name} is not in {traces}")
    trace = load_trace(name)
    assert trace.name == name
    assert len(trace) == entry.requests
    assert trace.meta["source"]["format"] == entry.format
    assert [one["sha256"] for one in trace.meta["source"]["files"]] == [entry.files[0].sha256]
