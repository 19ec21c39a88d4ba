"""LLMServingSim's ``sim.csv``: what another simulator predicted for every request, in nanoseconds.

``instance id,request id,model,input,output,arrival,end_time,latency,queuing_delay,TTFT,TPOT,ITL``, rows in the order of
completion; ``ITL`` is a list of the gaps between tokens. ``queuing_delay`` is overwritten at each chunk of a prompt and
is not read. Format: casys-kaist/LLMServingSim @5daddb2.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from profiles.errors import InputError, found
from replay.readers.client_requests import ClientRequest, client_trace
from replay.readers.fields import LONGEST_FIELD, MOST_SECONDS, MOST_TOKENS
from replay.readers.json_records import text_lines
from replay.readers.opening import head
from replay.trace import Trace

FORMAT = "llmservingsim-sim"
REQUESTS_FILE = ""
COLUMNS = ("instance id", "request id", "model", "input", "output", "arrival", "end_time", "latency", "TTFT", "ITL")
ROUNDED = 2
"""Nanoseconds that truncation may have taken from a gap or a stamp."""


def detect(path: Path) -> bool:
    """Whether a file is of this format: its first line names the columns."""
    names = head(path).partition(b"\n")[0].decode("utf-8-sig", "replace").strip().split(",") if path.is_file() else []
    return {"request id", "queuing_delay", "TTFT", "ITL"} <= set(names)


def read(path: Path) -> Trace:
    """Read a prediction.

    Raises
    ------
    InputError
        Naming file, line and field of what cannot be used.
    """
    requests: list[ClientRequest] = []
    instances: set[str] = set()
    models: set[str] = set()
    for line, row in _rows(path):
        instances.add(row["instance id"])
        models.add(row["model"])
        requests.append(_request(path, line, row))
    if len(instances) > 1:
        instance = [row["instance id"] for _, row in _rows(path)]
        ids = [one.id for one in requests]
        if len(set(ids)) < len(ids):
            for one, own in zip(requests, instance, strict=True):
                one.id = f"{own}/{one.id}"
    predicted = "assumed: predicted by LLMServingSim, not measured"
    names = ("arrival", "first_token", "last_token", "token_times")
    notes = ["a simulator made this trace: it can be compared with, and is no ground truth"]
    if len(instances) > 1:
        notes.append(f"{len(instances)} engine instances served these requests; one engine is replayed")
    return client_trace(
        path,
        requests,
        {"model": models.pop() if len(models) == 1 else None, "vantage": "engine", "warmed_up": True},
        clock="the simulated clock",
        origins={
            **dict.fromkeys(names, predicted),
            "arrival": "assumed: the workload's",
            "prompt_tokens": "assumed: the workload's",
            "output_tokens": "assumed: the workload's",
        },
        notes=notes,
        format=FORMAT,
    )


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    csv.field_size_limit(LONGEST_FIELD)
    lines = text_lines(path)
    place = 0

    def texts() -> Iterator[str]:
        nonlocal place
        for number, text in lines:
            place = number
            yield text

    rows = csv.reader(texts(), strict=True)
    try:
        names = next(rows, [])
        for name in COLUMNS:
            if names.count(name) != 1:
                raise InputError(f"stands {names.count(name)} times in the header", file=path, row=1, field=name)
        for values in rows:
            if len(values) != len(names):
                reason = f"expected {len(names)} values, found {len(values)} (the file seems truncated)"
                raise InputError(reason, file=path, row=place)
            yield place, dict(zip(names, values, strict=True))
    except csv.Error as error:
        raise InputError(f"is no CSV: {error}", file=path, row=place) from None


def _request(path: Path, line: int, row: dict[str, str]) -> ClientRequest:
    def whole(name: str, text: str, most: float, least: int = 0) -> int:
        value = int(text) if text.isascii() and text.isdecimal() and len(text) < 25 else -1
        if not least <= value <= most:
            raise InputError(
                f"expected a whole number of at least {least}, found {found(text)}", file=path, row=line, field=name
            )
        return value

    longest = MOST_SECONDS * 1e9
    prompt, output = (whole(name, row[name], MOST_TOKENS, 1) for name in ("input", "output"))
    arrival, end, first = (whole(name, row[name], longest) for name in ("arrival", "end_time", "TTFT"))
    text = row["ITL"].strip()
    if not (text.startswith("[") and text.endswith("]")):
        raise InputError(f"expected a list of nanoseconds, found {found(text)}", file=path, row=line, field="ITL")
    parts = [one.strip() for one in text[1:-1].split(",")] if text[1:-1].strip() else []
    gaps = [whole("ITL", one, longest) for one in parts]
    times = [first]
    for gap in gaps:
        times.append(times[-1] + gap)
    if abs(arrival + times[-1] - end) > ROUNDED * (len(times) + 1):
        reason = f"expected arrival + TTFT + ITL = {arrival + times[-1]}, found {end} (the gaps do not add up)"
        raise InputError(reason, file=path, row=line, field="end_time")
    return ClientRequest(row["request id"], prompt, output, sent=arrival * 1e-9, times=np.array(times) * 1e-9)
