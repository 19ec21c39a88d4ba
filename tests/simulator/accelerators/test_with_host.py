from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.accelerators.base import AcceleratorModel, HostOverhead, WithHost
from simulator.accelerators.linear import Linear
from simulator.batch import Batch
from simulator.errors import SimulationError

BATCH = Batch([(100, 50)], [300, 400])
HOST = HostOverhead(per_step=5e-4, per_sequence=1e-5, per_prefill_step=0.02, per_prefill_token=1e-6)
DEVICE = Linear(dict.fromkeys(Linear.components, 1e-06))
NAMES = (*Linear.components, "host_step", "host_sequence", "host_prefill_step", "host_prefill_token")


def test_host_time_stands_beside_the_devices_components():
    model = WithHost(DEVICE, HOST)

    assert model.components == NAMES
    assert tuple(model.step(BATCH)) == (*DEVICE.step(BATCH), 5e-4, 3 * 1e-5, 0.02, 100 * 1e-6)
    assert isinstance(model, AcceleratorModel)


@given(name=st.sampled_from(NAMES), factor=st.floats(0, 10))
def test_coefficient_scales_its_component_only(name, factor):
    plain = dict(zip(NAMES, WithHost(DEVICE, HOST).step(BATCH), strict=True))
    scaled = dict(zip(NAMES, WithHost(DEVICE, HOST, {name: factor}).step(BATCH), strict=True))

    assert scaled.pop(name) == factor * plain.pop(name)
    assert scaled == plain


def test_coefficients_default_to_one_and_are_all_told():
    assert WithHost(DEVICE, HOST, {"token": 1.5}).coefficients == {
        name: 1.5 if name == "token" else 1.0 for name in NAMES
    }


def test_unknown_coefficient_is_refused_with_the_names_there_are():
    with pytest.raises(SimulationError, match=r"'flops'.*step, sequence, token.*host_step"):
        WithHost(DEVICE, HOST, {"flops": 1.0})


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_coefficient_that_is_no_number_from_zero_up_is_refused(value):
    with pytest.raises(SimulationError, match=r"'token'.*at least 0"):
        WithHost(DEVICE, HOST, {"token": value})
