"""Chained hashes of KV blocks from prompt token ids, and between block sizes.

A chained hash stands for a block's tokens and everything before them, as in vLLM's prefix cache; the values
are ours (64-bit BLAKE2b, top bit clear), equal exactly where vLLM's would be.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from profiles.errors import InputError

_POSITIVE = (1 << 63) - 1


def chain(tokens: Sequence[int], block_size: int) -> list[int]:
    """Return the hash of every full block of ``block_size`` tokens."""
    data = np.asarray(tokens, dtype=np.int64).astype("<i8").tobytes()
    width = 8 * block_size
    hashes = []
    parent = b""
    for begin in range(0, len(data) - width + 1, width):
        parent = blake2b(parent + data[begin : begin + width], digest_size=8).digest()
        hashes.append(int.from_bytes(parent, "little") & _POSITIVE)
    return hashes


def at_block_size(hashes: Sequence[int], have: int, want: int) -> list[int]:
    """Convert hashes of blocks of ``have`` tokens to blocks of ``want`` tokens.

    Larger blocks take every k-th hash, smaller ones are derived from the block that holds them.

    Raises
    ------
    InputError
        If neither size divides the other.
    """
    if want == have:
        return list(hashes)
    if want % have == 0:
        step = want // have
        return list(hashes[step - 1 :: step])
    if have % want == 0:
        own = np.asarray(hashes, dtype=np.uint64)[:, None]
        parts = _mixed(own + _mixed(np.arange(1, have // want + 1, dtype=np.uint64)))
        return [int(one) for one in (parts & np.uint64(_POSITIVE)).reshape(-1).tolist()]
    raise InputError(
        f"prompt hashes cover blocks of {have} tokens, which neither divide nor are divided by {want}",
        field="engine.block_size",
    )


def chained_ids(ids: pa.ListArray, keep: npt.NDArray[np.int64]) -> pa.ListArray:
    """Chain ids of blocks, so that two are equal only where all before them are.

    Parameters
    ----------
    ids : pyarrow.ListArray of int64, shape (n,)
        Ids of the blocks of each prompt, without nulls.
    keep : array, shape (n,)
        How many of its blocks each prompt keeps: the full ones.
    """
    begin = ids.offsets.to_numpy()[:-1].astype(np.int64)
    values = ids.values.to_numpy().view(np.uint64)
    offsets = np.concatenate([[0], np.cumsum(keep)]).astype(np.int32)
    chained = np.empty(offsets[-1], dtype=np.uint64)
    # Longest first: the prompts that have a k-th block are then the first so many.
    order = np.argsort(-keep, kind="stable")
    active = np.searchsorted(-keep[order], -np.arange(keep.max(initial=0)), side="left")
    parent = np.zeros(len(keep), dtype=np.uint64)
    for place, count in enumerate(active):
        rows = order[:count]
        parent[rows] = _mixed(_mixed(parent[rows]) + values[begin[rows] + place])
        chained[offsets[rows] + place] = parent[rows]
    hashes = (chained & np.uint64(_POSITIVE)).view(np.int64)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(hashes))


def salted(hashes: pa.Array, salt: int) -> pa.Array:
    """Return other hashes for the same blocks: two sources that number blocks alike then share nothing.

    Parameters
    ----------
    hashes : pyarrow.Array of int64, without nulls
    salt : int
        At least 0; 0 leaves them as they are.
    """
    if not salt:
        return hashes
    own = hashes.to_numpy(zero_copy_only=False).astype(np.uint64)
    return pa.array(
        (_mixed(own + _mixed(np.array([salt + 2**40], dtype=np.uint64))) & np.uint64(_POSITIVE)).view(np.int64)
    )


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's step (Steele, Lea, Flood 2014): every bit of a value moves half the bits of its hash."""
    with np.errstate(over="ignore"):
        mixed = values + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(mixed ^ (mixed >> np.uint64(31)), dtype=np.uint64)
