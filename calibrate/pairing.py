"""Which requests of two traces belong together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from replay.trace import Trace

Rows = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Pairing:
    """Rows of both traces that belong together, in order of arrival, and why others do not.

    ``measured`` and ``predicted`` have shape (pairs,); ``reasons`` counts the requests left out.
    """

    measured: Rows
    predicted: Rows
    reasons: Mapping[str, int]


def pair(measured: Trace, predicted: Trace, exclude: Mapping[str, frozenset[str]]) -> Pairing:
    """Join two traces by request id.

    A request is left out for the first reason that holds: one of ``exclude``, a measured status other than ``ok``,
    ``unpaired`` (not in the prediction), ``not_predicted`` (not served there). ``only_predicted`` counts those that
    were not measured.
    """
    ids, others = _column(measured, "id"), _column(predicted, "id")
    statuses = _column(measured, "status")
    place = pc.index_in(ids, value_set=others)
    found = pc.is_valid(place).to_numpy(zero_copy_only=False)
    rows = pc.fill_null(place, 0).to_numpy().astype(np.intp)
    left = np.ones(len(measured), dtype=bool)
    reasons: dict[str, int] = {}

    def leave_out(reason: str, which: npt.NDArray[np.bool_]) -> None:
        count = int((left & which).sum())
        if count:
            reasons[reason] = reasons.get(reason, 0) + count
            left[which] = False

    for reason, some in exclude.items():
        leave_out(reason, _booleans(pc.is_in(ids, value_set=pa.array(sorted(some), pa.string()))))
    for status in sorted(set(pc.unique(statuses).to_pylist()) - {"ok"}, key=str):
        leave_out(str(status), _booleans(pc.equal(statuses, status)))
    leave_out("unpaired", ~found)
    if len(predicted):
        leave_out("not_predicted", ~served(predicted)[rows])
    extra = len(predicted) - int(_booleans(pc.is_in(others, value_set=ids)).sum())
    if extra:
        reasons["only_predicted"] = extra
    mine = np.flatnonzero(left)
    mine = mine[np.argsort(np.nan_to_num(measured.start[mine]), kind="stable")]
    return Pairing(mine, rows[mine], reasons)


def served(trace: Trace) -> npt.NDArray[np.bool_]:
    """Which requests were served to the end."""
    return _booleans(pc.equal(_column(trace, "status"), "ok"))


def _column(trace: Trace, name: str) -> pa.Array:
    return trace.requests.column(name).combine_chunks()


def _booleans(values: pa.Array) -> npt.NDArray[np.bool_]:
    return np.asarray(pc.fill_null(values, False).to_numpy(zero_copy_only=False), dtype=np.bool_)
