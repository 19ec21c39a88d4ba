"""Golden schedules: workloads scheduled by vLLM's own scheduler under a virtual clock, ``servecal.golden_schedule/1``.

A file holds the engine's configuration, a step-time formula in integer microseconds, requests, and every
iteration that vLLM composed. A prompt is ``prefix: [k, n]`` (the first n tokens of shared prefix k) or
``continues: id`` (all of an earlier request, prompt and output), followed by ``own_tokens`` tokens that no other
request has. Output tokens are unique.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profiles.errors import InputError, found
from replay.block_hashes import chain
from replay.readers.fields import Record, as_tokens, parse_json
from simulator.batch import Batch
from simulator.engine_config import EngineConfig, resolve_engine_config
from simulator.errors import SimulationError
from simulator.request import Request

FORMAT = "servecal.golden_schedule/1"
MOST_BYTES = 1 << 30
NS_PER_US = 1000


class GoldenStepTime:
    """The step-time formula of a golden schedule, as an accelerator model.

    ``base_us + per_sequence_us * sequences``, plus ``per_token_us * n + n (2 c + n) // attention_divisor`` for each
    item of n tokens after c computed ones.
    """

    components = ("step",)

    def __init__(self, base_us: int, per_sequence_us: int, per_token_us: int, attention_divisor: int) -> None:
        self.base_us = base_us
        self.per_sequence_us = per_sequence_us
        self.per_token_us = per_token_us
        self.attention_divisor = attention_divisor

    def step(self, batch: Batch) -> Sequence[float]:
        """Return seconds."""
        divisor = self.attention_divisor
        us = self.base_us + self.per_sequence_us * batch.num_seqs + self.per_token_us * batch.num_tokens
        us += sum(query * (2 * context + query) // divisor for query, context in batch.prefills)
        us += sum((2 * context + 1) // divisor for context in batch.decode_contexts)
        return (us * 1e-6,)


@dataclass(frozen=True)
class GoldenSchedule:
    """A golden schedule, ready to be run and compared.

    ``iterations`` and ``results`` are as in the file: times in microseconds, requests by id.
    """

    file: Path
    engine: str
    config: EngineConfig
    step_time: GoldenStepTime
    requests: list[Request]
    iterations: list[Mapping[str, Any]]
    results: list[Mapping[str, Any]]


def is_golden(path: Path) -> bool:
    """Whether a file is JSON or gzip, as golden schedules are."""
    return path.is_file() and path.name.removesuffix(".gz").endswith(".json")


def read_golden(path: Path) -> GoldenSchedule:
    """Read a golden schedule.

    Raises
    ------
    InputError
        Naming file and field of what cannot be used.
    """
    value = parse_json(_text(path), path)
    if not isinstance(value, dict):
        raise InputError(f"expected a JSON object, found {found(value)}", file=path)
    record = Record(value, path)
    if record.need("format") != FORMAT:
        raise record.error("format", f"expected {FORMAT!r}, found {found(record.get('format'))}")
    engine = str(record.need("engine"))
    config = _config(record, engine)
    step = Record(_mapping(record, "step_time"), path, "step_time")
    names = ("base_us", "per_sequence_us", "per_token_us", "attention_divisor")
    return GoldenSchedule(
        file=path,
        engine=engine,
        config=config,
        step_time=GoldenStepTime(*(step.tokens(name, 1 if name == "attention_divisor" else 0) for name in names)),
        requests=_requests(_records(record, "requests"), config.block_size),
        iterations=[_iteration(one) for one in _records(record, "iterations")],
        results=[one.values for one in _records(record, "results")],
    )


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            with gzip.open(path) as stream:
                data = stream.read(MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot be read: {reason}", file=path) from None
    if len(data) > MOST_BYTES:
        raise InputError(f"holds more than {MOST_BYTES} bytes", file=path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"is no UTF-8 text: {error.reason} at byte {error.start}", file=path) from None


def _mapping(record: Record, key: str) -> dict[str, Any]:
    value = record.need(key)
    if not isinstance(value, dict):
        raise record.error(key, f"expected an object, found {found(value)}")
    return value


def _records(record: Record, key: str) -> list[Record]:
    values = record.need(key)
    if not isinstance(values, list) or not all(isinstance(one, dict) for one in values):
        raise record.error(key, f"expected an array of objects, found {found(values)}")
    return [Record(one, record.file, f"{key}[{place}]") for place, one in enumerate(values)]


def _config(record: Record, engine: str) -> EngineConfig:
    arguments = _mapping(record, "config")
    try:
        return resolve_engine_config(arguments, version=engine.removeprefix("vllm").strip()).config.validate()
    except SimulationError as error:
        raise record.error("config", str(error)) from None


def _iteration(record: Record) -> Mapping[str, Any]:
    for name in ("start_us", "dur_us", "items"):
        record.need(name)
    return record.values


def _requests(records: list[Record], block_size: int) -> list[Request]:
    """Requests with the hashes of all their full blocks, output included, so that others may continue them."""
    tokens: dict[str, list[int]] = {}
    requests = []
    for place, record in enumerate(records):
        one = str(record.need("id"))
        if one in tokens:
            raise record.error("id", f"{one!r} stands there twice")
        own, output = record.tokens("own_tokens"), record.tokens("output_tokens", 1)
        prompt = [*_shared(record, tokens), *range(_mark(place, 1), _mark(place, 1) + own)]
        if not prompt:
            raise record.error("own_tokens", "the prompt is empty")
        tokens[one] = [*prompt, *range(_mark(place, 2), _mark(place, 2) + output)]
        abort = record.get("abort_us")
        requests.append(
            Request(
                id=one,
                arrival=record.seconds("arrival_us") * 1e-6,
                prompt_tokens=len(prompt),
                output_tokens=output,
                priority=int(record.get("priority") or 0),
                block_hashes=chain(tokens[one], block_size),
                abort=None if abort is None else record.seconds("abort_us") * 1e-6,
            )
        )
    return requests


def _shared(record: Record, tokens: Mapping[str, list[int]]) -> Sequence[int]:
    """Tokens at the prompt's begin that other requests have too."""
    earlier = record.get("continues")
    if earlier is not None:
        if earlier not in tokens:
            raise record.error("continues", f"expected the id of an earlier request, found {found(earlier)}")
        return tokens[earlier]
    prefix = record.get("prefix") or [0, 0]
    if not isinstance(prefix, list) or len(prefix) != 2:
        raise record.error("prefix", f"expected [prefix, tokens], found {found(prefix)}")
    which, count = (as_tokens(one, 0, lambda message: record.error("prefix", message)) for one in prefix)
    return range(_mark(which, 0), _mark(which, 0) + count)


def _mark(which: int, kind: int) -> int:
    """First token id of shared prefix (kind 0), own prompt (1) or output (2) number ``which``: no two overlap."""
    return (3 * which + kind) << 31
