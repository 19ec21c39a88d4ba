"""servecal's own form: a folder with ``trace.json``, ``requests.parquet`` and optional tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from profiles.errors import InputError, found
from profiles.yaml_files import validate
from replay.draws import parse_draw
from replay.load_level import METRICS, MOST_REQUESTS, THROUGHPUT, percentile
from replay.readers.fields import MOST_SECONDS, MOST_TOKENS, Record, first_line, read_object
from replay.trace import (
    BATCHES,
    ITERATION_COUNTS,
    ITERATIONS,
    REQUESTS,
    SCHEMA,
    STATUSES,
    TIMELINE,
    Trace,
    check_table,
    is_canonical,
)

FORMAT = "servecal"
REQUESTS_FILE = "requests.parquet"
_FORMS = {
    "requests": REQUESTS,
    "iterations": ITERATIONS,
    "timeline": TIMELINE,
    "batches": BATCHES,
    "iteration_counts": ITERATION_COUNTS,
}


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


class _Engine(_Part):
    version: str | None = None
    arguments: dict[str, Any] | None = None


class _Clock(_Part):
    kind: Literal["run", "request"] = "run"


class _BlockHash(_Part):
    block_size: int = Field(ge=1)


class _ColdStart(_Part):
    request: str


class _Workload(_Part):
    """Fields of ``LoadLevel``."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    requests: int = Field(ge=1, le=MOST_REQUESTS)
    prompt_tokens: float = Field(ge=1, le=MOST_TOKENS)
    output_tokens: float = Field(ge=1, le=MOST_TOKENS)
    rate: float | None = Field(None, ge=1e-6, lt=1e9)
    burstiness: float = Field(1.0, gt=0, lt=1e6)
    distribution: Literal["gamma", "poisson"] = "gamma"
    max_concurrency: int | None = Field(None, ge=1)
    prompt_tokens_std: float = Field(0.0, ge=0, le=MOST_TOKENS)
    output_tokens_std: float = Field(0.0, ge=0, le=MOST_TOKENS)
    scheme: str | None = None
    lengths_known: bool = True


class _Meta(_Part):
    """What of ``Trace.meta`` is relied on."""

    name: str = ""
    source: dict[str, Any] | None = None
    model: str | None = None
    model_shape: dict[str, Any] | None = Field(None, alias="model_config")
    hardware: str | None = None
    engine: _Engine | None = None
    clock: _Clock | None = None
    columns: dict[str, str] = {}
    block_hash: _BlockHash | None = None
    cold_start: _ColdStart | None = None
    aggregates: dict[str, dict[str, Annotated[float, Field(ge=0, le=MOST_SECONDS)]]] | None = None
    workload: _Workload | None = None
    facts_only: bool = False
    notes: list[str] = []


def detect(path: Path) -> bool:
    """Whether a folder, or its ``trace.json``, is of this form."""
    return is_canonical(path if path.is_dir() else path.parent) and (path.is_dir() or path.name == "trace.json")


def read(path: Path) -> Trace:
    """Read a trace.

    Raises
    ------
    InputError
        Naming file and field of what cannot be used.
    """
    folder = path if path.is_dir() else path.parent
    record = read_object(folder / "trace.json")
    schema = record.get("schema")
    if schema != SCHEMA:
        raise record.error("schema", f"expected {SCHEMA!r}, found {found(schema)}")
    meta = {key: value for key, value in record.values.items() if key != "schema"}
    validate(_Meta, meta, record.file)
    tables = {}
    for stem, form in _FORMS.items():
        file = folder / f"{stem}.parquet"
        if file.is_file():
            tables[stem] = check_table(_parquet(file), form, file)
    requests = tables["requests"]
    for row, status in enumerate(requests.column("status").to_pylist(), 1):
        if status not in STATUSES:
            raise InputError(
                f"expected one of {', '.join(STATUSES)}, found {found(status)}",
                file=folder / REQUESTS_FILE,
                row=f"request {row}",
                field="status",
            )
    _check_load_level(record, meta, requests.num_rows)
    trace = Trace(
        requests,
        meta,
        iterations=tables.get("iterations"),
        timeline=tables.get("timeline"),
        batches=tables.get("batches"),
        iteration_counts=tables.get("iteration_counts"),
    )
    if trace.has("block_hashes") and meta.get("block_hash") is None:
        raise record.error("block_hash.block_size", f"is missing although {REQUESTS_FILE} has block_hashes")
    return trace


def _check_load_level(record: Record, meta: dict[str, Any], count: int) -> None:
    """Refuse aggregates of no known name, and a workload of other requests."""
    for metric, values in (meta.get("aggregates") or {}).items():
        if metric not in (*METRICS, "throughput"):
            raise record.error(f"aggregates.{metric}", f"expected one of {', '.join((*METRICS, 'throughput'))}")
        for name in values:
            fine = (
                name in THROUGHPUT
                if metric == "throughput"
                else name in ("mean", "std") or percentile(name) is not None
            )
            if not fine:
                raise record.error(f"aggregates.{metric}.{name}", "is no statistic: expected mean, std, p50, p99, ...")
    workload = meta.get("workload")
    if workload and workload["requests"] != count:
        raise record.error("workload.requests", f"is {workload['requests']}, but {REQUESTS_FILE} has {count} rows")
    if workload and workload.get("scheme") is not None:
        parse_draw(workload["scheme"])


def _parquet(file: Path) -> pa.Table:
    try:
        table = pq.read_table(file)
        table.validate(full=True)
        return table
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"is no Parquet: {first_line(error)}", file=file) from None
