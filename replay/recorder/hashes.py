"""Salted chained hashes of a prompt's KV blocks: equal prompts are seen to be equal, and nothing else is."""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

SALT = "SERVECAL_RECORDING_SALT"
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_POSITIVE = (1 << 63) - 1
_SLICE = 256
"""Blocks between two offers of the interpreter to the engine's thread."""


def salt() -> bytes:
    """Return the key of the hashes: of ``SERVECAL_RECORDING_SALT``, else one that all processes of this boot share.

    The boot's random id is never written to a recording, so nobody can try out prompts against the hashes.
    """
    given = os.environ.get(SALT)
    if given:
        return blake2b(given.encode()).digest()
    try:
        return blake2b(b"servecal" + _BOOT.read_bytes()).digest()
    except OSError:
        return os.urandom(64)


def chain(
    tokens: Sequence[int],
    block_size: int,
    key: bytes,
    extra: Sequence[tuple[int, int, str]] = (),
    before: Sequence[int] = (),
) -> list[int]:
    """Return the hash of every full block of ``block_size`` tokens, each standing for all before it too.

    Parameters
    ----------
    tokens : sequence of int
    block_size : int
    key : bytes
        At most 64 bytes.
    extra : sequence of (begin, end, name)
        What else the tokens ``begin`` to ``end`` stand for: an image, a LoRA adapter, a cache salt.
    before : sequence of int
        Hashes of the blocks before ``tokens``, which this chain goes on from.
    """
    data = array("q", tokens).tobytes()
    width = 8 * block_size
    hashes = []
    parent = before[-1].to_bytes(8, "little") if before else b""
    for block, begin in enumerate(range(0, len(data) - width + 1, width), len(before)):
        first = block * block_size
        named = [f"{start - first}:{name}" for start, end, name in extra if start < first + block_size and end > first]
        text = parent + data[begin : begin + width] + "\0".join(named).encode()
        hashes.append(int.from_bytes(blake2b(text, digest_size=8, key=key).digest(), "little") & _POSITIVE)
        parent = hashes[-1].to_bytes(8, "little")
        if block % _SLICE == _SLICE - 1:
            time.sleep(0)
    return hashes


def extra_of(request: Any) -> list[tuple[int, int, str]]:
    """Return what of a vLLM request, besides its token ids, decides which cached blocks it may use."""
    everything = 1 << 62
    extra = []
    lora = getattr(request, "lora_request", None)
    if lora is not None:
        extra.append((0, everything, f"lora:{lora.lora_name}"))
    if getattr(request, "cache_salt", None):
        extra.append((0, 1, f"salt:{request.cache_salt}"))
    for feature in getattr(request, "mm_features", None) or ():
        place = feature.mm_position
        extra.append((place.offset, place.offset + place.length, f"mm:{feature.identifier}"))
    # vLLM before 0.11 kept them in two lists.
    places = getattr(request, "mm_positions", None) or ()
    for place, name in zip(places, getattr(request, "mm_hashes", None) or (), strict=False):
        extra.append((place.offset, place.offset + place.length, f"mm:{name}"))
    return extra
