"""Load levels: what a file says of them, and the requests that are made of it."""

import json

import numpy as np
import pytest

from profiles.errors import InputError
from replay.arrivals import with_arrivals
from replay.load_level import LoadLevel, draw, draws, holds_aggregates, level_of
from replay.readers import read_trace, selections

HEADER = "level,rate,concurrency,requests,prompt_tokens,output_tokens,"
TABLE = (
    HEADER
    + """mean_ttft_ms,p99_ttft_ms,mean_tpot,output_throughput
slow,2,,150,512,128,60,95.5,0.0125,250
,8,,300,512,128,75,,0.014,1000
,,16,,512,128,90,140,0.018,
"""
)


@pytest.fixture
def table(tmp_path):
    def write(text=TABLE, name="levels.csv"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


@pytest.fixture
def summary(serve_result, tmp_path):
    """A result without --save-detailed: four requests of 100 and 25 tokens at 2 per second."""

    def write(**changes):
        result = serve_result()
        for name in ("input_lens", "output_lens", "ttfts", "itls", "start_times", "errors"):
            del result.document[name]
        own = {
            "num_prompts": 4,
            "completed": 4,
            "total_input_tokens": 400,
            "total_output_tokens": 100,
            "mean_ttft_ms": 59.5,
            "median_ttft_ms": 58.0,
            "std_ttft_ms": 4.0,
            "p99_ttft_ms": 70.0,
            "mean_tpot_ms": 12.5,
            "mean_e2el_ms": 360.0,
            "output_throughput": 40.0,
        }
        result.document |= own | changes
        return result.write(tmp_path / "run.json")

    return write


def test_a_result_without_details_is_a_load_level(summary):
    trace = read_trace(summary())
    assert holds_aggregates(trace)
    said = trace.meta["aggregates"]
    assert said["ttft"] == pytest.approx({"mean": 0.0595, "p50": 0.058, "std": 0.004, "p99": 0.07})
    assert said["tpot"] == pytest.approx({"mean": 0.0125})
    assert said["e2e"] == pytest.approx({"mean": 0.36})
    assert said["throughput"] == {"duration": 2.5, "output_tokens_per_s": 40.0, "requests_per_s": 2.0}
    level = level_of(trace)
    assert (level.requests, level.rate, level.burstiness, level.max_concurrency) == (4, 2.0, 1.0, None)
    assert level.lengths_known
    assert trace.column("prompt_tokens").tolist() == [100] * 4
    assert trace.column("output_tokens").tolist() == [25] * 4
    assert not any(trace.has(name) for name in ("arrival", "first_token", "last_token", "token_times"))
    for name in ("id", "status", "prompt_tokens", "output_tokens"):
        assert not trace.meta["columns"][name].startswith("measured"), name


def test_totals_that_do_not_divide_are_met_by_lengths_that_are_said_to_be_assumed(summary):
    trace = read_trace(summary(total_input_tokens=402))
    assert trace.column("prompt_tokens").sum() == 402
    assert set(trace.column("prompt_tokens")) == {100.0, 101.0}
    assert not level_of(trace).lengths_known
    assert trace.meta["columns"]["prompt_tokens"].startswith("assumed")
    assert any("only the means are known" in note for note in trace.meta["notes"])


@pytest.mark.parametrize("rate", ["inf", float("inf")])
def test_all_at_once_and_clients_that_wait_are_told_apart(summary, rate):
    at_once = with_arrivals(read_trace(summary(request_rate=rate)), "measured")
    assert at_once.column("arrival").tolist() == [0.0] * 4
    assert level_of(at_once).max_concurrency is None
    waiting = read_trace(summary(request_rate=rate, max_concurrency=2))
    assert level_of(waiting).max_concurrency == 2
    assert len(draws(with_arrivals(waiting, "measured"), 3)) == 1


def test_old_results_drew_gaps_without_stretching_them(summary):
    assert level_of(read_trace(summary(burstiness=None))).distribution == "poisson"
    assert level_of(read_trace(summary())).distribution == "gamma"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"completed": 0}, "completed"),
        ({"total_input_tokens": 3}, "total_input_tokens"),
        ({"total_output_tokens": None}, "total_output_tokens"),
        ({"request_rate": -1.0}, "request_rate"),
        ({"max_concurrency": 0}, "max_concurrency"),
        ({"ramp_up_strategy": "linear"}, "ramp_up_strategy"),
        ({"mean_ttft_ms": -3.0}, "mean_ttft_ms"),
    ],
)
def test_a_summary_that_cannot_be_used_names_the_field(summary, changes, field):
    with pytest.raises(InputError) as caught:
        read_trace(summary(**changes))
    assert caught.value.field == field


def test_every_row_of_a_table_is_a_trace(table):
    path = table()
    assert selections(path) == ["slow", "rate-8", "concurrency-16"]
    slow, fast, loop = (read_trace(path, name) for name in selections(path))
    assert slow.name == "levels#slow"
    assert slow.meta["aggregates"] == {
        "ttft": {"mean": 0.06, "p99": 0.0955},
        "tpot": {"mean": 0.0125},
        "throughput": {"output_tokens_per_s": 250.0},
    }
    assert len(slow) == 150
    assert level_of(fast).rate == 8
    assert "p99" not in fast.meta["aggregates"]["ttft"]
    assert (level_of(loop).rate, level_of(loop).max_concurrency, len(loop)) == (None, 16, 200)
    assert any("200 are assumed" in note for note in loop.meta["notes"])


def test_json_says_the_deployment_too(table):
    level = {"rate": 3, "requests": 50, "prompt_tokens": 64, "output_tokens": 16.5, "mean_ttft": 0.05}
    document = {
        "schema": "servecal.load-levels/1",
        "model": "llama-3.2-1b",
        "engine": {"version": "0.19.0", "arguments": {"max_num_seqs": 8}},
        "vantage": "engine",
        "levels": [level],
    }
    trace = read_trace(table(json.dumps(document), "levels.json"))
    assert trace.meta["engine"] == {"name": "vllm", "version": "0.19.0", "arguments": {"max_num_seqs": 8}}
    assert trace.meta["vantage"] == "engine"
    assert not level_of(trace).lengths_known
    assert trace.column("output_tokens").sum() == 825


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("mean_tpot", "mean_tpto", ["line 2", "'mean_tpto'", "is no column"]),
        (",60,", ",sixty,", ["line 2", "'mean_ttft_ms'", "expected a number"]),
        (",60,", ",-60,", ["line 2", "'mean_ttft_ms'", "above 0"]),
        ("slow,2,", "slow,,", ["line 2", "'rate'", "is missing"]),
        ("slow,2,", "slow,0,", ["line 2", "'rate'", "from 1e-06"]),
        ("150,512", "1.5,512", ["line 2", "'requests'", "whole number"]),
        ("150,512", "150,", ["line 2", "'prompt_tokens'", "is missing"]),
        (",250\n", "\n", ["line 2", "has 9 cells, the header 10"]),
        ("slow,2,", "rate-8,2,", ["'level'", "2 levels are called 'rate-8'"]),
        ("level,rate", "rate,rate", ["'rate'", "stands twice"]),
    ],
)
def test_a_table_that_cannot_be_used_names_line_and_column(table, old, new, parts):
    path = table(TABLE.replace(old, new, 1))
    with pytest.raises(InputError) as caught:
        read_trace(path, selections(path)[0])
    for part in parts:
        assert part in str(caught.value)


def test_one_of_several_levels_must_be_named(table):
    with pytest.raises(InputError, match=r"levels\.csv#slow, levels\.csv#rate-8"):
        read_trace(table())
    with pytest.raises(InputError, match="no load level 'fast'; it has slow, rate-8, concurrency-16"):
        read_trace(table(), "fast")


def test_a_seed_makes_the_same_requests_again_and_another_makes_others():
    level = LoadLevel(400, 500.0, 100.0, rate=4.0, prompt_tokens_std=150.0, output_tokens_std=100.0)
    first, again, other = (level.arrivals(seed) for seed in (1, 1, 2))
    assert (first == again).all()
    assert not (first == other).any()
    # As vLLM's benchmark: gaps stretched so that the last request comes at n / rate.
    assert first[-1] == pytest.approx(100.0)
    prompt, output = level.lengths(1)
    assert prompt.mean() == pytest.approx(500, rel=0.05)
    assert prompt.std() == pytest.approx(150, rel=0.1)
    assert output.std() == pytest.approx(100, rel=0.15)
    assert output.min() >= 1
    assert not (level.lengths(2)[0] == prompt).all()


def test_arrivals_that_a_user_says_are_never_drawn_otherwise(summary):
    said = with_arrivals(read_trace(summary()), "poisson:rate=5,seed=3")
    assert len(draws(said, 3)) == 1
    assert (draws(said, 3)[0].column("arrival") == said.column("arrival")).all()
    free = with_arrivals(read_trace(summary()), "measured")
    assert len(draws(free, 3)) == 3
    assert "seed=0" in free.meta["columns"]["arrival"]


def test_a_load_level_is_saved_and_read_again(summary, tmp_path):
    trace = draw(read_trace(summary()), 0)
    trace.save(tmp_path / "saved")
    back = read_trace(tmp_path / "saved")
    assert back.requests.equals(trace.requests)
    assert back.meta == trace.meta
    assert back.digest() == trace.digest()
    assert trace.with_meta(aggregates={"ttft": {"mean": 1.0}}).digest() != trace.digest()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"aggregates": {"speed": {"mean": 1.0}}}, "aggregates.speed"),
        ({"aggregates": {"ttft": {"typical": 1.0}}}, "aggregates.ttft.typical"),
        ({"aggregates": {"ttft": {"mean": -1.0}}}, "aggregates.ttft.mean"),
        ({"workload": {"requests": 5, "prompt_tokens": 1.0, "output_tokens": 1.0}}, "workload.requests"),
    ],
)
def test_a_saved_load_level_that_contradicts_itself_is_refused(summary, tmp_path, changes, field):
    draw(read_trace(summary()), 0).save(tmp_path / "saved")
    place = tmp_path / "saved" / "trace.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | changes))
    with pytest.raises(InputError) as caught:
        read_trace(tmp_path / "saved")
    assert caught.value.field == field


def test_lengths_are_spread_evenly_over_a_run():
    prompt, _ = LoadLevel(1000, 215.196, 120.0).lengths(0)
    assert prompt.sum() == 215_196
    assert np.ptp(np.add.reduceat(prompt, np.arange(0, 1000, 100))) <= 1
