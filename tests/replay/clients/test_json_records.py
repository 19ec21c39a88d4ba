"""JSON is read record by record, within bounds, and known by its keys."""

import gzip
import json
import tracemalloc

import pytest

from profiles.errors import InputError
from replay.readers import json_records
from replay.readers.json_records import keys_of, read_document, read_run, runs, stream_array, stream_lines


@pytest.fixture
def write(tmp_path):
    def to(content):
        path = tmp_path / "data"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return to


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        ('{"a": {"b": 1}, "c": [{"d": 2}]}', {"a", "a.b", "c", "c.[].d"}),
        ('[{"a": 1}, {"b": 2}]', {"[].a", "[].b"}),
        ('{"a": 1}\n{"b": 2}\n', {"a"}),
        ('{"a": "\\"b\\": {", "c": 1}', {"a", "c"}),
        ('{"a": {"b": ', {"a", "a.b"}),
        ('{"a": "cut off', {"a"}),
        ('{"a": {"b": {"c": {"d": {"e": 1}}}}}', {"a", "a.b", "a.b.c", "a.b.c.d"}),
        ("[]", set()),
        ("]{", set()),
        ("hello", set()),
        ("", set()),
    ],
)
def test_keys_are_told_from_the_head(write, content, keys):
    assert keys_of(write(content)) == keys


@pytest.mark.parametrize("spread", [None, 1, 4])
@pytest.mark.parametrize("chunk", [1, 7, 2**16])
def test_elements_of_an_array_are_yielded_whatever_the_chunks(write, monkeypatch, spread, chunk):
    monkeypatch.setattr(json_records, "CHUNK", chunk)
    rows = [{"a": index, "b": 'x\u2028\\"]},[' * 3, "c": [1.5e-7, -0.25, True, None]} for index in range(20)]
    records = list(stream_array(write(json.dumps(rows, indent=spread, ensure_ascii=False))))
    assert [record.values for record in records] == rows
    assert records[19].row == "request 20"


def test_an_empty_array_holds_nothing(write):
    assert list(stream_array(write(" [ \n ] "))) == []


@pytest.mark.parametrize("chunk", [1, 2**16])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "expected a JSON array"),
        ("[1]", "expected a JSON object, found 1"),
        ('[{"a": 1} {"b": 2}]', "expected , or ]"),
        ('[{"a": 1},', "Expecting value"),
        ('[{"a": 1}', "expected , or ]"),
        ('[{"a": tru', "Expecting value"),
        ('[{"a": "x', "Unterminated string"),
        ('[{"a": nope}]' + " " * 100, "Expecting value"),
        ("[" * 100_000, "nested too deeply"),
        ('[{"a": ' + "9" * 5000 + "}]", "too many digits"),
    ],
)
def test_a_broken_array_is_refused(write, monkeypatch, chunk, content, message):
    if chunk == 1 and len(content) > 1000:
        pytest.skip("byte by byte it takes long")
    monkeypatch.setattr(json_records, "CHUNK", chunk)
    with pytest.raises(InputError) as caught:
        list(stream_array(write(content)))
    assert message in str(caught.value)


def test_runs_are_counted_by_lines_of_their_own(write):
    one = json.dumps({"a": 1})
    assert runs(write(one)) == 1
    assert runs(write(f"{one}\n\n{one}\r\n{one}")) == 3
    assert runs(write(json.dumps({"a": {"b": 1}}, indent=1))) == 1
    assert runs(write('{"a": {}\n}')) == 1
    path = write(f"{one}\n\n{json.dumps({'b': 2})}")
    assert read_run(path, 1, several=True).values == {"b": 2}
    assert read_run(path, 1, several=True).row == 3


@pytest.mark.parametrize("form", ["document", "lines", "array"])
def test_what_unpacks_to_more_than_is_held_at_once_is_refused(write, monkeypatch, form):
    monkeypatch.setattr(json_records, "LONGEST", 10**6)
    path = write(gzip.compress((b"[" if form == "array" else b"") + b'{"a": "' + b"x" * 10**7 + b'"}'))
    read = {"document": lambda: read_document(path), "lines": lambda: list(stream_lines(path))}
    with pytest.raises(InputError, match=r"more than 1,000,000 characters"):
        read.get(form, lambda: list(stream_array(path)))()


@pytest.mark.parametrize("form", ["lines", "array"])
def test_memory_does_not_grow_with_the_records(write, form):
    row = json.dumps({"text": "x" * 2000})
    count = 20_000
    content = f"{row}\n" * count if form == "lines" else "[" + ", ".join([row] * count) + "]"
    path = write(content)
    del content
    tracemalloc.start()
    try:
        read = sum(1 for _ in (stream_lines if form == "lines" else stream_array)(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert read == count
    # The file has 40 MB.
    assert peak < 8e6
