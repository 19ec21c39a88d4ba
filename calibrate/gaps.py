"""Inter-token gaps of requests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from calibrate.intervals import Pool, Rows
from replay.trace import Trace


@dataclass(frozen=True)
class Gaps:
    """Seconds between neighbouring token times of each request, and how many each has, shape (requests,)."""

    pool: Pool
    counts: npt.NDArray[np.int64]


def gaps_of(trace: Trace, rows: Rows) -> Gaps:
    """Return the gaps of some rows of a trace, whose places are those in ``rows``."""
    times = trace.requests.column("token_times").take(pa.array(rows))
    lengths = pc.fill_null(pc.list_value_length(times), 0).to_numpy().astype(np.int64)
    flat = np.asarray(pc.list_flatten(times).to_numpy(), dtype=np.float64)
    owner = np.repeat(np.arange(len(rows), dtype=np.intp), lengths)
    inside = owner[1:] == owner[:-1]
    return Gaps(Pool(owner[1:][inside], np.diff(flat)[inside]), np.maximum(lengths - 1, 0))
