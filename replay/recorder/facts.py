"""What a recording says of its engine: arguments in force by vLLM's names, model, machine, clocks."""

from __future__ import annotations

import os
import platform
import sys
import time
from hashlib import blake2b
from pathlib import Path
from typing import Any

# fmt: off
_SCHEDULER = [
    "max_num_seqs", "max_num_batched_tokens", "max_num_scheduled_tokens", "max_model_len", "enable_chunked_prefill",
    "long_prefill_token_threshold", "max_num_partial_prefills", "max_long_partial_prefills",
    "scheduler_reserve_full_isl", "watermark", "async_scheduling", "stream_interval",
]
_CACHE = [
    "block_size", "enable_prefix_caching", "prefix_caching_hash_algo", "gpu_memory_utilization", "swap_space",
    "kv_sharing_fast_prefill", "mamba_cache_mode",
]
_PARALLEL = [
    "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "data_parallel_size_local",
    "enable_expert_parallel", "decode_context_parallel_size", "distributed_executor_backend", "all2all_backend",
    "enable_eplb", "enable_dbo",
]
_MODEL = [
    "model", "dtype", "quantization", "max_model_len", "enforce_eager", "seed", "revision",
]
_SHAPE = [
    "architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "tie_word_embeddings", "torch_dtype",
    "hidden_act", "rms_norm_eps", "rope_theta", "num_experts", "num_local_experts", "n_routed_experts",
    "num_experts_per_tok", "moe_intermediate_size", "sliding_window", "kv_lora_rank", "q_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
]
# fmt: on


def plain(value: Any) -> Any:
    """Return a value that JSON can hold: enums by their value, dtypes without their module, the rest as text."""
    value = getattr(value, "value", value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return str(value).removeprefix("torch.")


def _some(holder: Any, names: list[str]) -> dict[str, Any]:
    return {name: plain(getattr(holder, name)) for name in names if getattr(holder, name, None) is not None}


def arguments(config: Any, num_gpu_blocks: int | None, block_size: int | None) -> dict[str, Any]:
    """Return a ``VllmConfig``'s arguments in force, as far as this version of vLLM has them."""
    found = _some(config.model_config, _MODEL) | _some(config.scheduler_config, _SCHEDULER)
    found |= _some(config.cache_config, _CACHE) | _some(config.parallel_config, _PARALLEL)
    found["scheduling_policy"] = plain(getattr(config.scheduler_config, "policy", "fcfs"))
    found["kv_cache_dtype"] = plain(getattr(config.cache_config, "cache_dtype", "auto"))
    found["load_format"] = plain(getattr(getattr(config, "load_config", None), "load_format", None))
    if num_gpu_blocks is not None:
        found["num_gpu_blocks"] = num_gpu_blocks
    if block_size is not None:
        found["block_size"] = block_size
    speculative = getattr(config, "speculative_config", None)
    if speculative is not None:
        found["speculative_config"] = _some(speculative, ["method", "num_speculative_tokens", "model"])
    compilation = getattr(config, "compilation_config", None)
    sizes = getattr(compilation, "cudagraph_capture_sizes", None)
    if sizes:
        found["cudagraph_capture_sizes"] = sorted(sizes)
    mode = getattr(getattr(compilation, "cudagraph_mode", None), "name", None)
    if mode is not None:
        found["cudagraph_mode"] = mode
    return {name: value for name, value in found.items() if value is not None}


def shape(config: Any) -> dict[str, Any]:
    """Return what of the model's ``config.json`` its step times depend on."""
    model = config.model_config
    return _some(getattr(model, "hf_text_config", None) or getattr(model, "hf_config", None), _SHAPE)


def machine() -> dict[str, Any]:
    """Return what the step times depend on: devices, processor, versions."""
    found: dict[str, Any] = {
        "boot": _boot(),
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    binding = os.environ.get("VLLM_CPU_OMP_THREADS_BIND")
    if binding:
        found["omp_threads_bind"] = binding
    torch = sys.modules.get("torch")
    if torch is not None:
        found["torch"] = str(torch.__version__)
        cuda = getattr(torch.version, "cuda", None) or getattr(torch.version, "hip", None)
        if cuda:
            found["accelerator_runtime"] = str(cuda)
    # By vLLM's platform, which asks the driver: torch would start a CUDA context in this process.
    platforms = sys.modules.get("vllm.platforms")
    try:
        found["device"] = platforms.current_platform.get_device_name()  # type: ignore[union-attr]
    except Exception:  # whatever a platform raises: a recorder never stops an engine
        found["device"] = None
    return found


def _boot() -> str | None:
    """Return a name for this boot of the host, whose monotonic clock all its processes share."""
    try:
        identity = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        return None
    return blake2b(identity, digest_size=8, person=b"servecal boot").hexdigest()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def clocks() -> dict[str, float]:
    """Return one instant on both clocks; the wall clock is read between two readings of the other."""
    before = time.monotonic()
    wall = time.time()
    return {"monotonic": (before + time.monotonic()) / 2, "wall": wall}
