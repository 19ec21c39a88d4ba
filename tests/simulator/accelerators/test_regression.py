from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.accelerators.base import AcceleratorModel
from simulator.accelerators.linear import Linear
from simulator.accelerators.regression import LEAST_SHARE, Correction, Regression, Trees
from simulator.batch import Batch
from simulator.errors import SimulationError

SECONDS = {"step": 2e-3, "token": 1e-5, "decode_attention": 1e-8}
SEEN = {
    "sequence": (2.0, 32.0),
    "token": (4.0, 512.0),
    "prefill_step": (0.0, 1.0),
    "prefill_attention": (0.0, 1e5),
    "decode_attention": (100.0, 4e4),
}
LIMITS = {"prefill_token": (0.0, 500.0), "longest_context": (10.0, 2000.0), **SEEN}


def monotone_trees(seed: int, count: int = 30) -> Trees:
    """Stumps whose right leaf is never below the left one, on thresholds inside the seen range."""
    draw = random.Random(seed)
    roots, feature, threshold, left, right, value = [0], [-1], [0.0], [-1], [-1], [draw.uniform(-1e-3, 1e-3)]
    for _ in range(count):
        node = len(feature)
        asked = draw.randrange(len(Regression.features))
        low = draw.uniform(-1e-4, 1e-4)
        roots.append(node)
        feature += [asked, -1, -1]
        threshold += [draw.uniform(*LIMITS[Regression.features[asked]]), 0.0, 0.0]
        left += [node + 1, -1, -1]
        right += [node + 2, -1, -1]
        value += [0.0, low, low + draw.uniform(0, 1e-4)]
    return Trees(roots, feature, threshold, left, right, value)


batches = st.builds(
    Batch,
    st.lists(st.tuples(st.integers(2, 600), st.integers(0, 3000)), max_size=3),
    st.lists(st.integers(0, 4000), min_size=1, max_size=50),
)


def test_a_stump_is_added_to_what_is_left_of_the_linear_model():
    trees = Trees([0, 1], [-1, 0, -1, -1], [0.0, 8.0, 0.0, 0.0], [-1, 2, -1, -1], [-1, 3, -1, -1], [1e-3, 0, 0, 5e-4])
    model = Regression({"step": 2e-3, "sequence": 1e-4}, Correction(trees, 0.75, SEEN))
    assert sum(model.step(Batch([], [50] * 8))) == pytest.approx(0.75 * 2.8e-3 + 1e-3)
    assert sum(model.step(Batch([], [50] * 9))) == pytest.approx(0.75 * 2.9e-3 + 1.5e-3)


def test_outside_what_was_seen_the_linear_model_goes_on_with_its_own_slopes():
    model = Regression(SECONDS | {"sequence": 1e-4}, Correction(monotone_trees(1), 0.5, SEEN))
    inside, edge = (sum(model.step(Batch([], [200] * count))) for count in (31, 32))
    beyond = [sum(model.step(Batch([], [200] * count))) for count in (40, 50)]
    slope = 1e-4 + 1e-5 + 200e-8
    # Tokens and contexts are still inside their ranges there, so they keep half; sequences are past theirs.
    kept = 1e-4 + 0.5 * (1e-5 + 200e-8)
    trees = model.correction.trees
    jump = trees.predict(Regression.features_of(Batch([], [200] * 50))) - trees.predict(
        Regression.features_of(Batch([], [200] * 40))
    )
    assert beyond[1] - beyond[0] == pytest.approx(10 * kept + jump)
    assert inside <= edge <= beyond[0]
    far = [sum(model.step(Batch([], [5000] * count))) for count in (600, 601)]
    assert far[1] - far[0] == pytest.approx(slope + 4800e-8)


@given(seed=st.integers(0, 50), kept=st.floats(0, 1), batch=batches, other=batches)
def test_no_time_falls_where_a_feature_grows(seed, kept, batch, other):
    """Two batches together hold as much or more of every feature as each of them."""
    model = Regression(SECONDS, Correction(monotone_trees(seed), kept, SEEN))
    together = Batch(batch.prefills + other.prefills, batch.decode_contexts + other.decode_contexts)
    assert sum(model.step(together)) >= sum(model.step(batch)) * (1 - 1e-12)


@given(seed=st.integers(0, 50), batch=batches)
def test_parts_are_not_negative_and_never_far_below_the_linear_model(seed, batch):
    heavy = monotone_trees(seed)
    sunk = Trees(
        heavy.roots, heavy.feature, heavy.threshold, heavy.left, heavy.right, [one - 1e-3 for one in heavy.value]
    )
    parts = Regression(SECONDS, Correction(sunk, 0.75, SEEN)).step(batch)
    assert len(parts) == len(Regression.components)
    assert min(parts) >= 0
    assert sum(parts) >= LEAST_SHARE * sum(Linear(SECONDS).step(batch)) * (1 - 1e-12)


def test_without_a_correction_it_is_the_linear_model():
    batch = Batch([(64, 128)], [100, 200])
    model = Regression(SECONDS)
    assert isinstance(model, AcceleratorModel)
    assert tuple(model.step(batch)) == (*Linear(SECONDS).step(batch), 0.0)


@pytest.mark.parametrize(
    ("kept", "seen", "word"),
    [
        (1.5, SEEN, "kept"),
        (float("nan"), SEEN, "kept"),
        (0.5, {name: SEEN[name] for name in SEEN if name != "token"}, "'token'"),
        (0.5, SEEN | {"sequence": (9.0, 1.0)}, "'sequence'"),
    ],
)
def test_an_unusable_correction_is_refused(kept, seen, word):
    with pytest.raises(SimulationError, match=word):
        Regression(SECONDS, Correction(monotone_trees(1), kept, seen))
