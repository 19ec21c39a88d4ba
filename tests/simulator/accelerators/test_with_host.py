from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.accelerators.base import (
    CALL_COMPONENTS,
    HOST_COMPONENTS,
    AcceleratorModel,
    CallOverhead,
    HostOverhead,
    WithHost,
)
from simulator.accelerators.linear import Linear
from simulator.batch import Batch
from simulator.cuda_graphs import capture_sizes
from simulator.engine_config import EngineConfig
from simulator.errors import SimulationError

BATCH = Batch([(100, 50)], [300, 400])
HOST = HostOverhead(per_step=5e-4, per_sequence=1e-5, per_prefill_layer=0.02, per_prefill_token=1e-6)
DEVICE = Linear(dict.fromkeys(Linear.components, 1e-06))
NAMES = (*Linear.components, *HOST_COMPONENTS)


def test_host_time_stands_beside_the_devices_components():
    model = WithHost(DEVICE, HOST)

    assert model.components == NAMES
    beside = (5e-4, 3 * 1e-5, 0.02, 100 * 1e-6)
    assert tuple(model.step(BATCH)) == (*DEVICE.step(BATCH), *beside, *[0.0] * (len(HOST_COMPONENTS) - 4))
    assert isinstance(model, AcceleratorModel)


@given(name=st.sampled_from(NAMES), factor=st.floats(0, 10))
def test_coefficient_scales_its_component_only(name, factor):
    plain = dict(zip(NAMES, WithHost(DEVICE, HOST).step(BATCH), strict=True))
    scaled = dict(zip(NAMES, WithHost(DEVICE, HOST, {name: factor}).step(BATCH), strict=True))

    assert scaled.pop(name) == factor * plain.pop(name)
    assert scaled == plain


def test_coefficients_default_to_one_and_are_all_told():
    assert WithHost(DEVICE, HOST, {"token": 1.5}).coefficients == {
        name: 1.5 if name == "token" else 1.0 for name in (*NAMES, *CALL_COMPONENTS)
    }


def test_unknown_coefficient_is_refused_with_the_names_there_are():
    with pytest.raises(SimulationError, match=r"'flops'.*step, sequence, token.*host_step"):
        WithHost(DEVICE, HOST, {"flops": 1.0})


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_coefficient_that_is_no_number_from_zero_up_is_refused(value):
    with pytest.raises(SimulationError, match=r"'token'.*at least 0"):
        WithHost(DEVICE, HOST, {"token": value})


def test_padding_and_steps_beyond_the_graphs_are_told_by_the_captured_sizes():
    host = HostOverhead(
        per_step=0.0,
        per_padding_token=1.0,
        per_layer_beyond_graphs=100.0,
        per_longest_context=0.5,
        capture_sizes=(1, 2, 4, 8),
    )

    def terms(batch):
        return dict(zip(HOST_COMPONENTS, host.seconds(batch), strict=True))

    assert terms(Batch([], [10, 20, 30]))["graph_padding"] == 1.0
    assert terms(Batch([], [10] * 8))["graph_padding"] == 0.0
    assert terms(Batch([(8, 0)], [10])) | {"longest_context": 5.0} == terms(Batch([(8, 0)], [10]))
    assert terms(Batch([(8, 0)], [10]))["beyond_graphs"] == 100.0
    assert terms(Batch([(8, 0)], []))["beyond_graphs"] == 0.0


def test_captured_sizes_are_those_of_the_version():
    # 51 sizes up to 512 with 256 sequences, 35 up to 256 with 128.
    assert len(capture_sizes(EngineConfig(max_num_seqs=256, max_num_batched_tokens=2048))) == 51
    assert len(capture_sizes(EngineConfig(max_num_seqs=128, max_num_batched_tokens=2048))) == 35
    assert capture_sizes(EngineConfig(max_num_seqs=3)) == (1, 2, 4)
    assert capture_sizes(EngineConfig(enforce_eager=True)) == ()
    assert capture_sizes(EngineConfig(version=(0, 10), max_num_seqs=256))[-2:] == (504, 512)


def test_terms_of_large_steps_begin_where_they_say():
    host = HostOverhead(
        per_step=0.0,
        per_empty_query=1.0,
        per_long_prefill_token=1.0,
        per_step_of_several_tokens=1.0,
        per_step_of_several_tiles=1.0,
        capture_sizes=(1, 2, 4, 8, 16, 24),
    )

    def terms(batch):
        named = dict(zip(HOST_COMPONENTS, host.seconds(batch), strict=True))
        return [named[name] for name in ("attention_grid", "long_prefill_token", "several_tokens", "several_tiles")]

    assert terms(Batch([], [10])) == [0, 0, 0, 0]
    assert terms(Batch([], [10, 20])) == [0, 0, 1, 0]
    assert terms(Batch([], [10] * 16)) == [0, 0, 1, 0]
    # 17 are padded to 24; 1,030 tokens of decodes would be no long prefill.
    assert terms(Batch([], [10] * 17)) == [0, 0, 1, 1]
    assert terms(Batch([], [10] * 1030))[1] == 0
    # Three sequences of up to 1,000 queries: 3,000 places, 1,101 tokens.
    assert terms(Batch([(1000, 0), (100, 0)], [300])) == [1899, 1101 - 1024, 1, 1]


def test_a_calls_own_time_is_part_of_no_iteration():
    call = CallOverhead(per_call=1e-3, per_request=1e-4)
    model = WithHost(DEVICE, HOST, {"call": 2.0, "call_request": 3.0}, call)
    assert model.call_seconds(10) == pytest.approx(2e-3 + 3e-3)
    assert model.step(BATCH) == WithHost(DEVICE, HOST).step(BATCH)
