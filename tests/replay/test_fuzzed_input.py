"""Whatever bytes a file holds, a reader either refuses them in one line or gives a trace that can be saved."""

import copy
import json
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiles.errors import InputError
from replay.arrivals import with_arrivals
from replay.readers import read_trace

FILES = ["requests.jsonl", "workload.jsonl", "meta.json", "timeseries.csv", "run.json", "trace.json"]
TABLES = {
    "calls.csv": (
        "run_id,status,batch_size,input_lens,output_lens,batch_e2e_ms,error\n"
        '0,OK,2,"[30, 20]","[5, 9]",250.5,\n1,SKIPPED,2,"[3, 2]","[5, 9]",,too long\n'
    ),
    "perf.csv": (
        "model,hardware,prompt_size,batch_size,token_size,average_power,prompt_time,token_time,tensor_parallel\n"
        "m,h,512,2,4,0.5,100.0,20.5,8\nm,h,128,1,4,0.0,50.0,20.5,8\n"
    ),
}
SINGLE = ["run.json", "summary.json", "levels.json", "levels.csv"]
"""Traces that are one file."""
FILES += SINGLE[1:]
TOKENS = [b"0", b"-1", b"1e999", b"9" * 40, b"NaN", b"null", b"true", b'"', b"{", b"]", b",", b"\n", b"\xff", b"\0"]
JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def sources(bench_folder, serve_result, tmp_path_factory):
    """A folder with a valid file of every kind, for each the path to read."""
    folder = tmp_path_factory.mktemp("valid")
    bench = bench_folder().write(folder / "bench")
    run = serve_result(failed=(1,), silent=(2,)).write(folder / "run.json")
    summary = serve_result()
    for array in ("input_lens", "output_lens", "ttfts", "itls", "start_times", "errors"):
        del summary.document[array]
    levels = {
        "rate": 2.0,
        "requests": 8,
        "prompt_tokens": 64,
        "output_tokens": 16,
        "mean_ttft": 0.05,
        "p99_tpot_ms": 9.5,
    }
    table = {"schema": "servecal.load-levels/1", "engine": {"version": "0.19.0", "arguments": {}}, "levels": [levels]}
    (folder / "levels.json").write_text(json.dumps(table))
    (folder / "levels.csv").write_text(",".join(levels) + "\n" + ",".join(map(str, levels.values())) + "\n")
    single = {"run.json": run, "summary.json": summary.write(folder / "summary.json")}
    single |= {name: folder / name for name in ("levels.json", "levels.csv")}
    read_trace(bench).save(folder / "saved")
    paths = dict.fromkeys(FILES[:4], bench) | single | {"trace.json": folder / "saved"}
    paths["requests.parquet"] = folder / "saved"
    for name, text in TABLES.items():
        paths[name] = folder / name
        paths[name].write_text(text)
    return {name: (path if path.is_file() else path / name) for name, path in paths.items()}


@pytest.fixture(scope="module")
def try_to_read(sources, tmp_path_factory):
    """Read a source of which one file has other content."""
    scratch, number = tmp_path_factory.mktemp("fuzzed"), count()

    def read(name, content):
        valid = sources[name]
        if name in SINGLE or name in TABLES:
            place = path = scratch / name
        else:
            place = scratch / name.replace(".", "-")
            place.mkdir(exist_ok=True)
            for other in valid.parent.iterdir():
                (place / other.name).write_bytes(other.read_bytes())
            path = place / name
        path.write_bytes(content)
        refusal = ""
        try:
            trace = read_trace(place)
            if trace.clock == "request":
                trace = with_arrivals(trace, "constant:rate=1")
        except InputError as error:
            refusal = str(error)
        assert refusal == "" or (refusal.isprintable() and len(refusal) < 1000)
        if refusal:
            return
        saved = scratch / f"saved-{next(number)}"
        trace.save(saved)
        back = read_trace(saved)
        assert back.requests.equals(trace.requests)
        assert back.meta == trace.meta

    return read


@st.composite
def mutations(draw, content):
    """Cut, double, overwrite or insert at random places."""
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, len(content)))
        end = min(len(content), begin + draw(st.integers(0, 40)))
        kind = draw(st.sampled_from(["cut", "truncate", "double", "overwrite", "insert"]))
        if kind == "cut":
            content = content[:begin] + content[end:]
        elif kind == "truncate":
            content = content[:begin]
        elif kind == "double":
            content = content[:end] + content[begin:]
        else:
            piece = draw(st.sampled_from(TOKENS) | st.binary(min_size=1, max_size=4))
            content = content[:begin] + piece + content[begin + (len(piece) if kind == "overwrite" else 0) :]
    return content


@pytest.mark.parametrize("name", [*FILES, *TABLES])
@settings(max_examples=150)
@given(data=st.data())
def test_mutated_bytes_are_read_or_refused(sources, try_to_read, name, data):
    try_to_read(name, data.draw(mutations(sources[name].read_bytes())))


def leaves(value, path=()):
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from leaves(value[key], (*path, key))


def replaced(document, path, value):
    if not path:
        return value
    document = copy.deepcopy(document)
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return document


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith(".csv")])
@settings(max_examples=200)
@given(data=st.data())
def test_any_json_value_in_any_place_is_read_or_refused(sources, try_to_read, name, data):
    lines = sources[name].read_text().splitlines() if name.endswith("jsonl") else [sources[name].read_text()]
    documents = [json.loads(line) for line in lines]
    row = data.draw(st.integers(0, len(documents) - 1))
    path = data.draw(st.sampled_from(list(leaves(documents[row]))[:200]))
    documents[row] = replaced(documents[row], path, data.draw(JUNK))
    try_to_read(name, "\n".join(map(json.dumps, documents)).encode())


@settings(max_examples=100)
@given(data=st.data())
def test_mutated_parquet_is_read_or_refused(sources, try_to_read, data):
    content = sources["trace.json"].with_name("requests.parquet").read_bytes()
    try_to_read("requests.parquet", data.draw(mutations(content)))
