"""``servecal fit`` refuses or warns instead of fitting nonsense."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from synthetic import changed, workload

from profiles.deployment import Facts, resolve
from profiles.profile import load_profile
from replay.readers import read_trace
from replay.run import replay
from replay.trace import TIMELINE

CAPTURE = Path(__file__).resolve().parents[2] / "reference_traces/captures/vllm-cpu-shared-prefix"
STAMPS = ("queued", "scheduled", "first_token", "last_token")
ARGUMENTS = {
    "max_num_seqs": 32,
    "max_num_batched_tokens": 1024,
    "max_model_len": 4096,
    "num_gpu_blocks": 4000,
    "enable_prefix_caching": False,
}


@pytest.fixture(scope="module")
def sound():
    """A run that the simulator made: Llama-3.1-8B on an L4's datasheet."""
    meta = {
        "name": "sound",
        "model": "llama-3.1-8b",
        "engine": {"version": "0.19.0", "arguments": ARGUMENTS},
    }
    sent = workload(np.random.default_rng(3), 60, 1.0, (100, 900), (20, 60), **meta)
    sent = changed(sent, nominal_arrival=sent.column("arrival"))
    facts = Facts(model="llama-3.1-8b", version="0.19.0", arguments=ARGUMENTS)
    truth = resolve(load_profile("roofline:l40s"), facts)
    return replace(replay(sent, truth).predicted, _columns={}).with_meta(**sent.meta, source=None)


def some(trace, rows):
    return replace(trace, requests=trace.requests.take(rows), _columns={})


def moved(trace, rows, seconds, names=STAMPS):
    """The stamps of some requests by another clock."""
    by = np.zeros(len(trace))
    by[rows] = seconds
    return changed(trace, **{name: trace.column(name) + by for name in names})


@pytest.fixture
def fitted(called, tmp_path):
    """Save a trace, fit it, and assert that a refused fit has written nothing."""

    def run(trace, *arguments, base="roofline:l40s"):
        trace.save(tmp_path / "run")
        finished = called("fit", "run", "--base", base, "-o", "out.yaml", "--strength", "1", *arguments)
        assert (tmp_path / "out.yaml").exists() == (finished.code == 0), finished
        return finished

    return run


def test_a_sound_run_is_fitted_without_a_warning(fitted, sound):
    document = fitted(sound, "--format", "json").json
    assert document["warnings"] == []
    told = {one["name"]: one for one in document["findings"]}
    assert told["num_gpu_blocks"]["source"] == "stated"
    assert (told["async_scheduling"]["value"], told["async_scheduling"]["source"]) == (True, "stamps")


def test_one_request_is_refused(fitted, sound):
    fitted(some(sound, [7])).refused("sound: one request was served")


def test_a_run_in_which_all_failed_is_refused_with_its_first_error(fitted, sound):
    count = len(sound)
    failed = changed(sound, status=["failed"] * count, error=["ConnectionRefusedError: port 8000"] * count)
    fitted(failed).refused("no request was served to its end (60 failed)", "ConnectionRefusedError")


def test_failed_requests_are_warned_of(fitted, sound):
    status = ["failed" if place % 10 == 9 else "ok" for place in range(len(sound))]
    document = fitted(changed(sound, status=status), "--format", "json").json
    assert "6 of 60 requests failed" in document["warnings"][0]


def test_requests_queued_before_they_arrived_are_refused(fitted, sound):
    # The engine's clock is behind by 50 ms; first tokens still come after the arrivals.
    early = changed(sound, queued=sound.column("queued") - 0.05)
    fitted(early).refused("queued before they arrived", "by 0.050 s", "two clocks")


def test_engine_stamps_of_another_clock_are_refused(fitted, sound):
    fitted(moved(sound, np.arange(len(sound)), 479_748.0)).refused("every request was queued 479748.", "two clocks")


def test_requests_of_two_clocks_mixed_are_refused(fitted, sound):
    fitted(moved(sound, np.arange(0, 60, 3), 30.0)).refused("an engine takes arrivals in after every iteration")


def test_a_first_token_before_its_schedule_is_refused(fitted, sound):
    spoilt = changed(sound, scheduled=sound.column("first_token") + 0.01)
    fitted(spoilt).refused("first_token", "lies before scheduled")


@pytest.mark.parametrize("seconds", [2e-4, 0.02])
def test_stamps_that_do_not_line_up_with_iterations_are_refused(fitted, seconds):
    # Each request's stamps by a clock of its own: no two tokens are of one iteration any more.
    capture = replace(read_trace(CAPTURE), iterations=None, _columns={})
    by = np.random.default_rng(0).uniform(0, seconds, len(capture))
    spoilt = changed(capture, **{name: capture.column(name) + by for name in STAMPS})
    fitted(spoilt, base="linear").refused("carry the same stamp, about 63 should", "of several clocks")


def test_clocks_that_drift_apart_are_warned_of(fitted, sound):
    drifting = changed(
        sound, arrival=sound.column("arrival") - 0.004 * sound.column("arrival"), nominal_arrival=[None] * len(sound)
    )
    document = fitted(drifting, "--format", "json").json
    assert "two clocks drift apart" in document["warnings"][0]


def test_a_saturated_client_is_warned_of(fitted, sound):
    # The plan wanted twice the rate.
    late = changed(sound, nominal_arrival=sound.column("arrival") / 2)
    finished = fitted(late)
    assert finished.code == 0
    assert "warning: sound: the client fell behind its plan" in finished.out
    same = fitted(changed(sound, nominal_arrival=sound.column("arrival") + 100.0))
    assert "fell behind" not in same.out


@pytest.mark.parametrize(
    ("argument", "value", "says"),
    [
        ("max_num_seqs", 2, "requests ran at once by their stamps, engine.max_num_seqs is 2"),
        ("max_model_len", 800, "requests were served that max_model_len=800 does not allow"),
        ("num_gpu_blocks", 90, "KV blocks at once by their stamps, engine.num_gpu_blocks is 90"),
    ],
)
def test_engine_arguments_that_the_run_broke_are_refused(fitted, sound, argument, value, says):
    arguments = ["--set", f"engine.{argument}={value}"]
    fitted(sound, *arguments).refused(says, "not the run's argument")


def test_a_gauge_above_max_num_seqs_is_refused(fitted, sound):
    values = [pa.array([1.0, 2.0]), pa.array([3.0, 40.0]), *[pa.nulls(2, pa.float64())] * 4]
    gauged = replace(sound, timeline=pa.table(values, TIMELINE), _columns={})
    fitted(gauged).refused("its gauge says that 40 requests ran at once")


@pytest.mark.parametrize(("argument", "unit"), [("max_num_seqs", "requests"), ("max_num_batched_tokens", "tokens")])
def test_recorded_iterations_beyond_the_arguments_are_refused(fitted, argument, unit):
    capture = read_trace(CAPTURE)
    arguments = {**capture.meta["engine"]["arguments"], argument: 8, "max_num_scheduled_tokens": None}
    spoilt = capture.with_meta(engine={**capture.meta["engine"], "arguments": arguments})
    fitted(spoilt, base="linear").refused(f"{unit}, engine.{argument} is 8")


def test_recorded_iterations_that_run_back_are_refused(fitted):
    capture = read_trace(CAPTURE)
    start = capture.iterations.column("start").to_numpy().copy()
    start[100] = start[50]
    spoilt = replace(capture, iterations=capture.iterations.set_column(0, "start", pa.array(start)), _columns={})
    fitted(spoilt, base="linear").refused("recorded iteration 101 begins before the one before it")


def test_tokens_faster_than_the_weights_can_be_read_are_refused(fitted, sound):
    # An L4 has a third of an L40S's bandwidth.
    fitted(sound, base="roofline:l4").refused("faster than the weights can be read", "l4", "quantization")
    # Without physics nothing says that this cannot be.
    assert fitted(sound, base="linear").code == 0


def test_prompts_faster_than_peak_arithmetic_are_refused(fitted, sound):
    quick = some(sound, list(range(20)))
    squeezed = {name: 0.02 * quick.column(name) for name in ("arrival", "queued", "scheduled")}
    begin = squeezed["scheduled"] + 1e-3
    decode = quick.column("last_token") - quick.column("first_token")
    one = {**squeezed, "first_token": begin, "last_token": begin, "output_tokens": [1] * len(quick)}
    assert decode.min() > 0
    fitted(changed(quick, **one)).refused("their arithmetic takes", "peak rate")


def test_a_real_run_breaks_nothing(traces, monkeypatch):
    from calibrate.cli.options import load_trace
    from calibrate.inference import resolved
    from calibrate.sanity import refuse_nonsense

    monkeypatch.setenv("SERVECAL_TRACES", str(traces))
    for name, base in (
        ("rtxpro6000-llama-3.1-8b", "roofline:rtx-pro-6000"),
        ("rtxpro6000-qwen3-32b-tp2", "roofline:rtx-pro-6000"),
        ("vllm-cpu-shared-prefix", "linear"),
        ("vllm-cpu-preemption", "linear"),
    ):
        trace = load_trace(name)
        assert refuse_nonsense(trace, resolved(load_profile(base), trace)) == []
    for run in ("qps16", "qps32"):
        trace = load_trace(f"h100x8-llama-3.1-405b-fp8/{run}.json", "catalogue")
        warnings = refuse_nonsense(trace, resolved(load_profile("roofline:h100-sxm"), trace))
        assert not [line for line in warnings if "silent" in line or "datasheet" in line]
    # The same stamps on a GPU with a sixth of the bandwidth.
    trace = load_trace("rtxpro6000-llama-3.1-8b")
    from profiles.errors import InputError

    with pytest.raises(InputError, match="faster than the weights can be read"):
        refuse_nonsense(trace, resolved(load_profile("roofline:l4"), trace, settings=("engine.num_gpu_blocks=20000",)))


def test_what_the_checks_of_data_doubt_is_a_warning_and_strict_exits_with_2(fitted, called, sound):
    wrong = np.arange(len(sound)) % 3 == 0
    length = sound.column("output_tokens")
    doubtful = changed(sound, output_tokens=np.where(wrong, np.round(1.3 * length), length).astype(int))
    document = fitted(doubtful, "--format", "json").json
    assert any("re-tokenised" in line for line in document["warnings"])
    strict = called("fit", "run", "--base", "roofline:l40s", "-o", "out.yaml", "--strength", "1", "--strict")
    assert strict.code == 2
    assert "error: --strict: the data have 2 findings: sound: 20 of 60 requests got tokens faster" in strict.err
    assert fitted(sound, "--strict").code == 0
