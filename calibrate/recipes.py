"""Workloads that a person can send with ``vllm bench serve`` to learn what a measured run did not tell."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from simulator.accelerators.base import AcceleratorModel
from simulator.engine import NS, Engine, Iteration, Simulation
from simulator.engine_config import EngineConfig
from simulator.request import Request

SEED = 0
"""Lengths and arrivals are as random as those of ``vllm bench serve --seed 0``, but not the same."""
ITERATIONS = 1600
"""About as many iterations the largest size of a recipe takes."""
FEWEST = 16
"""Requests."""
VARIED = 0.2
"""Spread of lengths: requests of one length end together, and leave few stamps."""
RAMPS = (0, 10)
"""Version of vLLM since which the benchmark can raise its rate."""


@dataclass(frozen=True)
class Recipe:
    """Random prompts of one length, or lengths around it.

    Parameters
    ----------
    prompt_tokens, output_tokens : int
    requests : int
    concurrency : int, optional
        Requests under way at once, the next sent when one has ended; all that arrive if absent.
    rate : float
        Poisson arrivals, requests/s; all at once by default.
    last_rate : float, optional
        The rate rises to that in a straight line, request by request.
    spread : float
        Lengths are drawn evenly from ``1 - spread`` to ``1 + spread`` times those given (``--random-range-ratio``).
    """

    prompt_tokens: int
    output_tokens: int
    requests: int
    concurrency: int | None = None
    rate: float = math.inf
    last_rate: float | None = None
    spread: float = 0.0

    @property
    def how(self) -> str:
        """How they are sent, in words."""
        if self.concurrency is not None:
            return "one after another" if self.concurrency == 1 else f"{self.concurrency} at a time"
        if self.last_rate is not None:
            return f"at a rate that rises from {self.rate:g} to {self.last_rate:g} a second"
        return f"at {self.rate:g} a second" if math.isfinite(self.rate) else "all at once"

    def workload(self) -> list[Request]:
        """The requests, with arrivals in seconds; those of a limited concurrency all at 0."""
        random = np.random.default_rng(SEED)

        def lengths(mean: int) -> Sequence[int]:
            low, high = math.floor(mean * (1 - self.spread)), math.ceil(mean * (1 + self.spread))
            drawn: list[int] = random.integers(max(low, 1), high + 1, self.requests).tolist()
            return drawn

        prompts, outputs = lengths(self.prompt_tokens), lengths(self.output_tokens)
        share = np.arange(self.requests) / max(self.requests, 1)
        rates = self.rate + share * ((self.last_rate or self.rate) - self.rate) if math.isfinite(self.rate) else np.inf
        arrivals = np.cumsum(random.exponential(1.0, self.requests) / rates)
        return [
            Request(f"request-{place}", float(arrivals[place] - arrivals[0]), prompts[place], outputs[place])
            for place in range(self.requests)
        ]

    def simulate(
        self, accelerator: AcceleratorModel, config: EngineConfig, observe: Callable[[Iteration], None]
    ) -> Simulation:
        """Serve the workload; an engine of no more sequences than the concurrency admits as such a client sends.

        Raises
        ------
        SimulationError
            If the engine cannot serve it.
        """
        limit = min(self.concurrency or config.max_num_seqs, config.max_num_seqs)
        return Engine(replace(config, max_num_seqs=limit), accelerator).run(self.workload(), observe=observe)

    def sent(self, simulation: Simulation) -> list[Request]:
        """The workload with the arrivals, in seconds, at which a client of limited concurrency sends it."""
        requests = self.workload()
        if self.concurrency is None:
            return requests
        ends = sorted((one.last_token or 0) / NS for one in simulation.served)
        arrivals = [0.0] * self.concurrency + ends
        return [replace(one, arrival=arrival) for one, arrival in zip(requests, arrivals, strict=False)]

    def command(self, model: str) -> str:
        """The command line that sends it to a server on this machine, and keeps the time of every token."""
        options: dict[str, object] = {
            "model": model,
            "dataset-name": "random",
            "random-input-len": self.prompt_tokens,
            "random-output-len": self.output_tokens,
        }
        if self.spread:
            options["random-range-ratio"] = self.spread
        options["num-prompts"] = self.requests
        if self.last_rate is not None:
            ramp = {"strategy": "linear", "start-rps": round(self.rate), "end-rps": round(self.last_rate)}
            options |= {f"ramp-up-{name}": value for name, value in ramp.items()}
        else:
            options["request-rate"] = f"{self.rate:g}"
        if self.concurrency is not None:
            options["max-concurrency"] = self.concurrency
        said = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in options.items())
        return f"vllm bench serve {said} --ignore-eos --save-result --save-detailed"

    def __str__(self) -> str:
        around = "about " if self.spread else ""
        return (
            f"{self.requests} requests of {around}{self.prompt_tokens} prompt and {self.output_tokens} output tokens, "
            f"{self.how}"
        )


def recipes(config: EngineConfig, capacity: Callable[[Recipe], float]) -> list[Recipe]:
    """Workloads for an engine, each at its largest size.

    Parameters
    ----------
    config : EngineConfig
        Lengths and batches are kept within its limits.
    capacity : callable
        Requests/s that the engine serves of a recipe sent all at once.
    """
    room, most = _room(config), config.max_num_seqs
    prompts = min(2 * config.token_budget, 4096, room // 2)
    found = [
        _sized(Recipe(32, 256, 0, 1), config),
        _sized(Recipe(256, 256, 0, 4, spread=VARIED), config),
        _sized(Recipe(64, 256, 0, most, spread=VARIED), config),
        _sized(Recipe(32, 16, 0, 32, spread=VARIED), config),
        _sized(Recipe(min(8192, round(0.7 * room)), 128, 0, 4, spread=VARIED), config),
        _sized(Recipe(prompts, 8, 0, 8, spread=VARIED), config),
    ]
    drained = _sized(Recipe(128, 256, 0, spread=0.9), config)
    found.append(replace(drained, requests=min(drained.requests, 4 * most)))
    mixed = _sized(Recipe(512, 128, 0, spread=0.9), config)
    most_a_second = capacity(replace(mixed, requests=min(mixed.requests, 2 * most)))
    found += [replace(mixed, rate=float(f"{share * most_a_second:.1g}")) for share in (0.1, 0.5)]
    if most_a_second >= 2 and config.version >= RAMPS:
        found.append(replace(mixed, rate=1.0, last_rate=float(round(most_a_second))))
    return list(dict.fromkeys(found))


def _room(config: EngineConfig) -> int:
    """Tokens of the longest request that the engine can hold."""
    return min(config.max_model_len, (config.num_gpu_blocks - 1) * config.block_size) - 1


def _sized(recipe: Recipe, config: EngineConfig) -> Recipe:
    """Cut lengths to what the engine holds, concurrency to what its cache does, and count requests."""
    largest = 1 + recipe.spread
    factor = min(1.0, _room(config) / (largest * (recipe.prompt_tokens + recipe.output_tokens) + 2))
    prompt, output = (max(1, int(factor * one)) for one in (recipe.prompt_tokens, recipe.output_tokens))
    blocks = -(-math.ceil(largest * (prompt + output)) // config.block_size)
    fitting = max(1, min(config.max_num_seqs, (config.num_gpu_blocks - 1) // blocks))
    at_once = min(recipe.concurrency or fitting, fitting)
    iterations = output / at_once + prompt / config.token_budget
    return replace(
        recipe,
        prompt_tokens=prompt,
        output_tokens=output,
        requests=max(FEWEST, 2 * at_once, round(ITERATIONS / iterations)),
        concurrency=at_once if recipe.concurrency else None,
    )
