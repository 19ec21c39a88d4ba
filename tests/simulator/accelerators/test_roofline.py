from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.accelerators.base import AcceleratorModel
from simulator.accelerators.collectives import ring_all_reduce
from simulator.accelerators.roofline import Roofline
from simulator.batch import Batch
from simulator.errors import SimulationError
from simulator.hardware import Hardware, Interconnect

EXACT = 1e-9
"""Relative room for the order in which floats are added."""

chunks = st.lists(st.tuples(st.integers(2, 8192), st.integers(0, 60_000)), max_size=3)
contexts = st.lists(st.integers(0, 60_000), max_size=64)


def named(model: Roofline, batch: Batch) -> dict[str, float]:
    return dict(zip(model.components, model.step(batch), strict=True))


def total(model: Roofline, batch: Batch) -> float:
    """Seconds by the datasheet: what kernels add to it has a coefficient of 0."""
    factors = [model.default_coefficients.get(name, 1.0) for name in model.components]
    return sum(factor * part for factor, part in zip(factors, model.step(batch), strict=True))


def read_by_every_step(shape) -> float:
    """Weights of the layers and the output head; of the embedding only rows are read."""
    inside = shape.num_hidden_layers * shape.attention_parameters + shape.num_dense_layers * shape.dense_mlp_parameters
    return inside + shape.vocab_size * shape.hidden_size


@given(prefills=chunks, decodes=contexts)
def test_no_step_is_faster_than_reading_the_weights_once(llama, h100, prefills, decodes):
    batch = Batch(prefills, [*decodes, 5])
    bytes_read = 2 * read_by_every_step(llama) + 131_072 * batch.decode_context
    assert total(Roofline(llama, h100), batch) >= bytes_read / 3.35e12 * (1 - EXACT)


@given(prefills=chunks, decodes=contexts)
def test_no_step_is_faster_than_its_arithmetic_at_peak(llama, h100, prefills, decodes):
    batch = Batch(prefills, [*decodes, 5])
    head = llama.vocab_size * llama.hidden_size
    operations = 2 * (read_by_every_step(llama) - head) * batch.num_tokens + 2 * head * batch.num_seqs
    # Causal attention: scores and values, 2 operations each, per query, key and layer.
    pairs = sum(query * context + query * (query + 1) / 2 for query, context in prefills)
    operations += 4 * 4096 * 32 * (pairs + batch.decode_context + batch.num_decodes)
    assert total(Roofline(llama, h100), batch) >= operations / 989.4e12 * (1 - EXACT)


@given(prefills=chunks, decodes=contexts, more=st.integers(1, 4096), data=st.data())
def test_more_tokens_longer_contexts_and_more_sequences_never_make_a_step_faster(
    llama, mixture, h100, prefills, decodes, more, data
):
    model = Roofline(data.draw(st.sampled_from([llama, mixture])), h100)
    prefills, decodes = [*prefills, (16, 100)], [*decodes, 100]
    before = total(model, Batch(prefills, decodes)) * (1 - EXACT)
    (query, context), others = prefills[0], prefills[1:]

    assert total(model, Batch([(query + more, context), *others], decodes)) >= before
    assert total(model, Batch([(query, context + more), *others], decodes)) >= before
    assert total(model, Batch(prefills, [decodes[0] + more, *decodes[1:]])) >= before
    assert total(model, Batch(prefills, [*decodes, more])) >= before
    assert total(model, Batch([*prefills, (more + 1, 0)], decodes)) >= before


@given(prefills=chunks, decodes=contexts, degree=st.sampled_from([1, 2, 8]))
def test_components_are_named_finite_and_not_negative(llama, mixture, h100, prefills, decodes, degree):
    batch = Batch([*prefills, (2, 0)], decodes)
    for shape in (llama, mixture):
        model = Roofline(shape, h100, tensor_parallel_size=degree)
        parts = model.step(batch)
        assert len(parts) == len(model.components) == len(set(model.components))
        assert all(math.isfinite(part) and part >= 0 for part in parts)


def test_is_an_accelerator_model_that_repeats_itself(llama, h100):
    model = Roofline(llama, h100)
    assert isinstance(model, AcceleratorModel)
    assert tuple(model.step(Batch([(512, 64)], [9]))) == tuple(model.step(Batch([(512, 64)], [9])))


def test_decodes_are_bound_by_weights_and_long_prefills_by_arithmetic(llama, h100):
    model = Roofline(llama, h100)
    decode, prefill = named(model, Batch([], [1000])), named(model, Batch([(8192, 0)], []))

    assert decode["dense_compute"] == 0
    assert max(decode, key=decode.__getitem__) == "weight_traffic"
    assert prefill["weight_traffic"] == 0
    assert max(prefill, key=prefill.__getitem__) == "dense_compute"


def test_tensor_parallelism_halves_the_matrices_and_adds_collectives(llama, h100):
    one, two = Roofline(llama, h100), Roofline(llama, h100, tensor_parallel_size=2)
    for batch in (Batch([(4096, 0)], []), Batch([], [3000] * 8)):
        whole, half = named(one, batch), named(two, batch)
        for name in ("dense_compute", "weight_traffic", "prefill_attention", "decode_attention", "output_head"):
            assert half[name] == pytest.approx(whole[name] / 2)
        assert whole["collectives"] == 0
        # Two all-reduces a layer, two hops each, each moving half of tokens x 4096 x 2 bytes.
        hop = 2e-6 + batch.num_tokens * 4096 * 2 / 2 / 450e9
        assert half["collectives"] == pytest.approx(2 * 32 * 2 * hop)
        assert half["embedding"] == whole["embedding"]


def test_fewer_kv_heads_than_devices_are_kept_on_each(llama, h100):
    few = replace(llama, num_key_value_heads=2)
    decode = Batch([], [100_000])
    four, eight = (named(Roofline(few, h100, tensor_parallel_size=n), decode)["decode_attention"] for n in (4, 8))
    assert eight == pytest.approx(four, rel=1e-4)


def test_ring_all_reduce_of_n_devices_is_two_times_n_minus_one_hops():
    link = Interconnect("link", 1e9, 1e-6)
    assert ring_all_reduce(8e6, 4, link) == pytest.approx(6 * (1e-6 + 2e-3))
    assert ring_all_reduce(8e6, 1, link) == 0.0


def test_fp8_weights_halve_the_traffic(llama, h100):
    fp8 = replace(llama, weight_dtype="fp8", attention_weight_dtype="fp8")
    # Activations stay bfloat16; with nothing to move but weights they are 0.02 % of one decode's traffic.
    full, half = (named(Roofline(shape, h100), Batch([], [0]))["weight_traffic"] for shape in (llama, fp8))
    assert half == pytest.approx(full / 2, rel=2e-3)


def test_fp8_weights_multiply_at_the_fp8_rate(llama, h100):
    fp8 = replace(llama, weight_dtype="fp8", attention_weight_dtype="fp8")
    batch = Batch([(8192, 0)], [])
    full, half = (named(Roofline(shape, h100), batch)["dense_compute"] for shape in (llama, fp8))
    assert half == pytest.approx(full * 989.4 / 1978.9)


def test_fp8_kv_cache_halves_the_traffic_of_decode_attention(llama, h100):
    batch = Batch([], [100_000] * 4)
    auto, fp8 = (
        named(Roofline(llama, h100, kv_cache_dtype=dtype), batch)["decode_attention"] for dtype in ("auto", "fp8_e4m3")
    )
    assert fp8 == pytest.approx(auto / 2, rel=1e-3)


def test_layers_left_unquantised_read_both_bytes(llama, h100):
    fp8 = replace(llama, weight_dtype="fp8")
    mixed = replace(fp8, num_unquantized_mlp_layers=2)
    batch = Batch([], [0])
    added = named(Roofline(mixed, h100), batch)["weight_traffic"] - named(Roofline(fp8, h100), batch)["weight_traffic"]
    assert added == pytest.approx(2 * 3 * 4096 * 14336 / 3.35e12)


@pytest.fixture
def memory_bound() -> Hardware:
    """One byte a second, and arithmetic for nothing: seconds are bytes."""
    return Hardware("abacus", 1e12, 1.0, {"bfloat16": 1e30})


def expert_bytes_read(mixture, memory_bound, tokens: int) -> float:
    """Traffic beyond that of the same model with no-width experts, activations of the experts subtracted."""
    none = replace(mixture, moe_intermediate_size=0)
    batch = Batch([(tokens, 0)], []) if tokens > 1 else Batch([], [0])
    found, base = (named(Roofline(shape, memory_bound), batch)["weight_traffic"] for shape in (mixture, none))
    rows = tokens * mixture.num_experts_per_tok
    activations = rows * (1024 + 2 * 2048 + 2048 + 1024) * 2 * mixture.num_moe_layers
    return found - base - activations


def test_one_token_reads_its_own_experts(mixture, memory_bound):
    expert = 3 * 1024 * 2048 * 2
    assert expert_bytes_read(mixture, memory_bound, 1) == pytest.approx(4 * 2 * expert)


def test_many_tokens_read_every_expert_once(mixture, memory_bound):
    expert = 3 * 1024 * 2048 * 2
    assert expert_bytes_read(mixture, memory_bound, 2000) == pytest.approx(4 * 16 * expert)


@given(tokens=st.integers(1, 500))
def test_experts_read_lie_between_one_tokens_and_all_and_grow_with_tokens(mixture, tokens):
    abacus = Hardware("abacus", 1e12, 1.0, {"bfloat16": 1e30})
    layer_expert = 4 * 3 * 1024 * 2048 * 2
    read = expert_bytes_read(mixture, abacus, tokens) / layer_expert
    assert 2 * (1 - EXACT) <= read <= 16 * (1 + EXACT)
    assert expert_bytes_read(mixture, abacus, tokens + 1) / layer_expert >= read * (1 - EXACT)


def test_expert_arithmetic_is_that_of_the_experts_each_token_visits(mixture):
    endless = Hardware("endless", 1e12, 1e30, {"bfloat16": 1.0})
    none = replace(mixture, moe_intermediate_size=0)
    batch = Batch([(64, 0)], [])
    found, base = (named(Roofline(shape, endless), batch)["dense_compute"] for shape in (mixture, none))
    assert found - base == pytest.approx(4 * 64 * 2 * 2 * 3 * 1024 * 2048)


def test_shared_experts_are_read_by_every_step(mixture, memory_bound):
    shared = replace(mixture, shared_expert_intermediate_size=512)
    added = (
        named(Roofline(shared, memory_bound), Batch([], [0]))["weight_traffic"]
        - named(Roofline(mixture, memory_bound), Batch([], [0]))["weight_traffic"]
    )
    weights, activations = 3 * 1024 * 512, 1024 + 2 * 512 + 512 + 1024
    assert added == pytest.approx(4 * 2 * (weights + activations))


def test_model_with_parts_that_its_shape_cannot_say_is_refused(llama, h100):
    odd = replace(llama, unsupported=("multi-head latent attention",))
    with pytest.raises(SimulationError, match=r"llama-3.1-8b.*latent attention"):
        Roofline(odd, h100)


def test_tensor_parallelism_without_a_link_is_refused(llama, h100):
    lonely = replace(h100, interconnect=Interconnect())
    with pytest.raises(SimulationError, match="h100 has no interconnect"):
        Roofline(llama, lonely, tensor_parallel_size=2)
    Roofline(llama, lonely)


FLOPS, BANDWIDTH = 989.4e12, 3.35e12


def matrix(rows: int, inputs: int, outputs: int) -> float:
    """Seconds of one bfloat16 matrix: the longer of arithmetic and of weights, input and output moved."""
    arithmetic = 2 * rows * inputs * outputs / FLOPS
    moved = 2 * (inputs * outputs + rows * inputs + rows * outputs) / BANDWIDTH
    return max(arithmetic, moved)


def written_out(batch: Batch) -> float:
    """Llama-3.1-8B on an H100: 32 layers, hidden 4096, 32 query and 8 KV heads of 128, MLP 14336, 128256 words."""
    tokens, sequences = batch.num_tokens, batch.num_seqs
    layer = matrix(tokens, 4096, 4096 + 2 * 1024)
    layer += matrix(tokens, 4096, 4096)
    layer += matrix(tokens, 4096, 2 * 14336)
    layer += matrix(tokens, 14336, 4096)
    # Key and value of 8 heads of 128 in 2 bytes per token, layer and side; query in, output out.
    kv, query_and_output = 2 * 8 * 128 * 2, 2 * 4096 * 2
    prefill = sum(
        max(
            4 * 4096 * (query * context + query * (query + 1) / 2) / FLOPS,
            ((context + query) * kv + query * query_and_output) / BANDWIDTH,
        )
        for query, context in batch.prefills
    )
    seen = sum(context + 1 for context in batch.decode_contexts)
    decodes = len(batch.decode_contexts)
    decode = max(4 * 4096 * seen / FLOPS, (seen * kv + decodes * query_and_output) / BANDWIDTH)
    # Two residual adds and two norms a layer, each reading and writing; the embedding once.
    elementwise = (8 * 32 + 2) * tokens * 4096 * 2 / BANDWIDTH
    return 32 * (layer + prefill + decode) + matrix(sequences, 4096, 128256) + elementwise


@pytest.mark.parametrize(
    ("batch", "published"),
    [
        # AIConfigurator's measured kernels of the same model and device (operator-tables.md section 6).
        pytest.param(Batch([], [1024] * 32), 8.32e-3, id="decode"),
        pytest.param(Batch([(1024, 0)], []), 22.11e-3, id="prefill"),
        pytest.param(Batch([(512, 1024)], [1024] * 64), 17.70e-3, id="mixed"),
    ],
)
def test_llama_on_an_h100_agrees_with_the_formula_written_out_and_bounds_measured_kernels(
    llama, h100, batch, published
):
    seconds = total(Roofline(llama, h100), batch)
    assert seconds == pytest.approx(written_out(batch), rel=1e-6)
    assert 0.5 * published < seconds < published


@pytest.mark.parametrize(
    ("dtype", "rate"),
    [("bfloat16", 312e12), ("float16", 312e12), ("int8", 624e12), ("fp8", 312e12), ("float32", 19.5e12)],
)
def test_dtype_without_units_multiplies_at_the_rate_of_a_wider_one(dtype, rate):
    """An A100 has int8 units and none for fp8: fp8 checkpoints run there with bfloat16 arithmetic."""
    a100 = Hardware("a100", 80e9, 2e12, {"bfloat16": 312e12, "float16": 312e12, "int8": 624e12, "float32": 19.5e12})
    assert a100.flops(dtype) == rate


def test_device_with_one_kind_of_half_precision_runs_the_other_at_its_rate():
    assert Hardware("tpu", 1e9, 1e12, {"bfloat16": 918e12, "int8": 1836e12}).flops("float16") == 918e12
    assert Hardware("old", 1e9, 1e12, {"float16": 125e12, "float32": 15e12}).flops("bfloat16") == 125e12
