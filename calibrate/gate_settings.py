"""Gates as people write them: ``ttft.p99:10%`` on the command line, or a TOML file.

The file says the same in TOML: ``ttft.p99 = "10%"``, or ``p99 = "10%"`` below ``[ttft]``. A table ``[baseline]`` says
what a regression is, ``inconclusive`` how to exit where the noise hides the answer.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from calibrate.estimates import NAMES
from calibrate.gates import Allowance, Gate, Rules
from profiles.errors import InputError, found

SHORT = {
    "coverage": ("coverage", "paired"),
    "makespan": ("throughput", "makespan"),
    "throughput": ("throughput", "output_tokens_per_s"),
}
"""Names that need no statistic."""
INCONCLUSIVE = ("report", "pass", "fail")
BASELINE_FIELDS = ("report", "points", "relative", "statistics")
FAIL_ON, FIELD = "--fail-on", re.compile(r"\s*(?:\[\s*(?P<table>[^\[\]#]+?)\s*\]|(?P<key>[^=#\[\]]+?)\s*=)")


def parse_gate(text: str) -> Gate:
    """Read ``METRIC.STATISTIC:LIMIT``, such as ``ttft.p99:10%``, ``makespan:0.05`` or ``coverage:99%``.

    Raises
    ------
    InputError
        If there is no such statistic, or the limit is none.
    """
    name, colon, limit = text.partition(":")
    if not colon:
        raise InputError(f"{text!r}: expected METRIC.STATISTIC:LIMIT, such as ttft.p99:10%", field=FAIL_ON)
    try:
        metric, statistic = parse_statistic(name.strip())
        return _gate(metric, statistic, parse_limit(limit.strip()))
    except ValueError as error:
        raise InputError(f"{text!r}: {error}", field=FAIL_ON) from None


def parse_statistic(name: str) -> tuple[str, str]:
    """Split ``ttft.p99``.

    Raises
    ------
    ValueError
        If there is no such statistic, with the nearest one that there is.
    """
    if name in SHORT:
        return SHORT[name]
    metric, _, statistic = name.partition(".")
    if statistic in NAMES.get(metric, ()):
        return metric, statistic
    if metric in NAMES and not statistic:
        raise ValueError(f"{metric} needs a statistic: {', '.join(f'{metric}.{one}' for one in NAMES[metric])}")
    if metric in NAMES:
        raise ValueError(f"{found(statistic)} {_unknown(statistic, NAMES[metric], f'{metric}.')}")
    raise ValueError(f"{found(metric)} {_unknown(metric, tuple(NAMES))}")


def _unknown(name: str, known: Sequence[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, known, 1, 0.4)
    nearest = f"did you mean {prefix}{near[0]}? " if near else ""
    return f"is no name here; {nearest}known: {', '.join(known)}"


def parse_limit(text: Any) -> float:
    """Read ``10%`` or the fraction 0.1.

    Raises
    ------
    ValueError
        If it is no number of at least 0, or a number above 1 without ``%``.
    """
    percent = isinstance(text, str) and text.endswith("%")
    try:
        if isinstance(text, bool):
            raise ValueError
        value = float(text[:-1]) / 100 if percent else float(text)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"expected a limit such as 10% or 0.1, found {found(text)}") from None
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"expected a limit of at least 0, found {found(text)}")
    if value > 1 and not percent:
        raise ValueError(f"a limit of {text} would be {100 * value:g}%; write {text}% if percent is meant")
    return value


def _gate(metric: str, statistic: str, limit: float) -> Gate:
    if metric == "coverage" and limit > 1:
        raise ValueError("expected the least share of requests with a prediction, at most 100%")
    return Gate(metric, statistic, limit)


def read_rules(path: Path) -> Rules:
    """Read a gates file.

    Raises
    ------
    InputError
        If it cannot be read, is no TOML, or has a key that is no gate: naming file, line and field.
    """
    try:
        text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=path) from None
    except UnicodeDecodeError as error:
        raise InputError(f"is no UTF-8 text: {error.reason} at byte {error.start}", file=path) from None
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"\(at line (\d+)", str(error))
        why = re.sub(r" \(at .*", "", str(error))
        raise InputError(f"is no TOML: {why}", file=path, row=int(line[1]) if line else None) from None
    except RecursionError:
        raise InputError("is no TOML for gates: nested too deeply", file=path) from None
    return _File(path, text).rules(document)


class _File:
    """A gates file, which knows the line of each field."""

    def __init__(self, path: Path, text: str) -> None:
        self._path = path
        self._lines = dict(_fields(text))

    def rules(self, document: Mapping[str, Any]) -> Rules:
        rules = Rules()
        gates: dict[tuple[str, str], Gate] = {}
        for key, value in document.items():
            if key == "baseline":
                rules = self._baseline(rules, value)
            elif key == "inconclusive":
                if value not in INCONCLUSIVE:
                    self._refuse(key, f"expected one of {', '.join(INCONCLUSIVE)}, found {found(value)}")
                rules = replace(rules, inconclusive=value)
            else:
                for name, limit in self._limits(key, value):
                    gate = self._gate(name, limit)
                    if (gate.metric, gate.statistic) in gates:
                        self._refuse(name, f"{gate.name} has a limit already")
                    gates[gate.metric, gate.statistic] = gate
        rules = replace(rules, gates=tuple(gates.values()))
        if not rules.any:
            raise InputError('has no gate; expected lines such as ttft.p99 = "10%"', file=self._path)
        return rules

    def _limits(self, key: str, value: Any) -> Iterator[tuple[str, Any]]:
        """Names and limits of a table, or of one line."""
        if isinstance(value, Mapping) and key in NAMES:
            yield from ((f"{key}.{name}", limit) for name, limit in value.items())
        elif isinstance(value, Mapping) or key in SHORT or key in NAMES:
            yield key, value
        else:
            self._refuse(key, _unknown(key, (*NAMES, "baseline", "inconclusive")))

    def _gate(self, name: str, limit: Any) -> Gate:
        try:
            metric, statistic = parse_statistic(name)
            return _gate(metric, statistic, parse_limit(limit))
        except ValueError as error:
            self._refuse(name, str(error))

    def _baseline(self, rules: Rules, table: Any) -> Rules:
        if not isinstance(table, Mapping):
            self._refuse("baseline", f"expected a table, found {found(table)}")
        for key, value in table.items():
            try:
                rules = self._with_field(rules, key, value)
            except ValueError as error:
                self._refuse(f"baseline.{key}", str(error))
        return rules

    def _with_field(self, rules: Rules, key: str, value: Any) -> Rules:
        """Take over one field of the table ``[baseline]``; a report's path counts from the file."""
        allowance = rules.allowance
        if key == "report":
            if not isinstance(value, str) or not value:
                raise ValueError(f"expected the path of a saved report, found {found(value)}")
            return replace(rules, baseline=str(self._path.parent / value))
        if key == "points":
            return replace(rules, allowance=replace(allowance, points=parse_limit(value)))
        if key == "relative":
            return replace(rules, allowance=replace(allowance, relative=parse_limit(value)))
        if key == "statistics":
            if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
                raise ValueError(f"expected a list of names such as ttft.p99, found {found(value)}")
            return replace(rules, allowance=replace(allowance, statistics=tuple(map(parse_statistic, value))))
        raise ValueError(_unknown(key, BASELINE_FIELDS))

    def _refuse(self, field: str, message: str) -> NoReturn:
        line = self._lines.get(field) or self._lines.get(field.rpartition(".")[0])
        raise InputError(message, file=self._path, row=line, field=field)


def _fields(text: str) -> Iterator[tuple[str, int]]:
    """Full name and line of each table and key of a TOML text; tomllib does not tell."""
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        match = FIELD.match(line)
        if match is None:
            continue
        name = ".".join(part.strip().strip("\"'") for part in (match["table"] or match["key"]).split("."))
        if match["table"]:
            table = name
        else:
            name = f"{table}.{name}" if table else name
        yield name, number


def rules_of(
    file: Path | None,
    fail_on: Sequence[str],
    baseline: str | None = None,
    worse_by: str | None = None,
    inconclusive: str | None = None,
) -> Rules:
    """Put a gates file and the command line together; the command line wins.

    Raises
    ------
    InputError
        If one of them is wrong, or the command line limits a statistic twice.
    """
    rules = read_rules(file) if file is not None else Rules()
    own: dict[tuple[str, str], Gate] = {}
    for text in fail_on:
        gate = parse_gate(text)
        if (gate.metric, gate.statistic) in own:
            raise InputError(f"{text!r}: {gate.name} has a limit already", field=FAIL_ON)
        own[gate.metric, gate.statistic] = gate
    gates = {(one.metric, one.statistic): one for one in rules.gates} | own
    rules = replace(rules, gates=tuple(gates.values()), baseline=baseline or rules.baseline)
    if worse_by is not None:
        if rules.baseline is None:
            raise InputError("says what is worse than a baseline; give one with --baseline", field="--worse-by")
        rules = replace(rules, allowance=_worse_by(worse_by, rules.allowance))
    return rules if inconclusive is None else replace(rules, inconclusive=inconclusive)


def _worse_by(text: str, allowance: Allowance) -> Allowance:
    points, comma, relative = text.partition(",")
    try:
        if not comma:
            raise ValueError("expected POINTS,RELATIVE such as 2%,10%")
        return replace(allowance, points=parse_limit(points.strip()), relative=parse_limit(relative.strip()))
    except ValueError as error:
        raise InputError(f"{text!r}: {error}", field="--worse-by") from None
