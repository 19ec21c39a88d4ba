"""Profiles, Hugging Face configs and operator-table bundles written into a temporary folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

LLAMA_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


@pytest.fixture(scope="session")
def llama_config() -> dict[str, Any]:
    """Keys of Llama-3.2-1B's config.json."""
    return LLAMA_CONFIG


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[..., Path]:
    """Write the Llama config with changes; a key given as None is left out."""

    def write(**changes: Any) -> Path:
        config = {key: value for key, value in {**LLAMA_CONFIG, **changes}.items() if value is not None}
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        return path

    return write


@pytest.fixture
def write_profile(tmp_path: Path) -> Callable[..., str]:
    """Write a profile; by default linear, with the engine arguments that every replay needs."""

    def write(**changes: Any) -> str:
        document = {
            "name": "mine",
            "model": "llama-3.1-8b",
            "engine": {
                "version": "0.19.0",
                "max_num_seqs": 64,
                "max_num_batched_tokens": 1024,
                "num_gpu_blocks": 1000,
            },
            "accelerator": {"kind": "linear", "seconds": {"step": 0.01, "token": 1e-5}},
            **changes,
        }
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in document.items() if value is not None}))
        return str(path)

    return write


LAYERS = {
    "embedding": 4.0,
    "layernorm": 2.0,
    "qkv_proj": 30.0,
    "rotary_emb": 3.0,
    "o_proj": 20.0,
    "gate_up_proj": 60.0,
    "act_fn": 5.0,
    "down_proj": 40.0,
    "final_layernorm": 2.5,
}


@pytest.fixture
def write_bundle(tmp_path: Path) -> Callable[..., Path]:
    """Write a bundle as LLMServingSim's profiler does: ``tp1`` and ``tp2``, the latter at 0.6 of the times."""

    def write(skew: bool = True, **meta: Any) -> Path:
        folder = tmp_path / "bundle"
        for degree, factor in ((1, 1.0), (2, 0.6)):
            own = folder / f"tp{degree}"
            own.mkdir(parents=True)
            dense = [
                f"{layer},{tokens},{factor * us * (1 + tokens / 100)}"
                for layer, us in LAYERS.items()
                for tokens in (1, 100)
            ]
            (own / "dense.csv").write_text("\n".join(["layer,tokens,time_us", *dense]) + "\n")
            head = [f"lm_head,{n},{factor * (100 + n)}" for n in (1, 8)]
            head += [f"sampler,{n},{factor * (20 + n)}" for n in (1, 8)]
            (own / "per_sequence.csv").write_text("\n".join(["layer,sequences,time_us", *head]) + "\n")
            attention = [
                f"{chunk},{context},{decodes},{kv},{factor * (7 + chunk + context / 64 + decodes + kv / 32)}"
                for chunk, decodes in ((0, 1), (0, 4), (16, 0), (16, 4))
                for context in (0, 512)
                for kv in (0, 1024)
            ]
            header = "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us"
            (own / "attention.csv").write_text("\n".join([header, *attention]) + "\n")
            (own / "skew_fit.csv").write_text(
                "pc,n_label,skew_rate_label,kv_big_label,kp_label,alpha,n_samples\n0,n<=2,sr<=50%,any,kp=0,0.25,3\n"
            )
        document: dict[str, Any] = {
            "vllm_version": "0.19.0",
            "gpu": "NVIDIA RTX PRO 6000 Blackwell Server Edition",
            "hardware": "RTXPRO6000",
            "profiled_at": "2026-04-24T12:44:27+00:00",
            "model": "meta-llama/Llama-3.2-1B",
            "tp_degrees": [1, 2],
            "skew_fit": {
                "enabled": skew,
                "bucket_axes": {
                    "n_bins": [0, 2, 1000],
                    "n_labels": ["n<=2", "n>2"],
                    "skew_rate_bins": [-0.01, 0.5, 1.01],
                    "skew_rate_labels": ["sr<=50%", "sr>50%"],
                    "kv_big_bins": [0, 1000000],
                    "kv_big_labels": ["any"],
                    "kp_bins": [-1, 0, 1000000],
                    "kp_labels": ["kp=0", "kp>0"],
                },
                "per_tp": {1: {"alpha_default": 0.05}, 2: {"alpha_default": 0.06}},
            },
            **meta,
        }
        (folder / "meta.yaml").write_text(
            yaml.safe_dump({key: value for key, value in document.items() if value is not None})
        )
        return folder

    return write
