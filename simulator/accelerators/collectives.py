"""Latency-bandwidth models of collectives between the devices of one node."""

from __future__ import annotations

from simulator.hardware import Interconnect


def ring_all_reduce(num_bytes: float, num_devices: int, link: Interconnect) -> float:
    """Seconds of a ring all-reduce of ``num_bytes``: 2 (n-1) hops, each moving 1/n of the tensor."""
    if num_devices < 2:
        return 0.0
    hops = 2 * (num_devices - 1)
    return hops * (link.latency + num_bytes / (num_devices * link.bandwidth))
