"""A profile and what a trace says of itself, resolved into something that can run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from profiles.accelerators import Context, build_accelerator
from profiles.errors import InputError, found
from profiles.huggingface import model_shape
from profiles.kv_capacity import estimated_num_gpu_blocks
from profiles.library import find_hardware_entry, find_model
from profiles.profile import WITHOUT_PHYSICS, FrontEnd, LoadedProfile
from simulator.accelerators.base import HOST_COMPONENTS, CallOverhead, HostOverhead, WithHost
from simulator.cuda_graphs import capture_sizes
from simulator.engine import Engine
from simulator.engine_config import EngineConfig, engine_arguments, known_arguments, resolve_engine_config
from simulator.errors import SimulationError
from simulator.hardware import Hardware, Interconnect
from simulator.model import ModelShape

HOST_TERMS = tuple(HOST_COMPONENTS.values())
NEEDED = ("max_num_seqs", "max_num_batched_tokens")
"""Engine arguments without which no schedule can be told; vLLM's defaults for them depend on the machine."""


class UnknownBlocks(InputError):
    """Nobody says ``num_gpu_blocks``, and model or hardware lack to estimate it."""


@dataclass(frozen=True)
class Facts:
    """What a trace says of the deployment that it was measured on.

    ``link`` is what it says of the links between devices: ``bandwidth`` (bytes/s), ``latency`` (seconds per hop) and
    ``source``.
    """

    model: str | None = None
    model_config: Mapping[str, Any] | None = None
    version: str | None = None
    arguments: Mapping[str, Any] | None = None
    link: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Deployment:
    """Model, hardware, engine and accelerator of one simulated engine.

    ``conflicts`` are sentences about what profile, trace and command line say differently; ``assumed`` are
    values that none of them gave, by argument name.
    """

    loaded: LoadedProfile
    model: ModelShape | None
    hardware: Hardware | None
    config: EngineConfig
    accelerator: WithHost
    conflicts: tuple[str, ...]
    assumed: Mapping[str, Any]
    front_end: FrontEnd = field(default_factory=FrontEnd)

    def engine(self) -> Engine:
        """Return an engine ready to run."""
        return Engine(self.config, self.accelerator)


def parse_settings(settings: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """Sort ``--set`` options into engine arguments, host terms and properties of the link between devices.

    Raises
    ------
    InputError
        If one is not ``engine.<name>=<value>``, ``host.<name>=<value>`` or ``link.<name>=<value>`` with a name that
        exists.
    """
    known = {"engine": ("version", *known_arguments()), "host": HOST_TERMS, "link": ("bandwidth", "latency")}
    split: dict[str, dict[str, str]] = {room: {} for room in known}
    for setting in settings:
        key, equals, value = setting.partition("=")
        room, _, name = key.partition(".")
        if not equals or room not in split or name not in known.get(room, ()):
            examples = "engine.<name>=<value>, host.<name>=<value> or link.<name>=<value>"
            names = ", ".join(known.get(room, (*known["engine"], *known["host"], *known["link"])))
            raise InputError(f"{setting!r}: expected {examples}, with a name of: {names}", field="--set")
        split[room][name] = value
    return split


def resolve(
    loaded: LoadedProfile,
    facts: Facts,
    *,
    settings: tuple[str, ...] = (),
    model: str | None = None,
    assume_defaults: bool = False,
) -> Deployment:
    """Bring profile, trace and command line together; the latter wins over the former, and says so.

    Parameters
    ----------
    loaded : LoadedProfile
    facts : Facts
        Of the trace. Its engine arguments win over the profile's: they are what was measured.
    settings : tuple of str
        ``--set`` options, which win over both.
    model : str, optional
        ``--model``, which wins over both.
    assume_defaults : bool
        Take vLLM's defaults for engine arguments that nobody gives, instead of asking for them.

    Raises
    ------
    InputError
        If something is missing, contradictory or impossible.
    """
    profile = loaded.profile
    asked = parse_settings(settings)
    conflicts: list[str] = []
    shape = _model(loaded, facts, model, conflicts)
    entry = find_hardware_entry(profile.hardware) if profile.hardware else None
    try:
        hardware = entry.hardware() if entry else None
        arguments, version = _arguments(loaded, facts, asked["engine"], conflicts)
        if not assume_defaults:
            _need(arguments, version)
        defaulted = resolve_engine_config(
            arguments,
            version=version,
            device_memory=hardware.memory_bytes if hardware else None,
            device_name=hardware.name if hardware else "",
            max_position_embeddings=shape.max_position_embeddings if shape else None,
        )
        config = defaulted.config
        assumed = {name: getattr(config, name) for name in defaulted.assumed if name in _WORTH_SAYING}
        if not config.num_gpu_blocks:
            replace(config, num_gpu_blocks=2).validate()  # what the estimate divides by
            config = replace(config, num_gpu_blocks=_num_gpu_blocks(shape, hardware, config))
            assumed["num_gpu_blocks"] = config.num_gpu_blocks
        if version is None:
            assumed["version"] = ".".join(map(str, config.version))
        elif config.version < (0, 8):
            conflicts.append(
                f"vLLM {version} ran the V0 engine; it is simulated by V1's scheduling rules (with V0's late output, "
                "from 0.6 on), so other differences count as the simulator's error"
            )
        config.validate()
        if hardware is not None:
            hardware = _with_link(hardware, facts, asked["link"], config.tensor_parallel_size, conflicts)
        options = profile.accelerator.options
        context = Context(shape, hardware, config, loaded.folder, Path(loaded.origin))
        device = build_accelerator(profile.accelerator.kind, options, context)
        terms = {name: _seconds(asked["host"], f"host.{name}", getattr(profile.host, name)) for name in HOST_TERMS}
        layers = shape.num_hidden_layers if shape else 1
        host = HostOverhead(**terms, capture_sizes=capture_sizes(config), num_layers=layers)
        factors = {name: coefficient.value for name, coefficient in profile.coefficients.items()}
        call = CallOverhead(**profile.call.model_dump()) if profile.call else CallOverhead()
        accelerator = WithHost(device, host, factors, call)
    except SimulationError as error:
        raise InputError(str(error)) from None
    front_end = profile.front_end or FrontEnd()
    return Deployment(loaded, shape, hardware, config, accelerator, tuple(conflicts), assumed, front_end)


_WORTH_SAYING = {
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
    "block_size",
    "enable_prefix_caching",
    "async_scheduling",
    "gpu_memory_utilization",
}


def _model(loaded: LoadedProfile, facts: Facts, asked: str | None, conflicts: list[str]) -> ModelShape | None:
    """The model asked for, else the profile's, else the trace's."""
    profile = loaded.profile
    if asked is not None:
        return find_model(asked)
    measured: ModelShape | None = None
    if facts.model_config is not None:
        measured = model_shape(facts.model or "model", facts.model_config)
    elif facts.model is not None:
        try:
            measured = find_model(facts.model)
        except InputError:
            if profile.model is None and profile.accelerator.kind not in WITHOUT_PHYSICS:
                raise InputError(
                    f"the trace was measured with model {facts.model!r}, which the library does not know; give "
                    "--model NAME|config.json",
                    field="model",
                ) from None
            conflicts.append(f"the library does not know the trace's model {facts.model!r}")
    if profile.model is None:
        if measured is None and facts.model is None:
            raise InputError(
                "neither trace nor profile says which model was served; give --model NAME|config.json",
                field="model",
            )
        return measured
    try:
        own = find_model(profile.model)
    except InputError:
        if measured is None and profile.accelerator.kind not in WITHOUT_PHYSICS:
            raise
        return measured
    if measured is not None and measured.name != own.name:
        conflicts.append(f"model: the trace was measured with {facts.model}, the profile describes {profile.model}")
    return own


def _arguments(
    loaded: LoadedProfile, facts: Facts, asked: Mapping[str, str], conflicts: list[str]
) -> tuple[dict[str, Any], str | None]:
    """Engine arguments and version: profile, overridden by trace, overridden by ``--set``."""
    profile = dict(loaded.profile.engine)
    own_version = profile.pop("version", None)
    if own_version is not None and not isinstance(own_version, str):
        # YAML reads 0.10 without quotes as the number 0.1.
        raise InputError(
            f"expected a version in quotes, such as '0.19.0'; found {found(own_version)}",
            file=loaded.origin,
            field="engine.version",
        )
    unknown = set(profile) - set(known_arguments())
    if unknown:
        raise InputError(
            f"is no engine argument that the simulator knows: {', '.join(known_arguments())}",
            file=loaded.origin,
            field=f"engine.{min(unknown)}",
        )
    mine = engine_arguments(profile)
    measured = engine_arguments(facts.arguments or {})
    wanted = engine_arguments({name: value for name, value in asked.items() if name != "version"})
    merged = dict(mine)
    for source, name in ((measured, "trace"), (wanted, "--set")):
        for key, value in source.items():
            if key in merged and merged[key] != value:
                other = "profile" if name == "trace" or key not in measured else "trace"
                conflicts.append(f"engine.{key}: {other} says {merged[key]}, {name} says {value}; {name} is used")
            merged[key] = value
    version = asked.get("version") or facts.version or own_version
    if facts.version and own_version and own_version != facts.version:
        conflicts.append(f"engine.version: profile says {own_version}, trace says {facts.version}; {version} is used")
    return merged, None if version is None else str(version)


def _need(arguments: Mapping[str, Any], version: str | None) -> None:
    missing = [name for name in NEEDED if name not in arguments] + (["version"] if version is None else [])
    if missing:
        flags = " ".join(f"--set engine.{name}=..." for name in missing)
        raise InputError(
            f"neither trace nor profile says the engine's {', '.join(missing)}; give {flags}, or "
            "--assume-defaults to take vLLM's defaults for this hardware"
        )


def _num_gpu_blocks(model: ModelShape | None, hardware: Hardware | None, config: EngineConfig) -> int:
    if model is None or hardware is None:
        raise UnknownBlocks(
            "neither trace nor profile says num_gpu_blocks, and without model and hardware it cannot be "
            "estimated; give --set engine.num_gpu_blocks=... (vLLM logs 'GPU KV cache size: N tokens')"
        )
    if not 0 < config.gpu_memory_utilization <= 1:
        raise InputError(
            f"engine.gpu_memory_utilization={config.gpu_memory_utilization}: expected a fraction above 0, at most 1"
        )
    blocks = estimated_num_gpu_blocks(model, hardware, config)
    if blocks < 2:
        raise InputError(
            f"{model.name} leaves no room for a KV cache on {config.tensor_parallel_size} x {hardware.name} "
            f"({hardware.memory_bytes / 2**30:.0f} GiB): raise engine.tensor_parallel_size, or give "
            "--set engine.num_gpu_blocks=... if it ran nevertheless"
        )
    return blocks


def _with_link(
    hardware: Hardware, facts: Facts, asked: Mapping[str, str], devices: int, conflicts: list[str]
) -> Hardware:
    """The hardware with the link that the command line or the trace says, over that of the datasheet."""
    if devices < 2:
        return hardware
    link, said = hardware.interconnect, facts.link or {}
    stated = Interconnect(
        link.kind, float(said.get("bandwidth") or link.bandwidth), float(said.get("latency", link.latency))
    )
    bandwidth = _seconds(asked, "link.bandwidth", stated.bandwidth, "bytes per second", 1.0, 1e15)
    latency = _seconds(asked, "link.latency", stated.latency)
    if stated != link and not asked:
        conflicts.append(
            f"link: the datasheet says {_in_words(link)}, the trace {_in_words(stated)} "
            f"({said.get('source', 'its meta')}); the trace's is used"
        )
    return replace(hardware, interconnect=Interconnect(link.kind, bandwidth, latency))


def _in_words(link: Interconnect) -> str:
    return f"{link.bandwidth / 1e9:.3g} GB/s and {1e6 * link.latency:.3g} us"


def _seconds(
    given: Mapping[str, str],
    name: str,
    default: float,
    unit: str = "seconds",
    least: float = 0.0,
    below: float = 1e3,
) -> float:
    short = name.partition(".")[2]
    if short not in given:
        return default
    try:
        value = float(given[short])
    except ValueError:
        value = -1.0
    if not least <= value < below:
        raise InputError(f"{name}={given[short]}: expected {unit}, at least {least:g}", field="--set")
    return value
