"""What changed between two profiles: which coefficient moved beyond its interval, which setting differs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from calibrate.estimates import NONE, Interval
from profiles.profile import Coefficient, Profile

PARTS = ("model", "hardware", "engine", "accelerator", "host", "front_end", "call", "domain")


@dataclass(frozen=True)
class Change:
    """One coefficient in both profiles; None where a profile does not have it.

    ``moved`` is None where neither profile says how sure it is. ``identified`` is whether the fits' data could tell.
    """

    name: str
    a: float | None
    b: float | None
    a_ci95: Interval
    b_ci95: Interval
    difference: float
    difference_ci95: Interval
    moved: bool | None
    identified: bool | None


def coefficient_changes(a: Profile, b: Profile) -> list[Change]:
    """Compare coefficients by name.

    A coefficient has moved if 0 lies outside the 95 % interval of the difference. Fits are independent, so distances of
    bounds add in squares (MOVER, Zou and Donner 2008); of two intervals in a profile the outer bounds count.
    """
    mine, theirs = _coefficients(a), _coefficients(b)
    names = [*mine, *(one for one in theirs if one not in mine)]
    return [_change(name, mine.get(name), theirs.get(name)) for name in names]


def _coefficients(profile: Profile) -> dict[str, Coefficient]:
    """Those of the accelerator model, and of the front end."""
    found = dict(profile.coefficients)
    way = profile.front_end
    if way is not None:
        for name in ("per_request", "per_prompt_token"):
            found[f"front_end.{name}"] = Coefficient(value=getattr(way, name), ci95=getattr(way, f"{name}_ci95"))
    return found


def _change(name: str, a: Coefficient | None, b: Coefficient | None) -> Change:
    if a is None or b is None:
        values = [None if one is None else one.value for one in (a, b)]
        bounds = [_bounds(one) for one in (a, b)]
        return Change(name, values[0], values[1], bounds[0], bounds[1], math.nan, NONE, None, None)
    mine, theirs = _bounds(a), _bounds(b)
    difference = b.value - a.value
    interval, moved = NONE, None
    if not (math.isnan(mine[0]) and math.isnan(theirs[0])):
        # One that nobody fitted is what it is said to be.
        (a_low, a_high), (b_low, b_high) = mine, theirs
        a_low, a_high = (a.value, a.value) if math.isnan(a_low) else (min(a_low, a.value), max(a_high, a.value))
        b_low, b_high = (b.value, b.value) if math.isnan(b_low) else (min(b_low, b.value), max(b_high, b.value))
        down = math.hypot(b.value - b_low, a_high - a.value)
        up = math.hypot(b_high - b.value, a.value - a_low)
        interval = (difference - down, difference + up)
        moved = not interval[0] <= 0 <= interval[1]
    elif difference == 0:
        moved = False
    said = [one.identified for one in (a, b) if one.identified is not None]
    return Change(name, a.value, b.value, mine, theirs, difference, interval, moved, all(said) if said else None)


def _bounds(one: Coefficient | None) -> Interval:
    """The outer bounds of what the profile says: the wider interval is honest."""
    said = [bounds for bounds in (one.ci95, one.ci95_bootstrap) if bounds is not None] if one else []
    return (min(low for low, _ in said), max(high for _, high in said)) if said else NONE


def setting_changes(a: Profile, b: Profile) -> list[tuple[str, Any, Any]]:
    """Name and both values of everything else that differs and that a replay depends on; None where it is not said."""
    mine, theirs = (_settings(one) for one in (a, b))
    names = [*mine, *(one for one in theirs if one not in mine)]
    return [(name, mine.get(name), theirs.get(name)) for name in names if mine.get(name) != theirs.get(name)]


def _settings(profile: Profile) -> dict[str, Any]:
    document = profile.model_dump(by_alias=True, exclude_none=True, include=set(PARTS))
    document.get("host", {}).pop("source", None)
    document.pop("front_end", None)
    return dict(_flat("", {part: document[part] for part in PARTS if part in document}))


def _flat(prefix: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [one for key, below in value.items() for one in _flat(f"{prefix}.{key}" if prefix else str(key), below)]
    return [(prefix, value)]
