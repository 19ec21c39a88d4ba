"""LLMServingSim's ``bench`` folder: a vLLM run stamped inside the engine.

``requests.jsonl`` (vLLM's RequestStateStats), ``meta.json``, ``timeseries.csv``, the ``workload.jsonl`` it was
driven by (prompt token ids) and ``cluster_config.json`` (what its authors say of the links between the devices); all
but the first may be absent. Format: casys-kaist/LLMServingSim @5daddb2.
"""

from __future__ import annotations

import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

from profiles.errors import InputError, found
from replay.block_hashes import chain
from replay.clocks import Floats, align_arrivals
from replay.readers.fields import Record, as_text, first_line, read_lines, read_object
from replay.readers.opening import head
from replay.trace import TIMELINE, Trace, file_facts, requests_table

FORMAT = "llmservingsim-bench"
REQUESTS_FILE = "requests.jsonl"
HASHED_BLOCK = 16
STAMPS = ("queued_ts", "scheduled_ts", "first_token_ts", "last_token_ts")


def detect(path: Path) -> bool:
    """Whether a folder, or a ``requests.jsonl``, is of this format."""
    if path.is_dir():
        return (path / REQUESTS_FILE).is_file()
    start = head(path, 4096) if path.is_file() else b""
    return b'"queued_ts"' in start and b'"input_toks"' in start


def read(path: Path) -> Trace:
    """Read a run.

    Raises
    ------
    InputError
        Naming file, line and field of what cannot be used.
    """
    folder = path if path.is_dir() else path.parent
    source = folder / REQUESTS_FILE if path.is_dir() else path
    records = list(read_lines(source))
    meta = read_object(folder / "meta.json") if (folder / "meta.json").is_file() else None
    workload = folder / "workload.jsonl"
    stamps = np.array([_stamps(record) for record in records])
    wall = np.array([record.seconds("arrival_time", positive=True) for record in records])
    queued, scheduled, first, last = stamps.T
    if np.isnan(queued).all():
        raise InputError("no request was ever queued: nothing was measured", file=source, field="queued_ts")
    alignment = align_arrivals(wall, queued)
    origin = float(alignment.arrival.min())
    columns: dict[str, Any] = {
        "id": [_id(record) for record in records],
        "status": ["unfinished" if np.isnan(one) else "ok" for one in last],
        "arrival": alignment.arrival - origin,
        "queued": queued - origin,
        "scheduled": scheduled - origin,
        "first_token": first - origin,
        "last_token": last - origin,
        "prompt_tokens": [record.tokens("input_toks", 1) for record in records],
        "output_tokens": [
            record.tokens("output_toks", 0 if np.isnan(one) else 1) for record, one in zip(records, last, strict=True)
        ],
    }
    notes: list[str] = []
    files = [source]
    if workload.is_file():
        files.append(workload)
        columns |= _from_workload(workload, columns, records)
    timeline = None
    if (folder / "timeseries.csv").is_file():
        files.append(folder / "timeseries.csv")
        timeline = _timeline(folder / "timeseries.csv", meta, alignment.offset - origin, notes)
    if meta is not None:
        files.append(meta.file)
    cluster = folder / "cluster_config.json"
    if cluster.is_file():
        files.append(cluster)
    measured = ("queued", "scheduled", "first_token", "last_token", "prompt_tokens", "output_tokens")
    return Trace(
        requests_table(columns, len(records)),
        {
            "name": folder.resolve().name,
            "source": {"format": FORMAT, "files": file_facts(files)},
            **_described(meta),
            "link": _link(cluster) if cluster.is_file() else None,
            "clock": {
                "kind": "run",
                "origin": origin,
                # When the run's clock showed 0, on the wall: up to the shortest way from arrival to queue.
                "origin_wall": origin - alignment.offset,
                "note": (
                    "engine stamps are monotonic; wall-clock arrivals were moved by "
                    f"{alignment.offset:.6f} s, the smallest queued - arrival of the run"
                ),
                "arrival_to_queued": _lag_facts(alignment.lag),
            },
            "vantage": "engine",
            "warmed_up": False,
            "columns": {
                "arrival": "reconstructed: wall clock moved onto the engine's",
                **dict.fromkeys(measured, "measured"),
                **{name: "measured" for name in ("nominal_arrival", "block_hashes") if name in columns},
            },
            "block_hash": {"block_size": HASHED_BLOCK} if "block_hashes" in columns else None,
            "notes": notes,
        },
        timeline=timeline,
    )


def _id(record: Record) -> str:
    value = record.need("request_id")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return as_text(value, lambda message: record.error("request_id", message))


def _stamps(record: Record) -> tuple[float, ...]:
    """The four engine stamps; vLLM leaves 0.0 where a request never got, after which nothing may follow."""
    values = [record.seconds(name) for name in STAMPS]
    reached = [value > 0 for value in values]
    for place, (name, later) in enumerate(pairwise(STAMPS)):
        if reached[place + 1] and not reached[place]:
            raise record.error(name, f"is 0 although {later} is {values[place + 1]}: expected a time above 0")
    return tuple(value if there else np.nan for value, there in zip(values, reached, strict=True))


def _from_workload(path: Path, columns: dict[str, Any], requests: list[Record]) -> dict[str, Any]:
    """Nominal arrivals and prompt hashes, row by row in the order of the requests."""
    rows = list(read_lines(path))
    if len(rows) != len(requests):
        raise InputError(f"holds {len(rows)} rows for {len(requests)} requests in {requests[0].file.name}", file=path)
    nominal, hashes = [], []
    for row, prompt_tokens in zip(rows, columns["prompt_tokens"], strict=True):
        if row.tokens("input_toks", 1) != prompt_tokens:
            raise row.error("input_toks", f"is {row.get('input_toks')}, the request has {prompt_tokens}")
        nominal.append(row.seconds("arrival_time_ns", unit=1e-9))
        ids = row.get("input_tok_ids")
        hashes.append(None if ids is None else _chain(row, ids, prompt_tokens))
    wanted = np.array(nominal)
    # The workload's own zero is when the driver began; no request can have come before its time.
    moved: Floats = wanted + float(np.min(columns["arrival"] - wanted))
    found_columns: dict[str, Any] = {"nominal_arrival": moved}
    if any(one is not None for one in hashes):
        found_columns["block_hashes"] = hashes
    return found_columns


def _chain(row: Record, ids: Any, prompt_tokens: int) -> list[int]:
    if not isinstance(ids, list) or not all(type(one) is int and 0 <= one < 2**62 for one in ids):
        raise row.error("input_tok_ids", f"expected a list of token ids, found {found(ids)}")
    if len(ids) != prompt_tokens:
        raise row.error("input_tok_ids", f"has {len(ids)} ids for {prompt_tokens} prompt tokens")
    return chain(ids, HASHED_BLOCK)


def _described(meta: Record | None) -> dict[str, Any]:
    if meta is None:
        return {"model": None, "hardware": None, "engine": {"name": "vllm", "version": None, "arguments": {}}}
    kwargs = meta.get("engine_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise meta.error("engine_kwargs", f"expected an object, found {found(kwargs)}")
    arguments = {key: value for key, value in kwargs.items() if key not in ("model", "seed") and value is not None}
    cache = meta.get("kv_cache")
    if isinstance(cache, dict):
        for name in ("num_gpu_blocks", "block_size", "gpu_memory_utilization", "enable_prefix_caching"):
            if cache.get(name) is not None:
                arguments.setdefault(name, cache[name])
    hardware = meta.get("hardware")
    return {
        "model": meta.text("model"),
        "hardware": hardware.get("device_name") if isinstance(hardware, dict) else None,
        "engine": {
            "name": "vllm",
            "version": meta.text("vllm_version"),
            "arguments": arguments,
        },
    }


def _link(path: Path) -> dict[str, Any] | None:
    """The link between devices: GiB/s and nanoseconds in the source; of one device it says nothing."""
    record = read_object(path)
    if record.get("link_bw") is None or record.get("link_latency") is None:
        return None
    bandwidth = record.seconds("link_bw", positive=True) * 2**30
    return {"bandwidth": bandwidth, "latency": record.seconds("link_latency", unit=1e-9), "source": path.name}


def _lag_facts(lag: Floats) -> dict[str, float]:
    seen = lag[~np.isnan(lag)]
    return {"median": float(np.median(seen)), "mean": float(seen.mean()), "max": float(seen.max())}


def _timeline(path: Path, meta: Record | None, offset: float, notes: list[str]) -> pa.Table | None:
    """Gauges by tick; their clock starts with the run's logger, whose wall time is ``started_at``."""
    started = meta.text("started_at") if meta is not None else None
    if meta is None or started is None:
        notes.append("timeseries.csv is left out: without started_at in meta.json its clock is unknown")
        return None
    names = ("t", "running", "waiting", "kv_cache_pct", "prompt_throughput", "gen_throughput")
    try:
        begin = datetime.datetime.fromisoformat(started).timestamp() + offset
    except (ValueError, OverflowError):
        raise meta.error("started_at", f"expected a date and time, found {found(started)}") from None
    options = pyarrow.csv.ConvertOptions(include_columns=list(names), column_types=dict.fromkeys(names, pa.float64()))
    try:
        table = pyarrow.csv.read_csv(path, convert_options=options)
        columns = {name: table[name].to_numpy() for name in names}
    except (pa.ArrowInvalid, KeyError) as error:
        raise InputError(first_line(error), file=path) from None
    for name, values in columns.items():
        bad = np.isinf(values) | (np.isnan(values) if name == "t" else False)
        if bad.any():
            row = int(np.argmax(bad))
            raise InputError(f"expected a finite number, found {values[row]}", file=path, row=row + 2, field=name)
    kv_usage = columns["kv_cache_pct"] / 100
    if not kv_usage.any():
        notes.append("kv_cache_pct is 0 throughout although requests ran: not measured")
        kv_usage = np.full_like(kv_usage, np.nan)
    values = (
        columns["t"] + begin,
        columns["running"],
        columns["waiting"],
        kv_usage,
        columns["prompt_throughput"],
        columns["gen_throughput"],
    )
    arrays = [pa.array(value, from_pandas=True) for value in values]
    return pa.table(arrays, schema=TIMELINE)
