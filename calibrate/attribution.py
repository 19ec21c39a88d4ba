"""Where an error comes from: step time, scheduling, queueing, front end, data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PARTS = ("step_time", "scheduling", "queueing", "front_end", "data", "unexplained")


@dataclass(frozen=True)
class Share:
    """One part's contribution to a signed relative error.

    ``points`` is a fraction of the measured statistic (0.04: 4 points); the parts of one statistic sum to its error.
    """

    part: str
    points: float
    sentence: str = ""


@dataclass(frozen=True)
class Attribution:
    """Errors split by cause.

    Parameters
    ----------
    method : {"recorded iterations", "reconstructed schedule", "none"}
        Where the imposed schedule comes from.
    why_not : str
        If there is none: the reason, and what to record.
    parts : mapping of str to mapping of str to tuple of Share
        By metric (``ttft``) and statistic (``mean``, ``p99``).
    load : mapping of str to float
        Utilisation and the distance to saturation.
    sentences : tuple of str
        The result in words, most important first.
    """

    method: str
    why_not: str
    parts: Mapping[str, Mapping[str, tuple[Share, ...]]]
    load: Mapping[str, float]
    sentences: tuple[str, ...]
