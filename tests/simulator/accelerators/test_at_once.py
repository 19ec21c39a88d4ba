"""The schedule without a clock is the engine's, iteration by iteration."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.accelerators.base import HostOverhead, WithHost
from simulator.accelerators.linear import Linear
from simulator.accelerators.roofline import Roofline
from simulator.at_once import Stretch, schedule_at_once
from simulator.batch import Batch
from simulator.engine import Engine
from simulator.engine_config import EngineConfig
from simulator.errors import NeverFitsError
from simulator.request import Request

MODEL = WithHost(Linear({"step": 1e-3, "token": 1e-6, "decode_attention": 1e-9}), HostOverhead())
LENGTHS = st.lists(st.tuples(st.integers(1, 100), st.integers(1, 150)), min_size=1, max_size=16)


def requests_of(lengths):
    return [Request(str(place), 0.0, *one) for place, one in enumerate(lengths)]


@settings(max_examples=150)
@given(
    lengths=LENGTHS,
    version=st.sampled_from([(0, 8), (0, 10), (0, 12), (0, 19), (0, 32)]),
    seqs=st.sampled_from([1, 2, 4, 8]),
    budget=st.sampled_from([256, 512]),
    blocks=st.sampled_from([20, 40, 500]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    ahead=st.integers(0, 2),
)
def test_every_iteration_is_the_engines(lengths, version, seqs, budget, blocks, flags, ahead):
    chunked, caching, asynchronous = flags
    config = EngineConfig(
        version=version,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        max_model_len=256,
        num_gpu_blocks=blocks,
        enable_chunked_prefill=chunked,
        enable_prefix_caching=caching,
        async_scheduling=asynchronous,
    )
    seen = []

    def observe(iteration):
        batch = iteration.step.batch()
        seen.append((batch.prefills, sorted(batch.decode_contexts)))

    simulation = Engine(config, MODEL).run(requests_of(lengths), observe=observe, ahead=ahead)
    stretches = schedule_at_once(config, requests_of(lengths), ahead)
    batches = [one.at(place) for one in stretches for place in range(one.steps)]
    assert [(one.prefills, sorted(one.decode_contexts)) for one in batches] == seen
    total = sum(float(one.sum(MODEL.step).sum()) for one in stretches)
    assert total == pytest.approx(simulation.end / 1e9, rel=1e-6, abs=1e-8 * len(seen))


def test_a_long_decode_is_one_stretch():
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=8192, num_gpu_blocks=4000)
    stretches = schedule_at_once(config, requests_of([(100, 2000), (50, 2000)]))
    assert [one.steps for one in stretches] == [1, 1999]
    assert stretches[1].batch.decode_contexts == [100, 50]


@pytest.mark.parametrize("steps", [1, 2, 4, 5, 37, 1000])
def test_a_stretch_sums_to_its_iterations_also_where_the_model_bends(steps, h100, llama):
    model = Roofline(llama, h100)

    def bent(batch):
        # Attention that jumps at 700 tokens of context and bends at 900.
        context = max(batch.decode_contexts)
        return (*model.step(batch), 1e-4 * (context > 700) + 1e-6 * max(0, context - 900))

    one = Stretch(Batch([], [512, 30, 700 - 64]), steps)
    each = np.sum([bent(one.at(place)) for place in range(steps)], axis=0)
    assert one.sum(bent) == pytest.approx(each, rel=1e-5)


def test_a_request_that_never_fits_is_refused_by_name():
    config = EngineConfig(max_num_batched_tokens=8192, max_model_len=4096, num_gpu_blocks=10)
    with pytest.raises(NeverFitsError, match=r"'1'.*9 usable ones"):
        schedule_at_once(config, requests_of([(10, 10), (1000, 10)]))
