"""``vllm bench serve --save-result --save-detailed``: a client's view of a run, one JSON object.

Without ``--save-detailed`` it holds aggregates only (``vllm_bench_summary``).

Versions: 0.6 to 0.32. ``start_times`` came with 0.16; before it a file does not say when requests were sent,
and the trace's stamps count from each request's own sending.
"""

from __future__ import annotations

import math
import mmap
from codecs import BOM_UTF8
from pathlib import Path
from typing import Any

import numpy as np

from profiles.errors import InputError, found
from replay.readers.fields import Record, as_seconds, as_text, as_tokens, parse_json, read_text
from replay.readers.vllm_bench_summary import is_summary, summary_trace
from replay.trace import REQUEST_CLOCK, RUN_CLOCK, Trace, file_facts, requests_table

FORMAT = "vllm-bench"
REQUESTS_FILE = ""
ARRAYS = ("input_lens", "output_lens", "ttfts", "itls", "errors")
_DEPLOYMENT = (
    "max_num_seqs",
    "max_num_batched_tokens",
    "tensor_parallel_size",
    "max_model_len",
    "num_gpu_blocks",
)
_LOAD = ("request_rate", "burstiness", "max_concurrency", "duration", "num_prompts")


def detect(path: Path) -> bool:
    """Whether a file is a result of ``vllm bench serve``."""
    if not path.is_file():
        return False
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        # Keys may stand behind the arrays, where somebody has sorted them.
        begins = content[:64].removeprefix(BOM_UTF8).lstrip().startswith(b"{")
        return begins and content.find(b'"request_throughput"') >= 0 and content.find(b'"model_id"') >= 0


def read(path: Path) -> Trace:
    """Read a run.

    Raises
    ------
    InputError
        Naming file, request and field of what cannot be used.
    """
    record = _one_run(path)
    if is_summary(record):
        return summary_trace(record, _described(path, record))
    missing = [name for name in ARRAYS[:4] if record.get(name) is None]
    if missing:
        raise record.error(missing[0], "is missing; run `vllm bench serve` with --save-result --save-detailed")
    arrays = {name: record.get(name) for name in (*ARRAYS, "start_times") if record.get(name) is not None}
    for name, values in arrays.items():
        if not isinstance(values, list):
            raise record.error(name, f"expected an array, found {found(values)}")
    for name, values in arrays.items():
        if len(values) != len(arrays["ttfts"]):
            raise record.error(name, f"has {len(values)} entries, ttfts has {len(arrays['ttfts'])}")
    count = len(arrays["ttfts"])
    if not count:
        raise record.error("ttfts", "holds no requests")
    chat = "chat" in str(record.get("backend") or record.get("endpoint_type") or "")
    rows = [_request(path, arrays, index, chat) for index in range(count)]
    starts = "start_times" in arrays
    origin = min(row["sent"] for row in rows) if starts else 0.0
    columns = _columns(rows, origin, starts)
    notes = _notes(rows)
    measured = ("prompt_tokens", "output_tokens", "first_token", "last_token", "token_times")
    return Trace(
        requests_table(columns, count),
        {
            **_described(path, record),
            "clock": {
                "kind": RUN_CLOCK if starts else REQUEST_CLOCK,
                "origin": origin,
                "note": "the client's performance counter",
            },
            # Every version sends a test request before it measures.
            "warmed_up": True,
            "columns": {
                "arrival": "measured: when the client sent it" if starts else "unknown: the file has no start_times",
                **dict.fromkeys(measured, "measured"),
            },
            "notes": notes,
        },
    )


def _described(path: Path, record: Record) -> dict[str, Any]:
    """What the file says besides its requests."""
    load = {key: record.get(key) for key in _LOAD}
    return {
        "name": path.resolve().stem,
        "source": {"format": FORMAT, "files": file_facts([path])},
        "model": record.text("model_id"),
        "hardware": record.text("hardware"),
        "engine": {
            "name": "vllm",
            "version": record.text("vllm_version") or record.text("engine_version"),
            "arguments": {key: record.get(key) for key in _DEPLOYMENT if record.get(key) is not None},
        },
        "vantage": "client",
        "load": {key: value for key, value in load.items() if _plain(value)},
    }


def _one_run(path: Path) -> Record:
    """The file's object; ``--append-result`` writes one a line."""
    text = read_text(path)
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and all(line.startswith("{") and line.rstrip().endswith("}") for line in lines):
        raise InputError(
            f"holds {len(lines)} runs (--append-result); give each its own file, for example with "
            f"`sed -n 1p {path.name}`",
            file=path,
        )
    value = parse_json(text, path)
    if not isinstance(value, dict):
        raise InputError(f"expected a JSON object, found {found(value)}", file=path)
    return Record(value, path)


def _plain(value: Any) -> bool:
    """Whether a value can stand in ``meta``: text, or a number that JSON has."""
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _request(path: Path, arrays: dict[str, list[Any]], index: int, chat: bool) -> dict[str, Any]:
    """One request's lengths, status and times since it was sent."""
    where = f"request {index}"

    def error(field: str) -> Any:
        return lambda message: InputError(message, file=path, row=where, field=field)

    failure = arrays["errors"][index] if "errors" in arrays else None
    ttft = as_seconds(arrays["ttfts"][index], False, error("ttfts"))
    gaps = arrays["itls"][index]
    if not isinstance(gaps, list):
        raise error("itls")(f"expected an array of seconds, found {found(gaps)}")
    times = np.cumsum([ttft, *(as_seconds(gap, False, error("itls")) for gap in gaps)])
    said = as_tokens(arrays["output_lens"][index], 0, error("output_lens"))
    row: dict[str, Any] = {
        "prompt": as_tokens(arrays["input_lens"][index], 0, error("input_lens")),
        "status": "ok",
        "error": None,
        "said": said,
        "output": said,
        "times": times,
        "sent": 0.0,
    }
    if "start_times" in arrays:
        row["sent"] = as_seconds(arrays["start_times"][index], True, error("start_times"))
    if failure is not None and as_text(failure, error("errors")):
        row |= {"status": "failed", "error": failure, "output": None, "times": None}
    elif ttft == 0 and not gaps:
        # No content came, yet nothing failed: the model ended at once, after a prefill that the engine did.
        row |= {"status": "silent", "output": 1, "times": None}
    elif ttft == 0:
        raise error("ttfts")("is 0 although tokens followed: expected a time above 0")
    else:
        if chat and gaps and len(gaps) == said:
            # The chat endpoint opens with a chunk that holds only the role.
            row["times"] = times = times[1:]
        # Fewer tokens than chunks: output_lens counts re-tokenised text, the chunks are the engine's.
        row["output"] = max(said, len(times))
    if row["status"] != "failed" and row["prompt"] < 1:
        raise error("input_lens")("expected at least 1 token, found 0")
    return row


def _columns(rows: list[dict[str, Any]], origin: float, starts: bool) -> dict[str, Any]:
    stamps = [None if row["times"] is None else row["times"] + (row["sent"] - origin) for row in rows]
    return {
        "id": [str(index) for index in range(len(rows))],
        "status": [row["status"] for row in rows],
        "error": [row["error"] for row in rows],
        "arrival": [row["sent"] - origin for row in rows] if starts else None,
        "first_token": [None if one is None else float(one[0]) for one in stamps],
        "last_token": [None if one is None else float(one[-1]) for one in stamps],
        "token_times": [None if one is None else one.tolist() for one in stamps],
        "prompt_tokens": [row["prompt"] for row in rows],
        "output_tokens": [row["output"] for row in rows],
    }


def _notes(rows: list[dict[str, Any]]) -> list[str]:
    notes = []
    silent = sum(row["status"] == "silent" for row in rows)
    if silent:
        notes.append(
            f"{silent} requests ended without content or error; they are replayed as prefills of one output "
            "token and have no latency to compare"
        )
    recounted = sum(row["status"] == "ok" and row["said"] < row["output"] for row in rows)
    if recounted:
        notes.append(f"output_lens is less than the chunks received in {recounted} requests: chunks are taken")
    coalesced = sum(row["status"] == "ok" and row["times"].size < row["output"] for row in rows)
    if coalesced:
        notes.append(f"{coalesced} requests received several tokens in one chunk: token_times are chunks")
    return notes
