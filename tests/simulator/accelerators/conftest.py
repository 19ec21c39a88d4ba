"""Shapes, devices and operator tables small enough to be priced by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from simulator.accelerators.operator_table import Curve, Tables
from simulator.hardware import Hardware, Interconnect
from simulator.model import ModelShape

LLAMA_31_8B = ModelShape(
    name="llama-3.1-8b",
    model_type="llama",
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_position_embeddings=131072,
)
MIXTURE = replace(
    LLAMA_31_8B,
    name="mixture",
    hidden_size=1024,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=32000,
    num_experts=16,
    num_experts_per_tok=2,
    moe_intermediate_size=2048,
    num_moe_layers=4,
)
H100 = Hardware(
    name="h100",
    memory_bytes=85e9,
    memory_bandwidth=3.35e12,
    peak_flops={"bfloat16": 989.4e12, "float16": 989.4e12, "fp8": 1978.9e12, "float32": 66.9e12},
    interconnect=Interconnect("nvlink", 450e9, 2e-6),
)


@pytest.fixture(scope="session")
def llama() -> ModelShape:
    return LLAMA_31_8B


@pytest.fixture(scope="session")
def mixture() -> ModelShape:
    return MIXTURE


@pytest.fixture(scope="session")
def h100() -> Hardware:
    return H100


@pytest.fixture(scope="session")
def constant() -> Callable[[int], Curve]:
    """A curve with one point: the same time everywhere."""
    return lambda ns: Curve([1], [ns])


@pytest.fixture(scope="session")
def tiny_tables(constant: Callable[[int], Curve]) -> Callable[..., Tables]:
    """Tables of constants; keyword arguments replace parts of them."""
    dense = {
        "embedding": 40,
        "layernorm": 10,
        "qkv_proj": 1000,
        "rotary_emb": 20,
        "o_proj": 300,
        "gate_up_proj": 5000,
        "act_fn": 30,
        "down_proj": 2000,
        "final_layernorm": 50,
    }

    def build(**parts: object) -> Tables:
        arguments = {
            "dense": {name: constant(ns) for name, ns in dense.items()},
            "per_sequence": {"lm_head": constant(600), "sampler": constant(70)},
            "attention": {(0, 1): {0: constant(900)}},
        }
        return Tables(**{**arguments, **parts})  # type: ignore[arg-type]

    return build
