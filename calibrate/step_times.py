"""Measured step times against predicted ones on the same batches: what they differ by, and a model that does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calibrate.least_squares import robust, scatter
from calibrate.measured_schedule import MeasuredSchedule
from simulator.accelerators.base import AcceleratorModel
from simulator.batch import Batch
from simulator.engine import NS, Iteration

Floats = npt.NDArray[np.float64]

LEAST_BIAS = 0.003
"""Share of the measured step time below which nothing is said of a difference."""
CLEAR = 0.5
"""Share of the absolute residuals that one cause must take away to be named."""
AHEAD = 0.05
"""And by how much more than the next cause."""
CONSTANT = 0.02
"""Relative spread over steps below which a component counts as the same in every step."""
FEWEST_ALIKE, MOST_GROUPS = 8, 48
"""Spans that are taken together in search of a cause."""
WINDOW = 25
"""Iterations over which measured and corrected time are brought together."""
ROUNDS = 8


@dataclass(frozen=True)
class StepErrors:
    """Predicted step times on the measured batches.

    Parameters
    ----------
    bias : float
        Predicted over measured seconds of all steps, less 1.
    mean : float
        Mean seconds of a measured step.
    cause : str
        Likeliest cause: ``constant`` (the same in every step), a component of the accelerator model, ``everything`` (in
        proportion to the step), or empty if none is clear.
    size : float
        Of that cause: seconds a step, or the factor that the component lacks, less 1.
    explained : float
        Share of the absolute differences that the best candidate takes away.
    alternatives : tuple of str
        Causes that do about as well.
    """

    bias: float
    mean: float
    cause: str
    size: float
    explained: float
    alternatives: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """In words; empty if there is nothing to say."""
        if abs(self.bias) < LEAST_BIAS:
            return ""
        less = "longer" if self.bias < 0 else "shorter"
        text = f"steps take {1e3 * abs(self.bias) * self.mean:.2f} ms ({abs(self.bias):.1%}) {less} than predicted"
        text = text.replace("%", " %")
        if not self.cause:
            return text + "; no single cause fits (fit the profile anew to this trace)"
        if self.cause == "constant":
            text = f"steps take {1e3 * abs(self.size):.1f} ms {less} than predicted, the same at every batch size: host"
            others = [name for name in self.alternatives if name != "everything"]
            return f"{text} overhead" + (f" (or {', '.join(others)}, which hardly varies here)" if others else "")
        what = "the whole step" if self.cause == "everything" else self.cause
        return f"{text}, in proportion to {what}, which is predicted {1 / (1 + self.size):.2f} times what it takes"


class CorrectedSteps:
    """An accelerator model whose step times are, on the measured schedule, the measured ones.

    Decode-only time and what prompts add each have a factor, and every step a constant, fitted robustly to the measured
    spans; over ``WINDOW`` iterations the rest becomes a factor that holds at that time of the run.

    Parameters
    ----------
    accelerator : AcceleratorModel
    schedule : MeasuredSchedule
    """

    components = ("step",)

    def __init__(self, accelerator: AcceleratorModel, schedule: MeasuredSchedule) -> None:
        self._accelerator = accelerator
        parts = np.array([self._parts(batch) for batch in schedule.batches])
        self._terms = _terms(np.stack([schedule.sums(one) for one in parts.T], axis=1), schedule.seconds)
        plain = np.array([self._of(row) for row in parts])
        self._edges, self._factors = _windows(schedule, plain)
        self.on_schedule: Floats = plain * self._factors[np.searchsorted(self._edges, schedule.start, side="right")]
        """Seconds of each measured iteration by this model."""
        self._now = -np.inf

    def _parts(self, batch: Batch) -> tuple[float, float, float]:
        """Seconds of the decodes alone, what prompts add, and the step itself, to scale."""
        whole = float(sum(self._accelerator.step(batch)))
        if not batch.prefills:
            return whole, 0.0, 1.0
        alone = float(sum(self._accelerator.step(Batch([], batch.decode_contexts)))) if batch.decode_contexts else 0.0
        return alone, whole - alone, 1.0

    def _of(self, parts: Sequence[float] | Floats) -> float:
        return max(float(np.dot(self._terms, parts)), 0.05 * (parts[0] + parts[1]))

    def step(self, batch: Batch) -> Sequence[float]:
        """Return the seconds at the time that ``observe`` has seen."""
        return (self._of(self._parts(batch)) * self._factors[np.searchsorted(self._edges, self._now, side="right")],)

    def observe(self, iteration: Iteration) -> None:
        """Follow a run: the next step begins when this one ends."""
        self._now = (iteration.start + iteration.duration) / NS

    def restart(self) -> None:
        """Begin a new run."""
        self._now = -np.inf


def _terms(features: Floats, seconds: Floats) -> Floats:
    """Robust least squares (Huber) of spans' seconds on decode time, prompt time and steps, held near 1, 1 and 0."""
    prior = np.array([1.0, 1.0, 0.0])
    if seconds.size < 10:
        return prior
    typical = float(np.median(features[:, 0] / features[:, 2]))
    spread = np.array([1.0, 1.0, max(typical, 1e-6)])
    weight, found = 1 / np.sqrt(np.maximum(seconds, 1e-4)), prior
    for _ in range(ROUNDS):
        off = (features @ found - seconds) * weight
        noise = max(scatter(off), 1e-9)
        weights = weight * robust(off / noise) / noise
        rows = features * spread * weights[:, None]
        want = (seconds - features @ prior) * weights
        step = np.linalg.lstsq(np.vstack([rows, np.eye(3)]), np.append(want, np.zeros(3)), rcond=None)[0]
        found = prior + step * spread
    return np.asarray(found)


def _windows(schedule: MeasuredSchedule, plain: Floats) -> tuple[Floats, Floats]:
    """Edges in time, and between them the ratio of measured to modelled seconds."""
    modelled, steps = schedule.sums(plain), schedule.sums(np.ones(plain.size))
    if not modelled.size:
        return np.empty(0), np.ones(1)
    number = (np.cumsum(steps) // WINDOW).astype(np.int64)
    _, first = np.unique(number, return_index=True)
    factors = np.add.reduceat(schedule.seconds, first) / np.add.reduceat(modelled, first)
    begin = np.full(modelled.size, np.inf)
    inside = schedule.span >= 0
    np.minimum.at(begin, schedule.span[inside], schedule.start[inside])
    return begin[first[1:]], factors


def step_errors(accelerator: AcceleratorModel, schedule: MeasuredSchedule) -> StepErrors:
    """Compare the spans of a measured schedule with an accelerator model, and name the likeliest cause.

    Each candidate explains the differences by itself, with one coefficient that minimises the absolute residuals (a
    weighted median of the ratios). Of those that do about equally well the simplest is named: the same in every step,
    then in proportion to the step.
    """
    parts = np.array([accelerator.step(batch) for batch in schedule.batches])
    steps = schedule.sums(np.ones(len(parts)))
    whole = schedule.sums(parts.sum(axis=1))
    measured = float(schedule.seconds.sum())
    bias, mean = float(whole.sum()) / measured - 1, measured / float(steps.sum())
    alike = _alike(schedule, whole / steps, steps)
    candidates = {"constant": alike(steps), "everything": alike(whole)}
    for name, column in zip(accelerator.components, parts.T, strict=True):
        summed = schedule.sums(column)
        if not _constant(summed, steps):
            candidates[name] = alike(summed)
    off = alike(schedule.seconds - whole)
    total = max(float(np.abs(off).sum()), 1e-15)
    sizes = {name: _weighted_median(off, column) for name, column in candidates.items()}
    taken = {name: 1 - float(np.abs(off - sizes[name] * column).sum()) / total for name, column in candidates.items()}
    cause = _clearest(taken)
    if cause == "constant":
        sizes[cause] = -bias * mean
    near = (
        tuple(name for name, share in taken.items() if share >= taken[cause] - AHEAD and name != cause) if cause else ()
    )
    return StepErrors(bias, mean, cause, sizes.get(cause, np.nan), max(taken.values()), near)


def _alike(schedule: MeasuredSchedule, size: Floats, steps: Floats) -> Callable[[Floats], Floats]:
    """Return what sums spans with like steps, so that the noise of single ones evens out: by prompts, then size."""
    tokens = schedule.sums(np.array([float(batch.num_prefill_tokens) for batch in schedule.batches])) / steps
    with_prompts = tokens[tokens > 0]
    limits = [0.5, *np.percentile(with_prompts, [100 / 3, 200 / 3])] if with_prompts.size else [0.5]
    order = np.lexsort((size, np.digitize(tokens, limits)))
    first = np.arange(0, order.size, max(FEWEST_ALIKE, order.size // MOST_GROUPS))
    return lambda column: np.asarray(np.add.reduceat(column[order], first))


def _clearest(taken: Mapping[str, float]) -> str:
    """Name the simplest cause that does about as well as the best; empty if none does well, or two do equally."""
    best = max(taken.values())
    if best < CLEAR:
        return ""
    for name in ("constant", "everything"):
        if taken[name] >= best - AHEAD:
            return name
    ranked = sorted(taken, key=lambda name: -taken[name])
    return ranked[0] if best >= taken[ranked[1]] + AHEAD else ""


def _constant(column: Floats, steps: Floats) -> bool:
    each = column / steps
    return bool(each.mean() <= 0 or each.std() < CONSTANT * each.mean())


def _weighted_median(values: Floats, weights: Floats) -> float:
    """Return the slope through the origin with the least absolute residuals."""
    fine = weights > 0
    if not fine.any():
        return 0.0
    ratio = values[fine] / weights[fine]
    order = np.argsort(ratio, kind="stable")
    summed = np.cumsum(weights[fine][order])
    return float(ratio[order][np.searchsorted(summed, summed[-1] / 2)])


def stretched(schedule: MeasuredSchedule, seconds: Floats) -> Callable[[Floats], Floats]:
    """Return the map from measured times to those of the same schedule whose iterations take ``seconds``.

    Idle times stay as they were; before the first iteration and after the last nothing is stretched.
    """
    idle = np.maximum(np.append(0.0, schedule.start[1:] - schedule.end[:-1]), 0.0)
    ends = schedule.start[0] + np.cumsum(idle + seconds)
    here = np.column_stack([schedule.start, schedule.end]).ravel()
    there = np.column_stack([ends - seconds, ends]).ravel()

    def moved(times: Floats) -> Floats:
        shift = np.interp(times, here, there - here)
        return np.asarray(times + shift)

    return moved
