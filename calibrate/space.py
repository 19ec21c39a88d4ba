"""The coefficients that a fit learns: names, what is expected of them, and the features of a batch."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from calibrate.batches import BatchSums, batch_sums
from profiles.deployment import Deployment
from replay.trace import Trace
from simulator.accelerators.base import (
    CALL_COMPONENTS,
    HOST_COMPONENTS,
    AcceleratorModel,
    CallOverhead,
    HostOverhead,
    WithHost,
)
from simulator.accelerators.linear import Linear
from simulator.batch import Batch

Floats = npt.NDArray[np.floating[Any]]
Rows = npt.NDArray[np.bool_]

HOST_UNITS = {
    "host_step": 1e-3,
    "host_sequence": 1e-5,
    "host_prefill_layer": 1e-3,
    "host_prefill_token": 1e-5,
    "graph_padding": 2e-4,
    "beyond_graphs": 1e-3,
    "longest_context": 5e-7,
    "attention_grid": 1e-7,
    "long_prefill_token": 1e-5,
    "several_tokens": 1e-4,
    "several_tiles": 1e-4,
}
"""Seconds of one unit of each term beside the device: a coefficient of 1 is a plausible size."""
CALL_UNITS = {"call": 1e-3, "call_request": 1e-4}
"""The same of the terms of an offline call."""
LINEAR_UNITS = {
    "step": 5e-3,
    "sequence": 1e-4,
    "token": 5e-5,
    "prefill_step": 5e-3,
    "prefill_attention": 1e-8,
    "decode_attention": 1e-7,
}
_LINEAR = Linear(LINEAR_UNITS)
SHORTEST = 0.01
"""Seconds. Spans shorter than this are weighted as if they were this long: their stamps have jitter too."""
FRONT_END = "front_end"
"""The coefficient of the way between client and engine, which is no part of an iteration."""
FRONT_END_UNIT = 1e-3
"""Seconds of one unit of it."""
FRONT_END_EXPECTED = (5.0, 10.0)
"""Mean and standard deviation, in units, before any data: HTTP, tokeniser and queues of a server take milliseconds."""
PRIOR_SPREAD = 0.5
"""Standard deviation of a device coefficient before any data, where the accelerator model does not say."""


@dataclass(frozen=True)
class FittedCoefficient:
    """A learned factor on one component: value, 95 % interval, where it started, and whether the data told it."""

    name: str
    value: float
    ci95: tuple[float, float]
    prior: float
    identified: bool


@dataclass(frozen=True)
class Equations:
    """``features @ coefficients = seconds``: one row a span of iterations, in order of time.

    ``weights`` are relative to the noise: that of a span grows with the root of its length (independent iterations),
    that of a batch with its length (all its iterations share the state of the device).
    """

    features: Floats
    seconds: Floats
    weights: Floats

    def __len__(self) -> int:
        return int(self.seconds.size)

    def rows(self, some: Any) -> Equations:
        """Some of the equations."""
        return Equations(self.features[some], self.seconds[some], self.weights[some])

    @classmethod
    def joined(cls, parts: Sequence[Equations]) -> Equations:
        """Those of several runs."""
        names = ("features", "seconds", "weights")
        return cls(*(np.concatenate([getattr(one, name) for one in parts]) for name in names))


_NO_CALL = (0.0,) * len(CALL_UNITS)
"""An iteration has no part in what a call costs beside it."""


class CoefficientSpace:
    """The coefficients of a deployment: names, prior values and spreads, and the features of a batch.

    A device component's feature is its seconds by the base profile, a host term's its unit's seconds times what it
    counts. A linear model has no physics: its coefficients are in plausible units, and only weakly held. With
    ``client``, there is one more coefficient, last: the front end's constant, of which no iteration has a part.
    """

    def __init__(self, deployment: Deployment, client: bool = False) -> None:
        self.client = client
        self._describe(deployment)
        if client:
            self._add_front_end(deployment)

    def _describe(self, deployment: Deployment) -> None:
        device: AcceleratorModel = deployment.accelerator.device
        own = deployment.accelerator.coefficients
        self.config = deployment.config
        self.linear = isinstance(device, Linear)
        call = deployment.accelerator.call
        calls = [own[name] * getattr(call, term) / CALL_UNITS[name] for name, term in CALL_COMPONENTS.items()]
        if isinstance(device, Linear):
            self.device: AcceleratorModel = _LINEAR
            self.host = HostOverhead(0.0, 0.0)
            self.names: tuple[str, ...] = (*device.components, *CALL_COMPONENTS)
            terms = [own[name] * device.seconds[name] / LINEAR_UNITS[name] for name in device.components]
            self.prior: Floats = np.array([*terms, *calls])
            self.spread: Floats = np.full(len(self.names), 10.0)
            self.least: Floats = np.zeros(len(self.names))
            self.chosen: Rows = np.ones(len(self.names), dtype=bool)
            return
        self.device = device
        self.names = (*device.components, *HOST_COMPONENTS, *CALL_COMPONENTS)
        host = deployment.accelerator.host
        fitted = deployment.loaded.profile.coefficients
        expected: Mapping[str, tuple[float, float]] = getattr(device, "expected_coefficients", {})
        floors: Mapping[str, float] = getattr(device, "floors", {})
        known = [name in fitted or name not in expected for name in device.components]
        factors = [
            own[name] if here else expected[name][0] for name, here in zip(device.components, known, strict=True)
        ]
        spreads = [expected[name][1] if name in expected else PRIOR_SPREAD for name in device.components]
        terms = [own[name] * getattr(host, term) / HOST_UNITS[name] for name, term in HOST_COMPONENTS.items()]
        units: dict[str, Any] = {term: HOST_UNITS[name] for name, term in HOST_COMPONENTS.items()}
        self.host = replace(host, **units)
        self.prior = np.array([*factors, *terms, *calls])
        self.least = np.array([floors.get(name, 0.0) for name in self.names])
        self.spread = np.array([*spreads, *(1.0 for _ in (*terms, *calls))])
        self.chosen = np.ones(len(self.names), dtype=bool)

    def _add_front_end(self, deployment: Deployment) -> None:
        known = deployment.loaded.profile.front_end
        mean = FRONT_END_EXPECTED[0] if known is None else known.per_request / FRONT_END_UNIT
        self.names = (*self.names, FRONT_END)
        self.prior = np.append(self.prior, mean)
        self.spread = np.append(self.spread, FRONT_END_EXPECTED[1])
        self.least = np.append(self.least, 0.0)
        self.chosen = np.append(self.chosen, True)

    def only(self, some: Rows) -> CoefficientSpace:
        """Return the space of some of the coefficients."""
        part = copy(self)
        part.names = tuple(name for name, there in zip(self.names, some, strict=True) if there)
        part.prior, part.spread, part.least = self.prior[some], self.spread[some], self.least[some]
        part.chosen = self.chosen.copy()
        part.chosen[self.chosen] = some
        return part

    @property
    def front_end_place(self) -> int | None:
        """Place of the front end's constant, if it is among the coefficients."""
        return self.names.index(FRONT_END) if FRONT_END in self.names else None

    def features(self, batch: Batch) -> Floats:
        """Seconds of each component at a coefficient of 1."""
        parts = self.device.step(batch)
        host = [] if self.linear else self.host.seconds(batch)
        every: Floats = np.array([*parts, *host, *_NO_CALL, *([0.0] if self.client else [])])
        return every[self.chosen]

    def equations(self, spans: Sequence[tuple[list[Batch], float]]) -> Equations:
        """One equation a span."""
        rows = [np.sum([self.features(batch) for batch in batches], axis=0) for batches, _ in spans]
        seconds = np.array([one for _, one in spans])
        return Equations(
            np.reshape(rows, (len(rows), len(self.names))), seconds, 1 / np.sqrt(np.maximum(seconds, SHORTEST))
        )

    def sums(self, trace: Trace) -> BatchSums:
        """Features of each batch of a trace: the sums over its iterations, and the call's own."""
        sums = batch_sums(trace, self.config, self.features, self.device, (self.host, tuple(self.chosen)))
        call = CallOverhead(*CALL_UNITS.values())
        sums.features["makespan"][:, -len(CALL_UNITS) :] = [call.seconds(int(count)) for count in sums.requests]
        return sums

    def step_seconds(self, values: Floats) -> Callable[[Batch], float]:
        """An iteration's seconds by those coefficients."""
        return lambda batch: max(float(self.features(batch) @ values), 1e-6)


def call_units(learned: Container[str]) -> CallOverhead:
    """The units of the call's terms that were learned, 0 for the others."""
    units = {CALL_COMPONENTS[name]: unit if name in learned else 0.0 for name, unit in CALL_UNITS.items()}
    return CallOverhead(**units)


def with_coefficients(deployment: Deployment, coefficients: Sequence[FittedCoefficient]) -> Deployment:
    """Return the deployment with learned coefficients in force."""
    values = {one.name: one.value for one in coefficients}
    if isinstance(deployment.accelerator.device, Linear):
        seconds = {name: values.get(name, 0.0) * LINEAR_UNITS[name] for name in Linear.components}
        calls = {name: value for name, value in values.items() if name in CALL_COMPONENTS}
        accelerator = WithHost(Linear(seconds), HostOverhead(0.0, 0.0), calls, call_units(values))
    else:
        units: dict[str, Any] = {
            HOST_COMPONENTS[name]: unit if name in values else 0.0 for name, unit in HOST_UNITS.items()
        }
        host = replace(deployment.accelerator.host, **units)
        accelerator = WithHost(deployment.accelerator.device, host, values, call_units(values))
    return replace(deployment, accelerator=accelerator)
