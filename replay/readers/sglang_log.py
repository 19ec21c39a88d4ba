"""An SGLang server's log: its arguments and memory at start-up, and its prefill and decode lines.

Versions 0.3 to 0.5. It holds no requests: the trace has none, facts are in ``meta``, series in ``timeline``. Sources of
the lines: SGLang ``managers/scheduler_metrics_mixin.py`` (``scheduler.py`` before 0.4.7), ``server_args.py``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from replay.readers.fields import MOST_SECONDS
from replay.readers.log_lines import Facts, LogClock, gauges_table, log_head, log_lines, looks_like_a_log
from replay.trace import Trace, file_facts, requests_table

FORMAT = "sglang-log"
REQUESTS_FILE = ""
_TOLD = re.compile(r"server_args=ServerArgs\(|(?:Prefill|Decode) batch[.,] #|max_total_num_tokens=\d+, chunked_prefill")
_NUMBER = r"(\d{1,15}(?:\.\d{1,9})?)"
_BATCH = re.compile(r"(Prefill|Decode) batch[.,] ")
_RUNNING = re.compile(rf"#running-req: {_NUMBER}")
_WAITING = re.compile(rf"#queue-req: {_NUMBER}")
# With a hybrid cache there are several; the full attention's is the one that grows with the context.
_USAGE = re.compile(rf"(?:full )?token usage: {_NUMBER}")
_INPUT = re.compile(rf"input throughput \(token/s\): {_NUMBER}")
_OUTPUT = re.compile(rf"gen throughput \(token/s\): {_NUMBER}")
_NEW = re.compile(r"#new-token: (\d{1,12}), #cached-token: (\d{1,12})")
_RANK = re.compile(r"\bDP(\d{1,5})\b")
_SERVER_ARGUMENT = re.compile(r"[(\s](\w+)=('[^']{0,500}'|[\w.+-]{1,60})(?=[,)])")
_SIZES = re.compile(
    r"\b(max_total_num_tokens|chunked_prefill_size|max_prefill_tokens|max_running_requests|context_len)=(\d+)"
)
_ALLOCATED = re.compile(r"KV Cache is allocated.*?#tokens: (\d{1,15})")
_VERSION = re.compile(r"\bsglang(?:\s+version)?[ =:v]+(\d+\.\d+\.\d+\S{0,20})", re.IGNORECASE)
_SECRET = re.compile(r"(?:^|_)(?:key|token|password|secret)s?$|api_key")
_ARGUMENTS = {
    "tp_size": "tensor_parallel_size",
    "dp_size": "data_parallel_size",
    "pp_size": "pipeline_parallel_size",
    "page_size": "block_size",
    "context_length": "max_model_len",
    "max_running_requests": "max_num_seqs",
    "chunked_prefill_size": "max_num_batched_tokens",
    "dtype": "dtype",
    "kv_cache_dtype": "kv_cache_dtype",
    "quantization": "quantization",
}
"""SGLang's arguments, and vLLM's nearest. ``chunked_prefill_size`` bounds the prompt tokens of a prefill batch; SGLang
decodes in batches of their own, so no budget counts both."""


def detect(path: Path) -> bool:
    """Whether a file is such a log: among its first lines is one that only SGLang writes."""
    if not path.is_file():
        return False
    text = log_head(path)
    return looks_like_a_log(text) and _TOLD.search(text) is not None


def read(path: Path) -> Trace:
    """Read a log.

    Raises
    ------
    InputError
        If the file is damaged or unpacks to too much. A line that is none of those known is passed over.
    """
    clock, facts = LogClock(), Facts()
    given: dict[str, Any] = {}
    samples: list[tuple[float | None, int, dict[str, float]]] = []
    prefills = decodes = computed = cached = 0
    for _, line, message in log_lines(path):
        if clock.local is None and clock.origin is None:
            clock.read(line[:160])
        batch = _BATCH.search(message) if "batch" in message else None
        if batch is None:
            _start(message, given, facts)
            continue
        rank = _RANK.search(line[: line.find("batch")])
        samples.append((clock.read(line[:160]), int(rank[1]) if rank else 0, _gauges(message)))
        prefills, decodes = prefills + (batch[1] == "Prefill"), decodes + (batch[1] == "Decode")
        tokens = _NEW.search(message)
        if tokens:
            computed, cached = computed + int(tokens[1]), cached + int(tokens[2])
    for name in ("max_running_requests", "chunked_prefill_size"):
        if facts.get(name) is not None:
            given[name] = facts.get(name)
    arguments = {ours: given[theirs] for theirs, ours in _ARGUMENTS.items() if given.get(theirs) is not None}
    if facts.get("context_len") is not None:
        arguments["max_model_len"] = facts.pop("context_len")
    blocks, notes = _blocks(facts, arguments.get("block_size"))
    told = {"prefill_lines": prefills, "decode_lines": decodes, "prefill_tokens": computed, "cached_tokens": cached}
    version = facts.pop("version")
    model = given.get("model_path")
    return Trace(
        requests_table({}, 0),
        {
            "name": path.resolve().stem,
            "source": {"format": FORMAT, "files": file_facts([path])},
            "facts_only": True,
            "model": model if isinstance(model, str) else None,
            "hardware": None,
            "engine": {"name": "sglang", "version": version, "arguments": arguments | blocks},
            "facts": {**facts.taken(), "server_args": dict(sorted(given.items())), **(told if samples else {})},
            "clock": clock.note,
            "vantage": "engine",
            "columns": {},
            "notes": [*notes, *facts.conflicts],
        },
        timeline=gauges_table(samples),
    )


def _gauges(message: str) -> dict[str, float]:
    values = {}
    for name, pattern in (
        ("running", _RUNNING),
        ("waiting", _WAITING),
        ("kv_usage", _USAGE),
        ("prompt_throughput", _INPUT),
        ("generation_throughput", _OUTPUT),
    ):
        found = pattern.search(message)
        if found and float(found[1]) < MOST_SECONDS:
            values[name] = float(found[1])
    return values


def _start(message: str, given: dict[str, Any], facts: Facts) -> None:
    """Take in a line of the start-up."""
    if "ServerArgs(" in message:
        for name, value in _SERVER_ARGUMENT.findall(message.partition("ServerArgs")[2]):
            if not _SECRET.search(name):
                given[name] = _literal(value)
    if "max_total_num_tokens=" in message:
        for name, value in _SIZES.findall(message):
            facts.note(name, int(value[:15]))
    allocated = _ALLOCATED.search(message) if "KV Cache is allocated" in message else None
    if allocated:
        facts.note("kv_cache_tokens", int(allocated[1]))
    version = _VERSION.search(message) if "sglang" in message.lower() else None
    if version:
        facts.note("version", version[1].rstrip(",.)"))


def _literal(text: str) -> Any:
    if text in ("True", "False", "None"):
        return {"True": True, "False": False, "None": None}[text]
    if re.fullmatch(r"-?\d{1,15}", text):
        return int(text)
    return float(text) if re.fullmatch(r"-?\d{1,15}\.\d{1,15}", text) else text.strip("'")


def _blocks(facts: Facts, size: Any) -> tuple[dict[str, int], list[str]]:
    """KV blocks of the token pool, and what is to know of them."""
    tokens = facts.get("max_total_num_tokens") or facts.get("kv_cache_tokens")
    if tokens is None:
        return {}, []
    known = isinstance(size, int) and not isinstance(size, bool) and size > 0
    page = size if known else 1
    said = "" if known else " (SGLang's default: the log does not say)"
    note = f"num_gpu_blocks is reconstructed: a pool of {tokens:,} tokens in pages of {page}{said}"
    return {"num_gpu_blocks": tokens // page, "block_size": page}, [note]
