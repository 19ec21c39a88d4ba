"""What metrics of vLLM (or SGLang) say, however they were scraped: gauges, rates of counters, histograms.

Of a histogram only counts per bin are known. A percentile is interpolated within its bin, as PromQL's
``histogram_quantile`` does, and lies between the bin's ends for certain: ``meta.aggregate_intervals`` has those.
Means are exact (sum over count). All are of the requests between the first scrape and the last, or, with one scrape,
since the server's start.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from profiles.errors import InputError
from replay.readers.fields import MOST_SECONDS
from replay.trace import TIMELINE, Trace, file_facts, requests_table, table_of

Labels = tuple[tuple[str, str], ...]
ENGINES = ("vllm", "sglang")
GAUGES: dict[str, tuple[str, ...]] = {
    "running": ("num_requests_running", "num_running_reqs"),
    "waiting": ("num_requests_waiting", "num_queue_reqs"),
    "kv_usage": ("kv_cache_usage_perc", "gpu_cache_usage_perc", "token_usage"),
}
"""Columns of ``timeline`` and the metrics that they are, by vLLM's names (old ones too) and SGLang's."""
RATES: dict[str, tuple[str, ...]] = {
    "prompt_throughput": ("prompt_tokens_total", "prompt_tokens"),
    "generation_throughput": ("generation_tokens_total", "generation_tokens"),
}
HISTOGRAMS: dict[str, tuple[str, ...]] = {
    "ttft": ("time_to_first_token_seconds",),
    "itl": ("inter_token_latency_seconds", "time_per_output_token_seconds"),
    "tpot": ("request_time_per_output_token_seconds",),
    "e2e": ("e2e_request_latency_seconds",),
    "queue_time": ("request_queue_time_seconds",),
    "prefill_time": ("request_prefill_time_seconds",),
    "decode_time": ("request_decode_time_seconds",),
    "inference_time": ("request_inference_time_seconds",),
    "prompt_tokens": ("request_prompt_tokens",),
    "output_tokens": ("request_generation_tokens",),
    "iteration_tokens": ("iteration_tokens_total",),
    "preemptions": ("request_num_preemptions",),
}
COMPARED = ("ttft", "itl", "tpot", "e2e")
"""Metrics of ``meta.aggregates``; all histograms are in ``meta.facts``."""
COUNTERS = (
    "num_preemptions",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "gpu_prefix_cache_queries",
    "gpu_prefix_cache_hits",
    "prompt_tokens",
    "prompt_tokens_cached",
    "generation_tokens",
    "request_success",
)
PERCENTILES = (50, 90, 95, 99)
_CONFIG = "cache_config_info"
_ARGUMENTS = ("block_size", "num_gpu_blocks", "enable_prefix_caching", "gpu_memory_utilization", "sliding_window")


@dataclass
class Scrapes:
    """Samples by series: ``values[name][labels]`` lists (scrape, value); ``times`` has each scrape's Unix time."""

    times: list[float | None] = field(default_factory=list)
    values: dict[str, dict[Labels, list[tuple[int, float]]]] = field(default_factory=lambda: defaultdict(dict))
    engine: str = "vllm"

    def add(self, scrape: int, name: str, labels: Mapping[str, str], value: float) -> None:
        """Take in a sample of a metric; others than these engines' are passed over."""
        engine, colon, rest = name.partition(":")
        if colon and engine in ENGINES and not rest.endswith("_created"):
            self.engine = engine
            self.values[rest].setdefault(tuple(sorted(labels.items())), []).append((scrape, value))

    def first(self, names: Iterable[str]) -> dict[Labels, list[tuple[int, float]]]:
        """Series of the first of some names that there is."""
        return next((self.values[name] for name in names if name in self.values), {})


def trace_of(scrapes: Scrapes, path: Path, source: str) -> Trace:
    """Return a trace without requests.

    Parameters
    ----------
    scrapes : Scrapes
    path : Path
        The file.
    source : str
        Its format.

    Raises
    ------
    InputError
        If a histogram's bins contradict each other.
    """
    times = [time for time in scrapes.times if time is not None]
    timed = len(times) == len(scrapes.times)
    origin = min(times) if timed and times else None
    histograms = {metric: one for metric in HISTOGRAMS if (one := _histogram(scrapes, metric, path)) is not None}
    aggregates = {metric: histograms[metric].statistics() for metric in COMPARED if metric in histograms}
    intervals = {metric: one.intervals() for metric, one in histograms.items() if metric in COMPARED}
    window = max(times) - min(times) if timed and len(times) > 1 else None
    counters = _counters(scrapes)
    throughput = _throughput(counters, window)
    facts: dict[str, Any] = {"scrapes": len(scrapes.times), "counters": counters}
    facts["histograms"] = {metric: one.as_json() for metric, one in histograms.items()}
    if window:
        facts["window_seconds"] = window
    return Trace(
        requests_table({}, 0),
        {
            "name": path.resolve().name.partition(".")[0],
            "source": {"format": source, "files": file_facts([path])},
            "facts_only": True,
            "model": _label(scrapes, "model_name"),
            "hardware": None,
            "engine": {"name": scrapes.engine, "version": None, "arguments": _arguments(scrapes)},
            "facts": facts,
            "clock": {
                "kind": "run",
                "origin": origin,
                "note": "Unix seconds of the scrapes" if timed else "the scrapes do not say when they were made",
            },
            "vantage": "engine",
            "columns": {},
            "aggregates": aggregates | ({"throughput": throughput} if throughput else {}),
            "aggregate_intervals": intervals,
            "notes": _notes(scrapes, histograms),
        },
        timeline=_timeline(scrapes, origin) if timed and times else None,
    )


def _timeline(scrapes: Scrapes, origin: float | None) -> Any:
    """Gauges at each scrape (several engines: summed, the KV cache's share a mean), and rates since the one before."""
    if origin is None:
        return None
    columns: dict[str, dict[int, list[float]]] = {}
    for column, names in GAUGES.items():
        columns[column] = defaultdict(list)
        for samples in scrapes.first(names).values():
            for scrape, value in samples:
                if 0 <= value < MOST_SECONDS:
                    columns[column][scrape].append(value)
    for column, names in RATES.items():
        columns[column] = defaultdict(list)
        for samples in scrapes.first(names).values():
            for (before, old), (scrape, new) in pairwise(samples):
                seconds = (scrapes.times[scrape] or 0.0) - (scrapes.times[before] or 0.0)
                if seconds > 0 and 0 <= new - old < MOST_SECONDS:
                    columns[column][scrape].append((new - old) / seconds)
    rows = []
    for scrape, time in sorted(enumerate(scrapes.times), key=lambda one: one[1] or 0.0):
        row: dict[str, Any] = {"time": (time or 0.0) - origin}
        for column, values in columns.items():
            if values.get(scrape):
                total = math.fsum(values[scrape])
                row[column] = total / len(values[scrape]) if column == "kv_usage" else total
        if len(row) > 1:
            rows.append(row)
    return table_of(rows, TIMELINE) if rows else None


def _increase(samples: Sequence[tuple[int, float]], scrapes: int) -> float:
    """What a counter grew by, a fall being a restart from 0; with one scrape, since the server's start; or NaN."""
    if scrapes == 1:
        return samples[-1][1]
    if not all(math.isfinite(value) for _, value in samples):
        return math.nan
    return sum(new - old if new >= old else new for (_, old), (_, new) in pairwise(samples))


@dataclass(frozen=True)
class Histogram:
    """Counts up to each of rising ``edges`` (the last is infinite), with sum and count of all."""

    edges: tuple[float, ...]
    counts: tuple[float, ...]
    total: float
    count: float

    def bin_of(self, percentile: float) -> tuple[float, float, float] | None:
        """Ends of the bin in which a percentile lies, and its interpolated value; None beyond the last finite edge."""
        rank = percentile / 100 * self.count
        place = next((row for row, count in enumerate(self.counts) if count >= rank and count > 0), None)
        if place is None or math.isinf(self.edges[place]):
            return None
        low, below = (self.edges[place - 1], self.counts[place - 1]) if place else (0.0, 0.0)
        high, inside = self.edges[place], self.counts[place] - below
        return low, high, low + (high - low) * max(rank - below, 0.0) / inside if inside > 0 else high

    def statistics(self) -> dict[str, float]:
        """Mean and percentiles."""
        found = {f"p{one}": self.bin_of(one) for one in PERCENTILES}
        return {"mean": self.total / self.count} | {name: one[2] for name, one in found.items() if one}

    def intervals(self) -> dict[str, list[float]]:
        """Between what each percentile lies for certain."""
        found = {f"p{one}": self.bin_of(one) for one in PERCENTILES}
        return {name: [one[0], one[1]] for name, one in found.items() if one}

    def as_json(self) -> dict[str, Any]:
        """For ``meta``: the last edge is ``"+Inf"``."""
        edges = [*self.edges[:-1], "+Inf"]
        buckets = [[edge, count] for edge, count in zip(edges, self.counts, strict=True)]
        return {"count": self.count, "sum": self.total, "buckets": buckets}


def _histogram(scrapes: Scrapes, metric: str, path: Path) -> Histogram | None:
    """A histogram of all engines together, or None if it is not there or nothing was observed."""
    name = next((one for one in HISTOGRAMS[metric] if f"{one}_bucket" in scrapes.values), None)
    if name is None:
        return None
    number = len(scrapes.times)
    counts: dict[float, float] = defaultdict(float)
    for labels, samples in scrapes.values[f"{name}_bucket"].items():
        try:
            edge = float(dict(labels)["le"])
        except (KeyError, ValueError):
            raise InputError(f"a bin of {name} has no upper end", file=path, field="le") from None
        counts[edge] += _increase(samples, number)
    total, count = (
        sum(_increase(one, number) for one in scrapes.values.get(f"{name}_{part}", {}).values())
        for part in ("sum", "count")
    )
    edges = tuple(sorted(counts))
    listed = tuple(counts[edge] for edge in edges)
    sound = all(map(math.isfinite, (*listed, count))) and 0 <= total <= MOST_SECONDS
    sound = sound and all(0 <= edge <= MOST_SECONDS or edge == math.inf for edge in edges) and min(listed) >= 0
    if not sound or any(later < earlier for earlier, later in pairwise(listed)):
        raise InputError("its bins contradict each other: expected counts that rise with le", file=path, field=name)
    if edges[-1] != math.inf or listed[-1] < 1:
        return None
    return Histogram(edges, listed, total, listed[-1])


def _counters(scrapes: Scrapes) -> dict[str, float]:
    """What counters grew by, all engines and labels together; successes also by reason."""
    grown: dict[str, float] = {}
    for name in COUNTERS:
        series = scrapes.first((f"{name}_total", name))
        for labels, samples in series.items():
            increase = _increase(samples, len(scrapes.times))
            if not 0 <= increase < math.inf:
                continue
            grown[name] = grown.get(name, 0.0) + increase
            reason = dict(labels).get("finished_reason")
            if reason and increase:
                grown[f"{name}.{reason}"] = grown.get(f"{name}.{reason}", 0.0) + increase
    return dict(sorted(grown.items()))


def _throughput(counters: Mapping[str, float], window: float | None) -> dict[str, float]:
    """Of the time between first and last scrape."""
    if not window:
        return {}
    rates = {"output_tokens_per_s": "generation_tokens", "requests_per_s": "request_success"}
    return {"duration": window} | {
        name: counters[one] / window for name, one in rates.items() if 0 < counters.get(one, 0) < MOST_SECONDS * window
    }


def _label(scrapes: Scrapes, label: str) -> str | None:
    """The value that all series of the engine give a label, if it is one."""
    found = _values(scrapes, label)
    return found.pop() if len(found) == 1 else None


def _values(scrapes: Scrapes, label: str) -> set[str]:
    return {value for series in scrapes.values.values() for labels in series for key, value in labels if key == label}


def _arguments(scrapes: Scrapes) -> dict[str, Any]:
    """Engine arguments that ``cache_config_info`` has as labels, of the last series."""
    labels: dict[str, str] = {}
    for series in scrapes.values.get(_CONFIG, {}):
        labels = dict(series)
    arguments: dict[str, Any] = {}
    for name in _ARGUMENTS:
        text = labels.get(name, "None")
        if text in ("True", "False"):
            arguments[name] = text == "True"
        elif text.isascii() and text.isdecimal() and len(text) < 16:
            arguments[name] = int(text)
        elif name == "gpu_memory_utilization":
            arguments |= _share(name, text)
    return arguments


def _share(name: str, text: str) -> dict[str, float]:
    try:
        value = float(text)
    except ValueError:
        return {}
    return {name: value} if 0 <= value <= 1 else {}


def _notes(scrapes: Scrapes, histograms: Mapping[str, Histogram]) -> list[str]:
    notes = []
    if len(scrapes.times) == 1:
        notes.append("one scrape: counters and histograms are since the server's start, warm-up included")
    if histograms:
        notes.append("percentiles are interpolated within a histogram's bin: aggregate_intervals has the bins' ends")
    for metric in COMPARED:
        beyond = [f"p{one}" for one in PERCENTILES if metric in histograms and histograms[metric].bin_of(one) is None]
        if beyond:
            notes.append(f"{', '.join(beyond)} of {metric} lie beyond the last bin's end")
    for label in ("instance", "pod"):
        several = len(_values(scrapes, label))
        if several > 1:
            notes.append(f"series of {several} values of {label} are added up: a server each?")
    configured = list(scrapes.values.get(_CONFIG, {}))
    sizes = {dict(labels).get("num_gpu_blocks") for labels in configured}
    if len(sizes) > 1:
        notes.append(f"engines differ in num_gpu_blocks ({', '.join(sorted(map(str, sizes)))}): the last is taken")
    return notes
