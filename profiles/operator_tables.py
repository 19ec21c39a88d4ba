"""Operator tables on disk: LLMServingSim's profile bundles, and the Parquet that servecal makes of them.

Bundle format: LLMServingSim 5daddb2, ``profiler/perf/<hardware>/<model>/<variant>/{meta.yaml, tp<N>/*.csv}``,
times in microseconds. A time becomes ``max(1, round(us * 1000))`` nanoseconds when it is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from profiles.errors import InputError, found
from profiles.yaml_files import read_mapping
from simulator.accelerators.operator_table import Curve, SkewBuckets, SkewTable, Tables

COLUMNS: dict[str, dict[str, pa.DataType]] = {
    "dense": {"layer": pa.string(), "tokens": pa.int64(), "time_us": pa.float64()},
    "per_sequence": {"layer": pa.string(), "sequences": pa.int64(), "time_us": pa.float64()},
    "attention": {
        "prefill_chunk": pa.int64(),
        "kv_prefill": pa.int64(),
        "n_decode": pa.int64(),
        "kv_decode": pa.int64(),
        "time_us": pa.float64(),
    },
    "skew_fit": {
        "pc": pa.int64(),
        "n_label": pa.string(),
        "skew_rate_label": pa.string(),
        "kv_big_label": pa.string(),
        "kp_label": pa.string(),
        "alpha": pa.float64(),
    },
}
AXES = ("n", "skew_rate", "kv_big", "kp")


class Skew(BaseModel):
    """Axes of the skew table, as a profile's YAML keeps them: upper bounds and labels by axis."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    default: float
    bounds: dict[str, list[float]]
    labels: dict[str, list[str]]

    @model_validator(mode="after")
    def _as_many_labels_as_bounds(self) -> Skew:
        for axis in AXES:
            bounds, labels = self.bounds.get(axis), self.labels.get(axis)
            if not bounds or labels is None or len(bounds) != len(labels):
                raise ValueError(f"axis {axis!r}: expected upper bounds and as many labels")
        return self


def read_bundle(folder: Path, tensor_parallel_size: int) -> tuple[dict[str, pa.Table], Skew | None, dict[str, Any]]:
    """Read one parallel degree of a bundle.

    Returns
    -------
    tables : dict of str to pyarrow.Table
        Columns as in ``COLUMNS``; layers that do not depend on the parallel degree are those of ``tp1``.
    skew : Skew or None
        Where the bundle has it enabled.
    meta : dict
        Its ``meta.yaml``.

    Raises
    ------
    InputError
        If files, columns or rows are missing or malformed.
    """
    meta = read_mapping(folder / "meta.yaml")
    own, shared = folder / f"tp{tensor_parallel_size}", folder / "tp1"
    if not own.is_dir():
        have = sorted(path.name for path in folder.glob("tp*") if path.is_dir())
        raise InputError(f"has no tp{tensor_parallel_size}; there are: {', '.join(have) or 'none'}", file=folder)
    if (shared / "moe.csv").is_file():
        raise InputError(
            "is a mixture-of-experts bundle (moe.csv), which operator tables cannot price yet", file=folder
        )
    tables = {name: _read_csv(own / f"{name}.csv", name) for name in ("dense", "per_sequence", "attention")}
    if shared.is_dir() and shared != own:
        for name, stable in (
            ("dense", ("layernorm", "qk_norm", "final_layernorm")),
            ("per_sequence", ("sampler",)),
        ):
            mine, others = tables[name], _read_csv(shared / f"{name}.csv", name)
            keep = pc.invert(pc.is_in(mine["layer"], pa.array(stable)))
            take = pc.is_in(others["layer"], pa.array(stable))
            tables[name] = pa.concat_tables([mine.filter(keep), others.filter(take)])
    skew = _read_skew(meta, tensor_parallel_size, folder)
    if skew is not None:
        tables["skew_fit"] = _read_csv(own / "skew_fit.csv", "skew_fit")
    return tables, skew, meta


def write_tables(tables: dict[str, pa.Table], folder: Path) -> None:
    """Write each table as ``<name>.parquet``."""
    for name, table in tables.items():
        pq.write_table(table, folder / f"{name}.parquet", compression="zstd")


def load_tables(folder: Path, skew: Skew | None) -> Tables:
    """Build the simulator's tables from a folder that ``write_tables`` filled.

    Raises
    ------
    InputError
        If a table is missing or not as written.
    """
    names = ["dense", "per_sequence", "attention"] + (["skew_fit"] if skew else [])
    read = {name: _read_parquet(folder / f"{name}.parquet", name) for name in names}
    return Tables(
        dense=_curves(read["dense"], "tokens"),
        per_sequence=_curves(read["per_sequence"], "sequences"),
        attention=_attention(read["attention"]),
        skew=None if skew is None else _skew_table(read["skew_fit"], skew),
    )


def _read_csv(path: Path, name: str) -> pa.Table:
    types = COLUMNS[name]
    options = pyarrow.csv.ConvertOptions(column_types=types, include_columns=list(types))
    try:
        table = pyarrow.csv.read_csv(path, convert_options=options)
    except FileNotFoundError:
        raise InputError("is missing", file=path) from None
    except (pa.ArrowInvalid, pa.ArrowKeyError, OSError) as error:
        raise InputError(str(error).splitlines()[0], file=path) from None
    return _checked(table, path)


def _read_parquet(path: Path, name: str) -> pa.Table:
    types = COLUMNS[name]
    try:
        table = pq.read_table(path)
        missing = set(types) - set(table.column_names)
        if missing:
            raise InputError("is missing", file=path, field=min(missing))
        table = table.select(list(types)).cast(pa.schema(types.items()))
    except FileNotFoundError:
        raise InputError("is missing; the profile names this folder of tables", file=path) from None
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise InputError(str(error).splitlines()[0], file=path) from None
    return _checked(table, path)


def _checked(table: pa.Table, path: Path) -> pa.Table:
    if not table.num_rows:
        raise InputError("holds no rows", file=path)
    for name in table.column_names:
        if table[name].null_count:
            row = pc.index(pc.is_null(table[name]), True).as_py() + 2
            raise InputError("is empty", file=path, row=row, field=name)
    for name, least, expected in (("time_us", 0.0, "a time > 0"), ("alpha", -math.inf, "a number")):
        if name not in table.column_names:
            continue
        bad = pc.invert(pc.and_(pc.greater(table[name], least), pc.is_finite(table[name])))
        if pc.any(bad).as_py():
            row = pc.index(bad, True).as_py()
            value = table[name][row].as_py()
            raise InputError(f"expected {expected}, found {value}", file=path, row=row + 2, field=name)
    return table


def _ns(microseconds: float) -> int:
    return max(1, round(microseconds * 1000))


def _curve(points: Iterable[tuple[int, float]]) -> Curve:
    ordered = sorted(dict(points).items())
    return Curve([at for at, _ in ordered], [_ns(us) for _, us in ordered])


def _curves(table: pa.Table, axis: str) -> dict[str, Curve]:
    rows: dict[str, list[tuple[int, float]]] = {}
    columns = (table[name].to_pylist() for name in ("layer", axis, "time_us"))
    for layer, at, us in zip(*columns, strict=True):
        rows.setdefault(layer, []).append((at, us))
    return {layer: _curve(points) for layer, points in rows.items()}


def _attention(table: pa.Table) -> dict[tuple[int, int], dict[int, Curve]]:
    rows: dict[tuple[int, int], dict[int, list[tuple[int, float]]]] = {}
    columns = (table[name].to_pylist() for name in COLUMNS["attention"])
    for chunk, context, decodes, decode_context, us in zip(*columns, strict=True):
        rows.setdefault((chunk, decodes), {}).setdefault(context, []).append((decode_context, us))
    return {
        key: {context: _curve(points) for context, points in by_context.items()} for key, by_context in rows.items()
    }


def _read_skew(meta: dict[str, Any], tensor_parallel_size: int, folder: Path) -> Skew | None:
    fit = meta.get("skew_fit") or {}
    if not isinstance(fit, Mapping):
        raise InputError(f"expected a mapping, found {found(fit)}", file=folder / "meta.yaml", field="skew_fit")
    if not fit.get("enabled"):
        return None
    try:
        axes = fit["bucket_axes"]
        return Skew(
            default=fit["per_tp"][tensor_parallel_size]["alpha_default"],
            # The first bin edge is a lower bound that nothing lies below.
            bounds={axis: axes[f"{axis}_bins"][1:] for axis in AXES},
            labels={axis: axes[f"{axis}_labels"] for axis in AXES},
        )
    except ValidationError as error:
        why = error.errors(include_url=False)[0]["msg"]
    except (KeyError, TypeError) as error:
        why = f"no entry {error}"
    raise InputError(f"has no usable skew table: {why}", file=folder / "meta.yaml", field="skew_fit")


def _skew_table(table: pa.Table, skew: Skew) -> SkewTable:
    columns = (table[name].to_pylist() for name in COLUMNS["skew_fit"])
    alpha = {(chunk, *labels): value for chunk, *labels, value in zip(*columns, strict=True)}
    decodes, rate, longest, context = (SkewBuckets(skew.bounds[axis], skew.labels[axis]) for axis in AXES)
    return SkewTable(decodes, rate, longest, context, alpha=alpha, default=skew.default)
