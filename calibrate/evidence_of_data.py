"""Stamps and lengths of a trace that its own engine's schedule contradicts, and what they must have been.

An engine looks for arrivals after every iteration. So a request that it queued when one iteration had ended arrived
while that one ran: later is impossible, earlier means that something lay in between: the front end if neighbours were
held up too, else the arrival stamp is wrong. Likewise a request gets one token an iteration, so the iterations between
its first and its last token say how many tokens the engine made, whatever a tokeniser counts afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.ndimage import median_filter

from calibrate.least_squares import scatter
from calibrate.measured_schedule import FEWEST, FEWEST_SHARE, MeasuredSchedule, with_columns
from replay.trace import Trace

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.bool_]

CLOCK = 2e-3
"""Seconds by which stamps of one instant may differ."""
LEAST_HELD_UP = 0.05
ODD = 6.0
"""Seconds, and robust standard deviations, by which one request's way to the engine must exceed its neighbours'."""
NEIGHBOURS = 15
"""Requests, in order of arrival, over which the usual way to the engine is taken."""
LEAST_LENGTH = 0.03
"""Share by which a length must differ from the schedule's, and two tokens."""


@dataclass(frozen=True)
class DataEvidence:
    """A trace as its engine's schedule says it was.

    Parameters
    ----------
    cleaned : Trace
        With arrivals and output tokens put right.
    held_up : array (requests,)
        Seconds between arrival and engine beyond the iteration that ran: the front end.
    arrivals, lengths : array of bool (requests,)
        Whose were wrong.
    sentences : tuple of str
    """

    cleaned: Trace
    held_up: Floats
    arrivals: Rows
    lengths: Rows
    sentences: tuple[str, ...]

    @property
    def wrong(self) -> bool:
        """Whether anything was."""
        return bool(self.arrivals.any() or self.lengths.any())


def data_evidence(trace: Trace, schedule: MeasuredSchedule) -> DataEvidence:
    """Hold a trace's arrivals and lengths against its schedule."""
    tokens, lengths = _lengths(trace, schedule)
    arrival, held_up, arrivals = _arrivals(trace, schedule)
    sentences = []
    if arrivals.any():
        off = np.abs(trace.column("arrival") - arrival)[arrivals]
        late = int(np.count_nonzero(trace.column("arrival")[arrivals] > arrival[arrivals]))
        sentences.append(
            f"{int(arrivals.sum())} of {len(trace)} arrival stamps cannot be right by about "
            f"{float(np.median(off)):.2f} s: {late} lie after the engine had queued the request, "
            f"{int(arrivals.sum()) - late} so long before that it would have been queued earlier, as those around it "
            "were; check the clock that stamps arrivals"
        )
    if lengths.any():
        ratio = float(np.median(trace.column("output_tokens")[lengths] / tokens[lengths]))
        sentences.append(
            f"{int(lengths.sum())} of {len(trace)} output lengths are not what the engine made: they are {ratio:.2f} "
            "times the iterations between first and last token, as if re-tokenised; take the engine's own counts"
        )
    cleaned = with_columns(trace, arrival=arrival, output_tokens=tokens) if sentences else trace
    return DataEvidence(cleaned, held_up, arrivals, lengths, tuple(sentences))


def _lengths(trace: Trace, schedule: MeasuredSchedule) -> tuple[Floats, Rows]:
    stated, told = trace.column("output_tokens"), schedule.tokens
    off = np.abs(stated - told)
    # A request that was aborted, or counted to a stop token, may lack one.
    wrong = np.nan_to_num(off) >= np.maximum(2.0, LEAST_LENGTH * np.nan_to_num(told))
    wrong &= np.nan_to_num(told) >= 1
    if wrong.sum() < max(FEWEST, FEWEST_SHARE * len(trace)):
        wrong[:] = False
    return np.where(wrong, told, stated), wrong


def _arrivals(trace: Trace, schedule: MeasuredSchedule) -> tuple[Floats, Floats, Rows]:
    """Arrivals put right, seconds that requests were held up on their way, and whose arrival was wrong."""
    arrival, queued = trace.column("arrival"), trace.column("queued")
    nothing = np.zeros(len(trace)), np.zeros(len(trace), dtype=bool)
    if np.isnan(queued).all():
        return arrival, *nothing
    ends = schedule.end
    # The engine looked at the latest end before it queued the request, and before that at the end before.
    look = np.searchsorted(ends, queued - 0.3 * schedule.typical, side="right") - 1
    earliest = np.where(look >= 0, ends[np.maximum(look, 0)], -np.inf)
    late = arrival - queued > CLOCK
    held_up = np.nan_to_num(np.maximum(earliest - arrival, 0.0), posinf=0.0, neginf=0.0)
    known = np.flatnonzero(~np.isnan(arrival) & ~np.isnan(queued))
    order = known[np.argsort(queued[known], kind="stable")]
    usual = np.zeros(len(trace))
    usual[order] = median_filter(held_up[order], size=min(NEIGHBOURS, max(order.size, 1)), mode="nearest")
    spread = scatter(held_up[known] - usual[known]) if known.size else 0.0
    early = held_up - usual > max(LEAST_HELD_UP, 2 * schedule.typical, ODD * spread)
    wrong = late | early
    middle = np.where(np.isfinite(earliest), (np.minimum(earliest, queued) + queued) / 2, queued)
    right = np.where(wrong, middle - np.where(early, usual, 0.0), arrival)
    return right, np.where(wrong, usual, held_up), wrong
