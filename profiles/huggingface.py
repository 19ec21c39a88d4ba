"""Model shapes from the keys of a Hugging Face ``config.json``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from profiles.errors import InputError, found
from simulator.model import BYTES, ModelShape

_UNGATED = {"gpt2", "opt", "bloom", "falcon", "gpt_neox", "phi", "starcoder2", "gpt_bigcode"}
_QK_NORM = {"qwen3", "qwen3_moe"}
_LATENT_ATTENTION = ("kv_lora_rank", "q_lora_rank")
_STATE_SPACE = ("mamba_d_state", "ssm_cfg", "linear_num_key_heads")
_KEPT = ("modules_to_not_convert", "ignore", "ignored_layers")
# The router of a mixture is listed as ``mlp.gate``; it is no MLP.
_KEPT_MLP = re.compile(r"layers\.(\d+)\.mlp(?!\.(?:shared_expert_)?gate$)")


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
    text = config.get("text_config")
    config = text if isinstance(text, Mapping) else config

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
    per_token = number("num_experts_per_tok", "moe_topk", default=2) if experts else 0
    if per_token > experts:
        raise InputError(
            f"expected at most the {experts} experts there are, found {per_token}",
            file=file,
            field="num_experts_per_tok",
        )
    step = number("decoder_sparse_step", "moe_layer_freq", default=1) or 1
    moe_layers = _moe_layers(config, layers, step, number("first_k_dense_replace", default=0), file) if experts else 0
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
        num_experts_per_tok=per_token,
        moe_intermediate_size=expert_width,
        shared_expert_intermediate_size=shared if experts else 0,
        num_moe_layers=moe_layers,
        weight_dtype=_weight_dtype(config, activation),
        activation_dtype=activation,
        attention_weight_dtype=activation
        if any("self_attn" in one for one in kept)
        else _weight_dtype(config, activation),
        num_unquantized_mlp_layers=min(_kept_mlp_layers(kept), layers - moe_layers),
        sliding_window=_sliding_window(config),
        unsupported=_unsupported(config),
    )


def _moe_layers(config: Mapping[str, Any], layers: int, step: int, first: int, file: Path | None) -> int:
    """Layers with experts: every ``step``-th from ``first`` on, but for those listed as dense."""
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise InputError(f"expected a list of layers, found {found(dense)}", file=file, field="mlp_only_layers")
    return sum(1 for layer in range(first, layers) if layer not in dense and (layer + 1) % step == 0)


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
    method = f"{quantization.get('quant_method')} {quantization.get('quant_algo')}".lower()
    bits, kind = quantization.get("bits") or quantization.get("num_bits"), "int"
    groups = quantization.get("config_groups")
    for group in groups.values() if bits is None and isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            bits, kind = weights.get("num_bits"), "fp" if weights.get("type") == "float" else "int"
    if bits is None:
        bits = next((width for width in (4, 8) if quantization.get(f"load_in_{width}bit") is True), None)
    if "fp8" in method:
        return "fp8"
    if "fp4" in method:
        return "fp4"
    return f"{kind}{bits}" if str(bits) in ("4", "8") else activation


def _not_converted(config: Mapping[str, Any]) -> list[str]:
    """Modules that a quantised checkpoint leaves in the activations' type."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping):
        return []
    listed = next((quantization[key] for key in _KEPT if quantization.get(key)), None)
    return [str(one) for one in listed] if isinstance(listed, list) else []


def _kept_mlp_layers(kept: list[str]) -> int:
    """Layers whose MLP, or a matrix of it, is among the modules left out."""
    return len({match[1] for match in map(_KEPT_MLP.search, kept) if match})


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
