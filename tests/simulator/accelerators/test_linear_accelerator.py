from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.accelerators.base import AcceleratorModel
from simulator.accelerators.linear import Linear
from simulator.batch import Batch
from simulator.errors import SimulationError


def test_features_of_a_mixed_batch():
    features = dict(zip(Linear.components, Linear.features(Batch([(10, 100), (4, 0)], [7, 9])), strict=True))

    assert features == {
        "step": 1,
        "sequence": 4,
        "token": 16,
        "prefill_step": 1,
        "prefill_attention": 10 * (100 + 5) + 4 * 2,
        "decode_attention": 16,
    }


def test_features_of_decodes_alone_have_no_prefill():
    assert Linear.features(Batch([], [5])) == (1, 1, 1, 0, 0, 5)


def test_each_coefficient_prices_its_feature():
    model = Linear({"step": 1e-3, "token": 2e-6, "decode_attention": 3e-9})
    assert model.step(Batch([(10, 0)], [1000])) == pytest.approx((1e-3, 0, 22e-6, 0, 0, 3e-6))


def test_is_an_accelerator_model():
    assert isinstance(Linear({"step": 1.0}), AcceleratorModel)


@given(
    seconds=st.dictionaries(st.sampled_from(Linear.components), st.floats(1e-9, 1e-3), min_size=1),
    factor=st.integers(2, 9),
)
def test_is_linear_in_its_coefficients(seconds, factor):
    batch = Batch([(64, 128)], [100, 200])
    scaled = Linear({name: factor * value for name, value in seconds.items()})
    assert sum(scaled.step(batch)) == pytest.approx(factor * sum(Linear(seconds).step(batch)))


@pytest.mark.parametrize(
    ("seconds", "word"),
    [
        ({"warp": 1.0}, "warp"),
        ({"step": 1.0, "token": -1e-6}, ">= 0"),
        ({"step": math.nan}, ">= 0"),
        ({"step": math.inf}, ">= 0"),
        ({"step": 0.0}, "> 0"),
        ({}, "> 0"),
    ],
)
def test_unusable_coefficients_are_refused(seconds, word):
    with pytest.raises(SimulationError, match=word):
        Linear(seconds)
