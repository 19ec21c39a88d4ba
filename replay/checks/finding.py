"""What a check says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

SEVERITIES = ("info", "warning", "error")
"""In rising order. A warning makes figures unsure, an error makes them wrong."""
MOST_IDS = 1000
"""Ids that a finding keeps; ``values["requests"]`` is their number all the same."""


@dataclass(frozen=True)
class Finding:
    """One thing to know about a trace.

    Parameters
    ----------
    check : str
        Stable name of the check, such as ``littles_law``.
    severity : {"info", "warning", "error"}
    sentence : str
        What was found, and what to do about it. Foreign text in it is not escaped.
    requests : tuple of str
        Ids of the requests concerned; empty if it is about the whole run.
    values : mapping of str to float
        The figures behind the sentence.
    """

    check: str
    severity: str
    sentence: str
    requests: tuple[str, ...] = ()
    values: Mapping[str, float] = field(default_factory=dict)
