"""Making one workload out of another: cut, shift, scale, merge, sample, and arrivals, lengths and prefixes drawn anew.

Each function returns a trace whose ``meta.provenance`` has one more step with its arguments, and whose ``meta.columns``
say what is no longer measured. Latencies belong to the load they were measured under: every step but ``shift`` changes
that, and drops them with all that was recorded of the engine (``without_latencies``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from profiles.errors import InputError
from replay.block_hashes import at_block_size, salted
from replay.clocks import Floats
from replay.draws import parse_draw
from replay.length_draws import LengthDraw
from replay.trace import REQUEST_CLOCK, RUN_CLOCK, Trace, requests_table

STAMPS = ("queued", "scheduled", "first_token", "last_token", "token_times")
OBSERVED = (*STAMPS, "cached_tokens", "preemptions", "batch")
TIMES = ("nominal_arrival", "arrival", *STAMPS)
TABLES = ("iterations", "timeline", "batches")
DESCRIBED = ("model", "hardware", "engine", "model_config")
Ints = npt.NDArray[np.int64]


def measures_latency(trace: Trace) -> bool:
    """Whether there is anything that a prediction could be compared with."""
    recorded = trace.iterations is not None or trace.batches is not None or bool(trace.meta.get("aggregates"))
    return recorded or any(trace.has(name) for name in ("first_token", "last_token", "token_times"))


def is_workload(trace: Trace) -> bool:
    """Whether a trace holds requests to be served of which no latency was measured (not: a run in which all failed)."""
    return not measures_latency(trace) and bool((trace.statuses == "ok").any())


def cut(
    trace: Trace, *, start: float | None = None, end: float | None = None, first: int | None = None, skip: int = 0
) -> Trace:
    """Keep requests that arrive in ``[start, end)``, seconds of the trace's clock; ``first`` of them, after ``skip``.

    Requests are counted in the order of their arrivals (of rows, where arrivals are unknown).

    Raises
    ------
    InputError
        If nothing is left, or times are asked of a trace without arrivals.
    """
    rows = _in_order(trace)
    if start is not None or end is not None:
        arrival = _arrivals(trace, "cutting by time")[rows]
        rows = rows[(arrival >= (-np.inf if start is None else start)) & (arrival < (np.inf if end is None else end))]
    rows = rows[skip : None if first is None else skip + first]
    if not rows.size:
        raise InputError(f"{trace.name}: the cut leaves no request")
    step = _step("cut", start=start, end=end, first=first, skip=skip or None)
    return _with_step(_taken(trace, np.sort(rows)), step)


def shift(trace: Trace, *, by: float | None = None, to: float | None = None) -> Trace:
    """Move all times by ``by`` seconds, or so that the earliest arrival is at ``to``; latencies stay what they are.

    Raises
    ------
    InputError
        If arrivals are unknown, or not one of both is given.
    """
    arrival = _arrivals(trace, "shifting")
    if (by is None) == (to is None):
        raise InputError("expected either a number of seconds or a time for the first request", field="--by")
    seconds = by if by is not None else float(to or 0.0) - float(np.nanmin(arrival))
    columns = _columns(trace)
    for name in TIMES:
        if trace.has(name):
            columns[name] = _moved(columns[name], seconds)
    tables: dict[str, Any] = {
        name: _shifted(getattr(trace, name), seconds) for name in ("iterations", "timeline", "batches")
    }
    clock = {key: value for key, value in (trace.meta.get("clock") or {}).items() if key != "origin_utc"}
    if isinstance(clock.get("origin"), int | float):
        clock["origin"] -= seconds
    moved = replace(trace, requests=requests_table(columns, len(trace)), **tables, _columns={})
    return _with_step(moved.with_meta(clock=clock), _step("shift", by=by, to=to))


def scale(trace: Trace, *, factor: float | None = None, rate: float | None = None) -> Trace:
    """Bring requests ``factor`` times as often, or ``rate`` a second in the mean, from the same first arrival.

    The pattern of bursts stays; all gaps change alike.

    Raises
    ------
    InputError
        If arrivals are unknown, not one of both is given, or all requests arrive at once.
    """
    arrival = _arrivals(trace, "scaling the rate")
    if (factor is None) == (rate is None):
        raise InputError("expected either a factor or a rate", field="--factor")
    begin, span = float(np.nanmin(arrival)), float(np.nanmax(arrival) - np.nanmin(arrival))
    if rate is not None:
        if span == 0:
            raise InputError(f"{trace.name}: all requests arrive at once; draw arrivals instead", field="--rate")
        factor = rate / ((int(np.sum(~np.isnan(arrival))) - 1) / span)
    assert factor is not None
    bare = without_latencies(trace)
    columns = _columns(bare)
    for name in ("nominal_arrival", "arrival"):
        if trace.has(name):
            columns[name] = begin + (trace.column(name) - begin) / factor
    origin = f"made: {bare.meta['columns'].get('arrival', 'measured')}, then scaled by {factor:g}"
    return _made(bare, columns, {"arrival": origin}, _step("scale", factor=factor, rate=rate))


def merge(traces: Sequence[Trace]) -> Trace:
    """Bring several workloads to one engine, each on its own clock: shift them first if they shall begin together.

    Ids and sessions become ``<place>:<id>``. Prompts of different traces share nothing. Model and engine stay where the
    traces agree about them.

    Raises
    ------
    InputError
        If one has no arrivals, there are fewer than two, or their blocks of prompts fit no common size.
    """
    if len(traces) < 2:
        raise InputError("expected at least two traces to merge")
    bare = [without_latencies(one) for one in traces]
    for one in bare:
        _arrivals(one, "merging")
    sizes = [_block_size(one) for one in bare if one.has("block_hashes")]
    size = min(sizes, default=None)
    tables = []
    for place, one in enumerate(bare):
        columns = _columns(one)
        for name in ("id", "session"):
            columns[name] = pc.binary_join_element_wise(str(place), columns[name], ":")
        if one.has("block_hashes") and size is not None:
            columns["block_hashes"] = _salted(_at_size(columns["block_hashes"], _block_size(one), size), place)
        tables.append(requests_table(columns, len(one)))
    table = pa.concat_tables(tables)
    order = np.argsort(table.column("arrival").to_numpy(), kind="stable")
    meta: dict[str, Any] = {
        "name": " + ".join(one.name for one in traces),
        "source": {"format": "servecal-workload", "merged": [one.meta.get("source") for one in traces]},
        "clock": {"kind": RUN_CLOCK, "note": "each trace on its own clock"},
        "vantage": None,
        "columns": _merged_origins(bare),
        "block_hash": {"block_size": size} if size is not None else None,
        "notes": [f"{one.name}: {note}" for one in traces for note in one.meta.get("notes", [])],
        "provenance": [],
    }
    for name in DESCRIBED:
        if all(one.meta.get(name) == traces[0].meta.get(name) for one in traces):
            meta[name] = traces[0].meta.get(name)
    step = _step("merge", traces=[{"name": one.name, "provenance": one.meta.get("provenance", [])} for one in traces])
    return _with_step(Trace(table.take(pa.array(order)), meta), step)


def sample(
    trace: Trace,
    *,
    fraction: float | None = None,
    count: int | None = None,
    by: Literal["request", "session"] = "request",
    seed: int = 0,
) -> Trace:
    """Keep a random part of the requests, or of the sessions with all their requests; arrivals stay, so the rate falls.

    Parameters
    ----------
    trace : Trace
    fraction, count : float or int
        One of them: the part (above 0, at most 1; at least one is kept), or how many.
    by : {"request", "session"}
        A request without session is one of its own.
    seed : int

    Raises
    ------
    InputError
        If there are fewer than ``count``, or the trace has no sessions.
    """
    if (fraction is None) == (count is None):
        raise InputError("expected either a fraction or a count", field="--fraction")
    if by == "session" and not trace.has("session"):
        raise InputError(f"{trace.name} does not say which requests are of one session", field="--by")
    groups = _groups(trace) if by == "session" else np.arange(len(trace))
    total = int(groups.max()) + 1
    wanted = count if count is not None else max(1, round(total * float(fraction or 0.0)))
    if wanted > total:
        raise InputError(f"{trace.name} has {total:,} {by}s, fewer than {wanted:,}", field="--count")
    chosen = np.random.default_rng(seed).choice(total, wanted, replace=False)
    rows = np.flatnonzero(np.isin(groups, chosen))
    return _with_step(_taken(trace, rows), _step("sample", fraction=fraction, count=count, by=by, seed=seed))


def redraw(trace: Trace, scheme: str) -> Trace:
    """Draw the arrivals anew, in the order of the old ones, from the same first arrival (0 where there were none).

    Parameters
    ----------
    trace : Trace
    scheme : str
        As of ``replay.draws.parse_draw``: ``poisson:rate=16,seed=0``, ``gamma:rate=16,seed=0,burstiness=0.25`` (its
        coefficient of variation is ``burstiness ** -0.5``), ``constant:rate=16``.
    """
    drawn = parse_draw(scheme).arrivals(len(trace))
    begin = float(np.nanmin(trace.column("arrival"))) if trace.has("arrival") else 0.0
    arrival = np.empty(len(trace))
    arrival[_in_order(trace)] = begin + drawn
    bare = without_latencies(trace)
    columns = {**_columns(bare), "arrival": arrival, "nominal_arrival": None}
    clock = {**(trace.meta.get("clock") or {}), "kind": RUN_CLOCK}
    origins = {"arrival": f"made: drawn, {scheme}", "nominal_arrival": "unknown"}
    return _made(bare.with_meta(clock=clock), columns, origins, _step("redraw", arrivals=scheme))


def with_lengths(
    trace: Trace, *, prompt: LengthDraw | None = None, output: LengthDraw | None = None, seed: int = 0
) -> Trace:
    """Draw prompt or output lengths anew; new prompts share nothing, and failed requests become ones to be served.

    Parameters
    ----------
    trace : Trace
    prompt, output : LengthDraw, optional
        What stays away stays as it is.
    seed : int

    Raises
    ------
    InputError
        If neither is given.
    """
    if prompt is None and output is None:
        raise InputError("expected lengths of prompts or outputs", field="--prompt")
    bare = without_latencies(trace)
    columns = _columns(bare)
    origins: dict[str, str] = {}
    for place, (name, draw) in enumerate((("prompt_tokens", prompt), ("output_tokens", output))):
        if draw is not None:
            columns[name] = pa.array(draw.lengths(len(trace), np.random.default_rng([seed, place])))
            origins[name] = f"made: drawn, {draw.text}"
    meta: dict[str, Any] = {}
    if prompt is not None and trace.has("block_hashes"):
        columns["block_hashes"] = None
        meta["block_hash"] = None
        origins["block_hashes"] = "unknown: prompts were drawn anew"
    served = (np.nan_to_num(_numbers(columns["prompt_tokens"])) >= 1) & (
        np.nan_to_num(_numbers(columns["output_tokens"])) >= 1
    )
    columns["status"] = pc.if_else(pa.array(served), "ok", columns["status"])
    columns["error"] = pc.if_else(pa.array(served), pa.scalar(None, pa.string()), columns["error"])
    said = {name: draw.text for name, draw in (("prompt", prompt), ("output", output)) if draw is not None}
    return _made(bare.with_meta(**meta), columns, origins, _step("lengths", **said, seed=seed))


def with_prefixes(
    trace: Trace, *, tokens: int, groups: int = 1, share: float = 1.0, block_size: int = 16, seed: int = 0
) -> Trace:
    """Let prompts begin alike: ``share`` of the requests, each in one of ``groups``, with ``tokens`` in common.

    Lengths stay as they are: a prompt shorter than the prefix is all prefix. The rest of each prompt is its own.

    Parameters
    ----------
    trace : Trace
    tokens : int
        Length of the shared prefix; whole blocks of it can be reused.
    groups : int
        Different prefixes, equally likely.
    share : float
        Probability (0 to 1) that a request has one.
    block_size : int
        Tokens of a block whose hash is kept; the engine's must divide it or be a multiple of it.
    seed : int
    """
    random = np.random.default_rng(seed)
    has_one = random.random(len(trace)) < share
    group = np.where(has_one, random.integers(0, groups, len(trace)), -1)
    blocks = np.nan_to_num(trace.column("prompt_tokens")).astype(np.int64) // block_size
    offsets = np.concatenate([[0], np.cumsum(blocks)])
    row = np.repeat(np.arange(len(trace)), blocks)
    place = np.arange(offsets[-1]) - offsets[row]
    shared = (group[row] >= 0) & (place < tokens // block_size)
    # The same (group, place) is the same block; own blocks are numbered from where those end.
    most = tokens // block_size
    number = np.where(shared, group[row] * most + place, groups * most + np.arange(offsets[-1]))
    hashes = salted(pa.array(number.astype(np.int64)), 1)
    bare = without_latencies(trace)
    columns = _columns(bare)
    columns["block_hashes"] = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), hashes)
    said = f"made: {share:g} of the prompts begin with one of {groups} prefixes of {tokens} tokens"
    step = _step("prefixes", tokens=tokens, groups=groups, share=share, block_size=block_size, seed=seed)
    return _made(bare.with_meta(block_hash={"block_size": block_size}), columns, {"block_hashes": said}, step)


def made(count: int, scheme: str, prompt: LengthDraw, output: LengthDraw, seed: int = 0) -> Trace:
    """Return a workload of ``count`` requests out of nothing: arrivals by ``scheme``, lengths as drawn."""
    columns = {
        "id": pa.array(np.arange(count)).cast(pa.string()),
        "status": pa.repeat("ok", count),
        "arrival": parse_draw(scheme).arrivals(count),
        "prompt_tokens": pa.array(prompt.lengths(count, np.random.default_rng([seed, 0]))),
        "output_tokens": pa.array(output.lengths(count, np.random.default_rng([seed, 1]))),
    }
    origins = {
        "id": "made: row numbers",
        "status": "made: a request to be served",
        "arrival": f"made: drawn, {scheme}",
        "prompt_tokens": f"made: drawn, {prompt.text}",
        "output_tokens": f"made: drawn, {output.text}",
    }
    meta: dict[str, Any] = {
        "name": f"{count} made requests",
        "source": {"format": "servecal-workload"},
        "engine": {"name": None, "version": None, "arguments": {}},
        "clock": {"kind": RUN_CLOCK},
        "vantage": None,
        "columns": origins,
        "notes": ["a workload: nothing in it is measured"],
    }
    step = _step("make", requests=count, arrivals=scheme, prompt=prompt.text, output=output.text, seed=seed)
    return _with_step(Trace(requests_table(columns, count), meta), step)


def without_latencies(trace: Trace) -> Trace:
    """Return arrivals, lengths and prompts only: what was measured under another load is dropped, and said to be."""
    dropped = [name for name in OBSERVED if trace.has(name)]
    tables: dict[str, Any] = dict.fromkeys(TABLES)
    lost = dropped or any(getattr(trace, name) is not None for name in tables) or trace.meta.get("aggregates")
    columns = {**_columns(trace), **dict.fromkeys(OBSERVED)}
    meta = {key: value for key, value in trace.meta.items() if key not in ("aggregates", "workload", "cold_start")}
    origins = {**meta.get("columns", {}), **dict.fromkeys(dropped, "unknown: measured under another load, dropped")}
    notes = list(meta.get("notes", []))
    if lost:
        notes.append("latencies and what was recorded of the engine are dropped: they were measured under another load")
    bare = replace(trace, requests=requests_table(columns, len(trace)), **tables, _columns={})
    return replace(bare, meta={**meta, "columns": origins, "notes": notes})


def _taken(trace: Trace, rows: Ints) -> Trace:
    if rows.size == len(trace):
        return trace
    bare = without_latencies(trace)
    return replace(bare, requests=bare.requests.take(pa.array(rows)), _columns={})


def _made(trace: Trace, columns: Mapping[str, Any], origins: Mapping[str, str], step: dict[str, Any]) -> Trace:
    changed = replace(trace, requests=requests_table(columns, len(trace)), _columns={})
    return _with_step(changed.with_meta(columns={**trace.meta.get("columns", {}), **origins}), step)


def _step(name: str, **arguments: Any) -> dict[str, Any]:
    return {"step": name, **{key: value for key, value in arguments.items() if value is not None}}


def _with_step(trace: Trace, step: dict[str, Any]) -> Trace:
    return trace.with_meta(provenance=[*trace.meta.get("provenance", []), step])


def _columns(trace: Trace) -> dict[str, Any]:
    return {name: trace.requests.column(name) for name in trace.requests.column_names}


def _arrivals(trace: Trace, what: str) -> Floats:
    if trace.clock == REQUEST_CLOCK or not trace.has("arrival"):
        raise InputError(
            f"{trace.name} does not say when its requests were sent: {what} needs that; draw arrivals first "
            "(`servecal workload redraw`)"
        )
    return trace.column("arrival")


def _in_order(trace: Trace) -> Ints:
    """Rows by arrival; as they stand where arrivals are unknown."""
    if trace.clock == REQUEST_CLOCK or not trace.has("arrival"):
        return np.arange(len(trace))
    return np.argsort(trace.column("arrival"), kind="stable")


def _groups(trace: Trace) -> Ints:
    """Number of each row's session, by first appearance; a row without session has its own."""
    codes = trace.requests.column("session").combine_chunks().dictionary_encode().indices
    numbers = np.asarray(pc.fill_null(codes, -1).to_numpy(zero_copy_only=False), dtype=np.int64)
    alone = numbers < 0
    numbers[alone] = numbers.max(initial=-1) + 1 + np.arange(int(alone.sum()))
    return numbers


def _moved(column: pa.ChunkedArray, seconds: float) -> pa.ChunkedArray:
    if not pa.types.is_list(column.type):
        return pc.add(column, seconds)
    whole = column.combine_chunks()
    return pa.chunked_array([_like(whole, pc.add(pc.list_flatten(whole), seconds))])


def _like(lists: pa.ListArray, values: pa.Array) -> pa.ListArray:
    """Lists of the same lengths, and null where they are."""
    lengths = np.nan_to_num(pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.float64))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=pc.is_null(lists))


def _shifted(table: pa.Table | None, seconds: float) -> pa.Table | None:
    for name in ("start", "scheduled_at", "time"):
        if table is not None and name in table.column_names:
            place = table.column_names.index(name)
            table = table.set_column(place, table.schema.field(name), pc.add(table.column(name), seconds))
    return table


def _block_size(trace: Trace) -> int:
    return int((trace.meta.get("block_hash") or {}).get("block_size") or 0)


def _at_size(column: pa.ChunkedArray, have: int, want: int) -> pa.Array:
    if have == want:
        return column.combine_chunks()
    lists = [None if one is None else at_block_size(one, have, want) for one in column.to_pylist()]
    return pa.array(lists, pa.list_(pa.int64()))


def _salted(lists: pa.ListArray, salt: int) -> pa.ListArray:
    return _like(lists, salted(pc.list_flatten(lists), salt))


def _merged_origins(traces: Sequence[Trace]) -> dict[str, str]:
    """What is said of each column, by trace where they differ."""
    merged = {}
    for name in traces[0].requests.column_names:
        said = [one.meta.get("columns", {}).get(name, "unknown") for one in traces]
        merged[name] = said[0] if len(set(said)) == 1 else "; ".join(f"{i}: {one}" for i, one in enumerate(said))
    return merged


def _numbers(column: Any) -> Floats:
    return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)
