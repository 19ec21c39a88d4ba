"""Measured operator tables: an iteration composed of per-layer kernel times.

The tables are those of LLMServingSim's profiler (one-layer model, kernel times, no gaps between kernels);
composition and look-ups are its trace generator's at commit 5daddb2, to the nanosecond. Kernel times only:
host overhead is not part of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from simulator.accelerators.base import Floats
from simulator.batch import Batch
from simulator.errors import SimulationError
from simulator.hardware import Interconnect

Ints = npt.NDArray[np.signedinteger[Any]]

GEMMS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
ELEMENTWISE = ("layernorm", "qk_norm", "rotary_emb", "act_fn")
REQUIRED = (*GEMMS, "layernorm", "rotary_emb", "act_fn", "embedding", "final_layernorm")
PER_SEQUENCE = ("lm_head", "sampler")
MEMORY_PASSES = 1.5
"""Passes over the tensor through device memory that an all-reduce costs besides the link."""
ALL_REDUCE_LAUNCH_NS = 30


@dataclass(frozen=True)
class Curve:
    """A layer's time over a count: linear between points, constant below the first, extended past the last."""

    points: Sequence[int]
    ns: Sequence[int]

    def at(self, value: int) -> int:
        """Nanoseconds, truncated."""
        return max(1, int(self.between(value)))

    def between(self, value: int) -> float:
        """Nanoseconds, not truncated."""
        points, ns = self.points, self.ns
        high = bisect_left(points, value)
        if not high or len(points) == 1:
            return float(ns[0])
        if high == len(points):
            high -= 1
        low = points[high - 1]
        return ns[high - 1] + (value - low) / (points[high] - low) * (ns[high] - ns[high - 1])

    def between_all(self, values: Ints) -> Floats:
        """``between`` of each."""
        ns = np.array(self.ns, dtype=np.float64)
        if len(ns) == 1:
            return np.full(len(values), ns[0])
        points = np.array(self.points, dtype=np.float64)
        place = np.searchsorted(points, values, side="left")
        high = np.clip(place, 1, len(ns) - 1)
        low = points[high - 1]
        found = ns[high - 1] + (values - low) / (points[high] - low) * (ns[high] - ns[high - 1])
        return np.asarray(np.where(place == 0, ns[0], found))


@dataclass(frozen=True)
class SkewBuckets:
    """Upper bounds and labels of one axis of the skew table; the first bound that a value does not pass."""

    upper: Sequence[float]
    labels: Sequence[str]

    def label(self, value: float) -> str:
        """Label of the bucket that holds the value; the last beyond all bounds."""
        return self.labels[min(bisect_left(self.upper, value), len(self.labels) - 1)]


@dataclass(frozen=True)
class SkewTable:
    """How far a decode batch of uneven contexts lies between the uniform batches of mean and of longest context.

    ``alpha`` maps (prefill tokens, labels of decodes, skew rate, longest context, prefill context) to a factor.
    """

    decodes: SkewBuckets
    skew_rate: SkewBuckets
    longest: SkewBuckets
    prefill_context: SkewBuckets
    alpha: Mapping[tuple[int, str, str, str, str], float]
    default: float


@dataclass(frozen=True)
class Tables:
    """The tables of one model on one device at one tensor-parallel degree, times in nanoseconds.

    ``attention`` maps (prefill chunk, decodes) to {prefill context: curve over decode context}.
    """

    dense: Mapping[str, Curve]
    per_sequence: Mapping[str, Curve]
    attention: Mapping[tuple[int, int], Mapping[int, Curve]]
    skew: SkewTable | None = None
    attention_chunks: Sequence[int] = field(init=False)
    attention_decodes: Sequence[int] = field(init=False)

    def __post_init__(self) -> None:
        missing = [name for name in REQUIRED if name not in self.dense]
        missing += [name for name in PER_SEQUENCE if name not in self.per_sequence]
        if missing:
            raise SimulationError("operator table: no rows for layer " + ", ".join(missing))
        if not self.attention:
            raise SimulationError("operator table: no attention rows")
        object.__setattr__(self, "attention_chunks", sorted({chunk for chunk, _ in self.attention}))
        object.__setattr__(self, "attention_decodes", sorted({count for _, count in self.attention}))


class OperatorTable:
    """Prices a batch by looking its operators up.

    Several prefill chunks of one step are looked up as one chunk of their summed lengths and contexts, as the
    source does, or each on its own (``separate_prompts``), which is what attention computes. Components: ``dense``
    (the four projections of every layer), ``elementwise`` (norms, rotary embedding, activation), ``attention``,
    ``output_head`` (vocabulary projection and sampler), ``embedding`` (with the last norm), ``collectives`` (two
    all-reduces a layer, if tensor parallel).

    Parameters
    ----------
    tables : Tables
    num_hidden_layers, hidden_size : int
    activation_bytes : float
        Bytes per activation.
    tensor_parallel_size : int
        Degree at which the tables were measured.
    link : Interconnect
        Link of the all-reduces; not needed for one device.
    memory_bandwidth : float
        Bytes/s of device memory, for the all-reduces' own traffic.
    separate_prompts : bool
        Look the longest prefill chunk up together with the decodes, and add the others' own times less that of the
        smallest chunk in the table, which stands for the launch.

    Raises
    ------
    SimulationError
        If a layer has no rows, or tensor parallelism no link.
    """

    components = ("dense", "elementwise", "attention", "output_head", "embedding", "collectives")

    expected_coefficients = MappingProxyType(
        {
            "dense": (1.0, 0.1),
            "elementwise": (1.0, 0.5),
            "attention": (1.0, 0.1),
            "output_head": (1.0, 0.1),
            "embedding": (1.0, 0.5),
            "collectives": (1.0, 0.25),
        }
    )
    """Kernels were measured alone and unfused; in an engine elementwise ones fuse, and others share caches."""

    def __init__(
        self,
        tables: Tables,
        *,
        num_hidden_layers: int,
        hidden_size: int,
        activation_bytes: float = 2.0,
        tensor_parallel_size: int = 1,
        link: Interconnect | None = None,
        memory_bandwidth: float = 0.0,
        separate_prompts: bool = False,
    ) -> None:
        if tensor_parallel_size > 1 and (link is None or not link.bandwidth or not memory_bandwidth):
            raise SimulationError(
                f"operator table at tensor_parallel_size={tensor_parallel_size}: a link with its bandwidth and "
                "the memory bandwidth are needed"
            )
        self.tables = tables
        self.num_hidden_layers = num_hidden_layers
        self.token_bytes = hidden_size * activation_bytes
        self.tensor_parallel_size = tensor_parallel_size
        self.link = link or Interconnect()
        self.memory_bandwidth = memory_bandwidth
        self.separate_prompts = separate_prompts
        self._slices = {key: _Slice(rows) for key, rows in tables.attention.items()}
        self._token_ns = lru_cache(maxsize=65536)(self._price_tokens)
        self._head_ns = lru_cache(maxsize=4096)(self._price_head)
        self._corners = lru_cache(maxsize=65536)(self._find_corners)

    def step(self, batch: Batch) -> Sequence[float]:
        """Return seconds per component."""
        dense, elementwise, embedding, collectives = self._token_ns(max(batch.num_tokens, 1))
        attention = self.num_hidden_layers * self.attention_ns(batch)
        head = self._head_ns(max(batch.num_seqs, 1))
        return (
            dense * 1e-9,
            elementwise * 1e-9,
            attention * 1e-9,
            head * 1e-9,
            embedding * 1e-9,
            collectives * 1e-9,
        )

    def decode_run(self, batch: Batch, steps: int) -> Floats:
        """Return seconds per step and component, each step as ``step`` prices it."""
        run: Floats = np.tile(np.array(self.step(batch), dtype=np.float64), (steps, 1))
        run[:, self.components.index("attention")] = (
            self.num_hidden_layers * self._run_ns(batch, np.arange(steps)) * 1e-9
        )
        return run

    def _run_ns(self, batch: Batch, later: Ints) -> Floats:
        """``attention_ns`` of decodes alone, each with so many more tokens of context."""
        count = batch.num_decodes
        mean = batch.decode_context // count
        at_mean = self._uniform_run_ns(count, mean + later)
        skew, longest, shortest = self.tables.skew, batch.longest_context, batch.shortest_context
        if skew is None or count == 1 or longest == mean:
            return at_mean
        at_longest = self._uniform_run_ns(count, longest + later)
        # How uneven the contexts are stays as it is, only the longest grows.
        rate = min(1.0, max(0.0, (mean - shortest) / (longest - shortest)))
        before, after = (skew.decodes.label(count), skew.skew_rate.label(rate)), skew.prefill_context.label(0)
        factors = np.array([skew.alpha.get((0, *before, label, after), skew.default) for label in skew.longest.labels])
        bucket = np.minimum(np.searchsorted(skew.longest.upper, longest + later, side="left"), len(factors) - 1)
        alpha = factors[bucket]
        uneven = np.maximum(1.0, np.rint(at_mean + alpha * (at_longest - at_mean)))
        return np.asarray(np.where((alpha == 0) | (at_longest <= at_mean), at_mean, uneven))

    def _uniform_run_ns(self, decodes: int, contexts: Ints) -> Floats:
        """``_uniform_attention_ns`` of decodes alone."""
        (rows_00, rows_01, rows_10, rows_11), by_decodes, by_chunk = self._corners(0, 0, decodes)
        low = _row_run_ns(rows_00, contexts)
        if rows_01 is not rows_00:
            low = low + by_decodes * (_row_run_ns(rows_01, contexts) - low)
        if not (rows_10 is rows_00 and rows_11 is rows_01):
            high = _row_run_ns(rows_10, contexts)
            if rows_11 is not rows_10:
                high = high + by_decodes * (_row_run_ns(rows_11, contexts) - high)
            low = low + by_chunk * (high - low)
        return np.asarray(np.maximum(1.0, np.trunc(low)))

    def attention_ns(self, batch: Batch) -> int:
        """Nanoseconds of one layer's attention, uneven decode contexts included."""
        if not self.separate_prompts or len(batch.prefills) < 2:
            return self._attention_ns(batch.num_prefill_tokens, batch.prefill_context, batch)
        (chunk, context), *others = sorted(batch.prefills, reverse=True)
        launch = self._uniform_attention_ns(next(one for one in self.tables.attention_chunks if one), 0, 0, 0)
        apart = sum(max(0, self._uniform_attention_ns(*other, 0, 0) - launch) for other in others)
        return apart + self._attention_ns(chunk, context, batch)

    def _attention_ns(self, chunk: int, context: int, batch: Batch) -> int:
        """The same for one prefill chunk (0: none) beside a batch's decodes."""
        count = batch.num_decodes
        if not count:
            return self._uniform_attention_ns(chunk, context, 0, 0)
        mean = batch.decode_context // count
        at_mean = self._uniform_attention_ns(chunk, context, count, mean)
        skew = self.tables.skew
        if skew is None or count == 1:
            return at_mean
        longest, shortest = batch.longest_context, batch.shortest_context
        if longest == mean:
            return at_mean
        rate = min(1.0, max(0.0, (mean - shortest) / (longest - shortest)))
        key = (
            chunk,
            skew.decodes.label(count),
            skew.skew_rate.label(rate),
            skew.longest.label(longest),
            skew.prefill_context.label(context),
        )
        alpha = skew.alpha.get(key, skew.default)
        if not alpha:
            return at_mean
        at_longest = self._uniform_attention_ns(chunk, context, count, longest)
        if at_longest <= at_mean:
            return at_mean
        # A fitted alpha may be negative, and far below the buckets' own contexts too much so.
        return max(1, round(at_mean + alpha * (at_longest - at_mean)))

    def _uniform_attention_ns(self, chunk: int, context: int, decodes: int, decode_context: int) -> int:
        """One call with a prefill chunk and decodes of equal context, blended from the four nearest slices."""
        (rows_00, rows_01, rows_10, rows_11), by_decodes, by_chunk = self._corners(chunk, context, decodes)
        low = _row_ns(rows_00, decode_context)
        if rows_01 is not rows_00:
            low += by_decodes * (_row_ns(rows_01, decode_context) - low)
        if rows_10 is rows_00 and rows_11 is rows_01:
            return max(1, int(low))
        high = _row_ns(rows_10, decode_context)
        if rows_11 is not rows_10:
            high += by_decodes * (_row_ns(rows_11, decode_context) - high)
        return max(1, int(low + by_chunk * (high - low)))

    def _find_corners(
        self, chunk: int, context: int, decodes: int
    ) -> tuple[tuple[_Rows, _Rows, _Rows, _Rows], float, float]:
        tables = self.tables
        low_chunk, high_chunk, by_chunk = _bracket(tables.attention_chunks, chunk)
        low_count, high_count, by_decodes = _bracket(tables.attention_decodes, decodes)

        def nearest(chunk_place: int, count_place: int) -> _Slice:
            wanted = (tables.attention_chunks[chunk_place], tables.attention_decodes[count_place])
            if wanted not in tables.attention:
                wanted = min(
                    sorted(tables.attention),
                    key=lambda have: (have[0] - wanted[0]) ** 2 + (have[1] - wanted[1]) ** 2,
                )
            return self._slices[wanted]

        places = [(low_chunk, low_count), (low_chunk, high_count), (high_chunk, low_count), (high_chunk, high_count)]
        slices = [nearest(*place) for place in places]
        rows = {one: _rows(one, context) for one in slices}
        first, second, third, fourth = (rows[one] for one in slices)
        return (first, second, third, fourth), by_decodes, by_chunk

    def _price_tokens(self, tokens: int) -> tuple[int, int, int, int]:
        """Nanoseconds of dense, elementwise, embedding and collectives, all layers."""
        curves, layers = self.tables.dense, self.num_hidden_layers
        dense = sum(curves[name].at(tokens) for name in GEMMS)
        elementwise = 2 * curves["layernorm"].at(tokens)
        elementwise += sum(curves[name].at(tokens) for name in ELEMENTWISE[1:] if name in curves)
        embedding = curves["embedding"].at(tokens) + curves["final_layernorm"].at(tokens)
        return (
            layers * dense,
            layers * elementwise,
            embedding,
            2 * layers * self._all_reduce_ns(tokens * self.token_bytes),
        )

    def _all_reduce_ns(self, num_bytes: float) -> int:
        """Ring all-reduce as ASTRA-Sim's analytical network prices it, with its memory traffic."""
        devices = self.tensor_parallel_size
        if devices == 1:
            return 0
        hop = round(1e9 * self.link.latency) + int(1e9 * num_bytes / (devices * self.link.bandwidth))
        memory = int(1e9 * MEMORY_PASSES * num_bytes / self.memory_bandwidth)
        return 2 * (devices - 1) * hop + memory + ALL_REDUCE_LAUNCH_NS

    def _price_head(self, sequences: int) -> int:
        return sum(self.tables.per_sequence[name].at(sequences) for name in PER_SEQUENCE)


class _Slice:
    """Attention at one (prefill chunk, decodes): rows over prefill context, curves over decode context."""

    __slots__ = ("contexts", "curves")

    def __init__(self, rows: Mapping[int, Curve]) -> None:
        self.contexts = sorted(rows)
        self.curves = [rows[context] for context in self.contexts]


_Rows = tuple[Curve, Curve | None, float]
"""The curves over decode context around a prefill context, the second if it is needed, and its weight."""


def _rows(one: _Slice, context: int) -> _Rows:
    low, high, weight = _bracket(one.contexts, context)
    return one.curves[low], one.curves[high] if weight and high != low else None, weight


def _row_ns(rows: _Rows, decode_context: int) -> float:
    low, high, weight = rows
    value = low.between(decode_context)
    if high is not None:
        value += weight * (high.between(decode_context) - value)
    return value


def _row_run_ns(rows: _Rows, decode_contexts: Ints) -> Floats:
    low, high, weight = rows
    values = low.between_all(decode_contexts)
    if high is not None:
        values = values + weight * (high.between_all(decode_contexts) - values)
    return values


def _bracket(points: Sequence[int], value: float) -> tuple[int, int, float]:
    """Places of the two points around a value and its weight between them; > 1 past the last point."""
    if value <= points[0] or len(points) == 1:
        return 0, 0, 0.0
    high = min(bisect_left(points, value), len(points) - 1)
    low = high - 1
    return low, high, (value - points[low]) / (points[high] - points[low])
