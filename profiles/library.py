"""The library of models, hardware and fitted profiles that comes with the package."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat

from profiles.errors import InputError
from profiles.huggingface import model_shape, read_config
from profiles.yaml_files import read_mapping, validate
from simulator.hardware import Hardware, Interconnect
from simulator.model import ModelShape

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class Figure(_Strict):
    """A number and where it comes from."""

    value: PositiveFloat
    source: str


class ModelEntry(_Strict):
    """A model of the library: the cost-relevant keys of its ``config.json``."""

    schema_: str = Field(alias="schema", pattern=r"^servecal\.model/1$")
    name: str
    aliases: list[str]
    source: str
    config: dict[str, Any]


class InterconnectEntry(_Strict):
    """Links between devices of one node."""

    kind: str
    bandwidth: Figure
    latency: Figure


class HardwareEntry(_Strict):
    """A device of the library: every figure with its source."""

    schema_: str = Field(alias="schema", pattern=r"^servecal\.hardware/1$")
    name: str
    aliases: list[str]
    vendor: str
    kind: str
    memory_bytes: Figure
    memory_bandwidth: Figure
    peak_flops: dict[str, Figure]
    interconnect: InterconnectEntry | None = None
    sm_family: str | None = None
    power_watts: Figure | None = None
    notes: list[str] = []

    def hardware(self) -> Hardware:
        """Return the figures alone."""
        link = self.interconnect
        return Hardware(
            name=self.name,
            memory_bytes=self.memory_bytes.value,
            memory_bandwidth=self.memory_bandwidth.value,
            peak_flops={_DTYPES.get(name, name): figure.value for name, figure in self.peak_flops.items()},
            interconnect=Interconnect(link.kind, link.bandwidth.value, link.latency.value) if link else Interconnect(),
        )


def library_folder(kind: str) -> Path:
    """Folder of the library's ``models``, ``hardware`` or ``fitted`` files."""
    return Path(str(files("profiles"))) / kind


def names(kind: str) -> list[str]:
    """Names in one part of the library, sorted."""
    return sorted(path.stem for path in library_folder(kind).glob("*.yaml"))


@lru_cache(maxsize=1)
def models() -> tuple[ModelEntry, ...]:
    """All models of the library, by name."""
    return tuple(_entries("models", ModelEntry))


@lru_cache(maxsize=1)
def hardware_entries() -> tuple[HardwareEntry, ...]:
    """All devices of the library, by name."""
    return tuple(_entries("hardware", HardwareEntry))


def find_model(name: str) -> ModelShape:
    """Return the shape of a model.

    Parameters
    ----------
    name : str
        Library name, Hugging Face id, or the path of a ``config.json`` or of a folder with one.

    Raises
    ------
    InputError
        If there is no such model, or its config cannot be used.
    """
    direct = library_folder("models") / f"{name.lower()}.yaml"
    if "/" not in name and "\\" not in name and direct.is_file():
        return _shape(validate(ModelEntry, read_mapping(direct), direct))
    wanted = name.lower()
    for entry in models():
        if wanted == entry.name or wanted in (alias.lower() for alias in entry.aliases):
            return _shape(entry)
    path = Path(name)
    if path.exists():
        return model_shape(path.stem if path.is_file() else path.name, read_config(path), path)
    raise InputError(
        f"no model {name!r} in the library and no such file; `servecal profiles list` shows the library, "
        "and `--model` takes the path of a Hugging Face config.json",
        field="model",
    )


def find_hardware_entry(name: str) -> HardwareEntry:
    """Return a device of the library by its name or an alias.

    Raises
    ------
    InputError
        If there is none.
    """
    direct = library_folder("hardware") / f"{name.lower()}.yaml"
    if "/" not in name and "\\" not in name and direct.is_file():
        return validate(HardwareEntry, read_mapping(direct), direct)
    wanted = name.lower()
    for entry in hardware_entries():
        if wanted in (alias.lower() for alias in entry.aliases):
            return entry
    raise InputError(
        f"no hardware {name!r} in the library; there are " + ", ".join(names("hardware")), field="hardware"
    )


def _shape(entry: ModelEntry) -> ModelShape:
    return model_shape(entry.name, entry.config, library_folder("models") / f"{entry.name}.yaml")


def _entries(kind: str, schema: type[Any]) -> Iterator[Any]:
    for name in names(kind):
        path = library_folder(kind) / f"{name}.yaml"
        yield validate(schema, read_mapping(path), path)
