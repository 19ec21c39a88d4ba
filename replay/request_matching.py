"""Which requests of two sources of one run are the same.

By equal ids, by a part of the ids (vLLM's ``cmpl-bench-3f2a-17-0`` holds the client's ``17``), else by order and
lengths: of all offsets between both clocks, the one at which most requests of equal lengths were sent and arrived
together.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import numpy as np
import numpy.typing as npt

from replay.trace import REQUEST_CLOCK, Floats, Trace

Rows = npt.NDArray[np.intp]

EQUAL, PART, ORDER = "equal ids", "a part of the ids", "order and lengths"
LEAST_SHARE = 0.5
"""Of the smaller source's requests that must be found in the other one."""
LENGTHS_AGREE = 0.9
TEMPLATE = 64.0
"""Tokens that a start token or a chat template adds to every prompt of one source."""
SHIFTS = 64
"""Requests of equal lengths may stand this many places from each other: what only one source saw lies between."""
WINDOWS = (0.02, 0.1, 0.5, 2.5, 10.0)
"""Seconds by which delays may differ: the smallest that explains most requests is taken."""
CLEAR = 0.95
MOST_SEQUENCE = 4000
"""Requests without times that are aligned freely; of more, only those that stand in line from either end."""


@dataclass(frozen=True)
class Matching:
    """Rows of both sources that are the same requests, shape (pairs,), how they were found, and what is doubtful."""

    left: Rows
    right: Rows
    by: str
    doubt: str | None = None

    def __len__(self) -> int:
        return len(self.left)


def matchings(left: Trace, right: Trace) -> Iterator[Matching]:
    """Yield ways to match two sources whose lengths agree, the surest first; none if they have nothing in common."""
    least = LEAST_SHARE * min(len(left), len(right))
    for candidate in (_by_equal_ids, _by_part_of_ids, _by_order):
        found = candidate(left, right)
        if found is not None and len(found) >= max(1, least) and lengths_agree(left, right, found):
            yield found


def lengths_agree(left: Trace, right: Trace, matching: Matching) -> bool:
    """Whether matched requests have the same prompt lengths, up to a chat template and re-tokenising."""
    mine = left.column("prompt_tokens")[matching.left]
    other = right.column("prompt_tokens")[matching.right]
    apart = (mine - other)[~np.isnan(mine - other)]
    if not apart.size:
        return True
    allowed = np.maximum(4.0, 0.02 * np.nanmean(mine))
    constant = float(np.median(apart))
    return abs(constant) <= TEMPLATE and bool(np.mean(np.abs(apart - constant) <= allowed) >= LENGTHS_AGREE)


def begins(trace: Trace) -> Floats | None:
    """When each request began, by the first stamp that the source has; None on a clock per request."""
    if trace.clock == REQUEST_CLOCK:
        return None
    names = ("arrival", "queued", "scheduled", "nominal_arrival", "first_token")
    return next((trace.column(name) for name in names if trace.has(name)), None)


def _rows(pairs: Sequence[tuple[int, int]]) -> tuple[Rows, Rows]:
    both = np.array(sorted(pairs), dtype=np.intp).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _by_keys(left: Sequence[Any], right: Sequence[Any]) -> tuple[list[tuple[int, int]], int]:
    """Rows with the same key where it stands once on either side, and how many keys stand more often."""
    often = {key for keys in (left, right) for key, count in Counter(keys).items() if count > 1 and key is not None}
    places = {key: row for row, key in enumerate(right) if key is not None and key not in often}
    pairs = [(row, places[key]) for row, key in enumerate(left) if key not in often and key in places]
    return pairs, len(often)


def _by_equal_ids(left: Trace, right: Trace) -> Matching | None:
    pairs, often = _by_keys(left.ids, right.ids)
    doubt = f"{often} ids stand several times and were not matched" if often else None
    return Matching(*_rows(pairs), EQUAL, doubt) if pairs else None


def _by_part_of_ids(left: Trace, right: Trace) -> Matching | None:
    """Parts between punctuation, at the same place of all ids of a source, that tell its requests apart."""
    best: list[tuple[int, int]] = []
    others = _parts(right.ids)
    for mine in _parts(left.ids):
        for other in others:
            pairs, often = _by_keys(mine, other)
            if not often and len(pairs) > len(best):
                best = pairs
    return Matching(*_rows(best), PART) if best else None


def _parts(ids: Sequence[str]) -> list[list[str | None]]:
    """The whole ids, their parts by place from the front and from the end, and the digits at their end."""
    split = [re.findall(r"[0-9A-Za-z]+", one or "") for one in ids]
    places = range(min(8, max((len(parts) for parts in split), default=0)))
    keys: list[list[str | None]] = [list(ids)]
    keys += [[parts[place] if place < len(parts) else None for parts in split] for place in places]
    keys += [[parts[-1 - place] if place < len(parts) else None for parts in split] for place in places]
    ends = (re.search(r"\d+$", one or "") for one in ids)
    keys.append([end.group().lstrip("0") or "0" if end else None for end in ends])
    distinct = {tuple(one): one for one in keys}
    return [one for one in distinct.values() if len(set(one) - {None}) == len(one) - one.count(None) > 0]


def _by_order(left: Trace, right: Trace) -> Matching | None:
    mine, other = _codes(left, right)
    times = begins(left), begins(right)
    if times[0] is None or times[1] is None:
        return _in_sequence(mine, other)
    return _in_time(mine, times[0], other, times[1])


def _codes(left: Trace, right: Trace) -> tuple[Rows, Rows]:
    """Lengths as numbers: both, or only those that sources count alike."""
    fewest = min(len(left), len(right))
    for names in (("prompt_tokens", "output_tokens"), ("output_tokens",), ("prompt_tokens",)):
        keys = [
            list(zip(*(np.nan_to_num(one.column(name), nan=-1.0).tolist() for name in names), strict=True))
            for one in (left, right)
        ]
        shared = sum((Counter(keys[0]) & Counter(keys[1])).values())
        if shared >= 0.8 * fewest:
            numbers = {key: code for code, key in enumerate(sorted(set(keys[0]) | set(keys[1])))}
            return tuple(np.array([numbers[key] for key in side], dtype=np.intp) for side in keys)  # type: ignore[return-value]
    return np.zeros(len(left), dtype=np.intp), np.zeros(len(right), dtype=np.intp)


def _in_sequence(mine: Rows, other: Rows) -> Matching | None:
    """Align two sequences of lengths that have no common clock, in the order of their rows."""
    a, b = mine.tolist(), other.tolist()
    front = next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    rest = min(len(a), len(b)) - front
    back = next((place for place in range(rest) if a[-1 - place] != b[-1 - place]), rest)
    pairs = [(place, place) for place in range(front)]
    pairs += [(len(a) - 1 - place, len(b) - 1 - place) for place in range(back)]
    inner = a[front : len(a) - back], b[front : len(b) - back]
    if max(map(len, inner)) <= MOST_SEQUENCE:
        for block in SequenceMatcher(None, *inner, autojunk=False).get_matching_blocks():
            pairs += [(front + block.a + step, front + block.b + step) for step in range(block.size)]
    few = len(set(a)) <= len(a) / 2 and len(a) != len(b)
    doubt = "many requests have equal lengths, the counts differ and nothing tells when they were sent" if few else None
    return Matching(*_rows(pairs), ORDER, doubt) if pairs else None


def _in_time(mine: Rows, begun: Floats, other: Rows, arrived: Floats) -> Matching | None:
    """Pair requests of equal lengths at the one offset at which most of them fit."""
    left, right = _ranked(mine, begun), _ranked(other, arrived)
    differences = _differences(left, right)
    if not differences.size:
        return None
    offset, width, clear = _densest(differences, min(len(mine), len(other)), _median_of(begun, arrived))
    pairs = _nearest(left, right, offset - width / 2, offset + width * 1.5)
    doubt = None if clear else "requests at other offsets between the clocks fit nearly as well"
    return Matching(*_rows(pairs), ORDER, doubt) if pairs else None


def _ranked(codes: Rows, times: Floats) -> tuple[Rows, Rows, Floats, Rows]:
    """Rows sorted by lengths and time: their numbers, lengths, times, and rank among those of equal lengths."""
    rows = np.flatnonzero(~np.isnan(times))
    rows = rows[np.lexsort((rows, times[rows], codes[rows]))]
    code = codes[rows]
    rank = np.arange(len(rows)) - np.searchsorted(code, code)
    return rows, code, times[rows], rank


def _differences(left: tuple[Rows, Rows, Floats, Rows], right: tuple[Rows, Rows, Floats, Rows]) -> Floats:
    """Right time less left time of all pairs of equal lengths whose ranks are near."""
    _, code, begun, rank = left
    _, other_code, arrived, _ = right
    first, last = np.searchsorted(other_code, code), np.searchsorted(other_code, code, side="right")
    found = []
    for shift in range(-SHIFTS, SHIFTS + 1):
        place = first + rank + shift
        there = (place >= first) & (place < last)
        found.append(arrived[place[there]] - begun[there])
    return np.sort(np.concatenate(found))


def _median_of(begun: Floats, arrived: Floats) -> float:
    """The offset if the k-th that was sent is the k-th that arrived."""
    count = min(np.count_nonzero(~np.isnan(begun)), np.count_nonzero(~np.isnan(arrived)))
    return float(np.median(np.sort(arrived)[:count] - np.sort(begun)[:count]))


def _densest(differences: Floats, most: int, in_order: float) -> tuple[float, float, bool]:
    """Where the narrowest window that holds most requests begins, its width, and whether there is no other."""
    width, counts = WINDOWS[-1], np.zeros(0, dtype=np.int64)
    for width in WINDOWS:
        counts = np.searchsorted(differences, differences + width, side="right") - np.arange(differences.size)
        if counts.max(initial=0) >= 0.7 * most:
            break
    as_good = differences[counts >= CLEAR * counts.max()]
    begin = float(as_good[np.argmin(np.abs(as_good + width / 2 - in_order))])
    if np.ptp(as_good) <= 2 * width:
        begin = float(differences[int(np.argmax(counts))])
    return begin, width, bool(np.ptp(as_good) <= 2 * width)


def _nearest(
    left: tuple[Rows, Rows, Floats, Rows], right: tuple[Rows, Rows, Floats, Rows], least: float, most: float
) -> list[tuple[int, int]]:
    """Pairs of equal lengths in order of time, whose difference lies within bounds."""
    rows, codes, begun, _ = left
    other_rows, other_codes, arrived, _ = right
    pairs, place = [], 0
    for row, code, time in zip(rows.tolist(), codes.tolist(), begun.tolist(), strict=True):
        while place < len(other_rows) and (other_codes[place], arrived[place] - time) < (code, least):
            place += 1
        if place < len(other_rows) and other_codes[place] == code and arrived[place] - time <= most:
            pairs.append((row, int(other_rows[place])))
            place += 1
    return pairs
