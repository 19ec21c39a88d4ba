"""Regression: a linear model corrected by boosted regression trees, monotone in every feature.

Trees alone know nothing beyond what they were grown on, and price everything outside it like its edge. So they
correct a linear model instead of replacing it: inside the range of each feature that was seen they may bend its
slopes, outside it the linear model goes on with its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from simulator.accelerators.linear import Linear
from simulator.batch import Batch
from simulator.errors import SimulationError

LEAST_SHARE = 0.2
"""No correction takes more than the rest off the linear model: far outside what was seen, times stay positive."""
SHORTEST = 1e-6
"""Seconds that any iteration takes."""


@dataclass(frozen=True)
class Trees:
    """Regression trees as lists of nodes; the prediction is the sum over the trees, in seconds.

    Node ``n`` asks whether feature ``feature[n]`` is at most ``threshold[n]``, and goes to node ``left[n]`` if so,
    else to ``right[n]``; both come after ``n``. A leaf has ``feature[n] == -1`` and adds ``value[n]``. ``roots`` are
    the first nodes of the trees.
    """

    roots: Sequence[int]
    feature: Sequence[int]
    threshold: Sequence[float]
    left: Sequence[int]
    right: Sequence[int]
    value: Sequence[float]

    @property
    def num_leaves(self) -> int:
        """Leaves of all trees."""
        return sum(one < 0 for one in self.feature)

    def predict(self, features: Sequence[float]) -> float:
        """Return the sum of the trees for one batch's features (``Regression.features``)."""
        feature, threshold, left, right = self.feature, self.threshold, self.left, self.right
        total = 0.0
        for node in self.roots:
            asked = feature[node]
            while asked >= 0:
                node = left[node] if features[asked] <= threshold[node] else right[node]
                asked = feature[node]
            total += self.value[node]
        return total


@dataclass(frozen=True)
class Correction:
    """What trees have learned on top of a linear model.

    Parameters
    ----------
    trees : Trees
        Grown on iterations' seconds less ``kept`` times the linear model; monotone in every feature.
    kept : float
        Share of the linear model's slopes that is left to it inside the seen range, 0 to 1.
    seen : mapping of str to (float, float)
        Smallest and largest value of each of ``Linear.components`` but ``step`` among those iterations.
    """

    trees: Trees
    kept: float
    seen: Mapping[str, tuple[float, float]]


class Regression:
    """Prices a batch by a linear model and, where there is one, a learned correction.

    With features x, x' the nearest point inside the seen range, and L the linear model::

        t(x) = L(x) - (1 - kept) L(x') + trees(x)

    Trees are constant outside what they were grown on, so beyond the range L goes on with its own slopes. ``x - (1 -
    kept) x'`` does not fall in any feature, nor do monotone trees: neither does t.

    Components
    ----------
    Those of ``Linear``, and ``learned``: what the correction adds. Where it takes off, the others shrink alike.

    Parameters
    ----------
    seconds : mapping of str to float
        Of the linear model.
    correction : Correction, optional

    Raises
    ------
    SimulationError
        If the linear model is unusable, ``kept`` no share, or a seen range missing or upside down.
    """

    components = (*Linear.components, "learned")
    features = (*Linear.components[1:], "prefill_token", "longest_context")
    """What trees may ask for, by place: ``Linear``'s but the step, tokens of prefill chunks, longest decode context."""

    def __init__(self, seconds: Mapping[str, float], correction: Correction | None = None) -> None:
        self.linear = Linear(seconds)
        self.correction = correction
        if correction is None:
            return
        if not 0 <= correction.kept <= 1:
            raise SimulationError(f"regression: kept={correction.kept}: expected a share, 0 to 1")
        for name in Linear.components[1:]:
            low, high = correction.seen.get(name, (1.0, 0.0))
            if not low <= high:
                raise SimulationError(f"regression: expected the seen range of {name!r}, smallest and largest value")
        taken = 1.0 - correction.kept
        self._constant = taken * self.linear.seconds["step"]
        self._taken = [
            (place, taken * self.linear.seconds[name], *correction.seen[name])
            for place, name in enumerate(Linear.components[1:])
            if taken * self.linear.seconds[name]
        ]

    @staticmethod
    def features_of(batch: Batch) -> tuple[float, ...]:
        """Values of ``features`` for a batch."""
        return (
            *Linear.features(batch)[1:],
            batch.num_prefill_tokens,
            batch.longest_context,
        )

    def step(self, batch: Batch) -> Sequence[float]:
        """Return seconds per component."""
        parts = self.linear.step(batch)
        if self.correction is None:
            return (*parts, 0.0)
        linear = sum(parts)
        total = max(linear + self._correct(self.features_of(batch)), LEAST_SHARE * linear, SHORTEST)
        if total >= linear:
            return (*parts, total - linear)
        return (*(part * total / linear for part in parts), 0.0)

    def _correct(self, features: Sequence[float]) -> float:
        """Seconds by which the linear model is off."""
        assert self.correction is not None
        found = self.correction.trees.predict(features) - self._constant
        for place, rate, low, high in self._taken:
            value = features[place]
            found -= rate * (low if value < low else high if value > high else value)
        return found
