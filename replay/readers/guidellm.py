"""GuideLLM's ``benchmarks.json``: one benchmark a strategy (rate or number of streams), each a trace of its own.

Stamps are Unix seconds of the client; of the tokens only the first and the last have one. From 0.4 on they stand in
``info.timings`` (0.4: ``scheduler_info.request_timings``), before that flat in the request. Its
``time_per_output_token_ms`` includes the TTFT and is not read. Checked against files of GuideLLM 0.8.1; old fields are
from its source at 0.1 to 0.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from profiles.errors import InputError, found
from replay.readers.client_requests import (
    ClientRequest,
    below,
    choose,
    client_trace,
    listed,
    message_of,
    name_of,
    optional_tokens,
)
from replay.readers.fields import Record
from replay.readers.json_records import keys_of, read_document
from replay.trace import Trace

FORMAT = "guidellm"
REQUESTS_FILE = ""
GROUPS = {
    "successful": "ok",
    "completed": "ok",
    "incomplete": "unfinished",
    "errored": "failed",
}
SENT = ("request_start", "start_time", "request_start_time")
FIRST = ("first_token_iteration", "first_iteration", "first_token_time")
LAST = ("last_token_iteration", "last_iteration", "last_token_time")
ENDED = ("request_end", "end_time", "request_end_time")
SLACK = 1e-6
_LOAD = ("type_", "rate", "streams", "max_concurrency")


def detect(path: Path) -> bool:
    """Whether a file is a report of GuideLLM."""
    keys = keys_of(path)
    if "benchmarks" not in keys:
        return False
    inside = ("type_", "config", "args", "settings", "run_stats", "requests", "start_time")
    return any(f"benchmarks.[].{name}" in keys for name in inside) or "metadata.guidellm_version" in keys


def selections(path: Path) -> list[str]:
    """Names of a report's benchmarks."""
    return _names(_benchmarks(path)[1])


def read(path: Path, selection: str | None = None) -> Trace:
    """Read one benchmark.

    Raises
    ------
    InputError
        Naming file, request and field of what cannot be used, or the benchmarks if none of several was named.
    """
    document, benchmarks = _benchmarks(path)
    names = _names(benchmarks)
    place = choose(path, names, selection, "benchmarks")
    benchmark = benchmarks[place]
    requests = [_request(record, status) for record, status in _rows(benchmark)]
    _unique(requests)
    notes = ["GuideLLM keeps the first and the last token of a request; gaps between tokens are not known"]
    sampled = below(benchmark, "config", optional=True).get("sample_size")
    if sampled is not None:
        notes.append(
            f"the report may hold only a sample of {found(sampled)} requests; requests left out loaded the engine"
        )
    counted = "measured: by the server where it says them, else counted by GuideLLM's tokenizer"
    return client_trace(
        path,
        requests,
        {
            "model": _model(document, benchmark),
            "load": _load(benchmark),
            "name": f"{name_of(path)}#{names[place]}" if len(names) > 1 else name_of(path),
        },
        clock="the client's wall clock",
        origins={
            "arrival": "measured: when the client sent it",
            "nominal_arrival": "measured: when the strategy wanted it sent",
            "prompt_tokens": counted,
            "output_tokens": counted,
        },
        notes=notes,
        format=FORMAT,
    )


def _benchmarks(path: Path) -> tuple[Record, list[Record]]:
    document = read_document(path)
    benchmarks = listed(document, "benchmarks")
    if not benchmarks:
        raise document.error("benchmarks", "holds no benchmark")
    for place, one in enumerate(benchmarks):
        if not isinstance(one, dict):
            raise document.error("benchmarks", f"expected objects, found {found(one)} in place {place + 1}")
    return document, [Record(one, path, f"benchmark {place + 1}") for place, one in enumerate(benchmarks)]


def _names(benchmarks: list[Record]) -> list[str]:
    """Call each after its strategy, such as ``constant-20``; those that have a name in common by their place."""
    names = [_called(one) or f"benchmark-{place + 1}" for place, one in enumerate(benchmarks)]
    return [name if names.count(name) == 1 else f"benchmark-{place + 1}" for place, name in enumerate(names)]


def _strategy(benchmark: Record) -> dict[str, Any]:
    """The strategy: in ``config`` (0.6 and later), ``scheduler`` (0.4) or ``args`` (before)."""
    for key in ("config", "scheduler", "args"):
        holder = benchmark.get(key)
        strategy = holder.get("strategy") if isinstance(holder, dict) else None
        if isinstance(strategy, dict):
            return strategy
    return {}


def _called(benchmark: Record) -> str | None:
    strategy = _strategy(benchmark)
    kind = strategy.get("type_")
    level = next((strategy[key] for key in ("rate", "streams", "max_concurrency") if _number(strategy.get(key))), None)
    if not isinstance(kind, str) or not kind.isascii() or not kind.isprintable() or len(kind) > 40:
        return None
    return kind if level is None or kind in ("synchronous", "throughput") else f"{kind}-{level:g}"


def _number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and abs(value) < 1e12


def _model(document: Record, benchmark: Record) -> str | None:
    """The model asked for: in the report's ``config`` (0.8), or in the benchmark's ``worker`` (before)."""
    for holder, keys in (
        (document, ("config", "spec", "backend", "model")),
        (document, ("args", "model")),
        (benchmark, ("worker", "backend_model")),
    ):
        value: Any = holder.values
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, str) and value.isprintable():
            return value
    return None


def _load(benchmark: Record) -> dict[str, Any]:
    strategy = _strategy(benchmark)
    return {key: strategy[key] for key in _LOAD if isinstance(strategy.get(key), str) or _number(strategy.get(key))}


def _rows(benchmark: Record) -> Iterator[tuple[Record, str]]:
    """Every request and its status; in 0.1 the groups stood beside each other, as ``completed_requests``."""
    inside = below(benchmark, "requests", optional=True) if not isinstance(benchmark.get("requests"), list) else None
    seen = False
    for group, status in GROUPS.items():
        for holder, key in ((inside, group), (benchmark, f"{group}_requests")):
            if holder is None or holder.get(key) is None:
                continue
            seen = True
            for place, one in enumerate(listed(holder, key), 1):
                where = f"{benchmark.row}: {group} request {place}"
                if not isinstance(one, dict):
                    raise InputError(f"expected an object, found {found(one)}", file=benchmark.file, row=where)
                yield Record(one, benchmark.file, where), status
    if not seen:
        raise benchmark.error("requests", "is missing: expected successful, incomplete and errored requests")


def _request(record: Record, status: str) -> ClientRequest:
    info = below(record, "info", optional=True) if record.get("info") is not None else None
    info = info or below(record, "scheduler_info", optional=True)
    timings = below(info, "timings" if info.get("timings") is not None else "request_timings", optional=True)
    places = [timings, record, info]
    prompt, cached = _tokens(record, "input_metrics", "prompt_tokens")
    output, _ = _tokens(record, "output_metrics", "output_tokens")
    one = ClientRequest(
        record.text("request_id") or info.text("request_id") or "", prompt, output, status, cached=cached
    )
    # What was never sent has no request_start; the schedule is the nearest that is known.
    sent = _time(places, SENT)
    nominal = _time(places, ("targeted_start",))
    one.sent = sent if sent is not None else nominal
    one.nominal = nominal
    if one.sent is None:
        raise record.error(SENT[0], "is missing: expected when the request was sent, in Unix seconds")
    if status == "failed":
        one.error = message_of(Record({**info.values, **record.values}, record.file, record.row), "error")
        return one
    first, last = _time(places, FIRST), _time(places, LAST)
    if status == "ok":
        if not prompt:
            raise record.error("prompt_tokens", "is missing: expected the tokens of the prompt, at least 1")
        last = last if last is not None else _time(places, ENDED)
        if last is None and output:
            raise record.error(ENDED[0], "is missing: expected when the request ended")
    for name, value in ((FIRST[0], first), (LAST[0], last)):
        if value is not None and value < one.sent - SLACK:
            raise record.error(name, f"expected no time before the request was sent ({one.sent!r}), found {value!r}")
    one.first = None if first is None else max(first - one.sent, 0.0)
    one.last = None if last is None else max(last - one.sent, one.first or 0.0)
    return one


def _time(places: list[Record], names: tuple[str, ...]) -> float | None:
    """The first of some stamps that is there; GuideLLM writes -1 in old files where there is none."""
    for place in places:
        for name in names:
            value = place.get(name)
            if value is not None and value != -1:
                return place.seconds(name)
    return None


def _tokens(record: Record, group: str, flat: str) -> tuple[int | None, int | None]:
    """Tokens and cached tokens: those in a group (server's usage preferred), else flat ones."""
    metrics = below(record, group, optional=True)
    cached = optional_tokens(metrics, "cached_tokens")
    for holder, key in ((metrics, "total_tokens"), (metrics, "text_tokens"), (record, flat)):
        if holder.get(key) is not None:
            return holder.tokens(key), cached
    return None, cached


def _unique(requests: list[ClientRequest]) -> None:
    """Number what has no id, or an id that another has (turns of one conversation in some versions)."""
    seen: set[str] = set()
    for place, one in enumerate(requests):
        if not one.id or one.id in seen:
            one.id = f"{one.id or 'request'}-{place}"
        seen.add(one.id)
