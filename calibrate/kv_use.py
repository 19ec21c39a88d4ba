"""KV blocks that a run's requests held, told by their stamps, and how many blocks there were in all.

While a request runs it holds one block for every ``block_size`` tokens whose keys and values are computed or being
computed: its prompt and what it has generated so far. Between its first and last token these grow by one an iteration,
so the stamps tell them to within a block. Full blocks of prompts that begin alike are held once (``block_hashes``).
vLLM's gauge says which share of all blocks is in use; blocks held by share is the number of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calibrate.errors import bootstrap_interval
from replay.block_hashes import at_block_size
from replay.trace import Trace
from simulator.engine_config import EngineConfig

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.bool_]

LEAST_USE = 0.05
"""Share in use below which a sample says too little: vLLM's log rounds to 0.1 %."""
FEWEST_SAMPLES = 5
MOST_INSTANTS = 400
"""Instants at which held blocks are counted in search of a plateau."""
PATIENCE = 4.0
"""Iterations for which a request waits whom something else than the iteration in flight keeps out."""
UNCERTAIN = 0.02
"""Share by which blocks held may be wrong, since the stamps tell tokens in between by interpolation."""


@dataclass(frozen=True)
class Held:
    """The state at instants, shape (n,) each.

    ``blocks`` held by running requests; ``steady`` those of requests that were never preempted, which may be fewer;
    ``running`` requests; ``prefilling`` of them computing prompts; ``queued`` requests that have waited for long, and
    ``next_blocks`` what the first of them needs; ``known`` whether all stamps that matter may be used.
    """

    blocks: Floats
    steady: Floats
    running: Floats
    prefilling: Floats
    queued: Floats
    next_blocks: Floats
    known: Rows


@dataclass(frozen=True)
class Blocks:
    """A number of KV blocks (the null block included) with its interval, and how many samples told it."""

    value: int
    low: int
    high: int
    samples: int


class KVUse:
    """What a run's requests held, instant by instant.

    Parameters
    ----------
    trace : Trace
        With engine stamps.
    config : EngineConfig
        For block size, prefix caching, token budget and asynchronous scheduling.
    known : array of bool, optional
        Rows whose stamps may be used. Instants after the first arrival of any other are not known.
    """

    def __init__(self, trace: Trace, config: EngineConfig, known: Rows | None = None) -> None:
        self.trace, self.config = trace, config
        names = ("arrival", "scheduled", "first_token", "last_token", "prompt_tokens", "output_tokens", "preemptions")
        columns = (trace.column(name) for name in names)
        self.arrival, self.scheduled, self.first, self.last, self.prompt, self.output, preempted = columns
        self.preempted = np.nan_to_num(preempted) > 0
        self.preemptions_told = not np.isnan(preempted).any()
        stamped = ~(np.isnan(self.scheduled) | np.isnan(self.first) | np.isnan(self.last))
        usable = stamped if known is None else stamped & known
        served = trace.statuses != "failed"
        unknown = self.arrival[served & ~usable]
        self.until = float(np.nanmin(unknown)) if np.isfinite(unknown).any() else np.inf
        self.usable = usable
        both = usable & (self.output > 1)
        decode = (self.last - self.first)[both] / (self.output - 1)[both]
        self.step = float(np.median(decode)) if both.any() else np.nan
        self.shared = self._shared_blocks() if config.enable_prefix_caching else {}

    def _shared_blocks(self) -> dict[int, npt.NDArray[np.int64]]:
        """By row, the hashes of its prompt's blocks that stand in other prompts too."""
        have = int((self.trace.meta.get("block_hash") or {}).get("block_size") or 0)
        if not have:
            return {}
        lists = self.trace.lists("block_hashes")
        own = {
            row: np.array(at_block_size(hashes, have, self.config.block_size), dtype=np.int64)
            for row, hashes in enumerate(lists)
            if hashes
        }
        if not own:
            return {}
        hashes, counts = np.unique(np.concatenate(list(own.values())), return_counts=True)
        often = hashes[counts > 1]
        # A chained hash that is shared has only shared ones before it.
        found = {row: one[np.isin(one, often)] for row, one in own.items()}
        return {row: one for row, one in found.items() if one.size}

    def tokens(self, time: float, running: npt.NDArray[np.intp]) -> Floats:
        """Tokens of some requests that have a place in the cache at a time."""
        prompt, first, last, output = (one[running] for one in (self.prompt, self.first, self.last, self.output))
        share = np.clip((time - first) / np.maximum(last - first, 1e-9), 0.0, 1.0)
        generated = 1 + np.floor(share * (output - 1) + 1e-6)
        ahead = 1 if self.config.async_scheduling else 0
        decoding = np.minimum(prompt + generated + ahead, np.maximum(prompt + output - 1, prompt))
        scheduled = self.scheduled[running]
        chunks = np.ceil(prompt / self.config.token_budget)
        begun = 1 + np.floor(np.clip((time - scheduled) / np.maximum(first - scheduled, 1e-9), 0.0, 1.0) * chunks)
        return np.asarray(np.where(time >= first, decoding, np.minimum(prompt, begun * self.config.token_budget)))

    def at(self, times: Floats) -> Held:
        """The state at some instants."""
        rows = [self._at(float(time)) for time in times]
        columns = np.array(rows, dtype=np.float64).reshape(-1, 6).T
        blocks, steady, running, prefilling, queued, needed = columns
        return Held(blocks, steady, running, prefilling, queued, needed, np.asarray(times) < self.until)

    def _at(self, time: float) -> tuple[float, ...]:
        running = np.flatnonzero(self.usable & (self.scheduled <= time) & (time < self.last))
        tokens = self.tokens(time, running)
        blocks = np.ceil(tokens / self.config.block_size)
        steady = ~self.preempted[running]
        waiting = np.flatnonzero(
            self.usable & (self.arrival + PATIENCE * self.step <= time) & (self.scheduled > time + self.step)
        )
        needed = 0.0
        if waiting.size:
            head = waiting[np.argmin(self.arrival[waiting])]
            needed = float(np.ceil(self.prompt[head] / self.config.block_size))
        return (
            float(blocks.sum()) - self._twice(running, tokens),
            float(blocks[steady].sum()) - self._twice(running[steady], tokens[steady]),
            float(running.size),
            float(np.count_nonzero(time < self.first[running])),
            float(waiting.size),
            needed,
        )

    def _twice(self, running: npt.NDArray[np.intp], tokens: Floats) -> int:
        """Blocks that are counted although another running request holds the same."""
        if not self.shared:
            return 0
        full = tokens // self.config.block_size
        parts = [self.shared[row][: int(count)] for row, count in zip(running, full, strict=True) if row in self.shared]
        if not parts:
            return 0
        every = np.concatenate(parts)
        return int(every.size - np.unique(every).size)


def blocks_of_series(trace: Trace, use: KVUse) -> Blocks | str:
    """Number of KV blocks by the KV-use time series, or why it does not tell.

    The median over samples of blocks held by share in use, heavier shares counting more; where the gauge of running
    requests disagrees with the stamps (a preempted request waits between them) the sample is left out. The interval is
    of a block bootstrap over time.
    """
    if trace.timeline is None:
        return "the trace has no KV-use time series"
    times, share, gauge = (trace.timeline.column(name).to_numpy() for name in ("time", "kv_usage", "running"))
    if np.isnan(share).all() or not np.nan_to_num(share).any():
        return "its KV-use time series is empty or 0 throughout although requests ran"
    held = use.at(times)
    fine = held.known & (np.nan_to_num(share) >= LEAST_USE) & (held.blocks > 0)
    fine &= np.isnan(gauge) | (np.abs(gauge - held.running) <= np.maximum(1.0, 0.02 * held.running))
    if fine.sum() < FEWEST_SAMPLES:
        return (
            f"its KV-use time series has {int(fine.sum())} samples above {100 * LEAST_USE:.0f} % that agree with the "
            "stamps, too few"
        )
    ratio, weight = held.blocks[fine] / share[fine], share[fine]
    value = _weighted_median(ratio, weight)
    pairs = np.stack([ratio, weight], axis=-1)
    low, high = bootstrap_interval(pairs, _medians)
    return Blocks(round(value) + 1, round(min(low, value)) + 1, round(max(high, value)) + 1, int(fine.sum()))


def _weighted_median(values: Floats, weights: Floats) -> float:
    order = np.argsort(values)
    rising = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(rising, rising[-1] / 2)])


def _medians(samples: Floats) -> Floats:
    """Weighted medians of resamples, shape (resamples, n, 2)."""
    return np.array([_weighted_median(one[:, 0], one[:, 1]) for one in samples])


def blocks_of_recording(trace: Trace, config: EngineConfig) -> int | None:
    """Number of KV blocks by recorded iterations that say how many were free; None if they do not.

    Told by iterations of a single request, which shares its blocks with nobody.
    """
    if trace.iterations is None:
        return None
    names = ("free_blocks", "running", "computed", "scheduled")
    totals = []
    for free, running, computed, scheduled in zip(
        *(trace.iterations.column(name).to_pylist() for name in names), strict=True
    ):
        if free is not None and running == 1 and computed and len(computed) == 1:
            totals.append(free + -(-(computed[0] + scheduled[0]) // config.block_size))
    return int(np.median(totals)) + 1 if totals else None


@dataclass(frozen=True)
class Plateau:
    """Bounds on the number of KV blocks (null block included) by what a run held and what it kept waiting.

    ``least``: the most blocks held at once by requests that were never preempted. ``most`` (None: nothing bounds it):
    what the run held, and the next request's prompt, while that waited although nothing else kept it out. ``certain``
    says whether the trace tells preemptions, without which stamps may show as held what had been evicted.
    """

    least: int
    most: int | None
    certain: bool


def plateau(use: KVUse, config: EngineConfig) -> Plateau | None:
    """Bounds by the stamps alone; None without stamps."""
    stamps = np.unique(np.concatenate([use.first[use.usable], use.last[use.usable]]))
    stamps = stamps[stamps < use.until]
    if not stamps.size or np.isnan(use.step):
        return None
    if stamps.size > MOST_INSTANTS:
        stamps = stamps[np.linspace(0, stamps.size - 1, MOST_INSTANTS).astype(int)]
    # Just before a stamp: whoever ends there still holds what it had.
    held = use.at(stamps - 1e-6)
    kept_out = (held.queued > 0) & (held.prefilling == 0) & (held.running > 0) & (held.running < config.max_num_seqs)
    most = None
    if kept_out.sum() >= FEWEST_SAMPLES:
        # One that is half an iteration off must not set the bound: a low quantile of all.
        most = int(np.quantile((held.blocks + held.next_blocks)[kept_out], 0.1)) + 1
    return Plateau(int(held.steady.max(initial=0)) + 1, most, use.preemptions_told)
