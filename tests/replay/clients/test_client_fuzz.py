"""Whatever bytes a client's file holds, it is refused in one line, or gives a trace that can be saved."""

import copy
import json
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiles.errors import InputError
from replay.arrivals import with_arrivals
from replay.readers import read_trace

KINDS = [
    "sglang",
    "sglang-summary",
    "aiperf",
    "aiperf-raw",
    "guidellm",
    "guidellm-old",
    "inference-perf",
    "inference-perf-stage",
    "perf-analyzer",
    "llmperf",
    "llmservingsim-sim",
]
LINES = ("sglang", "sglang-summary", "aiperf", "aiperf-raw")
TOKENS = [b"0", b"-1", b"1e999", b"9" * 40, b"NaN", b"null", b"true", b'"', b"{", b"]", b",", b"\r\n", b"\xff", b"\0"]
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 2**31, 10**9, 2**63, 10**30, 1e-300, 1e18, 1e308, float("nan"), float("inf"), -0.5]),
    st.text(st.characters(exclude_categories=()), max_size=5),
    st.sampled_from([[], {}, [[]], [None], [1.5, "x"], {"value": 1}, {"value": None, "unit": "ms"}, {"": {}}, [{}]]),
)


@pytest.fixture(scope="module")
def try_to_read(tmp_path_factory):
    scratch, number = tmp_path_factory.mktemp("fuzzed"), count()

    def read(content):
        path = scratch / "file"
        path.write_bytes(content)
        try:
            trace = read_trace(path)
            if trace.clock == "request":
                trace = with_arrivals(trace, "measured" if trace.meta.get("workload") else "constant:rate=1")
        except InputError as error:
            refusal = str(error)
            assert refusal.isprintable()
            assert len(refusal) < 1000
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


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100)
@given(data=st.data())
def test_mutated_bytes_are_read_or_refused(samples, try_to_read, kind, data):
    try_to_read(data.draw(mutations(samples[kind][1])))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(data=st.data())
def test_mutated_packed_bytes_are_read_or_refused(samples, packer, try_to_read, kind, data):
    packed = packer[data.draw(st.sampled_from(["gzip", "zstd"]))](samples[kind][1])
    try_to_read(data.draw(mutations(packed)))


def places(value, path=()):
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def changed(document, path, value, remove):
    """A document with another value in a place, or without it."""
    if not path:
        return value
    document = copy.deepcopy(document)
    holder = document
    for key in path[:-1]:
        holder = holder[key]
    if remove:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return document


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "llmservingsim-sim"])
@settings(max_examples=200)
@given(data=st.data())
def test_any_value_or_none_in_any_place_is_read_or_refused(samples, try_to_read, kind, data):
    text = samples[kind][1].decode()
    documents = [json.loads(line) for line in (text.splitlines() if kind in LINES else [text])]
    for _ in range(data.draw(st.integers(1, 2))):
        row = data.draw(st.integers(0, len(documents) - 1))
        path = data.draw(st.sampled_from(list(places(documents[row]))))
        documents[row] = changed(documents[row], path, data.draw(JUNK), data.draw(st.booleans()))
    try_to_read("\n".join(map(json.dumps, documents)).encode())


@settings(max_examples=150)
@given(data=st.data())
def test_any_cell_of_a_table_is_read_or_refused(samples, try_to_read, data):
    rows = [line.split(",", 11) for line in samples["llmservingsim-sim"][1].decode().splitlines()]
    row, column = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 11))
    rows[row][column] = data.draw(st.sampled_from(["", "-1", "1e9", "9" * 40, '"', "nan", "[", '"[1"', "x", "0", "٣"]))
    try_to_read("\n".join(map(",".join, rows)).encode())


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig", "latin-1"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_encodings_are_read_or_refused(samples, try_to_read, kind, encoding):
    try_to_read(samples[kind][1].decode().replace("id-1", "idé").encode(encoding))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("times", [1, 2])
def test_a_file_written_twice_is_read_or_refused(samples, try_to_read, kind, times):
    try_to_read(samples[kind][1] * (times + 1))
