"""Lengths that no request can have."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from replay.checks.evidence import Evidence, Rows
from replay.checks.finding import Finding
from replay.trace import Floats

AT_ONCE = 0.01
"""Share of requests with several tokens at one instant from which their times are doubted."""


def too_long(evidence: Evidence, max_model_len: int) -> Iterator[tuple[Rows, Floats, str]]:
    """Served rows that ``max_model_len`` does not allow, the tokens counted, and a template that says them."""
    prompt, total = evidence.prompt, evidence.prompt + evidence.output
    for tokens, counted, what in (
        (prompt + 1, prompt, "a prompt of {:,.0f} tokens and one of output"),
        (total, total, "{:,.0f} tokens in all"),
    ):
        rows = evidence.ok & (tokens > max_model_len)
        if rows.any():
            yield rows, counted, what


def impossible_lengths(evidence: Evidence) -> Iterator[Finding]:
    """Served requests of no tokens or of more than ``max_model_len``; several tokens in no time, one token in some.

    Tokens of one request come from different iterations, so a request of several tokens lasts (unless a client got
    them in one chunk), and a request of one has its first token for its last.
    """
    if evidence.trace.batches is None:
        yield from _without_time(evidence)
    none = evidence.ok & ~((evidence.prompt >= 1) & (evidence.output >= 1))
    if none.any():
        yield evidence.found(
            "impossible_lengths",
            "error",
            f"{int(none.sum())} served requests have no prompt or no output tokens: they cannot be replayed; take the "
            "lengths from the server's usage",
            none,
        )
    if evidence.deployment is None:
        return
    most = evidence.deployment.config.max_model_len
    for rows, counted, what in too_long(evidence, most):
        longest = float(counted[rows].max())
        yield evidence.found(
            "impossible_lengths",
            "error",
            f"{int(rows.sum())} requests were served that max_model_len={most:,} does not allow, the longest with "
            f"{what.format(longest)}: that is not the run's argument, or the lengths are wrong",
            rows,
            {"longest": longest},
        )
        return


def _without_time(evidence: Evidence) -> Iterator[Finding]:
    timed = evidence.ok & ~np.isnan(evidence.last - evidence.first)
    lasting = evidence.last > evidence.first
    a_step = 0.5 * np.nan_to_num(evidence.step)
    one = timed & (evidence.output == 1) & lasting & (evidence.last - evidence.first > a_step)
    at_once = timed & (evidence.output > 1) & ~lasting
    if one.any():
        yield evidence.found(
            "impossible_lengths",
            "warning",
            f"{int(one.sum())} requests of one output token got their last token after their first: tokens were not "
            "counted, or counted from re-tokenised text; take the server's usage",
            one,
        )
    if at_once.sum() > AT_ONCE * timed.sum():
        yield evidence.found(
            "impossible_lengths",
            "warning",
            f"{int(at_once.sum())} requests got several tokens at one instant: the response was not streamed, or only "
            "its end was stamped; their TTFT and TPOT are not measured",
            at_once,
        )
