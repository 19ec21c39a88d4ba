"""The trees of a regression profile on disk: what comes back, and what is refused."""

from __future__ import annotations

import hashlib
import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from profiles.deployment import Facts, resolve
from profiles.errors import InputError
from profiles.profile import load_profile
from profiles.regression_trees import NODES, load_trees, trees_to_parquet
from simulator.accelerators.linear import Linear
from simulator.accelerators.regression import Trees
from simulator.batch import Batch

TREES = Trees(
    roots=[0, 1],
    feature=[-1, 1, -1, 5, -1, -1],
    threshold=[0.0, 64.5, 0.0, 12.25, 0.0, 0.0],
    left=[-1, 2, -1, 4, -1, -1],
    right=[-1, 3, -1, 5, -1, -1],
    value=[1 / 3, 0.0, -1e-3, 0.0, 1e-3, 0.1],
)
SEEN = {name: [0.0, 100.0] for name in Linear.components[1:]}
ARGUMENTS = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 128, "num_gpu_blocks": 99}


def write(path, content):
    path.write_bytes(content)
    return path, hashlib.sha256(content).hexdigest()


def table(**changes):
    columns = {
        "tree": [0, 1, 1, 1, 1, 1],
        "feature": TREES.feature,
        "threshold": TREES.threshold,
        "left": TREES.left,
        "right": TREES.right,
        "value": TREES.value,
    } | changes
    stream = io.BytesIO()
    pq.write_table(pa.table({name: one for name, one in columns.items() if one is not None}), stream)
    return stream.getvalue()


def test_trees_come_back_to_the_bit(tmp_path):
    back = load_trees(*write(tmp_path / "t.parquet", trees_to_parquet(TREES)))
    assert back == TREES
    assert back.predict([1, 65, 0, 0, 0, 12, 0]) == 1 / 3 + 1e-3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "Parquet"),
        (b"PAR1 not at all PAR1", ""),
        (table(value=None), "field 'value': is missing"),
        (table(feature=[-1, 7, -1, 5, -1, -1]), "found 7"),
        (table(feature=[-1, -2, -1, 5, -1, -1]), "found -2"),
        (table(left=[-1, 1, -1, 4, -1, -1]), "row 1: field 'left': expected a later row of the same tree; found 1"),
        (table(left=[-1, 0, -1, 4, -1, -1]), "found 0"),
        (table(right=[-1, 6, -1, 5, -1, -1]), "found 6"),
        (table(tree=[0, 1, 2, 1, 1, 1]), "same tree"),
        (table(value=[None, 0.0, 0.0, 0.0, 0.0, 0.0]), "row 0: field 'value': is empty"),
        (table(threshold=[0.0, float("nan"), 0.0, 0.0, 0.0, 0.0]), "field 'threshold': expected finite"),
        (table(feature=["a"] * 6), ""),
        (table(left=[2**40] * 6), ""),
        (table(**{name: [] for name in NODES.names}), "holds 0 nodes"),
    ],
)
def test_what_is_no_table_of_trees_is_refused_with_the_place(tmp_path, content, words):
    path, digest = write(tmp_path / "t.parquet", content)
    with pytest.raises(InputError) as caught:
        load_trees(path, digest)
    assert str(caught.value).startswith(str(path))
    assert words in str(caught.value)


def regression_profile(write_profile, tmp_path, **changes):
    path, digest = write(tmp_path / "p.trees.parquet", trees_to_parquet(TREES))
    correction = {"trees": path.name, "sha256": digest, "kept": 0.75, "seen": SEEN} | changes
    return write_profile(
        model=None,
        accelerator={"kind": "regression", "seconds": {"step": 0.01}, "correction": correction},
        host={"per_step": 0.0},
    )


def resolved(name):
    return resolve(load_profile(name), Facts(model="unknown-model", version="0.19.0", arguments=ARGUMENTS))


def test_a_profile_prices_with_its_trees_and_needs_no_model(write_profile, tmp_path):
    deployment = resolved(regression_profile(write_profile, tmp_path))
    assert sum(deployment.accelerator.step(Batch([], [50]))) == pytest.approx(0.75 * 0.01 + 1 / 3 - 1e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trees": "gone.parquet"}, "gone.parquet: cannot be read: No such file"),
        ({"sha256": "0" * 64}, "not the trees it was written with"),
        ({"sha256": "abc"}, "correction.sha256"),
        ({"kept": 2}, "correction.kept"),
        ({"seen": {}}, "'sequence'"),
        ({"pickle": "x"}, "correction.pickle"),
    ],
)
def test_a_correction_that_does_not_fit_is_refused(write_profile, tmp_path, changes, words):
    with pytest.raises(InputError) as caught:
        resolved(regression_profile(write_profile, tmp_path, **changes))
    assert words in str(caught.value)


def test_trees_that_were_tampered_with_are_refused(write_profile, tmp_path):
    profile = regression_profile(write_profile, tmp_path)
    trees = tmp_path / "p.trees.parquet"
    content = bytearray(trees.read_bytes())
    content[100] ^= 1
    trees.write_bytes(content)
    with pytest.raises(InputError, match="has sha256"):
        resolved(profile)
