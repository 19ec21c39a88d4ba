"""Linear model: an iteration's time as a sum of raw features of the batch, each times a fitted coefficient."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from simulator.accelerators.base import Floats
from simulator.batch import Batch
from simulator.errors import SimulationError


class Linear:
    """Prices a batch by coefficients alone; for devices of which nothing but measured steps is known.

    Parameters
    ----------
    seconds : mapping of str to float
        Seconds per unit of each feature in ``Linear.components``; features left out cost nothing.

    Raises
    ------
    SimulationError
        If a feature is unknown, a coefficient negative or not finite, or all are zero.
    """

    components = (
        "step",
        "sequence",
        "token",
        "prefill_step",
        "prefill_attention",
        "decode_attention",
    )
    """Per step; per sequence; per token; per step with a prefill chunk; per ``q (c + q/2)`` over chunks of q
    tokens after c computed ones; per token of context over decodes."""

    def __init__(self, seconds: Mapping[str, float]) -> None:
        unknown = set(seconds) - set(self.components)
        if unknown:
            raise SimulationError(
                f"linear accelerator: {min(unknown)!r} is no feature; there are " + ", ".join(self.components)
            )
        self.seconds = {name: float(seconds.get(name, 0.0)) for name in self.components}
        usable = all(math.isfinite(rate) and rate >= 0 for rate in self.seconds.values())
        if not usable or not any(self.seconds.values()):
            raise SimulationError("linear accelerator: expected coefficients >= 0, one of them > 0")
        self._rates = tuple(self.seconds.values())

    @staticmethod
    def features(batch: Batch) -> tuple[float, ...]:
        """Units of each component in a batch."""
        return (
            1.0,
            batch.num_seqs,
            batch.num_tokens,
            1.0 if batch.prefills else 0.0,
            sum(query * (context + query / 2) for query, context in batch.prefills),
            batch.decode_context,
        )

    def step(self, batch: Batch) -> Sequence[float]:
        """Return seconds per component."""
        return tuple(rate * unit for rate, unit in zip(self._rates, self.features(batch), strict=True))

    def decode_run(self, batch: Batch, steps: int) -> Floats:
        """Return seconds per step and component, each step as ``step`` prices it."""
        run: Floats = np.tile(np.array(self.step(batch), dtype=np.float64), (steps, 1))
        run[:, -1] = self._rates[-1] * (batch.decode_context + batch.num_decodes * np.arange(steps))
        return run
