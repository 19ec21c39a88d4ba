"""``servecal workload``, and what other commands do with a workload."""

import json

import pytest

from replay.readers import read_trace

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:17:{second:02d}.5000000,{100 + second},{1 + second}\n" for second in range(10)
)
ENGINE = ("--model", "llama-3.1-8b", "--assume-defaults")


@pytest.fixture
def azure(tmp_path):
    (tmp_path / "load.csv").write_text(AZURE)
    return "load.csv"


def steps(folder):
    return json.loads((folder / "trace.json").read_text())["provenance"]


def test_steps_follow_one_another_and_are_kept_with_their_arguments(called, azure, tmp_path):
    for arguments in (
        ("cut", azure, "--start", 2, "--first", 6, "-o", "a"),
        ("shift", "a", "--to", 0, "-o", "b"),
        ("scale", "b", "--rate", 4, "-o", "c"),
        ("sample", "c", "--count", 4, "--seed", 3, "-o", "d"),
        ("lengths", "d", "--prompt", f"trace:{azure}", "--output-tokens", "fixed:5", "-o", "e"),
        ("prefixes", "e", "--tokens", 64, "--groups", 2, "-o", "f"),
        ("redraw", "f", "--arrivals", "gamma:rate=2,seed=1,burstiness=0.5", "-o", "g"),
        ("merge", "g", "b", "-o", "h"),
    ):
        finished = called("workload", *arguments)
        assert (finished.code, finished.err) == (0, "")
        assert finished.out.startswith(f"{arguments[-1]}: ")
    assert [step["step"] for step in steps(tmp_path / "g")] == [
        "cut",
        "shift",
        "scale",
        "sample",
        "lengths",
        "prefixes",
        "redraw",
    ]
    assert steps(tmp_path / "g")[3] == {"step": "sample", "count": 4, "by": "request", "seed": 3}
    merged = read_trace(tmp_path / "h")
    assert len(merged) == 4 + 6
    assert [one["name"] for one in steps(tmp_path / "h")[0]["traces"]] == ["load", "load"]


def test_the_same_command_writes_the_same_bytes(called, tmp_path):
    make = ("make", "--requests", 20, "--arrivals", "poisson:rate=4,seed=1", "--prompt", "lognormal:mean=99,std=30")
    for name in ("one", "two"):
        assert called("workload", *make, "--output-tokens", "uniform:low=1,high=9", "-o", name).code == 0
    for file in ("trace.json", "requests.parquet"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_workload_is_replayed_with_any_profile_and_other_arrivals(called, azure, tmp_path):
    run = ("--profile", "roofline:h100-sxm", *ENGINE)
    assert called("replay", azure, *run, "-o", "out").code == 0
    predicted = read_trace(tmp_path / "out")
    assert predicted.column("arrival").tolist() == [float(second) for second in range(10)]
    assert (predicted.latency("e2e") > 0).all()
    assert called("replay", azure, *run, "--arrivals", "constant:rate=100", "-o", "fast").code == 0
    assert read_trace(tmp_path / "fast").column("arrival").tolist() == pytest.approx([i / 100 for i in range(10)])


def test_there_is_nothing_to_compare_a_workload_with(called, azure, tmp_path):
    for command in (
        ("report", azure, "--profile", "roofline:h100-sxm", *ENGINE),
        ("fit", azure, "--base", "roofline:h100-sxm", *ENGINE, "-o", "p.yaml"),
        ("compare", azure, azure),
    ):
        called(*command).refused("load is a workload", "there is nothing to compare with", "`servecal replay`")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("cut", "load.csv", "--start", "99", "-o", "o"), ("load", "the cut leaves no request")),
        (("scale", "load.csv", "-o", "o"), ("'--factor'", "either a factor or a rate")),
        (
            ("sample", "load.csv", "--fraction", "0.5", "--by", "session", "-o", "o"),
            ("of one session",),
        ),
        (("redraw", "load.csv", "--arrivals", "poisson", "-o", "o"), ("'--arrivals'", "expected <distribution>")),
        (("lengths", "load.csv", "--prompt", "fixed", "-o", "o"), ("'--prompt'", "expected fixed:N")),
        (("lengths", "load.csv", "--prompt", "trace:nothing", "-o", "o"), ("nothing", "no trace of that name")),
        (("merge", "load.csv", "-o", "o"), ("at least two traces",)),
        (("cut", "nothing.csv", "-o", "o"), ("nothing.csv", "no such file")),
        (("cut", "load.csv", "--first", "2", "-o", "full"), ("full", "choose another folder")),
    ],
)
def test_what_cannot_be_made_is_refused_and_nothing_written(called, azure, tmp_path, arguments, parts):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    called("workload", *arguments).refused(*parts)
    assert not (tmp_path / "o").exists()


def test_the_trace_itself_is_not_written_over(called, azure, tmp_path):
    assert called("workload", "cut", azure, "--first", 5, "-o", "a").code == 0
    called("workload", "cut", "a", "--first", 2, "-o", "a").refused("is the trace itself")
    assert len(read_trace(tmp_path / "a")) == 5


def test_public_workloads_are_found_by_name(called, traces, tmp_path):
    finished = called("workload", "cut", "azure-2023-conv", "--first", 50, "-o", "a", SERVECAL_TRACES=traces)
    assert (finished.code, finished.err) == (0, "")
    assert called("replay", "a", "--profile", "roofline:h100-sxm", *ENGINE, "-o", "p").code == 0
    finished = called("workload", "cut", "mooncake-conversation", "--first", 20, "-o", "m", SERVECAL_TRACES=traces)
    assert finished.code == 0
    assert read_trace(tmp_path / "m").meta["block_hash"] == {"block_size": 512}
