"""What measured latencies count from: the arrival at the front end, or the engine's own queue stamp."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calibrate.metric_errors import MetricErrors, levels_of
from calibrate.pairing import served
from replay.trace import Trace

Floats = npt.NDArray[np.float64]

ANCHORS = ("arrival", "queued")
ANCHORED = ("ttft", "e2e", "queue_time")
"""Metrics that depend on the anchor."""
SERVED = ("ttft", "tpot", "e2e")


@dataclass(frozen=True)
class Served:
    """Measured levels (s) by metric, over all ``n`` requests that were served, paired or not."""

    n: int
    levels: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class AnchorErrors:
    """Errors of the pairs by one anchor, of the metrics in ``ANCHORED``, and what was measured of all served."""

    metrics: Mapping[str, MetricErrors]
    served: Served


@dataclass(frozen=True)
class AnchorGap:
    """Seconds from arrival to queue stamp over all served requests, and a sentence that says what lies in them."""

    n: int
    mean: float
    median: float
    largest: float
    sentence: str


def anchors_of(trace: Trace) -> tuple[str, ...]:
    """Anchors that a trace has stamps for."""
    return ANCHORS if trace.has("queued") else ANCHORS[:1]


def served_of(trace: Trace, anchor: str) -> Served:
    """Levels of all served requests: those of LLMServingSim's ``llmservingsim_summary.txt`` by ``queued``.

    That file has means, medians and linear percentiles (``numpy.percentile``) over all finished requests, in ms.
    """
    fine = served(trace)
    levels = {}
    for metric in SERVED:
        values = trace.latency(metric, anchor)[fine]
        values = values[~np.isnan(values)]
        if values.size:
            levels[metric] = levels_of(values)
    return Served(int(fine.sum()), levels)


def gap_of(trace: Trace) -> AnchorGap | None:
    """Return how far the two anchors lie apart, None if only one was stamped."""
    gaps = (trace.column("queued") - trace.start)[served(trace)]
    gaps = gaps[~np.isnan(gaps)]
    if not gaps.size:
        return None
    mean, median, largest = (1e3 * float(one) for one in (gaps.mean(), np.median(gaps), gaps.max()))
    sentence = (
        f"Latencies from the arrival are longer than those from the queue stamp by {mean:.1f} ms on average (median "
        f"{median:.1f}, largest {largest:.1f}): vLLM stamps `queued` only between two steps, so the time in the front "
        "end and the wait for the step in flight lie before it. A simulated latency holds that wait: compare by arrival"
    )
    if "arrival_to_queued" in (trace.meta.get("clock") or {}):
        sentence += " (the two clocks are aligned so that the smallest such time of the run counts as 0)"
    return AnchorGap(int(gaps.size), mean / 1e3, median / 1e3, largest / 1e3, sentence + ".")
