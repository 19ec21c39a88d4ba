"""Output tokens per second and makespan of two runs, with intervals of their errors."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from calibrate.intervals import Interval, Resamples, interval, ratio

Floats = npt.NDArray[np.float64]


def between_ends(starts: Floats, ends: Floats) -> Floats:
    """Seconds between completions, the first from the first start; shape (requests,), their sum is the makespan."""
    return np.diff(np.sort(ends), prepend=starts.min(initial=np.inf))


def throughput_intervals(measured: Floats, predicted: Floats, tokens: float = 1.0) -> dict[str, Interval]:
    """95 % intervals of the relative errors of makespan and tokens per second.

    A makespan is a sum: of the times between completions (``between_ends``), or of the batches'. Blocks of its parts
    are drawn from both sides alike, so that a difference that later stretches make good is not counted as one.

    Parameters
    ----------
    measured, predicted : array (parts,)
        Parts of the makespan, in order.
    tokens : float
        Predicted output tokens, as a share of the measured ones.
    """
    resamples, places = Resamples(measured.size), np.arange(measured.size)
    if measured.size < 2:
        return dict.fromkeys(("output_tokens_per_s", "makespan"), (np.nan, np.nan))
    longer = ratio(resamples.sums(places, predicted), resamples.sums(places, measured))
    return {"output_tokens_per_s": interval(tokens / longer - 1), "makespan": interval(longer - 1)}
