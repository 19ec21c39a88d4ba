"""Which requests a run holds, and what became of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow.compute as pc

from replay.checks.evidence import Evidence, present
from replay.checks.finding import Finding

FEW = 10
"""Requests served below which a run tells hardly anything."""
LOST = 0.05
"""Share of requests without a measurement from which those left may no longer stand for the run."""
CUT_OFF = 0.1
"""Share of the most requests ever present that end in the run's last iteration, from which it was cut off there."""
FEWEST_CUT = 5
MOSTLY = 0.5
"""Share of the last tenth of the requests without an end, from which the run was cut off while it served them."""


def duplicates(evidence: Evidence) -> Iterator[Finding]:
    """Ids that stand twice, and requests equal to another in arrival, stamps and lengths (a file read twice).

    Arrivals are stamped to a microsecond or so, so two requests with the same one, the same first and last token and
    the same lengths are one. Batches, whose requests have no stamps of their own, are left out.
    """
    trace = evidence.trace
    ids = trace.requests.column("id")
    if pc.count_distinct(ids).as_py() < len(ids):
        counts = pc.value_counts(ids)
        twice = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
        rows = np.asarray(pc.is_in(ids, value_set=twice), dtype=bool)
        yield evidence.found(
            "duplicate_ids",
            "error",
            f"{len(twice)} ids stand more than once: requests cannot be paired with their predictions; give every "
            "request an id of its own",
            rows,
        )
    if trace.batches is not None or not evidence.arrivals_measured:
        return
    columns = (evidence.arrival, evidence.first, evidence.last, evidence.prompt, evidence.output)
    _, place, sent = np.unique(evidence.arrival, return_inverse=True, return_counts=True)
    whole = np.flatnonzero((sent[place] > 1) & ~np.isnan(np.sum(columns, axis=0)))
    order = whole[np.lexsort([one[whole] for one in columns])]
    same = np.concatenate([[False], np.all([np.diff(one[order]) == 0 for one in columns], axis=0)])[: order.size]
    alike = np.cumsum(~same) - 1
    # Where requests are sent together, some are served alike: only if all of them are, they are one.
    repeated = np.sort(order[same & (np.bincount(alike)[alike] == sent[place[order]])])
    if repeated.size:
        yield evidence.found(
            "identical_rows",
            "warning",
            f"{repeated.size} requests equal another one in arrival, first and last token and both lengths: the same "
            "request stands twice, and the replay serves it twice; drop the copies",
            repeated,
        )


def failures(evidence: Evidence) -> Iterator[Finding]:
    """Requests that failed, never ended or gave no token, as shares of the run.

    Failed ones are not replayed (how long they loaded the engine is unknown), the others are not scored.
    """
    trace, count = evidence.trace, len(evidence.trace)
    served = int(evidence.ok.sum())
    kinds = {
        "failed": "failed: they are not replayed, and how long they loaded the engine is unknown",
        "unfinished": "did not end: they are replayed but not scored",
        "silent": "ended without a token that the client saw: they are replayed as prefills and not scored",
    }
    for status, meaning in kinds.items():
        rows = evidence.with_status(status)
        lost = int(rows.sum())
        if not lost:
            continue
        errors = [one for one in trace.requests.column("error").filter(rows).drop_null().to_pylist()[:1] if one]
        first = f"; the first error: {errors[0].splitlines()[-1][:200]}" if errors else ""
        advice = ". The rest may not stand for the run: record it again" if lost > LOST * count else ""
        yield evidence.found(
            f"{status}_requests",
            "error" if not served else "warning" if lost > LOST * count else "info",
            f"{lost:,} of {count:,} requests ({100 * lost / count:.1f} %) {meaning}{advice}{first}",
            rows,
            {"share": lost / count},
        )
    if 0 < served < FEW:
        yield evidence.found(
            "few_requests",
            "warning",
            f"only {served} requests were served: percentiles and intervals tell hardly anything; record a hundred or "
            "more",
            values={"served": served},
        )


def truncated(evidence: Evidence) -> Iterator[Finding]:
    """A run that ended, or a recording that ended, while requests were being served.

    Three signs: fewer requests than the source says it sent; recorded iterations or gauges that stop before the last
    token; many requests of different lengths whose last token came with the run's last one, which in a run that drains
    is a coincidence.
    """
    trace = evidence.trace
    sent = (trace.meta.get("load") or {}).get("num_prompts")
    if isinstance(sent, int | float) and sent > len(trace):
        yield evidence.found(
            "truncated",
            "error",
            f"the source says that {sent:,} requests were sent and holds {len(trace):,}: the file is cut off, and the "
            "load of the others is missing",
            values={"sent": sent, "held": len(trace)},
        )
    if trace.batches is not None or not evidence.one_clock or not evidence.decoding.any():
        return
    yield from _cut_recordings(evidence)
    yield from _unfinished_end(evidence)
    some = evidence.decoding
    end = float(evidence.last[some].max())
    together = some & (evidence.last >= end - evidence.step)
    most = float(present(evidence.first[some], evidence.last[some], np.sort(evidence.first[some])).max())
    lengths = np.unique(evidence.output[together]).size
    count = int(together.sum())
    if count >= max(FEWEST_CUT, CUT_OFF * most) and lengths > count / 2:
        yield evidence.found(
            "truncated",
            "warning",
            f"{count} requests of different lengths got their last token when the run ended: it was cut off, and "
            "their output lengths and latencies are too short; let the run drain, or leave these requests out",
            together,
            {"end": end},
        )


def _unfinished_end(evidence: Evidence) -> Iterator[Finding]:
    """Unfinished requests are those that came last: nobody let them end."""
    unfinished = evidence.with_status("unfinished")
    order = np.argsort(evidence.entered, kind="stable")
    by_arrival = unfinished[order]
    tail = by_arrival[-max(1, by_arrival.size // 10) :]
    begun = by_arrival[: max(1, by_arrival.size // 4)]
    if unfinished.sum() >= FEWEST_CUT and tail.mean() > MOSTLY and begun.mean() < 0.25 * tail.mean():
        yield evidence.found(
            "truncated",
            "warning",
            f"{int(unfinished.sum())} requests did not end, most of the last ones among them: the run was cut off "
            "while it served them; let it drain",
            unfinished,
        )


def _cut_recordings(evidence: Evidence) -> Iterator[Finding]:
    trace = evidence.trace
    last, first = float(np.nanmax(evidence.last)), float(np.nanmin(evidence.first))
    if trace.iterations is not None and trace.iterations.num_rows:
        start, duration = (trace.iterations.column(name).to_numpy() for name in ("start", "duration"))
        begin, end = float(start.min()), float((start + duration).max())
        missing = max(0.0, last - end) + max(0.0, begin - first)
        if missing > evidence.step:
            yield evidence.found(
                "truncated",
                "warning",
                f"recorded iterations leave out {missing:.3f} s of the time in which tokens came: the recording is cut "
                "off; fits use what is there, the schedule cannot be imposed whole",
                values={"seconds": missing},
            )
    gauges = trace.timeline
    if gauges is None or gauges.num_rows < 2:
        return
    times, running = (gauges.column(name).to_numpy() for name in ("time", "running"))
    tick = float(np.median(np.diff(times)))
    if last - times[-1] > 3 * tick and np.nan_to_num(running)[-1] > 0:
        yield evidence.found(
            "truncated",
            "warning",
            f"the gauges stop {last - times[-1]:.1f} s before the last token, with {running[-1]:.0f} requests "
            "running: averages over them leave the rest of the run out",
            values={"seconds": last - float(times[-1])},
        )
