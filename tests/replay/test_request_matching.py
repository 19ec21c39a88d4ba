import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.request_matching import EQUAL, ORDER, PART, matchings
from replay.trace import Trace, requests_table
from tests.vantages import Client, engine

SEEDS = st.integers(0, 2**32 - 1)


def trace(ids, arrival=None, prompts=None, outputs=None, clock="run"):
    count = len(ids)
    columns = {
        "id": ids,
        "status": ["ok"] * count,
        "arrival": arrival,
        "prompt_tokens": [100] * count if prompts is None else prompts,
        "output_tokens": [10] * count if outputs is None else outputs,
    }
    return Trace(requests_table({k: v for k, v in columns.items() if v is not None}, count), {"clock": {"kind": clock}})


def first(left, right):
    return next(iter(matchings(left, right)), None)


def pairs(left, right):
    found = first(left, right)
    return {left.ids[a]: right.ids[b] for a, b in zip(found.left, found.right, strict=True)}, found.by


def test_equal_ids_are_matched_in_any_order():
    assert pairs(trace(["a", "b", "c"]), trace(["c", "x", "a"])) == ({"a": "a", "c": "c"}, EQUAL)


@pytest.mark.parametrize(
    ("mine", "other"),
    [
        (["0", "1", "10", "11"], "cmpl-bench-3f2a9c01-{}-0"),
        (["bench-0", "bench-1", "bench-10", "bench-11"], "cmpl-bench-{}-0-8a7b6c5d"),
        (["0", "1", "10", "11"], "bench-{:03d}"),
        ([f"cmpl-{7919 * one:08x}-0" for one in (0, 1, 10, 11)], None),
    ],
)
def test_ids_that_hold_the_other_s_are_matched_whole(mine, other):
    numbers = [0, 1, 10, 11]
    if other is None:
        theirs = [f"chatcmpl-{7919 * one:08x}-0-{one + 1:08x}" for one in numbers]
    else:
        theirs = [other.format(one) for one in numbers]
    shuffled = [theirs[place] for place in (2, 0, 3, 1)]
    assert pairs(trace(mine), trace(shuffled)) == (dict(zip(mine, theirs, strict=True)), PART)


def test_ids_that_stand_twice_are_left_out_and_said():
    found = first(trace(["a", "a", "b", "c"]), trace(["a", "b", "c"]))
    assert found.left.tolist() == [2, 3]
    assert "1 ids stand several times" in found.doubt


def test_ids_that_match_other_lengths_are_no_match():
    prompts = list(range(100, 1100, 50))
    left = trace([str(one) for one in range(20)], np.arange(20.0), prompts)
    shifted = trace([str(one + 3) for one in range(20)], np.arange(20.0) + 5.0, prompts)
    found, how = pairs(left, shifted)
    assert how == ORDER
    assert found == {str(one): str(one + 3) for one in range(20)}


def test_a_start_token_more_is_no_other_length():
    left = trace(["a", "b", "c"], prompts=[10, 20, 30])
    assert pairs(left, trace(["a", "b", "c"], prompts=[11, 21, 31]))[1] == EQUAL


@given(SEEDS, st.integers(20, 80), st.floats(-1e5, 1e5), st.booleans())
def test_without_ids_order_and_lengths_match_whatever_the_offset(seed, count, offset, alike):
    random = np.random.default_rng(seed)
    sent = np.cumsum(random.exponential(0.3, count))
    prompts = [64] * count if alike else random.integers(10, 400, count).tolist()
    outputs = [8] * count if alike else random.integers(2, 60, count).tolist()
    arrived = sent + offset + 0.002 + random.exponential(0.002, count)
    keep = np.sort(random.permutation(count)[: count - count // 10])
    shuffle = random.permutation(count)
    left = trace([f"c{one}" for one in keep], sent[keep], np.array(prompts)[keep], np.array(outputs)[keep])
    right = trace(
        [f"e{one}" for one in shuffle], arrived[shuffle], np.array(prompts)[shuffle], np.array(outputs)[shuffle]
    )
    found, how = pairs(left, right)
    assert how in (ORDER, PART)
    right_ones = sum(other == f"e{mine[1:]}" for mine, other in found.items())
    # Alike requests that came within milliseconds may be taken for each other.
    assert right_ones >= (0.9 if alike else 1.0) * len(keep)


def test_without_any_clock_sequences_are_aligned_by_lengths():
    random = np.random.default_rng(5)
    prompts, outputs = random.integers(10, 500, 60), random.integers(1, 90, 60)
    keep = [one for one in range(60) if one not in (0, 17, 18, 59)]
    left = trace([f"c.{one}." for one in range(60)], None, prompts, outputs, clock="request")
    names = [f"e{chr(65 + one)}" for one in range(len(keep))]
    right = trace(names, np.arange(len(keep)) * 1.0, prompts[keep], outputs[keep])
    found = first(left, right)
    assert found.by == ORDER
    assert found.left.tolist() == keep
    assert found.right.tolist() == list(range(len(keep)))


def test_alike_requests_without_a_clock_are_matched_in_doubt():
    left = trace([f"c{chr(65 + one)}" for one in range(12)], clock="request")
    right = trace([f"e{chr(75 + one)}" for one in range(10)], np.arange(10.0))
    assert "equal lengths" in first(left, right).doubt


def test_regular_arrivals_of_alike_requests_are_matched_in_order_and_in_doubt():
    left = trace([f"c{chr(65 + one)}" for one in range(20)], np.arange(20.0))
    right = trace([f"e{chr(95 + one)}" for one in range(20)], np.arange(20.0) + 100)
    found = first(left, right)
    assert found.left.tolist() == found.right.tolist() == list(range(20))
    assert "other offsets" in found.doubt


def test_other_runs_are_no_match():
    random = np.random.default_rng(1)
    names = [chr(65 + one) for one in range(40)]
    one, other = (
        trace(
            [letter + name for name in names],
            np.cumsum(random.exponential(1, 40)),
            random.integers(1, 900, 40).tolist(),
        )
        for letter in "ab"
    )
    assert first(one, other) is None


def test_a_client_s_number_is_matched_to_the_engine_s_id():
    run = engine()
    seen = Client().sees(run, np.random.default_rng(1), order=np.random.default_rng(2).permutation(len(run)))
    found = first(seen, run)
    assert found.by == PART
    assert [f"cmpl-bench-3f2a9c01-{one}-0" for one in np.array(seen.ids)[found.left]] == [
        run.ids[row] for row in found.right
    ]
