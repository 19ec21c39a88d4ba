"""Engine-side sources: each is of one format, however packed or named; whatever is done to it, no reader breaks."""

import gzip
import json
import shutil
from itertools import count
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiles.errors import InputError
from replay.readers import READERS, read_trace

SAMPLES = Path(__file__).parent / "engine_samples"
FORMATS = {
    "vllm-0.32.log": "vllm-log",
    "vllm-0.19-dp2.log": "vllm-log",
    "sglang-0.5.log": "sglang-log",
    "vllm-0.32.prom": "prometheus-text",
    "range.json": "prometheus-range",
    "vllm-0.32-spans.jsonl": "vllm-otlp",
    "journeys.jsonl": "vllm-otlp",
    "vcr.jsonl": "vllm-vcr",
    "blis/run.csv": "blis",
    "blis/run.yaml": "blis",
}
JSON = [name for name in FORMATS if name.endswith(("json", "jsonl"))]
LOGS = [name for name in FORMATS if name.endswith("log")]
NUMBERS = [b"0", b"-1", b"1e999", b"9" * 40, b"9" * 5000, b"NaN", b"null", b"true", b"0.0000001", b"1_0", "٣".encode()]
BYTES = [
    b'"',
    b"{",
    b"]",
    b",",
    b":",
    b"=",
    b"\n",
    b"\r",
    b"\r\n",
    b"\xff",
    b"\0",
    b"\x1b[31m",
    b"\xef\xbb\xbf",
    b"&a *a",
]
PREFIXES = [
    "(EngineCore_DP1 pid=9) ",
    "(Worker_TP0 pid=3) ",
    "\x1b[1;36m(APIServer pid=1)\x1b[0;0m ",
    "[rank0]: ",
    "DP7 ",
]
JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


def formats_of(path):
    return [reader.FORMAT for reader in READERS if reader.detect(path)]


def packed(how):
    return {"gzip": gzip.compress, "zstd": lambda data: pa.Codec("zstd").compress(data, asbytes=True)}.get(how, bytes)


@pytest.mark.parametrize("how", ["plain", "gzip", "zstd", "crlf", "bom"])
@pytest.mark.parametrize("name", FORMATS)
def test_exactly_one_reader_knows_each_source_by_its_content(tmp_path, name, how):
    content = (SAMPLES / name).read_bytes()
    if how == "crlf":
        content = content.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    elif how == "bom":
        content = b"\xef\xbb\xbf" + content
    shutil.copytree(SAMPLES / "blis", tmp_path, dirs_exist_ok=True)
    if name.startswith("blis/"):
        (tmp_path / Path(name).name).unlink()
    path = tmp_path / "anything.at-all"
    path.write_bytes(packed(how)(content))
    assert formats_of(path) == [FORMATS[name]]
    trace = read_trace(path)
    assert trace.meta["source"]["format"] == FORMATS[name]
    whole = read_trace(SAMPLES / name)
    assert trace.requests.equals(whole.requests)
    assert trace.timeline == whole.timeline or trace.timeline.equals(whole.timeline)


def test_exactly_one_reader_knows_the_sources_that_were_read_before(bench_folder, serve_result, tmp_path):
    bench = bench_folder().write(tmp_path / "bench")
    read_trace(bench).save(tmp_path / "saved")
    run = serve_result()
    # A file that quotes a server's log and metrics in a text is none.
    run.document["generated_texts"] = ["vLLM API server version 0.32.0\nAvg prompt throughput: 1.0 tokens/s"] * 5
    run.document["note"] = "server_args=ServerArgs(\nDecode batch, #running-req: 1\nvllm:num_requests_running 1"
    paths = {
        "llmservingsim-bench": bench,
        "servecal": tmp_path / "saved",
        "vllm-bench": run.write(tmp_path / "run.json"),
        "blis": SAMPLES / "blis",
    }
    assert {name: formats_of(path) for name, path in paths.items()} == {name: [name] for name in paths}


def test_a_log_of_something_else_is_of_no_format(tmp_path):
    lines = "2026-01-02 03:04:05 INFO nginx started\nINFO 01-02 03:04:05 [a.py:1] hello\n# HELP up a\nup 1\n"
    (tmp_path / "log").write_text(lines)
    with pytest.raises(InputError, match=r"of no format that servecal reads"):
        read_trace(tmp_path / "log")


@pytest.fixture(scope="module")
def try_to_read(tmp_path_factory):
    """Read content in place of a sample: refused in one line, or a trace that can be saved and read again."""
    scratch, number = tmp_path_factory.mktemp("fuzzed"), count()
    shutil.copytree(SAMPLES / "blis", scratch / "blis")

    def read(name, content):
        path = scratch / name
        path.write_bytes(content)
        refusal, trace = "", None
        try:
            trace = read_trace(path)
        except InputError as error:
            refusal = str(error)
        finally:
            if name.startswith("blis/"):
                shutil.copy(SAMPLES / name, path)
        if trace is None:
            assert refusal.isprintable()
            assert len(refusal) < 1000
            return
        saved = scratch / f"saved-{next(number)}"
        trace.save(saved)
        back = read_trace(saved)
        assert back.requests.equals(trace.requests)
        assert back.meta == trace.meta
        for table in ("timeline", "iteration_counts"):
            mine, theirs = getattr(back, table), getattr(trace, table)
            assert mine == theirs or mine.equals(theirs)
        shutil.rmtree(saved)

    return read


@st.composite
def mutations(draw, content):
    """Cut, double, overwrite, insert, put another number, change line ends or the encoding."""
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, len(content)))
        end = min(len(content), begin + draw(st.integers(0, 60)))
        kind = draw(
            st.sampled_from(["cut", "truncate", "double", "overwrite", "insert", "number", "crlf", "utf-16", "drop"])
        )
        if kind == "cut":
            content = content[:begin] + content[end:]
        elif kind == "truncate":
            content = content[:begin]
        elif kind == "double":
            content = content[:end] + content[begin:]
        elif kind == "crlf":
            content = content.replace(b"\n", b"\r\n")
        elif kind == "utf-16":
            content = content.decode("utf-8", "replace").encode(draw(st.sampled_from(["utf-16", "latin-1"])), "replace")
        elif kind == "drop":
            begin = content.rfind(b"\n", 0, begin) + 1
            content = content[:begin] + content[max(content.find(b"\n", begin), begin) :]
        elif kind == "number":
            digits = [place for place in range(begin, len(content)) if content[place : place + 1].isdigit()][:1]
            place = digits[0] if digits else begin
            content = content[:place] + draw(st.sampled_from(NUMBERS)) + content[place + 1 :]
        else:
            piece = draw(st.sampled_from(BYTES + NUMBERS) | st.binary(min_size=1, max_size=4))
            content = content[:begin] + piece + content[begin + (len(piece) if kind == "overwrite" else 0) :]
    return content


@pytest.mark.parametrize("name", [*FORMATS, "blis/run.itl.csv"])
@settings(max_examples=60)
@given(data=st.data())
def test_mutated_bytes_are_read_or_refused(try_to_read, name, data):
    content = (SAMPLES / name).read_bytes()
    try_to_read(name, data.draw(mutations(content)))


@pytest.mark.parametrize("name", LOGS)
@settings(max_examples=40)
@given(data=st.data())
def test_lines_of_several_processes_in_any_order_are_read(try_to_read, name, data):
    lines = (SAMPLES / name).read_text().splitlines()
    for _ in range(data.draw(st.integers(1, 6))):
        one, other = (data.draw(st.integers(0, len(lines) - 1)) for _ in range(2))
        kind = data.draw(st.sampled_from(["swap", "prefix", "tear", "join", "again"]))
        if kind == "swap":
            lines[one], lines[other] = lines[other], lines[one]
        elif kind == "prefix":
            lines[one] = data.draw(st.sampled_from(PREFIXES)) + lines[one]
        elif kind == "tear":
            place = data.draw(st.integers(0, len(lines[one])))
            lines[one] = lines[one][:place] + lines[other] + lines[one][place:]
        elif kind == "join":
            lines[one] += "\r\n" + lines[other]
        else:
            lines.insert(one, lines[other])
    try_to_read(name, "\n".join(lines).encode())


def leaves(value, path=()):
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from leaves(value[key], (*path, key))


@pytest.mark.parametrize("name", JSON)
@settings(max_examples=80)
@given(data=st.data())
def test_any_json_value_in_any_place_is_read_or_refused(try_to_read, name, data):
    documents = [json.loads(line) for line in (SAMPLES / name).read_text().splitlines()]
    place = data.draw(st.integers(0, len(documents) - 1))
    *outer, last = data.draw(st.sampled_from([path for path in leaves(documents[place]) if path]))
    holder = documents[place]
    for key in outer:
        holder = holder[key]
    if data.draw(st.booleans()):
        del holder[last]
    else:
        holder[last] = data.draw(JUNK)
    try_to_read(name, "\n".join(map(json.dumps, documents)).encode())


CELLS = st.sampled_from(["", "-1", "0", "9" * 30, "1e9", "x", "nan", "true", '"', "\x00", "1.5", " 7 "])


@settings(max_examples=80)
@given(data=st.data())
def test_any_cell_of_a_blis_table_is_read_or_refused(try_to_read, data):
    lines = [line.split(",") for line in (SAMPLES / "blis/run.csv").read_text().splitlines()]
    for _ in range(data.draw(st.integers(1, 3))):
        line = data.draw(st.sampled_from(lines))
        line[data.draw(st.integers(0, len(line) - 1))] = data.draw(CELLS)
    try_to_read("blis/run.csv", "\n".join(map(",".join, lines)).encode())


@settings(max_examples=80)
@given(data=st.data())
def test_any_value_of_a_sample_of_metrics_is_read_or_refused(try_to_read, data):
    lines = (SAMPLES / "vllm-0.32.prom").read_text().splitlines()
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(lines) - 1))
        series = lines[place].rpartition(" ")[0]
        value = data.draw(
            st.sampled_from(["-1", "1e308", "+Inf", "-Inf", "NaN", "0", "1e999", "x", "3 1760000000000", "3 -1"])
        )
        lines[place] = f"{series} {value}"
    try_to_read("vllm-0.32.prom", "\n".join(lines).encode())
