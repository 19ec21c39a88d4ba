"""How many KV blocks vLLM would find room for, where no log says it."""

from __future__ import annotations

from simulator.engine_config import GIB, EngineConfig
from simulator.hardware import Hardware
from simulator.model import ModelShape

RUNTIME_BYTES = 0.64 * GIB
"""CUDA context, library workspaces and captured graphs. With the activations below it explains the 2,588 blocks
that vLLM 0.19 found on an RTX 4090 (Llama-3.1-8B, gpu_memory_utilization 0.9, 2,048 tokens, 256 sequences)."""


def estimated_num_gpu_blocks(model: ModelShape, hardware: Hardware, config: EngineConfig) -> int:
    """Blocks that fit beside weights, the largest step's activations and the runtime; at least 0.

    Activations are those of one layer for ``max_num_batched_tokens`` tokens, and ``max_num_seqs`` rows of
    logits in the model's type and twice in 32 bits (vLLM's profiling run with its sampler).
    """
    devices = config.tensor_parallel_size
    width = model.intermediate_size
    if model.num_experts:
        width = max(model.moe_intermediate_size * model.num_experts_per_tok, model.intermediate_size)
    per_token = (model.mlp_matrices * width / devices + 4 * model.hidden_size) * model.activation_bytes
    logits = config.max_num_seqs * model.vocab_size * (model.activation_bytes + 8)
    used = model.memory_bytes(devices) + config.max_num_batched_tokens * per_token + logits + RUNTIME_BYTES
    room = hardware.memory_bytes * config.gpu_memory_utilization - used
    return max(0, int(room // (config.block_size * model.kv_bytes_per_token(config.kv_cache_dtype, devices))))
