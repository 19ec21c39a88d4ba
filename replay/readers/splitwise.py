"""Splitwise's ``perf_model.csv``: static batches of equal requests, prompt and token times in milliseconds.

Columns ``model``, ``hardware``, ``tensor_parallel``, ``prompt_size``, ``batch_size``, ``token_size``,
``prompt_time``, ``token_time``, powers. One file holds several deployments; each is a trace of its own, named
``model/hardware/tensor_parallel``. Format: Mutinifni/splitwise-sim @8f99e7d.

Not read: ``e2e_time``, which disagrees with the other two wherever generation stopped early or the batch did not
fit. Refused: hardware ``*-pcap``, whose prompt times are those without the power cap times 1.3, not measured.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pyarrow as pa

from profiles.errors import InputError, found
from replay.readers.fields import Record, read_rows
from replay.readers.opening import head
from replay.trace import BATCHES, Trace, file_facts, requests_table

FORMAT = "splitwise-perf-model"
REQUESTS_FILE = ""
COUNTS = ("prompt_size", "batch_size", "token_size", "tensor_parallel")
TIMES = ("prompt_time", "token_time")
COLUMNS = ("model", "hardware", *COUNTS, *TIMES)
DERIVED = "-pcap"
MOST = 100_000
"""Requests of a batch, or tokens of a request; what no batch has, and memory would not bear."""


def detect(path: Path) -> bool:
    """Whether a file is of this format: its first line names the columns."""
    if not path.is_file():
        return False
    names = head(path).partition(b"\n")[0].decode("utf-8-sig", "replace").strip().split(",")
    return {"prompt_size", "token_size", "prompt_time", "token_time"} <= set(names)


def selections(path: Path) -> list[str]:
    """Names of the deployments that a file holds measurements of, sorted.

    Raises
    ------
    InputError
        If it is no such file.
    """
    return sorted(name for name in {_deployment(one) for one in read_rows(path, COLUMNS)} if DERIVED not in name)


def read(path: Path, selection: str | None = None) -> Trace:
    """Read the batches of one deployment; ``selection`` may be a pattern that fits one only.

    Raises
    ------
    InputError
        Naming what there is if none or several fit; naming file, line and field of what cannot be used.
    """
    rows = read_rows(path, COLUMNS)
    if not rows:
        raise InputError("holds no batches", file=path)
    if (selection and selection.endswith(DERIVED)) or DERIVED + "/" in (selection or ""):
        raise InputError(
            f"{selection} is not measured: its prompt times are those without the power cap times 1.3", file=path
        )
    measured = selections(path)
    chosen = [name for name in measured if fnmatchcase(name, selection or "*")]
    if len(chosen) != 1:
        asked = f"{len(chosen) or 'none'} of its deployments fit {selection!r}" if selection else "holds several"
        example = f"{path.name}#{measured[0]}" if measured else "none is measured"
        raise InputError(f"{asked}; name one, as in {example}; there are {', '.join(measured)}", file=path)
    [name] = chosen
    own = [one for one in rows if _deployment(one) == name]
    return _trace(path, name, own)


def _trace(path: Path, name: str, rows: list[Record]) -> Trace:
    columns: dict[str, list[Any]] = {one: [] for one in ("id", "status", "arrival", "prompt_tokens", "output_tokens")}
    columns["batch"] = []
    table: dict[str, list[Any]] = {one.name: [] for one in BATCHES}
    clock = 0.0
    budget = seqs = longest = 1
    for batch, row in enumerate(rows):
        prompt, size, output = (_count(row, one) for one in COUNTS[:3])
        prompt_seconds, token_seconds = (_positive(row, one) * 1e-3 for one in TIMES)
        columns["id"] += [f"{batch}-{place}" for place in range(size)]
        columns["status"] += ["ok"] * size
        columns["arrival"] += [clock] * size
        columns["prompt_tokens"] += [prompt] * size
        columns["output_tokens"] += [output] * size
        columns["batch"] += [batch] * size
        table["start"].append(clock)
        table["makespan"].append(None)
        table["prompt_seconds"].append(prompt_seconds)
        table["token_seconds"].append(token_seconds)
        for one in ("average_power", "peak_power"):
            # Some rows have no power: 0.
            table[one].append(_positive(row, one) if str(row.get(one) or "0").strip("0.") else None)
        clock += prompt_seconds + (output - 1) * token_seconds
        budget, seqs = max(budget, prompt * size), max(seqs, size)
        longest = max(longest, prompt + output)
    model, hardware, degree = name.split("/")
    budget = max(budget, longest)
    return Trace(
        requests_table(columns, len(columns["id"])),
        {
            "name": f"{path.resolve().stem}#{name}",
            "source": {"format": FORMAT, "files": file_facts([path])},
            "model": model,
            "hardware": hardware,
            "engine": {
                "name": None,
                "version": None,
                "arguments": {
                    "tensor_parallel_size": int(degree),
                    "max_num_seqs": seqs,
                    "max_num_batched_tokens": budget,
                    "max_model_len": longest,
                    "num_gpu_blocks": 1 + seqs * -(-longest // 16),
                    "block_size": 16,
                    "async_scheduling": False,
                    "enable_prefix_caching": False,
                    "enforce_eager": True,
                },
            },
            "clock": {"kind": "run", "note": "batches one after the other; when each began was not measured"},
            "vantage": "call",
            "warmed_up": True,
            "columns": {
                "arrival": "assumed: the start of its batch, batches one after the other",
                "prompt_tokens": "measured",
                "output_tokens": "measured",
                "batch": "measured",
            },
            "notes": [
                "the source names no engine: all prompts of a batch are taken to be computed in one iteration, and its "
                "requests to fit into memory"
            ],
        },
        batches=pa.table([pa.array(table[one.name], one.type) for one in BATCHES], schema=BATCHES),
    )


def _deployment(row: Record) -> str:
    model, hardware = (str(row.get(name)).strip() for name in ("model", "hardware"))
    for name, text in (("model", model), ("hardware", hardware)):
        if not text or "/" in text:
            raise row.error(name, f"expected a name without '/', found {found(text)}")
    return f"{model}/{hardware}/{_count(row, 'tensor_parallel')}"


def _count(row: Record, name: str) -> int:
    text = str(row.get(name))
    value = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0
    if not 0 < value <= MOST:
        raise row.error(name, f"expected a whole number from 1 to {MOST}, found {found(text)}")
    return value


def _positive(row: Record, name: str) -> float:
    text = str(row.get(name))
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e9:
        raise row.error(name, f"expected a number above 0, found {found(text)}")
    return value
