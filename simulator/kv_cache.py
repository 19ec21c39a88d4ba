"""Paged KV cache with prefix sharing, block by block as vLLM keeps it.

Source of the rules: vLLM ``KVCacheManager.allocate_slots`` and ``BlockPool`` for one group of full-attention
layers. Block 0 is vLLM's null block and never handed out. A block that no request refers to is *free*, even
while it still carries a hash: it serves prefix hits until it is taken from the front of the free list.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from simulator.request import ServedRequest


class KVCache:
    """Blocks, their reference counts, and the hashes under which they can be found.

    Parameters
    ----------
    num_gpu_blocks : int
        As vLLM reports it, the null block included.
    block_size : int
        Tokens per block.
    max_model_len : int
        Longest sequence, in tokens.
    enable_prefix_caching : bool
        Whether full blocks are registered under their hashes and looked up.
    unhashed_blocks_first : bool
        Freed blocks without a hash go to the front of the free list (vLLM >= 0.24) instead of its tail.
    """

    def __init__(
        self,
        num_gpu_blocks: int,
        block_size: int,
        max_model_len: int,
        *,
        enable_prefix_caching: bool = True,
        unhashed_blocks_first: bool = True,
    ) -> None:
        self.num_gpu_blocks = num_gpu_blocks
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.enable_prefix_caching = enable_prefix_caching
        self.unhashed_blocks_first = unhashed_blocks_first
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_gpu_blocks))
        self._references = [0] * num_gpu_blocks
        self._hash_of: list[int | None] = [None] * num_gpu_blocks
        self._blocks_of: dict[int, dict[int, None]] = {}
        self._next_private_hash = -1

    @property
    def num_free_blocks(self) -> int:
        """Blocks that an allocation may take, cached but unreferenced ones included."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the usable blocks that requests hold, 0 to 1, as vLLM reports it."""
        usable = self.num_gpu_blocks - 1
        return 1.0 - len(self._free) / usable if usable else 0.0

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens of one sequence."""
        return -(-min(num_tokens, self.max_model_len) // self.block_size)

    def cached_prefix(self, served: ServedRequest) -> list[int]:
        """Blocks of the longest cached prefix, full blocks only, leaving a token to compute."""
        hits: list[int] = []
        if not self.enable_prefix_caching:
            return hits
        most = (served.num_tokens - 1) // self.block_size
        for block_hash in served.block_hashes[:most]:
            blocks = self._blocks_of.get(block_hash)
            if not blocks:
                break
            hits.append(next(iter(blocks)))
        return hits

    def allocate(
        self,
        served: ServedRequest,
        num_new_tokens: int,
        hits: Sequence[int] = (),
        *,
        whole_sequence_must_fit: bool = False,
        headroom: int = 0,
    ) -> bool:
        """Give a request the blocks for its next tokens, or change nothing and return False.

        Parameters
        ----------
        served : ServedRequest
            Holds ``served.blocks`` already; none if it waits.
        num_new_tokens : int
            Tokens to compute beyond ``num_computed_tokens`` and the hits.
        hits : sequence of int
            Cached blocks that it adopts (``cached_prefix``).
        whole_sequence_must_fit : bool
            Require room for all known tokens, not only for this chunk (``scheduler_reserve_full_isl``).
        headroom : int
            Blocks that must stay free besides (``watermark``).
        """
        held = len(served.blocks) + len(hits)
        revived = sum(1 for block in hits if not self._references[block])
        free = len(self._free) - headroom - revived
        if whole_sequence_must_fit and self.blocks_for(served.num_tokens) - held > free:
            return False
        end = served.num_computed_tokens + len(hits) * self.block_size + num_new_tokens
        wanted = max(0, self.blocks_for(end) - held)
        if wanted > free:
            return False
        for block in hits:
            if not self._references[block]:
                del self._free[block]
            self._references[block] += 1
        if hits:
            served.blocks.extend(hits)
            served.num_hashed_blocks = len(served.blocks)
        for _ in range(wanted):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._references[block] = 1
            served.blocks.append(block)
        self.register(served, min(end, served.num_tokens))
        self._note_next_event(served)
        return True

    def register(self, served: ServedRequest, num_tokens: int) -> None:
        """Make the full blocks among the first ``num_tokens`` tokens findable by their hashes."""
        full = num_tokens // self.block_size
        if not self.enable_prefix_caching or full <= served.num_hashed_blocks:
            return
        hashes = served.block_hashes
        while len(hashes) < full:
            hashes.append(self._next_private_hash)
            self._next_private_hash -= 1
        for position in range(served.num_hashed_blocks, full):
            block = served.blocks[position]
            self._hash_of[block] = hashes[position]
            self._blocks_of.setdefault(hashes[position], {})[block] = None
        served.num_hashed_blocks = full
        self._note_next_event(served)

    def _note_next_event(self, served: ServedRequest) -> None:
        """Say up to how many tokens neither ``allocate`` nor ``register`` would change anything."""
        held = len(served.blocks) * self.block_size
        if self.enable_prefix_caching:
            held = min(held, (served.num_hashed_blocks + 1) * self.block_size - 1)
        served.block_event = held

    def free(self, served: ServedRequest) -> None:
        """Drop a request's references, its tail first, so that its prefix is evicted last."""
        for block in reversed(served.blocks):
            self._references[block] -= 1
            if self._references[block]:
                continue
            self._free[block] = None
            if self.unhashed_blocks_first and self._hash_of[block] is None:
                self._free.move_to_end(block, last=False)
        served.blocks.clear()
        served.num_hashed_blocks = 0
        served.block_event = 0

    def _forget(self, block: int) -> None:
        block_hash = self._hash_of[block]
        if block_hash is None:
            return
        self._hash_of[block] = None
        blocks = self._blocks_of[block_hash]
        del blocks[block]
        if not blocks:
            del self._blocks_of[block_hash]
