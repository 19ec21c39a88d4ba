"""What a log often lacks, told by the run: the number of KV blocks, whether scheduling was asynchronous, warm-up.

Each is a ``Finding``: a value, where it comes from, and a sentence. Inferred values take the place of what nobody said
and was only assumed; what was said is kept, and a contradiction is a warning. Only stamps that may be used take part,
so that a fit of one part of a run infers from that part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from calibrate.kv_use import UNCERTAIN, Blocks, KVUse, Plateau, blocks_of_recording, blocks_of_series, plateau
from calibrate.least_squares import scatter
from calibrate.reconstruction import NotRecoverable, Reconstruction, StepSeconds, first_tokens_in_place
from profiles.deployment import Deployment, UnknownBlocks, resolve
from profiles.errors import InputError
from profiles.profile import LoadedProfile
from replay.run import facts_of
from replay.trace import Trace
from simulator.engine_config import MOST_BLOCKS, EngineConfig

Floats = npt.NDArray[np.floating[Any]]
Rows = npt.NDArray[np.bool_]
Reconstruct = Callable[[EngineConfig], tuple[Reconstruction, StepSeconds]]

DIFFERENT = 0.05
"""Share by which a stated number of KV blocks must differ from the series to be doubted."""
FEWEST_REQUESTS = 10
"""First tokens that only one way of scheduling explains, below which nothing is said."""
CLEAR = 0.9
"""Share of these that must speak for one way."""
ODD = 6.0
"""Robust standard deviations (1.4826 times the median absolute deviation) from which a first request is anomalous."""
ODD_SHARE = 0.5
"""And as a share of the measured latency: twice what is predicted. An iteration more at low load is no warm-up."""
FEWEST_OTHERS = 20
"""Requests after the first ones that it takes to say what is usual."""


@dataclass(frozen=True)
class Finding:
    """A value that the log lacked or that the run confirms or doubts.

    ``source`` is ``stated``, ``assumed``, ``memory arithmetic``, or the part of the trace that tells it;
    ``interval`` is given where there is one; ``doubt`` marks a sentence that contradicts what was stated.
    """

    name: str
    value: Any
    source: str
    sentence: str
    trace: str
    interval: tuple[int, int] | None = None
    doubt: bool = False


def resolved(loaded: LoadedProfile, trace: Trace, **options: Any) -> Deployment:
    """As ``profiles.deployment.resolve``; but where only the KV blocks are unknown, the trace may tell them.

    A base without hardware then starts with as many as all requests together would take, for ``infer_blocks`` to
    replace.

    Raises
    ------
    InputError
        If something else is missing, or the trace does not tell the blocks either.
    """
    try:
        return resolve(loaded, facts_of(trace), **options)
    except UnknownBlocks as error:
        total = trace.column("prompt_tokens") + trace.column("output_tokens")
        enough = min(int(np.nansum(np.ceil(total / 16) + 1)) + 2, MOST_BLOCKS)
        settings = (*options.pop("settings", ()), f"engine.num_gpu_blocks={enough}")
        deployment = resolve(loaded, facts_of(trace), settings=settings, **options)
        deployment = replace(deployment, assumed={**deployment.assumed, "num_gpu_blocks": enough})
        _, finding = infer_blocks(trace, deployment, None)
        if finding.source == "assumed":
            raise InputError(f"{error}; {finding.sentence.partition(': ')[2]}") from None
        return deployment


def infer_blocks(trace: Trace, deployment: Deployment, known: Rows | None) -> tuple[Deployment, Finding]:
    """Tell ``num_gpu_blocks`` where nobody says it.

    In order: what is stated; recorded iterations; the KV-use time series; memory arithmetic, within what the run
    demonstrably held and kept waiting.
    """
    config = deployment.config
    use = KVUse(trace, config, known)
    recorded = blocks_of_recording(trace, config) if known is None else None
    series = blocks_of_series(trace, use)
    if "num_gpu_blocks" not in deployment.assumed:
        return deployment, _stated_blocks(trace, config, recorded, series)
    arithmetic = deployment.model is not None and deployment.hardware is not None
    before = f"; memory arithmetic said {config.num_gpu_blocks:,}" if arithmetic else ""
    interval = None
    if recorded is not None:
        value, source = recorded, "recorded iterations"
        sentence = f"{value:,} from the free blocks of the recorded iterations{before}"
    elif isinstance(series, Blocks):
        value, source, interval = series.value, "KV-use time series", (series.low, series.high)
        limits = f"{series.low:,} to {series.high:,}"
        sentence = f"{value:,} ({limits}) from the KV-use time series, {series.samples} samples{before}"
        if config.enable_prefix_caching and not trace.has("block_hashes"):
            sentence += "; prompt contents are unknown: if prompts share prefixes it is fewer"
    else:
        value, source, sentence = _bounded(config.num_gpu_blocks, plateau(use, config), arithmetic)
        sentence += f"; {series}"
    finding = Finding("num_gpu_blocks", value, source, f"num_gpu_blocks: {sentence}", trace.name, interval)
    return replace(deployment, config=replace(config, num_gpu_blocks=value)), finding


def _stated_blocks(trace: Trace, config: EngineConfig, recorded: int | None, series: Blocks | str) -> Finding:
    stated = config.num_gpu_blocks
    told = Blocks(recorded, recorded, recorded, 0) if recorded is not None else series
    sentence, doubt = f"{stated:,}, as stated", False
    if isinstance(told, Blocks) and not told.low <= stated <= told.high:
        doubt = abs(told.value / stated - 1) > DIFFERENT
        if doubt:
            where = "recorded iterations say" if recorded is not None else "KV-use time series says"
            sentence += f", but the {where} {told.value:,} ({told.low:,} to {told.high:,})"
    interval = (told.low, told.high) if isinstance(told, Blocks) else None
    return Finding("num_gpu_blocks", stated, "stated", f"num_gpu_blocks: {sentence}", trace.name, interval, doubt)


def _bounded(estimate: int, bounds: Plateau | None, arithmetic: bool) -> tuple[int, str, str]:
    """Value, source and sentence: the estimate, unless the run held more or kept requests waiting with less."""
    said = f"{estimate:,} by memory arithmetic" if arithmetic else "not stated"
    source = "memory arithmetic" if arithmetic else "assumed"
    if bounds is None:
        return estimate, source, said
    least, most = bounds.least, bounds.most
    if most is not None and most < least:
        most = None  # what was waited for was something else
    if most is not None and (estimate > most * (1 + UNCERTAIN) or estimate < least * (1 - UNCERTAIN)):
        held = (
            f"about {least:,} (at most {most:,}) from the stamps: that many blocks were held at once, and requests "
            "waited although fewer than max_num_seqs ran and no prompt was being computed"
        )
        return least, "stamps", held + (f"; memory arithmetic said {estimate:,}" if arithmetic else "")
    if arithmetic and least > estimate * (1 + UNCERTAIN):
        if not bounds.certain:
            said += (
                f", although the stamps show {least:,} held at once; either requests were preempted, which the trace "
                "does not tell, or there were more: give --set engine.num_gpu_blocks=..."
            )
            return estimate, source, said
        return least, "stamps", f"at least {least:,}, held at once by the stamps; memory arithmetic said {estimate:,}"
    if arithmetic:
        said += f"; at most {least:,} were held at once, so this run does not tell it"
    return estimate, source, said


def infer_scheduling(
    trace: Trace, deployment: Deployment, known: Rows | None, schedule: Reconstruct
) -> tuple[Deployment, Finding | None]:
    """Tell whether the engine scheduled asynchronously: one step ahead of the device.

    A request that a synchronous engine schedules when an iteration ends is in the next one; an asynchronous engine has
    handed that out already. Recorded iterations say it outright. Otherwise, on numbered iterations, the scheduler is
    called when the stamps say it was, once for each way, and first tokens must come where they came.

    Parameters
    ----------
    schedule : callable
        Gives the run's reconstruction under a configuration, and an iteration's seconds by it.

    Raises
    ------
    NotRecoverable
        If the schedule cannot be reconstructed.
    """
    config = deployment.config
    stated = "async_scheduling" not in deployment.assumed
    if trace.iterations is not None and known is None:
        ahead = _scheduled_ahead(trace)
        if ahead is None:
            return deployment, None
        share, count = ahead
        clear = count >= FEWEST_REQUESTS and max(share, 1 - share) >= CLEAR
        told = share > 0.5
        evidence = f"{share:.0%} of {count:,} recorded iterations were scheduled while the one before still ran"
        return _judged(trace, deployment, told if clear else None, evidence, stated)
    told_now, evidence = _told_by_stamps(trace, config, known, schedule)
    if told_now is None and not stated:
        # Numbered on the wrong assumption, iterations may tell nothing.
        other = replace(config, async_scheduling=not config.async_scheduling)
        try:
            told_now, again = _told_by_stamps(trace, other, known, schedule)
            evidence = again if told_now is not None else evidence
        except NotRecoverable:
            pass
    return _judged(trace, deployment, told_now, evidence, stated)


def _told_by_stamps(
    trace: Trace, config: EngineConfig, known: Rows | None, schedule: Reconstruct
) -> tuple[bool | None, str]:
    """Whether scheduling was asynchronous (None: not clear), and the counts that say so."""
    found, step_seconds = schedule(config)
    ways = {
        way: first_tokens_in_place(trace, replace(config, async_scheduling=way), found, step_seconds, known)
        for way in (True, False)
    }
    right = {way: int(np.count_nonzero(there)) for way, there in ways.items()}
    alone = {way: int(np.count_nonzero(there & ~ways[not way])) for way, there in ways.items()}
    count, decisive = ways[True].size, sum(alone.values())
    told = alone[True] > alone[False]
    clear = decisive >= FEWEST_REQUESTS and alone[told] >= CLEAR * decisive and right[told] >= count / 2
    return told if clear else None, (
        f"asynchronous scheduling puts {right[True]} of {count} first tokens into the iteration that the stamps say, "
        f"synchronous {right[False]}"
    )


def _judged(
    trace: Trace, deployment: Deployment, told: bool | None, evidence: str, stated: bool
) -> tuple[Deployment, Finding | None]:
    config = deployment.config
    now = config.async_scheduling
    words = {True: "on", False: "off"}
    version = ".".join(map(str, config.version))
    if told is None:
        source = "stated" if stated else "assumed"
        origin = "as stated" if stated else f"the default of vLLM {version}"
        sentence = f"{words[now]}, {origin}; the run does not tell it clearly ({evidence})"
        return deployment, Finding("async_scheduling", now, source, f"async_scheduling: {sentence}", trace.name)
    if stated:
        sentence = f"{words[now]}, as stated"
        if told != now:
            sentence += f", but the run says {words[told]}: {evidence}"
        return deployment, Finding(
            "async_scheduling", now, "stated", f"async_scheduling: {sentence}", trace.name, doubt=told != now
        )
    sentence = f"{words[told]}: {evidence}"
    if told != now:
        sentence += f"; the default of vLLM {version} is {words[now]}"
    finding = Finding("async_scheduling", told, "stamps", f"async_scheduling: {sentence}", trace.name)
    return replace(deployment, config=replace(config, async_scheduling=told)), finding


def _scheduled_ahead(trace: Trace) -> tuple[float, int] | None:
    """Share of recorded iterations scheduled before the one before had ended, of those that followed at once."""
    assert trace.iterations is not None
    start, duration, scheduled = (
        trace.iterations.column(name).to_numpy() for name in ("start", "duration", "scheduled_at")
    )
    end = start + duration
    at_once = (start[1:] - end[:-1] < 0.5 * duration[1:]) & ~np.isnan(scheduled[1:])
    if not at_once.any():
        return None
    ahead = scheduled[1:] < end[:-1] - 0.1 * duration[:-1]
    return float(ahead[at_once].mean()), int(at_once.sum())


def warm_up_requests(arrival: Floats, measured: Floats, predicted: Floats) -> npt.NDArray[np.intp]:
    """Rows of the first requests that took far longer than predicted, in order of arrival.

    A request is anomalous if the excess of any latency, as a share of what was measured, lies ``ODD`` robust deviations
    above that of the later half of the run, and is at least ``ODD_SHARE``. The warm-up is the anomalous prefix of the
    run; it ends with the first request that was measured and is not.

    Parameters
    ----------
    arrival : array, shape (n,)
    measured, predicted : array, shape (latencies, n)
        Seconds; NaN where unknown.
    """
    order = np.argsort(arrival, kind="stable")
    excess = (1 - predicted / np.where(measured > 0, measured, np.nan))[:, order]
    later = excess[:, order.size // 2 :]
    odd = np.zeros(order.size, dtype=bool)
    for mine, usual in zip(excess, later, strict=True):
        seen = usual[~np.isnan(usual)]
        if seen.size < FEWEST_OTHERS:
            continue
        middle = float(np.median(seen))
        deviation = scatter(seen - middle)
        odd |= np.nan_to_num(mine - middle) > max(ODD * deviation, ODD_SHARE)
    usual_ones = np.flatnonzero(~odd & ~np.isnan(excess).all(axis=0))
    length = int(usual_ones[0]) if usual_ones.size else 0
    first = order[: min(length, order.size // 4)]
    return first[odd[: first.size]]


def warm_up_finding(trace: Trace, rows: Sequence[int]) -> Finding:
    """Name the requests of a warm-up that went on after the first one."""
    ids = [trace.ids[row] for row in rows]
    shown = ", ".join(ids[:5]) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
    sentence = (
        f"warm_up: besides the first request, {len(ids)} that followed took far longer than the fit predicts "
        f"({shown}), as while kernels are compiled or loaded; their latencies were not fitted"
    )
    return Finding("warm_up", ids, "latencies", sentence, trace.name)
