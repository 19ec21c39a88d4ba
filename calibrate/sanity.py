"""What a trace cannot be, whatever the coefficients: fits are refused or warned of before anything is learned.

Refused is what contradicts itself or physics (a run in which nothing was served, stamps of clocks that are not one,
engine arguments that the run broke, tokens faster than the datasheet allows). Warned of is what only makes a fit less
sure, or the run another than was planned.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from calibrate.aggregates import run_seconds
from calibrate.kv_use import UNCERTAIN, KVUse
from profiles.deployment import Deployment
from profiles.errors import InputError
from replay.checks.arrivals import JITTER, LONGEST_WAY, MOST_AHEAD, MOST_LOOKS, drift, lateness, way_to_queue
from replay.checks.evidence import Evidence
from replay.checks.lengths import too_long
from replay.checks.outcomes import FEW
from replay.checks.prompts import FASTER, matrix_parameters
from replay.checks.stamps import shared_stamps
from replay.load_level import holds_aggregates
from replay.quality import doubts, examine
from replay.trace import REQUEST_CLOCK, Trace
from simulator.accelerators.roofline import Roofline
from simulator.batch import Batch
from simulator.errors import SimulationError

Floats = npt.NDArray[np.floating[Any]]

FAILED = 0.05
"""Share of failed requests from which their load is missed."""
MOST_BREAKS = 0.01
ALSO_DOUBTED = (
    *("duplicate_ids", "identical_rows", "truncated", "impossible_lengths", "output_lengths", "coarse_stamps"),
    *("shifted_arrivals", "littles_law", "work_conservation", "token_totals", "kv_use", "empty_first_chunk"),
)
"""Findings of ``replay.quality`` that say more than the refusals and warnings here."""


def refuse_nonsense(trace: Trace, deployment: Deployment) -> list[str]:
    """Return warnings about a trace that is to be fitted.

    Parameters
    ----------
    trace : Trace
    deployment : Deployment
        Its engine arguments; with model and hardware, datasheet bounds are checked too.

    Raises
    ------
    InputError
        If the trace cannot have come about as it says.
    """
    if trace.batches is not None:
        return []  # a batch has no stamps of its requests; ``calibrate.batch_equations`` knows what it cannot be
    if holds_aggregates(trace):
        return [f"{trace.name}: {line}" for line in _refuse_faster_than_datasheet(trace, deployment)]
    warnings = _refuse_few(trace)
    if trace.clock != REQUEST_CLOCK:
        warnings += _refuse_mixed_clocks(trace)
        _refuse_smeared_stamps(trace)
        warnings += _late_client(trace)
    _refuse_odd_iterations(trace, deployment)
    warnings += _refuse_broken_arguments(trace, deployment)
    warnings += _refuse_faster_than_datasheet(trace, deployment)
    warnings += [one.sentence for one in doubts(examine(trace)) if one.check in ALSO_DOUBTED]
    return [f"{trace.name}: {line}" for line in warnings]


def _refuse_few(trace: Trace) -> list[str]:
    statuses = trace.statuses
    served, failed = int(np.count_nonzero(statuses == "ok")), int(np.count_nonzero(statuses == "failed"))
    if not served:
        errors = [one for one in trace.requests.column("error").to_pylist() if one]
        first = f"; the first error: {errors[0].splitlines()[-1][:200]}" if errors else ""
        kinds = ", ".join(f"{np.count_nonzero(statuses == one)} {one}" for one in sorted(set(statuses.tolist())))
        raise InputError(f"{trace.name}: no request was served to its end ({kinds}): there is nothing to fit{first}")
    if served < 2:
        raise InputError(
            f"{trace.name}: one request was served; a fit takes many (a hundred or more, at the rate that matters)"
        )
    warnings = []
    if served < FEW:
        warnings.append(f"only {served} requests were served: coefficients are hardly told")
    if failed > FAILED * len(trace):
        warnings.append(
            f"{failed} of {len(trace)} requests failed and are left out; how long they loaded the engine is unknown"
        )
    return warnings


def _refuse_mixed_clocks(trace: Trace) -> list[str]:
    """Stamps of arrivals (front end or client) and of the engine must be of one clock."""
    way = way_to_queue(trace)
    if way is None:
        return []
    lag, there = way.lag, way.there
    advice = "bring them onto one clock (vLLM stamps arrivals on the wall clock, everything else monotonically)"
    early = np.where(there, -lag, -np.inf)
    worst = int(np.argmax(early))
    if early[worst] > MOST_AHEAD:
        raise InputError(
            f"{trace.name}: {np.count_nonzero(early > JITTER)} requests were queued before they arrived, request "
            f"{trace.ids[worst]!r} by {early[worst]:.3f} s: arrivals and engine stamps are of two clocks; {advice}"
        )
    least = float(np.nanmin(lag))
    if least > LONGEST_WAY:
        raise InputError(
            f"{trace.name}: every request was queued {least:.3f} s or more after it arrived: arrivals and engine "
            f"stamps are of two clocks; {advice}"
        )
    if way.mixed:
        one = int(np.argmax(way.looks))
        raise InputError(
            f"{trace.name}: {int(way.passed_over.sum())} requests were queued after more than {MOST_LOOKS} iterations "
            f"had ended since their arrival, request {trace.ids[one]!r} {lag[one]:.3f} s after it; an engine takes "
            f"arrivals in after every iteration, so clocks are mixed, or the front end was saturated; {advice}"
        )
    warnings = []
    if early[worst] > JITTER:
        warnings.append(
            f"requests were queued up to {1e3 * early[worst]:.1f} ms before they arrived: clocks are not exact"
        )
    moved = drift(trace, way)
    if moved:
        warnings.append(
            f"the shortest way from arrival to queue moved by {1e3 * moved:.1f} ms over the run: its two clocks "
            "drift apart, or the front end fell behind"
        )
    return warnings


def _refuse_smeared_stamps(trace: Trace) -> None:
    """Tokens of one iteration carry one stamp."""
    shared = shared_stamps(trace) if trace.iterations is None else None
    if shared is not None and shared.smeared:
        raise InputError(
            f"{trace.name}: {shared.pairs} pairs of first and last tokens carry the same stamp, about "
            f"{shared.expected:.0f} should: the stamps are not the engine's, once an iteration, or they are of several "
            "clocks"
        )


def _late_client(trace: Trace) -> list[str]:
    """An open loop sends as planned; one that falls behind more and more was too slow for its rate."""
    behind = lateness(trace)
    if behind is None:
        return []
    seconds, span = behind
    return [
        f"the client fell behind its plan: the last tenth of the requests were sent {seconds:.1f} s later than "
        f"planned (over {span:.0f} s): it was saturated, or its concurrency limited; the load was lower than the "
        "nominal one, and fits hold for the arrivals as measured"
    ]


def _refuse_odd_iterations(trace: Trace, deployment: Deployment) -> None:
    if trace.iterations is None:
        return
    config = deployment.config
    start, duration = (trace.iterations.column(name).to_numpy() for name in ("start", "duration"))
    for bad, why in (
        (~(duration > 0), "lasts no time"),
        (np.diff(start, prepend=start[:1]) < 0, "begins before the one before it"),
    ):
        if bad.any():
            raise InputError(f"{trace.name}: recorded iteration {int(np.argmax(bad)) + 1} {why}: clocks are mixed")
    counts = [(len(one), sum(one)) for one in trace.iterations.column("scheduled").to_pylist() if one is not None]
    sequences, tokens = (max(column, default=0) for column in (zip(*counts, strict=True) if counts else ((), ())))
    for name, most, allowed in (
        ("max_num_seqs", sequences, config.max_num_seqs),
        ("max_num_batched_tokens", tokens, config.token_budget),
    ):
        if most > allowed:
            unit = "requests" if name == "max_num_seqs" else "tokens"
            raise InputError(
                f"{trace.name}: a recorded iteration holds {most:,} {unit}, engine.{name} is {allowed:,}: that is not "
                "the run's argument"
            )


def _refuse_broken_arguments(trace: Trace, deployment: Deployment) -> list[str]:
    """What the run did must be possible by the engine arguments."""
    most = deployment.config.max_model_len
    for rows, counted, what in too_long(Evidence(trace), most):
        row = int(np.argmax(np.where(rows, counted, 0)))
        raise InputError(
            f"{trace.name}: {int(rows.sum())} requests were served that max_model_len={most:,} does not allow, request "
            f"{trace.ids[row]!r} with {what.format(counted[row])}: that is not the run's argument"
        )
    return _refuse_too_many_at_once(trace, deployment)


def _refuse_too_many_at_once(trace: Trace, deployment: Deployment) -> list[str]:
    config = deployment.config
    if trace.timeline is not None:
        gauge = np.nan_to_num(trace.timeline.column("running").to_numpy())
        if gauge.size and gauge.max() > config.max_num_seqs:
            raise InputError(
                f"{trace.name}: its gauge says that {gauge.max():.0f} requests ran at once, engine.max_num_seqs is "
                f"{config.max_num_seqs}: that is not the run's argument"
            )
    use = KVUse(trace, config)
    begin, end = use.scheduled[use.usable], use.last[use.usable]
    if not begin.size:
        return []
    # Whoever ends at an instant makes room for who is scheduled at it.
    order = np.argsort(np.concatenate([end, begin + JITTER]), kind="stable")
    change = np.concatenate([-np.ones(end.size), np.ones(begin.size)])[order]
    most = int(np.cumsum(change).max())
    evicted = bool(use.preempted.any()) or not use.preemptions_told
    peak = np.sort(np.concatenate([end, begin + JITTER]))[int(np.argmax(np.cumsum(change)))]
    held = use.at(np.array([peak]))
    full = bool(held.blocks[0] > 0.9 * config.num_gpu_blocks)
    if most > config.max_num_seqs:
        line = (
            f"{most} requests ran at once by their stamps, engine.max_num_seqs is {config.max_num_seqs}: that is not "
            "the run's argument, or the stamps are of several clocks"
        )
        if not (evicted and full):
            raise InputError(f"{trace.name}: {line}")
        return [f"{line}, unless so many were preempted"]
    if "num_gpu_blocks" in deployment.assumed:
        return []
    times = np.unique(use.last[use.usable]) - 1e-6
    some = use.at(times[np.linspace(0, times.size - 1, min(times.size, 200)).astype(int)])
    most_held = int(some.steady.max(initial=0))
    if most_held > (config.num_gpu_blocks - 1) * (1 + UNCERTAIN) + 1:
        line = (
            f"its requests held {most_held:,} KV blocks at once by their stamps, engine.num_gpu_blocks is "
            f"{config.num_gpu_blocks:,}: that is not the run's argument"
        )
        shared = config.enable_prefix_caching and not trace.has("block_hashes")
        if use.preemptions_told and not shared:
            raise InputError(f"{trace.name}: {line}")
        unless = {"requests were preempted": not use.preemptions_told, "prompts share prefixes": shared}
        why = " or ".join(one for one, possible in unless.items() if possible)
        return [f"{line}, unless {why}, which the trace does not tell"]
    return []


def _refuse_faster_than_datasheet(trace: Trace, deployment: Deployment) -> list[str]:
    """No iteration is shorter than reading the weights once, nor than its arithmetic at peak rate."""
    model, hardware, config = deployment.model, deployment.hardware, deployment.config
    if model is None or hardware is None:
        return []
    degree = config.tensor_parallel_size
    try:
        roofline = Roofline(model, hardware, tensor_parallel_size=degree, kv_cache_dtype=config.kv_cache_dtype)
    except SimulationError:
        return []
    place = {name: number for number, name in enumerate(roofline.components)}
    reads = [place[name] for name in ("weight_traffic", "decode_attention", "output_head")]
    whose = (
        f"{model.name} on {degree} x {hardware.name}: model, quantization, hardware or tensor_parallel_size is not the "
        "run's"
    )
    prompt, output = trace.column("prompt_tokens"), trace.column("output_tokens")
    if holds_aggregates(trace):
        least = sum(roofline.step(Batch([], [int(np.nanmean(prompt))]))[number] for number in reads)
        mean = trace.meta["aggregates"].get("tpot", {}).get("mean", np.inf)
        if mean < FASTER * least:
            raise InputError(
                f"{trace.name}: a token took {1e3 * mean:.3f} ms on average, reading the weights takes "
                f"{1e3 * least:.3f} ms by the datasheet of {whose}, or it decodes speculatively"
            )
        return _refuse_too_much_arithmetic(trace, deployment, whose)
    first, last = trace.column("first_token"), trace.column("last_token")
    decoding = np.flatnonzero((trace.statuses == "ok") & (output > 1) & (last >= first))
    parts = [roofline.step(Batch([], [int(prompt[row])])) for row in decoding]
    shortest = np.array([sum(one[number] for number in reads) for one in parts])
    measured = (last - first)[decoding] / (output - 1)[decoding]
    warnings: list[str] = []
    if decoding.size:
        breaks = measured < FASTER * shortest
        row = int(np.argmin(measured / shortest))
        line = (
            f"{int(breaks.sum())} of {decoding.size} requests got tokens faster than the weights can be read, request "
            f"{trace.ids[decoding[row]]!r} one in {1e3 * measured[row]:.3f} ms, where reading takes "
            f"{1e3 * shortest[row]:.3f} ms by the datasheet of {whose}, or it decodes speculatively"
        )
        if np.median(measured / shortest) < FASTER:
            raise InputError(f"{trace.name}: {line}")
        if breaks.sum() > MOST_BREAKS * decoding.size:
            warnings.append(line)
    return warnings + _refuse_too_much_arithmetic(trace, deployment, whose)


def _refuse_too_much_arithmetic(trace: Trace, deployment: Deployment, whose: str) -> list[str]:
    """All matrix products of the run at the peak rate must fit into the time that it took."""
    model, hardware, config = deployment.model, deployment.hardware, deployment.config
    assert model is not None
    assert hardware is not None
    served = np.flatnonzero(trace.statuses == "ok")
    seconds = _served_for(trace, served)
    if seconds is None:
        return []
    prompt, output = trace.column("prompt_tokens")[served], trace.column("output_tokens")[served]
    cached = trace.column("cached_tokens")[served]
    told = not config.enable_prefix_caching or not np.isnan(cached).any() or trace.has("block_hashes")
    if config.enable_prefix_caching and np.isnan(cached).any():
        use = KVUse(trace, config)
        shared = [use.shared[row].size if row in use.shared else 0 for row in served.tolist()]
        cached = config.block_size * np.array(shared)
    tokens = float(np.sum(np.maximum(prompt - np.nan_to_num(cached), 1) + output - 1))
    fastest = max(hardware.flops(one) for one in (model.weight_dtype, model.attention_weight_dtype))
    needed = 2.0 * matrix_parameters(model) * tokens / (fastest * config.tensor_parallel_size)
    if needed * FASTER <= seconds:
        return []
    line = (
        f"{tokens:,.0f} tokens were computed in {seconds:.3f} s, their arithmetic takes {needed:.3f} s at the peak "
        f"rate of {whose}"
    )
    if told:
        raise InputError(f"{trace.name}: {line}")
    return [f"{line}, or the prefix cache served the prompts, whose contents the trace does not tell"]


def _served_for(trace: Trace, served: npt.NDArray[np.intp]) -> float | None:
    """Seconds from the first request's start to the last token; None where nothing tells them."""
    if holds_aggregates(trace):
        return run_seconds(trace)
    if trace.clock == REQUEST_CLOCK:
        return None
    starts = np.fmin(trace.column("scheduled"), trace.column("first_token")) if trace.has("scheduled") else trace.start
    begin, end = float(np.nanmin(starts[served])), float(np.nanmax(trace.column("last_token")[served]))
    return end - begin if end > begin else None
