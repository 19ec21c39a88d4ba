import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.errors import InputError
from replay.arrivals import with_arrivals
from replay.draws import Draw, parse_draw
from replay.readers import read_trace

rates = st.floats(1e-3, 1e6)
seeds = st.integers(0, 2**32 - 1)
draws = st.builds(Draw, st.sampled_from(["poisson", "gamma", "constant"]), rates, seeds, st.floats(0.1, 100.0))


@pytest.fixture
def unsent(serve_result, tmp_path):
    """A trace that does not say when its requests were sent."""
    return read_trace(serve_result(start_times=False, failed=(1,), silent=(2,)).write(tmp_path / "unsent.json"))


def test_poisson_draw_is_the_legacy_seeded_generator_of_numpy_one_gap_after_each_request():
    np.random.seed(7)
    sent, clock = [], 0.0
    for _ in range(100):
        sent.append(clock)
        clock += np.random.exponential(1.0 / 16.0)
    np.testing.assert_allclose(Draw("poisson", 16.0, 7).arrivals(100), sent, rtol=1e-12)


def test_gamma_draw_is_that_of_newer_benchmarks_stretched_to_the_nominal_duration():
    np.random.seed(3)
    burstiness, rate, count = 0.5, 8.0, 50
    sent = np.cumsum([np.random.gamma(burstiness, 1.0 / (rate * burstiness)) for _ in range(count)])
    sent *= count / rate / sent[-1]
    np.testing.assert_allclose(Draw("gamma", rate, 3, burstiness).arrivals(count), sent, rtol=1e-12)


@given(draws, st.integers(1, 50))
def test_a_draw_is_reproducible_finite_and_never_runs_back(draw, count):
    arrivals = draw.arrivals(count)
    assert arrivals.tobytes() == draw.arrivals(count).tobytes()
    assert arrivals.shape == (count,)
    assert np.isfinite(arrivals).all()
    assert arrivals[0] >= 0
    assert (np.diff(arrivals) >= 0).all()


def test_seeds_draw_different_arrivals():
    assert (Draw("poisson", 1.0, 0).arrivals(9)[1:] != Draw("poisson", 1.0, 1).arrivals(9)[1:]).all()


@given(rates, st.integers(1, 50))
def test_constant_arrivals_are_one_gap_apart(rate, count):
    np.testing.assert_allclose(Draw("constant", rate).arrivals(count), np.arange(count) / rate, rtol=1e-12)


@given(draws, st.integers(1, 50), st.floats(0.0, 10.0))
def test_overhead_is_added_to_every_gap(draw, count, overhead):
    late = Draw(draw.distribution, draw.rate, draw.seed, draw.burstiness, overhead)
    np.testing.assert_allclose(late.arrivals(count), draw.arrivals(count) + overhead * np.arange(count))


@given(draws)
def test_what_is_written_on_the_command_line_is_what_is_drawn(draw):
    text = f"{draw.distribution}:rate={draw.rate!r},seed={draw.seed},burstiness={draw.burstiness!r}"
    assert parse_draw(text) == draw


@pytest.mark.parametrize(
    "text",
    [
        "",
        "poisson",
        "poisson:",
        "poisson:rate",
        "poisson:rate=",
        "poisson:rate=fast",
        "poisson:rate=0",
        "poisson:rate=-1",
        "poisson:rate=nan",
        "poisson:rate=inf",
        "poisson:rate=1e400",
        "poisson:rate=1e-300",
        "poisson:rate=16,seed=1.5",
        "poisson:rate=16,seed=-1",
        "poisson:rate=16,seed=4294967296",
        "poisson:rate=16,seed=nan",
        "poisson:rate=16,speed=2",
        "poisson:rate=16;seed=0",
        "uniform:rate=16",
        "gamma:rate=16,burstiness=0",
        "gamma:rate=16,burstiness=nan",
        "constant:rate=1,overhead=-1",
        "POISSON:rate=16",
    ],
)
def test_a_draw_of_another_shape_is_refused_with_the_shape_expected(text):
    with pytest.raises(InputError, match=r"expected <distribution>:rate=R") as caught:
        parse_draw(text)
    assert caught.value.field == "--arrivals"


def test_gaps_too_bursty_for_a_double_still_draw_finite_arrivals():
    assert np.isfinite(parse_draw("gamma:rate=1,seed=0,burstiness=1e-5").arrivals(3)).all()


def test_drawing_moves_every_stamp_of_a_request_with_its_arrival(unsent):
    moved = with_arrivals(unsent, "poisson:rate=4,seed=5")
    sent = Draw("poisson", 4.0, 5).arrivals(len(unsent))
    assert moved.clock == "run"
    np.testing.assert_array_equal(moved.column("arrival"), sent)
    for metric in ("ttft", "tpot", "e2e"):
        np.testing.assert_allclose(moved.latency(metric), unsent.latency(metric), rtol=1e-9)
    for before, after, start in zip(unsent.lists("token_times"), moved.lists("token_times"), sent, strict=True):
        assert (before is None) == (after is None)
        assert before is None or after == [time + start for time in before]
    assert moved.meta["columns"]["arrival"].startswith("assumed: drawn, poisson:rate=4,seed=5")
    assert any("send times were not recorded" in note for note in moved.meta["notes"])


def test_drawing_leaves_the_trace_it_was_given_alone(unsent):
    digest, meta = unsent.digest(), repr(unsent.meta)
    with_arrivals(unsent, "constant:rate=1")
    assert (unsent.digest(), repr(unsent.meta)) == (digest, meta)


def test_unknown_arrivals_must_be_drawn_and_the_message_says_how(unsent):
    with pytest.raises(InputError, match=r"--arrivals poisson:rate=R,seed=S draws"):
        with_arrivals(unsent, "measured")


def test_measured_arrivals_are_not_drawn_over(serve_result, tmp_path):
    trace = read_trace(serve_result().write(tmp_path / "sent.json"))
    with pytest.raises(InputError, match=r"has measured arrivals"):
        with_arrivals(trace, "poisson:rate=4,seed=0")
    assert with_arrivals(trace, "measured") is trace


def test_nominal_arrivals_are_the_workloads_and_latencies_count_from_them(bench_folder, tmp_path):
    trace = read_trace(bench_folder().write(tmp_path / "run"))
    nominal = with_arrivals(trace, "nominal")
    np.testing.assert_array_equal(nominal.column("arrival"), trace.column("nominal_arrival"))
    assert nominal.requests.column("first_token").equals(trace.requests.column("first_token"))
    assert nominal.meta["columns"]["arrival"] == "nominal: the workload's"


def test_nominal_arrivals_need_a_workload(bench_folder, tmp_path):
    sample = bench_folder()
    sample.workload = None
    with pytest.raises(InputError, match=r"has no nominal arrivals") as caught:
        with_arrivals(read_trace(sample.write(tmp_path / "run")), "nominal")
    assert caught.value.field == "--arrivals"
