"""A stretch of decodes costs to the bit what its steps cost one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.accelerators.base import HostOverhead, WithHost, decode_run
from simulator.accelerators.linear import Linear
from simulator.accelerators.operator_table import Curve, OperatorTable, SkewBuckets, SkewTable
from simulator.accelerators.regression import Correction, Regression, Trees
from simulator.accelerators.roofline import Roofline
from simulator.batch import Batch, Decodes

CONTEXTS = st.lists(st.integers(0, 3000), min_size=1, max_size=20)
RATES = {"step": 1e-3, "sequence": 3.3e-5, "token": 1.7e-6, "decode_attention": 1.3e-9}


def same(model, batch, steps):
    one_by_one = np.array([model.step(batch.later(place)) for place in range(steps)])
    assert np.array_equal(decode_run(model, batch, steps), one_by_one)


@pytest.fixture(scope="module")
def table(tiny_tables):
    """Curves that bend on the way, more decodes than measured and fewer, and buckets of skew that are crossed."""
    curves = [Curve([0, 64, 700, 1024], [5000, 5513, 9001, 9007]), Curve([16, 2000], [777, 12345]), Curve([5], [40])]
    attention = {
        (chunk, count): {0: curves[place], 512: curves[0]}
        for chunk, row in ((0, (0, 1, 2)), (16, (1, 0, 0)))
        for count, place in zip((0, 1, 8), row, strict=True)
    }
    buckets = SkewBuckets([1e9], ["any"])
    longest = SkewBuckets([300.0, 900.0, 1e9], ["short", "middle", "long"])
    alpha = {(0, "any", "any", "short", "any"): 0.37, (0, "any", "any", "middle", "any"): -2.5}
    skew = SkewTable(buckets, SkewBuckets([1.01], ["any"]), longest, buckets, alpha, 0.0543)
    return OperatorTable(tiny_tables(attention=attention, skew=skew), num_hidden_layers=32, hidden_size=8)


@given(contexts=CONTEXTS, steps=st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_of_an_operator_table(table, contexts, steps):
    same(table, Batch([], contexts), steps)


@given(contexts=CONTEXTS, steps=st.integers(1, 40), tensor_parallel_size=st.sampled_from([1, 2]))
@settings(max_examples=50, deadline=None)
def test_of_a_roofline(llama, h100, contexts, steps, tensor_parallel_size):
    same(Roofline(llama, h100, tensor_parallel_size=tensor_parallel_size), Batch([], contexts), steps)


@given(contexts=CONTEXTS, steps=st.integers(1, 40), rate=st.sampled_from([0.0, 1.1e-9]))
@settings(max_examples=50, deadline=None)
def test_of_linear_models_corrected_ones_and_the_host(contexts, steps, rate):
    host = HostOverhead(0.4e-3, 1e-6, per_padding_token=1e-6, per_longest_context=rate, capture_sizes=(1, 2, 4, 8))
    trees = Trees([0], [5, -1, -1], [9.0, 0.0, 0.0], [1, 0, 0], [2, 0, 0], [0.0, 1e-4, 3e-4])
    seen = dict.fromkeys(Linear.components[1:], (0.0, 500.0))
    for device in (Linear(RATES), Regression(RATES, Correction(trees, 0.5, seen))):
        same(device, Batch([], contexts), steps)
        same(WithHost(device, host, {"token": 1.37, "longest_context": 0.7}), Batch([], contexts), steps)


@given(alone=CONTEXTS, offsets=CONTEXTS, number=st.integers(0, 100), later=st.integers(0, 50))
def test_a_batch_says_the_same_of_contexts_given_by_offsets(alone, offsets, number, later):
    batch = Batch([(5, 7)], alone, Decodes(offsets), number).later(later)
    plain = [*(one + later for one in alone), *(one + number + later for one in offsets)]
    assert (batch.num_decodes, batch.decode_context) == (len(plain), sum(plain))
    assert (batch.longest_context, batch.shortest_context) == (max(plain), min(plain))
    assert (batch.num_seqs, batch.num_tokens) == (1 + len(plain), 5 + len(plain))
    assert sorted(batch.decode_contexts) == sorted(plain) == sorted(batch.decode_contexts)
