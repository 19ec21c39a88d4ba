"""The interface every accelerator model has, and how coefficients and host time join it."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import mul
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from simulator.batch import Batch
from simulator.errors import SimulationError

Floats = npt.NDArray[np.floating[Any]]

LONG_PREFILL = 1024
"""Tokens of a step beyond which prefill gets slower per token."""
SMALLEST_TILE = 16
"""Rows of one tile of the tensor cores' matrix product."""


@runtime_checkable
class AcceleratorModel(Protocol):
    """Prices one engine iteration.

    ``components`` names the parts of an iteration's time, in the order in which ``step`` returns them. All
    are non-negative; each times its coefficient they add up to the iteration. Two calls with equal batches return equal
    times.

    A model may say what its components are worth before anything is fitted: ``default_coefficients`` (mapping of str
    to float) where that is not 1, and ``expected_coefficients`` (mapping of str to mean and standard deviation), what
    coefficients a fit expects before it has seen data.

    A model whose times depend on nothing but the batch may also have ``decode_run(batch, steps)``: the seconds, shape
    (steps, components), of so many steps. The first is ``batch``, decodes alone; in each further one every decode has
    one more token of context. It must give to the bit what ``step`` gives. An engine then takes stretches in which
    nothing but decoding happens at once.
    """

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the parts of an iteration's time."""

    def step(self, batch: Batch) -> Sequence[float]:
        """Return seconds per component."""


@dataclass(frozen=True, slots=True)
class HostOverhead:
    """Time of an iteration that no device model sees: the engine's host, and how it launches the device.

    Parameters
    ----------
    per_step, per_sequence : float
        Seconds per iteration, and per sequence in it, that the device does not hide: input preparation, kernel
        launches, sampling, output processing. The defaults are a prior, not a measurement of the deployment at
        hand: kernel tables of an RTX PRO 6000 leave 0.2 to 0.6 ms of each vLLM 0.19 iteration unexplained, of
        which the middle is taken; work per sequence hides behind the device while scheduling is asynchronous.
    per_prefill_layer, per_prefill_token : float
        Seconds per decoder layer of an iteration that computes a prompt, and per prompt token in it, beyond what the
        device model says: such steps launch every layer's attention outside the captured CUDA graphs.
    per_padding_token, per_layer_beyond_graphs : float
        Seconds per token by which a step is padded to the next captured graph, and per decoder layer of a step that
        is larger than the largest and so launched kernel by kernel.
    per_longest_context : float
        Seconds per token of the longest decode context in a step, which its attention waits for.
    per_empty_query : float
        Seconds per place in the grid of a prefill step's attention that holds no query: the grid has the longest
        prefill chunk's tiles for every sequence (FlashAttention 2, variable lengths), decodes included.
    per_long_prefill_token : float
        Seconds per token of a prefill step beyond the first ``LONG_PREFILL``: activations outgrow the cache, and a
        device at its power limit lowers its clock.
    per_step_of_several_tokens, per_step_of_several_tiles : float
        Seconds per step of more than one token, padding included (matrices times matrices, no longer times a vector),
        and of more than ``SMALLEST_TILE``.
    capture_sizes : tuple of int
        Sizes of the captured graphs, ascending (``simulator.cuda_graphs``).
    num_layers : int
        Decoder layers of the model; 1 where it is not known, so that a layer is the whole model.
    """

    per_step: float = 0.4e-3
    per_sequence: float = 0.0
    per_prefill_layer: float = 0.0
    per_prefill_token: float = 0.0
    per_padding_token: float = 0.0
    per_layer_beyond_graphs: float = 0.0
    per_longest_context: float = 0.0
    per_empty_query: float = 0.0
    per_long_prefill_token: float = 0.0
    per_step_of_several_tokens: float = 0.0
    per_step_of_several_tiles: float = 0.0
    capture_sizes: tuple[int, ...] = ()
    num_layers: int = 1

    def seconds(self, batch: Batch) -> tuple[float, ...]:
        """Return the terms for a batch, in the order of ``HOST_COMPONENTS``."""
        tokens, sizes = batch.num_tokens, self.capture_sizes
        beyond = bool(sizes) and tokens > sizes[-1]
        padding = sizes[bisect_left(sizes, tokens)] - tokens if sizes and not beyond else 0
        return (
            self.per_step,
            self.per_sequence * batch.num_seqs,
            self.num_layers * self.per_prefill_layer if batch.prefills else 0.0,
            self.per_prefill_token * batch.num_prefill_tokens,
            self.per_padding_token * padding,
            self.num_layers * self.per_layer_beyond_graphs if beyond else 0.0,
            self.per_longest_context * batch.longest_context,
            self.per_empty_query * _empty_queries(batch),
            self.per_long_prefill_token * (max(0, tokens - LONG_PREFILL) if batch.prefills else 0),
            self.per_step_of_several_tokens if tokens + padding > 1 else 0.0,
            self.per_step_of_several_tiles if tokens + padding > SMALLEST_TILE else 0.0,
        )


HOST_COMPONENTS = {
    "host_step": "per_step",
    "host_sequence": "per_sequence",
    "host_prefill_layer": "per_prefill_layer",
    "host_prefill_token": "per_prefill_token",
    "graph_padding": "per_padding_token",
    "beyond_graphs": "per_layer_beyond_graphs",
    "longest_context": "per_longest_context",
    "attention_grid": "per_empty_query",
    "long_prefill_token": "per_long_prefill_token",
    "several_tokens": "per_step_of_several_tokens",
    "several_tiles": "per_step_of_several_tiles",
}
"""Component of each term of ``HostOverhead``."""


def _empty_queries(batch: Batch) -> int:
    if not batch.prefills:
        return 0
    return max(query for query, _ in batch.prefills) * batch.num_seqs - batch.num_tokens


@dataclass(frozen=True, slots=True)
class CallOverhead:
    """Time of one offline call (vLLM's ``LLM.generate``) that is no iteration's: sending requests, last outputs.

    Parameters
    ----------
    per_call, per_request : float
        Seconds per call, and per request handed over in it.
    """

    per_call: float = 0.0
    per_request: float = 0.0

    def seconds(self, requests: int) -> tuple[float, ...]:
        """Return the terms for a call of that many requests, in the order of ``CALL_COMPONENTS``."""
        return self.per_call, self.per_request * requests


CALL_COMPONENTS = {"call": "per_call", "call_request": "per_request"}
"""Component of each term of ``CallOverhead``."""


class WithHost:
    """An accelerator model, each component times its coefficient, and the host's overhead beside it.

    Parameters
    ----------
    device : AcceleratorModel
        What runs the kernels.
    host : HostOverhead
        Seconds per step and per sequence.
    coefficients : mapping of str to float
        Factors by name of a component or of ``CALL_COMPONENTS``; where absent the device's default, which is 1 unless
        it says otherwise.
    call : CallOverhead
        Seconds per offline call, which are part of no iteration.

    Raises
    ------
    SimulationError
        If a coefficient names no component, or is negative or not finite.
    """

    def __init__(
        self,
        device: AcceleratorModel,
        host: HostOverhead,
        coefficients: Mapping[str, float] | None = None,
        call: CallOverhead = CallOverhead(),
    ) -> None:
        self.device = device
        self.host = host
        self.call = call
        self.components = (*device.components, *HOST_COMPONENTS)
        factors = dict(coefficients or {})
        defaults: Mapping[str, float] = getattr(device, "default_coefficients", {})
        names = (*self.components, *CALL_COMPONENTS)
        self.coefficients = {name: factors.pop(name, defaults.get(name, 1.0)) for name in names}
        if factors:
            raise SimulationError(
                f"coefficient {next(iter(factors))!r}: this accelerator model has the components "
                + ", ".join((*self.components, *CALL_COMPONENTS))
            )
        for name, factor in self.coefficients.items():
            if not (math.isfinite(factor) and factor >= 0):
                raise SimulationError(f"coefficient {name!r}: expected a number of at least 0, found {factor}")
        self._factors = tuple(self.coefficients[name] for name in self.components)
        self._scaled = any(factor != 1.0 for factor in self._factors)
        self._decodes_alone: dict[int, tuple[float, ...]] = {}

    def step(self, batch: Batch) -> Sequence[float]:
        """Return seconds per component, coefficients applied."""
        parts = (*self.device.step(batch), *self._host_seconds(batch))
        if not self._scaled:
            return parts
        return tuple(map(mul, self._factors, parts))

    def decode_run(self, batch: Batch, steps: int) -> Floats:
        """Return seconds per step and component, each step as ``step`` prices it."""
        host: Floats = np.tile(np.array(self._host_seconds(batch), dtype=np.float64), (steps, 1))
        longest = list(HOST_COMPONENTS).index("longest_context")
        host[:, longest] = self.host.per_longest_context * (batch.longest_context + np.arange(steps))
        parts: Floats = np.concatenate([decode_run(self.device, batch, steps), host], axis=1)
        return np.asarray(parts * np.array(self._factors))

    def _host_seconds(self, batch: Batch) -> tuple[float, ...]:
        """The host's terms; without prompts and a price of contexts they follow from the number of tokens alone."""
        if batch.prefills or self.host.per_longest_context:
            return self.host.seconds(batch)
        found = self._decodes_alone.get(batch.num_tokens)
        if found is None:
            found = self._decodes_alone[batch.num_tokens] = self.host.seconds(batch)
        return found

    def call_seconds(self, requests: int) -> float:
        """Return the seconds that an offline call of that many requests takes beside its iterations."""
        terms = zip(CALL_COMPONENTS, self.call.seconds(requests), strict=True)
        return sum(self.coefficients[name] * seconds for name, seconds in terms)


def decode_run(model: AcceleratorModel, batch: Batch, steps: int) -> Floats:
    """Return what a model's ``decode_run`` does, by single steps where it has none."""
    at_once: Callable[[Batch, int], Floats] | None = getattr(model, "decode_run", None)
    if at_once is not None:
        return at_once(batch, steps)
    return np.array([model.step(batch.later(place)) for place in range(steps)], dtype=np.float64)
