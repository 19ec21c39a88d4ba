"""Faults are planted on one side of a real comparison, and must be found where they are."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from calibrate.attribution import PARTS, STATISTICS, Attribution, attribute
from calibrate.capacity import arrival_rate, capacity
from calibrate.cli.options import deploy, load_trace
from calibrate.errors import Comparison, compare
from calibrate.evidence_of_data import data_evidence
from calibrate.measured_schedule import calls_ahead, measured_schedule, with_columns
from calibrate.step_times import CorrectedSteps, step_errors, stretched
from replay.run import replay
from replay.trace import Trace
from simulator.batch import Batch

GPU, GPU_PROFILE = "rtxpro6000-llama-3.1-8b", "rtx-pro-6000-llama-3.1-8b"
CPU, CPU_PROFILE = "vllm-cpu-preemption", "vllm-cpu-llama-8x512"
SEED = 1
CHAOS = 0.004
"""By so much of its TTFT does a saturated engine's schedule differ when an arrival moves by milliseconds."""


class Scene:
    """A real trace, its fitted profile, and what is changed on one side."""

    def __init__(self, name: str, profile: str) -> None:
        self.name, self.profile = name, profile
        self.trace = load_trace(name)
        self.deployment = deploy(self.trace, profile, (), None, False)
        self.predicted = replay(self.trace, self.deployment)
        self.result = cache(self._result)

    def _result(self, settings: tuple[str, ...] = ()) -> tuple[Comparison, Attribution]:
        return self.of(self.trace, settings)

    def of(self, trace: Trace, settings: tuple[str, ...] = ()) -> tuple[Comparison, Attribution]:
        """Compare and attribute."""
        deployment = deploy(trace, self.profile, settings, None, False)
        replayed = replay(trace, deployment)
        comparison = compare(trace, replayed.predicted)
        return comparison, attribute(trace, deployment, replayed, comparison)

    @property
    def computed(self) -> Any:
        cached = np.nan_to_num(self.predicted.predicted.column("cached_tokens"))
        return self.trace.column("prompt_tokens") - cached

    @property
    def schedule(self) -> Any:
        return measured_schedule(self.trace, self.deployment, self.computed)


@pytest.fixture(scope="module")
def gpu(traces):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SERVECAL_TRACES", str(traces))
        yield Scene(GPU, GPU_PROFILE)


@pytest.fixture(scope="module")
def cpu():
    return Scene(CPU, CPU_PROFILE)


def json_of(found: Attribution) -> Any:
    """As the report's JSON has it."""
    parts = {
        metric: {name: {share.part: share.points for share in shares} for name, shares in statistics.items()}
        for metric, statistics in found.parts.items()
    }
    return {
        "method": found.method,
        "why_not": found.why_not,
        "sentences": list(found.sentences),
        "parts": parts,
        "reasons": found.reasons,
        "load": dict(found.load),
    }


def error(comparison: Comparison, metric: str, statistic: str) -> float:
    errors = comparison.metrics[metric]
    return errors.bias if statistic == "bias" else errors.percentiles[statistic].error


def points(found: Attribution, metric: str, statistic: str) -> dict[str, float]:
    return {share.part: share.points for share in found.parts[metric][statistic]}


def found_where_it_is(right, wrong, part: str, metric: str, statistic: str = "mean") -> None:
    """The part carries most of the additional error, and no other part half as much."""
    before, after = (points(found, metric, statistic) for _, found in (right, wrong))
    added = {name: after[name] - before[name] for name in PARTS}
    total = error(wrong[0], metric, statistic) - error(right[0], metric, statistic)
    assert sum(added.values()) == pytest.approx(total, abs=1e-9)
    assert 0.6 < added[part] / total < 2.0, added
    others = [abs(size) for name, size in added.items() if name != part]
    assert max(others) < max(0.5 * abs(added[part]), CHAOS), added


def shifted(trace: Trace, seconds: float) -> tuple[Trace, Any]:
    some = np.random.default_rng(SEED).random(len(trace)) < 0.1
    return with_columns(trace, arrival=trace.column("arrival") + np.where(some, seconds, 0.0)), some


def retokenised(trace: Trace) -> tuple[Trace, Any]:
    output = trace.column("output_tokens")
    some = np.random.default_rng(SEED).random(len(trace)) < 1 / 3
    return with_columns(trace, output_tokens=np.where(some, np.round(1.1 * output), output)), some & (output >= 40)


@pytest.mark.parametrize("scene", ["gpu", "cpu"])
def test_parts_sum_to_the_error_of_every_statistic(request, scene):
    comparison, found = request.getfixturevalue(scene).result()
    assert set(found.parts) == {"ttft", "tpot", "e2e"}
    for metric, statistics in found.parts.items():
        assert set(statistics) == set(STATISTICS)
        for statistic, shares in statistics.items():
            assert [share.part for share in shares] == list(PARTS)
            total = sum(share.points for share in shares)
            assert total == pytest.approx(error(comparison, metric, statistic), abs=1e-9)


def test_a_right_profile_on_sound_data_leaves_every_part_small(gpu):
    _, found = gpu.result()
    assert found.method == "reconstructed schedule"
    assert max(abs(size) for size in points(found, "e2e", "mean").values()) < 0.01
    assert points(found, "ttft", "mean")["data"] == 0
    assert points(found, "ttft", "mean")["front_end"] == 0


def test_host_overhead_of_a_millisecond_is_step_time(gpu):
    accelerator = gpu.deployment.accelerator
    more = accelerator.host.per_step + 1e-3 / accelerator.coefficients["host_step"]
    wrong = gpu.result((f"host.per_step={more}",))
    for metric in ("ttft", "tpot", "e2e"):
        found_where_it_is(gpu.result(), wrong, "step_time", metric)
    assert " points step time" in wrong[1].sentences[0].partition(",")[0]
    assert any("steps take 1.0 ms shorter than predicted, the same at every batch size: host overhead" in one
               for one in wrong[1].sentences)  # fmt: skip


def test_an_asynchronous_loop_switched_off_is_scheduling(gpu):
    wrong = gpu.result(("engine.async_scheduling=false",))
    found_where_it_is(gpu.result(), wrong, "scheduling", "ttft", "bias")
    assert " points scheduling" in wrong[1].sentences[0].partition(",")[0]
    assert any(one.startswith("async_scheduling is off in the prediction and was on in the run")
               for one in wrong[1].sentences)  # fmt: skip


def test_an_asynchronous_loop_switched_on_is_scheduling(cpu):
    wrong = cpu.result(("engine.async_scheduling=true",))
    found_where_it_is(cpu.result(), wrong, "scheduling", "ttft", "bias")
    assert any("on in the prediction and was off in the run" in one for one in wrong[1].sentences)


def test_too_few_kv_blocks_are_queueing(gpu):
    # The run held about 10,500 blocks at once; half of the 35,582 that there were would not bind.
    wrong = gpu.result(("engine.num_gpu_blocks=5000",))
    for metric in ("ttft", "e2e"):
        found_where_it_is(gpu.result(), wrong, "queueing", metric)
    assert " points queueing" in wrong[1].sentences[0].partition(",")[0]
    assert any(one.startswith("the prediction has 5,000 KV blocks, the run tells 10,") for one in wrong[1].sentences)


def test_kv_blocks_halved_on_a_run_that_they_bind_are_queueing(cpu):
    wrong = cpu.result(("engine.num_gpu_blocks=115",))
    found_where_it_is(cpu.result(), wrong, "queueing", "ttft", "p90")
    assert any("115 KV blocks, the run tells 230 (recorded iterations)" in one for one in wrong[1].sentences)


@pytest.mark.parametrize("seconds", [0.5, -0.5])
@pytest.mark.parametrize("scene", ["gpu", "cpu"])
def test_shifted_arrivals_are_data(request, scene, seconds):
    scene = request.getfixturevalue(scene)
    trace, some = shifted(scene.trace, seconds)
    wrong = scene.of(trace)
    found_where_it_is(scene.result(), wrong, "data", "ttft")
    assert "arrival stamps cannot be right by about 0.5" in wrong[1].sentences[0]
    evidence = data_evidence(trace, measured_schedule(trace, scene.deployment, scene.computed))
    assert (evidence.arrivals & some).sum() >= 0.9 * some.sum()
    assert not (evidence.arrivals & ~some).any()
    assert evidence.cleaned.column("arrival") == pytest.approx(scene.trace.column("arrival"), abs=0.12)


def test_a_front_end_that_holds_neighbours_up_is_no_fault_of_the_data(cpu):
    """For a third of the run every request had arrived 0.3 s before the engine saw it."""
    arrival = cpu.trace.column("arrival")
    low, high = np.quantile(arrival, [1 / 3, 2 / 3])
    wrong = cpu.of(with_columns(cpu.trace, arrival=arrival - np.where((arrival > low) & (arrival < high), 0.3, 0.0)))
    found_where_it_is(cpu.result(), wrong, "front_end", "ttft")
    assert points(wrong[1], "ttft", "mean")["data"] == pytest.approx(0, abs=0.02)
    # Less what the iteration in flight explains.
    told = re.search(r"by (\d+) ms \(median\): the front end held them up", wrong[1].reasons["front_end"])
    assert told is not None
    assert 270 <= int(told[1]) <= 300


@pytest.mark.parametrize("scene", ["gpu", "cpu"])
def test_retokenised_lengths_are_data(request, scene):
    scene = request.getfixturevalue(scene)
    trace, some = retokenised(scene.trace)
    wrong = scene.of(trace)
    found_where_it_is(scene.result(), wrong, "data", "e2e")
    assert "output lengths are not what the engine made: they are 1.10 times" in wrong[1].sentences[0]
    evidence = data_evidence(trace, measured_schedule(trace, scene.deployment, scene.computed))
    assert (evidence.lengths & some).sum() >= 0.95 * some.sum()
    assert (evidence.lengths & ~some).sum() <= 0.02 * len(trace) + (~some & (trace.column("output_tokens") < 44)).sum()
    off = evidence.cleaned.column("output_tokens") / scene.trace.column("output_tokens") - 1
    assert np.percentile(np.abs(off), 95) < 0.02


@pytest.mark.parametrize("scene", ["gpu", "cpu"])
def test_sound_data_give_no_evidence_against_them(request, scene):
    scene = request.getfixturevalue(scene)
    evidence = data_evidence(scene.trace, scene.schedule)
    assert not evidence.wrong
    assert evidence.cleaned is scene.trace


def test_a_cold_start_that_is_not_imposed_is_data(gpu):
    replayed = replay(gpu.trace, gpu.deployment, cold_start=False)
    comparison = compare(gpu.trace, replayed.predicted)
    found = attribute(gpu.trace, gpu.deployment, replayed, comparison)
    assert "cold start of 0.05 s is not imposed" in found.reasons["data"]
    assert -0.001 < points(found, "ttft", "mean")["data"] < -1e-5


def test_the_queued_anchor_is_a_line_of_the_front_end(gpu):
    comparison = compare(gpu.trace, gpu.predicted.predicted, "queued")
    found = attribute(gpu.trace, gpu.deployment, gpu.predicted, comparison)
    assert points(found, "ttft", "mean")["front_end"] > 0.002
    assert "leaves out the wait for the iteration in flight" in found.reasons["front_end"]
    total = sum(points(found, "ttft", "mean").values())
    assert total == pytest.approx(comparison.metrics["ttft"].percentiles["mean"].error, abs=1e-9)


def test_the_recorded_and_the_reconstructed_schedule_agree(cpu):
    """The same run by its stamps alone: batches of the same tokens, a bias of the step time that is the same."""
    stamped = Trace(cpu.trace.requests, cpu.trace.meta)
    recorded = cpu.schedule
    reconstructed = measured_schedule(stamped, cpu.deployment, cpu.computed)
    assert (recorded.source, reconstructed.source) == ("recorded iterations", "reconstructed schedule")
    assert len(reconstructed.batches) == pytest.approx(len(recorded.batches), rel=0.01)
    decodes = [sum(batch.num_decodes for batch in one.batches) for one in (recorded, reconstructed)]
    assert decodes[1] == pytest.approx(decodes[0], rel=0.01)
    biases = [step_errors(cpu.deployment.accelerator, one).bias for one in (recorded, reconstructed)]
    assert biases[1] == pytest.approx(biases[0], abs=0.02)


def test_corrected_steps_take_what_was_measured(cpu):
    schedule = cpu.schedule
    corrected = CorrectedSteps(cpu.deployment.accelerator, schedule)
    inside = schedule.span >= 0
    assert corrected.on_schedule[inside].sum() == pytest.approx(schedule.seconds.sum(), rel=1e-9)
    moved = stretched(schedule, corrected.on_schedule)
    assert moved(schedule.end[-1:]) == pytest.approx(schedule.end[-1:], abs=0.1)


@pytest.mark.parametrize(("component", "factor"), [("decode_attention", 1.3), ("weight_traffic", 1.2)])
def test_the_component_that_errs_is_named(gpu, component, factor):
    """Steps as the profile has them, with one component that takes longer."""
    accelerator, schedule = gpu.deployment.accelerator, gpu.schedule
    place = accelerator.components.index(component)

    def seconds(batch: Batch) -> float:
        parts = accelerator.step(batch)
        return sum(parts) + (factor - 1) * parts[place]

    exact = replace(schedule, seconds=schedule.sums(np.array([seconds(batch) for batch in schedule.batches])))
    found = step_errors(accelerator, exact)
    if component == "decode_attention":
        assert found.cause == component
        assert found.size == pytest.approx(factor - 1, rel=0.05)
        assert "in proportion to decode_attention" in found.sentence
    else:
        assert component in (found.cause, *found.alternatives)


@pytest.mark.parametrize("scene", ["gpu", "cpu"])
def test_capacity_is_what_a_saturated_engine_drains(request, scene):
    """All requests at once: while others wait, as many end a second as the capacity says."""
    scene = request.getfixturevalue(scene)
    at_once = with_columns(scene.trace, arrival=np.zeros(len(scene.trace)))
    predicted = replay(at_once, scene.deployment, cold_start=False).predicted
    until = np.nanmax(predicted.column("scheduled"))
    first, last = predicted.column("first_token"), predicted.column("last_token")
    share = np.clip((until - first) / np.maximum(last - first, 1e-9), 0, 1)
    found = capacity(scene.trace, scene.deployment, predicted.column("cached_tokens"))
    assert found["capacity"] == pytest.approx(share.sum() / until, rel=0.05)


def test_load_says_how_near_saturation_is(gpu, cpu):
    crowded, easy = gpu.result()[1].load, cpu.result()[1].load
    assert crowded["busy_measured"] == pytest.approx(1.0, abs=0.01)
    assert easy["busy_measured"] == pytest.approx(easy["busy_predicted"], abs=0.03)
    assert crowded["utilisation"] == pytest.approx(arrival_rate(gpu.trace) / crowded["capacity"])
    assert crowded["headroom"] < 1 < easy["headroom"]
    # Whoever queues waits for the steps of others as well.
    assert crowded["sensitivity.ttft.mean"] > 1.5
    assert crowded["sensitivity.tpot.mean"] == pytest.approx(1.0, abs=0.2)
    assert "arrive 1.9" in gpu.result()[1].sentences[-1]


@pytest.mark.parametrize(("scene", "ahead"), [("gpu", True), ("cpu", False)])
def test_stamps_tell_whether_the_engine_scheduled_ahead(request, scene, ahead):
    scene = request.getfixturevalue(scene)
    counts = calls_ahead(scene.trace, scene.schedule, scene.computed, scene.deployment.config.token_budget)
    assert counts[not ahead] > 0.9 * sum(counts)
    assert sum(counts) >= 30


def test_a_trace_without_engine_stamps_has_no_method_and_says_what_to_record(make_trace, make_report):
    report = make_report(make_trace([0.011, 0.010, 0.012], arrival=[0.0, 10.0, 20.0], meta={"model": "me/mine"}))
    found = attribute(report.trace, report.deployment, report.replay, report.comparison)
    assert (found.method, found.parts) == ("none", {})
    assert "no engine stamps" in found.why_not
    assert "scheduled_ts" in found.why_not


def test_queueing_is_told_by_stamps_alone_where_the_schedule_is_not(make_trace, make_report):
    """First tokens 50 ms after arrivals, 40 ms of it in the queue; the prediction does not queue, and takes 10 ms."""
    nan, arrival = math.nan, [0.0, 10.0, 20.0, 30.0]
    stamps = {"arrival": arrival, "scheduled": [one + 0.04 for one in arrival]}
    trace = make_trace([0.05] * 4, [nan] * 4, meta={"model": "me/mine"}, **stamps)
    report = make_report(trace, cold_start=False)
    found = attribute(report.trace, report.deployment, report.replay, report.comparison)
    assert found.method == "none"
    assert points(found, "ttft", "mean") == pytest.approx({"queueing": -0.8, "unexplained": 0.0}, abs=1e-6)


def test_a_change_in_the_middle_of_a_run_is_dated(gpu):
    from calibrate.attribution import _since

    arrivals = np.linspace(0.0, 400.0, 201)
    late = np.where(arrivals > 180, 0.5, 0.0)
    assert _since(late, arrivals) == " after minute 3.0"
    assert _since(np.where(arrivals > 60, 0.5, 0.0), arrivals) == " after 60 s"
    assert _since(np.full(201, 0.5), arrivals) == ""
    assert _since(late[::-1], arrivals) == ""


def test_batches_are_said_to_have_no_stamps(gpu):
    table = gpu.trace.requests.set_column(
        gpu.trace.requests.schema.get_field_index("scheduled"),
        gpu.trace.requests.schema.field("scheduled"),
        pa.nulls(len(gpu.trace), pa.float64()),
    )
    trace = Trace(table, gpu.trace.meta)
    replayed = replay(trace, gpu.deployment)
    found = attribute(trace, gpu.deployment, replayed, compare(trace, replayed.predicted))
    assert found.method == "none"
    assert "sensitivity.ttft.mean" not in found.load
    assert found.load["utilisation"] > 1


def test_the_report_shows_parts_and_sentences_and_is_the_same_twice(gpu, called, traces):
    run = ("report", GPU, "--profile", GPU_PROFILE)
    document = called(*run, "--format", "json", SERVECAL_TRACES=traces).json
    found = document["attribution"]
    assert found == json_of(gpu.result()[1])
    mean = found["parts"]["ttft"]["mean"]
    assert sum(mean.values()) == pytest.approx(document["metrics"]["ttft"]["percentiles"]["mean"]["error"])
    text = called(*run, SERVECAL_TRACES=traces).out
    assert "scheduling" in text
    for sentence in found["sentences"]:
        assert " ".join(sentence.split()[:4]) in text


def test_attribution_can_be_left_out(called, traces):
    run = ("report", CPU, "--profile", CPU_PROFILE)
    assert called(*run, "--no-attribution", "--format", "json", SERVECAL_TRACES=traces).json["attribution"] is None
    assert "cause:" not in called(*run, "--no-attribution", SERVECAL_TRACES=traces).out
    assert "cause:" in called(*run, SERVECAL_TRACES=traces).out
