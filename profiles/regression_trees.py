"""The trees of a regression profile on disk: a Parquet table of nodes beside the YAML.

Nothing in it is executed or refitted: a profile is foreign input, and predicts the same under every version of the
library that grew its trees.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from profiles.errors import InputError
from simulator.accelerators.regression import Regression, Trees

NODES = pa.schema(
    {
        "tree": pa.int32(),
        "feature": pa.int32(),
        "threshold": pa.float64(),
        "left": pa.int32(),
        "right": pa.int32(),
        "value": pa.float64(),
    }
)
"""One row a node, trees one after the other; ``left`` and ``right`` are rows, ``feature`` is -1 at a leaf."""
MOST_NODES = 1_000_000


def trees_to_parquet(trees: Trees) -> bytes:
    """Return the file that ``load_trees`` reads."""
    roots = [*trees.roots, len(trees.feature)]
    tree = [number for number in range(len(trees.roots)) for _ in range(roots[number], roots[number + 1])]
    columns = [tree, trees.feature, trees.threshold, trees.left, trees.right, trees.value]
    table = pa.table([pa.array(list(one), kind.type) for one, kind in zip(columns, NODES, strict=True)], NODES)
    stream = io.BytesIO()
    pq.write_table(table, stream, compression="zstd")
    return stream.getvalue()


def load_trees(path: Path, sha256: str) -> Trees:
    """Read the trees that a profile names.

    Raises
    ------
    InputError
        If the file is missing, not the one that the profile was written with, or holds no trees that end.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}; the profile keeps its trees there", file=path) from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        raise InputError(
            f"has sha256 {digest}, the profile says {sha256}: not the trees it was written with", file=path
        )
    table = _read(content, path)
    columns = {name: table[name].to_pylist() for name in NODES.names}
    _check(columns, path)
    tree = columns.pop("tree")
    roots = [row for row in range(len(tree)) if row == 0 or tree[row] != tree[row - 1]]
    return Trees(roots=roots, **columns)


def _read(content: bytes, path: Path) -> pa.Table:
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        rows = file.metadata.num_rows
        missing = set(NODES.names) - set(file.schema_arrow.names)
        if missing:
            raise InputError("is missing", file=path, field=min(missing))
        if not 0 < rows <= MOST_NODES:
            raise InputError(f"holds {rows} nodes; expected 1 to {MOST_NODES}", file=path)
        table = file.read(columns=NODES.names).select(NODES.names).cast(NODES)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, KeyError, OSError) as error:
        raise InputError(str(error).splitlines()[0], file=path) from None
    for name in NODES.names:
        if table[name].null_count:
            raise InputError("is empty", file=path, row=f"row {pc.index(pc.is_null(table[name]), True)}", field=name)
    for name in ("threshold", "value"):
        if not pc.all(pc.is_finite(table[name])).as_py():
            raise InputError("expected finite numbers", file=path, field=name)
    return table


def _check(columns: dict[str, list[int]], path: Path) -> None:
    """See to it that every walk from a root ends in a leaf of the same tree."""
    tree = columns["tree"]
    for row, feature in enumerate(columns["feature"]):
        if not -1 <= feature < len(Regression.features):
            expected = f"-1 (a leaf) or a feature, 0 to {len(Regression.features) - 1}"
            raise InputError(f"expected {expected}; found {feature}", file=path, row=f"row {row}", field="feature")
        for side in ("left", "right"):
            child = columns[side][row]
            if feature >= 0 and not (row < child < len(tree) and tree[child] == tree[row]):
                raise InputError(
                    f"expected a later row of the same tree; found {child}", file=path, row=f"row {row}", field=side
                )
