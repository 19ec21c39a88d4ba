"""The Profile: a deployment as YAML that a person can read, review and compare."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, field_validator, model_validator

from profiles.errors import InputError
from profiles.library import library_folder, names
from profiles.yaml_files import read_mapping, validate
from simulator.accelerators.base import CallOverhead, HostOverhead

SCHEMA = "servecal.profile/1"
ROOFLINE = "roofline:"
WITHOUT_PHYSICS = ("linear", "regression")
"""Names, and accelerator kinds, of starts for fitting that need neither model nor hardware."""


class Coefficient(BaseModel):
    """A factor on one component: its value and, where it was fitted, how sure that is; the wider interval is honest."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    value: NonNegativeFloat = 1.0
    ci95: tuple[float, float] | None = None
    ci95_bootstrap: tuple[float, float] | None = None
    prior: float | None = None
    identified: bool | None = None


class Host(BaseModel):
    """Seconds beside the accelerator model (``HostOverhead``)."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    per_step: NonNegativeFloat = HostOverhead().per_step
    per_sequence: NonNegativeFloat = HostOverhead().per_sequence
    per_prefill_layer: NonNegativeFloat = HostOverhead().per_prefill_layer
    per_prefill_token: NonNegativeFloat = HostOverhead().per_prefill_token
    per_padding_token: NonNegativeFloat = HostOverhead().per_padding_token
    per_layer_beyond_graphs: NonNegativeFloat = HostOverhead().per_layer_beyond_graphs
    per_longest_context: NonNegativeFloat = HostOverhead().per_longest_context
    per_empty_query: NonNegativeFloat = HostOverhead().per_empty_query
    per_long_prefill_token: NonNegativeFloat = HostOverhead().per_long_prefill_token
    per_step_of_several_tokens: NonNegativeFloat = HostOverhead().per_step_of_several_tokens
    per_step_of_several_tiles: NonNegativeFloat = HostOverhead().per_step_of_several_tiles
    source: str = "default: a prior of 0.4 ms per step; not measured on this deployment"


class FrontEnd(BaseModel):
    """Seconds between client and engine, of traces that were measured at the client: per request and prompt token.

    Client-side times tell only the sum of the way there and the way back; all of it is placed before the engine.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    per_request: NonNegativeFloat = 0.0
    per_request_ci95: tuple[float, float] | None = None
    per_prompt_token: NonNegativeFloat = 0.0
    per_prompt_token_ci95: tuple[float, float] | None = None

    def seconds(self, prompt_tokens: float) -> float:
        """Return the delay of a request."""
        return self.per_request + self.per_prompt_token * prompt_tokens


class Call(BaseModel):
    """Seconds of an offline call beside its iterations (``CallOverhead``)."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    per_call: NonNegativeFloat = CallOverhead().per_call
    per_request: NonNegativeFloat = CallOverhead().per_request


class Accelerator(BaseModel):
    """Which accelerator model, and its own options."""

    model_config = ConfigDict(extra="allow")
    kind: str

    @property
    def options(self) -> dict[str, Any]:
        """Everything but the kind."""
        return dict(self.model_extra or {})


class Profile(BaseModel):
    """Everything that a replay needs besides the trace.

    ``model`` and ``hardware`` are names of the library (a model may also be the path of a ``config.json``);
    ``engine`` holds arguments by vLLM's names and may hold ``version``. ``domain`` is what a fit has seen, ``[least,
    most]`` by axis: sequences and tokens of an iteration, context of a decode, prompt_tokens of a request.
    """

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    schema_: str = Field(default=SCHEMA, alias="schema", pattern=r"^servecal\.profile/1$")
    name: str
    description: str = ""
    model: str | None = None
    hardware: str | None = None
    engine: dict[str, Any] = {}
    accelerator: Accelerator
    coefficients: dict[str, Coefficient] = {}
    host: Host = Host()
    front_end: FrontEnd | None = None
    call: Call | None = None
    domain: dict[str, Any] = {}
    provenance: dict[str, Any] = {}

    @field_validator("domain")
    @classmethod
    def _ranges(cls, domain: dict[str, Any]) -> dict[str, Any]:
        """Refuse a range that is not two numbers in order."""
        for axis, limits in domain.items():
            numbers = isinstance(limits, list | tuple) and all(isinstance(one, int | float) for one in limits)
            if not numbers or len(limits) != 2 or not limits[0] <= limits[1]:
                raise ValueError(f"{axis}: expected [least, most], found {limits!r}")
        return domain

    @model_validator(mode="before")
    @classmethod
    def _plain_coefficients(cls, document: Any) -> Any:
        """Accept ``name: 1.07`` for ``name: {value: 1.07}``."""
        given = document.get("coefficients") if isinstance(document, Mapping) else None
        if isinstance(given, Mapping):
            full = {
                key: value if isinstance(value, Mapping | Coefficient) else {"value": value}
                for key, value in given.items()
            }
            document = {**document, "coefficients": full}
        return document

    def to_yaml(self) -> str:
        """Return the YAML text that reads back as this profile."""
        document = self.model_dump(by_alias=True, exclude_none=True)
        for name in ("domain", "coefficients", "provenance", "engine", "description"):
            if not document[name]:
                del document[name]
        return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=110)


@dataclass(frozen=True)
class LoadedProfile:
    """A profile, the folder that its relative paths start from, and the digest of its text."""

    profile: Profile
    folder: Path
    digest: str
    origin: str


def load_profile(name: str) -> LoadedProfile:
    """Find a profile by what a user calls it.

    Parameters
    ----------
    name : str
        Path of a YAML file, name in the library, ``roofline:<hardware>``, ``linear`` or ``regression``.

    Raises
    ------
    InputError
        If there is no such profile, or the file does not hold one.
    """
    if name in WITHOUT_PHYSICS:
        return _without_physics(name)
    if name.startswith(ROOFLINE):
        return _roofline(name.removeprefix(ROOFLINE))
    path = Path(name)
    bundled = library_folder("fitted") / f"{name}.yaml"
    if not path.is_file() and "/" not in name and bundled.is_file():
        path = bundled
    if not path.is_file():
        raise InputError(
            f"no profile {name!r}: neither a YAML file nor in the library ({', '.join(names('fitted')) or 'empty'}) "
            "nor roofline:<hardware> (`servecal profiles list`)",
            field="--profile",
        )
    profile = validate(Profile, read_mapping(path), path)
    return LoadedProfile(profile, path.parent, hashlib.sha256(path.read_bytes()).hexdigest(), name)


def _without_physics(kind: str) -> LoadedProfile:
    """A start without physics: an iteration of 5 ms, whatever it computes."""
    accelerator = Accelerator.model_validate({"kind": kind, "seconds": {"step": 5e-3}})
    profile = Profile(
        name=kind,
        description="No physics: a start for fitting.",
        accelerator=accelerator,
        host=Host(per_step=0.0, per_sequence=0.0, source="part of the coefficients"),
    )
    digest = hashlib.sha256(profile.to_yaml().encode()).hexdigest()
    return LoadedProfile(profile, Path(), digest, profile.name)


def _roofline(hardware: str) -> LoadedProfile:
    if not hardware:
        raise InputError("expected roofline:<hardware>", field="--profile")
    profile = Profile(
        name=ROOFLINE + hardware,
        description="Datasheet numbers only; nothing measured, nothing fitted.",
        hardware=hardware,
        accelerator=Accelerator(kind="roofline"),
    )
    digest = hashlib.sha256(profile.to_yaml().encode()).hexdigest()
    return LoadedProfile(profile, Path(), digest, profile.name)
