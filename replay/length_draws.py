"""Lengths of prompts and outputs drawn from distributions, or from the lengths of another trace."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from profiles.errors import InputError
from replay.clocks import Floats
from replay.trace import Trace

Ints = npt.NDArray[np.int64]
SHAPE = "fixed:N, uniform:low=A,high=B, lognormal:mean=M,std=S[,min=A][,max=B], or trace:NAME"
MOST = 10**9
ARGUMENTS = {"uniform": ({"low", "high"}, set()), "lognormal": ({"mean", "std"}, {"min", "max"})}


@dataclass(frozen=True)
class LengthDraw:
    """How lengths are drawn: whole numbers of tokens, at least 1.

    ``fixed``: all alike. ``uniform``: each of low to high is equally likely. ``lognormal``: with the mean and standard
    deviation of the lengths themselves (not of their logarithms), rounded, then clipped to min and max, which moves the
    mean where it clips much. ``trace``: drawn with replacement from the lengths that a trace has.
    """

    kind: str
    text: str
    values: dict[str, float] = field(default_factory=dict)
    observed: Ints | None = None

    def lengths(self, count: int, random: np.random.Generator) -> Ints:
        """Return ``count`` lengths."""
        if self.kind == "fixed":
            return np.full(count, int(self.values["tokens"]), dtype=np.int64)
        if self.kind == "uniform":
            return random.integers(int(self.values["low"]), int(self.values["high"]), count, endpoint=True)
        if self.kind == "trace":
            assert self.observed is not None
            return random.choice(self.observed, count)
        mean, deviation = self.values["mean"], self.values["std"]
        # Mean and variance of a lognormal: exp(mu + s2/2) and (exp(s2) - 1) exp(2 mu + s2).
        spread = math.log1p((deviation / mean) ** 2)
        drawn: Floats = random.lognormal(math.log(mean) - spread / 2, math.sqrt(spread), count)
        low, high = self.values.get("min", 1.0), self.values.get("max", float(MOST))
        return np.clip(np.round(drawn), low, high).astype(np.int64)


def parse_lengths(
    text: str, column: str, load: Callable[[str], Trace] | None = None, option: str = "lengths"
) -> LengthDraw:
    """Parse ``lognormal:mean=512,std=300``.

    Parameters
    ----------
    text : str
    column : {"prompt_tokens", "output_tokens"}
        Whose lengths ``trace:NAME`` takes.
    load : callable, optional
        Reads the trace of that name.
    option : str
        What to call it in messages.

    Raises
    ------
    InputError
        If it has another shape, a value is out of range, or the trace has no lengths.
    """
    kind, _, rest = text.partition(":")
    if kind == "trace" and rest and load is not None:
        trace = load(rest)
        lengths = trace.column(column)[trace.statuses != "failed"]
        lengths = lengths[lengths >= 1]
        if not lengths.size:
            raise InputError(f"{trace.name} has no lengths to draw from", field=option)
        return LengthDraw(kind, text, observed=lengths.astype(np.int64))
    values: dict[str, float] = {}
    for part in filter(None, rest.split(",")):
        name, equals, value = part.partition("=") if kind != "fixed" else ("tokens", "=", part)
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not equals or name in values or not (0 if name == "std" else 1) <= number <= MOST:
            raise InputError(f"{text!r}: expected {SHAPE}", field=option)
        values[name] = number
    needed, allowed = ARGUMENTS.get(kind, ({"tokens"} if kind == "fixed" else {"?"}, set()))
    fine = needed <= set(values) <= needed | allowed
    fine = fine and all(one.is_integer() for name, one in values.items() if name not in ("mean", "std"))
    fine = fine and values.get("low", 1) <= values.get("high", MOST) and values.get("min", 1) <= values.get("max", MOST)
    if not fine or values.get("std", 0.0) > 1000 * values.get("mean", 1.0):
        raise InputError(f"{text!r}: expected {SHAPE}", field=option)
    return LengthDraw(kind, text, values)
