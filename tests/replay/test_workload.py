"""Workloads made out of others: counts, order, rates, and what is said of them."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.errors import InputError
from replay import workload
from replay.arrivals import with_arrivals
from replay.length_draws import parse_lengths
from replay.readers import read_trace
from replay.trace import Trace, check_requests, requests_table

OBSERVED = ("queued", "scheduled", "first_token", "last_token", "token_times", "cached_tokens", "preemptions")
TIMES = st.floats(0, 1e5, allow_nan=False).map(lambda one: round(one, 6))


def load(arrival, session=None, hashes=False, name="load"):
    """A workload with lengths that tell its rows apart."""
    count = len(arrival)
    columns = {
        "id": [f"r{row}" for row in range(count)],
        "status": ["ok"] * count,
        "arrival": np.array(arrival, dtype=float),
        "prompt_tokens": [32 + row for row in range(count)],
        "output_tokens": [1 + row % 7 for row in range(count)],
        "session": session,
    }
    if hashes:
        columns["block_hashes"] = pa.array([[1, 100 + row] for row in range(count)])
    meta = {
        "name": name,
        "clock": {"kind": "run", "origin": 7.0},
        "columns": {"arrival": "measured"},
        "block_hash": {"block_size": 16} if hashes else None,
    }
    return Trace(requests_table(columns, count), meta)


@pytest.fixture
def measured(bench_folder, tmp_path):
    return read_trace(bench_folder().write(tmp_path / "bench"))


arrivals = st.lists(TIMES, min_size=1, max_size=30)


def rate(trace):
    times = trace.column("arrival")
    return (len(times) - 1) / np.ptp(times)


@given(arrivals, st.floats(0, 1e5), st.floats(0, 1e5))
def test_cutting_keeps_exactly_the_requests_of_the_stretch_and_is_idempotent(times, start, end):
    trace = load(times)
    inside = [f"r{row}" for row, one in enumerate(times) if start <= one < end]
    if not inside:
        with pytest.raises(InputError, match=r"the cut leaves no request"):
            workload.cut(trace, start=start, end=end)
        return
    once = workload.cut(trace, start=start, end=end)
    assert once.ids == inside
    again = workload.cut(once, start=start, end=end)
    assert again.requests.equals(once.requests)
    assert [step["step"] for step in again.meta["provenance"]] == ["cut", "cut"]


@given(arrivals, st.integers(0, 31), st.integers(1, 31))
def test_cutting_by_count_takes_requests_by_arrival_and_leaves_rows_in_place(times, skip, first):
    trace = load(times)
    wanted = sorted(np.argsort(times, kind="stable")[skip : skip + first].tolist())
    if not wanted:
        with pytest.raises(InputError):
            workload.cut(trace, skip=skip, first=first)
        return
    assert workload.cut(trace, skip=skip, first=first).ids == [f"r{row}" for row in wanted]


@given(arrivals, st.floats(-1e4, 1e4))
def test_shifting_moves_all_times_alike_and_back(times, by):
    trace = load(times)
    moved = workload.shift(trace, by=by)
    np.testing.assert_allclose(moved.column("arrival") - trace.column("arrival"), by, atol=1e-9)
    assert moved.meta["clock"]["origin"] == 7.0 - by
    to_start = workload.shift(moved, to=0.0)
    assert to_start.column("arrival").min() == 0.0
    assert (to_start.column("arrival") >= 0).all()
    assert workload.shift(to_start, to=0.0).requests.equals(to_start.requests)


@given(arrivals, st.floats(1e-3, 1e3))
def test_scaling_multiplies_the_rate_and_keeps_order_and_start(times, factor):
    trace = load(times)
    scaled = workload.scale(trace, factor=factor)
    before, after = trace.column("arrival"), scaled.column("arrival")
    assert after.min() == before.min()
    np.testing.assert_allclose((after - after.min()) * factor, before - before.min(), rtol=1e-6, atol=1e-6)
    assert (np.diff(after[np.argsort(before, kind="stable")]) >= 0).all()
    if np.ptp(before) > 1:
        assert rate(workload.scale(trace, rate=2.5)) == pytest.approx(2.5, rel=1e-6)


@given(arrivals, arrivals)
def test_merging_conserves_requests_and_orders_them(left, right):
    merged = workload.merge([load(left), load(right)])
    assert len(merged) == len(left) + len(right)
    assert (np.diff(merged.column("arrival")) >= 0).all()
    assert sorted(merged.column("arrival").tolist()) == sorted([*left, *right])
    assert sorted(merged.ids) == sorted([f"0:r{i}" for i in range(len(left))] + [f"1:r{i}" for i in range(len(right))])
    check_requests(merged, "merged")


@given(st.lists(st.none() | st.sampled_from("abcde"), min_size=1, max_size=30), st.floats(0.01, 1), st.integers(0, 9))
def test_sampling_by_session_keeps_sessions_whole(sessions, fraction, seed):
    trace = load(range(len(sessions)), sessions)
    if not any(sessions):
        with pytest.raises(InputError, match=r"does not say which requests are of one session"):
            workload.sample(trace, fraction=fraction, by="session", seed=seed)
        return
    sampled = workload.sample(trace, fraction=fraction, by="session", seed=seed)
    assert sampled.requests.equals(workload.sample(trace, fraction=fraction, by="session", seed=seed).requests)
    groups = [one or f"alone {row}" for row, one in enumerate(sessions)]
    kept = {groups[int(one[1:])] for one in sampled.ids}
    assert len(kept) == max(1, round(len(set(groups)) * fraction))
    assert sampled.ids == [f"r{row}" for row, group in enumerate(groups) if group in kept]


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 9))
def test_sampling_by_count_keeps_so_many_in_order(total, count, seed):
    trace = load(range(total))
    if count > total:
        with pytest.raises(InputError, match=rf"has {total} requests, fewer than {count}"):
            workload.sample(trace, count=count, seed=seed)
        return
    sampled = workload.sample(trace, count=count, seed=seed)
    rows = [int(one[1:]) for one in sampled.ids]
    assert len(rows) == count
    assert rows == sorted(set(rows))


@given(arrivals, st.sampled_from(["poisson:rate=4,seed=3", "gamma:rate=4,seed=1,burstiness=0.25", "constant:rate=4"]))
def test_redrawn_arrivals_keep_the_order_and_come_from_the_first_on(times, scheme):
    trace = load(times)
    drawn = workload.redraw(trace, scheme)
    order = np.argsort(times, kind="stable")
    after = drawn.column("arrival")[order]
    assert (np.diff(after) >= 0).all()
    assert (after >= min(times)).all()
    assert drawn.meta["columns"]["arrival"] == f"made: drawn, {scheme}"
    assert drawn.requests.column("prompt_tokens").equals(trace.requests.column("prompt_tokens"))
    assert workload.redraw(drawn, scheme).column("prompt_tokens").tolist() == trace.column("prompt_tokens").tolist()


@pytest.mark.parametrize(
    ("scheme", "variation"),
    [("poisson:rate=8,seed=1", 1.0), ("gamma:rate=8,seed=1,burstiness=0.25", 2.0), ("constant:rate=8", 0.0)],
)
def test_gaps_have_the_rate_and_the_variation_asked_for(scheme, variation):
    trace = workload.redraw(load(range(20_000)), scheme)
    gaps = np.diff(trace.column("arrival"))
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, abs=0.05)


def draw(text, **options):
    return parse_lengths(text, "prompt_tokens", **options)


def test_lengths_have_the_moments_and_bounds_asked_for():
    random = np.random.default_rng(0)
    assert set(draw("fixed:7").lengths(9, random).tolist()) == {7}
    uniform = draw("uniform:low=3,high=5").lengths(9000, random)
    assert set(uniform.tolist()) == {3, 4, 5}
    assert np.bincount(uniform)[3:] / 3000 == pytest.approx([1, 1, 1], abs=0.06)
    wide = draw("lognormal:mean=512,std=300").lengths(50_000, random)
    assert wide.mean() == pytest.approx(512, rel=0.01)
    assert wide.std() == pytest.approx(300, rel=0.03)
    narrow = draw("lognormal:mean=512,std=300,min=100,max=600").lengths(5000, random)
    assert (narrow.min(), narrow.max()) == (100, 600)
    seen = draw("trace:other", load=lambda name: load(range(3))).lengths(3000, random)
    assert set(seen.tolist()) == {32, 33, 34}


@pytest.mark.parametrize(
    "text",
    [
        "fixed",
        "fixed:0",
        "fixed:x",
        "fixed:1.5",
        "fixed:1e999",
        "uniform:low=5,high=3",
        "uniform:low=5",
        "uniform:low=1,high=2,min=1",
        "lognormal:mean=5",
        "lognormal:mean=nan,std=1",
        "lognormal:mean=1,std=-1",
        "normal:mean=5,std=1",
        "trace:",
        "",
    ],
)
def test_lengths_of_another_shape_are_refused(text):
    with pytest.raises(InputError, match=r"expected fixed:N, uniform:low=A,high=B, lognormal:mean=M,std=S") as caught:
        draw(text, option="--prompt", load=lambda name: load(range(3)))
    assert caught.value.field == "--prompt"


def test_new_prompts_share_nothing_and_new_outputs_leave_prompts_alone():
    trace = load(range(4), hashes=True)
    outputs = workload.with_lengths(trace, output=draw("fixed:9"))
    assert outputs.lists("block_hashes") == trace.lists("block_hashes")
    assert outputs.column("output_tokens").tolist() == [9] * 4
    prompts = workload.with_lengths(trace, prompt=draw("uniform:low=1,high=99"), seed=4)
    assert not prompts.has("block_hashes")
    assert prompts.meta["block_hash"] is None
    assert prompts.meta["columns"]["block_hashes"] == "unknown: prompts were drawn anew"
    assert prompts.meta["columns"]["prompt_tokens"] == "made: drawn, uniform:low=1,high=99"
    assert prompts.meta["provenance"] == [{"step": "lengths", "prompt": "uniform:low=1,high=99", "seed": 4}]


@given(st.integers(1, 40), st.integers(0, 100), st.integers(1, 4), st.floats(0, 1), st.sampled_from([1, 16]))
def test_prompts_share_exactly_the_blocks_of_a_prefix(count, tokens, groups, share, block_size):
    trace = workload.with_prefixes(
        load(range(count)), tokens=tokens, groups=groups, share=share, block_size=block_size, seed=1
    )
    lists = trace.lists("block_hashes")
    assert [len(one) for one in lists] == [length // block_size for length in range(32, 32 + count)]
    blocks = tokens // block_size
    heads = (
        {tuple(one[:blocks]) for one in lists if sum(one[0] == other[0] for other in lists) > 1} if blocks else set()
    )
    assert len({head[0] for head in heads}) <= groups
    everything = [one for row in lists for one in row]
    seen = {one: everything.count(one) for one in everything}
    for row in lists:
        assert all(seen[one] == 1 for one in row[blocks:])
        assert len(set(row)) == len(row)
    if share == 1.0 and groups == 1 and blocks:
        assert len({row[0] for row in lists}) == 1
    if share == 0.0:
        assert max(seen.values()) == 1
    assert trace.meta["block_hash"] == {"block_size": block_size}


def test_prompts_of_merged_workloads_share_nothing_with_each_other():
    merged = workload.merge([load(range(3), hashes=True), load(range(3), hashes=True)])
    by_source = {place: set() for place in "01"}
    for one, hashes in zip(merged.ids, merged.lists("block_hashes"), strict=True):
        by_source[one[0]] |= set(hashes)
        assert len(hashes) == 2
    assert len(by_source["0"]) == len(by_source["1"]) == 4
    assert not by_source["0"] & by_source["1"]


def test_blocks_of_two_sizes_are_brought_to_the_smaller():
    coarse = load(range(2), hashes=True)
    coarse = coarse.with_meta(block_hash={"block_size": 64})
    merged = workload.merge([coarse, load(range(2), hashes=True)])
    assert merged.meta["block_hash"] == {"block_size": 16}
    assert sorted(len(one) for one in merged.lists("block_hashes")) == [2, 2, 8, 8]


def test_only_a_shift_keeps_latencies(measured):
    moved = workload.shift(measured, by=2.5)
    np.testing.assert_allclose(moved.latency("ttft"), measured.latency("ttft"), atol=1e-12)
    np.testing.assert_allclose(moved.timeline["time"], np.array(measured.timeline["time"]) + 2.5)
    assert workload.measures_latency(moved)
    steps = {
        "cut": workload.cut(measured, first=3),
        "scale": workload.scale(measured, factor=2),
        "sample": workload.sample(measured, count=3),
        "redraw": workload.redraw(measured, "constant:rate=1"),
        "lengths": workload.with_lengths(measured, output=draw("fixed:3")),
        "prefixes": workload.with_prefixes(measured, tokens=32),
        "merge": workload.merge([measured, measured]),
    }
    for name, trace in steps.items():
        assert not workload.measures_latency(trace), name
        assert trace.timeline is None
        assert trace.meta["provenance"][-1]["step"] == name
        for column in OBSERVED:
            assert not trace.has(column)
        assert "measured under another load" in trace.meta["columns"]["first_token"]
        check_requests(trace, name)


def test_a_cut_that_keeps_all_keeps_all(measured):
    assert workload.cut(measured, first=99).requests.equals(measured.requests)
    assert workload.sample(measured, fraction=1.0).requests.equals(measured.requests)


def test_steps_that_need_arrivals_say_so(measured):
    bare = workload.without_latencies(measured)
    columns = {name: bare.requests.column(name) for name in bare.requests.column_names} | {"arrival": None}
    unknown = Trace(requests_table(columns, len(bare)), {**bare.meta, "clock": {"kind": "request"}})
    for call in (
        lambda: workload.cut(unknown, end=1.0),
        lambda: workload.shift(unknown, by=1.0),
        lambda: workload.scale(unknown, factor=2.0),
        lambda: workload.merge([unknown, bare]),
    ):
        with pytest.raises(InputError, match=r"does not say when its requests were sent: .*`servecal workload redraw`"):
            call()
    assert workload.cut(unknown, first=2).ids == measured.ids[:2]
    drawn = workload.redraw(unknown, "constant:rate=2")
    assert drawn.clock == "run"
    assert drawn.column("arrival")[:3].tolist() == [0.0, 0.5, 1.0]


def test_each_step_takes_one_of_two_arguments(measured):
    for call in (workload.shift, workload.scale, workload.sample):
        with pytest.raises(InputError, match=r"expected either"):
            call(measured)
    with pytest.raises(InputError, match=r"expected lengths of prompts or outputs"):
        workload.with_lengths(measured)
    with pytest.raises(InputError, match=r"at least two traces"):
        workload.merge([measured])
    with pytest.raises(InputError, match=r"all requests arrive at once"):
        workload.scale(load([1.0, 1.0]), rate=3)


def test_arrivals_of_a_workload_may_be_drawn_and_of_a_measured_run_not(measured):
    drawn = with_arrivals(load([5.0, 4.0]), "constant:rate=2")
    assert drawn.column("arrival").tolist() == [4.5, 4.0]
    with pytest.raises(InputError, match=r"has measured arrivals"):
        with_arrivals(measured, "constant:rate=2")


def test_a_made_workload_is_the_same_twice_and_saved_whole(tmp_path):
    first, second = (
        workload.made(50, "poisson:rate=3,seed=2", draw("lognormal:mean=99,std=50"), draw("fixed:8"), seed=5)
        for _ in range(2)
    )
    assert first.requests.equals(second.requests)
    first.save(tmp_path / "made")
    back = read_trace(tmp_path / "made")
    assert back.requests.equals(first.requests)
    assert back.meta["provenance"] == first.meta["provenance"]
    assert set(back.meta["columns"]) >= {"arrival", "prompt_tokens"}
