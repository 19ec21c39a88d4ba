from __future__ import annotations

import numpy as np
import pytest

from calibrate.cli.options import deploy
from calibrate.errors import compare
from calibrate.load import POINTS, Load, gauge
from replay.readers import read_trace
from replay.run import replay


def stamped(make_trace, **fields):
    """Two requests of 11 tokens: 0 to 10 s scheduled after 2 s, 5 to 15 s at once."""
    return make_trace([4.0, 0.5], [10.0, 10.0], arrival=[100.0, 105.0], scheduled=[102.0, 105.0], **fields)


def at(series, time):
    place = int(np.searchsorted(series.time, time))
    return series.measured[place], series.predicted[place]


def test_running_and_waiting_come_from_the_stamps_of_both_sides(make_trace):
    late = make_trace([6.0, 0.5], [12.0, 10.0], arrival=[100.0, 105.0], scheduled=[104.0, 105.0])
    series = compare(stamped(make_trace), late).series()

    assert set(series) == {"running", "waiting", "output_tokens_per_s"}
    assert {one.source for one in series.values()} == {"stamps"}
    assert {one.time.size for one in series.values()} == {POINTS}
    assert at(series["waiting"], 1.0) == (1, 1)
    assert at(series["waiting"], 3.0) == (0, 1)
    assert at(series["running"], 3.0) == (1, 0)
    assert at(series["running"], 11.0) == (1, 2)
    assert at(series["running"], 14.0) == (1, 1)


def test_tokens_per_second_add_up_to_all_tokens(make_trace):
    series = compare(stamped(make_trace), stamped(make_trace)).series()["output_tokens_per_s"]
    step = series.time[1] - series.time[0]
    assert series.measured.sum() * step == pytest.approx(22)
    # From the first token at 4 s on, 10 tokens in 6 s.
    assert at(series, 4.5)[0] == pytest.approx(10 / 6)
    assert at(series, 3.0)[0] == 0


def test_token_times_are_counted_where_both_sides_have_them(make_trace):
    times = [[104.0, 104.5, 110.0], [105.5, 115.0]]
    series = compare(stamped(make_trace, token_times=times), stamped(make_trace, token_times=times)).series()
    found = series["output_tokens_per_s"]
    assert found.measured.sum() * (found.time[1] - found.time[0]) == pytest.approx(4)  # the last one ends the run


def test_without_schedule_stamps_requests_in_flight_are_shown(make_trace):
    plain = make_trace([1.0, 1.0], [10.0, 2.0], arrival=[0.0, 5.0])
    series = compare(plain, stamped(make_trace)).series()
    assert set(series) == {"in_flight", "output_tokens_per_s"}
    assert at(series["in_flight"], 6.0) == (2, 2)


def test_gauges_are_taken_as_sampled(make_trace):
    time = [100.0, 101.0, 102.0]
    measured = stamped(make_trace, timeline={"time": time, "running": [0, 1, 2], "kv_usage": [0.1, 0.2, 0.3]})
    predicted = stamped(make_trace, timeline={"time": time, "running": [0, 1, 1], "kv_usage": [0.1, 0.2, 0.4]})
    series = compare(measured, predicted).series()

    assert list(series) == ["running", "waiting", "kv_usage", "output_tokens_per_s"]
    assert [series[name].source for name in series] == ["gauge", "stamps", "gauge", "stamps"]
    assert series["running"].time.tolist() == [0.0, 1.0, 2.0]
    assert series["running"].predicted.tolist() == [0, 1, 1]
    assert series["kv_usage"].measured.tolist() == [0.1, 0.2, 0.3]


def test_runs_on_different_clocks_are_laid_over_each_other(make_trace):
    moved = make_trace([4.0, 0.5], [10.0, 10.0], arrival=[0.0, 5.0], scheduled=[2.0, 5.0])
    for series in compare(stamped(make_trace), moved).series().values():
        assert series.measured.tolist() == pytest.approx(series.predicted.tolist())


def test_a_thinned_series_keeps_its_mean(make_trace):
    time = list(np.arange(960) + 0.5)
    running = list(np.sin(np.arange(960.0)))
    one = make_trace([1.0], [960.0], timeline={"time": time, "running": running})
    series = compare(one, one).series()["running"]
    thin = series.thinned(240)
    assert (series.time.size, thin.time.size) == (960, 240)
    assert thin.measured.mean() == pytest.approx(series.measured.mean())
    assert thin.time[:2].tolist() == [2.0, 6.0]


def test_one_request_without_stamps_has_no_series(make_trace):
    nan = float("nan")
    assert compare(make_trace([nan], [nan]), make_trace([1.0])).series() == {}


@pytest.fixture(scope="module")
def llama(traces):
    """A real run that has gauges as well as stamps, and its replay."""
    measured = read_trace(traces / "rtxpro6000-llama-3.1-8b")
    return measured, replay(measured, deploy(measured, "rtx-pro-6000-llama-3.1-8b", (), None, False)).predicted


def test_stamps_tell_what_the_gauges_of_a_real_engine_say(llama):
    measured, _ = llama
    times, load = gauge(measured, "time"), Load(measured)
    for name, counted in (("running", load.running(times)), ("waiting", load.waiting(times))):
        # The gauge is written once a second, some milliseconds before or after the stamp of its row.
        assert np.abs(gauge(measured, name) - counted).mean() < 0.5
        assert np.corrcoef(gauge(measured, name), counted)[0, 1] > 0.999


def test_table_of_a_real_run_is_complete_and_consistent(llama):
    measured, predicted = llama
    comparison = compare(measured, predicted)
    table = comparison.requests_table()

    assert table.num_rows == comparison.num_paired == 299
    assert not set(table.column("id").to_pylist()) & {"bench-0"}
    columns = {name: np.asarray(table.column(name)) for name in table.column_names if name != "id"}
    assert (np.diff(columns["arrival_s"]) >= 0).all()
    assert columns["arrival_s"][0] > 0  # the cold first request, which is not scored, arrived at 0
    for metric in ("ttft", "tpot", "e2e"):
        errors = columns[f"{metric}_error"]
        assert np.abs(errors).mean() == pytest.approx(comparison.metrics[metric].mape)
        assert columns[f"{metric}_predicted"] / columns[f"{metric}_measured"] - 1 == pytest.approx(errors)
    assert (columns["ttft_measured"] < columns["e2e_measured"]).all()
    assert columns["concurrency"].max() == 128  # max_num_seqs of the run
    assert columns["waiting"].max() > 90
    assert table.column("cached_tokens").null_count == 299
    assert columns["predicted_cached_tokens"].sum() > 0


def test_series_of_a_real_run_hold_all_its_tokens(llama):
    measured, predicted = llama
    found = compare(measured, predicted).series()
    assert {name: one.source for name, one in found.items()} == {
        "running": "gauge",
        "waiting": "gauge",
        "output_tokens_per_s": "stamps",
    }
    tokens = found["output_tokens_per_s"]
    step = tokens.time[1] - tokens.time[0]
    for side in (tokens.measured, tokens.predicted):
        assert side.sum() * step == pytest.approx(measured.column("output_tokens").sum(), abs=1)
