"""What a log lacks, told by the run: KV blocks, the scheduling loop, warm-up requests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from synthetic import changed, deployment, workload

from calibrate.fit import ProfileFit
from calibrate.inference import infer_blocks, resolved, warm_up_requests
from calibrate.space import CoefficientSpace
from profiles.deployment import resolve
from profiles.errors import InputError
from profiles.profile import load_profile
from replay.readers import read_trace
from replay.run import facts_of, replay
from replay.trace import TIMELINE

CAPTURES = Path(__file__).resolve().parents[2] / "reference_traces/captures"


def saying(trace, **arguments):
    """The trace with engine arguments replaced; None removes one."""
    engine = dict(trace.meta["engine"])
    kept = {**engine["arguments"], **arguments}
    engine["arguments"] = {name: value for name, value in kept.items() if value is not None}
    return trace.with_meta(engine=engine)


def rtx_4090(seed=0, rate=4.0, count=150, settings=(), hashes=None, **arguments):
    """A run of Llama-3.1-8B on an RTX 4090, whose 2,588 KV blocks nobody says; gauges every second."""
    stated = {"max_num_seqs": 256, "max_num_batched_tokens": 2048, "max_model_len": 8192, **arguments}
    instants = np.arange(0.5, 300.0)
    empty = pa.nulls(instants.size, pa.float64())
    meta = {
        "name": "stand-in",
        "model": "llama-3.1-8b",
        "engine": {"version": "0.19.0", "arguments": stated},
        **({} if hashes is None else {"block_hash": {"block_size": 16}}),
    }
    sent = workload(
        np.random.default_rng(seed),
        count,
        rate,
        (100, 1500),
        (50, 400),
        columns=None if hashes is None else lambda prompts: {"block_hashes": hashes(prompts)},
        timeline=pa.table([pa.array(instants), *[empty] * 5], TIMELINE),
        **meta,
    )
    truth = resolve(
        load_profile("roofline:rtx-4090"),
        facts_of(sent),
        settings=("engine.num_gpu_blocks=2588", *settings),
    )
    predicted = replay(sent, truth).predicted
    return replace(predicted, _columns={}).with_meta(**sent.meta)


def without_series(trace):
    return replace(trace, timeline=None, _columns={})


def blocks(trace, known=None, base="roofline:rtx-4090"):
    return infer_blocks(trace, resolved(load_profile(base), trace, assume_defaults=True), known)


@pytest.mark.parametrize(
    ("seed", "rate", "asynchronous"), [(0, 4.0, True), (1, 2.0, True), (2, 8.0, True), (3, 4.0, False)]
)
def test_the_blocks_of_an_rtx_4090_are_recovered_from_its_kv_use(seed, rate, asynchronous):
    trace = rtx_4090(seed, rate, async_scheduling=asynchronous)
    deployment, found = blocks(trace)
    assert found.source == "KV-use time series"
    assert found.value == pytest.approx(2588, rel=0.01)
    assert deployment.config.num_gpu_blocks == found.value
    assert found.interval[0] <= found.value <= found.interval[1]
    assert "memory arithmetic said 2,577" in found.sentence


def test_preempted_requests_do_not_count_as_holding_blocks():
    trace = rtx_4090(2, 8.0)
    assert np.nansum(trace.column("preemptions")) > 10
    assert blocks(changed(trace, preemptions=None))[1].value == pytest.approx(2588, rel=0.01)


def test_shared_prefixes_count_once():
    def shared(prompts):
        return [
            [*range(1, 41), *(1000 * place + np.arange(200)).tolist()][: n // 16] for place, n in enumerate(prompts, 9)
        ]

    trace = rtx_4090(hashes=shared)
    assert blocks(trace)[1].value == pytest.approx(2588, rel=0.02)
    unknown = changed(trace.with_meta(block_hash=None), block_hashes=None)
    assert blocks(unknown)[1].value > 1.1 * 2588
    assert "prompt contents are unknown" in blocks(unknown)[1].sentence


def test_a_gauge_that_measured_nothing_is_not_believed():
    trace = rtx_4090(count=40)
    zeros = trace.timeline.set_column(3, TIMELINE.field("kv_usage"), pa.array(np.zeros(trace.timeline.num_rows)))
    deployment, found = blocks(replace(trace, timeline=zeros, _columns={}))
    assert found.source == "memory arithmetic"
    assert found.value == deployment.config.num_gpu_blocks == 2577
    assert "0 throughout although requests ran" in found.sentence


def test_what_was_stated_is_kept_and_a_contradiction_is_said():
    trace = rtx_4090()
    stated = saying(trace, num_gpu_blocks=2600)
    assert (blocks(stated)[1].value, blocks(stated)[1].doubt) == (2600, False)
    wrong = saying(trace, num_gpu_blocks=5000)
    deployment, found = blocks(wrong)
    assert (deployment.config.num_gpu_blocks, found.doubt) == (5000, True)
    assert "5,000, as stated, but the KV-use time series says 2,5" in found.sentence


def test_a_run_that_held_more_than_was_estimated_raises_the_estimate():
    trace = saying(without_series(rtx_4090(2, 6.0)), gpu_memory_utilization=0.85)
    deployment, found = blocks(trace)
    assert "memory arithmetic said" in found.sentence
    assert found.source == "stamps"
    assert deployment.config.num_gpu_blocks == pytest.approx(2588, rel=0.03)
    # Without the count of preemptions the stamps may show as held what had been evicted.
    unsure = blocks(changed(without_series(saying(rtx_4090(2, 8.0), gpu_memory_utilization=0.85)), preemptions=None))[1]
    assert "held at once" in unsure.sentence or unsure.source == "stamps"


def test_the_real_engine_s_blocks_are_told_by_its_recording_or_by_who_had_to_wait():
    trace = saying(read_trace(CAPTURES / "vllm-cpu-preemption"), num_gpu_blocks=None)
    assert blocks(trace, base="linear")[1].value == 230
    stamps = blocks(replace(trace, iterations=None, _columns={}), base="linear")[1]
    assert stamps.source == "stamps"
    assert stamps.value == pytest.approx(230, rel=0.02)


def test_a_base_without_hardware_asks_where_the_run_does_not_tell():
    trace = saying(read_trace(CAPTURES / "vllm-cpu-shared-prefix"), num_gpu_blocks=None)
    assert blocks(trace, base="linear")[1].value == 4096
    with pytest.raises(InputError, match=r"give --set engine.num_gpu_blocks=.*no KV-use time series"):
        blocks(replace(trace, iterations=None, _columns={}), base="linear")


def test_samples_of_a_held_out_part_take_no_part():
    trace = rtx_4090()
    known = trace.column("arrival") < np.median(trace.column("arrival"))
    later = trace.timeline.column("time").to_numpy() > trace.column("arrival")[~known].min()
    use = trace.timeline.column("kv_usage").to_numpy()
    spoilt = trace.timeline.set_column(3, TIMELINE.field("kv_usage"), pa.array(np.where(later, use / 3, use)))
    other = replace(trace, timeline=spoilt, _columns={})
    assert blocks(trace, known)[1] == blocks(other, known)[1]
    assert blocks(trace, known)[1].value == pytest.approx(2588, rel=0.02)
    assert blocks(other)[1].value != blocks(trace)[1].value


def test_what_was_inferred_runs_in_what_was_fitted():
    trace = rtx_4090(count=80)
    base = resolved(load_profile("roofline:rtx-4090"), trace)
    fit = ProfileFit().fit([(trace, base, None)])
    told = {one.name: one for one in fit.findings_}
    assert fit.deployment(base).config.num_gpu_blocks == told["num_gpu_blocks"].value != base.config.num_gpu_blocks


def small(seed, asynchronous, said=None, rate=9.0, version="0.19.0", count=120, compiles=0):
    """A run of a small model with noise, whose log does not say how it was scheduled; and its base.

    The first steps that compute prompts last 1.5 s longer (``compiles``).
    """
    random = np.random.default_rng(seed)
    sent = workload(random, count, rate, name=f"small-{seed}")
    base = deployment(version, **({} if said is None else {"async_scheduling": said}))
    truth = CoefficientSpace(base).step_seconds(np.array([0.8, 0.2, 0.8, 0.4, 1.0, 2.0, 0.0, 0.0]))

    class Compiling:
        components = base.accelerator.components
        host = base.accelerator.host
        left = compiles

        def step(self, batch):
            compiled = 1.5 if batch.prefills and self.left > 0 else 0.0
            self.left -= bool(compiled)
            seconds = compiled + truth(batch) * max(0.5, 1 + random.normal(0, 0.03))
            return (seconds, *(0.0 for _ in self.components[1:]))

    engine = replace(base, accelerator=Compiling(), config=replace(base.config, async_scheduling=asynchronous))
    predicted = replay(sent, engine).predicted
    return replace(predicted, _columns={}).with_meta(name=sent.name, timeline=None), base


@pytest.mark.parametrize("version", ["0.12.0", "0.19.0"])
@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scheduling_is_judged_from_the_stamps_whatever_the_version_s_default(seed, asynchronous, version):
    trace, base = small(seed, asynchronous, version=version)
    fit = ProfileFit().fit([(trace, base, None)])
    [found] = [one for one in fit.findings_ if one.name == "async_scheduling"]
    assert (found.value, found.source) == (asynchronous, "stamps")
    assert fit.deployment(base).config.async_scheduling is asynchronous
    assert fit.misplaced_ <= 6


def test_a_statement_that_the_run_contradicts_is_kept_and_doubted():
    trace, base = small(0, True, said=False)
    fit = ProfileFit().fit([(trace, base, None)])
    assert fit.deployment(base).config.async_scheduling is False
    assert any("off, as stated, but the run says on: asynchronous scheduling puts " in one for one in fit.warnings_)
    honest, base = small(0, True, said=True)
    assert not ProfileFit().fit([(honest, base, None)]).warnings_


@pytest.mark.parametrize("name", ["vllm-cpu-shared-prefix", "vllm-cpu-shared-prefix-2", "vllm-cpu-preemption"])
def test_the_real_synchronous_engine_is_judged_so_by_recording_and_by_stamps(name):
    # vLLM 0.32 schedules asynchronously by default; these runs did not.
    trace = saying(read_trace(CAPTURES / name), async_scheduling=None)
    base = resolve(load_profile("linear"), facts_of(trace))
    assert base.config.async_scheduling
    for one in (trace, replace(trace, iterations=None, _columns={})):
        fit = ProfileFit(strength=1.0).fit([(one, base, None)])
        [found] = [one for one in fit.findings_ if one.name == "async_scheduling"]
        assert (found.value, found.source != "assumed") == (False, True), found


def test_warm_up_is_the_prefix_that_is_far_slower_than_usual():
    random = np.random.default_rng(5)
    arrival = np.arange(80.0)
    predicted = np.full((2, 80), 0.2)
    measured = predicted * (1 + random.normal(0, 0.03, (2, 80)))
    assert warm_up_requests(arrival, measured, predicted).size == 0
    slow = measured.copy()
    slow[0, [1, 2, 40]] *= 3
    slow[:, 0] = np.nan
    assert warm_up_requests(arrival, slow, predicted).tolist() == [1, 2]
    assert warm_up_requests(arrival[::-1], slow, predicted).size == 0


def test_slow_first_requests_are_named_and_left_out_of_the_fit():
    trace, base = small(4, True, rate=1.0, count=80)
    trace = trace.with_meta(warmed_up=False)
    assert not [one for one in ProfileFit().fit([(trace, base, None)]).findings_ if one.name == "warm_up"]
    # Four prompts in turn find something to compile.
    slow, base = small(4, True, rate=1.0, count=80, compiles=4)
    fit = ProfileFit().fit([(slow.with_meta(warmed_up=False), base, None)])
    [found] = [one for one in fit.findings_ if one.name == "warm_up"]
    first = [slow.ids[row] for row in np.argsort(slow.column("arrival"))[:4]]
    # Who had to wait for that is as slow.
    assert set(first[1:]) <= set(found.value) <= {f"r{place}" for place in range(1, 9)}
    assert found.value[0] in found.sentence
