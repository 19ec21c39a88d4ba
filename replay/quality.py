"""What is wrong with measured data, said before anything is judged by it.

``examine`` asks every check of ``replay.checks``. None of them simulates: they compare the parts of a trace with each
other, with the laws that any queue keeps, and (with a deployment) with its arguments and datasheet.
"""

from __future__ import annotations

from collections.abc import Iterable

from profiles.deployment import Deployment
from replay.checks import arrivals, balance, chunks, lengths, outcomes, output_lengths, prompts, stamps, warm_up
from replay.checks.evidence import Evidence
from replay.checks.finding import MOST_IDS, SEVERITIES, Finding
from replay.trace import Trace

__all__ = ["CHECKS", "MOST_IDS", "SEVERITIES", "Finding", "doubts", "examine"]

CHECKS = (
    outcomes.duplicates,
    outcomes.failures,
    outcomes.truncated,
    lengths.impossible_lengths,
    output_lengths.output_lengths,
    stamps.coarse_stamps,
    stamps.smeared_stamps,
    arrivals.mixed_clocks,
    arrivals.shifted_arrivals,
    arrivals.clock_drift,
    arrivals.late_sends,
    balance.littles_law,
    balance.work_conservation,
    balance.token_totals,
    balance.kv_use,
    chunks.token_bursts,
    chunks.empty_first_chunk,
    prompts.repeated_prompts,
    prompts.hidden_prefix_hits,
    warm_up.warm_up,
)
"""Each takes an ``Evidence`` and yields findings; docs/data-quality.md says what they mean."""


def examine(trace: Trace, deployment: Deployment | None = None) -> tuple[Finding, ...]:
    """Return what is to be known of a trace before it is compared or fitted, the most severe first.

    Parameters
    ----------
    trace : Trace
        As measured.
    deployment : Deployment, optional
        What it is said to have run on: adds checks against engine arguments and datasheet.
    """
    evidence = Evidence(trace, deployment)
    found = [one for check in CHECKS for one in check(evidence)]
    return tuple(sorted(found, key=lambda one: -SEVERITIES.index(one.severity)))


def doubts(findings: Iterable[Finding]) -> list[Finding]:
    """Those that make figures unsure or wrong."""
    return [one for one in findings if one.severity != "info"]
