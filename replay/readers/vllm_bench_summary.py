"""``vllm bench serve`` without ``--save-detailed``: one load level, of which the file holds aggregates only.

Latencies are ``{mean,median,std,p<k>}_{ttft,tpot,itl,e2el}_ms``, as many as the run asked for; lengths are totals.
SGLang's ``bench_serving`` without ``--output-details`` writes the same, with ``e2e_latency`` for ``e2el``.
"""

from __future__ import annotations

import math
import re
from typing import Any

from profiles.errors import found
from replay.load_level import MOST_REQUESTS, LoadLevel
from replay.readers.fields import Record
from replay.trace import Trace

_STATISTIC = re.compile(r"(mean|median|std|p\d{1,2}(?:\.\d+)?)_(ttft|tpot|itl|e2el|e2e_latency)_ms")
_THROUGHPUT = {
    "duration": "duration",
    "output_throughput": "output_tokens_per_s",
    "request_throughput": "requests_per_s",
}


def is_summary(record: Record) -> bool:
    """Whether a result has statistics and none of the arrays that ``--save-detailed`` adds."""
    arrays = ("input_lens", "output_lens", "ttfts", "itls")
    return all(record.get(name) is None for name in arrays) and any(map(_STATISTIC.fullmatch, record.values))


def summary_trace(record: Record, meta: dict[str, Any], details: str = "--save-detailed") -> Trace:
    """Return the load level's trace.

    Parameters
    ----------
    record : Record
        The file.
    meta : dict
        What the file says of model and engine.
    details : str
        The option that would have written every request.

    Raises
    ------
    InputError
        Naming the field that cannot be used.
    """
    count = record.tokens("completed", 1)
    if count > MOST_REQUESTS:
        raise record.error("completed", f"expected at most {MOST_REQUESTS} requests, found {count}")
    prompt, output = record.tokens("total_input_tokens", count), record.tokens("total_output_tokens", count)
    if record.get("ramp_up_strategy") is not None:
        raise record.error("ramp_up_strategy", "a rate that changes within the run cannot be drawn")
    whole = prompt % count == 0 and output % count == 0
    level = LoadLevel(
        requests=count,
        prompt_tokens=prompt / count,
        output_tokens=output / count,
        rate=_rate(record),
        burstiness=_positive(record, "burstiness", 1.0),
        # Versions that do not say a burstiness drew exponential gaps, and did not stretch them.
        distribution="poisson" if record.get("burstiness") is None else "gamma",
        max_concurrency=None if record.get("max_concurrency") is None else record.tokens("max_concurrency", 1),
        lengths_known=whole,
    )
    said = (
        "reconstructed: the totals divided by the requests leave no rest, so all are taken to be alike"
        if whole
        else "assumed: all alike at the mean of the totals"
    )
    notes = [f"the file holds aggregates (no {details}): requests are drawn, and compared as aggregates only"]
    if not whole:
        notes.append(
            f"of the lengths only the means are known ({prompt / count:.1f} prompt, {output / count:.1f} output "
            "tokens): requests that are all alike have shorter tails than those that were measured"
        )
    failed = record.get("failed") or (record.tokens("num_prompts") - count if record.get("num_prompts") else 0)
    if isinstance(failed, int) and failed > 0:
        notes.append(f"{failed} requests failed; what they loaded the engine with is unknown, and left out")
    meta = {**meta, "aggregates": _aggregates(record), "notes": notes}
    return level.trace(meta, {"prompt_tokens": said, "output_tokens": said})


def _rate(record: Record) -> float | None:
    rate = record.get("request_rate")
    if rate is None or rate == "inf" or rate == math.inf:
        return None
    if rate == "trace":
        raise record.error("request_rate", "is trace: send times came from a workload file, and cannot be drawn")
    return _positive(record, "request_rate", None)


def _positive(record: Record, name: str, default: float | None) -> float:
    value = record.get(name)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-6 <= value < 1e6:
        raise record.error(name, f"expected a number of at least 1e-6, below 1e6, found {found(value)}")
    return float(value)


def _aggregates(record: Record) -> dict[str, dict[str, float]]:
    aggregates: dict[str, dict[str, float]] = {}
    for key, value in record.values.items():
        match = _STATISTIC.fullmatch(key)
        if match is None or value is None:
            continue
        statistic = {"median": "p50"}.get(match[1], match[1])
        metric = {"e2el": "e2e", "e2e_latency": "e2e"}.get(match[2], match[2])
        aggregates.setdefault(metric, {})[statistic] = record.seconds(key, unit=1e-3)
    for key, name in _THROUGHPUT.items():
        if record.get(key) is not None:
            aggregates.setdefault("throughput", {})[name] = record.seconds(key, positive=True)
    return aggregates
