"""One simulated run as several witnesses would have seen it, with clocks and delays that are known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from replay.run import replay
from replay.trace import TIMELINE, Trace, requests_table
from tests.synthetic import TRUTH, deployment, with_seconds, workload

ENGINE_BOOT = 86_000.0
"""What the engine's monotonic clock shows at second 0 of the run."""
WALL = 1_760_000_000.0


def engine(seed=1, count=80, rate=8.0, prompts=(20, 900), outputs=(5, 60), ids="cmpl-bench-3f2a9c01-{}-0", **meta):
    """The run as the engine stamped it."""
    random = np.random.default_rng(seed)
    sent = workload(random, count, rate, prompts=prompts, outputs=outputs)
    served = replay(sent, with_seconds(deployment(), TRUTH)).predicted
    columns = {name: served.requests.column(name).combine_chunks() for name in served.requests.column_names}
    # Requests were numbered as they were sent, and arrive in that order.
    columns["id"] = [ids.format(row) for row in range(count)]
    columns["token_times"] = None
    described = {
        "name": "engine",
        "source": {"format": "recording", "files": [{"name": "recording.jsonl", "sha256": "0" * 64}]},
        "model": "llama-3.2-1b",
        "engine": {"name": "vllm", "version": "0.32.0", "arguments": {"max_num_seqs": 16}},
        "vantage": "engine",
        "clock": {"kind": "run", "origin": ENGINE_BOOT},
        "columns": {},
        "notes": [],
    }
    return Trace(requests_table({k: v for k, v in columns.items() if v is not None}, count), described | meta)


@dataclass(frozen=True)
class Client:
    """A client whose clock reads ``(t - offset)``, slower by ``drift``, when the engine's reads t.

    Requests take ``way_in`` and tokens ``way_out`` seconds at least, exponentially more on average by ``jitter``.
    """

    offset: float = 12.5
    drift: float = 0.0
    way_in: float = 0.002
    way_out: float = 0.001
    jitter: float = 0.003

    def reads(self, times):
        """The client's clock at instants of the engine's: t = c + offset + drift * c, solved for c."""
        return (times - self.offset) / (1 + self.drift)

    def sees(self, run, random, keep=None, order=None, ids="{}", **meta):
        """The run as this client saw it: some of its requests, in some order."""
        count = len(run)
        arrival, first, last = (run.column(name) for name in ("arrival", "first_token", "last_token"))
        sent = self.reads(arrival - self.way_in - random.exponential(self.jitter, count) * (self.jitter > 0))
        back = self.way_out + random.exponential(self.jitter, count) * (self.jitter > 0)
        rows = np.arange(count) if keep is None else np.asarray(keep)
        rows = rows if order is None else rows[np.asarray(order)]
        columns = {
            "id": [ids.format(row) for row in rows],
            "status": ["ok"] * len(rows),
            "arrival": sent[rows],
            "first_token": self.reads(first + back)[rows],
            "last_token": self.reads(last + back)[rows],
            "prompt_tokens": run.column("prompt_tokens")[rows].astype(int).tolist(),
            "output_tokens": run.column("output_tokens")[rows].astype(int).tolist(),
        }
        described = {
            "name": "client",
            "source": {"format": "vllm-bench", "files": [{"name": "client.json", "sha256": "1" * 64}]},
            "model": "llama-3.2-1b",
            "engine": {"name": "vllm", "version": None, "arguments": {}},
            "vantage": "client",
            "clock": {"kind": "run", "origin": 0.0},
            "columns": {},
            "notes": [],
        }
        return Trace(requests_table(columns, len(rows)), described | meta)


def gauges(run, every=10.0, origin=WALL, rounded=True, before=30.0, after=30.0, zone=0.0, **meta):
    """The run's running requests as a server log tells them: every so often, in whole seconds of the wall clock."""
    begin, end = run.column("scheduled"), run.column("last_token")
    times = np.arange(begin.min() - before + 0.37, end.max() + after, every)
    running = np.array([np.sum((begin <= time) & (end > time)) for time in times], dtype=float)
    waiting = np.array([np.sum((run.column("arrival") <= time) & (begin > time)) for time in times], dtype=float)
    wall = times + origin + zone
    columns = {"time": np.floor(wall) if rounded else wall, "running": running, "waiting": waiting}
    table = pa.table(
        [pa.array(columns.get(one.name, np.full(len(times), np.nan)), one.type, from_pandas=True) for one in TIMELINE],
        schema=TIMELINE,
    )
    described = {
        "name": "server",
        "source": {"format": "vllm-log", "files": [{"name": "server.log", "sha256": "2" * 64}]},
        "engine": {"name": "vllm", "version": "0.32.0", "arguments": {"num_gpu_blocks": 4000, "max_num_seqs": 16}},
        "clock": {"kind": "run", "origin": 0.0},
        "notes": [],
    }
    return Trace(requests_table({}, 0), described | meta, timeline=table), running, waiting
