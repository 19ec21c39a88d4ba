"""A vLLM server's log: what it said of itself at start-up, its periodic statistics, its iterations and requests.

Versions 0.8 to 0.32 (messages of V0 where they are alike). It holds no requests with lengths: the trace has none, its
facts are in ``meta`` (``engine``, ``facts``), its series in ``timeline`` and ``iteration_counts``. Sources of the
lines: vLLM ``v1/metrics/loggers.py``, ``v1/engine/core.py``, ``v1/core/kv_cache_utils.py``, ``entrypoints/logger.py``.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from replay.readers.fields import MOST_SECONDS, MOST_TOKENS
from replay.readers.log_lines import Facts, LogClock, gauges_table, log_head, log_lines, looks_like_a_log
from replay.trace import ITERATION_COUNTS, Trace, file_facts, requests_table, table_of

FORMAT = "vllm-log"
REQUESTS_FILE = ""
_TOLD = re.compile(
    r"Initializing an? (?:V\d )?LLM engine \(v|vLLM API server version |Avg prompt throughput: [\d.]+ tokens/s"
    r"|non-default args: \{|KV cache size: [\d,]+ tokens|Iteration\(\d+\): \d+ context requests"
    r"|Chunked prefill is enabled with max_num_batched_tokens="
)
OTHER_SERVER = re.compile(r"server_args=ServerArgs\(|(?:Prefill|Decode) batch[.,] #")
"""Lines of SGLang, whose log is another format."""
_ITERATION = re.compile(
    r"(?:Engine (?P<engine>\d+): )?Iteration\((?P<iteration>\d+)\): (?P<context_requests>\d+) context requests, "
    r"(?P<context_tokens>\d+) context tokens, (?P<generation_requests>\d+) generation requests, "
    r"(?P<generation_tokens>\d+) generation tokens, iteration elapsed time: (?P<elapsed>\d+(?:\.\d+)?) ms"
    r"(?P<dummy> \(dummy\))?(?:, \w+ KV cache usage: (?P<usage>\d+(?:\.\d+)?)%)?"
)
_PERIODIC = re.compile(r"(?:Engine (?P<engine>\d+): |(?P<engines>\d+) Engines Aggregated: )?Avg prompt throughput: ")
_NUMBER = r"(\d+(?:\.\d+)?)"
_GAUGES: tuple[tuple[str, re.Pattern[str], float], ...] = (
    ("prompt_throughput", re.compile(rf"Avg prompt throughput: {_NUMBER} tokens/s"), 1.0),
    ("generation_throughput", re.compile(rf"Avg generation throughput: {_NUMBER} tokens/s"), 1.0),
    ("running", re.compile(rf"Running: {_NUMBER} reqs"), 1.0),
    ("waiting", re.compile(rf"(?:Waiting|Pending): {_NUMBER} reqs"), 1.0),
    # V0 prints the swap space on the CPU behind the GPU's: the first one is the cache.
    ("kv_usage", re.compile(rf"KV cache usage: {_NUMBER}%"), 0.01),
)
_HIT_RATE = re.compile(rf"(?<!External )(?<!MM )[Pp]refix cache hit rate: {_NUMBER}%")
_PROCESS = re.compile(r"\(EngineCore(?:_DP)?_?(\d+) pid=")
_RECEIVED = re.compile(r"Received request (?P<id>\S+?): (?:prompt: |params: )")
_CONTENT = ("Received request", "Generated response", " details: prompt:")
_MAX_TOKENS = re.compile(r"\bmax_tokens=(\d{1,9})\b")
_SECRET = re.compile(r"(?:^|_)(?:key|token|password|secret|credentials?)s?$|api_key")
_CONFIG_VALUE = re.compile(r"\b(\w+)=('[^']{0,500}'|[\w.+:-]{1,100})")
_CAPTURE_SIZES = re.compile(r"['\"]?cudagraph_capture_sizes['\"]?: ?\[([\d, ]*)\]")
_GRAPH_MODE = re.compile(r"['\"]?cudagraph_mode['\"]?: ?<?(?:CUDAGraphMode\.)?(\w+)")
_CONFIGURED = {
    "dtype": "dtype",
    "max_seq_len": "max_model_len",
    "tensor_parallel_size": "tensor_parallel_size",
    "pipeline_parallel_size": "pipeline_parallel_size",
    "data_parallel_size": "data_parallel_size",
    "quantization": "quantization",
    "kv_cache_dtype": "kv_cache_dtype",
    "enforce_eager": "enforce_eager",
    "seed": "seed",
    "enable_prefix_caching": "enable_prefix_caching",
    "enable_chunked_prefill": "enable_chunked_prefill",
    "chunked_prefill_enabled": "enable_chunked_prefill",
    "device_config": "device",
}
"""Fields of the engine configuration that vLLM prints, and the arguments they are."""


def _whole(text: str) -> int:
    return int(text.replace(",", "")[:18])


_FACTS: tuple[tuple[str, re.Pattern[str], tuple[tuple[str, Callable[[str], Any]], ...]], ...] = (
    ("█  version ", re.compile(r"█  version (\d+\.\S+)"), (("version", str),)),
    ("API server version", re.compile(r"vLLM API server version v?(\S+)"), (("version", str),)),
    ("LLM engine (v", re.compile(r"LLM engine \(v([^)\s]{1,60})\)"), (("version", str),)),
    (
        "max_num_batched_tokens=",
        re.compile(r"Chunked prefill is enabled with max_num_batched_tokens=(\d+)"),
        (("max_num_batched_tokens", _whole),),
    ),
    ("Using max model len", re.compile(r"Using max model len (\d+)"), (("max_model_len", _whole),)),
    (
        "Overriding num_gpu_blocks",
        re.compile(r"with num_gpu_blocks_override=(\d+)"),
        (("num_gpu_blocks_override", _whole),),
    ),
    ("GPU blocks:", re.compile(r"# (?:GPU|cuda) blocks: ([\d,]+)"), (("num_gpu_blocks", _whole),)),
    ("KV cache size", re.compile(r"KV cache size: ([\d,]+) tokens"), (("kv_cache_tokens", _whole),)),
    (
        "Maximum concurrency",
        re.compile(r"Maximum concurrency for [\d,]+ tokens per request: (\d+(?:\.\d+)?) ?x"),
        (("maximum_concurrency", float),),
    ),
    ("block size", re.compile(r"Setting (?:attention )?block size to (\d+)"), (("block_size", _whole),)),
    (" backend", re.compile(r"Using (\w+) attention backend out of"), (("attention_backend", str),)),
    (" backend", re.compile(r"Using (\w+(?: Attention)?) backend"), (("attention_backend", str),)),
    (
        "FlashAttention version",
        re.compile(r"Using FlashAttention version (\d+)"),
        (("flash_attention_version", _whole),),
    ),
    ("Loading weights took", re.compile(rf"Loading weights took {_NUMBER} s"), (("weights_seconds", float),)),
    ("Model loading took", re.compile(rf"Model loading took {_NUMBER} Gi?B"), (("weights_gib", float),)),
    ("Available KV cache", re.compile(rf"Available KV cache memory: {_NUMBER} GiB"), (("kv_cache_gib", float),)),
    ("CUDA graph memory", re.compile(rf"Estimated CUDA graph memory: {_NUMBER} GiB"), (("graphs_gib", float),)),
    (
        "Graph capturing",
        re.compile(rf"Graph capturing finished in {_NUMBER} secs?, took {_NUMBER} GiB"),
        (("graphs_seconds", float), ("graphs_gib", float)),
    ),
    (
        "torch.compile took",
        re.compile(rf"torch\.compile (?:took|takes) {_NUMBER} s in total"),
        (("compile_seconds", float),),
    ),
    ("init engine", re.compile(rf"init engine \(.*?\) took {_NUMBER} s"), (("start_seconds", float),)),
    (
        "synchronous scheduling",
        re.compile(r"Asynchronous scheduling is (enabled|disabled)"),
        (("async_scheduling", "enabled".__eq__),),
    ),
    (
        "sync",
        re.compile(r"(Async scheduling (?:is|will be) disabled|Disabling asynchronous scheduling)"),
        (("async_scheduling", lambda _: False),),
    ),
)
"""What a line must hold, the pattern, and the facts that its groups are."""
ARGUMENTS = ("max_num_batched_tokens", "max_model_len", "block_size", "num_gpu_blocks", "async_scheduling")
"""Facts that are engine arguments."""


def detect(path: Path) -> bool:
    """Whether a file is such a log: among its first lines is one that only vLLM writes."""
    if not path.is_file():
        return False
    text = log_head(path)
    return looks_like_a_log(text) and _TOLD.search(text) is not None and OTHER_SERVER.search(text) is None


@dataclass
class _Seen:
    """What was read so far."""

    clock: LogClock = field(default_factory=LogClock)
    facts: Facts = field(default_factory=Facts)
    arguments: dict[str, Any] = field(default_factory=dict)
    samples: list[tuple[float | None, int, dict[str, float]]] = field(default_factory=list)
    aggregated: list[tuple[float | None, int, dict[str, float]]] = field(default_factory=list)
    iterations: list[dict[str, Any]] = field(default_factory=list)
    received: int = 0
    received_at: list[float] = field(default_factory=list)
    starts: int = 0
    dummies: int = 0


def read(path: Path) -> Trace:
    """Read a log.

    Raises
    ------
    InputError
        If the file is damaged or unpacks to too much. A line that is none of those known is passed over.
    """
    seen = _Seen()
    for _, line, message in log_lines(path):
        if seen.clock.local is None and seen.clock.origin is None:
            seen.clock.read(line[:160])
        _take(seen, line, message)
    arguments, notes = _arguments(seen)
    samples = seen.aggregated or seen.samples
    facts = seen.facts.taken()
    if seen.received:
        times = seen.received_at
        facts["received_requests"] = {"count": seen.received, **_ends(times)}
    model, tag = arguments.pop("model", None), arguments.pop("model_tag", None)
    return Trace(
        requests_table({}, 0),
        {
            "name": path.resolve().stem,
            "source": {"format": FORMAT, "files": file_facts([path])},
            "facts_only": True,
            "model": next((one for one in (tag, model) if isinstance(one, str)), None),
            "hardware": None,
            "engine": {"name": "vllm", "version": seen.facts.get("version"), "arguments": arguments},
            "facts": {name: value for name, value in facts.items() if name != "version"},
            "clock": seen.clock.note,
            "vantage": "engine",
            "columns": {},
            "notes": [*notes, *seen.facts.conflicts],
        },
        timeline=gauges_table(samples),
        iteration_counts=table_of(seen.iterations, ITERATION_COUNTS) if seen.iterations else None,
    )


@dataclass(frozen=True)
class ReceivedRequest:
    """A line ``Received request``: ``time`` in seconds on the trace's clock (1-s steps), or None without a stamp."""

    id: str
    time: float | None
    max_tokens: int | None


def received_requests(path: Path) -> Iterator[ReceivedRequest]:
    """Yield the requests that a log names (``--enable-log-requests``), to join it with a client's file.

    Raises
    ------
    InputError
        As ``read``.
    """
    clock = LogClock()
    for _, line, message in log_lines(path):
        match = _RECEIVED.search(message) if "Received request" in message else None
        if match or (clock.local is None and clock.origin is None):
            time = clock.read(line[:160])
            if match:
                most = _MAX_TOKENS.search(message, match.end())
                yield ReceivedRequest(match["id"], time, int(most[1]) if most else None)


def _ends(times: list[float]) -> dict[str, float]:
    return {"first": min(times), "last": max(times)} if times else {}


def _take(seen: _Seen, line: str, message: str) -> None:
    """Take in one line; the most frequent kinds first."""
    if any(words in message for words in _CONTENT):
        # Prompts and answers may be quoted here: whatever they say is none of the server's own lines.
        if _RECEIVED.search(message):
            seen.received += 1
            time = seen.clock.read(line[:160])
            seen.received_at = [*_ends([*seen.received_at, *([] if time is None else [time])]).values()]
    elif "Iteration(" in message:
        match = _ITERATION.search(message)
        if match:
            _iteration(seen, line, match)
    elif "Avg prompt throughput" in message:
        _periodic(seen, line, message)
    elif "non-default args: {" in message:
        seen.starts += 1
        seen.arguments |= _given(message.partition("non-default args: ")[2])
    else:
        if "LLM engine (v" in message:
            _configured(seen, message)
        for needle, pattern, facts in _FACTS:
            found = pattern.search(message) if needle in message else None
            if found:
                for (name, convert), text in zip(facts, found.groups(), strict=True):
                    value = convert(text)
                    if not isinstance(value, int | float) or value <= MOST_SECONDS:
                        seen.facts.note(name, value)
                if needle == " backend":
                    break


def _iteration(seen: _Seen, line: str, match: re.Match[str]) -> None:
    if match["dummy"]:
        seen.dummies += 1
        return
    process = _PROCESS.search(line[:200])
    row: dict[str, Any] = {
        name: min(int(match[name][:18]), MOST_TOKENS)
        for name in ("iteration", "context_requests", "context_tokens", "generation_requests", "generation_tokens")
    }
    row |= {
        "engine": min(int((match["engine"] or (process[1] if process else "0"))[:9]), 2**31 - 1),
        "duration": float(match["elapsed"][:18]) * 1e-3,
        "logged": seen.clock.read(line[:160]),
        "kv_usage": float(match["usage"][:18]) * 0.01 if match["usage"] else None,
    }
    seen.iterations.append(row)


def _periodic(seen: _Seen, line: str, message: str) -> None:
    begin = _PERIODIC.search(message)
    if begin is None:
        return
    values = {}
    for name, pattern, unit in _GAUGES:
        found = pattern.search(message)
        if found and float(found[1]) < MOST_SECONDS:
            values[name] = float(found[1]) * unit
    rate = _HIT_RATE.search(message)
    if rate:
        seen.facts.pop("prefix_cache_hit_rate")
        seen.facts.note("prefix_cache_hit_rate", round(float(rate[1][:18]) * 0.01, 6))
    time = seen.clock.read(line[:160])
    if begin["engines"]:
        seen.aggregated.append((time, 0, values))
    else:
        seen.samples.append((time, int((begin["engine"] or "0")[:9]), values))


def _given(text: str) -> dict[str, Any]:
    """Arguments of a command line as vLLM prints them: plain values, secrets left out."""
    try:
        given = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        # Values that are objects have no literal form; those before and behind them have.
        given = {}
        for key, value in re.findall(r"'(\w+)': ('[^']{0,500}'|True|False|-?[\d.]{1,18})(?=[,}])", text):
            try:
                given[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                continue
    if not isinstance(given, dict):
        return {}
    return {key: value for key, value in given.items() if isinstance(key, str) and _plain(key, value)}


def _plain(key: str, value: Any) -> bool:
    if _SECRET.search(key):
        return False
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, bool | str) or (isinstance(value, int) and abs(value) < 2**63)


def _configured(seen: _Seen, message: str) -> None:
    """The engine's configuration as printed: its own values, defaults included."""
    text = message.partition(" with config: ")[2]
    for name, value in _CONFIG_VALUE.findall(text):
        if name in _CONFIGURED:
            seen.facts.note(f"config.{_CONFIGURED[name]}", _literal(value))
        elif name == "model":
            seen.facts.note("config.model", _literal(value))
    sizes = _CAPTURE_SIZES.search(text)
    if sizes:
        listed = sorted(int(one[:9]) for one in sizes[1].replace(" ", "").split(",") if one)
        seen.facts.note("cudagraph_capture_sizes", listed)
    mode = _GRAPH_MODE.search(text)
    if mode:
        seen.facts.note("cudagraph_mode", mode[1])


def _literal(text: str) -> Any:
    if text in ("True", "False", "None"):
        return {"True": True, "False": False, "None": None}[text]
    if re.fullmatch(r"\d{1,18}", text):
        return int(text)
    return text.strip("'").removeprefix("torch.")


def _arguments(seen: _Seen) -> tuple[dict[str, Any], list[str]]:
    """Engine arguments: as configured, then as given, then as vLLM said it took them; and what is to know of them."""
    facts, notes = seen.facts, []
    configured = {name: facts.pop(f"config.{name}") for name in {"model", *_CONFIGURED.values()}}
    arguments = {name: configured[name] for name in sorted(configured) if configured[name] is not None}
    arguments |= {name: seen.arguments[name] for name in sorted(seen.arguments)}
    arguments |= {name: value for name in ARGUMENTS if (value := facts.get(name)) is not None}
    for name in ARGUMENTS:
        facts.pop(name)
    override, tokens = facts.pop("num_gpu_blocks_override"), facts.get("kv_cache_tokens")
    size = arguments.get("block_size")
    if override is not None:
        arguments["num_gpu_blocks"] = override
    elif tokens is not None and "num_gpu_blocks" not in arguments:
        known = isinstance(size, int) and not isinstance(size, bool) and size > 0
        arguments["num_gpu_blocks"] = -(-tokens // (size if known else 16))
        said = f"{tokens:,} tokens of KV cache in blocks of {size if known else '16 (assumed: the log does not say)'}"
        notes.append(f"num_gpu_blocks is reconstructed from {said}; /metrics has it exactly (vllm:cache_config_info)")
    if seen.starts > 1:
        notes.append(f"the log holds {seen.starts} starts of the server: facts are those said last")
    if seen.dummies:
        notes.append(f"{seen.dummies} dummy iterations (an idle data-parallel rank beside a busy one) are left out")
    if arguments.get("device") == "cpu":
        arguments["async_scheduling"] = False  # whatever was asked for
    if seen.iterations:
        if arguments.get("async_scheduling") is False:
            notes.append("durations of iterations are the model's execution: scheduling between them is not in it")
        else:
            notes.append(
                "durations of iterations are what was waited for results: with async scheduling, less than a step"
            )
    return arguments, notes
