"""Chained hashes of KV blocks from prompt token ids, and between block sizes.

A chained hash stands for a block's tokens and everything before them, as in vLLM's prefix cache; the values
are ours (64-bit BLAKE2b, top bit clear), equal exactly where vLLM's would be.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

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
        parts = range(have // want)
        return [_part(one, part) for one in hashes for part in parts]
    raise InputError(
        f"prompt hashes cover blocks of {have} tokens, which neither divide nor are divided by {want}",
        field="engine.block_size",
    )


def _part(one: int, part: int) -> int:
    digest = blake2b(one.to_bytes(8, "little") + part.to_bytes(4, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little") & _POSITIVE
