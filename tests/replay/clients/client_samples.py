"""Minimal files of every client benchmark tool, true to what the tools write; all times dyadic, so exact."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa

NS = 1_760_000_000_000_000_000
"""A wall-clock stamp in nanoseconds. Sixteenths of a second are whole nanoseconds."""
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": gzip.compress,
    "zstd": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
}


def sglang(**changes: Any) -> dict[str, Any]:
    """One line of ``bench_serving --output-details``."""
    return {
        "tag": None,
        "backend": "sglang-oai",
        "dataset_name": "random",
        "request_rate": 4.0,
        "max_concurrency": None,
        "sharegpt_output_len": None,
        "random_input_len": 64,
        "random_output_len": 4,
        "random_range_ratio": 1.0,
        "server_info": {"model_path": "meta-llama/Llama-3.2-1B", "version": "0.5.3"},
        "duration": 2.0,
        "completed": 2,
        "total_input_tokens": 128,
        "total_output_tokens": 6,
        "total_output_tokens_retokenized": 6,
        "request_throughput": 1.0,
        "mean_e2e_latency_ms": 93.75,
        "mean_ttft_ms": 46.875,
        "p99_ttft_ms": 62.5,
        "mean_tpot_ms": 31.25,
        "mean_itl_ms": 31.25,
        "input_lens": [64, 64, 64],
        "output_lens": [4, 2, 0],
        "ttfts": [0.0625, 0.03125, 0.0],
        "itls": [[0.03125, 0.015625, 0.03125], [0.0625], []],
        "generated_texts": ["a", "b", ""],
        "errors": ["", "", "Bad Gateway"],
        **changes,
    }


def aiperf(index: int, **changes: Any) -> dict[str, Any]:
    """One record of ``profile_export.jsonl``."""
    sent = NS + index * 62_500_000
    record = {
        "metadata": {
            "session_num": index,
            "x_request_id": f"id-{index}",
            "conversation_id": f"session_{index}",
            "turn_index": 0,
            "credit_issued_ns": sent - 15_625_000,
            "request_start_ns": sent,
            "request_ack_ns": sent + 1,
            "request_end_ns": sent + 125_000_000,
            "worker_id": "worker_1",
            "benchmark_phase": "warmup" if index == 0 else "profiling",
            "was_cancelled": False,
        },
        "metrics": {
            "input_sequence_length": {"value": 30, "unit": "tokens"},
            "output_sequence_length": {"value": 5, "unit": "tokens"},
            "usage_prompt_tokens": {"value": 13, "unit": "tokens"},
            "usage_completion_tokens": {"value": 3, "unit": "tokens"},
            "usage_prompt_cache_read_tokens": {"value": 2, "unit": "tokens"},
            "time_to_first_token": {"value": 62.5, "unit": "ms"},
            "inter_chunk_latency": {"value": [15.625, 31.25], "unit": "ms"},
            "inter_token_latency": {"value": 23.4375, "unit": "ms"},
            "request_latency": {"value": 109.375, "unit": "ms"},
        },
        "error": None,
    }
    record |= changes
    return record


FAILED_AIPERF = {
    "metrics": {"error_isl": {"value": 30, "unit": "tokens"}},
    "error": {"code": 500, "type": "Internal Server Error", "message": "no"},
}


def aiperf_raw(index: int, **changes: Any) -> dict[str, Any]:
    """One line of ``profile_export_raw.jsonl``: a role, two chunks, usage, the end."""

    def event(at: int, **body: Any) -> dict[str, Any]:
        value = json.dumps({"object": "chat.completion.chunk", **body})
        return {"perf_ns": 5_000_000_000 + at * 15_625_000, "packets": [{"name": "data", "value": value}]}

    done = {"perf_ns": 5_093_750_000, "packets": [{"name": "data", "value": "[DONE]"}]}
    return {
        "metadata": aiperf(index)["metadata"],
        "start_perf_ns": 5_000_000_000,
        "payload": {"model": "m", "stream": True, "messages": []},
        "status": 200,
        "responses": [
            event(3, choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}]),
            event(4, choices=[{"index": 0, "delta": {"content": "hello "}}]),
            event(6, choices=[{"index": 0, "delta": {"content": "you"}}]),
            event(6, choices=[], usage={"prompt_tokens": 13, "completion_tokens": 2, "total_tokens": 15}),
            done,
        ],
        **changes,
    }


def guidellm_request(index: int, status: str = "completed", **changes: Any) -> dict[str, Any]:
    """One request of GuideLLM 0.8."""
    sent = 1_760_000_000.0 + index / 8
    timings: dict[str, Any] = {
        "targeted_start": sent - 1 / 16,
        "queued": sent - 1,
        "dequeued": sent - 1 / 32,
        "resolve_start": sent,
        "request_start": sent,
        "first_request_iteration": sent + 1 / 32,
        "first_token_iteration": sent + 1 / 16,
        "last_token_iteration": sent + 3 / 16,
        "token_iterations": 3,
        "request_end": sent + 1 / 4,
    }
    if status != "completed":
        timings |= dict.fromkeys(("first_token_iteration", "last_token_iteration", "request_end"))
    return {
        "type_": "generative_request_stats",
        "request_id": f"r{index}",
        "response_id": f"cmpl-{index}",
        "info": {
            "request_id": f"r{index}",
            "status": status,
            "timings": timings,
            "error": None if status == "completed" else "HTTPStatusError",
        },
        "input_metrics": {"text_tokens": 13, "total_tokens": 13, "cached_tokens": 2},
        "output_metrics": {"text_tokens": 3, "total_tokens": 3, "cached_tokens": None},
        **changes,
    }


def guidellm() -> dict[str, Any]:
    """A report of GuideLLM 0.8 with one benchmark."""
    return {
        "metadata": {"version": 2, "guidellm_version": "0.8.1", "platform": "Linux"},
        "config": {"metadata": {"labels": {}}, "spec": {"backend": {"kind": "openai_http", "model": "m/x"}}},
        "benchmarks": [
            {
                "type_": "generative_benchmark",
                "config": {"strategy": {"type_": "constant", "rate": 8.0}, "sample_size": None},
                "requests": {
                    "successful": [guidellm_request(1), guidellm_request(0)],
                    "incomplete": [guidellm_request(2, "cancelled")],
                    "errored": [guidellm_request(3, "errored")],
                    "total": None,
                },
                "start_time": 1_760_000_000.0,
            }
        ],
        "conclusions": [],
    }


def guidellm_old() -> dict[str, Any]:
    """A report of GuideLLM 0.2: stamps stand in the request itself."""
    request = {
        "type_": "generative_text_response",
        "request_id": "a",
        "request_type": "text_completions",
        "prompt": "x",
        "output": "y",
        "prompt_tokens": 10,
        "output_tokens": 3,
        "start_time": 1_740_000_000.0,
        "end_time": 1_740_000_000.25,
        "first_token_time": 1_740_000_000.0625,
        "last_token_time": 1_740_000_000.1875,
    }
    failed = {**request, "request_id": "b", "error": "timeout", "first_token_time": -1, "last_token_time": -1}
    strategy = {"type_": "concurrent", "streams": 4}
    return {
        "benchmarks": [
            {
                "type_": "generative_benchmark",
                "id_": "0",
                "args": {"strategy": strategy},
                "run_stats": {},
                "requests": {"successful": [request], "incomplete": [], "errored": [failed]},
            }
        ]
    }


def inference_perf(index: int, **changes: Any) -> dict[str, Any]:
    """One request of inference-perf 0.7."""
    sent = 812.0 + index / 4
    times = [sent + 1 / 16, sent + 3 / 32, sent + 1 / 8]
    return {
        "start_time": sent,
        "end_time": sent + 3 / 16,
        "request": json.dumps({"model": "m", "prompt": "x", "max_tokens": 3, "ignore_eos": True}),
        "response": "...",
        "info": {
            "request_metrics": {"text": {"input_tokens": 20}, "image": None},
            "response_metrics": {
                "output_tokens": 6,
                "server_usage": {
                    "prompt_tokens": 17,
                    "completion_tokens": 3,
                    "prompt_tokens_details": {"cached_tokens": 16},
                },
                "response_chunks": ["a", "b", "c"],
                "chunk_times": times,
                "output_token_times": [time for time in times for _ in range(2)],
            },
            "input_tokens": 20,
        },
        "error": None,
        **changes,
    }


FAILED_INFERENCE_PERF = {
    "info": {"request_metrics": {"text": {"input_tokens": 0}}, "response_metrics": None, "input_tokens": 0},
    "error": {"error_type": "HTTP Error 500", "error_msg": "no"},
}


def stage() -> dict[str, Any]:
    """inference-perf's summary of a stage."""

    def spread(mean: float) -> dict[str, float]:
        return {"mean": mean, "min": mean / 2, "max": 2 * mean, "p10": mean / 2, "median": mean, "p90": 3 * mean / 2}

    same = {"total": 80.0, "mean": 8.0, "min": 8.0, "max": 8.0, "p10": 8.0, "p90": 8.0}
    return {
        "benchmark_time_seconds": 4.0,
        "load_summary": {"count": 11, "send_duration": 2.0, "requested_rate": 5.0, "achieved_rate": 5.5},
        "successes": {
            "count": 10,
            "latency": {
                "request_latency": {**spread(0.5), "p99": 0.75, "p99.9": 0.875},
                "normalized_time_per_output_token": spread(0.0625),
                "time_per_output_token": spread(0.03125),
                "time_to_first_token": {**spread(0.0625), "p99": 0.125},
                "inter_token_latency": spread(0.015625),
            },
            "throughput": {"output_tokens_per_sec": 40.0, "requests_per_sec": 2.5},
            "prompt_tokens": {"total": 1000.0, **spread(100.0)},
            "output_len": {**same, "mean": 12.0},
            "output_tokens": same,
        },
        "failures": {"count": 1, "request_latency": None},
    }


def perf_analyzer_request(index: int, usage: bool = True, **changes: Any) -> dict[str, Any]:
    """One request of perf_analyzer through an OpenAI chat endpoint: role, text, a text cut in two, usage, the end."""
    sent = NS + index * 125_000_000

    def chunk(**delta: Any) -> str:
        return "data: " + json.dumps({"choices": [{"index": 0, "delta": delta}]}) + "\n\n"

    cut = chunk(content="you")
    said = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}}
    responses = [chunk(role="assistant", content=""), chunk(content="hi"), cut[:20], cut[20:]]
    responses += ["data: " + json.dumps(said) + "\n\n"] if usage else []
    responses.append("data: [DONE]\n\n")
    return {
        "timestamp": sent,
        "request_inputs": {"payload": json.dumps({"model": "m/x", "messages": []})},
        "response_timestamps": [sent + (place + 1) * 15_625_000 for place in range(len(responses))],
        "response_outputs": [{"response": one} for one in responses],
        **changes,
    }


def perf_analyzer() -> dict[str, Any]:
    """``profile_export.json`` of one experiment."""
    return {
        "experiments": [
            {
                "experiment": {"mode": "concurrency", "value": 2},
                "requests": [perf_analyzer_request(0), perf_analyzer_request(1)],
                "window_boundaries": [NS, NS + 10**9],
            }
        ],
        "version": "2.59.1",
        "service_kind": "openai",
        "endpoint": "v1/chat/completions",
    }


def llmperf(**changes: Any) -> dict[str, Any]:
    """One of LLMPerf's individual responses."""
    return {
        "error_code": None,
        "error_msg": "",
        "inter_token_latency_s": 0.1,
        "ttft_s": 0.25,
        "end_to_end_latency_s": 1.0,
        "request_output_throughput_token_per_s": 10.0,
        "number_total_tokens": 60,
        "number_output_tokens": 10,
        "number_input_tokens": 50,
        **changes,
    }


FAILED_LLMPERF = llmperf(
    error_code=500, error_msg="no", ttft_s=0, end_to_end_latency_s=0, number_output_tokens=0, number_total_tokens=50
)
SIM = (
    "instance id,request id,model,input,output,arrival,end_time,latency,queuing_delay,TTFT,TPOT,ITL\n"
    '0,1,m/x,20,3,125000000,281250000,156250000,0,93750000,31250000,"[15625000, 46875000]"\n'
    '0,0,m/x,30,1,62500000,312500000,250000000,0,250000000,0,"[]"\n'
)


def lines(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def document(value: Any) -> bytes:
    return json.dumps(value).encode()


def _summary() -> dict[str, Any]:
    arrays = ("input_lens", "output_lens", "ttfts", "itls", "generated_texts", "errors")
    kept = {key: value for key, value in sglang().items() if key not in arrays}
    return {**kept, "total_output_tokens": 8}


SAMPLES: dict[str, tuple[str, bytes]] = {
    "sglang": ("sglang-bench", lines(sglang())),
    "sglang-summary": ("sglang-bench", lines(_summary())),
    "aiperf": ("aiperf", lines(aiperf(0), aiperf(2), aiperf(1), aiperf(3, **FAILED_AIPERF))),
    "aiperf-raw": ("aiperf", lines(aiperf_raw(0), aiperf_raw(1), aiperf_raw(2))),
    "guidellm": ("guidellm", document(guidellm())),
    "guidellm-old": ("guidellm", document(guidellm_old())),
    "inference-perf": (
        "inference-perf",
        json.dumps([inference_perf(0), inference_perf(1, **FAILED_INFERENCE_PERF)], indent=2).encode(),
    ),
    "inference-perf-stage": ("inference-perf", json.dumps(stage(), indent=2).encode()),
    "perf-analyzer": ("perf-analyzer", document(perf_analyzer())),
    "llmperf": ("llmperf", json.dumps([llmperf(), FAILED_LLMPERF, llmperf()], indent=4).encode()),
    "llmservingsim-sim": ("llmservingsim-sim", SIM.encode()),
}
"""Format and content of a valid file of every kind."""
