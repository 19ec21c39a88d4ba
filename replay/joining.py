"""Several sources of one run become one trace: engine stamps, a client's file, a server log, metrics, a workload.

``join`` matches the requests (``replay.request_matching``), moves all stamps onto one clock (``replay.clock_bounds``,
``replay.timeline_placement``) and takes each column from the first source that has it: what happened in the engine
from the engine, what the client saw from the client. Both are kept. Where sources contradict each other, all values
are told. What was found stands in ``meta["joined"]``; docs/joining.md says how to read it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from profiles.errors import InputError
from replay.checks.evidence import grid_of
from replay.clock_bounds import ROUNDING, ClockMap, bound, same_events
from replay.joined_facts import Conflict, join_facts
from replay.request_matching import ORDER, Matching, Rows, begins, matchings
from replay.timeline_placement import Flight, by_requests_in_flight, by_wall_clock
from replay.trace import REQUEST_CLOCK, RUN_CLOCK, Floats, Trace, check_requests, requests_table

VANTAGES = ("engine", "client")
ENGINE, CLIENT, WORKLOAD, FACTS = "engine", "client", "workload", "facts"
ROLES = (ENGINE, CLIENT, WORKLOAD, FACTS)
"""In this order, sources are asked for a column."""
IN_ENGINE = ("queued", "scheduled", "first_token", "last_token")
EVENTS = ("queued", "scheduled", "first_token", "last_token", "arrival")
STAMPS = ("nominal_arrival", "arrival", "queued", "scheduled", "first_token", "last_token")
OF_CLIENT = {
    "client_sent": "arrival",
    "client_first_token": "first_token",
    "client_last_token": "last_token",
    "client_token_times": "token_times",
}
COUNTS = ("prompt_tokens", "output_tokens", "cached_tokens", "preemptions", "priority")
WALL_SINCE = 1e9
"""Seconds: clocks that show more count from 1970, others from a machine's start."""
SAME_CLOCK = 1.0
"""Two clocks that count from a machine's start and agree to this many seconds are one machine's."""
COARSE = 0.25
"""Of a run's span: bounds that contradict each other by more mean other requests, or another run."""


def role_of(trace: Trace) -> str:
    """Tell what a source is: ``engine`` stamps, a ``client``'s view, a ``workload`` without stamps, or ``facts``."""
    if not len(trace):
        return FACTS
    if trace.has("queued") or trace.has("scheduled") or trace.iterations is not None:
        return ENGINE
    if not trace.has("first_token") and not trace.has("last_token"):
        return WORKLOAD
    return ENGINE if trace.meta.get("vantage") == "engine" else CLIENT


@dataclass
class _Source:
    """One source, what is known of it, and how it is joined to the base."""

    trace: Trace
    label: str
    role: str
    rows: Rows = field(default_factory=lambda: np.empty(0, dtype=np.intp))
    """Its row for each row of the base, -1 for none."""
    clock: ClockMap | None = None
    matching: Matching | None = None
    bounds: ClockMap | None = None
    """What events alone tell of its clock, where more is known."""
    joined: dict[str, Any] = field(default_factory=dict)

    @property
    def origin(self) -> float:
        """What its own clock showed at its second 0."""
        clock = self.trace.meta.get("clock") or {}
        return float(clock.get("origin_monotonic", clock.get("origin")) or 0.0)

    @property
    def times(self) -> Floats | None:
        return begins(self.trace)

    @property
    def wall_origin(self) -> float | None:
        """The time of day (Unix seconds) at its second 0, None where it does not tell."""
        said = (self.trace.meta.get("clock") or {}).get("origin_wall")
        if said is not None:
            return float(said)
        times = self.times
        if times is None or not len(times):
            timeline = self.trace.timeline
            times = np.empty(0) if timeline is None else _numbers(timeline, "time")
        there = times[~np.isnan(times)]
        return self.origin if there.size and np.median(there) + self.origin > WALL_SINCE else None


def join(traces: Sequence[Trace], vantage: str | None = None) -> Trace:
    """Join several sources of one run.

    Parameters
    ----------
    traces : sequence of Trace
        In any order: which one wins follows from what they are, then from their order.
    vantage : {"engine", "client"}, optional
        Whose first and last tokens (and arrivals) the joined trace's latencies mean; the engine's if a source has
        them. What the client saw is kept in ``client_*`` columns either way.

    Returns
    -------
    Trace
        On the engine's clock if a source has engine stamps. ``meta["joined"]`` holds ``vantage``, ``sources`` (how
        each was matched, its offset with error in seconds), ``conflicts``, ``columns`` (source of each column) and
        ``front_end`` (seconds between what client and engine saw).

    Raises
    ------
    InputError
        If sources hold other requests, or the vantage asked for was not measured.
    """
    if not traces:
        raise InputError("there is nothing to join")
    if len(traces) == 1 and vantage is None:
        return traces[0]
    sources = _sources(traces)
    base = sources[0]
    base.rows = np.arange(len(base.trace))
    base.joined["matched"] = len(base.trace)
    for source in sources[1:]:
        if source.role != FACTS:
            _match(base, source)
    joined = _Joined(base, [one for one in sources if one.role != FACTS])
    chosen = joined.vantage(vantage)
    requests = joined.requests(chosen)
    timeline = _timeline(sources, base, _flight(requests))
    facts, conflicts = join_facts([(one.label, one.role, one.trace.meta) for one in sources])
    meta = {
        **facts,
        "name": base.trace.name,
        **({} if joined.count else {"facts_only": True}),
        "source": {"format": "joined", "files": _files(sources)},
        "clock": joined.clock(),
        "vantage": chosen if base.role in (ENGINE, CLIENT) else base.trace.meta.get("vantage"),
        "columns": joined.origins(Trace(requests, {})),
        "notes": joined.notes(sources),
        "joined": {
            "vantage": chosen,
            "sources": [_described(one) for one in sources],
            "columns": joined.taken,
            "conflicts": [one.as_dict() for one in [*joined.conflicts, *conflicts]],
            "front_end": joined.front_end or _from_means(sources),
        },
    }
    counts = _iteration_counts(sources, base)
    trace = Trace(requests, meta, base.trace.iterations, timeline, base.trace.batches, counts)
    return check_requests(trace, Path(base.label)) if len(trace) else trace


def _sources(traces: Sequence[Trace]) -> list[_Source]:
    """Sources in the order in which they are asked, with labels that differ."""
    labels: list[str] = []
    for trace in traces:
        files = (trace.meta.get("source") or {}).get("files") or []
        label = files[0].get("name") if len(files) == 1 else None
        label = str(label or trace.name)
        same = sum(one == label or one.startswith(f"{label} (") for one in labels)
        labels.append(f"{label} ({same + 1})" if same else label)
    found = [_Source(trace, label, role_of(trace)) for trace, label in zip(traces, labels, strict=True)]
    return sorted(found, key=lambda one: (ROLES.index(one.role), one.trace.iterations is None, -_stamped(one.trace)))


def _stamped(trace: Trace) -> int:
    return sum(trace.has(name) for name in STAMPS)


def _match(base: _Source, source: _Source) -> None:
    """Find a source's requests in the base and its clock's offset: the first way whose clocks agree, or nearly."""
    best: tuple[Matching, ClockMap | None] | None = None
    for matching in matchings(source.trace, base.trace):
        clock = _clock(base, source, matching)
        if best is None or (clock is not None and best[1] is not None and clock.contradiction < best[1].contradiction):
            best = matching, clock
        if clock is None or clock.contradiction <= _tolerated(base, source):
            best = matching, clock
            break
    if best is None:
        raise InputError(
            f"{source.label} and {base.label} hold other requests: neither ids nor lengths in order of arrival match "
            f"({len(source.trace)} and {len(base.trace)} requests)"
        )
    source.matching, source.clock = best
    source.rows = np.full(len(base.trace), -1, dtype=np.intp)
    source.rows[source.matching.right] = source.matching.left
    if source.clock is not None:
        _known_offset(base, source)


def _tolerated(base: _Source, source: _Source) -> float:
    """Between two witnesses of the same events the residual is what it is; else nothing."""
    if base.role != source.role:
        return 0.0
    times = base.times
    return COARSE * float(np.nanmax(times) - np.nanmin(times)) if times is not None else np.inf


def _clock(base: _Source, source: _Source, matching: Matching) -> ClockMap | None:
    """How the source's clock stands to the base's."""
    if REQUEST_CLOCK in (base.trace.clock, source.trace.clock):
        return None
    left = {name: source.trace.column(name)[matching.left] for name in STAMPS}
    right = {name: base.trace.column(name)[matching.right] for name in STAMPS}
    if matching.by == ORDER:
        left, right = _in_order(left), _in_order(right)
    grids = sum(grid_of(one) for one in (left["arrival"], right["first_token"]))
    if source.role == WORKLOAD:
        came = _first_of(right, ("arrival", "queued", "scheduled"))
        wanted = _first_of(left, ("nominal_arrival", "arrival"))
        return bound(wanted, came - wanted, np.empty(0), np.empty(0), grids)
    if base.role == source.role:
        for name in EVENTS:
            difference = right[name] - left[name]
            if not np.isnan(difference).all():
                return same_events(left[name], difference)
        return None
    came = _first_of(right, ("arrival", "queued", "scheduled"))
    sent, seen = left["arrival"], left["first_token"]
    return bound(sent, came - sent, seen, right["first_token"] - seen, grids)


def _in_order(columns: dict[str, Floats]) -> dict[str, Floats]:
    """Each stamp in order of time, if all have it.

    Requests that were matched by order may be taken for each other, but the k-th first token that the client saw cannot
    be earlier than the k-th that the engine made, whichever they were.
    """
    return {name: one if np.isnan(one).any() else np.sort(one) for name, one in columns.items()}


def _first_of(columns: dict[str, Floats], names: Sequence[str]) -> Floats:
    """The first of some columns that holds anything."""
    return next((columns[name] for name in names if not np.isnan(columns[name]).all()), columns[names[0]])


def _known_offset(base: _Source, source: _Source) -> None:
    """Clocks that read the same within the bounds are one clock, if both count from a machine's start or from 1970."""
    clock = source.clock
    assert clock is not None
    if clock.error is None or clock.contradiction or clock.drift or base.role == source.role:
        return
    zero = source.origin - base.origin
    if abs(clock.offset - zero) > clock.error or clock.error > SAME_CLOCK:
        return
    times = begins(source.trace)
    reading = float(np.nanmedian(times)) + source.origin if times is not None else 0.0
    if reading > WALL_SINCE:
        # Two machines' times of day differ by what their time servers leave: the error stays.
        source.clock, source.bounds = clock.at_offset(zero), clock
        source.joined["why"] = "both count from 1970, and agree within the bounds"
    elif reading > 100 * clock.error and base.origin > 100 * clock.error:
        source.clock, source.bounds = ClockMap(zero, pairs=clock.pairs), clock
        source.joined["why"] = "one clock: both count from a machine's start and agree within what events alone tell"


class _Joined:
    """The requests of all sources in the base's order, and what only clients saw after them."""

    def __init__(self, base: _Source, sources: list[_Source]) -> None:
        self.base, self.sources = base, sources
        self.taken: dict[str, str] = {}
        self.conflicts: list[Conflict] = []
        self.front_end: dict[str, Any] | None = None
        self.client = next((one for one in sources if one.role == CLIENT), None)
        self.extra = np.empty(0, dtype=np.intp)
        if base.role == ENGINE and self.client is not None and self.client.clock is not None:
            # Without a common clock nothing tells when the others came.
            self.extra = np.setdiff1d(np.arange(len(self.client.trace)), self.client.rows)
        self.count = len(base.trace) + len(self.extra)

    def vantage(self, asked: str | None) -> str:
        """Whose first and last tokens are taken."""
        have = [name for name in VANTAGES if any(one.role == name for one in self.sources)]
        if asked is not None and asked not in have:
            raise InputError(
                f"no source was measured there; there is {' and '.join(have) or 'no stamp at all'}", field="--vantage"
            )
        return asked or (have[0] if have else ENGINE)

    def requests(self, vantage: str) -> pa.Table:
        """The joined table."""
        if not self.count:
            return self.base.trace.requests
        columns: dict[str, Any] = {"id": self._ids(), "status": self._statuses(vantage), "error": self._texts("error")}
        for name in STAMPS:
            columns[name] = self._stamps(name)
        self._keep_order(columns)
        for name in COUNTS:
            columns[name] = self._counts(name)
        for name in ("token_times", "block_hashes"):
            columns[name] = self._lists(name)
        columns["batch"] = self._of_base("batch")
        if self.client is not None and self.base.role == ENGINE:
            columns |= self._of_client()
            self._compare(columns)
            if vantage == CLIENT:
                self._seen_by_client(columns)
        return requests_table(columns, self.count)

    def _witnesses(self, name: str) -> list[_Source]:
        """Sources of a column in the order in which they are asked: a latency's stamps only from the base's side."""
        among = self.sources
        if name in ("queued", "scheduled", "first_token", "last_token", "token_times", "preemptions", "arrival"):
            among = [one for one in among if one.role == self.base.role]
        return [one for one in among if one.trace.has(name)]

    def _of(self, source: _Source, values: Floats) -> Floats:
        """A source's values in the rows of the joined table, NaN where it has no such request."""
        found = np.full(self.count, np.nan)
        known = source.rows >= 0
        found[: len(source.rows)][known] = values[source.rows[known]]
        if source is self.client:
            found[len(self.base.trace) :] = values[self.extra]
        return found

    def _stamps(self, name: str) -> Floats | None:
        for source in self._witnesses(name):
            moved = _moved(source, self.base, source.trace.column(name))
            if moved is not None:
                self.taken[name] = source.label
                return self._or_sent(self._of(source, moved)) if name == "arrival" else self._of(source, moved)
        if name == "arrival" and self._sent() is not None:
            self.taken[name] = self.client.label if self.client else ""
            return self._sent()
        return None

    def _keep_order(self, columns: dict[str, Any]) -> None:
        """Let stamps of another witness not cross the base's by what their clock's error explains."""
        errors = {one.label: one.clock.error or 0.0 for one in self.sources if one.clock is not None}
        order = [name for name in IN_ENGINE if columns[name] is not None]
        for place, name in enumerate(order):
            error = errors.get(self.taken[name])
            if error is None:
                continue
            least = np.fmax.reduce([np.full(self.count, -np.inf), *(columns[one] for one in order[:place])])
            most = np.fmin.reduce([np.full(self.count, np.inf), *(columns[one] for one in order[place + 1 :])])
            inside = np.fmin(np.fmax(columns[name], least), most)
            near = np.abs(inside - columns[name]) <= error + ROUNDING
            columns[name] = np.where(near, inside, columns[name])

    def _sent(self) -> Floats | None:
        """When a client beside the engine sent each request, on the engine's clock."""
        if self.client is None or self.client is self.base or not self.client.trace.has("arrival"):
            return None
        moved = _moved(self.client, self.base, self.client.trace.column("arrival"))
        return None if moved is None else self._of(self.client, moved)

    def _or_sent(self, arrival: Floats) -> Floats:
        """Arrivals; of requests that the engine does not know, when they were sent."""
        sent = self._sent()
        return arrival if sent is None else np.where(np.isnan(arrival), sent, arrival)

    def _counts(self, name: str) -> list[int | None] | None:
        """Whole numbers: from the first source that has them, gaps from the next; differences are conflicts."""
        merged: Floats | None = None
        for source in self._witnesses(name):
            values = self._of(source, source.trace.column(name))
            if merged is None:
                merged = values
                self.taken[name] = source.label
                continue
            self._differ(name, merged, values, source)
            merged = np.where(np.isnan(merged), values, merged)
        return None if merged is None else [None if np.isnan(one) else int(one) for one in merged]

    def _differ(self, name: str, taken: Floats, values: Floats, source: _Source) -> None:
        differ = np.flatnonzero(~np.isnan(taken) & ~np.isnan(values) & (taken != values))
        # What a client counts of a request that failed is no witness.
        if not differ.size:
            return
        row = int(differ[0])
        apart = np.abs(taken - values)[differ]
        self.conflicts.append(
            Conflict(
                name,
                {self.taken[name]: int(taken[row]), source.label: int(values[row])},
                self.taken[name],
                f"{differ.size} of {int((~np.isnan(values)).sum())} requests, by up to {int(apart.max())}; "
                f"the first is request {self._ids()[row]}",
                int(differ.size),
            )
        )

    def _lists(self, name: str) -> pa.Array | list[Any] | None:
        for source in self._witnesses(name):
            lists = source.trace.lists(name)
            moved: list[Any] | None = lists
            if name == "token_times":
                moved = _moved_lists(source, self.base, lists)
            if moved is None:
                continue
            self.taken[name] = source.label
            return self._spread(source, moved)
        return None

    def _spread(self, source: _Source, values: Sequence[Any]) -> list[Any]:
        found: list[Any] = [values[row] if row >= 0 else None for row in source.rows.tolist()]
        rest = [values[row] for row in self.extra.tolist()] if source is self.client else [None] * len(self.extra)
        return found + rest

    def _of_base(self, name: str) -> list[Any]:
        own: list[Any] = self.base.trace.requests.column(name).to_pylist()
        return own + [None] * len(self.extra)

    def _texts(self, name: str) -> list[Any] | None:
        texts = self._of_base(name)
        if self.client is not None:
            seen = self._spread(self.client, self.client.trace.requests.column(name).to_pylist())
            texts = [mine if mine is not None else other for mine, other in zip(texts, seen, strict=True)]
        return texts

    def _ids(self) -> list[str]:
        ids = list(self.base.trace.ids)
        if self.client is not None and len(self.extra):
            taken = set(ids)
            ids += [
                f"{self.client.label}/{one}" if one in taken else one
                for one in np.array(self.client.trace.ids)[self.extra]
            ]
        return [str(one) for one in ids]

    def _statuses(self, vantage: str) -> list[str]:
        """The base's; what only the client saw is ``unfinished`` where it was served: replayed, not scored."""
        own = [str(one) for one in self.base.trace.statuses]
        if self.client is None or self.base.role != ENGINE:
            return own
        seen = self._spread(self.client, [str(one) for one in self.client.trace.statuses])
        differ = [row for row, mine in enumerate(own) if seen[row] not in (None, mine)]
        if differ:
            values = {self.base.label: own[differ[0]], self.client.label: seen[differ[0]]}
            what = f"{len(differ)} requests; the first is request {self.base.trace.ids[differ[0]]}"
            winner = self.base.label if vantage == ENGINE else self.client.label
            self.conflicts.append(Conflict("status", values, winner, what, len(differ)))
        own += ["unfinished" if one == "ok" else str(one) for one in seen[len(own) :]]
        if vantage == CLIENT:
            # Only the engine saw it: somebody else's request, which loaded the engine all the same.
            own = [
                ("unfinished" if mine == "ok" else mine) if one is None else str(one)
                for mine, one in zip(own, seen, strict=True)
            ]
        return own

    def _of_client(self) -> dict[str, Any]:
        """What the client saw, on the base's clock; without send times, each request counts from its arrival."""
        client = self.client
        assert client is not None
        if client.clock is None and client.trace.clock != REQUEST_CLOCK:
            return {}
        lists = client.trace.lists("token_times")
        if client.clock is None:
            begin = self._since()
            found: dict[str, Any] = {"client_sent": begin + self._of(client, np.zeros(len(client.trace)))}
            for name in ("client_first_token", "client_last_token"):
                found[name] = begin + self._of(client, client.trace.column(OF_CLIENT[name]))
            found["client_token_times"] = [
                None if times is None or np.isnan(start) else [start + time for time in times]
                for times, start in zip(self._spread(client, lists), begin.tolist(), strict=True)
            ]
        else:
            found = {
                name: self._of(client, client.clock.move(client.trace.column(OF_CLIENT[name])))
                for name in OF_CLIENT
                if name != "client_token_times"
            }
            found["client_token_times"] = self._spread(client, _moved_lists(client, self.base, lists) or [])
        self.taken |= dict.fromkeys(found, client.label)
        return found

    def _since(self) -> Floats:
        """What requests count from in the base: their arrivals, else their queue stamps."""
        return self._of(self.base, _first_of({name: self.base.trace.column(name) for name in STAMPS}, STAMPS[1:]))

    def _compare(self, columns: dict[str, Any]) -> None:
        """The front end's share: what the client saw less what the engine did, request by request."""
        client = self.client
        assert client is not None
        engine = columns["first_token"]
        begin = columns["arrival"] if columns["arrival"] is not None else columns["queued"]
        sent, seen = columns.get("client_sent"), columns.get("client_first_token")
        if engine is None or begin is None or sent is None or seen is None:
            return
        found: dict[str, Any] = {"ttft": _spread_of((seen - sent) - (engine - begin))}
        if client.clock is not None:
            found["to_engine"] = _spread_of(begin - sent)
            found["to_client"] = _spread_of(seen - engine)
            found["error"] = client.clock.error
        self.front_end = found if found["ttft"]["requests"] else None

    def _seen_by_client(self, columns: dict[str, Any]) -> None:
        """Let latencies mean what the client saw; the engine's queue and schedule stamps stay."""
        if "client_sent" not in columns:
            raise InputError("the client's stamps cannot be brought onto the engine's clock", field="--vantage")
        own = columns["arrival"]
        columns |= {theirs: columns[name] for name, theirs in OF_CLIENT.items()}
        if own is not None:
            # Requests of others arrived all the same.
            columns["arrival"] = np.where(np.isnan(columns["arrival"]), own, columns["arrival"])
        self.taken |= {theirs: self.taken[name] for name, theirs in OF_CLIENT.items()}

    def clock(self) -> dict[str, Any]:
        """The base's clock, and the time of day of its second 0 if any source tells it."""
        said = dict(self.base.trace.meta.get("clock") or {"kind": RUN_CLOCK})
        if "origin_wall" not in said:
            link = wall_link(self.base, self.sources)
            if link is not None:
                said["origin_wall"], said["origin_wall_error"] = link
        return said

    def origins(self, trace: Trace) -> dict[str, str]:
        """What every column is, and of which source."""
        labels = {one.label: one for one in self.sources}
        found = {}
        for name in trace.requests.column_names:
            if not trace.has(name):
                found[name] = "unknown"
                continue
            source = labels.get(self.taken.get(name, self.base.label), self.base)
            theirs = OF_CLIENT.get(name, name) if source is self.client and source is not self.base else name
            said = str((source.trace.meta.get("columns") or {}).get(theirs) or "measured")
            found[name] = f"{said}, {source.label}"
            if name.startswith("client_") and source.trace.clock == REQUEST_CLOCK:
                found[name] = f"reconstructed: counted from the engine's arrival, {source.label}"
            elif name == "arrival" and source.role == CLIENT and self.base.role == ENGINE:
                found[name] = f"reconstructed: when the client sent it, on the engine's clock, {source.label}"
        return found

    def notes(self, sources: list[_Source]) -> list[str]:
        """What to know of the joined trace, then what the sources say of themselves."""
        notes = [sentence for one in sources for sentence in _sentences(one, self.base)]
        if self.client is not None and self.base.role == ENGINE:
            alone = int((self.client.rows < 0).sum())
            if alone:
                notes.append(
                    f"{alone} requests of {self.base.label} are not in {self.client.label} (warm-up, or other "
                    "clients); they loaded the engine and stay"
                )
            unplaced = len(self.client.trace) - int((self.client.rows >= 0).sum()) - len(self.extra)
            if unplaced:
                notes.append(
                    f"{unplaced} requests of {self.client.label} are not in {self.base.label} and are left out: "
                    "nothing tells when they came"
                )
            if len(self.extra):
                notes.append(
                    f"{len(self.extra)} requests of {self.client.label} are not in {self.base.label}: those that were "
                    "served are kept as unfinished (replayed, not scored)"
                )
        said: dict[str, list[str]] = {}
        for one in sources:
            for note in one.trace.meta.get("notes") or []:
                said.setdefault(str(note), []).append(one.label)
        return notes + [f"{in_short(labels)}: {note}" for note, labels in said.items()]


def _moved(source: _Source, base: _Source, values: Floats) -> Floats | None:
    """Stamps on the base's clock, None where the clocks' relation is not known."""
    if source is base:
        return values
    return None if source.clock is None else source.clock.move(values)


def _moved_lists(source: _Source, base: _Source, lists: Sequence[Any]) -> list[Any] | None:
    if source is base:
        return list(lists)
    clock = source.clock
    if clock is None:
        return None

    def move(times: Sequence[float]) -> list[Any]:
        moved: list[Any] = clock.move(np.array(times, dtype=np.float64)).tolist()
        return moved

    return [None if times is None else move(times) for times in lists]


def _spread_of(values: Floats) -> dict[str, float]:
    """Requests, mean, median, extremes and the 90th percentile of delays, in seconds."""
    there = values[~np.isnan(values)]
    if not there.size:
        return {"requests": 0}
    figures: dict[str, Callable[[Floats], Any]] = {
        "mean": np.mean,
        "min": np.min,
        "p50": np.median,
        "p90": lambda one: np.percentile(one, 90),
        "max": np.max,
    }
    return {"requests": int(there.size), **{name: float(figure(there)) for name, figure in figures.items()}}


def _from_means(sources: list[_Source]) -> dict[str, Any] | None:
    """Without engine stamps, what the client's mean TTFT exceeds that of the server's histograms by."""
    client = next((one for one in sources if one.role == CLIENT), None)
    if client is None:
        return None
    seen = client.trace.latency("ttft")
    if np.isnan(seen).all():
        return None
    for source in sources:
        mean = ((source.trace.meta.get("aggregates") or {}).get("ttft") or {}).get("mean")
        if source.role == FACTS and isinstance(mean, int | float):
            found = {"requests": int((~np.isnan(seen)).sum()), "mean": float(np.nanmean(seen)) - mean}
            return {"ttft": found, "of": f"means only, against {source.label}"}
    return None


def wall_link(base: _Source, sources: Sequence[_Source]) -> tuple[float, float] | None:
    """The time of day at the base's second 0 and its error, told by the base or by a source on its clock."""
    if base.wall_origin is not None:
        return base.wall_origin, 0.0
    for source in sources:
        clock, wall = source.clock, source.wall_origin
        if clock is not None and wall is not None:
            # Its second 0 is the base's second ``offset``.
            return wall - float(clock.move(0.0)), float(clock.error or 0.0)
    return None


def _flight(requests: pa.Table) -> Flight | None:
    """When requests were in the engine, for placing its gauges."""
    columns = {name: _numbers(requests, name) for name in STAMPS}
    begin = _first_of(columns, ("arrival", "queued", "scheduled"))
    if not len(begin) or np.isnan(begin).all():
        return None
    return Flight(begin, columns["last_token"])


def _timeline(sources: list[_Source], base: _Source, flight: Flight | None) -> pa.Table | None:
    """The base's samples, else those of the format that has most of them during the run, on the base's clock."""
    found: dict[str, list[tuple[_Source, pa.Table]]] = {}
    for source in sources:
        timeline = source.trace.timeline
        if timeline is None or not timeline.num_rows:
            continue
        placed = timeline if source is base or flight is None else _placed(source, base, sources, flight)
        if placed is not None:
            # Scrapes of one run may be a file each.
            own = source.label if source.role != FACTS else str((source.trace.meta.get("source") or {}).get("format"))
            found.setdefault(own, []).append((source, placed))
            source.joined.setdefault("timeline", {"how": "its own clock"})["samples"] = placed.num_rows
    if not found:
        return None
    taken = max(found.values(), key=lambda some: (some[0][0] is base, sum(placed.num_rows for _, placed in some)))
    for some in found.values():
        for source, _ in some:
            source.joined["timeline"]["taken"] = some is taken
    return pa.concat_tables([placed for _, placed in taken]).sort_by("time")


def _iteration_counts(sources: list[_Source], base: _Source) -> pa.Table | None:
    """A log's counts of every iteration, moved as its gauges were; their times are null where those had no place."""
    source = next((one for one in sources if one.trace.iteration_counts is not None), None)
    if source is None:
        return None
    table = source.trace.iteration_counts
    assert table is not None
    if source is base:
        return table
    offset = source.joined.get("timeline", {}).get("offset", np.nan)
    for name in ("start", "logged"):
        moved = pa.array(_numbers(table, name) + offset, from_pandas=True)
        table = table.set_column(table.column_names.index(name), name, moved)
    return table


def _placed(source: _Source, base: _Source, sources: list[_Source], flight: Flight) -> pa.Table | None:
    """A source's samples during the run, on the base's clock."""
    timeline = source.trace.timeline
    assert timeline is not None
    times = _numbers(timeline, "time")
    if source.role != FACTS:
        if source.clock is None:
            return None
        moved = source.clock.move(times)
        source.joined["timeline"] = {"error": source.clock.error, "how": "with its requests"}
        return _during(timeline, moved, flight)
    busy = _numbers(timeline, "running") + np.nan_to_num(_numbers(timeline, "waiting"))
    link, wall = wall_link(base, sources), source.wall_origin
    placement = None
    if wall is None and link is not None:
        wall = _wall_of_local((source.trace.meta.get("clock") or {}).get("origin_local"), link[0])
    if link is not None and wall is not None:
        placement = by_wall_clock(times, busy, flight, wall - link[0], link[1])
    if placement is None:
        placement = by_requests_in_flight(times, busy, flight)
    if placement is None:
        source.joined["timeline"] = {
            "samples": 0,
            "taken": False,
            "how": "its samples cannot be placed: nothing tells how its clock stands to the run's",
        }
        return None
    source.joined["timeline"] = {"offset": placement.offset, "error": placement.error, "how": placement.how}
    return _during(timeline, times + placement.offset, flight)


def _wall_of_local(local: Any, near: float) -> float | None:
    """Unix seconds of a log's ``[YYYY-]MM-DD HH:MM:SS`` as if it were UTC, in the year nearest to an instant."""
    if not isinstance(local, str):
        return None
    try:
        year = datetime.fromtimestamp(near, UTC).year
        dates = [local] if re.match(r"\d{4}-", local) else [f"{one}-{local}" for one in (year - 1, year, year + 1)]
        found = []
        for date in dates:
            with contextlib.suppress(ValueError):  # 29 February of another year
                found.append(datetime.fromisoformat(date.replace(",", ".")).replace(tzinfo=UTC).timestamp())
        return min(found, key=lambda one: abs(one - near), default=None)
    except (OverflowError, OSError):
        return None


def _during(timeline: pa.Table, times: Floats, flight: Flight) -> pa.Table:
    """Samples from one before the run to one after it."""
    begin, end = flight.span
    gaps = np.diff(np.unique(times))
    margin = float(np.median(gaps)) if gaps.size else 0.0
    inside = (times >= begin - margin) & (times <= end + margin)
    moved = timeline.set_column(timeline.column_names.index("time"), "time", pa.array(times))
    return moved.filter(pa.array(inside))


def _numbers(table: pa.Table, name: str) -> Floats:
    values = table.column(name).cast(pa.float64()).to_numpy(zero_copy_only=False)
    return np.asarray(values, dtype=np.float64)


def _files(sources: list[_Source]) -> list[dict[str, Any]]:
    """Files of all sources, each once."""
    every = [file for one in sources for file in (one.trace.meta.get("source") or {}).get("files") or []]
    return list({(one.get("name"), one.get("sha256")): one for one in every}.values())


def _described(source: _Source) -> dict[str, Any]:
    """How a source was joined, for ``meta``."""
    found: dict[str, Any] = {
        "label": source.label,
        "format": (source.trace.meta.get("source") or {}).get("format"),
        "role": source.role,
        "requests": len(source.trace),
        "matched": int((source.rows >= 0).sum()),
    }
    if source.matching is not None:
        found |= {"matched_by": source.matching.by, "doubt": source.matching.doubt}
    if source.clock is not None:
        clock = source.clock
        found["offset"] = {
            "seconds": clock.offset,
            "error": clock.error,
            "drift": clock.drift,
            "drift_interval": list(clock.drift_interval),
            "at": clock.middle,
            "contradiction": clock.contradiction,
            "bounds": clock.pairs,
            "why": source.joined.get("why"),
        }
        if source.bounds is not None:
            found["offset"]["by_events"] = {"seconds": source.bounds.offset, "error": source.bounds.error}
    if "timeline" in source.joined:
        found["timeline"] = source.joined["timeline"]
    return found


def _sentences(source: _Source, base: _Source) -> list[str]:
    """How a source was joined, for people."""
    if source is base:
        return []
    found = []
    if source.matching is not None:
        sentence = f"{source.label}: {len(source.matching)} of {len(source.trace)} requests are in {base.label}, "
        found.append(
            sentence + f"by {source.matching.by}" + (f" ({source.matching.doubt})" if source.matching.doubt else "")
        )
    clock = source.clock
    if clock is not None:
        found.append(f"{source.label}: {clock_sentence(clock, _why(source))}")
    elif source.role == CLIENT:
        found.append(f"{source.label}: does not say when its requests were sent; the arrivals are {base.label}'s")
    told = source.joined.get("timeline")
    if told is not None:
        off = f", off by at most {told['error']:.3g} s" if told.get("error") is not None else ""
        found.append(f"{source.label}: gauges: {told['how']}{off}")
    return found


def in_short(labels: Sequence[str]) -> str:
    """Name one source, or the first of several."""
    return labels[0] if len(labels) == 1 else f"{labels[0]} and {len(labels) - 1} more"


def _why(source: _Source) -> str | None:
    why, bounds = source.joined.get("why"), source.bounds
    return why if bounds is None else f"{why}: {bounds.offset:.6f} ± {bounds.error:.6f} s"


def clock_sentence(clock: ClockMap, why: str | None = None) -> str:
    """What is known of a clock, in a sentence."""
    if clock.contradiction:
        return (
            f"no offset between the clocks fits all requests: some are {clock.contradiction:.6f} s out of order "
            "(other requests, another run, or a clock that was set meanwhile)"
        )
    error = (
        "bounded from one side only: the shortest delay counts as none"
        if clock.error is None
        else (f"± {clock.error:.6f} s")
    )
    drift = f", drifting by {1e6 * clock.drift:.1f} ppm" if clock.drift else ""
    return f"clock moved by {clock.offset:.6f} s {error}{drift}" + (f" ({why})" if why else "")
