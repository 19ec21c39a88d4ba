"""What several sources say of one deployment: the surest first, and where they contradict each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FIRST_HAND = ("engine", "facts", "client", "workload")
"""Roles in the order in which they are believed: the engine and its log know, a client was told."""
EXACT = ("prometheus", "metrics")
"""Formats that are asked before a log: ``cache_config_info`` has num_gpu_blocks itself, a log has tokens."""
LEVEL = ("aggregates", "aggregate_intervals", "workload")
"""Statistics of the requests of one source."""
OWN = ("name", "source", "clock", "vantage", "columns", "notes", "joined", "engine", "facts_only", "facts", *LEVEL)
"""Entries that are made anew, or hold of one source only."""


@dataclass(frozen=True)
class Conflict:
    """Sources that say different things: value by source, the source that was taken, and how far it goes."""

    what: str
    values: Mapping[str, Any]
    taken: str
    extent: str = ""
    requests: int = 0

    def as_dict(self) -> dict[str, Any]:
        """As ``meta`` holds it."""
        return {
            "what": self.what,
            "values": dict(self.values),
            "taken": self.taken,
            "extent": self.extent,
            "requests": self.requests,
        }


def join_facts(sources: Sequence[tuple[str, str, Mapping[str, Any]]]) -> tuple[dict[str, Any], list[Conflict]]:
    """Bring together what sources say of model, hardware, engine and the rest.

    Parameters
    ----------
    sources : sequence of (label, role, meta)
        Of ``replay.joining``; the first is the base, whose other entries are kept.

    Returns
    -------
    meta : dict
        ``model``, ``hardware``, ``engine`` and whatever else they have.
    conflicts : list of Conflict
    """
    ordered = sorted(sources, key=_belief)
    conflicts: list[Conflict] = []
    meta: dict[str, Any] = {}
    for name in dict.fromkeys(key for _, _, one in ordered for key in one if key not in OWN):
        values = [(label, one[name]) for label, _, one in ordered if one.get(name) is not None]
        if values:
            meta[name] = _taken(name, values, conflicts if name in ("model", "hardware") else [])
        else:
            meta[name] = None
    engines = [(label, one.get("engine") or {}) for label, _, one in ordered]
    engine: dict[str, Any] = {}
    for name in ("name", "version"):
        values = [(label, one[name]) for label, one in engines if one.get(name) is not None]
        engine[name] = _taken(f"engine.{name}", values, conflicts) if values else None
    said: dict[str, list[tuple[str, Any]]] = {}
    for label, _, one in ordered:
        for name, value in _arguments(one).items():
            said.setdefault(name, []).append((label, value))
    arguments = {name: _taken(f"engine.{name}", values, conflicts) for name, values in said.items()}
    rest = {key: one[key] for _, one in reversed(engines) for key in one if key not in ("name", "version", "arguments")}
    meta["engine"] = {**rest, **engine, "arguments": arguments}
    base = sources[0][2]
    meta |= {name: base[name] for name in LEVEL if base.get(name) is not None}
    facts = [one["facts"] for _, _, one in ordered if isinstance(one.get("facts"), dict)]
    if facts:
        meta["facts"] = {name: value for one in reversed(facts) for name, value in one.items()}
    return meta, conflicts


def _belief(source: tuple[str, str, Mapping[str, Any]]) -> tuple[int, bool]:
    _, role, meta = source
    told = str((meta.get("source") or {}).get("format") or "").lower()
    return FIRST_HAND.index(role), not any(word in told for word in EXACT)


def _arguments(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Engine arguments, and the KV blocks where a source has them beside."""
    arguments = dict((meta.get("engine") or {}).get("arguments") or {})
    if meta.get("num_gpu_blocks") is not None:
        arguments.setdefault("num_gpu_blocks", meta["num_gpu_blocks"])
    return {name: value for name, value in arguments.items() if value is not None}


def _taken(what: str, values: Sequence[tuple[str, Any]], conflicts: list[Conflict]) -> Any:
    """The first source's value; a conflict if others differ."""
    label, value = values[0]
    others = {one: other for one, other in values if _plain(other) != _plain(value)}
    if others:
        conflicts.append(Conflict(what, {label: value, **others}, label))
    # The same number as a number rather than as the text that a client was told.
    return next((other for _, other in values if not isinstance(other, str) and _plain(other) == _plain(value)), value)


def _plain(value: Any) -> Any:
    """A value as it compares: ``"64"`` is 64, ``"True"`` is true, and so is text in any case."""
    if isinstance(value, str):
        text = value.strip().lower()
        if text in ("true", "false"):
            return text == "true"
        try:
            return float(text)
        except ValueError:
            return text
    if isinstance(value, bool):
        return value
    return float(value) if isinstance(value, int | float) else value
