"""Answers of Prometheus' HTTP API about vLLM or SGLang: ``/api/v1/query_range`` (and ``/query``) as JSON.

One answer, a JSON list of them, an object of them by name, or one a line. Raw series are read (``vllm:...`` by name,
for histograms ``..._bucket``, ``_sum``, ``_count``); expressions such as ``rate(...)`` have lost their names, and are
not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from profiles.errors import InputError, found
from replay.readers.fields import Record, as_seconds, parse_json
from replay.readers.opening import head, open_text
from replay.readers.prometheus import Labels, Scrapes, trace_of
from replay.trace import Trace

FORMAT = "prometheus-range"
REQUESTS_FILE = ""


def detect(path: Path) -> bool:
    """Whether a file holds such answers."""
    if not path.is_file():
        return False
    content = head(path).removeprefix(b"\xef\xbb\xbf").lstrip()
    answer = b'"resultType"' in content and b'"result"' in content
    return content[:1] in (b"{", b"[") and (answer or (b'"__name__"' in content and b'"metric"' in content))


def read(path: Path) -> Trace:
    """Read the series of all answers in a file.

    Raises
    ------
    InputError
        Naming file and field of what cannot be used.
    """
    series: dict[tuple[str, Labels], dict[float, float]] = defaultdict(dict)
    for answer in _answers(path):
        for name, labels, time, value in _samples(answer, path):
            series[name, tuple(sorted(labels.items()))][time] = value
    if not series:
        raise InputError(
            "holds no series of vLLM or SGLang by name; query the metrics themselves, not expressions of them",
            file=path,
        )
    scrapes = Scrapes()
    moments = sorted({time for values in series.values() for time in values})
    scrapes.times = list(moments)
    place = {time: row for row, time in enumerate(moments)}
    for (name, told), values in sorted(series.items()):
        for time in sorted(values):
            scrapes.add(place[time], name, dict(told), values[time])
    return trace_of(scrapes, path, FORMAT)


def _answers(path: Path) -> Iterator[Record]:
    """Answers of a file, whatever holds them together."""
    try:
        with open_text(path) as stream:
            text = stream.read()
    except UnicodeDecodeError as error:
        raise InputError(f"is no UTF-8 text: {error.reason} at byte {error.start}", file=path) from None
    lines = [line for line in text.splitlines() if line.strip()]
    alone = len(lines) > 1 and all(line.startswith("{") and line.rstrip().endswith("}") for line in lines)
    for number, piece in enumerate(lines if alone else [text], 1):
        value = parse_json(piece, path, number, finite=True)
        listed = value if isinstance(value, list) else [value]
        for one in listed:
            if not isinstance(one, dict):
                raise InputError(f"expected an answer of Prometheus, found {found(one)}", file=path, row=number)
            parts = [one] if _is_answer(one) else [inner for inner in one.values() if isinstance(inner, dict)]
            for part in parts:
                yield Record(part, path, number)


def _is_answer(value: dict[str, Any]) -> bool:
    return "data" in value or "result" in value or "status" in value


def _samples(answer: Record, path: Path) -> Iterator[tuple[str, dict[str, str], float, float]]:
    if answer.get("status") == "error":
        raise answer.error("error", f"Prometheus refused the query: {found(answer.get('error'))}")
    data = answer.get("data") if isinstance(answer.get("data"), dict) else answer.values
    results = data.get("result") if isinstance(data, dict) else None
    if not isinstance(results, list):
        raise answer.error("data.result", f"expected a list of series, found {found(results)}")
    for index, result in enumerate(results):
        where = f"series {index + 1}"
        labels = result.get("metric") if isinstance(result, dict) else None
        if not isinstance(labels, dict) or not all(isinstance(one, str) for one in labels.values()):
            raise InputError(f"expected labels, found {found(labels)}", file=path, row=where, field="metric")
        name = labels.get("__name__", "")
        if name.partition(":")[0] not in ("vllm", "sglang"):
            continue
        values = result.get("values", [result["value"]] if "value" in result else None)
        if not isinstance(values, list):
            raise InputError(f"expected a list of samples, found {found(values)}", file=path, row=where, field="values")
        rest = {key: text for key, text in labels.items() if key != "__name__"}
        for sample in values:
            yield name, rest, *_sample(sample, path, where)


def _sample(sample: Any, path: Path, where: str) -> tuple[float, float]:
    def error(why: str) -> InputError:
        return InputError(why, file=path, row=where, field="values")

    if not isinstance(sample, list) or len(sample) != 2 or not isinstance(sample[1], str):
        raise error(f'expected [time, "value"], found {found(sample)}')
    try:
        return as_seconds(sample[0], False, error), float(sample[1])
    except ValueError:
        raise error(f"expected a number as text, found {found(sample[1])}") from None
