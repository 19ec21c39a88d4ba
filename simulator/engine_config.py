"""Engine arguments under vLLM's own names, their defaults by version, and the behaviour versions differ in.

Source of the defaults: vLLM ``EngineArgs`` and ``SchedulerConfig`` of the versions named below.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

from simulator.errors import SimulationError

NEWEST_VERSION = (0, 32)
"""The vLLM version whose schedules the simulator is checked against, and the one assumed when none is named."""

GIB = 2**30
MOST_BLOCKS = 10**7
"""KV blocks that one simulated engine may have: 160 million tokens at 16 a block."""


def parse_version(text: str) -> tuple[int, int]:
    """Return (major, minor) of a vLLM version such as ``0.19.0`` or ``v0.19.1rc1``.

    Raises
    ------
    SimulationError
        If the text does not begin with two numbers.
    """
    match = re.match(r"v?(\d+)\.(\d+)", text.strip())
    if match is None:
        raise SimulationError(f"vLLM version {text!r}: expected something like '0.19.0'")
    return int(match[1]), int(match[2])


@dataclass(frozen=True, slots=True)
class Semantics:
    """Where vLLM's versions schedule differently. Each field names the first version that behaves so."""

    async_scheduling_default: bool
    """0.14: the engine loop is asynchronous unless something forbids it."""
    reserve_full_isl: bool
    """0.19: ``scheduler_reserve_full_isl`` exists, and is on by default."""
    watermark: bool
    """0.24: ``watermark`` exists (default 0)."""
    unhashed_blocks_first: bool
    """0.24: freed blocks that carry no hash are reused first instead of joining the LRU tail."""
    lone_request_ignores_threshold: bool
    """0.31: ``long_prefill_token_threshold`` does not apply to the only request there is."""
    capped_requests_skip_the_last_step: bool
    """0.11: an asynchronous request whose last token is in flight is not scheduled again."""
    victims_leave_the_step: bool
    """0.11: a request preempted in the step that has scheduled it already is taken out of it."""
    victims_above_move_the_place: bool
    """0.28: any victim further up the list moves the current request up, not only one scheduled in this step."""
    passes_over_prompts_beyond_the_budget: bool
    """Up to 0.11, without chunked prefill: a prompt beyond the budget is passed over, and keeps no order."""
    aborts_before_update: bool
    """0.13: aborts that came during a step take effect before its output is taken in."""
    output_after_next_launch: bool
    """0.6 and 0.7 (V0): a step's output is processed when the next one has been launched. Kernel by kernel, as steps
    that compute prompts are, that lasts until about its end; a CUDA graph of decodes is launched at once."""

    @classmethod
    @lru_cache(maxsize=64)
    def of(cls, version: tuple[int, int]) -> Semantics:
        """Behaviour of a vLLM version."""
        return cls(
            async_scheduling_default=version >= (0, 14),
            reserve_full_isl=version >= (0, 19),
            watermark=version >= (0, 24),
            unhashed_blocks_first=version >= (0, 24),
            lone_request_ignores_threshold=version >= (0, 31),
            capped_requests_skip_the_last_step=version >= (0, 11),
            victims_leave_the_step=version >= (0, 11),
            victims_above_move_the_place=version >= (0, 28),
            passes_over_prompts_beyond_the_budget=version < (0, 12),
            aborts_before_update=version >= (0, 13),
            output_after_next_launch=(0, 6) <= version < (0, 8),
        )


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Arguments of one engine, by vLLM's names; every value is the one in force.

    ``num_gpu_blocks`` counts the null block, as vLLM's log line and metric do. ``max_num_batched_tokens`` is
    the token budget of a step unless ``max_num_scheduled_tokens`` (0: unset) lowers it.
    """

    version: tuple[int, int] = NEWEST_VERSION
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_num_scheduled_tokens: int = 0
    max_model_len: int = 8192
    block_size: int = 16
    num_gpu_blocks: int = 0
    gpu_memory_utilization: float = 0.92
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    scheduling_policy: str = "fcfs"
    async_scheduling: bool = True
    scheduler_reserve_full_isl: bool = True
    watermark: float = 0.0
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    enable_expert_parallel: bool = False
    enforce_eager: bool = False
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    quantization: str | None = None

    @property
    def semantics(self) -> Semantics:
        """Behaviour of the engine's version."""
        return Semantics.of(self.version)

    @property
    def token_budget(self) -> int:
        """Most tokens one step may compute."""
        if self.max_num_scheduled_tokens:
            return min(self.max_num_scheduled_tokens, self.max_num_batched_tokens)
        return self.max_num_batched_tokens

    @property
    def arguments(self) -> dict[str, Any]:
        """All that has a value, by vLLM's names."""
        every = {name: getattr(self, name) for name in sorted(self.__slots__) if name != "version"}
        return {name: value for name, value in every.items() if value is not None}

    def validate(self) -> EngineConfig:
        """Return self.

        Raises
        ------
        SimulationError
            Naming the argument, its value and what is allowed.
        """
        at_least_one = ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size")
        parallel = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
        for name in (*at_least_one, *parallel):
            if getattr(self, name) < 1:
                raise SimulationError(f"engine.{name}={getattr(self, name)}: expected at least 1")
        for name in ("max_num_scheduled_tokens", "long_prefill_token_threshold"):
            if getattr(self, name) < 0:
                raise SimulationError(f"engine.{name}={getattr(self, name)}: expected at least 0")
        if self.num_gpu_blocks < 2:
            raise SimulationError(
                f"engine.num_gpu_blocks={self.num_gpu_blocks}: expected at least 2 (one is vLLM's null block)"
            )
        if self.num_gpu_blocks > MOST_BLOCKS:
            raise SimulationError(f"engine.num_gpu_blocks={self.num_gpu_blocks}: expected at most {MOST_BLOCKS}")
        if not 0 <= self.watermark < 1:
            raise SimulationError(f"engine.watermark={self.watermark}: expected a fraction from 0 to below 1")
        if self.scheduling_policy not in ("fcfs", "priority"):
            raise SimulationError(f"engine.scheduling_policy={self.scheduling_policy!r}: expected 'fcfs' or 'priority'")
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            raise SimulationError(
                f"engine.max_num_batched_tokens={self.max_num_batched_tokens}: without chunked prefill a step "
                f"must hold max_model_len={self.max_model_len} tokens"
            )
        for name, kind in (("pipeline_parallel_size", "pipeline"), ("data_parallel_size", "data")):
            if getattr(self, name) > 1:
                raise SimulationError(
                    f"engine.{name}={getattr(self, name)}: {kind} parallelism is not simulated yet; "
                    f"--set engine.{name}=1 simulates one engine on its own"
                )
        return self


_ALIASES = {
    "policy": "scheduling_policy",
    "model_max_len": "max_model_len",
    "num_gpu_blocks_override": "num_gpu_blocks",
}
_CONVERT = {"int": int, "float": float, "bool": bool, "str": str, "str | None": str}


def known_arguments() -> tuple[str, ...]:
    """Names that ``EngineConfig`` takes from a profile, a trace or ``--set engine.<name>=``."""
    return tuple(field.name for field in fields(EngineConfig) if field.name != "version")


def engine_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the arguments that the simulator knows, in their types; drop those given as null.

    Raises
    ------
    SimulationError
        If a value has not the type that vLLM gives the argument.
    """
    types = {field.name: str(field.type) for field in fields(EngineConfig)}
    kept: dict[str, Any] = {}
    for given, value in arguments.items():
        name = _ALIASES.get(given, given)
        if name not in types or name == "version" or value is None:
            continue
        kept[name] = _typed(name, value, types[name])
    return kept


def _typed(name: str, value: Any, kind: str) -> Any:
    if isinstance(value, str) and kind == "bool":
        if value.lower() in ("true", "false"):
            return value.lower() == "true"
    elif isinstance(value, str) and kind in ("int", "float"):
        try:
            return _CONVERT[kind](value)
        except ValueError:
            pass
    elif kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif kind == "int" and isinstance(value, bool):
        pass
    elif isinstance(value, _CONVERT[kind]):
        return value
    raise SimulationError(f"engine.{name}={value!r}: expected {kind.removesuffix(' | None')}")


@dataclass(frozen=True, slots=True)
class Defaulted:
    """An engine configuration and the arguments that no source gave."""

    config: EngineConfig
    assumed: tuple[str, ...]


def resolve_engine_config(
    arguments: Mapping[str, Any],
    *,
    version: str | None,
    device_memory: float | None = None,
    device_name: str = "",
    api_server: bool = True,
    max_position_embeddings: int | None = None,
) -> Defaulted:
    """Fill in what vLLM of that version would have chosen for the arguments that are not given.

    Parameters
    ----------
    arguments : mapping
        By vLLM's names; others are ignored.
    version : str, optional
        vLLM version; the newest known if absent.
    device_memory : float, optional
        Bytes of one device, which decide vLLM's default batch sizes.
    device_name : str
        vLLM gives A100s the smaller defaults whatever their memory.
    api_server : bool
        Whether the engine served HTTP; the offline ``LLM`` class has larger default batches.
    max_position_embeddings : int, optional
        The model's, for ``max_model_len``.

    Raises
    ------
    SimulationError
        For a value of the wrong type, or an impossible one.
    """
    given = engine_arguments(arguments)
    release = NEWEST_VERSION if version is None else parse_version(version)
    semantics = Semantics.of(release)
    budget, seqs = default_batch_limits(release, device_memory, device_name, api_server)
    max_model_len = given.get("max_model_len") or max_position_embeddings or 8192
    if given.get("enable_chunked_prefill") is False:
        budget = max(budget, max_model_len)
    budget = min(budget, given.get("max_num_seqs", seqs) * max_model_len)
    defaults: dict[str, Any] = {
        "max_model_len": max_model_len,
        "max_num_batched_tokens": budget,
        "max_num_seqs": min(seqs, given.get("max_num_batched_tokens", budget)),
        "gpu_memory_utilization": 0.92 if release >= (0, 20) else 0.9,
        "async_scheduling": semantics.async_scheduling_default,
        "scheduler_reserve_full_isl": semantics.reserve_full_isl,
    }
    config = replace(EngineConfig(version=release), **defaults | given)
    if not semantics.reserve_full_isl:
        config = replace(config, scheduler_reserve_full_isl=False)
    if not semantics.watermark:
        config = replace(config, watermark=0.0)
    assumed = tuple(name for name in known_arguments() if name not in given)
    return Defaulted(config, assumed)


def default_batch_limits(
    version: tuple[int, int], device_memory: float | None, device_name: str, api_server: bool
) -> tuple[int, int]:
    """Return vLLM's default (max_num_batched_tokens, max_num_seqs) for a device.

    Source: vLLM ``EngineArgs.get_batch_defaults``: at least 160 GiB (from 0.28), at least 70 GiB and not an
    A100, everything else.
    """
    gib = (device_memory or 0) / GIB
    if gib >= 160 and version >= (0, 28):
        return 16384, 1024
    if gib >= 70 and "a100" not in device_name.lower():
        return (8192, 1024) if api_server else (16384, 1024)
    return (2048, 256) if api_server else (8192, 256)
