"""Making a profile of an LLMServingSim operator-table bundle."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

from profiles.errors import InputError
from profiles.library import HardwareEntry, find_hardware_entry, find_model
from profiles.operator_tables import read_bundle, write_tables
from profiles.profile import Accelerator, Profile
from simulator.engine_config import GIB

LINK_LATENCY = 20e-6
LINK_BANDWIDTH = 16.0 * GIB
_LINK_SOURCE = "assumption: the link of LLMServingSim's published cluster configurations (16 GiB/s, 20 us)"


def import_bundle(
    folder: Path,
    tensor_parallel_size: int,
    output: Path,
    *,
    model: str | None = None,
    hardware: str | None = None,
    link_latency: float = LINK_LATENCY,
    link_bandwidth: float = LINK_BANDWIDTH,
) -> Profile:
    """Write a profile and, beside it, its tables as Parquet; both or neither.

    Parameters
    ----------
    folder : Path
        The bundle: ``meta.yaml`` and ``tp<N>/``.
    tensor_parallel_size : int
        Which of its degrees.
    output : Path
        The profile's YAML; the tables go to ``<stem>.tables/``.
    model, hardware : str, optional
        Instead of those that the bundle names.
    link_latency, link_bandwidth : float
        Of the all-reduces, seconds per hop and bytes/s.

    Raises
    ------
    InputError
        If the bundle cannot be used, or the output not be written.
    """
    if not folder.is_dir():
        raise InputError("is no folder; expected a bundle with meta.yaml and tp<N>/", file=folder)
    tables, skew, meta = read_bundle(folder, tensor_parallel_size)
    named = str(model or meta.get("model") or "")
    if not named:
        raise InputError("names no model; give --model", file=folder / "meta.yaml", field="model")
    shape = find_model(named)
    entry = _hardware(hardware, meta)
    stem = output.name.removesuffix(".yaml").removesuffix(".yml")
    options: dict[str, Any] = {
        "tables": f"{stem}.tables",
        "tensor_parallel_size": tensor_parallel_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "hidden_size": shape.hidden_size,
        "activation_bytes": shape.activation_bytes,
    }
    if tensor_parallel_size > 1:
        if entry is None:
            raise InputError("names no hardware of the library; give --hardware", file=folder / "meta.yaml")
        options["link"] = {"bandwidth": link_bandwidth, "latency": link_latency, "source": _LINK_SOURCE}
        options["memory_bandwidth"] = entry.memory_bandwidth.value
    if skew is not None:
        options["skew"] = skew.model_dump()
    device = entry.name if entry else str(meta.get("hardware", "device"))
    profile = Profile(
        name=f"{device}-{shape.name}-tp{tensor_parallel_size}",
        description=f"Operator tables of {shape.name} on {device}, measured kernel by kernel; nothing fitted.",
        model=named,
        hardware=entry.name if entry else None,
        engine={"tensor_parallel_size": tensor_parallel_size},
        accelerator=Accelerator(kind="operator_table", **options),
        provenance={
            "source": "LLMServingSim profile bundle",
            **{
                key: str(meta[key])
                for key in ("gpu", "vllm_version", "cuda_version", "profiled_at", "profiler_version")
                if key in meta
            },
            "files": _digests(folder, tensor_parallel_size),
        },
    )
    _write(profile, tables, output, stem)
    return profile


def _hardware(asked: str | None, meta: dict[str, Any]) -> HardwareEntry | None:
    if asked is not None:
        return find_hardware_entry(asked)
    for name in (meta.get("gpu"), meta.get("hardware")):
        try:
            return find_hardware_entry(str(name))
        except InputError:
            continue
    return None


def _digests(folder: Path, tensor_parallel_size: int) -> dict[str, str]:
    files = [folder / "meta.yaml", *sorted((folder / f"tp{tensor_parallel_size}").glob("*.csv"))]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _write(profile: Profile, tables: dict[str, Any], output: Path, stem: str) -> None:
    target = output.parent / f"{stem}.tables"
    if target.exists() and not (target / "attention.parquet").is_file():
        raise InputError("exists and holds no operator tables; choose another -o", file=target)
    if output.is_dir():
        raise InputError("is a folder; expected the name of a YAML file", file=output)
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f".{stem}.", dir=output.parent))
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", file=output) from None
    try:
        (scratch / "tables").mkdir()
        write_tables(tables, scratch / "tables")
        (scratch / "profile.yaml").write_text(profile.to_yaml(), encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        (scratch / "tables").replace(target)
        (scratch / "profile.yaml").replace(output)
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", file=output) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
