"""Building the accelerator model that a profile names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeFloat, PositiveFloat

from profiles.errors import InputError
from profiles.operator_tables import Skew, load_tables
from profiles.regression_trees import load_trees
from profiles.yaml_files import validate
from simulator.accelerators.base import AcceleratorModel
from simulator.accelerators.linear import Linear
from simulator.accelerators.operator_table import OperatorTable
from simulator.accelerators.regression import Correction, Regression
from simulator.accelerators.roofline import Roofline
from simulator.engine_config import EngineConfig
from simulator.hardware import Hardware, Interconnect
from simulator.model import ModelShape

ENTRY_POINTS = "servecal.accelerators"


@dataclass(frozen=True)
class Context:
    """What a builder may draw on besides the options in the profile.

    ``folder`` is where relative paths in the options start; ``file`` names the profile in messages.
    """

    model: ModelShape | None
    hardware: Hardware | None
    engine: EngineConfig
    folder: Path
    file: Path

    def need_model(self, kind: str) -> ModelShape:
        """Return the model.

        Raises
        ------
        InputError
            If neither profile nor trace names one.
        """
        if self.model is None:
            raise InputError(f"accelerator {kind!r} needs a model; give --model NAME|config.json", file=self.file)
        return self.model

    def need_hardware(self, kind: str) -> Hardware:
        """Return the hardware.

        Raises
        ------
        InputError
            If the profile names none.
        """
        if self.hardware is None:
            raise InputError(f"accelerator {kind!r} needs hardware: <name>", file=self.file, field="hardware")
        return self.hardware


Builder = Callable[[Mapping[str, Any], Context], AcceleratorModel]


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class _NoOptions(_Options):
    pass


class Link(_Options):
    """Link between tensor-parallel devices: bytes/s and seconds per hop."""

    bandwidth: PositiveFloat
    latency: NonNegativeFloat
    source: str = ""


class OperatorTableOptions(_Options):
    """Options of ``kind: operator_table``."""

    tables: str
    tensor_parallel_size: int = Field(ge=1)
    num_hidden_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    activation_bytes: PositiveFloat = 2.0
    skew: Skew | None = None
    link: Link | None = None
    memory_bandwidth: PositiveFloat | None = None
    separate_prompts: bool = False


class LinearOptions(_Options):
    """Options of ``kind: linear``."""

    seconds: dict[str, NonNegativeFloat]


class CorrectionOptions(_Options):
    """What a regression has learned: the file of its trees with its checksum, and what they were grown on."""

    trees: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    kept: float = Field(ge=0, le=1)
    seen: dict[str, tuple[FiniteFloat, FiniteFloat]]


class RegressionOptions(_Options):
    """Options of ``kind: regression``."""

    seconds: dict[str, NonNegativeFloat]
    correction: CorrectionOptions | None = None


def _roofline(options: Mapping[str, Any], context: Context) -> AcceleratorModel:
    validate(_NoOptions, options, context.file)
    return Roofline(
        context.need_model("roofline"),
        context.need_hardware("roofline"),
        tensor_parallel_size=context.engine.tensor_parallel_size,
        kv_cache_dtype=context.engine.kv_cache_dtype,
    )


def _operator_table(options: Mapping[str, Any], context: Context) -> AcceleratorModel:
    checked = validate(OperatorTableOptions, options, context.file)
    degree = context.engine.tensor_parallel_size
    if checked.tensor_parallel_size != degree:
        raise InputError(
            f"the tables were measured at tensor_parallel_size={checked.tensor_parallel_size}, the engine has "
            f"{degree}; import the bundle with --tp {degree}, or --set engine.tensor_parallel_size="
            f"{checked.tensor_parallel_size}",
            file=context.file,
            field="accelerator.tensor_parallel_size",
        )
    link = checked.link
    return OperatorTable(
        load_tables(context.folder / checked.tables, checked.skew),
        num_hidden_layers=checked.num_hidden_layers,
        hidden_size=checked.hidden_size,
        activation_bytes=checked.activation_bytes,
        tensor_parallel_size=degree,
        link=Interconnect("link", link.bandwidth, link.latency) if link else None,
        memory_bandwidth=checked.memory_bandwidth or 0.0,
        separate_prompts=checked.separate_prompts,
    )


def _linear(options: Mapping[str, Any], context: Context) -> AcceleratorModel:
    return Linear(validate(LinearOptions, options, context.file).seconds)


def _regression(options: Mapping[str, Any], context: Context) -> AcceleratorModel:
    checked = validate(RegressionOptions, options, context.file)
    learned = checked.correction
    if learned is None:
        return Regression(checked.seconds)
    trees = load_trees(context.folder / learned.trees, learned.sha256)
    return Regression(checked.seconds, Correction(trees, learned.kept, learned.seen))


BUILDERS: dict[str, Builder] = {
    "linear": _linear,
    "operator_table": _operator_table,
    "regression": _regression,
    "roofline": _roofline,
}


def build_accelerator(kind: str, options: Mapping[str, Any], context: Context) -> AcceleratorModel:
    """Build the accelerator model of that kind.

    A kind that is not built in is looked up in the entry-point group ``servecal.accelerators``, whose objects
    are called like the built-in ones: with the profile's options and a ``Context``.

    Raises
    ------
    InputError
        If there is no such kind, or its options do not fit.
    """
    builder = BUILDERS.get(kind)
    if builder is None:
        plugins = {one.name: one for one in entry_points(group=ENTRY_POINTS)}
        if kind not in plugins:
            raise InputError(
                f"no accelerator model {kind!r}; there are " + ", ".join(sorted({*BUILDERS, *plugins})),
                file=context.file,
                field="accelerator.kind",
            )
        builder = plugins[kind].load()
    return builder(options, context)
