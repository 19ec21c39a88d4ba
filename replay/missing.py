"""What a trace does not tell, what that costs, and which flag, log or metric would supply it.

Flags and lines are vLLM's (0.16 to 0.32); ``servecal ingest`` prints them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from replay.trace import REQUEST_CLOCK, Trace

RECORDER = "the recorder (`servecal record` says how to switch it on)"


@dataclass(frozen=True)
class Missing:
    """Something unknown: its name, what cannot be done without it, and how to get it next time."""

    what: str
    costs: str
    supply: str


def _no(column: str) -> Callable[[Trace], bool]:
    return lambda trace: len(trace) > 0 and not trace.has(column)


def _no_argument(name: str) -> Callable[[Trace], bool]:
    return lambda trace: ((trace.meta.get("engine") or {}).get("arguments") or {}).get(name) is None


def _no_arrivals(trace: Trace) -> bool:
    return len(trace) > 0 and (trace.clock == REQUEST_CLOCK or not trace.has("arrival"))


def _no_latencies(trace: Trace) -> bool:
    return len(trace) > 0 and not trace.has("last_token") and trace.batches is None and not trace.meta.get("aggregates")


def _no_tokens(trace: Trace) -> bool:
    return _no("token_times")(trace) and not trace.has("client_token_times") and trace.iterations is None


def _no_kv_usage(trace: Trace) -> bool:
    """Without a timeline, that is said already."""
    return trace.timeline is not None and trace.timeline.column("kv_usage").null_count == trace.timeline.num_rows


_CHECKS: tuple[tuple[Callable[[Trace], bool], Missing], ...] = (
    (
        lambda trace: not len(trace),
        Missing(
            "requests",
            "nothing can be replayed: the sources hold facts and series only",
            "`vllm bench serve --save-result --save-detailed` at the client, or " + RECORDER,
        ),
    ),
    (
        _no_arrivals,
        Missing(
            "arrival",
            "when requests were sent must be drawn (--arrivals poisson:rate=R,seed=S), and is not what was served",
            "`vllm bench serve` 0.16 or later (start_times), or " + RECORDER,
        ),
    ),
    (
        _no_latencies,
        Missing(
            "first_token, last_token",
            "it can be replayed, but there is nothing to compare with",
            "`vllm bench serve --save-result --save-detailed`, or " + RECORDER,
        ),
    ),
    (
        _no_tokens,
        Missing(
            "token_times",
            "no inter-token latencies (ITL); TPOT is a mean over each request",
            "`vllm bench serve --save-detailed` (itls), or the iterations of " + RECORDER,
        ),
    ),
    (
        lambda trace: _no("queued")(trace) and _no("scheduled")(trace) and trace.batches is None,
        Missing(
            "queued, scheduled",
            "time in the queue and in the front end cannot be told apart from the engine's",
            RECORDER + ", or OTLP spans: `vllm serve --otlp-traces-endpoint URL`",
        ),
    ),
    (
        _no("cached_tokens"),
        Missing(
            "cached_tokens",
            "prefix-cache hits are simulated, not checked",
            RECORDER + ", or `vllm serve --enable-prompt-tokens-details` and a client that keeps `usage`",
        ),
    ),
    (
        _no("block_hashes"),
        Missing(
            "block_hashes",
            "shared prefixes are unknown: no request hits the prefix cache in a replay",
            RECORDER + " (salted hashes of prompt blocks), or a workload file with prompt token ids or hash_ids",
        ),
    ),
    (
        _no("preemptions"),
        Missing(
            "preemptions",
            "whether requests were preempted is simulated, not checked",
            RECORDER + ", or the total from the metric `vllm:num_preemptions_total`",
        ),
    ),
    (
        lambda trace: trace.iterations is None,
        Missing(
            "iterations",
            "batches are reconstructed from stamps, or simulated",
            RECORDER + ", or `vllm serve --enable-logging-iteration-details` (0.16 or later) and the server log",
        ),
    ),
    (
        lambda trace: trace.timeline is None or not trace.timeline.num_rows,
        Missing(
            "timeline",
            "running, waiting and KV use over time cannot be compared",
            "the server log ('Avg prompt throughput' lines every 10 s), or scrapes of /metrics "
            "(vllm:num_requests_running, vllm:kv_cache_usage_perc)",
        ),
    ),
    (
        _no_kv_usage,
        Missing(
            "timeline.kv_usage",
            "KV use over time cannot be compared",
            "the server log ('GPU KV cache usage'), or the metric vllm:kv_cache_usage_perc",
        ),
    ),
    (
        lambda trace: (trace.meta.get("engine") or {}).get("version") is None,
        Missing(
            "engine.version",
            "the scheduler's rules and defaults differ between versions",
            "the log line 'Initializing a V1 LLM engine (v...)', or --set engine.version=0.32.0",
        ),
    ),
    (
        lambda trace: trace.meta.get("model") is None,
        Missing("model", "shapes of the model are unknown", "the log line 'non-default args', or --model NAME"),
    ),
    (
        lambda trace: trace.meta.get("hardware") is None,
        Missing(
            "hardware",
            "nothing tells whether a profile is of the same device",
            f"{RECORDER}, or `vllm bench serve --metadata hardware=NAME`",
        ),
    ),
    (
        _no_argument("num_gpu_blocks"),
        Missing(
            "engine.num_gpu_blocks",
            "KV capacity decides preemptions and prefix hits; it can only be estimated",
            "the log line 'GPU KV cache size: N tokens' (start-up of `vllm serve`), or the metric "
            "vllm:cache_config_info, or --set engine.num_gpu_blocks=N",
        ),
    ),
    (
        _no_argument("max_num_seqs"),
        Missing(
            "engine.max_num_seqs",
            "how many requests run at once must be given or assumed",
            "the log line 'non-default args', or --set engine.max_num_seqs=N",
        ),
    ),
    (
        _no_argument("max_num_batched_tokens"),
        Missing(
            "engine.max_num_batched_tokens",
            "the token budget of an iteration must be given or assumed",
            "the log line 'Chunked prefill is enabled with max_num_batched_tokens=N', or "
            "--set engine.max_num_batched_tokens=N",
        ),
    ),
    (
        _no_argument("max_model_len"),
        Missing(
            "engine.max_model_len",
            "the longest context must be given or assumed",
            "the log line 'Using max model len N', or --set engine.max_model_len=N",
        ),
    ),
    (
        _no_argument("enable_prefix_caching"),
        Missing(
            "engine.enable_prefix_caching",
            "whether prefixes were cached is assumed by version",
            "the log line 'Initializing a V1 LLM engine', or the metric vllm:cache_config_info",
        ),
    ),
)


def missing(trace: Trace) -> tuple[Missing, ...]:
    """Return what a trace does not tell, requests first, then the engine."""
    return tuple(one for absent, one in _CHECKS if absent(trace))
