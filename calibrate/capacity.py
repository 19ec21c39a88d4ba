"""How far a deployment is from saturation, by its lengths and step times alone, without a simulation.

In a full engine each request holds one of ``B`` places. Its decode takes ``output - 1`` steps of a batch of ``B``, of
which it has a share of ``1/B``; its prompt lengthens steps for all. The mean of that over the requests is the engine's
time a request, its inverse the rate that it can sustain (conservation of work; a queue grows beyond it).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from profiles.deployment import Deployment
from replay.trace import Trace
from simulator.batch import Batch

Floats = npt.NDArray[np.float64]

DRAWS = 12
"""Batches over which a full engine's step time is averaged."""
MOST_PROMPTS = 300
"""Prompts over which what they add is averaged."""
SEED = 20240815


def arrival_rate(trace: Trace) -> float:
    """Requests a second from the first arrival to the last; NaN for fewer than two."""
    times = trace.column("arrival")
    times = times[~np.isnan(times)]
    span = float(np.ptp(times)) if times.size else 0.0
    return (times.size - 1) / span if span > 0 else np.nan


def capacity(trace: Trace, deployment: Deployment, cached: Floats) -> dict[str, float]:
    """Return the rate that the predicted engine sustains with a trace's lengths, in requests a second.

    Parameters
    ----------
    trace : Trace
    deployment : Deployment
    cached : array (requests,)
        Prompt tokens found in the prefix cache.

    Returns
    -------
    dict
        ``capacity`` (requests/s) and ``capacity_sequences`` (requests that run at once then). Empty if no request has
        lengths.
    """
    config, step = deployment.config, deployment.accelerator.step
    prompt, output = trace.column("prompt_tokens"), trace.column("output_tokens")
    fine = (prompt >= 1) & (output >= 1) & (prompt < config.max_model_len)
    prompt, output, cached = prompt[fine], output[fine], np.nan_to_num(cached[fine])
    if not prompt.size:
        return {}
    # A running request is met in proportion to the steps that it runs.
    weight = output / output.sum()
    held = np.ceil((prompt - cached + output / 2) / config.block_size)
    # And for every output token of its batch a step computes as many prompt tokens as requests have on average.
    tokens = 1 + float((prompt - cached).sum() / output.sum())
    most = config.max_num_seqs, (config.num_gpu_blocks - 1) / float(weight @ held), config.token_budget / tokens
    places = max(1, int(min(most)))
    random = np.random.default_rng(SEED)
    full = []
    for _ in range(DRAWS):
        some = random.choice(prompt.size, size=places, p=weight)
        contexts = (prompt[some] + random.random(places) * output[some]).astype(np.int64).tolist()
        full.append((float(sum(step(Batch([], contexts)))), contexts))
    decode = sum(seconds for seconds, _ in full) / DRAWS
    some = np.unique(np.linspace(0, prompt.size - 1, MOST_PROMPTS).astype(np.intp))
    added = [
        _prompt_seconds(step, *full[place % DRAWS], prompt[row], cached[row], config.token_budget)
        for place, row in enumerate(some[np.argsort(prompt[some], kind="stable")].tolist())
    ]
    prefill = float(np.mean(added))
    rate = 1 / (float(output.mean() - 1) * decode / places + prefill)
    return {"capacity": rate, "capacity_sequences": float(places)}


def _prompt_seconds(step: Any, full: float, contexts: list[int], prompt: float, cached: float, budget: int) -> float:
    """Seconds by which computing a prompt lengthens full steps."""
    left, context, seconds = max(int(prompt - cached), 1), int(cached), 0.0
    while left > 0:
        chunk = min(left, max(budget - len(contexts), 1))
        batch = Batch([(chunk, context)], contexts) if chunk > 1 else Batch([], [*contexts, context])
        seconds += max(float(sum(step(batch))) - full, 0.0)
        left, context = left - chunk, context + chunk
    return seconds
