"""Workloads: arrivals and lengths without latencies."""

import gzip
import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from workload_samples import BAILIAN, MOONCAKE, SAMPLES, SHAREGPT, TIMED, lines, writer

from profiles.errors import InputError
from replay.arrivals import with_arrivals
from replay.block_hashes import at_block_size
from replay.readers import READERS, WORKLOADS, burstgpt, mooncake, read_trace, streaming

BROKEN = [
    b"0",
    b"-1",
    b"1e999",
    b"9" * 40,
    b"NaN",
    b"null",
    b"true",
    b'"',
    b"{",
    b"]",
    b",",
    b"\n",
    b"\r",
    b"\xff",
    b"\0",
]


@pytest.fixture
def sample(tmp_path):
    return writer(tmp_path)


@pytest.fixture
def others(bench_folder, serve_result, tmp_path):
    """A file or folder of every format that is no workload."""
    run = serve_result()
    short = serve_result()
    for array in ("input_lens", "output_lens", "ttfts", "itls", "start_times", "errors"):
        del short.document[array]
    found = [
        ("llmservingsim-bench", bench_folder().write(tmp_path / "bench")),
        ("vllm-bench", run.write(tmp_path / "run")),
        ("vllm-bench", short.write(tmp_path / "short")),
    ]
    read_trace(found[1][1]).save(tmp_path / "saved")
    found.append(("servecal", tmp_path / "saved"))
    for form, text in (
        (
            "batches-csv",
            'run_id,status,batch_size,input_lens,output_lens,batch_e2e_ms\n0,OK,2,"[3, 2]","[5, 9]",25.5\n',
        ),
        (
            "splitwise-perf-model",
            "model,hardware,prompt_size,batch_size,token_size,prompt_time,token_time,tensor_parallel\nm,h,5,2,4,9,2,8\n",
        ),
        ("load-levels", "rate,prompt_tokens,output_tokens,mean_ttft\n2.0,64,16,0.05\n"),
    ):
        (tmp_path / form).write_text(text)
        found.append((form, tmp_path / form))
    return found


def claims(path):
    return [reader.FORMAT for reader in READERS if reader.detect(path)]


@pytest.mark.parametrize("name", SAMPLES)
def test_exactly_one_reader_knows_each_workload(sample, name):
    assert claims(sample(name)) == [SAMPLES[name][0]]
    assert read_trace(sample(name)).meta["source"]["format"] == SAMPLES[name][0]


def test_exactly_one_reader_knows_each_other_format(others):
    for form, path in others:
        assert claims(path) == [form]


def test_every_reader_of_workloads_has_a_sample():
    assert {reader.FORMAT for reader in WORKLOADS} == {form for form, _ in SAMPLES.values()}


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("pack", [gzip.compress, lambda data: pa.compress(data, codec="zstd", asbytes=True)])
def test_a_compressed_workload_is_the_same(sample, name, pack):
    plain = read_trace(sample(name))
    path = sample(name)
    path.write_bytes(pack(path.read_bytes()))
    if pack is not gzip.compress:
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(SAMPLES[name][1].encode())
    assert claims(path) == [SAMPLES[name][0]]
    assert read_trace(path).requests.equals(plain.requests)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_workload_says_that_nothing_was_measured_but_load_and_is_saved_whole(sample, name, tmp_path):
    trace = read_trace(sample(name))
    for column in ("queued", "scheduled", "first_token", "last_token", "token_times", "cached_tokens", "preemptions"):
        assert not trace.has(column)
        assert trace.meta["columns"][column] == "unknown"
    assert trace.meta["engine"] == {"name": None, "version": None, "arguments": {}}
    trace.save(tmp_path / "saved")
    back = read_trace(tmp_path / "saved")
    assert back.requests.equals(trace.requests)
    assert back.meta == trace.meta


def test_azure_counts_from_the_first_request_to_the_tenth_of_a_microsecond(sample):
    trace = read_trace(sample("azure"))
    assert trace.column("arrival").tolist() == [0.0, 0.052, 2.02004]
    assert trace.column("prompt_tokens").tolist() == [4808, 3180, 110]
    assert trace.column("output_tokens").tolist() == [10, 8, 27]
    assert trace.meta["clock"]["origin_utc"] == "2023-11-16T18:17:03.979960000Z"


def test_azure_times_with_a_zone_and_without_a_fraction(sample):
    assert read_trace(sample("azure-2024")).column("arrival").tolist() == [0.0, 0.877]


def test_azure_rows_out_of_order_keep_their_order_and_images_are_noted(sample):
    trace = read_trace(sample("azure-2025"))
    assert trace.column("arrival").tolist() == [1.5, 0.0]
    assert "images of the requests are left out" in trace.meta["notes"]


@pytest.mark.parametrize("text", ["2024-05-12 00:00:00.5+02:00", "2024-05-11T22:00:00.5"])
def test_azure_times_of_several_forms_in_one_file(tmp_path, text):
    path = tmp_path / "a.csv"
    path.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{text},1,1\n2024-05-11 22:00:01+00:00,1,1\n")
    assert read_trace(path).column("arrival").tolist() == [0.0, 0.5]


def test_burstgpt_is_read_by_header_and_calls_requests_without_response_failed(sample):
    old, new = read_trace(sample("burstgpt")), read_trace(sample("burstgpt-8"))
    assert old.column("arrival").tolist() == [0, 40, 40]
    assert old.column("prompt_tokens").tolist() == [472, 1087, 417]
    assert old.column("output_tokens").tolist() == [18, 230, 0]
    assert old.statuses.tolist() == ["ok", "ok", "failed"]
    assert new.column("arrival").tolist() == [0, 1, 4]
    assert new.meta["clock"]["origin"] == 19000005
    assert new.column("prompt_tokens").tolist() == [472, 1087, 600]
    assert new.requests.column("session").to_pylist() == ["s1", None, "s1"]


def test_mooncake_hashes_are_of_full_blocks_and_equal_only_after_an_equal_prefix(sample):
    trace = read_trace(sample("mooncake"))
    first, second, third = trace.lists("block_hashes")
    assert [len(one) for one in (first, second, third)] == [2, 2, 1]
    assert first == second
    assert third[0] not in first
    assert trace.meta["block_hash"] == {"block_size": 512}
    assert trace.column("arrival").tolist() == [0.0, 0.0, pytest.approx(3.001)]
    parts = [at_block_size(one, 512, 16) for one in (first, second, third)]
    assert [len(one) for one in parts] == [64, 64, 32]
    assert parts[0] == parts[1]
    assert len({*parts[0], *parts[2]}) == 96


def test_a_timed_trace_takes_its_block_size_from_the_number_of_ids(sample, tmp_path):
    trace = read_trace(sample("timed"))
    assert trace.meta["block_hash"] == {"block_size": 16}
    assert [len(one) for one in trace.lists("block_hashes")] == [2, 2]
    assert trace.lists("block_hashes")[0] == trace.lists("block_hashes")[1]
    assert trace.column("arrival").tolist() == trace.column("nominal_arrival").tolist() == [0.0, 0.25]
    rows = [{**TIMED[0], "input_length": 100, "hash_ids": [4, 5]}, {**TIMED[1], "hash_ids": [4]}]
    (tmp_path / "t").write_text(lines(rows))
    assert read_trace(tmp_path / "t").meta["block_hash"] == {"block_size": 64}
    (tmp_path / "t").write_text(lines([{**row, "hash_ids": list(range(9))} for row in TIMED]))
    with pytest.raises(InputError, match=r"field 'hash_ids': no block size of 8, 16, "):
        read_trace(tmp_path / "t")


def test_turns_of_a_chat_are_one_session_even_where_its_start_is_cut_off(sample):
    trace = read_trace(sample("bailian"))
    assert trace.ids == ["1", "5", "6", "8"]
    assert trace.requests.column("session").to_pylist() == ["1", "1", "1", "99"]
    hashes = trace.lists("block_hashes")
    assert [len(one) for one in hashes] == [2, 4, 1, 1]
    assert hashes[0] == hashes[1][:2]


def test_chats_that_are_their_own_ancestors_end(tmp_path):
    rows = [{**BAILIAN[0], "chat_id": 1, "parent_chat_id": 2}, {**BAILIAN[0], "chat_id": 2, "parent_chat_id": 1}]
    (tmp_path / "b").write_text(lines(rows))
    assert len(read_trace(tmp_path / "b")) == 2


def test_vidur_without_arrivals_needs_some_to_be_drawn(sample):
    assert read_trace(sample("vidur")).column("arrival").tolist() == [0.0, 4.314579]
    trace = read_trace(sample("vidur-lengths"))
    assert trace.clock == "request"
    with pytest.raises(InputError, match=r"does not say when its requests were sent; --arrivals poisson"):
        with_arrivals(trace, "measured")
    assert with_arrivals(trace, "constant:rate=4").column("arrival").tolist() == [0.0, 0.25]
    assert read_trace(sample("frontier")).requests.column("session").to_pylist() == ["a", "b"]


@pytest.mark.parametrize("name", ["sharegpt", "sharegpt-dense"])
def test_sharegpt_lengths_are_assumed_from_characters(sample, name):
    trace = read_trace(sample(name))
    assert trace.ids == ["1", "3"]
    texts = [[turn["value"] for turn in one["conversations"]] for one in SHAREGPT]
    assert trace.column("prompt_tokens").tolist() == [-(-len(texts[0][0]) // 4), 2]
    assert trace.column("output_tokens").tolist() == [2, 1]
    assert trace.meta["columns"]["prompt_tokens"] == "assumed: a token for every 4 characters"
    assert "1 conversations of fewer than two turns are left out" in trace.meta["notes"]
    other = read_trace(sample(name), "characters=2")
    assert other.column("prompt_tokens").tolist() == [-(-len(texts[0][0]) // 2), 3]


def test_sharegpt_lengths_are_counted_by_a_tokenizer_that_is_given(sample, tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "tokenizer.json"))
    trace = read_trace(sample("sharegpt"), f"tokenizer={tmp_path / 'tokenizer.json'}")
    assert trace.column("prompt_tokens").tolist() == [6, 1]
    assert trace.meta["columns"]["prompt_tokens"] == "reconstructed: counted with tokenizer.json"


@pytest.mark.parametrize("selection", ["characters=0", "characters=x", "words=3", "tokenizer=", "x"])
def test_another_way_to_count_is_refused(sample, selection):
    with pytest.raises(InputError, match=r"expected #characters=NUMBER"):
        read_trace(sample("sharegpt"), selection)


def test_a_file_is_cut_into_conversations_wherever_a_read_ends(sample, monkeypatch):
    whole = read_trace(sample("sharegpt"))
    for piece in (1, 2, 7, 100):
        monkeypatch.setattr("replay.readers.sharegpt.PIECE", piece)
        assert read_trace(sample("sharegpt")).requests.equals(whole.requests)


@pytest.mark.parametrize("size", [1, 7, 64, 200])
@pytest.mark.parametrize("name", [name for name in SAMPLES if "sharegpt" not in name])
def test_a_file_is_cut_into_rows_wherever_a_block_ends(sample, name, size, monkeypatch):
    whole = read_trace(sample(name))
    for form in ("csv_blocks", "json_blocks"):
        function = getattr(streaming, form)
        monkeypatch.setattr(function, "__defaults__", (size,))
    blocks = list(streaming.lines(sample(name), size))
    assert b"".join(block for _, block in blocks) == sample(name).read_bytes()
    assert read_trace(sample(name)).requests.equals(whole.requests)


@pytest.mark.parametrize(
    ("name", "old", "new", "where"),
    [
        ("azure", b"3180", b"-3180", "line 3: field 'ContextTokens': expected 0 to 1000000000 tokens, found -3180"),
        ("azure", b"3180", b"", "line 3: field 'ContextTokens': is missing"),
        ("azure", b"3180", b"31.5", "line 3: field 'ContextTokens': expected a whole number of tokens, found 31.5"),
        ("azure", b"18:17:04", b"25:17:04", "line 3: field 'TIMESTAMP': expected a date and time"),
        ("azure", b",8\r", b"\r", "line 3: expected 3 values, found 2"),
        ("azure", b"ContextTokens", b"Context", "is of no format that servecal reads"),
        ("burstgpt", b"1087", b"many", "line 3: field 'Request tokens': expected a number, found 'many'"),
        ("burstgpt", b"\n45,GPT", b"\n-45,GPT", "line 3: field 'Timestamp': expected a number of seconds at least 0"),
        ("mooncake", b"1100", b'"x"', "line 2: field 'input_length': expected a whole number of tokens, found 'x'"),
        ("mooncake", b"[0, 1, 3]", b"[0, 1, -3]", "line 2: field 'hash_ids': expected a list of whole numbers"),
        ("mooncake", b'"output_length": 500', b'"x": 1', "line 3: field 'output_length': is missing; fields here: "),
        ("bailian", b'"chat_id": 8', b'"chat_id": "8"', "line 4: field 'chat_id': expected a whole number"),
        ("timed", b"1.75", b"1e999", "line 2: expected finite numbers, found 1e999"),
        ("vidur", b"396", b"nan", "line 3: field 'num_prefill_tokens': expected a whole number of tokens, found nan"),
        ("sharegpt-dense", b'"ja"', b"7", "conversation 3: field 'value': expected a text, found 7"),
        ("sharegpt-dense", b'[{"from": "human", "value": "hi"}]', b"{}", "conversation 2: field 'conversations'"),
        ("sharegpt-dense", b'"ja"}]}]', b'"ja"}]}', "conversation 4: expected ',' or ']': the file seems truncated"),
    ],
)
def test_an_error_names_line_and_field(sample, name, old, new, where):
    path = sample(name)
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    if name == "mooncake" and b"x" in new:
        # Such rows are not in the head of a long file.
        path.write_bytes(json.dumps(MOONCAKE[0]).encode() + b"\n" + path.read_bytes())
        where = where.replace("line 2", "line 3").replace("line 3: field 'output", "line 4: field 'output")
        trace = mooncake.read
    else:
        trace = read_trace
    with pytest.raises(InputError) as caught:
        trace(path)
    assert where in str(caught.value)
    assert str(path) in str(caught.value)


def test_what_arrow_is_too_strict_for_is_read_line_by_line(tmp_path):
    path = tmp_path / "m"
    path.write_text(lines([{**row, "input_length": row["input_length"] * 1.0} for row in MOONCAKE]) + "\n\n")
    plain = tmp_path / "p"
    plain.write_text(lines(MOONCAKE))
    assert mooncake.read(path).requests.equals(mooncake.read(plain).requests)
    (tmp_path / "b").write_text(
        'Timestamp,Model,Request tokens,Response tokens\n5,"a, b",4.0,2\n\n6,c,3,1e1\n7,d," 8",2\n', newline="\r\n"
    )
    trace = burstgpt.read(tmp_path / "b")
    assert trace.column("prompt_tokens").tolist() == [4, 3, 8]
    assert trace.column("output_tokens").tolist() == [2, 10, 2]


@settings(max_examples=60)
@given(rows=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 5000), st.integers(0, 5000)), min_size=1))
def test_fast_and_slow_ways_read_the_same(rows, tmp_path_factory):
    text = "Timestamp,Request tokens,Response tokens\n" + "".join(f"{t},{p},{o}\n" for t, p, o in rows)
    (block,) = [data for _, data in [(1, text.encode())]]
    names, body = ["Timestamp", "Request tokens", "Response tokens"], block.partition(b"\n")[2]
    slow = streaming._slowly(body, burstgpt.COLUMNS, streaming._CsvRows(Path("f"), 2, names))
    fast = streaming._block(body, burstgpt.COLUMNS, streaming._csv_reader(names, burstgpt.COLUMNS), None)
    for name in names:
        assert fast[name].dtype == slow[name].dtype
        assert fast[name].tolist() == slow[name].tolist()


@settings(max_examples=60)
@given(prompts=st.lists(st.lists(st.integers(0, 3), max_size=6), min_size=1, max_size=8), tail=st.integers(0, 511))
def test_hashes_are_equal_exactly_where_ids_and_all_before_them_are(prompts, tail):
    from replay.readers.workloads import prompt_hashes

    tokens = np.array([512 * len(one) + tail for one in prompts])
    ids = [one + [9] * (tail > 0) for one in prompts]
    half = len(ids) // 2
    chunks = pa.chunked_array([ids[:half], ids[half:]], pa.list_(pa.int64()))
    hashes = prompt_hashes(chunks, tokens, 512, Path("f")).to_pylist()
    for (left, left_hashes), (right, right_hashes) in itertools.product(zip(prompts, hashes, strict=True), repeat=2):
        assert len(left_hashes) == len(left)
        for place in range(min(len(left), len(right))):
            same = left[: place + 1] == right[: place + 1]
            assert (left_hashes[place] == right_hashes[place]) == same


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzzed")
    number = itertools.count()

    def read(name, content):
        path = folder / "fuzzed"
        path.write_bytes(content)
        refusal = ""
        try:
            trace = read_trace(path)
            if trace.clock == "request":
                trace = with_arrivals(trace, "constant:rate=1")
        except InputError as error:
            refusal = str(error)
        assert refusal == "" or (refusal.isprintable() and len(refusal) < 1000)
        if refusal:
            return
        saved = folder / f"saved-{next(number)}"
        trace.save(saved)
        assert read_trace(saved).requests.equals(trace.requests)

    return read


@st.composite
def mutated(draw, content):
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, len(content)))
        end = min(len(content), begin + draw(st.integers(0, 40)))
        kind = draw(st.sampled_from(["cut", "truncate", "double", "overwrite", "insert", "crlf", "utf16"]))
        piece = draw(st.sampled_from(BROKEN) | st.binary(min_size=1, max_size=4))
        content = {
            "cut": content[:begin] + content[end:],
            "truncate": content[:begin],
            "double": content[:end] + content[begin:],
            "overwrite": content[:begin] + piece + content[begin + len(piece) :],
            "insert": content[:begin] + piece + content[begin:],
            "crlf": content.replace(b"\n", b"\r\n"),
            "utf16": content[:begin] + content[begin:end].decode("latin-1").encode("utf-16") + content[end:],
        }[kind]
    return content


@pytest.mark.parametrize("name", [*SAMPLES, "mooncake.gz"])
@settings(max_examples=80)
@given(data=st.data())
def test_mutated_workloads_are_read_or_refused(fuzzed, name, data):
    content = SAMPLES[name.removesuffix(".gz")][1].encode()
    if name.endswith(".gz"):
        content = gzip.compress(content, mtime=0)
    fuzzed(name, data.draw(mutated(content)))


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@pytest.mark.parametrize("name", ["mooncake", "timed", "bailian"])
@settings(max_examples=100)
@given(data=st.data())
def test_any_json_value_in_any_field_is_read_or_refused(fuzzed, name, data):
    rows = [json.loads(line) for line in SAMPLES[name][1].splitlines()]
    row = data.draw(st.sampled_from(rows))
    row[data.draw(st.sampled_from(sorted(row)))] = data.draw(JUNK)
    fuzzed(name, lines(rows).encode())


def test_a_line_without_end_is_refused_before_it_fills_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "LONGEST_LINE", 2**20)
    path = tmp_path / "m"
    path.write_bytes(lines(MOONCAKE).encode() + b'{"timestamp": 1, "x": "' + b"y" * 2**21)
    monkeypatch.setattr(streaming.json_blocks, "__defaults__", (2**16,))
    with pytest.raises(InputError, match=r"line 4: is longer than 1,048,576 bytes"):
        read_trace(path)


def test_a_bomb_of_a_workload_is_refused_within_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr("replay.readers.opening.open_bytes.__defaults__", (2**20,))
    path = tmp_path / "bomb"
    path.write_bytes(gzip.compress(SAMPLES["azure"][1].encode() + b"\r\n" * 2**22))
    with pytest.raises(InputError, match=r"unpacks to more than 1,048,576 bytes"):
        read_trace(path)


@pytest.mark.parametrize(
    ("file", "requests", "prompt", "output", "last"),
    [
        ("azure-2023-code.csv", 8819, 2048, 28, 3435.948),
        ("azure-2023-conv.csv", 19366, 1155, 211, 3501.722),
        ("mooncake-conversation.jsonl", 12031, 12035, 343, 3536.999),
    ],
)
def test_public_workloads_have_the_totals_that_are_known_of_them(traces, file, requests, prompt, output, last):
    begun = time.process_time()
    trace = read_trace(traces / "workloads" / file)
    assert time.process_time() - begun < 2.0
    assert len(trace) == requests
    assert int(trace.column("prompt_tokens").mean()) in (prompt - 1, prompt)
    assert int(trace.column("output_tokens").mean()) in (output - 1, output)
    assert trace.column("arrival").max() == pytest.approx(last, abs=1e-3)


def test_public_conversations_share_as_many_blocks_as_their_ids_say(traces):
    path = traces / "workloads" / "mooncake-conversation.jsonl"
    trace = read_trace(path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    full = [row["hash_ids"][: row["input_length"] // 512] for row in rows]
    hashes = trace.lists("block_hashes")
    assert [len(one) for one in hashes] == [len(one) for one in full]
    assert len({one for row in hashes for one in row}) == len({one for row in full for one in row})
