"""Where an error comes from: step time, scheduling, queueing, front end, data.

From the measured latencies to the predicted ones in steps that change one thing each. A statistic's error is the sum of
its changes from one step to the next, so parts sum exactly; what a change does depends on those made before it, and the
order is this:

====================  =============================================================================  ===========
version of the run    what is new in it                                                              part
====================  =============================================================================  ===========
measured              the latencies as they are compared
from the arrival      counted from the arrival (only where the anchor was the queue stamp)           front_end
cleaned               arrivals and lengths that the engine's own schedule contradicts put right      data
smoothed              measured schedule, steps by the corrected model: no noise of single steps      unexplained
same concurrency      simulated scheduler; requests leave the queue at the measured concurrency      scheduling
same step times       simulated limits (KV blocks, max_num_seqs) decide who leaves the queue         queueing
clean prediction      predicted step times                                                           step_time
without front end     arrivals reach the engine at once                                              front_end
predicted             arrivals and lengths as recorded, cold start as asked for                      data
====================  =============================================================================  ===========

The corrected model (``calibrate.step_times``) gives the measured durations on the measured schedule, so that a queue
that grows because steps are slow counts as step time, not as queueing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from calibrate.capacity import arrival_rate, capacity
from calibrate.errors import PERCENTILES, Comparison
from calibrate.evidence_of_data import DataEvidence, data_evidence
from calibrate.inference import infer_blocks
from calibrate.kv_use import UNCERTAIN, KVUse, plateau
from calibrate.measured_schedule import MeasuredSchedule, calls_ahead, measured_schedule
from calibrate.reconstruction import NotRecoverable
from calibrate.step_times import CorrectedSteps, step_errors, stretched
from profiles.deployment import Deployment
from replay.cold_start import find_cold_start
from replay.quality import Finding
from replay.run import Replay, replayable
from replay.trace import Trace
from simulator.accelerators.base import AcceleratorModel
from simulator.batch import Batch
from simulator.engine import NS, Engine
from simulator.engine_config import EngineConfig
from simulator.errors import SimulationError

Floats = npt.NDArray[np.float64]

PARTS = ("step_time", "scheduling", "queueing", "front_end", "data", "unexplained")


@dataclass(frozen=True)
class Share:
    """One part's contribution to a signed relative error.

    ``points`` is a fraction of the measured statistic (0.04: 4 points); the parts of one statistic sum to its error.
    """

    part: str
    points: float
    sentence: str = ""


@dataclass(frozen=True)
class Attribution:
    """Errors split by cause.

    Parameters
    ----------
    method : {"recorded iterations", "reconstructed schedule", "none"}
        Where the imposed schedule comes from.
    why_not : str
        If there is none: the reason, and what to record.
    parts : mapping of str to mapping of str to tuple of Share
        By metric (``ttft``) and statistic (``mean``, ``p99``).
    load : mapping of str to float
        Utilisation and the distance to saturation; keys as in ``docs/report-json.md``.
    sentences : tuple of str
        The result in words, most important first.
    """

    method: str
    why_not: str
    parts: Mapping[str, Mapping[str, tuple[Share, ...]]]
    load: Mapping[str, float]
    sentences: tuple[str, ...]

    @property
    def reasons(self) -> dict[str, str]:
        """What is behind a part, where that is known."""
        shares = (share for found in self.parts.values() for some in found.values() for share in some)
        return {share.part: share.sentence for share in shares if share.sentence}


STATISTICS = (*PERCENTILES, "bias")
"""What is split: levels, and the mean signed error per request."""
METRICS = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "E2E"}
SHOWN = {"mean": "mean", "p99": "p99", "bias": "per request"}
"""Statistics of which sentences speak."""
PART_LABELS = {"step_time": "step time", "front_end": "front end"}
FREE = 10**9
"""Limit of a request that did not wait: however many run."""
WORTH_A_REPLAY = 0.002
"""Share of the TTFTs that the way to the engine must take for a replay of its own."""
WORTH_SAYING = 0.0005
"""Points (as a fraction) below which a part is not named."""
STRETCH = 0.01
"""By how much steps are stretched to see what that does to latencies."""
LITTLE = 0.02
"""Points of the largest part below which mean and p99 tell little."""
NEAR = 0.9
"""Utilisation from which a deployment counts as near saturation."""
ASKED = 0.003
"""Points of queueing from which the limits behind it are named."""
CLEAR, FEWEST = 0.8, 10
"""Share of the first tokens that must speak for one way of scheduling, and how many it takes."""
FEWEST_PAIRS = 20
"""Requests below which nothing is said of since when."""
BEFORE = 0.1
"""Share of a part that may lie before the time since when it is there."""


@dataclass(frozen=True)
class _Stamps:
    """When things happened to each row of the trace in one version of the run, and what they count from."""

    start: Floats
    first: Floats
    last: Floats
    output: Floats

    def latency(self, metric: str) -> Floats:
        if metric == "tpot":
            gaps = self.output - 1
            return np.where(gaps > 0, (self.last - self.first) / np.maximum(gaps, 1), np.nan)
        return (self.first if metric == "ttft" else self.last) - self.start


class _Replays:
    """Replays of one trace that differ in one thing each.

    Parameters
    ----------
    trace, deployment
    evidence : DataEvidence
    cold_start : (float, float)
        Seconds of the cold start in the prediction, and as the run had it.
    """

    def __init__(
        self, trace: Trace, deployment: Deployment, evidence: DataEvidence, cold_start: tuple[float, float]
    ) -> None:
        self.trace, self.deployment, self.clean = trace, deployment, evidence.cleaned
        self.cold_start = dict(zip((True, False), cold_start, strict=True))
        waits = float(np.nansum(trace.column("first_token") - trace.column("arrival")))
        worth = evidence.held_up.sum() > WORTH_A_REPLAY * waits
        self.held_up = evidence.held_up if worth else np.zeros(len(trace))

    def run(
        self,
        accelerator: AcceleratorModel,
        config: EngineConfig | None = None,
        *,
        recorded: bool = False,
        held_up: bool = True,
        most_unfinished: Floats | None = None,
    ) -> _Stamps:
        """Simulate; latencies count from the arrival at the front end.

        Parameters
        ----------
        accelerator, config
            The deployment's configuration if none is given.
        recorded : bool
            Arrivals, lengths and cold start as the prediction has them.
        held_up : bool
            Requests reach the engine as late as measured.
        most_unfinished : array (requests,), optional
            See ``Engine.run``.
        """
        trace = self.trace if recorded else self.clean
        config = config or self.deployment.config
        rows, requests = replayable(trace, config)
        if held_up and not recorded:
            late = self.held_up[rows].tolist()
            requests = [replace(one, arrival=one.arrival + by) for one, by in zip(requests, late, strict=True)]
        allowed = None if most_unfinished is None else [int(most_unfinished[row]) for row in rows]
        observe = None
        if isinstance(accelerator, CorrectedSteps):
            accelerator.restart()
            observe = accelerator.observe
        run = Engine(config, accelerator).run(
            requests, observe=observe, cold_start=self.cold_start[recorded], most_unfinished=allowed
        )
        stamps = np.full((2, len(trace)), np.nan)
        for row, one in zip(rows, run.served, strict=True):
            if one.first_token is not None and one.last_token is not None:
                stamps[:, row] = one.first_token / NS, one.last_token / NS
        return _Stamps(trace.column("arrival"), stamps[0], stamps[1], trace.column("output_tokens"))


@dataclass(frozen=True)
class _Chain:
    """Latencies of every pair in one version of the run after the other, and the part that each change belongs to."""

    parts: tuple[str, ...]
    values: Mapping[str, Sequence[Floats]]
    arrivals: Mapping[str, Floats]

    @classmethod
    def of(cls, comparison: Comparison, versions: Sequence[tuple[str, _Stamps]]) -> _Chain:
        """Put versions between the measured and the predicted latencies of a comparison."""
        mine, _ = comparison.rows
        values, arrivals = {}, {}
        for metric in METRICS:
            if metric in comparison.metrics:
                measured, predicted = comparison.pairs(metric)
                fine = ~(np.isnan(measured) | np.isnan(predicted))
                chain = [measured[fine]]
                for _, stamps in versions:
                    found = stamps.latency(metric)[mine][fine]
                    chain.append(np.where(np.isnan(found), chain[-1], found))
                values[metric] = [*chain, predicted[fine]]
                arrivals[metric] = comparison.measured.start[mine][fine]
        return cls((*(part for part, _ in versions), "data"), values, arrivals)

    def points(self, metric: str, statistic: str) -> dict[str, float]:
        """Contribution of each part to the relative error of a statistic."""
        values = self.values[metric]
        if statistic == "bias":
            some = values[0] > 0
            levels = [float((one[some] / values[0][some]).mean()) if some.any() else np.nan for one in values]
        else:
            levels = [_level(one, statistic) for one in values]
        found = dict.fromkeys(PARTS, 0.0)
        for part, (before, after) in zip(self.parts, pairwise(levels), strict=True):
            found[part] += (after - before) / levels[0] if levels[0] > 0 else np.nan
        return found

    def each(self, metric: str, part: str) -> Floats:
        """Seconds that a part adds to the metric of each pair, in order of arrival."""
        chain = self.values[metric]
        changes = [after - before for before, after in pairwise(chain)]
        own = [change for one, change in zip(self.parts, changes, strict=True) if one == part]
        return np.asarray(sum(own, np.zeros_like(chain[0])))


def attribute(
    measured: Trace,
    deployment: Deployment,
    replayed: Replay,
    comparison: Comparison,
    findings: Sequence[Finding] = (),
) -> Attribution:
    """Split the errors of a comparison by cause, with three to six further replays.

    Parameters
    ----------
    measured : Trace
    deployment : Deployment
        Of the prediction.
    replayed : Replay
        The prediction.
    comparison : Comparison
        Of the two.
    findings : sequence of Finding
        What is known of the data's quality.
    """
    computed = measured.column("prompt_tokens") - np.nan_to_num(replayed.predicted.column("cached_tokens"))
    try:
        schedule = measured_schedule(measured, deployment, computed)
    except NotRecoverable as error:
        return _without_schedule(measured, deployment, replayed, comparison, str(error))
    try:
        return _Attributed(measured, deployment, replayed, comparison, schedule, computed, findings).result()
    except SimulationError as error:
        why_not = f"a replay of the run as it was measured fails: {error}"
        return _without_schedule(measured, deployment, replayed, comparison, why_not)


class _Attributed:
    """The work of ``attribute`` where there is a schedule."""

    def __init__(
        self,
        measured: Trace,
        deployment: Deployment,
        replayed: Replay,
        comparison: Comparison,
        schedule: MeasuredSchedule,
        computed: Floats,
        findings: Sequence[Finding],
    ) -> None:
        self.measured, self.deployment, self.replayed, self.comparison = measured, deployment, replayed, comparison
        self.schedule, self.computed, self.findings = schedule, computed, findings
        self.evidence = data_evidence(measured, schedule)
        self.steps = step_errors(deployment.accelerator, schedule)
        self.cold_start = self._cold_start()
        self.replays = _Replays(measured, deployment, self.evidence, self.cold_start)
        self.limits, self.limit_sentence = self._measured_limits()

    def result(self) -> Attribution:
        chain = _Chain.of(self.comparison, self._versions())
        why = self._reasons(chain)
        parts = {
            metric: {
                statistic: tuple(
                    Share(part, points, why.get(part, "")) for part, points in chain.points(metric, statistic).items()
                )
                for statistic in STATISTICS
            }
            for metric in chain.values
        }
        load = self._load()
        sentences = [*self._data_sentences(), *_metric_sentences(chain)]
        sentences += [sentence for part, sentence in why.items() if part != "data" and sentence]
        sentences += _load_sentences(load) + self._doubts()
        return Attribution(self.schedule.source, "", parts, load, tuple(sentences))

    def _cold_start(self) -> tuple[float, float]:
        """Seconds of cold start in the prediction, and as the run had it."""
        imposed = self.replayed.predicted.meta.get("cold_start")
        if imposed:
            return float(imposed["seconds"]), float(imposed["seconds"])
        if self.measured.meta.get("warmed_up"):
            return 0.0, 0.0
        _, requests = replayable(self.measured, self.deployment.config)
        found = find_cold_start(self.measured, requests, self.deployment.engine().run)
        return 0.0, found.seconds if found else 0.0

    def _measured_limits(self) -> tuple[EngineConfig, str]:
        """The configuration with KV blocks and ``max_num_seqs`` that the run demonstrably had."""
        config = self.deployment.config
        asked = replace(self.deployment, assumed={**self.deployment.assumed, "num_gpu_blocks": config.num_gpu_blocks})
        told, finding = infer_blocks(self.evidence.cleaned, asked, None)
        blocks, source = told.config.num_gpu_blocks, finding.source
        held = plateau(KVUse(self.evidence.cleaned, config), config)
        if held is not None and held.least > blocks * (1 + UNCERTAIN) and finding.interval is None:
            # Less certain where preemptions are not told; but requests leave the queue as measured anyhow.
            blocks, source = held.least, "held at once, by the stamps"
        most = _most_at_once(self.measured)
        sentences = []
        if blocks != config.num_gpu_blocks:
            sentences.append(
                f"the prediction has {config.num_gpu_blocks:,} KV blocks, the run tells {blocks:,} ({source})"
            )
        if most > config.max_num_seqs:
            sentences.append(f"the prediction runs at most {config.max_num_seqs} requests at once, {most} ran")
        limits = replace(config, num_gpu_blocks=blocks, max_num_seqs=max(config.max_num_seqs, most))
        return limits, "; ".join(sentences)

    def _versions(self) -> list[tuple[str, _Stamps]]:
        """Versions of the run between the measured and the predicted one, each with the part of what is new in it."""
        trace, clean, device = self.measured, self.evidence.cleaned, self.deployment.accelerator
        first, last = trace.column("first_token"), trace.column("last_token")
        corrected = CorrectedSteps(device, self.schedule)
        moved = stretched(self.schedule, corrected.on_schedule)
        recorded = _Stamps(trace.column("arrival"), first, last, trace.column("output_tokens"))
        cleaned = _Stamps(clean.column("arrival"), first, last, clean.column("output_tokens"))
        smooth = replace(cleaned, first=moved(first), last=moved(last))
        run = self.replays.run
        versions = [("front_end", recorded), ("data", cleaned), ("unexplained", smooth)]
        versions.append(("scheduling", run(corrected, self.limits, most_unfinished=self._most_unfinished())))
        versions.append(("queueing", run(corrected)))
        delayed = bool(self.replays.held_up.any())
        if self.evidence.wrong or delayed or self.cold_start[0] != self.cold_start[1]:
            versions.append(("step_time", run(device)))
        if delayed:
            versions.append(("front_end", run(device, held_up=False)))
        if len(versions) == 5:
            # Nothing was wrong with the data: the clean prediction is the prediction.
            theirs = self.replayed.predicted
            stamps = (theirs.column(name) for name in ("arrival", "first_token", "last_token", "output_tokens"))
            versions.append(("step_time", _Stamps(*stamps)))
        return versions

    def _most_unfinished(self) -> Floats | None:
        """Requests that still ran when each one left the queue; ``FREE`` for those that did not wait.

        None under the priority policy, where who comes later may be served earlier.
        """
        if self.deployment.config.scheduling_policy != "fcfs":
            return None
        trace, ends = self.measured, self.schedule.end
        scheduled, last = trace.column("scheduled"), np.sort(np.nan_to_num(trace.column("last_token"), nan=np.inf))
        start = np.fmin(np.fmax(trace.column("queued"), self.evidence.cleaned.column("arrival")), scheduled)
        # The call that takes a request in follows the end of an iteration; it waited if another call came before.
        near = 0.3 * self.schedule.typical
        looks = np.searchsorted(ends, scheduled - near) - np.searchsorted(ends, start + near)
        order = np.argsort(np.nan_to_num(scheduled, nan=np.inf), kind="stable")
        before = np.empty(len(trace))
        before[order] = np.arange(len(trace))
        running = before - np.searchsorted(last, scheduled + 1e-6, side="right")
        return np.where((looks >= 1) & ~np.isnan(scheduled), np.maximum(running, 0), FREE)

    def _data_sentences(self) -> list[str]:
        """What was wrong with the data, before anything is made of them."""
        sentences = list(self.evidence.sentences)
        imposed, there = self.cold_start
        if imposed != there:
            sentences.append(f"the run's cold start of {there:.2f} s is not imposed on the prediction")
        return sentences

    def _doubts(self) -> list[str]:
        """What the quality checks doubt, where the schedule itself shows nothing wrong."""
        doubted = [one.check for one in self.findings if one.severity != "info"]
        if not doubted or self.evidence.wrong:
            return []
        return [f"the data's quality is doubted ({', '.join(sorted(set(doubted)))}): any part may come from that"]

    def _reasons(self, chain: _Chain) -> dict[str, str]:
        """By part, what is behind it."""
        sizes = (abs(chain.points(metric, name)["queueing"]) for metric in chain.values for name in PERCENTILES)
        queueing = max(sizes, default=0.0)
        reasons = {
            "data": "; ".join(self._data_sentences()),
            "step_time": self.steps.sentence,
            "scheduling": self._scheduling_reason(),
        }
        if self.limit_sentence and queueing > ASKED:
            reasons["queueing"] = self.limit_sentence
        if self.replays.held_up.any():
            usual = self.replays.held_up[self.replays.held_up > 0]
            reasons["front_end"] = (
                f"{usual.size} requests reached the engine later than the iteration in flight explains, by "
                f"{1e3 * float(np.median(usual)):.0f} ms (median): the front end held them up"
            )
        elif self.comparison.anchor == "queued":
            reasons["front_end"] = (
                "measured from the queue stamp, which leaves out the wait for the iteration in flight; predicted "
                "latencies count from the arrival"
            )
        return reasons

    def _scheduling_reason(self) -> str:
        """Whether the run scheduled asynchronously, where that is not what was predicted."""
        config = self.deployment.config
        ahead, at_once = calls_ahead(self.measured, self.schedule, self.computed, config.token_budget)
        told = ahead > at_once
        if (
            told == config.async_scheduling
            or max(ahead, at_once) < CLEAR * (ahead + at_once)
            or ahead + at_once < FEWEST
        ):
            return ""
        words = {True: "on", False: "off"}
        way = "two iterations after" if told else "in the iteration after"
        return (
            f"async_scheduling is {words[not told]} in the prediction and was {words[told]} in the run: "
            f"{max(ahead, at_once)} of {ahead + at_once} first tokens came {way} the schedule call of their prompt"
        )

    def _load(self) -> dict[str, float]:
        trace, cached = self.evidence.cleaned, self.replayed.predicted.column("cached_tokens")
        load = {
            "busy_measured": self.schedule.busy,
            "busy_predicted": float(self.replayed.summary["device_busy"]),
            **_rates(trace, self.deployment, cached),
        }
        slower = self.replays.run(_Stretched(self.deployment.accelerator, 1 + STRETCH), recorded=True)
        mine, _ = self.comparison.rows
        for metric in METRICS:
            if metric in self.comparison.metrics:
                before = self.comparison.pairs(metric)[1]
                after = slower.latency(metric)[mine]
                fine = ~(np.isnan(before) | np.isnan(after))
                for statistic in PERCENTILES if fine.any() else ():
                    level = _level(before[fine], statistic)
                    change = _level(after[fine], statistic) / level - 1 if level > 0 else np.nan
                    load[f"sensitivity.{metric}.{statistic}"] = change / STRETCH
        return load


class _Stretched:
    """An accelerator model that takes longer by a factor."""

    def __init__(self, accelerator: AcceleratorModel, factor: float) -> None:
        self.components = tuple(accelerator.components)
        self._accelerator, self._factor = accelerator, factor

    def step(self, batch: Batch) -> Sequence[float]:
        """Return seconds per component."""
        return [self._factor * one for one in self._accelerator.step(batch)]


def _rates(trace: Trace, deployment: Deployment, cached: Floats) -> dict[str, float]:
    """Arrival rate, what the predicted engine sustains, and both as a ratio."""
    found = capacity(trace, deployment, cached)
    rate = arrival_rate(trace)
    if not found or not rate > 0:
        return found
    return {
        "arrival_rate": rate,
        **found,
        "utilisation": rate / found["capacity"],
        "headroom": found["capacity"] / rate,
    }


def _without_schedule(
    measured: Trace, deployment: Deployment, replayed: Replay, comparison: Comparison, why_not: str
) -> Attribution:
    """What can be told by stamps alone: the wait before a request was first scheduled."""
    parts: dict[str, dict[str, tuple[Share, ...]]] = {}
    waits = comparison.pairs("queue_time") if "queue_time" in comparison.metrics else None
    for metric in METRICS if waits is not None else ():
        if metric not in comparison.metrics:
            continue
        mine, theirs = comparison.pairs(metric)
        assert waits is not None
        waited = np.zeros_like(mine) if metric == "tpot" else waits[1] - waits[0]
        fine = ~(np.isnan(mine) | np.isnan(theirs) | np.isnan(waited))
        values = {metric: [mine[fine], (mine + waited)[fine], theirs[fine]]}
        chain = _Chain(("queueing", "unexplained"), values, {})
        parts[metric] = {
            name: tuple(Share(part, chain.points(metric, name)[part]) for part in ("queueing", "unexplained"))
            for name in STATISTICS
        }
    load = {"busy_predicted": float(replayed.summary["device_busy"])}
    if measured.batches is None:
        load |= _rates(measured, deployment, replayed.predicted.column("cached_tokens"))
    return Attribution("none", why_not, parts, load, tuple(_load_sentences(load)))


def _most_at_once(trace: Trace) -> int:
    """Requests that ran at once by their stamps; whoever ends at an instant makes room for who is scheduled at it."""
    begin, end = trace.column("scheduled"), trace.column("last_token")
    there = ~(np.isnan(begin) | np.isnan(end))
    times = np.concatenate([end[there], begin[there] + 1e-3])
    change = np.repeat([-1, 1], there.sum())[np.argsort(times, kind="stable")]
    return int(np.cumsum(change).max(initial=0))


def _level(values: Floats, statistic: str) -> float:
    if not values.size:
        return np.nan
    percentile = PERCENTILES[statistic]
    return float(values.mean() if percentile is None else np.percentile(values, percentile))


def _metric_sentences(chain: _Chain) -> list[str]:
    """One for each metric, for that of its statistics which has the largest part; the largest of all first."""
    ranked = []
    for metric, label in METRICS.items():
        if metric not in chain.values or not chain.values[metric][0].size:
            continue
        found = {name: chain.points(metric, name) for name in SHOWN}
        size = {name: max(map(abs, points.values())) for name, points in found.items()}
        # A short wait that is off by a step is off by a lot per request: that is told where levels tell little.
        names = ["mean", "p99"] if max(size["mean"], size["p99"]) >= LITTLE else list(found)
        name = max(names, key=lambda one: size[one])
        error = sum(found[name].values())
        largest = sorted(found[name].items(), key=lambda item: -abs(item[1]))
        arrivals = chain.arrivals[metric]
        shown = [
            f"{100 * points:+.1f} points {PART_LABELS.get(part, part)}{_since(chain.each(metric, part), arrivals)}"
            for part, points in largest
            if abs(points) >= max(WORTH_SAYING, BEFORE * abs(largest[0][1]))
        ]
        text = f"{label} {SHOWN[name]} {100 * error:+.1f} %: {', '.join(shown) or 'no part worth naming'}"
        ranked.append((max(abs(points) for points in found[name].values()), text))
    return [text for _, text in sorted(ranked, key=lambda item: -item[0])]


def _since(each: Floats, arrivals: Floats) -> str:
    """Since when a part is there, if it came with a change: the split of the arrivals with the clearest contrast.

    The cumulative sum of the deviations from the mean peaks at a change (Page 1954).
    """
    count = each.size
    if count < FEWEST_PAIRS or not each.sum():
        return ""
    share = np.cumsum(each) / each.sum()
    expected = np.arange(1, count + 1) / count
    place = int(np.argmax(expected - share)) + 1
    if not count // 10 <= place <= count - count // 10 or abs(share[place - 1]) > BEFORE:
        return ""
    seconds = float(arrivals[place - 1] - arrivals.min())
    return f" after minute {seconds / 60:.1f}" if seconds >= 120 else f" after {seconds:.0f} s"


def _load_sentences(load: Mapping[str, float]) -> list[str]:
    """How near saturation is, and what an error of the step time becomes there."""
    used = load.get("utilisation", np.nan)
    slope = load.get("sensitivity.ttft.mean", np.nan)
    becomes = f"a 1 % error of the step time becomes {slope:.1f} % of the mean TTFT" if np.isfinite(slope) else ""
    if used >= 1:
        text = (
            f"requests arrive {used:.2f} times as fast as the predicted engine serves them ({load['arrival_rate']:.2f} "
            f"against {load['capacity']:.2f} a second): the queue grows as long as they come"
        )
    elif used >= NEAR:
        text = f"at {100 * used:.0f} % of the predicted capacity ({load['capacity']:.2f} requests a second)"
    elif np.isfinite(used):
        text = (
            f"at {100 * used:.0f} % of the predicted capacity: the arrival rate may rise {load['headroom']:.2f}-fold "
            "before the queue grows without bound"
        )
    else:
        text = ""
    return ["; ".join(one for one in (text, becomes) if one)] if text or becomes else []
