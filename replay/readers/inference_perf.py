"""inference-perf's ``per_request_lifecycle_metrics.json``, and the summary of a stage where that was not kept.

The first is an array, one object a request, stamped by the client's ``perf_counter`` (seconds). ``output_token_times``
repeats a chunk's stamp for every token that its text has by itself, which is more than the engine made: ``chunk_times``
are taken where they are there. Lengths are the server's ``usage``, else those asked for with ``ignore_eos``, else
counted from the text. Checked against files of inference-perf 0.7.0; older ones keep their fields in ``info`` itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from profiles.errors import InputError, found
from profiles.yaml_files import read_mapping
from replay.load_level import MOST_REQUESTS, LoadLevel
from replay.readers.client_requests import (
    ClientRequest,
    as_times,
    below,
    client_trace,
    listed,
    message_of,
    name_of,
    optional_tokens,
)
from replay.readers.fields import MOST_SECONDS, MOST_TOKENS, Record
from replay.readers.json_records import keys_of, read_document, stream_array
from replay.trace import Floats, Trace, file_facts

FORMAT = "inference-perf"
REQUESTS_FILE = "per_request_lifecycle_metrics.json"
CONFIG_FILE = "config.yaml"
DOUBLED = 1.8
"""Stamps per output token from which every second one is an event without a token."""
SPREAD_P10_P90 = 2.563
"""Standard deviations between the tenth and the ninetieth percentile of a normal distribution."""
STATISTICS = {"mean": "mean", "median": "p50"}
LATENCIES = {"request_latency": "e2e", "time_to_first_token": "ttft"}


def detect(path: Path) -> bool:
    """Whether a file holds inference-perf's requests or the summary of a stage, or a folder the former."""
    keys = keys_of(path / REQUESTS_FILE if path.is_dir() else path)
    return keys >= {"[].start_time", "[].end_time", "[].request"} or keys >= {"load_summary", "successes"}


def read(path: Path) -> Trace:
    """Read a run.

    Raises
    ------
    InputError
        Naming file, request and field of what cannot be used.
    """
    source = path / REQUESTS_FILE if path.is_dir() else path
    if "load_summary" in keys_of(source):
        return _summary(source)
    requests: list[ClientRequest] = []
    counts = {"retokenised": 0, "asked": 0, "doubled": 0}
    for record in stream_array(source):
        requests.append(_request(record, len(requests), counts))
    said = {
        "retokenised": "the server did not say how many tokens {} requests had: inference-perf counted their text, "
        "which need not be what the engine made",
        "asked": "of {} requests the server did not say the output tokens: max_tokens is taken, as ignore_eos was set",
        "doubled": "{} requests have about two stamps for every output token: every second one is taken to be an event "
        "without a token",
    }
    config = source.parent / CONFIG_FILE
    described = _described(config)
    counted = "assumed: counted from the text by inference-perf" if counts["retokenised"] else None
    return client_trace(
        source,
        requests,
        {**described, "name": name_of(path)},
        clock="the client's performance counter",
        origins={
            "arrival": "measured: when the client sent it",
            "prompt_tokens": counted or "measured: by the server",
            "output_tokens": counted or ("assumed: as asked for" if counts["asked"] else "measured: by the server"),
        },
        notes=[said[key].format(count) for key, count in counts.items() if count],
        files=[config] if described else [],
        format=FORMAT,
    )


def _request(record: Record, index: int, counts: dict[str, int]) -> ClientRequest:
    info = below(record, "info", optional=True)
    texts = below(below(info, "request_metrics", optional=True), "text", optional=True)
    response = below(info, "response_metrics", optional=True)
    usage = below(response, "server_usage", optional=True)
    sent, end = record.seconds("start_time", positive=True), record.seconds("end_time", positive=True)
    if end < sent:
        raise record.error("end_time", f"expected no time before start_time ({sent!r}), found {end!r}")
    one = ClientRequest(f"request-{index}", optional_tokens(usage, "prompt_tokens"), None, sent=sent)
    if one.prompt is None:
        one.prompt = optional_tokens(texts if texts.get("input_tokens") is not None else info, "input_tokens")
    details = below(usage, "prompt_tokens_details", optional=True)
    one.cached = optional_tokens(details, "cached_tokens")
    error = record.get("error")
    if error is not None:
        about = Record(error if isinstance(error, dict) else {"error_msg": error}, record.file, record.row)
        one.status, one.error = "failed", message_of(about, "error_msg", "error_type")
        return one
    if not one.prompt:
        raise record.error("info.input_tokens", "is missing: expected the tokens of the prompt, at least 1")
    one.output = optional_tokens(usage, "completion_tokens")
    if one.output is None:
        one.output = _asked(record)
        counts["asked"] += one.output is not None
    if one.output is None:
        one.output = optional_tokens(response if response.get("output_tokens") is not None else info, "output_tokens")
        counts["retokenised"] += 1
    one.times = _times(record, response if response.values else info, sent, one.output, counts)
    one.last = end - sent
    return one


def _asked(record: Record) -> int | None:
    """Output tokens that a request had to have: ``max_tokens`` with ``ignore_eos``."""
    text = record.get("request")
    try:
        asked = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(asked, dict) or asked.get("ignore_eos") is not True:
        return None
    value = asked.get("max_tokens", asked.get("max_completion_tokens"))
    return value if type(value) is int and 1 <= value <= MOST_TOKENS else None


def _times(record: Record, response: Record, sent: float, output: int | None, counts: dict[str, int]) -> Floats:
    """Seconds from sending to each chunk."""
    name = "chunk_times" if response.get("chunk_times") else "output_token_times"
    values = listed(response, name)

    def error(message: str) -> InputError:
        return record.error(f"info.{name}", message)

    stamps = as_times(values, error)
    if np.any(np.diff(stamps, prepend=sent) < 0):
        raise error("expected stamps that ascend from start_time")
    if name == "output_token_times":
        # A chunk's stamp is repeated for each token that its text has.
        stamps = stamps[np.diff(stamps, prepend=-1.0) > 0]
        if output and output > 1 and stamps.size >= DOUBLED * output:
            counts["doubled"] += 1
            stamps = stamps[::2][:output]
    return stamps - sent


def _described(config: Path) -> dict[str, Any]:
    """Model and load, as the configuration beside the file has them; nothing if there is none that can be read."""
    if not config.is_file():
        return {}
    try:
        document = read_mapping(config)
    except InputError:
        return {}
    server, load = document.get("server"), document.get("load")
    model = server.get("model_name") if isinstance(server, dict) else None
    kind = load.get("type") if isinstance(load, dict) else None
    return {
        "model": model if isinstance(model, str) else None,
        "load": {"type": kind} if isinstance(kind, str) else {},
    }


def _summary(path: Path) -> Trace:
    """One stage's aggregates as a load level."""
    document = read_document(path)
    load, successes = below(document, "load_summary"), below(document, "successes")
    latency = below(successes, "latency")
    count = successes.tokens("count", 1)
    if count > MOST_REQUESTS:
        raise successes.error("count", f"expected at most {MOST_REQUESTS} requests, found {count}")
    rate = load.get("requested_rate")
    clients = None if load.get("concurrency") is None else load.tokens("concurrency", 1)
    if rate is None and clients is None:
        raise load.error(
            "requested_rate",
            "is missing, and so is concurrency: the file mixes stages; name one, as stage_0_lifecycle_metrics.json",
        )
    lengths = [
        _length(successes, names) for names in (("prompt_tokens", "prompt_len"), ("output_tokens", "output_len"))
    ]
    config = path.parent / CONFIG_FILE
    described = _described(config)
    level = LoadLevel(
        requests=count,
        prompt_tokens=lengths[0][0],
        output_tokens=lengths[1][0],
        rate=None if rate is None or clients is not None else _number(load, "requested_rate", 1e-6, 1e6),
        distribution="constant" if described.get("load", {}).get("type") == "constant" else "poisson",
        max_concurrency=clients,
        prompt_tokens_std=lengths[0][1],
        output_tokens_std=lengths[1][1],
        lengths_known=all(spread > 0 or mean.is_integer() for mean, spread, _ in lengths),
    )
    meta: dict[str, Any] = {
        "name": name_of(path),
        "source": {"format": FORMAT, "files": file_facts([path, *([config] if described else [])])},
        "model": described.get("model"),
        "hardware": None,
        "engine": {"name": None, "version": None, "arguments": {}},
        "vantage": "client",
        "aggregates": _aggregates(document, latency, successes, count, lengths[1]),
        "notes": _summary_notes(document, lengths),
    }
    said = [
        f"assumed: drawn, gamma of mean {mean:g} and of the deviation that p10 and p90 have"
        if spread
        else f"reconstructed: {mean:g} each"
        for mean, spread, _ in lengths
    ]
    return level.trace(meta, dict(zip(("prompt_tokens", "output_tokens"), said, strict=True)))


def _length(successes: Record, names: tuple[str, str]) -> tuple[float, float, str]:
    """Mean, deviation (from the tenth and ninetieth percentile) and field of a length, the server's count preferred."""
    name = next((one for one in names if successes.get(one) is not None), names[-1])
    values = below(successes, name)
    mean = _number(values, "mean", 1.0, MOST_TOKENS)
    least, most = (None if values.get(key) is None else values.seconds(key) for key in ("min", "max"))
    if least is not None and least == most:
        return mean, 0.0, name
    low, high = (None if values.get(key) is None else values.seconds(key) for key in ("p10", "p90"))
    spread = 0.0 if low is None or high is None else max(high - low, 0.0) / SPREAD_P10_P90
    return mean, min(spread, 5 * mean), name


def _aggregates(
    document: Record, latency: Record, successes: Record, count: int, output: tuple[float, float, str]
) -> dict[str, dict[str, float]]:
    aggregates: dict[str, dict[str, float]] = {}
    for theirs, ours in LATENCIES.items():
        values = below(latency, theirs, optional=True)
        for key in values.values:
            name = STATISTICS.get(key, key if key.startswith("p") and key[1:].replace(".", "", 1).isdecimal() else "")
            if name and values.get(key) is not None:
                aggregates.setdefault(ours, {})[name] = values.seconds(key)
    if not aggregates:
        raise latency.error("request_latency", "is missing: expected statistics of it, or of time_to_first_token")
    means = {name: aggregates.get(name, {}).get("mean") for name in ("e2e", "ttft")}
    whole, first, (tokens, spread, name) = means["e2e"], means["ttft"], output
    if (
        whole is not None
        and first is not None
        and whole > first
        and tokens > 1
        and not spread
        and name == "output_tokens"
    ):
        aggregates["tpot"] = {"mean": (whole - first) / (tokens - 1)}
    if document.get("benchmark_time_seconds") is not None:
        duration = document.seconds("benchmark_time_seconds", positive=True)
        rates = {"output_tokens_per_s": count * tokens / duration, "requests_per_s": count / duration}
        if max(rates.values()) > MOST_SECONDS:
            raise document.error("benchmark_time_seconds", f"expected the seconds that {count} requests took")
        aggregates["throughput"] = {"duration": duration, **rates}
    return aggregates


def _summary_notes(document: Record, lengths: list[tuple[float, float, str]]) -> list[str]:
    notes = [
        "the file holds aggregates (report.request_lifecycle.per_request keeps the requests): requests are drawn, and "
        "compared as aggregates only",
        "time_per_output_token and inter_token_latency are left out: inference-perf counts them by events and by the "
        "tokens that a chunk's text has, not by the engine's tokens",
    ]
    if lengths[1][2] == "output_len":
        notes.append("output lengths were counted from the text, which need not be what the engine made")
    failures = below(document, "failures", optional=True)
    failed = optional_tokens(failures, "count")
    if failed:
        notes.append(f"{failed} requests failed; what they loaded the engine with is unknown, and left out")
    return notes


def _number(record: Record, key: str, least: float, most: float) -> float:
    value = record.need(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise record.error(key, f"expected a number from {least:g} to {most:g}, found {found(value)}")
    return float(value)
