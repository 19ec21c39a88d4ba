"""A device and its links, in datasheet numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

HALVES = ("bfloat16", "float16")
STAND_INS: Mapping[str, tuple[str, ...]] = {
    "fp4": ("fp8", *HALVES),
    "int4": ("fp8", "int8", *HALVES),
    "fp8": HALVES,
    "int8": HALVES,
    "float16": ("bfloat16", "float32"),
    "bfloat16": ("float16", "float32"),
    "float32": HALVES,
}
"""What multiplies matrices of a type where a device has no units for it; integer units cannot for floats."""


@dataclass(frozen=True, slots=True)
class Interconnect:
    """Links between the devices of one node: bytes/s per device and direction, seconds per hop."""

    kind: str = "none"
    bandwidth: float = 0.0
    latency: float = 0.0


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device: bytes, bytes/s, dense FLOP/s by dtype (names as in ``model.BYTES``)."""

    name: str
    memory_bytes: float
    memory_bandwidth: float
    peak_flops: Mapping[str, float]
    interconnect: Interconnect = field(default_factory=Interconnect)

    def flops(self, dtype: str) -> float:
        """Peak FLOP/s for matrices of that dtype; a type that can hold it stands in for one without units."""
        for name in (dtype, *STAND_INS.get(dtype, ())):
            if name in self.peak_flops:
                return self.peak_flops[name]
        return max(self.peak_flops.values())
