"""When requests came: clocks that are not one, drift between them, arrivals that were moved, late clients.

vLLM stamps ``arrival`` in its front end (on the wall clock) and ``queued`` in the engine (monotonic), between steps: a
request waits for the step in flight and no longer. So between its arrival and its queue stamp at most one or two
iterations end, whatever the load, and the shortest way from arrival to queue stays what it is over the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from replay.checks.evidence import Evidence, Ints, Rows
from replay.checks.finding import Finding
from replay.trace import Floats, Trace

FEW = 10
"""Requests with both stamps below which nothing is said."""
JITTER = 1e-3
"""Seconds by which stamps of one clock may lie the wrong way round: rounding, and who stamps first."""
MOST_AHEAD = 0.01
"""Seconds of that from which clocks are two."""
LONGEST_WAY = 1.0
"""Seconds from front end to engine that every request took: more is another clock."""
MOST_LOOKS = 10
"""Iterations that can end before an engine, which looks for arrivals after each, takes a request in."""
MIXED = 0.01
"""Share of requests taken in later than that, from which clocks are mixed."""
APART = 0.25
"""Gap between two groups of ways to the queue, as a share of the larger group's own range, from which they are two."""
FEWEST_DRIFT = 40
LATE = 0.05
"""Lateness of an open loop against its plan, as a share of the run, from which its client counts as saturated."""
LEAST_LATE = 0.5
"""Seconds of it below which nothing is said."""
SPREAD = 10.0
"""Median absolute deviations from the median lateness beyond which a single request was sent at another time."""


@dataclass(frozen=True)
class WayToQueue:
    """From arrival to queue stamp, shape (n,) each.

    ``lag`` in seconds (NaN where unknown); ``there`` where it is known; ``looks`` the iterations that are known to have
    ended in between (0 where unknown).
    """

    lag: Floats
    there: Rows
    looks: Ints

    @property
    def passed_over(self) -> Rows:
        """Requests that an engine would have taken in long before it is said to have."""
        return self.looks > MOST_LOOKS

    @property
    def mixed(self) -> bool:
        """Whether so many were that clocks must be several."""
        return bool(self.passed_over.sum() > max(1, MIXED * self.there.sum()))


def way_to_queue(trace: Trace) -> WayToQueue | None:
    """Measure it; None if no request has both stamps."""
    arrival, queued = trace.column("arrival"), trace.column("queued")
    lag = queued - arrival
    there = ~np.isnan(lag)
    if not there.any():
        return None
    ends = np.unique(np.concatenate([trace.column("first_token"), trace.column("last_token")]))
    ends = ends[~np.isnan(ends)]
    looks = np.where(there, np.searchsorted(ends, queued) - np.searchsorted(ends, arrival, side="right"), 0)
    return WayToQueue(lag, there, looks.astype(np.int64))


def drift(trace: Trace, way: WayToQueue, leave_out: Rows | None = None) -> float:
    """Seconds by which the shortest way to the queue grew from the run's first quarter of arrivals to its last.

    0 with fewer than 40 requests, or if it is within chance. Rows of known trouble can be left out. The shortest of
    many ways holds no wait, so it moves only if the clocks do, or if the front end falls behind.
    """
    use = way.there if leave_out is None else way.there & ~leave_out
    if use.sum() < FEWEST_DRIFT:
        return 0.0
    arrival, lag = trace.column("arrival")[use], way.lag[use]
    quarters = np.array_split(lag[np.argsort(arrival, kind="stable")], 4)
    moved = float(quarters[-1].min() - quarters[0].min())
    return moved if abs(moved) > MOST_AHEAD and abs(moved) > 0.5 * float(np.median(lag)) else 0.0


def lateness(trace: Trace) -> tuple[float, float] | None:
    """Seconds by which an open loop's client fell behind over the run, and the plan's span; None if it kept up.

    Told by medians of the first and last tenth of the requests by plan.
    """
    planned, sent = trace.column("nominal_arrival"), trace.column("arrival")
    there = ~(np.isnan(planned) | np.isnan(sent))
    if there.sum() < FEW:
        return None
    order = np.argsort(planned[there], kind="stable")
    late = (sent - planned)[there][order]
    tenth = max(1, late.size // 10)
    behind = float(np.median(late[-tenth:]) - np.median(late[:tenth]))
    span = float(np.ptp(planned[there]))
    return (behind, span) if behind >= max(LEAST_LATE, LATE * span) else None


def mixed_clocks(evidence: Evidence) -> Iterator[Finding]:
    """Every request took more than a second to the queue: arrivals and engine stamps count from different instants."""
    way = _measured(evidence)
    if way is None:
        return
    least = float(np.nanmin(way.lag))
    if least > LONGEST_WAY:
        yield evidence.found(
            "mixed_clocks",
            "error",
            f"every request was queued {least:.3f} s or more after it arrived: arrivals and engine stamps are of two "
            "clocks; bring them onto one",
            values={"least": least},
        )


def shifted_arrivals(evidence: Evidence) -> Iterator[Finding]:
    """Arrivals of a part of the requests that cannot be right against the engine's queue stamps, or the plan.

    Found three ways: queued before it arrived; queued although many iterations had ended since it arrived; a second
    group of ways to the queue, apart from the rest by more than chance. Where arrivals were aligned by the shortest way
    (``replay.clocks``) it is the larger group that seems late, so the smaller group is named, whichever side it is on.
    Without queue stamps, arrivals far off the plan are named.
    """
    way = _measured(evidence)
    if way is None:
        yield from _off_plan(evidence)
        return
    rows, by = _shifted(way)
    if rows is None:
        return
    share = rows.sum() / way.there.sum()
    yield evidence.found(
        "shifted_arrivals",
        "error" if abs(by) > MOST_AHEAD else "warning",
        f"{int(rows.sum())} of {int(way.there.sum())} requests arrived {abs(by):.3f} s too "
        f"{'late' if by > 0 else 'early'} against the engine's queue stamps (an engine takes arrivals in after every "
        "iteration): their clock is another, or the front end held them up; their TTFT and E2E are off by as much",
        rows,
        {"shift": by, "share": share, "most_iterations_passed": float(way.looks.max())},
    )


def _measured(evidence: Evidence) -> WayToQueue | None:
    return way_to_queue(evidence.trace) if evidence.arrivals_measured else None


def _shifted(way: WayToQueue) -> tuple[Rows | None, float]:
    """Rows whose arrivals were moved, if any, and by how much they are too late."""
    rows, by = _second_group(way)
    if rows is not None:
        return rows, by
    early = np.where(way.there, -way.lag, -np.inf) > JITTER
    if early.any():
        return early, float(np.median(-way.lag[early]))
    if not way.mixed:
        return None, 0.0
    rest = way.lag[way.there & ~way.passed_over]
    return way.passed_over, float((np.median(rest) if rest.size else 0.0) - np.median(way.lag[way.passed_over]))


def _second_group(way: WayToQueue) -> tuple[Rows | None, float]:
    """The smaller of two groups of ways to the queue that lie apart, and by how much its arrivals are too late."""
    lag = way.lag[way.there]
    if lag.size < FEW:
        return None, 0.0
    order = np.sort(lag)
    gaps = np.diff(order)
    place = int(np.argmax(gaps))
    low, high = order[: place + 1], order[place + 1 :]
    smaller, larger = (low, high) if low.size < high.size else (high, low)
    if smaller.size < max(2, MIXED * lag.size) or gaps[place] < max(MOST_AHEAD, APART * np.ptp(larger)):
        return None, 0.0
    above = way.there & (way.lag >= high[0])
    # A step that many waited for is no shift: at most one iteration, that step, has ended meanwhile.
    if low[0] >= -JITTER and np.median(way.looks[above]) < 2:
        return None, 0.0
    rows = above if smaller is high else way.there & ~above
    return rows, float(np.median(larger) - np.median(smaller))


def _off_plan(evidence: Evidence) -> Iterator[Finding]:
    """Without queue stamps: requests sent at another time than planned, while most were sent on time."""
    if not evidence.arrivals_measured or lateness(evidence.trace) is not None:
        return
    late = evidence.arrival - evidence.trace.column("nominal_arrival")
    there = ~np.isnan(late)
    if there.sum() < FEW:
        return
    middle = float(np.median(late[there]))
    spread = float(np.median(np.abs(late[there] - middle)))
    rows = there & (np.abs(late - middle) > max(SPREAD * spread, 0.1))
    if rows.sum() > MIXED * there.sum():
        by = float(np.median(late[rows]) - middle)
        yield evidence.found(
            "shifted_arrivals",
            "warning",
            f"{int(rows.sum())} of {int(there.sum())} requests were sent {abs(by):.3f} s "
            f"{'after' if by > 0 else 'before'} their plan, the others on time: the client stalled, or their "
            "arrivals were moved",
            rows,
            {"shift": by, "share": rows.sum() / there.sum()},
        )


def clock_drift(evidence: Evidence) -> Iterator[Finding]:
    """The shortest way from arrival to queue moves over the run: its two clocks run at different speeds."""
    way = _measured(evidence)
    moved = drift(evidence.trace, way, _shifted(way)[0]) if way is not None else 0.0
    if moved:
        span = float(np.nanmax(evidence.arrival) - np.nanmin(evidence.arrival))
        yield evidence.found(
            "clock_drift",
            "warning",
            f"the shortest way from arrival to queue moved by {1e3 * moved:.1f} ms over the {span:.0f} s of arrivals: "
            "its two clocks drift apart, or the front end fell behind; TTFT and E2E of late requests are off by that",
            values={"seconds": moved, "per_second": moved / (0.75 * span)},
        )


def late_sends(evidence: Evidence) -> Iterator[Finding]:
    """A client that fell behind its plan: saturated, or limited in concurrency. The load was not the planned one."""
    behind = lateness(evidence.trace) if evidence.arrivals_measured else None
    if behind is not None:
        seconds, span = behind
        yield evidence.found(
            "late_sends",
            "warning",
            f"the client fell behind its plan: the last tenth of the requests were sent {seconds:.1f} s later than "
            f"planned (over {span:.0f} s): it was saturated, or its concurrency limited; the figures hold for the "
            "arrivals as measured, not for the planned rate",
            values={"seconds": seconds, "span": span},
        )
