"""Write golden schedules: what vLLM's own scheduler decides, step by step, on a virtual clock.

A tool of the project's development: it runs only where vLLM is installed (any build will do, the CPU's too),
and nothing of the project imports it. The tests read the files that it wrote::

    python generate.py schedules                     the workloads below, under the vLLM that is installed
    python generate.py schedules --only 'abort*'     some of them
    python generate.py --check schedules/*.json.gz   drive the workloads of files again and compare

No model runs. vLLM's ``Scheduler`` or ``AsyncScheduler`` is driven as vLLM's engine process drives it
(``EngineCore.run_busy_loop`` with ``step``, or with ``step_with_batch_queue`` two batches deep), except that
step times come from a formula, sampled tokens are made up, and the host takes no time: scheduling costs
nothing, and the millisecond that the engine sleeps after a step without work is left out.

Format ``servecal.golden_schedule/1``
-------------------------------------
``config``
    Engine arguments by vLLM's names. ``num_gpu_blocks`` counts the null block.
``step_time``
    A step lasts ``base_us + per_sequence_us * len(items) + sum(per_token_us * n + n * (2 * c + n) //
    attention_divisor)`` over its items with ``c`` tokens computed before and ``n`` scheduled.
``requests``
    ``id``, ``arrival_us``, ``output_tokens`` (generated exactly, unless ``max_model_len`` ends it first),
    ``priority``, and the prompt: ``prefix: [k, n]`` (the first ``n`` tokens of shared prefix ``k``), then
    ``own_tokens`` that no other request has. Instead of ``prefix``, ``continues: "r003"`` begins the prompt
    with the whole prompt and output of that request, which must have finished before this one arrives (so it
    cannot have been aborted). ``abort_us`` is when the client gives up.
``iterations``
    The steps that computed something: ``start_us`` and ``dur_us`` on the device, ``items`` as ``[id, tokens
    computed before, tokens scheduled]`` in schedule order, ``preempted`` (sorted); ``running``, ``waiting``
    and ``free`` (KV blocks) right after scheduling. Asynchronous engines also have ``sched_us``.
``results``
    ``first_us`` and ``done_us`` of every request: when the steps ended that gave its first and last tokens.
    Aborted ones have ``aborted: true``, ``done_us: null``, and ``first_us: null`` if they gave none. An abort
    that comes after the end changes nothing.

The engine takes in what has come up to and including its own time, arrivals before aborts, before it schedules.
From vLLM 0.13 on it looks for aborts also right before it takes in the output of a step. Steps that compute
nothing stand in no file, and with them what they preempted: the last running request can preempt itself.
"""

from __future__ import annotations

import argparse
import fnmatch
import gzip
import hashlib
import heapq
import inspect
import json
import logging
import random
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import vllm
from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

Json = dict[str, Any]

FORMAT = "servecal.golden_schedule/1"
ENGINE = "vllm " + vllm.__version__.split("+")[0]
VERSION = tuple(int(part) for part in vllm.__version__.split(".")[:2])
NEWEST = (0, 32)
CACHE_ARGUMENTS = ("block_size", "num_gpu_blocks", "enable_prefix_caching")
TOKENS_APART = 10**6
"""Token ids of a request or a shared prefix are at least so far from those of another."""


class Step(NamedTuple):
    """A scheduled step: vLLM's ``SchedulerOutput``, the requests that sample a token, when the device is done."""

    output: Any
    sampling: frozenset[str]
    end: int


class Engine:
    """vLLM's engine process on a virtual clock: its input queue, its scheduler and a device that only takes time.

    Parameters
    ----------
    config, step_time, requests
        As in a file. A request without ``arrival_us`` arrives ``think_us`` after the one that it continues has
        finished.
    """

    def __init__(self, config: Json, step_time: Json, requests: list[Json]) -> None:
        self.scheduler = make_scheduler(config)
        self.hasher = None
        if config["enable_prefix_caching"]:
            init_none_hash(block_hash)
            self.hasher = get_request_block_hasher(config["block_size"], block_hash)
        self.max_model_len = config["max_model_len"]
        self.asynchronous = config["async_scheduling"]
        self.step_time = step_time
        self.requests = requests
        self.number = {request["id"]: number for number, request in enumerate(requests)}
        self.results: list[Json] = [{"id": request["id"], "first_us": None, "done_us": None} for request in requests]
        self.iterations: list[Json] = []
        self.tokens: dict[str, list[int]] = {}
        self.clock = self.device_free = 0
        self.in_flight: deque[Step] = deque()
        self.idle_steps = 0
        self.inbox: list[tuple[int, bool, int]] = []
        for request in requests:
            if "arrival_us" in request:
                self._send(request)

    def run(self) -> None:
        """Serve until nothing is left (``EngineCore.run_busy_loop``)."""
        step = self._step_with_batch_queue if self.asynchronous else self._step
        while True:
            self._process_inbox()
            if self.scheduler.has_requests() or self.in_flight:
                step()
                if self.idle_steps <= 2:
                    continue
                if not self.inbox:
                    raise RuntimeError(f"stuck: {len(self.scheduler.requests)} requests can never be scheduled")
            elif not self.inbox:
                return
            self.idle_steps = 0
            self.clock = max(self.clock, self.inbox[0][0])

    def _step(self) -> None:
        self._take_in(self._schedule())

    def _step_with_batch_queue(self) -> None:
        if self.scheduler.has_requests():
            step = self._schedule()
            self.in_flight.append(step)
            if len(self.in_flight) < 2 and (step.output.num_scheduled_tokens or self.scheduler.has_requests()):
                return
        self._take_in(self.in_flight.popleft())

    def _send(self, request: Json) -> None:
        """Put a request's messages into the inbox: its arrival and, if its client gives up, the abort."""
        number = self.number[request["id"]]
        heapq.heappush(self.inbox, (request["arrival_us"], False, number))
        if "abort_us" in request:
            if request["abort_us"] < request["arrival_us"]:
                raise ValueError(f"{request['id']} is aborted before it arrives")
            heapq.heappush(self.inbox, (request["abort_us"], True, number))

    def _process_inbox(self) -> None:
        while self.inbox and self.inbox[0][0] <= self.clock:
            _, is_abort, number = heapq.heappop(self.inbox)
            self.idle_steps = 0
            if is_abort:
                self._abort(number)
            else:
                self.scheduler.add_request(self._make_request(number))

    def _process_aborts(self) -> None:
        """Heed aborts early (``EngineCore._process_aborts_queue``); their messages stay in the inbox as well."""
        for time, is_abort, number in sorted(self.inbox):
            if time > self.clock:
                return
            if is_abort:
                self._abort(number)

    def _abort(self, number: int) -> None:
        """Abort one request, unless it has ended or is not there yet.

        vLLM frees the requests that it aborts together in the arbitrary order of a set. Here it is that of the
        aborts, which is one of those orders.
        """
        identifier = self.requests[number]["id"]
        if identifier in self.scheduler.requests:
            self.results[number]["aborted"] = True
            self.scheduler.finish_requests([identifier], RequestStatus.FINISHED_ABORTED)

    def _make_request(self, number: int) -> Request:
        request = self.requests[number]
        if "continues" in request:
            earlier = self.number[request["continues"]]
            if self.results[earlier]["done_us"] is None:
                raise ValueError(f"{request['id']} arrives before {request['continues']}, which it continues, is done")
            prompt = list(self.tokens[request["continues"]])
        else:
            prefix, length = request["prefix"]
            prompt = [prefix * TOKENS_APART + place for place in range(length)]
        prompt += [self._own_token(number, len(prompt) + place) for place in range(request["own_tokens"])]
        if not 0 < len(prompt) < self.max_model_len:
            raise ValueError(f"{request['id']}: vLLM refuses a prompt of {len(prompt)} tokens")
        parameters = SamplingParams(max_tokens=request["output_tokens"], temperature=0.0, ignore_eos=True)
        return Request(
            request_id=request["id"],
            prompt_token_ids=prompt,
            sampling_params=parameters,
            pooling_params=None,
            arrival_time=request["arrival_us"] * 1e-6,
            priority=request["priority"],
            block_hasher=self.hasher,
            **accepted(Request.__init__, eos_token_id=None),
        )

    @staticmethod
    def _own_token(number: int, place: int) -> int:
        return (number + 1000) * TOKENS_APART + place

    def _schedule(self) -> Step:
        scheduler = self.scheduler
        known = {one.request_id: one.num_tokens + one.num_output_placeholders for one in scheduler.requests.values()}
        running = {one.request_id for one in scheduler.running}
        output = scheduler.schedule()
        computed = {name: scheduler.requests[name].num_computed_tokens for name in output.num_scheduled_tokens}
        # The model runner samples for those whose known tokens are all computed then.
        sampling = frozenset(name for name, tokens in computed.items() if tokens >= known[name])
        items = [[name, computed[name] - new, new] for name, new in output.num_scheduled_tokens.items()]
        # None that is preempted is admitted again in the same call.
        preempted = sorted(running - {one.request_id for one in scheduler.running})
        if not items:
            awaited = any(step.output.num_scheduled_tokens for step in self.in_flight)
            self.idle_steps = 0 if preempted or awaited else self.idle_steps + 1
            return Step(output, sampling, self.clock)
        self.idle_steps = 0
        start = max(self.clock, self.device_free)
        duration = self._duration(items)
        self.device_free = start + duration
        num_running, num_waiting = scheduler.get_request_counts()
        iteration = {"start_us": start, "dur_us": duration, "items": items, "preempted": preempted}
        iteration |= {"running": num_running, "waiting": num_waiting}
        iteration["free"] = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        if self.asynchronous:
            iteration["sched_us"] = self.clock
        self.iterations.append(iteration)
        return Step(output, sampling, self.device_free)

    def _duration(self, items: list[list[Any]]) -> int:
        time = self.step_time
        duration = time["base_us"] + time["per_sequence_us"] * len(items)
        for _, computed, new in items:
            duration += time["per_token_us"] * new + new * (2 * computed + new) // time["attention_divisor"]
        return int(duration)

    def _take_in(self, step: Step) -> None:
        """Wait for a step and hand its tokens to the scheduler."""
        self.clock = max(self.clock, step.end)
        if hasattr(EngineCore, "_process_aborts_queue"):
            self._process_aborts()
        names = list(step.output.num_scheduled_tokens)
        model_output = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=[[self._next_token(name)] if name in step.sampling else [] for name in names],
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        )
        served = dict(self.scheduler.requests)
        for outputs in self.scheduler.update_from_output(step.output, model_output).values():
            for output in outputs.outputs:
                self._note(output, served[output.request_id])

    def _next_token(self, name: str) -> int:
        request = self.scheduler.requests.get(name)
        return self._own_token(self.number[name], request.num_tokens) if request else 0

    def _note(self, output: Any, request: Request) -> None:
        result = self.results[self.number[output.request_id]]
        if output.new_token_ids and result["first_us"] is None:
            result["first_us"] = self.clock
        if not output.finished:
            return
        result["done_us"] = self.clock
        self.tokens[output.request_id] = list(request.all_token_ids)
        for later in self.requests:
            if later.get("continues") == output.request_id and "arrival_us" not in later:
                later["arrival_us"] = self.clock + later.pop("think_us")
                self._send(later)


# vLLM's objects


def accepted(function: Callable[..., Any], **arguments: Any) -> Json:
    """Keep the arguments that this version of a function takes."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in parameters}


def block_hash(value: object) -> bytes:
    """Hash as good as vLLM's own, and the same in every version."""
    return hashlib.sha256(repr(value).encode()).digest()


def make_vllm_config(config: Json) -> VllmConfig:
    """Return vLLM's configuration; what the platform that this runs on changes in it is set again."""
    model = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "torch_dtype": "float32",
        "vocab_size": 64,
        "max_position_embeddings": config["max_model_len"],
    }
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(model))
        model_config = ModelConfig(
            model=folder,
            tokenizer=folder,
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=config["max_model_len"],
        )
    arguments = {"enable_chunked_prefill": True} | config
    arguments = {name: value for name, value in arguments.items() if name not in CACHE_ARGUMENTS}
    known = accepted(SchedulerConfig, is_encoder_decoder=False, **arguments)
    for name in arguments.keys() - known.keys():
        if arguments[name]:
            raise ValueError(f"{ENGINE} has no {name}={arguments[name]!r}")
    scheduler_config = SchedulerConfig(**known)
    cache_config = CacheConfig(block_size=16)
    vllm_config = VllmConfig(model_config=model_config, scheduler_config=scheduler_config, cache_config=cache_config)
    scheduler_config.async_scheduling = config["async_scheduling"]
    for name in CACHE_ARGUMENTS:
        setattr(cache_config, name, config[name])
    return vllm_config


def make_scheduler(config: Json) -> Scheduler:
    """Return the scheduler that vLLM would run for a model whose layers all have full attention."""
    vllm_config = make_vllm_config(config)
    layer = accepted(
        FullAttentionSpec,
        block_size=config["block_size"],
        num_kv_heads=1,
        head_size=64,
        dtype=torch.float32,
        use_mla=False,
    )
    group = KVCacheGroupSpec(["layer"], FullAttentionSpec(**layer))
    scheduler_class = AsyncScheduler if config["async_scheduling"] else Scheduler
    return scheduler_class(
        vllm_config=vllm_config,
        kv_cache_config=KVCacheConfig(config["num_gpu_blocks"], [], [group]),
        structured_output_manager=StructuredOutputManager(vllm_config),
        **accepted(Scheduler.__init__, block_size=config["block_size"]),
    )


# Files


def drive(document: Json) -> Json:
    """Return the document with the iterations and results that the installed vLLM gives it."""
    requests = [dict(request) for request in document["requests"]]
    engine = Engine(document["config"], document["step_time"], requests)
    engine.run()
    outcome = {"engine": ENGINE, "requests": requests, "iterations": engine.iterations, "results": engine.results}
    return document | outcome


def write(document: Json, path: Path) -> None:
    """Write a file that depends on nothing but the document."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":")) + "\n"
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed:
        packed.write(text.encode())


def check(path: Path) -> str | None:
    """Drive a file's workload again; return what differs first, if anything does."""
    expected = json.loads(gzip.decompress(path.read_bytes()))
    actual = drive(expected)
    for part in ("iterations", "results"):
        for place, (theirs, ours) in enumerate(zip(expected[part], actual[part], strict=False)):
            if theirs != ours:
                return f"{part}[{place}]:\n  file {theirs}\n  vllm {ours}"
        if len(expected[part]) != len(actual[part]):
            return f"{part}: {len(expected[part])} in the file, {len(actual[part])} now"
    return None


# Workloads

STEP_TIME = {"base_us": 3000, "per_sequence_us": 20, "per_token_us": 40, "attention_divisor": 400}
CONFIG = {
    "max_model_len": 4096,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 512,
    "block_size": 16,
    "num_gpu_blocks": 4002,
    "enable_prefix_caching": True,
    "async_scheduling": True,
    "long_prefill_token_threshold": 0,
    "policy": "fcfs",
    "watermark": 0.0,
    "scheduler_reserve_full_isl": True,
}
SYNC = {"async_scheduling": False}
PRIORITY = {"policy": "priority"}
NO_CACHING = {"enable_prefix_caching": False}
FIRST_CHUNK_ONLY = {"scheduler_reserve_full_isl": False}
OVERCOMMITTED = FIRST_CHUNK_ONLY | {"long_prefill_token_threshold": 16}

Maker = Callable[[random.Random], Iterator[Json]]
WORKLOADS: dict[str, tuple[Json, Maker]] = {}
"""For the newest version."""
OF_EACH_VERSION: dict[str, tuple[Json, Maker]] = {}
"""For the older ones, to show where they differ: ``v0.19-<name>`` under vLLM 0.19, and so on."""


def workload(name: str, *differences: Json, each_version: bool = False, **config: Any) -> Callable[[Maker], Maker]:
    """Register a function that makes requests, under a configuration that differs so from ``CONFIG``."""

    def register(make_requests: Maker) -> Maker:
        merged = dict(CONFIG)
        for difference in (*differences, config):
            merged |= difference
        (OF_EACH_VERSION if each_version else WORKLOADS)[name] = (merged, make_requests)
        return make_requests

    return register


def entry(arrival_us: int | None, own_tokens: int, output_tokens: int, **more: Any) -> Json:
    """Return a request as in a file, but without an id; ``continues`` names an earlier one by its number.

    One that has no ``arrival_us`` has a ``think_us`` instead: it comes so long after the end of the earlier one.
    """
    made: Json = {"own_tokens": own_tokens, "output_tokens": output_tokens, "priority": 0} | more
    if arrival_us is not None:
        made["arrival_us"] = arrival_us
    if "continues" not in made:
        made.setdefault("prefix", [0, 0])
    return made


def arrivals(rng: random.Random, count: int, mean_gap_us: float, start: int = 1000) -> Iterator[int]:
    """Yield the times of a Poisson process."""
    time = float(start)
    for _ in range(count):
        time += rng.expovariate(1 / mean_gap_us)
        yield int(time)


@workload("multi-turn-large-cache")
@workload("multi-turn-small-cache", num_gpu_blocks=122)
@workload("multi-turn-small-cache-sync", SYNC, num_gpu_blocks=62, block_size=32)
def conversations(rng: random.Random) -> Iterator[Json]:
    """Every turn repeats the whole conversation; some share a system prompt."""
    number = 0
    for start in arrivals(rng, 10, 40_000):
        prefix = [rng.randrange(1, 3), rng.choice((0, 100, 160))]
        yield entry(start, rng.randrange(1, 150), rng.randrange(1, 70), prefix=prefix)
        for _ in range(rng.randrange(2, 7)):
            think = rng.choice((0, 1, 5_000, 60_000, 300_000))
            yield entry(None, rng.randrange(1, 90), rng.randrange(1, 60), continues=number, think_us=think)
            number += 1
        number += 1


@workload("branching-conversations", num_gpu_blocks=202)
def branches(rng: random.Random) -> Iterator[Json]:
    """Several requests continue the same one, some at the same instant, some with nothing of their own to add."""
    for root in range(0, 40, 8):
        yield entry(1000 + root * 9000, rng.randrange(30, 130), rng.choice((16, 17, 31, 33)))
        for think in (0, 0, 0, 7_000, 7_000, 50_000, 50_001):
            own = rng.choice((0, 1, 15, 16, 40))
            more = {"priority": rng.randrange(2), "continues": root, "think_us": think}
            yield entry(None, own, rng.randrange(1, 50), **more)


@workload("hits-after-preemption-async", num_gpu_blocks=72, max_num_batched_tokens=256)
@workload("hits-after-preemption-sync", SYNC, num_gpu_blocks=72, max_num_batched_tokens=256)
def growing(rng: random.Random) -> Iterator[Json]:
    """Short prompts with long outputs: the cache fills by decoding, and the preempted find their prefix again."""
    for time in arrivals(rng, 24, 25_000):
        prefix = [rng.randrange(3), rng.choice((0, 40, 64))]
        more = {"prefix": prefix, "priority": rng.randrange(3)}
        yield entry(time, rng.randrange(5, 60), rng.randrange(80, 260), **more)


@workload("watermark", num_gpu_blocks=80, watermark=0.05)
@workload("watermark-priority-sync", SYNC, PRIORITY, FIRST_CHUNK_ONLY, num_gpu_blocks=80, watermark=0.08)
def headroom(rng: random.Random) -> Iterator[Json]:
    """Preemption in spite of blocks kept free, then a request that needs these, with others right behind it."""
    yield from growing(rng)
    for start in (6_000_000, 7_000_000):
        for gap in (0, 0, 30_000):
            yield entry(start + gap, rng.randrange(1225, 1250), 5)
        yield entry(start + 40_000, 20, 5)


@workload("thrash-fcfs-sync", SYNC, FIRST_CHUNK_ONLY, block_size=4, num_gpu_blocks=24, max_num_batched_tokens=64)
@workload("thrash-fcfs-async", FIRST_CHUNK_ONLY, block_size=4, num_gpu_blocks=24, max_num_batched_tokens=64)
@workload("thrash-priority-sync", SYNC, PRIORITY, FIRST_CHUNK_ONLY, NO_CACHING, block_size=4, num_gpu_blocks=24)
@workload("thrash-priority-async", PRIORITY, FIRST_CHUNK_ONLY, block_size=4, num_gpu_blocks=24)
def thrash(rng: random.Random) -> Iterator[Json]:
    """A cache of 23 usable blocks of 4, and requests of up to 92 tokens, which need all of them."""
    for time in arrivals(rng, 36, 12_000):
        shared = rng.choice((0, 0, 5))
        more = {"prefix": [rng.randrange(2), shared], "priority": rng.randrange(3)}
        yield entry(time, rng.choice((8, 15, 40)) - shared, rng.choice((10, 30, 52)), **more)


@workload("burst-2000", max_num_seqs=512, max_num_batched_tokens=4096)
def burst(rng: random.Random) -> Iterator[Json]:
    """Two thousand requests at one instant."""
    for _ in range(2000):
        yield entry(5000, rng.randrange(1, 24), rng.choice((1, 1, 1, 2, 3)), priority=0)


@workload("aborts-async", num_gpu_blocks=82, max_num_seqs=8, max_num_batched_tokens=64)
@workload("aborts-sync", SYNC, num_gpu_blocks=82, max_num_seqs=8, max_num_batched_tokens=64)
@workload("aborts-priority-async", PRIORITY, FIRST_CHUNK_ONLY, num_gpu_blocks=42, max_num_batched_tokens=64)
def aborts(rng: random.Random) -> Iterator[Json]:
    """Clients that give up: on an idle engine at telling instants, then at any time in a full one."""
    step = 3000 + 20 + 40 * 16
    for place, abort in enumerate((0, 1, step - 1, step, step + 1, step + 3060, step + 3061, 200_000)):
        start = 1000 + 300_000 * place
        yield entry(start, 16, 10, abort_us=start + abort)
    yield entry(2_400_000, 300, 10, abort_us=2_400_000 + 9_000)
    yield entry(2_400_000, 300, 10, abort_us=2_400_000 + 9_000)
    yield entry(2_400_000 + 9_000, 20, 10)
    for time in arrivals(rng, 60, 12_000, start=3_000_000):
        prefix = [rng.randrange(2), rng.choice((0, 40))]
        more = {"prefix": prefix, "priority": rng.randrange(3)}
        if rng.random() < 0.6:
            more["abort_us"] = time + rng.choice((0, 100, 3_000, 20_000, 60_000, 150_000, 400_000))
        yield entry(time, rng.randrange(1, 250), rng.randrange(1, 90), **more)


@workload("budget-below-block", block_size=32, max_num_seqs=16, max_num_batched_tokens=24, num_gpu_blocks=62)
def small_steps(rng: random.Random) -> Iterator[Json]:
    """Steps that do not fill a block."""
    for time in arrivals(rng, 24, 30_000):
        prefix = [rng.randrange(2), rng.choice((0, 64, 130))]
        yield entry(time, rng.randrange(1, 90), rng.randrange(1, 60), prefix=prefix)


@workload("decode-saturation", max_num_seqs=24, max_num_batched_tokens=2048)
@workload("decodes-over-budget", NO_CACHING, max_num_seqs=32, max_num_scheduled_tokens=16)
def saturated(rng: random.Random) -> Iterator[Json]:
    """Nothing but decodes, at the limit of sequences or of tokens."""
    for _ in range(60):
        start = rng.choice((1000, 1000, 90_000))
        yield entry(start, rng.randrange(1, 30), rng.randrange(40, 90), priority=rng.randrange(2))


@workload("single-token-prompts")
def single_tokens(rng: random.Random) -> Iterator[Json]:
    """Prompts of one token, some of them equal."""
    for time in arrivals(rng, 60, 4_000):
        own = rng.randrange(2)
        yield entry(time, own, rng.randrange(1, 40), prefix=[0, 1 - own])


@workload("single-token-outputs", num_gpu_blocks=62)
def single_outputs(rng: random.Random) -> Iterator[Json]:
    """Requests that are done when their prompt is."""
    for time in arrivals(rng, 60, 9_000):
        yield entry(time, rng.randrange(1, 400), 1, prefix=[rng.randrange(3), rng.choice((0, 0, 100, 144))])


@workload("full-blocks-async", num_gpu_blocks=82)
@workload("full-blocks-block8", PRIORITY, block_size=8, num_gpu_blocks=122)
def full_blocks(rng: random.Random) -> Iterator[Json]:
    """Prompts, prefixes and whole sequences that fill blocks, or are a token short or long of it."""
    for time in arrivals(rng, 50, 12_000):
        total = rng.choice((16, 32, 128, 256, 384)) + rng.randrange(-1, 2)
        shared = min(total, rng.choice((0, 16, 127, 128, 129, 256)))
        output = rng.choice((1, 15, 16, 17, 32))
        yield entry(time, total - shared, output, prefix=[rng.randrange(2), shared], priority=rng.randrange(2))


@workload("prompts-of-many-budgets", max_num_batched_tokens=64, num_gpu_blocks=402)
def long_prompts(rng: random.Random) -> Iterator[Json]:
    """Prompts that take dozens of steps, between short ones."""
    for place, time in enumerate(arrivals(rng, 20, 90_000)):
        own = rng.randrange(2000, 3500) if place % 4 == 0 else rng.randrange(1, 200)
        yield entry(time, own, rng.randrange(1, 40), priority=rng.randrange(2))


@workload("threshold-alone-then-two", long_prefill_token_threshold=40)
@workload("threshold-alone-then-two-sync", SYNC, long_prefill_token_threshold=40)
def alone_then_two(rng: random.Random) -> Iterator[Json]:
    """A long prompt alone, then joined by others in mid-prefill or while it decodes."""
    for start in (1000, 2_000_000, 4_000_000, 6_000_000):
        gap = rng.choice((0, 10_000, 45_000, 200_000))
        yield entry(start, 1500, 30)
        yield entry(start + gap, 1000, 5)
        yield entry(start + 500_000, 30, 200)
        yield entry(start + 520_000, 900, 5)
        yield entry(start + 1_500_000, 700, 1)


@workload("max-model-len-async", max_model_len=200, num_gpu_blocks=42)
@workload("max-model-len-sync", SYNC, PRIORITY, FIRST_CHUNK_ONLY, max_model_len=200, num_gpu_blocks=16)
def too_long(rng: random.Random) -> Iterator[Json]:
    """Requests that end at ``max_model_len``, up to a prompt that leaves room for a single token."""
    for time in arrivals(rng, 30, 60_000):
        own = rng.choice((1, 100, 150, 175, 176, 190, 191, 192, 198, 199))
        output = 200 - own + rng.choice((-1, 0, 1, 50))
        yield entry(time, own, max(1, output), priority=rng.randrange(2))


@workload("ties-async", PRIORITY, num_gpu_blocks=42)
@workload("ties-sync", SYNC, PRIORITY, num_gpu_blocks=42)
def ties(rng: random.Random) -> Iterator[Json]:
    """Groups that arrive at one instant with equal priorities, in a cache that cannot hold them."""
    for group in range(6):
        for _ in range(8):
            own = rng.randrange(20, 120)
            yield entry(1000 + group * 150_000, own, rng.randrange(20, 100), priority=group % 2)


@workload("duplicates-together")
@workload("duplicates-together-small-cache", num_gpu_blocks=42)
def duplicates(rng: random.Random) -> Iterator[Json]:
    """The same prompt several times at once: later ones share the blocks that the first is about to fill."""
    for group in range(8):
        length = rng.choice((15, 16, 17, 160, 250, 320))
        for _ in range(rng.randrange(2, 7)):
            yield entry(1000 + group * 70_000, 0, rng.randrange(1, 40), prefix=[group + 1, length])


@workload("whole-prompt-cached", num_gpu_blocks=122)
@workload("whole-prompt-cached-block32", PRIORITY, block_size=32, num_gpu_blocks=42, max_num_batched_tokens=96)
def repeated(rng: random.Random) -> Iterator[Json]:
    """Prompts seen before: one token is left to compute, or a whole block."""
    for time in arrivals(rng, 50, 15_000):
        prefix = rng.randrange(1, 6)
        yield entry(time, 0, rng.randrange(1, 50), prefix=[prefix, 64 * prefix + rng.choice((-1, 0, 1))])


@workload("block8-async", num_gpu_blocks=142, block_size=8)
@workload("block32-sync", SYNC, num_gpu_blocks=42, block_size=32)
@workload("block128-async", num_gpu_blocks=14, block_size=128)
@workload("one-sequence", max_num_seqs=1)
@workload("priorities-async", PRIORITY, num_gpu_blocks=62, long_prefill_token_threshold=24)
def mixed(rng: random.Random) -> Iterator[Json]:
    """A bit of everything, more than the cache holds."""
    for time in arrivals(rng, 32, 18_000):
        prefix = [rng.randrange(3), rng.choice((0, 0, 50, 128))]
        yield entry(time, rng.randrange(1, 200), rng.randrange(1, 140), prefix=prefix, priority=rng.randrange(3))


@workload("unchunked", enable_chunked_prefill=False, max_model_len=400, max_num_batched_tokens=400, num_gpu_blocks=62)
def whole_prompts(rng: random.Random) -> Iterator[Json]:
    """Prompts that go into one step or wait for the next, and hold up the shorter ones behind them."""
    for start in arrivals(rng, 8, 150_000):
        for _ in range(6):
            prefix = [rng.randrange(3), rng.choice((0, 0, 50, 128))]
            yield entry(start, rng.choice((5, 40, 120, 200)), rng.randrange(1, 60), prefix=prefix)


@workload("priority-async", PRIORITY, OVERCOMMITTED, each_version=True, num_gpu_blocks=62)
@workload("overcommitted-priority-async", PRIORITY, OVERCOMMITTED, num_gpu_blocks=62)
@workload("overcommitted-priority-sync", SYNC, PRIORITY, OVERCOMMITTED, num_gpu_blocks=62)
def overcommitted(rng: random.Random) -> Iterator[Json]:
    """Long prompts admitted by their first chunk, among short requests whose last token is in flight when evicted."""
    for time in arrivals(rng, 60, 3_000):
        if rng.random() < 0.4:
            prefix = [rng.randrange(2), rng.choice((0, 32))]
            yield entry(time, rng.randrange(100, 300), rng.randrange(20, 100), prefix=prefix)
        else:
            yield entry(time, rng.randrange(10, 60), rng.randrange(2, 12), priority=rng.randrange(1, 3))


@workload("fcfs-async", each_version=True, num_gpu_blocks=32, max_num_batched_tokens=64)
@workload("priority-sync", SYNC, PRIORITY, each_version=True, num_gpu_blocks=42, max_num_batched_tokens=64)
def short_and_long(rng: random.Random) -> Iterator[Json]:
    """Decodes that outgrow the cache, while short requests come and go."""
    for time in arrivals(rng, 60, 9_000):
        if rng.random() < 0.35:
            more = {"prefix": [rng.randrange(2), rng.choice((0, 32))], "priority": rng.randrange(2)}
            yield entry(time, rng.randrange(10, 60), rng.randrange(60, 160), **more)
        else:
            yield entry(time, rng.randrange(1, 80), rng.randrange(1, 9), priority=rng.randrange(1, 3))


@workload("threshold-sync", SYNC, each_version=True, num_gpu_blocks=152, long_prefill_token_threshold=40)
def long_alone(rng: random.Random) -> Iterator[Json]:
    """Long prompts alone and in company."""
    yield from alone_then_two(rng)


@workload("aborts-async", each_version=True, num_gpu_blocks=82, max_num_seqs=8, max_num_batched_tokens=64)
def given_up(rng: random.Random) -> Iterator[Json]:
    """Aborts in every state."""
    yield from aborts(rng)


def make(name: str, config: Json, make_requests: Maker) -> Json:
    """Return a workload as a document without outcome. Its seed is its name."""
    requests = list(make_requests(random.Random(name)))
    width = max(3, len(str(len(requests) - 1)))
    for number, one in enumerate(requests):
        one["id"] = f"r{number:0{width}d}"
        if "continues" in one:
            one["continues"] = f"r{one['continues']:0{width}d}"
    return {"format": FORMAT, "config": config, "step_time": STEP_TIME, "requests": requests}


def workloads() -> Iterator[tuple[str, Json]]:
    """Yield name and document of everything that the installed version is asked for."""
    if VERSION == NEWEST:
        for name, (config, make_requests) in WORKLOADS.items():
            yield name, make(name, config, make_requests)
        return
    for name, (config, make_requests) in OF_EACH_VERSION.items():
        if VERSION < (0, 12) and config["policy"] == "priority":
            # Before 0.11.1 it leaves a request that it has just preempted in the step: nothing to be imitated.
            continue
        lacking = {} if VERSION >= (0, 19) else FIRST_CHUNK_ONLY
        yield f"v{VERSION[0]}.{VERSION[1]}-{name}", make(name, config | lacking, make_requests)


def main() -> int:
    """Run the command line; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="where to write")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="names of the workloads to write")
    parser.add_argument("--check", type=Path, nargs="+", metavar="FILE", help="compare instead of writing")
    arguments = parser.parse_args()
    logging.getLogger("vllm").setLevel(logging.ERROR)
    if arguments.check:
        return check_all(arguments.check)
    if arguments.folder is None:
        parser.error("name a folder, or files to --check")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, document in workloads():
        if fnmatch.fnmatch(name, arguments.only):
            done = drive(document)
            path = arguments.folder / f"{name}.json.gz"
            write(done, path)
            preempted = sum(len(iteration["preempted"]) for iteration in done["iterations"])
            print(
                f"{path}: {len(done['requests'])} requests, {len(done['iterations'])} iterations, "
                f"{preempted} preemptions, {path.stat().st_size} bytes",
                flush=True,
            )
    return 0


def check_all(paths: list[Path]) -> int:
    """Check files, skipping those of other versions; return the exit status."""
    different = 0
    for path in paths:
        engine = json.loads(gzip.decompress(path.read_bytes()))["engine"]
        if engine != ENGINE:
            print(f"{path.name}: skipped, it is of {engine} and this is {ENGINE}")
            continue
        difference = check(path)
        different += difference is not None
        print(f"{path.name}: {difference or 'identical'}", flush=True)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
