"""Figures as people read them: fractions as percent, seconds as ms or s, a dash where there is none."""

from __future__ import annotations

import math
from typing import Any

NONE = "-"


def percent(value: float, digits: int = 1) -> str:
    """0.123 as ``12.3 %``."""
    return f"{100 * value:.{digits}f} %" if math.isfinite(value) else NONE


def signed(value: float, digits: int = 1) -> str:
    """0.123 as ``+12.3 %``."""
    return f"{100 * value:+.{digits}f} %" if math.isfinite(value) else NONE


def interval(limits: tuple[float, float], digits: int = 1) -> str:
    """Two fractions as ``1.0 % to 2.0 %``."""
    low, high = limits
    return f"{percent(low, digits)} to {percent(high, digits)}" if math.isfinite(low + high) else NONE


def seconds(value: float) -> str:
    """0.0123 as ``12.3 ms``; from one second on in s."""
    if not math.isfinite(value):
        return NONE
    return f"{1e3 * value:,.2f} ms" if abs(value) < 1 else f"{value:,.2f} s"


def number(value: float) -> str:
    """Four significant digits, all digits before the point."""
    if not math.isfinite(value):
        return NONE
    return f"{value:,.0f}" if abs(value) >= 1e3 or value == round(value) else f"{value:.4g}"


def plain(value: Any) -> str:
    """Any value of a profile or a trace's meta as one line."""
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int | float):
        return f"{value:.6g}" if isinstance(value, float) else str(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}: {plain(one)}" for key, one in value.items())
    return str(value)


def shortened(text: str, most: int) -> str:
    """Cut a text that is longer than ``most`` characters, and show that it was cut."""
    return text if len(text) <= most else text[: most - 1] + "…"
