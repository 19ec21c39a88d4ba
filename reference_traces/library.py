"""Finding traces by name: captures in the package, catalogued ones in the cache or downloaded into it.

The cache is the folder in the environment variable ``SERVECAL_TRACES``, else the user's cache folder. A trace
whose files are there needs no network.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from profiles.errors import InputError
from profiles.yaml_files import read_mapping, validate
from reference_traces.archives import extract
from reference_traces.download import MOST_BYTES, download

ENVIRONMENT = "SERVECAL_TRACES"
WORKLOADS = ("azure-csv", "burstgpt-csv", "mooncake-jsonl", "bailian-jsonl", "vidur-csv", "sharegpt-json")
"""Formats of the catalogue that hold arrivals and lengths without latencies."""
READABLE = ("llmservingsim-bench", "vllm-bench", "batches-csv", "splitwise-perf-model", *WORKLOADS)
"""Formats of the catalogue that a reader knows; the others can be fetched only."""
RECORDINGS = "*/engine-dp*.jsonl.gz"
"""Captures that are kept as the recorder wrote them, with what the client and the server left of the same run."""
SEVERAL = ("vllm-bench", "batches-csv", "splitwise-perf-model", *WORKLOADS)
"""Formats of which each file is a trace of its own."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class Variant(_Strict):
    """Another accepted content of a file, such as one with its texts removed."""

    sha256: str
    note: str


class DrawnArrivals(_Strict):
    """How a run's load generator drew the arrivals that its file does not hold."""

    seed: int
    rate: float
    distribution: str
    overhead: float = 0.0


class CataloguedFile(_Strict):
    """A file of a trace: local name, path below the entry's URL (or in an archive there), size and checksum.

    What the catalogue does not know is null: such a file is taken as it comes, and ``fetch`` says so.
    """

    name: str
    path: str
    bytes: int | None = Field(ge=0)
    sha256: str | None = Field(pattern=r"^[0-9a-f]{64}$")
    archive: str | None = None
    arrivals: DrawnArrivals | None = None
    variants: list[Variant] = []

    @field_validator("name")
    @classmethod
    def _inside(cls, name: str) -> str:
        """Refuse a name that leads out of the trace's folder."""
        parts = name.split("/")
        if not all(parts) or {".", ".."} & set(parts) or "\\" in name or ":" in name:
            raise ValueError("expected a name, or a path below the trace's folder")
        return name

    def accepts(self, digest: str) -> bool:
        """Whether a file with that checksum is this one."""
        return self.sha256 in (None, digest) or any(digest == variant.sha256 for variant in self.variants)


class Archive(_Strict):
    """An archive that holds files of a trace: path below the entry's URL, size and checksum, null if unknown."""

    path: str
    bytes: int | None = Field(ge=0)
    sha256: str | None = Field(pattern=r"^[0-9a-f]{64}$")


class EngineFacts(_Strict):
    """The engine that a trace was measured on."""

    name: str
    version: str | None
    arguments: dict[str, Any]


class Entry(_Strict):
    """A public trace: what it is, where it lies at a pinned commit, and under which licence."""

    schema_: str = Field(alias="schema", pattern=r"^servecal\.catalogue/1$")
    name: str
    title: str
    description: str
    format: str
    licence: str
    attribution: str
    repository: str
    commit: str
    base_url: str
    model: str | None
    hardware: str | None
    devices: int | None
    engine: EngineFacts | None
    measures: list[str]
    requests: int | None
    files: list[CataloguedFile]
    archives: list[Archive] = []

    @property
    def size(self) -> int:
        """Bytes of all files whose size is known."""
        return sum(one.bytes or 0 for one in self.files)


@dataclass(frozen=True)
class Located:
    """Where a trace lies, and the catalogue's entry (and file) if it was found by name."""

    path: Path
    entry: Entry | None = None
    file: CataloguedFile | None = None


def catalogue() -> list[Entry]:
    """All entries, by name."""
    folder = Path(str(files("reference_traces"))) / "catalogue"
    return [validate(Entry, read_mapping(path), path) for path in sorted(folder.glob("*.yaml"))]


def find_entry(name: str) -> Entry | None:
    """Return the entry of that name, or None."""
    path = Path(str(files("reference_traces"))) / "catalogue" / f"{name}.yaml"
    if "/" in name or "\\" in name or not path.is_file():
        return None
    return validate(Entry, read_mapping(path), path)


def captures() -> list[Path]:
    """Folders of the captures that come with the package, by name."""
    folder = Path(str(files("reference_traces"))) / "captures"
    return sorted({path.parent for pattern in ("*/trace.json", RECORDINGS) for path in folder.glob(pattern)})


def cache_folder() -> Path:
    """Where downloaded traces lie."""
    moved = os.environ.get(ENVIRONMENT)
    if moved:
        return Path(moved)
    import pooch

    return Path(pooch.os_cache("servecal")) / "traces"


def local_file(entry: Entry, file: CataloguedFile) -> Path | None:
    """Return the file in the cache if it is there, whatever its content."""
    root = cache_folder()
    for folder in (root / entry.name, root / "workloads"):
        if (folder / file.name).is_file():
            return folder / file.name
    return None


def is_complete(entry: Entry) -> bool:
    """Whether all files of a trace are in the cache."""
    return all(local_file(entry, file) is not None for file in entry.files)


def _folder(entry: Entry, one: Path) -> Path:
    """Folder of a trace, given one of its files: its own, or a common one of workloads."""
    own = cache_folder() / entry.name
    return own if own in one.parents else one.parent


def locate(name: str) -> Located:
    """Find a trace by path, name of a capture, or name in the catalogue (``<name>`` or ``<name>/<file>``).

    A file of batches may be named without its ``.csv``, and one that lies in the cache is known by its path too.

    Raises
    ------
    InputError
        If there is none, or its files have not been fetched.
    """
    path = Path(name)
    if path.exists():
        return _of_the_cache(path) or Located(path)
    for capture in captures():
        if capture.name == name:
            return Located(capture)
    head, _, rest = name.partition("/")
    entry = find_entry(head)
    if entry is None:
        raise InputError("no such file or folder, and no trace of that name (`servecal traces list`)", file=name)
    if entry.format not in READABLE:
        raise InputError(f"is a trace of format {entry.format}, for which there is no reader yet", file=name)
    by_name = {file.name: file for file in entry.files}
    if rest not in by_name and f"{rest}.csv" in by_name:
        rest += ".csv"
    below = names_below(name)
    if rest and rest not in by_name and below:
        raise InputError(f"holds {len(below)} runs; name one, such as {below[0]}", file=name)
    if rest and rest not in by_name:
        raise InputError(f"trace {head} has no file {rest!r}; it has {', '.join(sorted(by_name))}", file=name)
    if not rest and entry.format in SEVERAL:
        if len(entry.files) > 1:
            runs = ", ".join(f"{head}/{one}" for one in sorted(by_name))
            raise InputError(f"holds several runs; name one: {runs}", file=name)
        rest = entry.files[0].name
    wanted = [by_name[rest]] if rest else entry.files
    places = [local_file(entry, file) for file in wanted]
    if places[0] is None or None in places:
        raise InputError(f"is not in {cache_folder()}; `servecal traces fetch {head}` downloads it", file=name)
    return Located(places[0] if rest else _folder(entry, places[0]), entry, by_name.get(rest))


def _of_the_cache(path: Path) -> Located | None:
    """A file of catalogued batches by its place in the cache: what describes its engine is in the catalogue."""
    root = cache_folder().resolve()
    if path.is_dir() or root not in path.resolve().parents:
        return None
    head, _, rest = path.resolve().relative_to(root).as_posix().partition("/")
    entry = find_entry(head)
    if entry is None or entry.format != "batches-csv":
        return None
    file = next((one for one in entry.files if one.name == rest), None)
    return Located(path, entry, file) if file else None


def names_below(name: str) -> list[str]:
    """Names of all batch files of a catalogued trace, or of those in one of its folders; none for other names."""
    head, _, rest = name.rstrip("/").partition("/")
    entry = find_entry(head)
    if entry is None or entry.format != "batches-csv":
        return []
    prefix = f"{rest}/" if rest else ""
    return sorted(f"{head}/{file.name.removesuffix('.csv')}" for file in entry.files if file.name.startswith(prefix))


def fetch(entry: Entry) -> tuple[Path, list[str]]:
    """Make sure that all files of a trace are in the cache, with the right content.

    Returns
    -------
    folder : Path
    unverified : list of str
        Names and sha256 of the files of which the catalogue knows no checksum.

    Raises
    ------
    InputError
        If a file cannot be downloaded, or has another content than the catalogue says.
    """
    folder = cache_folder() / entry.name
    unverified = []
    archives: dict[str, Path] = {}
    try:
        for file in entry.files:
            place = local_file(entry, file)
            if place is not None:
                digest = _sha256(place)
                if not file.accepts(digest):
                    raise InputError(
                        f"has sha256 {digest}, the catalogue says {file.sha256}; remove it to download it anew",
                        file=place,
                    )
                folder = _folder(entry, place)
            elif file.archive is not None:
                digest = _unpacked(entry, file, folder / file.name, archives)
            else:
                digest = download(entry.base_url + file.path, folder / file.name, file.accepts, file.bytes)
            if file.sha256 is None:
                unverified.append(f"{file.name} (sha256 {digest})")
    finally:
        for path in archives.values():
            path.unlink(missing_ok=True)
    return folder, unverified


def _unpacked(entry: Entry, file: CataloguedFile, target: Path, archives: dict[str, Path]) -> str:
    """Take a file out of its archive, which is downloaded once; return the file's sha256."""
    known = next((one for one in entry.archives if one.path == file.archive), None)
    if known is None:
        raise InputError(f"is in the archive {file.archive!r}, which the entry does not list", file=file.name)
    if known.path not in archives:
        place = cache_folder() / entry.name / f"{hashlib.sha256(known.path.encode()).hexdigest()[:16]}.archive"
        download(entry.base_url + known.path, place, lambda digest: known.sha256 in (None, digest), known.bytes)
        archives[known.path] = place
    part = target.with_name(f"{target.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    extract(archives[known.path], file.path, part, MOST_BYTES if file.bytes is None else file.bytes)
    digest = _sha256(part)
    if not file.accepts(digest):
        part.unlink()
        raise InputError(f"has sha256 {digest} in its archive, the catalogue says {file.sha256}", file=file.name)
    part.replace(target)
    return digest


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
