"""Runs that the simulator makes from known coefficients: what is fitted to them can be told from the truth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from calibrate.space import LINEAR_UNITS, FittedCoefficient, with_coefficients
from profiles.deployment import Facts, resolve
from profiles.profile import load_profile
from replay.run import replay
from replay.trace import Trace, requests_table

ARGUMENTS = {
    "max_num_seqs": 16,
    "max_num_batched_tokens": 512,
    "max_model_len": 4096,
    "num_gpu_blocks": 4000,
    "block_size": 16,
}
TRUTH = {
    "step": 4e-3,
    "sequence": 2e-5,
    "token": 4e-5,
    "prefill_step": 2e-3,
    "prefill_attention": 1e-8,
    "decode_attention": 2e-7,
}
"""Seconds of a linear accelerator's components."""


class Noisy:
    """An accelerator whose iterations vary by a share of their time."""

    def __init__(self, plain, random, noise):
        self.plain, self.random, self.noise = plain, random, noise
        self.components = plain.components
        self.coefficients = getattr(plain, "coefficients", {})
        self.host = plain.host

    def step(self, batch):
        factor = max(0.5, 1 + self.random.normal(0, self.noise)) if self.noise else 1.0
        return tuple(factor * part for part in self.plain.step(batch))


def workload(random, count, rate, prompts=(20, 900), outputs=(5, 120), columns=None, timeline=None, **meta):
    """Requests that arrive at random, with lengths between bounds; ``columns`` takes prompt lengths, gives more."""
    arrival = np.cumsum(random.exponential(1 / rate, count))
    table = {
        "id": [f"r{place}" for place in range(count)],
        "status": ["ok"] * count,
        "arrival": arrival - arrival[0],
        "prompt_tokens": random.integers(*prompts, count),
        "output_tokens": random.integers(*outputs, count),
    }
    if columns is not None:
        table |= columns(table["prompt_tokens"])
    return Trace(requests_table(table, count), {"warmed_up": True, "clock": {"kind": "run"}} | meta, timeline=timeline)


def deployment(version="0.19.0", **changes):
    """A linear base without coefficients."""
    facts = Facts(model="llama-3.2-1b", version=version, arguments=ARGUMENTS | changes)
    return resolve(load_profile("linear"), facts)


def with_seconds(base, seconds):
    """A linear deployment whose components take those seconds."""
    return with_coefficients(
        base,
        [FittedCoefficient(name, one / LINEAR_UNITS[name], (0.0, 0.0), 0.0, True) for name, one in seconds.items()],
    )


def changed(trace, **columns):
    """The trace with columns replaced; None empties one."""
    every = {name: trace.requests.column(name).combine_chunks() for name in trace.requests.column_names} | columns
    kept = {name: one for name, one in every.items() if one is not None}
    return replace(trace, requests=requests_table(kept, len(trace)), _columns={})


def run(seed=1, count=120, rate=6.0, asynchronous=True, noise=0.0, **arguments):
    """A trace of a linear engine whose components take ``TRUTH``, its iterations, and the base to fit."""
    random = np.random.default_rng(seed)
    sent = workload(random, count, rate, name=f"synthetic-{seed}")
    base = deployment(async_scheduling=asynchronous, **arguments)
    truth = with_seconds(base, TRUTH)
    if noise:
        truth = replace(truth, accelerator=Noisy(truth.accelerator, random, noise))
    predicted = replay(sent, truth, record_iterations=True).predicted
    measured = replace(predicted, iterations=None, _columns={}).with_meta(name=sent.name)
    return measured, predicted.iterations, base
