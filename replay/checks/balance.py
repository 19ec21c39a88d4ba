"""Laws that any queue keeps: what came in is there or went out, and an engine works while there is work."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from replay.checks.evidence import Evidence, present
from replay.checks.finding import Finding
from replay.trace import Floats

OFF = 0.05
"""Relative difference of two counts of the same requests from which they contradict each other: sampling an integer
once a second, between steps, costs the public traces less than 0.4 %."""
FAR_OFF = 0.25
LEAST_OFF = 1.0
"""Requests by which they must differ on average: who comes or goes at the instant of a sample may be counted or not."""
FEWEST_SAMPLES = 10
STALL = 0.1
"""Seconds without an iteration although requests were there, from which an engine counts as stalled; between two
iterations vLLM takes well under a millisecond."""
SLOW_STEPS = 10.0
"""The same in multiples of the longest usual step (99th percentile)."""
SLOWEST_CLIENT = 1.0
"""Seconds without any token at the client, below which a network may be to blame."""
MOST_STALLED = 0.01
"""Share of the run from which stalls show in its figures."""
MISCOUNTED = 0.005
"""Relative difference between tokens counted by the engine and by the requests: logs round to 0.1 tokens/s."""
BLOCK_SLACK = 0.02


def littles_law(evidence: Evidence) -> Iterator[Finding]:
    """Requests in the system, counted in two ways (Little 1961: L = lambda W).

    On the trace's own stamps the time average of requests present, L, equals arrival rate times mean time, lambda W, by
    construction once all have left; so it is held against what was counted independently: running + waiting of the
    gauges, or of recorded iterations, sample by sample; and the client's own limit of concurrency. They differ if
    requests are missing, if somebody else used the engine, if stamps are moved, or if the gauges are of another run.
    """
    trace = evidence.trace
    if trace.batches is not None or not evidence.arrivals_measured:
        return
    served = evidence.ok & ~np.isnan(evidence.entered) & ~np.isnan(evidence.last)
    if not served.any():
        return
    begin, end = evidence.entered[served], evidence.last[served]
    span = float(end.max() - begin.min())
    sampled = _sampled(evidence, float(begin.min()), float(end.max()))
    if sampled is not None and served.all() and span > 0:
        source, times, counted = sampled
        told = present(begin, end, times)
        level = max(float(counted.mean()), float(told.mean()), 1.0)
        requests_off = float(np.abs(counted - told).mean())
        off = requests_off / level
        if off > OFF and requests_off > LEAST_OFF:
            yield evidence.found(
                "littles_law",
                "error" if off > FAR_OFF else "warning",
                f"{source} count {counted.mean():.1f} requests present on average, the requests' own stamps "
                f"{told.mean():.1f} (mean difference {100 * off:.0f} %): requests are missing, others used the engine, "
                "or the two are not on one clock",
                values={
                    "counted": float(counted.mean()),
                    "told": float(told.mean()),
                    "off": off,
                    "rate": begin.size / span,
                    "mean_time": float((end - begin).mean()),
                },
            )
    limit = (trace.meta.get("load") or {}).get("max_concurrency")
    if isinstance(limit, int | float) and limit > 0:
        most = float(present(begin, end, np.sort(begin)).max())
        if most > limit + 1:
            yield evidence.found(
                "littles_law",
                "warning",
                f"{most:.0f} requests were under way at once, the client's max_concurrency is {limit:g}: stamps or "
                "arrivals are not of this run",
                values={"most": most, "limit": float(limit)},
            )


def _sampled(evidence: Evidence, begin: float, end: float) -> tuple[str, Floats, Floats] | None:
    """Requests present as the engine counted them, inside the run."""
    table, source = evidence.trace.timeline, "the gauges"
    name = "time"
    if table is None and evidence.trace.iterations is not None:
        table, source = evidence.trace.iterations, "recorded iterations"
        # Counted by the schedule call, which an asynchronous engine makes while the iteration before it runs.
        name = "start" if table.column("scheduled_at").null_count else "scheduled_at"
    if table is None or np.isnan(evidence.queued[evidence.ok]).all():
        return None
    times, running, waiting = (
        np.asarray(table.column(one).to_numpy(zero_copy_only=False), dtype=np.float64)
        for one in (name, "running", "waiting")
    )
    counted = running + waiting
    inside = (times > begin) & (times < end) & ~np.isnan(counted)
    return (source, times[inside], counted[inside]) if inside.sum() >= FEWEST_SAMPLES else None


def work_conservation(evidence: Evidence) -> Iterator[Finding]:
    """An engine that does nothing while requests wait, and iterations that do not add up to the tokens they gave.

    vLLM schedules again as soon as an iteration ends, so time without an iteration, a running request or a token while
    somebody is there was lost outside the engine's work: the process was stopped, the host swapped, the log has a hole.
    No simulator has that time. A request of n output tokens took part in n iterations from the one that completed its
    prompt on, unless preempted or decoding speculatively.
    """
    if evidence.trace.batches is not None or not evidence.one_clock:
        return
    idle = _idle(evidence)
    if idle.size:
        total = float(idle.sum())
        span = float(np.nanmax(evidence.last) - np.nanmin(evidence.entered))
        yield evidence.found(
            "work_conservation",
            "warning" if total > MOST_STALLED * span else "info",
            f"the engine did nothing for {total:.2f} s ({100 * total / span:.1f} % of the run, {idle.size} times, at "
            f"most {idle.max():.2f} s) although requests were there: it was stopped from outside, or the recording has "
            "holes; no simulation has that time",
            values={"seconds": total, "times": idle.size, "longest": float(idle.max()), "share": total / span},
        )
    if evidence.trace.iterations is not None:
        yield from _tokens_of_iterations(evidence)


def _idle(evidence: Evidence) -> Floats:
    """Lengths of the stalls: between recorded iterations; else with requests queued, and with requests decoding."""
    trace, step = evidence.trace, np.nan_to_num(evidence.step)
    if trace.iterations is not None:
        start, duration = (trace.iterations.column(name).to_numpy() for name in ("start", "duration"))
        if not start.size:
            return np.empty(0)
        least = max(STALL, SLOW_STEPS * float(np.quantile(duration, 0.99)))
        return _long(evidence, evidence.queued, np.maximum.accumulate(start + duration)[:-1], start[1:], least)
    found = [np.empty(0)]
    if trace.has("scheduled"):
        found.append(_long(evidence, evidence.queued, *_unserved(evidence), max(STALL, SLOW_STEPS * step)))
    # Who waits for the first token does not count from here on: others' prompts may be computed, without a token.
    if trace.has("token_times") and evidence.arrivals_measured:
        times, owner = evidence.chunks
        gaps = np.diff(times)[owner[1:] == owner[:-1]]
        events = np.sort(times)
        least = max(SLOWEST_CLIENT, SLOW_STEPS * float(np.quantile(gaps, 0.99)) if gaps.size else np.inf)
        found.append(_long(evidence, evidence.first, events[:-1], events[1:], least))
    elif trace.timeline is not None and trace.timeline.num_rows >= FEWEST_SAMPLES:
        begin, end, tick = _without_tokens(trace.timeline)
        found.append(_long(evidence, evidence.first, begin, end, max(tick, SLOW_STEPS * step)))
    return np.concatenate(found)


def _long(evidence: Evidence, since: Floats, begin: Floats, end: Floats, least: float) -> Floats:
    """Lengths of the intervals above ``least`` all through which some request was there, ``since`` to last token."""
    long = end - begin > least
    begin, end = begin[long], end[long]
    here = ~np.isnan(since) & (evidence.last > since)
    came = np.searchsorted(np.sort(since[here]), begin, side="right")
    left = np.searchsorted(np.sort(evidence.last[here]), end, side="left")
    # Nobody gets a last token meanwhile, so whoever left by the end had left by the beginning.
    return np.asarray((end - begin)[came > left])


def _without_tokens(timeline: pa.Table) -> tuple[Floats, Floats, float]:
    """Intervals without any token by the throughput gauges, and the length of a tick."""
    times, *rates = (
        np.asarray(timeline.column(name).to_numpy(zero_copy_only=False), dtype=np.float64)
        for name in ("time", "prompt_throughput", "generation_throughput")
    )
    tick = float(np.median(np.diff(times)))
    active = times[np.nan_to_num(rates[0]) + np.nan_to_num(rates[1]) > 0]
    return active[:-1], active[1:] - tick, tick


def _unserved(evidence: Evidence) -> tuple[Floats, Floats]:
    """Intervals in which no request ran although one was queued, by stamps."""
    both = ~(np.isnan(evidence.scheduled) | np.isnan(evidence.last))
    begin, end = (
        np.sort(evidence.scheduled[both]),
        np.maximum.accumulate(evidence.last[both][np.argsort(evidence.scheduled[both], kind="stable")]),
    )
    return end[:-1], begin[1:]


def _tokens_of_iterations(evidence: Evidence) -> Iterator[Finding]:
    _, rows, computed, scheduled = evidence.items()
    yields = computed + scheduled >= evidence.prompt[rows]
    speculative = bool((yields & (computed >= evidence.prompt[rows]) & (scheduled > 1) & evidence.straight[rows]).any())
    took = np.bincount(rows[yields], minlength=len(evidence.trace))
    spare = 1 if evidence.argument("async_scheduling") else 0
    whole = evidence.ok & evidence.straight
    off = whole & ((took < evidence.output) | (took > evidence.output + spare))
    if off.any() and not speculative:
        yield evidence.found(
            "work_conservation",
            "error",
            f"{int(off.sum())} requests have other output tokens than iterations that gave them one (in all "
            f"{int(evidence.output[off].sum()):,} against {int(took[off].sum()):,}): lengths were counted elsewhere, "
            "or iterations are missing",
            off,
            {"output_tokens": float(evidence.output[off].sum()), "iterations": float(took[off].sum())},
        )


def token_totals(evidence: Evidence) -> Iterator[Finding]:
    """Tokens that the engine's throughput gauges sum to, against those of the requests.

    vLLM's logger divides the tokens since its last line by the time since; summed over lines they are all tokens. More
    in the gauges: others used the engine, or requests are missing. Fewer in either: lengths were re-tokenised.
    """
    table = evidence.trace.timeline
    if table is None or not evidence.ok.all() or table.num_rows < FEWEST_SAMPLES:
        return
    times = table.column("time").to_numpy()
    ticks = np.diff(times, prepend=2 * times[0] - times[1])
    # A logger that leaves out idle ticks does not stretch the next one.
    ticks = np.where(ticks > 1.5 * np.median(ticks), np.median(ticks), ticks)
    covered = times[0] - ticks[0] <= np.nanmin(evidence.first) and times[-1] >= np.nanmax(evidence.last)
    for name, tokens, kind in (
        ("generation_throughput", evidence.output, "output"),
        ("prompt_throughput", evidence.prompt, "prompt"),
    ):
        rates = np.asarray(table.column(name).to_numpy(zero_copy_only=False), dtype=np.float64)
        if not covered or np.isnan(rates).any() or not rates.any():
            continue
        counted, told = float((rates * ticks).sum()), float(tokens.sum())
        if kind == "prompt":
            # vLLM 0.16 and later count what was computed; earlier ones prefix-cache hits as well.
            told = min(max(counted, told - float(np.nansum(evidence.trace.column("cached_tokens")))), told)
        off = counted / told - 1
        if abs(off) > MISCOUNTED:
            yield evidence.found(
                "token_totals",
                "warning",
                f"the engine's gauges count {counted:,.0f} {kind} tokens, the requests {told:,.0f} "
                f"({100 * off:+.1f} %): "
                + (
                    "others used the engine, or requests are missing"
                    if off > 0
                    else "lengths are not the engine's (re-tokenised?), or requests stand twice"
                ),
                values={"counted": counted, "told": told, "off": off},
            )


def kv_use(evidence: Evidence) -> Iterator[Finding]:
    """KV blocks in use against those that the recorded requests can hold.

    A running request holds one block for every ``block_size`` tokens computed or being computed; sharing prefixes only
    makes them fewer. More in use than the sum: somebody else's requests, or not the run's ``num_gpu_blocks``.
    """
    table, deployment = evidence.trace.iterations, evidence.deployment
    if table is None or table.column("free_blocks").null_count:
        return
    total = evidence.argument("num_gpu_blocks") or (
        deployment.config.num_gpu_blocks if deployment and "num_gpu_blocks" not in deployment.assumed else None
    )
    size = evidence.argument("block_size") or (deployment.config.block_size if deployment else None)
    if not isinstance(total, int) or not isinstance(size, int):
        return
    free, running = (np.asarray(table.column(name).to_numpy(), dtype=np.int64) for name in ("free_blocks", "running"))
    iteration, _, computed, scheduled = evidence.items()
    # One block more each, which an engine may take ahead of the next token.
    held = np.bincount(iteration, -(-(computed + scheduled) // size) + 1, minlength=free.size)
    whole = np.bincount(iteration, minlength=free.size) == running
    used = total - 1 - free
    bad = whole & ((used > held + BLOCK_SLACK * total) | (used < 0))
    if bad.any():
        one = int(np.argmax(np.where(bad, np.abs(used - held), -1)))
        yield evidence.found(
            "kv_use",
            "warning",
            f"in {int(bad.sum())} recorded iterations {used[one]:,} KV blocks of {total:,} were in use, their requests "
            f"can hold {int(held[one]):,}: num_gpu_blocks is not the run's, or others used the engine",
            values={"iterations": float(bad.sum()), "used": float(used[one]), "held": float(held[one])},
        )
