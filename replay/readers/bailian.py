"""Alibaba's Bailian (Qwen) usage traces: JSON lines with the blocks of every prompt and the turns of every chat.

``chat_id``, ``parent_chat_id`` (-1: the first turn), ``timestamp`` (s), ``input_length`` (the whole context),
``output_length``, ``type``, ``turn``, and ``hash_ids`` of blocks of 16 tokens. Format:
alibaba-edu/qwen-bailian-usagetraces-anon.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from replay.readers.opening import head
from replay.readers.streaming import Column, gathered, json_blocks, objects_of
from replay.readers.workloads import from_first, prompt_hashes, workload_trace
from replay.trace import Trace

FORMAT = "bailian-jsonl"
REQUESTS_FILE = ""
BLOCK_SIZE = 16
COLUMNS = (
    Column("chat_id", "whole"),
    Column("parent_chat_id", "whole"),
    Column("timestamp", "seconds"),
    Column("input_length", "tokens"),
    Column("output_length", "tokens"),
    Column("hash_ids", "ids"),
)
Ints = npt.NDArray[np.int64]


def detect(path: Path) -> bool:
    """Whether a file is of this format."""
    rows = objects_of(head(path)) if path.is_file() else []
    return bool(rows) and all({one.name for one in COLUMNS} <= set(row) for row in rows)


def read(path: Path) -> Trace:
    """Read a workload; ``session`` is the chat's first turn.

    Raises
    ------
    InputError
        Naming file, line and field of what cannot be used.
    """
    found, _ = gathered(json_blocks(path, COLUMNS))
    arrival, origin = from_first(found["timestamp"])
    return workload_trace(
        path,
        FORMAT,
        {
            "id": pa.array(found["chat_id"]).cast(pa.string()),
            "session": pa.array(first_turns(found["chat_id"], found["parent_chat_id"])).cast(pa.string()),
            "arrival": arrival,
            "prompt_tokens": found["input_length"],
            "output_tokens": found["output_length"],
            "block_hashes": prompt_hashes(found["hash_ids"], found["input_length"], BLOCK_SIZE, path),
        },
        {
            "session": "reconstructed: the first turn that parent_chat_id leads to",
            "arrival": "measured: by the service",
            "prompt_tokens": "measured",
            "output_tokens": "measured",
            "block_hashes": "measured: hash_ids, chained",
        },
        clock={"origin": origin, "note": "seconds from the first request"},
        block_size=BLOCK_SIZE,
    )


def first_turns(chat: Ints, parent: Ints) -> Ints:
    """Return the first turn of each turn's chat, or the earliest known ancestor.

    Parameters
    ----------
    chat, parent : array, shape (n,)
        Ids; a parent that is negative marks a first turn, one that is not among the ids is an ancestor of its own.

    Notes
    -----
    Pointers are doubled: a chat of 2^k turns takes k rounds, and a circle ends after 64.
    """
    order = np.argsort(chat, kind="stable")
    place = np.minimum(np.searchsorted(chat[order], parent), max(len(chat) - 1, 0))
    above = order[place]
    known = (parent >= 0) & (chat[above] == parent)
    up = np.where(known, above, np.arange(len(chat)))
    for _ in range(64):
        further = up[up]
        if (further == up).all():
            break
        up = further
    return np.where((parent[up] >= 0) & ~known[up], parent[up], chat[up])
