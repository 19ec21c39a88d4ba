"""Output lengths that are not the engine's: re-tokenised text, cut or padded counts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from replay.checks.evidence import RESOLUTION, Evidence, Ints, Rows
from replay.checks.finding import Finding
from replay.checks.step_clock import departures
from replay.trace import Floats

FEWEST = 40
"""Requests that it takes to tell an engine's iterations."""
SHORTEST = 20
"""Tokens below which one iteration more or less is too much of a request's length."""
WINDOW, WINDOWS = 2000, 6
"""Requests looked at together, and how many such windows of a long run."""
UNSURE = 0.02
"""Deviation of the honest from which nothing is said: the engine's iterations are too uneven, or it speculates."""
OFF, OUTLIER, STEPS_OFF = 0.03, 5.0, 3.0
"""Least departure, in relative terms, in deviations and in iterations, of a length that is wrong."""
FINE = 0.5
"""Resolution of the stamps, in iterations, up to which equal ones are of one iteration."""
MANY = 0.1
"""Share of requests from which it is a habit. Fewer may be preempted, alone on one of several engines, or where the
load changes faster than the others tell: up to 0.08 on honest simulated runs, 0.03 on the public traces."""


def output_lengths(evidence: Evidence) -> Iterator[Finding]:
    """Output lengths against the tokens and the iterations that the stamps show.

    Three ways, each without a model of the engine. (1) The number of token times: never above the length. (2) Requests
    that share the iteration of their first token must end in the order of their lengths (and those that share the last,
    begin in it): stamps of one iteration are identical, so a single contradiction is proof. (3) The iterations that an
    engine makes are the same for all its requests (``replay.checks.step_clock``): lengths that depart from them by more
    than the others do are not the engine's. Clients that re-tokenise the text get counts that are off by up to 30 %,
    and TPOT with them.
    """
    if evidence.trace.batches is not None:
        return
    yield from _against_chunks(evidence)
    if not evidence.one_clock or not (evidence.arrivals_measured or evidence.trace.has("scheduled")):
        return
    rows = evidence.decoding & evidence.straight
    contradictions = _contradictions(evidence, rows)
    wrong, ratios, examined = _by_iterations(evidence, rows)
    if wrong.size:
        by = float(np.median(ratios))
        # Data-parallel engines need not keep the same time.
        several = evidence.argument("data_parallel_size") not in (None, 1)
        preempted = " or preempted" if by > 0 and not evidence.trace.has("preemptions") else ""
        yield evidence.found(
            "output_lengths",
            "error" if contradictions.size else "info" if several else "warning" if preempted else "error",
            f"{wrong.size:,} of {examined:,} requests have output lengths that are {100 * abs(1 / (1 + by) - 1):.1f} % "
            f"{'shorter' if by > 0 else 'longer'} (median) than the iterations that the others made in the same time: "
            f"they were re-tokenised{preempted}; take the server's usage, else their TPOT is off by as much",
            wrong,
            {"examined": examined, "share": wrong.size / examined, "by": by, "contradictions": contradictions.size},
        )
    elif contradictions.size:
        untold = "" if evidence.trace.has("preemptions") else "requests were preempted (the trace does not tell), or "
        yield evidence.found(
            "output_lengths",
            "error" if evidence.trace.has("preemptions") else "info",
            f"{contradictions.size} requests shared an iteration with another one, yet the lengths of the two "
            f"contradict the order in which they ended: {untold}output lengths are not the engine's (re-tokenised "
            "text?); take the server's usage",
            contradictions,
            {"contradictions": contradictions.size},
        )


def _against_chunks(evidence: Evidence) -> Iterator[Finding]:
    if not evidence.trace.has("token_times"):
        return
    counts = evidence.chunk_counts
    more = evidence.ok & (counts > evidence.output)
    if more.any():
        ratio = float(np.median(counts[more] / np.maximum(evidence.output[more], 1)))
        yield evidence.found(
            "output_lengths",
            "error" if more.sum() > MANY * evidence.ok.sum() else "warning",
            f"{int(more.sum())} requests got more chunks than they have output tokens ({ratio:.2f} times as many in "
            "the median): lengths were re-tokenised, or events without tokens are counted; take the server's usage",
            more,
            {"chunks_per_token": ratio},
        )


def _by_iterations(evidence: Evidence, rows: Rows) -> tuple[Ints, Floats, int]:
    """Rows whose lengths depart from the iterations of the others, by how much, and how many were looked at.

    None where iterations are recorded (``work_conservation``) or every token has its time: those tell exactly.
    """
    counted = evidence.trace.iterations is not None or bool((evidence.chunk_counts == evidence.output)[rows].all())
    long = np.flatnonzero(rows & (evidence.output > SHORTEST) & (not counted))
    examined = 0
    wrong, ratios = [np.zeros(0, dtype=np.int64)], [np.zeros(0)]
    for window in _windows(long[np.argsort(evidence.first[long], kind="stable")]):
        if window.size < FEWEST:
            continue
        examined += window.size
        steps = evidence.output[window] - 1
        ratio, deviation = departures(evidence.first[window], evidence.last[window], steps)
        off = (np.abs(ratio) > max(OFF, OUTLIER * deviation)) & (np.abs(ratio) * steps > STEPS_OFF)
        if deviation <= UNSURE and off.sum() > MANY * window.size:
            wrong.append(window[off])
            ratios.append(ratio[off])
    found = np.concatenate(wrong)
    order = np.argsort(found, kind="stable")
    return found[order], np.concatenate(ratios)[order], examined


def _windows(rows: Ints) -> list[Ints]:
    """All rows, or some stretches of them, evenly spread."""
    if rows.size <= WINDOW:
        return [rows]
    count = min(WINDOWS, -(-rows.size // WINDOW))
    starts = np.linspace(0, rows.size - WINDOW, count).astype(int)
    return [rows[start : start + WINDOW] for start in starts]


def _contradictions(evidence: Evidence, rows: Rows) -> Ints:
    """Rows that share the stamp of one end with a row whose other end contradicts the two lengths.

    Only stamps of the engine tell iterations (several data-parallel engines do not share them), and only fine ones.
    """
    if not evidence.trace.has("scheduled") or evidence.resolution > FINE * evidence.step:
        return np.zeros(0, dtype=np.int64)
    some = np.flatnonzero(rows)
    first, last = (np.round(one[some] / RESOLUTION) for one in (evidence.first, evidence.last))
    length = evidence.output[some]
    found = []
    for shared, other, sign in ((first, last, 1), (last, first, -1)):
        order = np.lexsort((other, shared))
        same = np.diff(shared[order]) == 0
        bad = same & (np.sign(np.diff(other[order])) != sign * np.sign(np.diff(length[order])))
        found += [order[1:][bad], order[:-1][bad]]
    return np.unique(some[np.concatenate(found)])
