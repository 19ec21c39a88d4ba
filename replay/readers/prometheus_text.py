"""Prometheus text as vLLM and SGLang serve it at ``/metrics``: one scrape, or several behind each other.

A line ``# scraped_at 1760000000.25`` before a scrape says when it was made (Unix seconds), as do time stamps behind
values; without either the trace has histograms and no timeline. Format: Prometheus text exposition 0.0.4.
"""

from __future__ import annotations

import io
import math
import re
from pathlib import Path

from profiles.errors import InputError, found
from replay.readers.log_lines import LONGEST_LINE
from replay.readers.opening import head, open_bytes
from replay.readers.prometheus import Scrapes, trace_of
from replay.trace import Trace

FORMAT = "prometheus-text"
REQUESTS_FILE = ""
HEAD = 2**18
_TOLD = re.compile(rb"(?m)^(?:# (?:HELP|TYPE) )?(?:vllm|sglang):\w+[ {]")
_SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})?[ \t]+(\S+)(?:[ \t]+(-?\d{1,18}))?\s*")
_LABEL = re.compile(r'\s*([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"\s*,?')
_SCRAPED = re.compile(r"#\s*(?:scraped_at|scraped|time|timestamp)\b\D{0,3}(\d{9,11}(?:\.\d{1,9})?)\s*", re.IGNORECASE)
_ESCAPES = {"\\n": "\n", '\\"': '"', "\\\\": "\\"}


def detect(path: Path) -> bool:
    """Whether a file is of this format, with metrics of these engines."""
    if not path.is_file():
        return False
    content = head(path, HEAD)
    return content.lstrip()[:1] not in (b"{", b"[", b"<") and _TOLD.search(content) is not None


def read(path: Path) -> Trace:
    """Read one or several scrapes. A new one begins where a time is said, or where a series stands again.

    Raises
    ------
    InputError
        Naming file and line of what cannot be used.
    """
    scrapes = Scrapes()
    seen: set[tuple[str, str]] = set()
    announced: float | None = None
    with open_bytes(path) as raw:
        text = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="replace")
        for number, line in enumerate(iter(lambda: text.readline(LONGEST_LINE), ""), 1):
            said = _SCRAPED.fullmatch(line)
            if said:
                announced = float(said[1])
                seen.clear()
            if line.startswith("#") or not line.strip():
                continue
            match = _SAMPLE.fullmatch(line)
            if match is None:
                raise InputError(f"expected name{{labels}} value, found {found(line.strip())}", file=path, row=number)
            name, labels, value, stamp = match.groups()
            series = (name, labels or "")
            if not scrapes.times or not seen or series in seen:
                scrapes.times.append(announced)
                announced = None
                seen.clear()
            seen.add(series)
            if stamp is not None and scrapes.times[-1] is None and 0 < int(stamp) < 10**14:
                scrapes.times[-1] = int(stamp) * 1e-3
            if name.partition(":")[1]:
                scrapes.add(
                    len(scrapes.times) - 1, name, _labels(labels or "", path, number), _value(value, path, number)
                )
    if not scrapes.values:
        raise InputError("holds no metrics of vLLM or SGLang", file=path)
    return trace_of(scrapes, path, FORMAT)


def _labels(text: str, path: Path, row: int) -> dict[str, str]:
    labels, end = {}, 0
    while end < len(text):
        match = _LABEL.match(text, end)
        if match is None:
            raise InputError(f'expected name="value", found {found(text[end:])}', file=path, row=row, field="labels")
        labels[match[1]] = re.sub(r'\\[n"\\]', lambda one: _ESCAPES[one[0]], match[2])
        end = match.end()
    return labels


def _value(text: str, path: Path, row: int) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
        if text != "NaN":
            raise InputError(f"expected a number, found {found(text)}", file=path, row=row, field="value") from None
    return value
