from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.errors import InputError
from profiles.huggingface import model_shape
from profiles.library import find_model
from simulator.model import BYTES, ModelShape


def test_config_json_and_its_folder_give_the_same_shape_as_the_library(write_config):
    path = write_config()
    by_file, by_folder, known = find_model(str(path)), find_model(str(path.parent)), find_model("llama-3.2-1b")

    assert by_file.name == "config"
    assert by_folder.name == path.parent.name
    assert by_file.num_parameters == known.num_parameters
    for field in ("hidden_size", "head_dim", "num_key_value_heads", "weight_dtype", "max_position_embeddings"):
        assert getattr(by_file, field) == getattr(by_folder, field) == getattr(known, field)


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_missing_key_is_named_with_the_file(write_config, key):
    path = write_config(**{key: None})
    with pytest.raises(InputError, match="is missing") as caught:
        find_model(str(path))
    assert caught.value.field == key
    assert caught.value.file == path


@pytest.mark.parametrize("value", ["2048", 2048.5, True, -1, [2048], {"a": 1}])
@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "vocab_size", "head_dim", "num_experts"])
def test_value_of_the_wrong_type_is_named_and_shown(write_config, key, value):
    with pytest.raises(InputError, match="expected an integer >= 0, found") as caught:
        find_model(str(write_config(**{key: value})))
    assert caught.value.field == key
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads"])
def test_zero_layers_heads_or_width_are_refused(write_config, key):
    with pytest.raises(InputError, match="must be positive"):
        find_model(str(write_config(**{key: 0})))


def test_unknown_dtype_is_refused_with_those_there_are(write_config):
    with pytest.raises(InputError, match=r"expected one of float32, bfloat16.*'float8'") as caught:
        find_model(str(write_config(torch_dtype="float8")))
    assert caught.value.field == "torch_dtype"


@pytest.mark.parametrize(
    ("content", "word", "row"),
    [
        (b'{"hidden_size": 1,\n "vocab', "is no JSON", 2),
        (b"", "is no JSON", 1),
        (b"[1, 2]", "expected a JSON object, found", None),
        (b'{"a": "\xff\xfe"}', "is no UTF-8", None),
        (b"[" * 100_000, "nested too deeply", None),
    ],
)
def test_file_that_is_no_config_is_refused_with_its_place(tmp_path, content, word, row):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=word) as caught:
        find_model(str(path))
    assert (caught.value.file, caught.value.row) == (path, row)


def test_folder_without_config_json_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read") as caught:
        find_model(str(tmp_path))
    assert caught.value.file == tmp_path / "config.json"


def test_text_part_of_a_multimodal_config_is_taken(llama_config):
    assert model_shape("eyes", {"model_type": "eyes", "text_config": llama_config}) == model_shape("eyes", llama_config)


def test_head_dim_and_kv_heads_default_to_plain_multi_head_attention(llama_config):
    plain = {key: value for key, value in llama_config.items() if key not in ("head_dim", "num_key_value_heads")}
    shape = model_shape("plain", plain)
    assert (shape.head_dim, shape.num_key_value_heads, shape.kv_size) == (64, 32, 2048)


def test_gpt2_names_for_the_same_things():
    shape = model_shape(
        "gpt2",
        {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257},
    )
    assert (shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers) == (768, 3072, 12)
    assert (shape.gated_mlp, shape.tie_word_embeddings, shape.max_position_embeddings) == (False, True, 1024)
    # 124,439,808 published, of which 1024 x 768 are position embeddings.
    assert shape.num_parameters == pytest.approx(124_439_808 - 1024 * 768, rel=1e-3)


MIXTURE = {
    "model_type": "mixtral",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def test_experts_take_the_mlps_width_where_they_have_no_own(llama_config):
    shape = model_shape("mixture", {**llama_config, **MIXTURE})
    assert (shape.num_experts, shape.num_experts_per_tok, shape.moe_intermediate_size) == (8, 2, 8192)
    assert (shape.num_moe_layers, shape.num_dense_layers) == (16, 0)


@pytest.mark.parametrize(
    ("keys", "layers"),
    [
        ({"decoder_sparse_step": 2}, 8),
        ({"mlp_only_layers": [0, 3]}, 14),
        ({"first_k_dense_replace": 3}, 13),
        ({"decoder_sparse_step": 4, "mlp_only_layers": [3]}, 3),
    ],
)
def test_mixtures_may_have_dense_layers_between(llama_config, keys, layers):
    assert model_shape("mixture", {**llama_config, **MIXTURE, **keys}).num_moe_layers == layers


def test_shared_experts_by_width_or_by_number(llama_config):
    by_width = {**llama_config, **MIXTURE, "shared_expert_intermediate_size": 5632}
    by_number = {**llama_config, **MIXTURE, "moe_intermediate_size": 1408, "n_shared_experts": 2}
    assert model_shape("mixture", by_width).shared_expert_intermediate_size == 5632
    assert model_shape("mixture", by_number).shared_expert_intermediate_size == 2816


def quantized(llama_config, **quantization) -> ModelShape:
    return model_shape("quantized", {**llama_config, "quantization_config": quantization})


def compressed(bits: int, kind: str) -> dict:
    weights = {"num_bits": bits, "type": kind}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


@pytest.mark.parametrize(
    ("quantization", "dtype"),
    [
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8"),
        ({"quant_method": "fbgemm_fp8"}, "fp8"),
        ({"quant_method": "mxfp4"}, "fp4"),
        ({"quant_method": "awq", "bits": 4}, "int4"),
        ({"quant_method": "gptq", "bits": 8}, "int8"),
        ({"quant_method": "gptq", "bits": "4"}, "int4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "int4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, "int8"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "fp4"),
        (compressed(4, "int"), "int4"),
        (compressed(8, "int"), "int8"),
        (compressed(8, "float"), "fp8"),
        (compressed(4, "float"), "fp4"),
        ({"quant_method": "something new"}, "bfloat16"),
    ],
)
def test_quantization_config_sets_the_weights_type(llama_config, quantization, dtype):
    shape = quantized(llama_config, **quantization)

    assert (shape.weight_dtype, shape.attention_weight_dtype) == (dtype, dtype)
    assert (shape.activation_dtype, shape.num_unquantized_mlp_layers) == ("bfloat16", 0)
    inside = 16 * (shape.attention_parameters + shape.dense_mlp_parameters)
    assert shape.memory_bytes() == pytest.approx(BYTES[dtype] * inside + 2 * shape.embedding_parameters, rel=1e-3)


def test_config_without_quantization_keeps_its_own_type(llama_config):
    shape = model_shape("half", {**llama_config, "torch_dtype": "float16", "quantization_config": None})
    assert (shape.weight_dtype, shape.activation_dtype) == ("float16", "float16")


@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignore"])
def test_attention_left_out_of_quantization_keeps_its_type(llama_config, key):
    shape = quantized(llama_config, quant_method="fp8", **{key: ["lm_head", "model.layers.3.self_attn.q_proj"]})
    assert (shape.weight_dtype, shape.attention_weight_dtype) == ("fp8", "bfloat16")


@pytest.mark.parametrize(
    "kept",
    [
        ["model.layers.0.mlp", "model.layers.15.mlp"],
        [f"model.layers.{layer}.mlp.{part}_proj" for layer in (0, 15) for part in ("gate", "up", "down")],
        ["lm_head", *(f"model.layers.{layer}.mlp.{part}_proj" for layer in (0, 15) for part in ("gate_up", "down"))],
    ],
    ids=["by layer", "by matrix", "fused"],
)
def test_mlps_left_out_of_quantization_are_counted_by_layer(llama_config, kept):
    assert quantized(llama_config, quant_method="fp8", modules_to_not_convert=kept).num_unquantized_mlp_layers == 2


def test_routers_left_out_of_quantization_are_no_mlps(llama_config):
    """As Qwen3-30B-A3B-FP8 and Qwen1.5-MoE list them; here beside two dense layers."""
    kept = ["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in range(2, 16))]
    kept += [f"model.layers.{layer}.mlp.shared_expert_gate" for layer in range(2, 16)]
    quantization = {"quant_method": "fp8", "modules_to_not_convert": kept}
    config = {**llama_config, **MIXTURE, "mlp_only_layers": [0, 1], "quantization_config": quantization}
    shape = model_shape("mixture", config)

    assert (shape.num_dense_layers, shape.num_unquantized_mlp_layers) == (2, 0)
    inside = 16 * shape.attention_parameters + 2 * shape.dense_mlp_parameters + 14 * 8 * shape.expert_parameters
    assert shape.memory_bytes() == pytest.approx(inside + 2 * shape.embedding_parameters, rel=1e-3)


def test_no_more_mlps_are_left_out_than_there_are(llama_config):
    kept = [f"model.layers.{layer}.mlp.experts" for layer in range(16)]
    quantization = {"quant_method": "fp8", "modules_to_not_convert": kept}
    shape = model_shape("mixture", {**llama_config, **MIXTURE, "quantization_config": quantization})
    assert shape.num_unquantized_mlp_layers <= shape.num_dense_layers


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"kv_lora_rank": 512}, "multi-head latent attention"),
        ({"mamba_d_state": 128}, "state-space"),
        ({"sliding_window": 4096}, "sliding-window attention (4096 tokens)"),
    ],
)
def test_parts_that_a_shape_cannot_say_are_listed(llama_config, keys, part):
    (found,) = model_shape("odd", {**llama_config, **keys}).unsupported
    assert part in found


@pytest.mark.parametrize(
    "keys",
    [
        {"sliding_window": None},
        {"sliding_window": 4096, "use_sliding_window": False},
        {"sliding_window": 131072},
    ],
)
def test_windows_that_are_off_or_hold_everything_are_no_obstacle(llama_config, keys):
    assert model_shape("plain", {**llama_config, **keys}).unsupported == ()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 200_000) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
KEYS = (
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "model_type",
    "text_config",
    "torch_dtype",
    "dtype",
    "tie_word_embeddings",
    "num_experts",
    "num_experts_per_tok",
    "decoder_sparse_step",
    "moe_layer_freq",
    "mlp_only_layers",
    "first_k_dense_replace",
    "n_shared_experts",
    "quantization_config",
    "sliding_window",
    "use_sliding_window",
    "max_position_embeddings",
)
QUANTIZATION_KEYS = (
    "quant_method",
    "quant_algo",
    "bits",
    "num_bits",
    "config_groups",
    "modules_to_not_convert",
    "ignore",
    "load_in_4bit",
)


@given(changes=st.dictionaries(st.sampled_from(KEYS), json_values, max_size=3))
def test_any_config_gives_a_shape_or_an_input_error(llama_config, changes):
    config = json.loads(json.dumps({**llama_config, "num_experts": 8, **changes}))
    try:
        shape = model_shape("any", config)
    except InputError:
        return
    assert shape.num_parameters > 0
    assert shape.memory_bytes() > 0


@given(quantization=st.dictionaries(st.sampled_from(QUANTIZATION_KEYS), json_values, max_size=3))
def test_any_quantization_gives_a_shape_or_an_input_error(llama_config, quantization):
    try:
        shape = model_shape("any", {**llama_config, "quantization_config": quantization})
    except InputError:
        return
    assert shape.weight_dtype in BYTES
