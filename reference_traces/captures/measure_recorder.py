"""Measure what the recorder costs a real vLLM: the same engine with it and without it, in turns.

RUNS ONLY WHERE vLLM IS INSTALLED (written for 0.32.0). One offline engine serves the same requests again and again;
before every pass its scheduler gets its own methods back, or the recorder's, so that both see the same machine in the
same minute. The engine core runs in this process, the worst case: front end, scheduler and
the recorder's thread share one interpreter. Prints one JSON object::

    python measure_recorder.py --passes 40
"""

# mypy: ignore-errors

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from pathlib import Path
from types import MethodType

import numpy as np
from tiny_model import MODEL, write_model


def main() -> None:
    """Run the passes and print what they say."""
    parser = argparse.ArgumentParser(description="Measure the recorder's cost on a real vLLM.")
    parser.add_argument("--passes", type=int, default=40, help="pairs of a pass without and a pass with")
    parser.add_argument("--seconds", type=float, default=120.0, help="no further pair is begun after them")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--enforce-eager", action="store_true", help="compile nothing: a quicker start")
    options = parser.parse_args()
    for name, value in (
        ("VLLM_CPU_KVCACHE_SPACE", "1"),
        ("HF_HUB_OFFLINE", "1"),
        ("VLLM_NO_USAGE_STATS", "1"),
        ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
    ):
        os.environ[name] = value
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["SERVECAL_RECORDING"] = str(Path(scratch) / "recording")
        print(json.dumps(measured(options, Path(scratch)), indent=1))


def measured(options: argparse.Namespace, scratch: Path) -> dict[str, object]:
    """Return seconds a pass and a step, with and without, and the share of the recorder."""
    import vllm

    write_model(scratch / "model")
    llm = vllm.LLM(
        model=str(scratch / "model"),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=2048,
        max_num_seqs=max(options.requests, 16),
        block_size=32,
        enable_prefix_caching=False,
        enforce_eager=options.enforce_eager,
        disable_log_stats=True,
        scheduler_cls="replay.recorder.RecordingScheduler",
    )
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    plain = type(scheduler).__bases__[1]
    random = np.random.default_rng(0)
    prompts = [
        {"prompt_token_ids": random.integers(3, MODEL["vocab_size"], size=options.prompt_tokens).tolist()}
        for _ in range(options.requests)
    ]
    tokens = options.output_tokens
    params = vllm.SamplingParams(temperature=0, ignore_eos=True, min_tokens=tokens, max_tokens=tokens, detokenize=False)

    def one_pass(recording: bool) -> float:
        for name in ("schedule", "update_from_output", "add_request", "finish_requests"):
            scheduler.__dict__.pop(name, None)
            if not recording:
                setattr(scheduler, name, MethodType(getattr(plain, name), scheduler))
        begun = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - begun

    for _ in range(3):
        one_pass(False), one_pass(True)
    spent = scheduler.recorder._spent
    pairs = []
    begun = time.monotonic()
    for number in range(options.passes):
        if time.monotonic() - begun > options.seconds:
            break
        order = (False, True) if number % 2 else (True, False)
        taken = {recording: one_pass(recording) for recording in order}
        pairs.append((taken[False], taken[True]))
    steps = tokens  # the prompts fit one step, which makes the first token
    without, with_it = np.array(pairs).T
    ratios = with_it / without - 1
    draws = np.random.default_rng(1).choice(ratios, size=(2000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    noting = (scheduler.recorder._spent - spent) / (len(pairs) * steps)
    return {
        "vllm": vllm.__version__,
        "passes": len(pairs),
        "requests_a_step": options.requests,
        "steps_a_pass": steps,
        "step_ms_without": round(1e3 * float(np.median(without)) / steps, 4),
        "step_ms_with": round(1e3 * float(np.median(with_it)) / steps, 4),
        "slowdown_percent": round(100 * float(np.median(ratios)), 3),
        "slowdown_percent_interval": [round(100 * float(low), 3), round(100 * float(high), 3)],
        "spread_of_passes_percent": round(100 * float(np.std(without) / np.mean(without)), 2),
        "noting_us_a_step": round(1e6 * noting, 2),
        "writing_thread": [one.name for one in threading.enumerate() if "servecal" in one.name],
        "noting_percent": round(100 * noting * steps / float(np.median(without)), 3),
    }


if __name__ == "__main__":
    main()
