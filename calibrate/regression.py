"""Fitting a regression profile: boosted trees on what a linear fit leaves of the measured iterations.

Gradient boosting cannot extrapolate, and the part of a run that one wants predicted is often outside what was seen
(the last batches of a run are its smallest). So the trees correct a linear fit, which goes on where they end
(``simulator.accelerators.regression``). How many trees, and how much of the linear slopes they may replace, is chosen
by cross-validation over blocks of time of the training part; none at all if they do not help.

Where a span holds several iterations, only the sum of their seconds was measured. If each iteration's noise has a
variance in proportion to its seconds, the expectation of one, given the sum, is its predicted seconds times the ratio
of the measured to the predicted sum. Sharing spans so by the linear fit, growing trees, and sharing anew by what these
say is expectation maximisation; two rounds are as good as more.

The trees are scikit-learn's ``DecisionTreeRegressor``, boosted here: unlike ``HistGradientBoostingRegressor`` it says
publicly what its trees look like, so that a profile can hold them as numbers (``profiles.regression_trees``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from calibrate.fit import ProfileFit, Rows
from calibrate.least_squares import FOLDS, solve
from calibrate.space import LINEAR_UNITS, SHORTEST, CoefficientSpace, Equations
from profiles.deployment import Deployment
from profiles.errors import InputError
from profiles.profile import Accelerator, Host, Profile
from profiles.regression_trees import trees_to_parquet
from replay.trace import Trace
from simulator.accelerators.base import HostOverhead, WithHost
from simulator.accelerators.linear import Linear
from simulator.accelerators.regression import LEAST_SHARE, Correction, Regression, Trees
from simulator.batch import Batch

Floats = npt.NDArray[np.floating[Any]]

KEPT = (0.9, 0.75)
"""Shares of the linear slopes that the trees leave alone, for cross-validation to choose from."""
STAGES = (20, 40, 60, 80, 100)
"""Numbers of trees, likewise."""
LINEAR_ALONE = (1.0, 0)
"""The choice of no trees."""
STRETCH = 10
"""Spans. A request waits for many iterations, so errors that add up count besides those of single spans."""
GAIN = 0.98
"""Trees are kept if they bring the cross-validated error down to this share of the linear fit's, or below."""
RATE = 0.1
DEPTH = 3
LEAST_ROWS = 20
"""Iterations in a leaf."""
BEND = 0.9
"""Quantile of the residuals beyond which they count as being there (Friedman 2001, M-regression)."""
ROUNDS = 2
MOST_ROWS = 2000
"""Iterations that one tree is grown on, drawn anew for each (Friedman 2002), so that long recordings take no longer."""
SEED = 20240815


@dataclass(frozen=True)
class _Spans:
    """Iterations as rows: features of shape (iterations, 1 + ``Regression.features``), the first one the step.

    ``span`` is the number of the span that an iteration belongs to, ``seconds`` has one value a span.
    """

    features: Floats
    span: npt.NDArray[np.intp]
    seconds: Floats

    @classmethod
    def of(cls, spans: Sequence[tuple[list[Batch], float]]) -> _Spans:
        rows = [(1.0, *Regression.features_of(batch)) for batches, _ in spans for batch in batches]
        span = np.repeat(np.arange(len(spans)), [len(batches) for batches, _ in spans])
        return cls(np.array(rows), span, np.array([seconds for _, seconds in spans]))

    def some(self, which: Rows) -> _Spans:
        """Some of the spans."""
        inside = which[self.span]
        return _Spans(self.features[inside], (np.cumsum(which) - 1)[self.span[inside]], self.seconds[which])

    def linear(self, rates: Floats) -> Floats:
        """Seconds of each iteration by the linear model."""
        return np.asarray(self.features[:, : rates.size] @ rates)

    def shared(self, predicted: Floats) -> Floats:
        """Seconds of each iteration: its span's, shared in proportion to those predicted."""
        sums = np.bincount(self.span, predicted, self.seconds.size)
        return np.asarray(predicted * (self.seconds / sums)[self.span])

    def errors(self, predicted: Floats, width: int = 1) -> Floats:
        """Absolute relative error of each ``width`` neighbouring spans together."""
        sums = np.bincount(self.span, predicted, self.seconds.size)
        edges = np.arange(0, self.seconds.size, width)
        return np.asarray(np.abs(np.add.reduceat(sums, edges) / np.add.reduceat(self.seconds, edges) - 1))

    def rates(self, space: CoefficientSpace, strength: float) -> Floats:
        """Seconds per unit of each of ``Linear.components``, by the linear fit."""
        units = np.array([LINEAR_UNITS[name] for name in Linear.components])
        columns = [np.bincount(self.span, one, self.seconds.size) for one in self.features[:, : units.size].T]
        features = np.stack(columns, axis=1) * units
        space = space.only(np.isin(space.names, Linear.components))
        weights = 1 / np.sqrt(np.maximum(self.seconds, SHORTEST))
        values, _, _ = solve(space, Equations(features, self.seconds, weights), strength)
        return np.asarray(values * units)


@dataclass(frozen=True)
class _Ensemble:
    """A constant and trees of scikit-learn, each counting ``RATE``, on top of ``kept`` times a linear model."""

    kept: float
    rates: Floats
    clip: Callable[[Floats], Floats]
    constant: float
    trees: list[Any]

    def staged(self, rows: _Spans) -> list[Floats]:
        """Predicted seconds of each iteration after each of ``STAGES``."""
        linear = rows.linear(self.rates)
        at_edge = self.clip(rows.features)[:, : self.rates.size] @ self.rates
        predicted = linear - (1 - self.kept) * at_edge + self.constant
        found = []
        for count, tree in enumerate(self.trees, start=1):
            predicted = predicted + RATE * tree.predict(rows.features[:, 1:])
            if count in STAGES:
                found.append(np.maximum(predicted, LEAST_SHARE * linear))
        return found


@dataclass
class RegressionFit(ProfileFit):
    """Learns a linear model, and trees that correct it.

    Coefficients, intervals and what else ``ProfileFit`` says are the linear model's, except:

    Attributes
    ----------
    rates_ : dict of str to float
        Seconds per unit of each feature in the linear model.
    correction_ : Correction or None
        The trees and what they were grown on; None if they do not help.
    num_trees_ : int
    cross_validation_ : dict of str to float
        Mean relative error of left-out spans and stretches of them: ``linear``, and ``trees`` at the best choice.
    residual_ : float
        Median absolute relative error of a span's time by linear model and trees together.
    """

    simulates: ClassVar[bool] = False  # trees correct what the equations leave over
    rates_: dict[str, float] = field(default_factory=dict, init=False)
    correction_: Correction | None = field(default=None, init=False)
    num_trees_: int = field(default=0, init=False)
    cross_validation_: dict[str, float] = field(default_factory=dict, init=False)

    def fit(self, runs: Sequence[tuple[Trace, Deployment, Rows | None]]) -> RegressionFit:
        """Learn from one or more runs, as ``ProfileFit.fit``; the bases' own trees are not used."""
        super().fit([(trace, _linear_part(deployment), known) for trace, deployment, known in runs])
        # As the profile will say them: the trees are grown on what the very model that will run leaves over.
        self.rates_ = {one.name: float(f"{one.value * LINEAR_UNITS[one.name]:.6g}") for one in self.coefficients_}
        rates = np.array([self.rates_.get(name, 0.0) for name in Linear.components])
        rows = _Spans.of(self.spans_)
        kept, count = self._chosen(rows, CoefficientSpace(_linear_part(runs[0][1])))
        self.sentences_.append(self._what_trees_gain(count))
        if not count:
            return self
        ensemble = _grown(rows, rates, kept, count)
        self.num_trees_ = count
        self.residual_ = float(np.median(rows.errors(ensemble.staged(rows)[-1])))
        lows, highs = rows.features.min(axis=0).tolist(), rows.features.max(axis=0).tolist()
        seen = dict(zip(Linear.components[1:], zip(lows[1:], highs[1:], strict=True), strict=False))
        self.correction_ = Correction(_compiled(ensemble), kept, seen)
        return self

    def _chosen(self, rows: _Spans, space: CoefficientSpace) -> tuple[float, int]:
        """Share of the linear slopes to keep and number of trees, by blocks of time that predict each other."""
        scores: dict[tuple[float, int], list[float]] = {}
        for fold in np.array_split(np.arange(rows.seconds.size), FOLDS):
            out = np.zeros(rows.seconds.size, dtype=bool)
            out[fold] = True
            training, left_out = rows.some(~out), rows.some(out)
            rates = training.rates(space, self.strength_)
            scores.setdefault(LINEAR_ALONE, []).append(_missed(left_out, left_out.linear(rates)))
            for kept in KEPT:
                staged = _grown(training, rates, kept, STAGES[-1]).staged(left_out)
                for count, predicted in zip(STAGES, staged, strict=True):
                    scores.setdefault((kept, count), []).append(_missed(left_out, predicted))
        means = {choice: float(np.mean(errors)) for choice, errors in scores.items()}
        linear = means.pop(LINEAR_ALONE)
        best = min(means, key=lambda choice: means[choice])
        self.cross_validation_ = {"linear": linear, "trees": means[best]}
        return best if means[best] <= GAIN * linear else LINEAR_ALONE

    def _what_trees_gain(self, count: int) -> str:
        linear, trees = (f"{100 * self.cross_validation_[one]:.2f} %" for one in ("linear", "trees"))
        if not count:
            return f"no trees: in cross-validation they miss the time of spans by {trees}, the linear model by {linear}"
        return (
            f"the coefficients are the linear model's; {count} trees correct it: in cross-validation they miss the "
            f"time of spans by {trees}, the linear model alone by {linear}"
        )

    @property
    def num_coefficients_(self) -> int:
        """Numbers that were learned: the linear model's and the trees' leaves."""
        return len(self.coefficients_) + (self.correction_.trees.num_leaves if self.correction_ else 0)

    def deployment(self, base: Deployment) -> Deployment:
        """Return the deployment with what was learned in force."""
        accelerator = WithHost(Regression(self.rates_, self.correction_), HostOverhead(0.0, 0.0))
        return replace(base, config=self.inferred(base.config), accelerator=accelerator)

    def written(self, profile: Profile, stem: str) -> tuple[Profile, dict[str, bytes]]:
        """Return the profile with what was learned, and the file of its trees."""
        options: dict[str, Any] = {"kind": "regression", "seconds": self.rates_}
        files = {}
        if self.correction_ is not None:
            name = f"{stem}.trees.parquet"
            files[name] = trees_to_parquet(self.correction_.trees)
            options["correction"] = {
                "trees": name,
                "sha256": hashlib.sha256(files[name]).hexdigest(),
                "kept": self.correction_.kept,
                "seen": {feature: list(limits) for feature, limits in self.correction_.seen.items()},
            }
        changes = {
            "accelerator": Accelerator.model_validate(options),
            "coefficients": {},
            "host": Host(per_step=0.0, per_sequence=0.0, source="part of the regression"),
            "provenance": {
                **profile.provenance,
                "trees": self.num_trees_,
                "cross_validation": {name: float(f"{error:.4g}") for name, error in self.cross_validation_.items()},
            },
        }
        return profile.model_copy(update=changes), files


def _linear_part(deployment: Deployment) -> Deployment:
    device = deployment.accelerator.device
    if not isinstance(device, Regression):
        raise InputError(f"{deployment.loaded.profile.name} is no regression profile")
    return replace(deployment, accelerator=WithHost(device.linear, HostOverhead(0.0, 0.0)))


def _missed(rows: _Spans, predicted: Floats) -> float:
    """Mean relative error of spans and of stretches of them."""
    return float((rows.errors(predicted).mean() + rows.errors(predicted, STRETCH).mean()) / 2)


def _grown(rows: _Spans, rates: Floats, kept: float, count: int) -> _Ensemble:
    """Boost trees on the iterations' seconds less what the linear model keeps.

    An iteration weighs as in the linear fit, by 1 / seconds.
    """
    from sklearn.tree import DecisionTreeRegressor

    features, linear = rows.features[:, 1:], np.maximum(rows.linear(rates), 1e-9)
    weights = 1 / np.maximum(linear, SHORTEST)
    shared = rows.shared(linear)
    random = np.random.default_rng(SEED)
    for _ in range(ROUNDS if linear.size > rows.seconds.size else 1):  # recorded iterations have nothing to share
        target = shared - kept * linear
        constant = float(np.average(target, weights=weights))
        learned = np.full(linear.size, constant)
        trees = []
        for _ in range(count):
            scaled = (target - learned) * np.sqrt(weights)
            bend = np.quantile(np.abs(scaled), BEND)
            some = slice(None) if linear.size <= MOST_ROWS else random.choice(linear.size, MOST_ROWS, replace=False)
            tree = DecisionTreeRegressor(
                max_depth=DEPTH,
                min_samples_leaf=LEAST_ROWS,
                monotonic_cst=[1] * features.shape[1],
                random_state=0,
            )
            residual = np.clip(scaled, -bend, bend) / np.sqrt(weights)
            trees.append(tree.fit(features[some], residual[some], sample_weight=weights[some]))
            learned = learned + RATE * tree.predict(features)
        shared = rows.shared(np.maximum(kept * linear + learned, LEAST_SHARE * linear))
    lows, highs = rows.features.min(axis=0), rows.features.max(axis=0)
    return _Ensemble(kept, rates, lambda values: np.clip(values, lows, highs), constant, trees)


def _compiled(ensemble: _Ensemble) -> Trees:
    """The trees as lists of nodes, the constant as a first tree of one leaf."""
    roots, feature, threshold = [0], [-1], [0.0]
    left, right, value = [-1], [-1], [ensemble.constant]
    for one in ensemble.trees:
        tree, first = one.tree_, len(feature)
        leaf = tree.children_left < 0
        roots.append(first)
        feature += np.where(leaf, -1, tree.feature).tolist()
        threshold += np.where(leaf, 0.0, tree.threshold).tolist()
        left += np.where(leaf, -1, tree.children_left + first).tolist()
        right += np.where(leaf, -1, tree.children_right + first).tolist()
        value += (RATE * tree.value[:, 0, 0] * leaf).tolist()
    return Trees(roots, feature, threshold, left, right, value)
