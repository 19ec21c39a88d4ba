"""Intervals of fitted coefficients from a block bootstrap over arrival time.

Neighbours in time share their queue, and what the model does not know of it. So blocks of about sqrt(n) neighbours are
drawn with replacement, the end of a run joined to its start (circular block bootstrap, Politis and Romano 1992): spans
of iterations, and latencies with all that a request left, each block from the same stretch of the run. Every resample
draws the base profile's values too, from how far they may be off; else what only the base profile says would seem
certain (randomise, then optimise: Bardsley et al. 2014). Resamples of few blocks vary less than runs do: their pushes
are spread by as much as Student's quantile is above the normal one (Hesterberg 2015, "narrowness bias").

The loss is held at its linearisation at the solution: schedules, noise and robust weights stay, and the resample's
quadratic loss is minimised inside the bounds. A resample so takes a millisecond; one with simulations would take as
long as a fit. What a schedule that changes with the coefficients adds, the intervals do not see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import lsq_linear
from scipy.stats import norm as normal
from scipy.stats import t as student

from calibrate.evidence import Evidence, Group
from calibrate.fit import ProfileFit
from profiles.errors import InputError

Floats = npt.NDArray[np.float64]

SEED = 20240815
LEAST_RESAMPLES = 40
"""Fewer say nothing of the 2.5 % at either end."""
FINE = 8
"""Starts of blocks lie on a grid of this many a block."""
AT_ONCE = 25
"""Resamples in one task."""
WIDER = 2.0
"""The bootstrap's interval is remarkable if it is this many times as wide as the Jacobian's."""


@dataclass(frozen=True)
class Bootstrap:
    """Coefficients by resample.

    Attributes
    ----------
    names : tuple of str
    values : array (resamples, coefficients)
    sentences : list of str
        Which intervals are much wider than the Jacobian's, and what that means.
    """

    names: tuple[str, ...]
    values: Floats
    sentences: list[str]

    @property
    def ci95(self) -> dict[str, tuple[float, float]]:
        """95 % percentile interval of each coefficient."""
        low, high = np.percentile(self.values, [2.5, 97.5], axis=0)
        return {name: (float(low[place]), float(high[place])) for place, name in enumerate(self.names)}


def bootstrap(
    fit: ProfileFit,
    resamples: int = 200,
    *,
    jobs: int = 1,
    seed: int = SEED,
    progress: Callable[[int], None] | None = None,
) -> Bootstrap:
    """Resample what a fit was fitted to.

    Parameters
    ----------
    fit : ProfileFit
        Fitted. Of a ``RegressionFit``, the linear model is resampled.
    resamples : int
        At least ``LEAST_RESAMPLES``.
    jobs : int
        Processes; -1 for one each core. The result does not depend on it: every resample has a seed of its own.
    seed : int
    progress : callable, optional
        Called with the number of resamples that are done.

    Raises
    ------
    InputError
        If there are too few resamples, or nothing was fitted.
    """
    if resamples < LEAST_RESAMPLES:
        raise InputError(
            f"{resamples} resamples cannot tell a 95 % interval; expected at least {LEAST_RESAMPLES}",
            field="--bootstrap",
        )
    if fit.evidence_ is None:
        raise InputError("nothing to resample: fit first")
    problem = _Resampling(fit.evidence_)
    tasks = [range(first, min(first + AT_ONCE, resamples)) for first in range(0, resamples, AT_ONCE)]
    found: list[Floats] = []
    for some in _done(problem, tasks, seed, jobs):
        found += some
        if progress is not None:
            progress(len(found))
    values: Floats = np.array(found)
    return Bootstrap(problem.names, values, _where_neighbours_err_together(fit, problem.names, values))


def _done(problem: _Resampling, tasks: Sequence[range], seed: int, jobs: int) -> Iterator[list[Floats]]:
    from joblib import Parallel, delayed

    yield from Parallel(n_jobs=jobs, return_as="generator")(delayed(problem.resampled)(some, seed) for some in tasks)


class _Resampling:
    """The quadratic loss at the solution, in sums over short stretches of each run that can be drawn anew.

    In units ``delta`` of prior spread from the solution, a resample's loss is ``delta' H delta / 2 + g' delta`` with
    ``H = sum of rows' rows + prior`` and ``g = sum of rows' residuals + prior``, less what g is at the solution: 0, but
    for coefficients that a bound holds. Those would not move in any resample, and the interval have no width (a
    bootstrap fails at a bound, Andrews 2000); so they vary as if the data had put them there. Sums over a cell of time
    are all that is needed of the rows in it.
    """

    def __init__(self, evidence: Evidence) -> None:
        space = evidence.space
        self.names, self.values, self.spread, self.least = space.names, evidence.values, space.spread, space.least
        self.weight = evidence.weight
        self.room = np.minimum((space.least - evidence.values) / space.spread, 0.0)
        runs = np.unique(np.concatenate([np.floor(group.place) for group in evidence.groups]))
        self.runs = [_cells(evidence.groups, int(run)) for run in runs]
        blocks = sum(len(pushes) for _, pushes in self.runs) / FINE
        self.few = float(np.sqrt(blocks / (blocks - 1)) * student.ppf(0.975, blocks - 1) / normal.ppf(0.975))

    def resampled(self, some: Sequence[int], seed: int) -> list[Floats]:
        """Coefficients of some resamples, by number."""
        return [self.solve(np.random.default_rng([seed, number])) for number in some]

    def solve(self, random: np.random.Generator) -> Floats:
        """Draw blocks and the prior, and minimise inside the bounds."""
        size = len(self.names)
        curve = self.weight * np.eye(size)
        slope = np.sqrt(self.weight) * random.standard_normal(size)
        for information, pushes in self.runs:
            cells = len(pushes)
            starts = random.integers(0, cells, cells // FINE)
            times = np.bincount(((starts[:, None] + np.arange(FINE)) % cells).ravel(), minlength=cells)
            # einsum without BLAS: the same bits however many threads there are.
            curve = curve + np.einsum("c,cjk->jk", times.astype(np.float64), information)
            slope = slope + self.few * np.einsum("c,cj->j", times - 1.0, pushes)
        strengths, axes = np.linalg.eigh(curve)
        roots = np.sqrt(np.maximum(strengths, np.finfo(np.float64).eps * size * strengths[-1]))
        moved = lsq_linear(roots[:, None] * axes.T, -(axes.T @ slope) / roots, bounds=(self.room - 1e-12, np.inf)).x
        return np.asarray(np.maximum(self.values + moved * self.spread, self.least))


def _cells(groups: Sequence[Group], run: int) -> tuple[Floats, Floats]:
    """Sums of rows' outer products (cells, coefficients, coefficients) and of their pushes, by time within a run."""
    mine = [np.floor(group.place) == run for group in groups]
    # Blocks of about sqrt(n) of what there is fewest of: requests, where latencies were fitted, else spans.
    counts = [np.unique(group.place[own]).size for group, own in zip(groups, mine, strict=True)]
    cells = FINE * max(2, round(min(count for count in counts if count) ** 0.5))
    size = groups[0].rows.shape[1]
    information, pushes = np.zeros((cells, size, size)), np.zeros((cells, size))
    for group, own in zip(groups, mine, strict=True):
        cell = np.minimum(((group.place[own] - run) * cells).astype(int), cells - 1)
        rows = group.rows[own]
        np.add.at(pushes, cell, rows * group.residuals[own][:, None])
        for place in range(cells):
            inside = rows[(cell == place) & group.slopes[own]]
            information[place] += inside.T @ inside
    return information, pushes


def _where_neighbours_err_together(fit: ProfileFit, names: Sequence[str], values: Floats) -> list[str]:
    low, high = np.percentile(values, [2.5, 97.5], axis=0)
    jacobian = {one.name: one.ci95[1] - one.ci95[0] for one in fit.coefficients_}
    wide = [name for place, name in enumerate(names) if high[place] - low[place] > WIDER * max(jacobian[name], 1e-12)]
    if not wide:
        return []
    return [
        f"the bootstrap's interval is more than twice as wide as the Jacobian's for {', '.join(wide)}: neighbouring "
        "requests share errors of the model; trust the wider one"
    ]
