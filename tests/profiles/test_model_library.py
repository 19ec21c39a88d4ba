from __future__ import annotations

from collections import Counter

import pytest

from profiles.errors import InputError
from profiles.library import find_model, models, names

PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.1-405b-fp8": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "codellama-34b": 33_743_970_304,
    "mistral-7b-v0.3": 7_248_023_552,
    "mixtral-8x7b": 46_702_792_704,
}
# Norms of queries and keys, or biases, are left out of the count.
NEARLY = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-30b-a3b-2507": 30_532_122_624,
    "qwen2.5-7b": 7_615_616_512,
    "phi-mini-moe": 7_647_632_704,
    "bloom-176b": 176_247_271_424,
}
IDS = {
    "meta-llama/Llama-2-7b-hf": "llama-2-7b",
    "meta-llama/Llama-2-70b-hf": "llama-2-70b",
    "meta-llama/Llama-3.1-8B": "llama-3.1-8b",
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "meta-llama/Llama-3.1-70B-Instruct": "llama-3.1-70b",
    "meta-llama/Llama-3.1-405B": "llama-3.1-405b",
    "meta-llama/Llama-3.2-1B-Instruct": "llama-3.2-1b",
    "Qwen/Qwen3-8B": "qwen3-8b",
    "Qwen/Qwen3-32B": "qwen3-32b",
    "Qwen/Qwen3-30B-A3B": "qwen3-30b-a3b",
    "Qwen/Qwen3-30B-A3B-Instruct-2507": "qwen3-30b-a3b-2507",
    "mistralai/Mixtral-8x7B-Instruct-v0.1": "mixtral-8x7b",
    "microsoft/Phi-mini-MoE-instruct": "phi-mini-moe",
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_parameters_are_counted_exactly(name):
    assert find_model(name).num_parameters == PUBLISHED[name]


@pytest.mark.parametrize("name", sorted(NEARLY))
def test_parameters_are_counted_but_for_small_norms_and_biases(name):
    count = find_model(name).num_parameters
    assert count <= NEARLY[name]
    assert count == pytest.approx(NEARLY[name], rel=1e-3)


@pytest.mark.parametrize("entry", models(), ids=lambda entry: entry.name)
def test_every_model_loads_under_its_name_and_aliases_and_says_where_it_is_from(entry):
    shape = find_model(entry.name)

    assert shape.name == entry.name
    assert entry.source.strip()
    assert [find_model(alias) for alias in entry.aliases] == [shape] * len(entry.aliases)
    assert shape.num_attention_heads % shape.num_key_value_heads == 0
    assert shape.memory_bytes() > 0
    assert shape.kv_bytes_per_token() > 0


def test_files_are_named_like_their_models():
    assert [entry.name for entry in models()] == names("models")


def test_no_two_models_share_a_name_or_alias():
    known = Counter(name for entry in models() for name in {one.lower() for one in (entry.name, *entry.aliases)})
    assert [name for name, count in known.items() if count > 1] == []


@pytest.mark.parametrize(("identifier", "name"), IDS.items())
def test_well_known_models_are_found_by_their_hugging_face_id_in_any_case(identifier, name):
    assert find_model(identifier).name == name
    assert find_model(identifier.upper()).name == name


def test_unknown_model_is_refused_with_what_to_do():
    with pytest.raises(InputError, match=r"'nobody/nothing-7b'.*profiles list.*config.json") as caught:
        find_model("nobody/nothing-7b")
    assert caught.value.field == "model"


def test_weights_and_kv_cache_of_llama_31_8b():
    shape = find_model("llama-3.1-8b")

    assert shape.memory_bytes() == 2 * 8_030_261_248
    assert shape.memory_bytes(2) == 8_030_261_248
    assert shape.kv_bytes_per_token() == 2 * 8 * 128 * 32 * 2
    assert shape.kv_bytes_per_token("fp8_e4m3") == 2 * 8 * 128 * 32
    # 8 heads over 16 devices: each device keeps one of them whole.
    assert shape.kv_bytes_per_token("auto", 16) == 2 * 1 * 128 * 32 * 2


def test_tied_embeddings_are_counted_once():
    assert find_model("llama-3.2-1b").tie_word_embeddings
    assert find_model("llama-3.2-1b").memory_bytes() == 2 * PUBLISHED["llama-3.2-1b"]


def test_fp8_weights_of_llama_405b_leave_attention_and_outer_layers_in_bfloat16():
    shape = find_model("llama-3.1-405b-fp8")

    assert (shape.weight_dtype, shape.attention_weight_dtype, shape.num_unquantized_mlp_layers) == (
        "fp8",
        "bfloat16",
        2,
    )
    fp8 = 124 * 3 * 16384 * 53248
    assert shape.memory_bytes() == pytest.approx(fp8 + 2 * (405_853_388_800 - fp8), rel=1e-5)


def test_mixtures_say_how_many_experts_a_token_visits():
    qwen, mixtral, phi = (find_model(name) for name in ("qwen3-30b-a3b", "mixtral-8x7b", "phi-mini-moe"))

    assert (qwen.num_experts, qwen.num_experts_per_tok, qwen.num_moe_layers) == (128, 8, 48)
    assert (mixtral.num_experts, mixtral.num_experts_per_tok, mixtral.num_moe_layers) == (8, 2, 32)
    assert (phi.num_experts, phi.num_experts_per_tok, phi.num_moe_layers) == (16, 2, 32)
    # 3.3e9 active of 30.5e9, as published.
    inside = qwen.num_hidden_layers * (qwen.attention_parameters + 8 * qwen.expert_parameters)
    assert inside + 2 * qwen.embedding_parameters == pytest.approx(3.3e9, rel=0.02)
