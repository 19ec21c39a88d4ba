"""Model shapes from the keys of a Hugging Face ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from profiles.errors import InputError, found
from simulator.model import BYTES, ModelShape

_UNGATED = {"gpt2", "opt", "bloom", "falcon", "gpt_neox", "phi", "starcoder2", "gpt_bigcode"}
_QK_NORM = {"qwen3", "qwen3_moe"}
_LATENT_ATTENTION = ("kv_lora_rank", "q_lora_rank")
_STATE_SPACE = ("mamba_d_state", "ssm_cfg", "linear_num_key_heads")


def read_config(path: Path) -> dict[str, Any]:
    """Return the mapping in a ``config.json`` (or in the one of a folder).

    Raises
    ------
    InputError
        If there is none, or it is no JSON object.
    """
    if path.is_dir():
        path = path / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=path) from None
    except UnicodeDecodeError as error:
        raise InputError(f"is no UTF-8 text: {error.reason} at byte {error.start}", file=path) from None
    except json.JSONDecodeError as error:
        raise InputError(f"is no JSON: {error.msg}", file=path, row=error.lineno) from None
    except RecursionError:
        raise InputError("is no config.json: nested too deeply", file=path) from None
    if not isinstance(config, dict):
        raise InputError(f"expected a JSON object, found {found(config)}", file=path)
    return config


def model_shape(name: str, config: Mapping[str, Any], file: Path | None = None) -> ModelShape:
    """Return the shape that a config describes.

    Parameters
    ----------
    name : str
        What the model is called in reports.
    config : mapping
        As in ``config.json``; for multimodal models the text part (``text_config``) is taken.
    file : path, optional
        For error messages.

    Raises
    ------
    InputError
        If a needed key is missing, no positive integer, or inconsistent.
    """
    config = config.get("text_config", config)

    def number(*keys: str, default: int | None = None) -> int:
        for key in keys:
            value = config.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise InputError(f"expected an integer >= 0, found {found(value)}", file=file, field=key)
            return value
        if default is None:
            raise InputError("is missing; a model needs it", file=file, field=keys[0])
        return default

    model_type = str(config.get("model_type", ""))
    hidden = number("hidden_size", "n_embd", "n_embed")
    layers = number("num_hidden_layers", "n_layer")
    heads = number("num_attention_heads", "n_head")
    if min(hidden, layers, heads) < 1:
        raise InputError("hidden_size, num_hidden_layers and num_attention_heads must be positive", file=file)
    experts = number("num_experts", "num_local_experts", "n_routed_experts", default=0)
    intermediate = number("intermediate_size", "n_inner", "ffn_hidden_size", default=4 * hidden)
    shared = number("shared_expert_intermediate_size", default=0)
    expert_width = number("moe_intermediate_size", default=intermediate) if experts else 0
    if not shared and config.get("n_shared_experts"):
        shared = number("n_shared_experts") * expert_width
    kept = _not_converted(config)
    activation = _dtype(config.get("torch_dtype") or config.get("dtype") or "bfloat16", file)
    return ModelShape(
        name=name,
        model_type=model_type,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=number("num_key_value_heads", "n_head_kv", default=heads) or heads,
        head_dim=number("head_dim", default=hidden // heads) or hidden // heads,
        vocab_size=number("vocab_size"),
        max_position_embeddings=number("max_position_embeddings", "n_positions", "seq_length", default=2048),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", model_type in ("bloom", "gpt2"))),
        gated_mlp=model_type not in _UNGATED,
        qk_norm=model_type in _QK_NORM,
        num_experts=experts,
        num_experts_per_tok=number("num_experts_per_tok", "moe_topk", default=2) if experts else 0,
        moe_intermediate_size=expert_width,
        shared_expert_intermediate_size=shared if experts else 0,
        num_moe_layers=_moe_layers(config, layers) if experts else 0,
        weight_dtype=_weight_dtype(config, activation),
        activation_dtype=activation,
        attention_weight_dtype=activation
        if any("self_attn" in one for one in kept)
        else _weight_dtype(config, activation),
        num_unquantized_mlp_layers=sum(".mlp" in one for one in kept),
        sliding_window=_sliding_window(config),
        unsupported=_unsupported(config),
    )


def _moe_layers(config: Mapping[str, Any], layers: int) -> int:
    step = int(config.get("decoder_sparse_step") or config.get("moe_layer_freq") or 1)
    dense = set(config.get("mlp_only_layers") or ())
    dense |= set(range(int(config.get("first_k_dense_replace") or 0)))
    return sum(1 for layer in range(layers) if layer not in dense and (layer + 1) % step == 0)


def _dtype(name: object, file: Path | None) -> str:
    text = str(name).removeprefix("torch.")
    if text not in BYTES:
        raise InputError(f"expected one of {', '.join(BYTES)}, found {found(name)}", file=file, field="torch_dtype")
    return text


def _weight_dtype(config: Mapping[str, Any], activation: str) -> str:
    """Type of the quantised matrices, from ``quantization_config``."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping):
        return activation
    method = str(quantization.get("quant_method", ""))
    bits = quantization.get("bits") or quantization.get("num_bits")
    if bits is None:
        for group in (quantization.get("config_groups") or {}).values():
            bits = (group.get("weights") or {}).get("num_bits")
    if "fp8" in method:
        return "fp8"
    if "fp4" in method:
        return "fp4"
    return {4: "int4", 8: "int8"}.get(int(bits or 0), activation)


def _not_converted(config: Mapping[str, Any]) -> list[str]:
    """Modules that a quantised checkpoint leaves in the activations' type."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping):
        return []
    return [str(one) for one in quantization.get("modules_to_not_convert") or quantization.get("ignore") or ()]


def _sliding_window(config: Mapping[str, Any]) -> int | None:
    window = config.get("sliding_window")
    return window if isinstance(window, int) and config.get("use_sliding_window", True) else None


def _unsupported(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Parts that change an iteration's cost and that ``ModelShape`` cannot say."""
    parts = []
    if any(config.get(key) for key in _LATENT_ATTENTION):
        parts.append("multi-head latent attention")
    if any(config.get(key) for key in _STATE_SPACE):
        parts.append("state-space or linear-attention layers")
    window = _sliding_window(config)
    if window is not None and window < int(config.get("max_position_embeddings") or 0):
        parts.append(f"sliding-window attention ({window} tokens)")
    return tuple(parts)
