"""CPU time of simulated runs by their size. `pytest tests/benchmarks/test_simulator.py --benchmark-enable`.

Without `--benchmark-enable` small ones run once. The million requests are run if SERVECAL_MILLION is set.
"""

from __future__ import annotations

import os
import resource
import time
from dataclasses import replace

import numpy as np
import pytest

from profiles.deployment import Facts, resolve
from profiles.profile import load_profile
from simulator.engine import Engine
from simulator.request import Request

LOAD = 0.8
SIZES = [1_000, 10_000, 100_000, *([1_000_000] if os.environ.get("SERVECAL_MILLION") else [])]


@pytest.fixture(scope="module")
def deployment():
    arguments = {"max_num_seqs": 128, "max_num_batched_tokens": 2048, "num_gpu_blocks": 35_000}
    facts = Facts(model="meta-llama/Llama-3.1-8B", version="0.19.0", arguments=arguments)
    return resolve(load_profile("rtx-pro-6000-llama-3.1-8b"), facts)


def workload(count: int, rate: float = np.inf) -> list[Request]:
    """Poisson arrivals; log-normal lengths, in the mean about those of BurstGPT (620 prompt and 130 output tokens)."""
    random = np.random.default_rng(0)
    arrivals = np.cumsum(random.exponential(1.0, count) / rate).tolist()
    prompts = np.clip(random.lognormal(5.9, 1.1, count), 1, 4000).astype(int).tolist()
    outputs = np.clip(random.lognormal(4.4, 1.0, count), 1, 2000).astype(int).tolist()
    return [Request(str(place), arrivals[place], prompts[place], outputs[place]) for place in range(count)]


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.benchmark(group="requests at load 0.8", timer=time.process_time)
def test_requests_at_fixed_load(benchmark, deployment, count):
    count = count if benchmark.enabled else count // 100
    engine = deployment.engine()
    saturated = engine.run(workload(2000 if benchmark.enabled else 100))
    requests = workload(count, LOAD * len(saturated.served) / (saturated.end / 1e9))
    run = benchmark.pedantic(engine.run, args=(requests,), rounds=3 if count <= 10_000 else 1)
    assert all(one.last_token is not None for one in run.served)
    benchmark.extra_info["iterations"] = run.iterations
    benchmark.extra_info["peak_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("concurrency", [1, 8, 64, 256, 1024])
@pytest.mark.parametrize("at_once", [True, False], ids=["stretches", "steps"])
@pytest.mark.benchmark(group="1,500 decodes each", timer=time.process_time)
def test_concurrency_without_events(benchmark, deployment, concurrency, at_once):
    class Steps:
        """The model without its price of stretches: an engine then takes every step by itself."""

        components = deployment.accelerator.components
        step = staticmethod(deployment.accelerator.step)

    limits = {"max_num_seqs": 1024, "max_num_batched_tokens": 65536, "max_model_len": 4096, "num_gpu_blocks": 200_000}
    engine = Engine(replace(deployment.config, **limits), deployment.accelerator if at_once else Steps())
    requests = [Request(str(place), 0.0, 10 + place % 50, 1500) for place in range(concurrency)]
    run = benchmark.pedantic(engine.run, args=(requests,), rounds=3)
    assert 1500 <= run.iterations < 1510


@pytest.mark.benchmark(timer=time.process_time)
def test_2000_requests_of_1024_and_128_tokens_at_10_per_second(benchmark, deployment):
    arrivals = np.cumsum(np.random.default_rng(0).exponential(0.1, 2000)).tolist()
    requests = [Request(str(place), arrivals[place], 1024, 128) for place in range(2000 if benchmark.enabled else 50)]
    assert benchmark(deployment.engine().run, requests).iterations > len(requests)
