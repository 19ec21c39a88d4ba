"""Paged KV cache with prefix sharing, in the order in which vLLM keeps and evicts its blocks.

Source of the rules: vLLM ``KVCacheManager.allocate_slots`` and ``BlockPool`` for one group of full-attention
layers. Block 0 is vLLM's null block and never handed out. A block that no request refers to is *free*, even
while it still carries a hash: it serves prefix hits until it is taken from the front of the free list.

Only blocks that somebody may look up are kept one by one, under numbers of their own. All others are alike, so
they are counts: in a request, and in runs of the free list. A block whose content nobody else can have becomes
findable when its request is preempted, which then is the only one to look it up.
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

    Attributes
    ----------
    num_free_blocks : int
        Blocks that an allocation may take, cached but unreferenced ones included.
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
        self.num_free_blocks = num_gpu_blocks - 1
        # The free list: so many blocks alike, then single findable ones (numbers > 0, worth 1) and runs of blocks
        # alike (numbers < 0, worth their length).
        self._front = self.num_free_blocks
        self._free: OrderedDict[int, int] = OrderedDict()
        self._references: dict[int, int] = {}
        self._hash_of: dict[int, int] = {}
        self._blocks_of: dict[int, dict[int, None]] = {}
        self._last_block = 0
        self._last_run = 0
        self._last_private_hash = 0

    @property
    def usage(self) -> float:
        """Share of the usable blocks that requests hold, 0 to 1, as vLLM reports it."""
        usable = self.num_gpu_blocks - 1
        return 1.0 - self.num_free_blocks / usable if usable else 0.0

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
            Holds ``served.num_blocks`` already; none if it waits.
        num_new_tokens : int
            Tokens to compute beyond ``num_computed_tokens`` and the hits.
        hits : sequence of int
            Cached blocks that it adopts (``cached_prefix``).
        whole_sequence_must_fit : bool
            Require room for all known tokens, not only for this chunk (``scheduler_reserve_full_isl``).
        headroom : int
            Blocks that must stay free besides (``watermark``).
        """
        held = served.num_blocks + len(hits)
        revived = sum(1 for block in hits if not self._references[block])
        free = self.num_free_blocks - headroom - revived
        if whole_sequence_must_fit and self.blocks_for(served.num_tokens) - held > free:
            return False
        end = served.num_computed_tokens + len(hits) * self.block_size + num_new_tokens
        wanted = max(0, self.blocks_for(end) - held)
        if wanted > free:
            return False
        if hits:
            self._adopt(served, hits)
        self.take(wanted)
        served.num_blocks = held + wanted
        self.register(served, min(end, served.num_tokens))
        self.note_next_event(served)
        return True

    def _adopt(self, served: ServedRequest, hits: Sequence[int]) -> None:
        for block in hits:
            if not self._references[block]:
                del self._free[block]
                self.num_free_blocks -= 1
            self._references[block] += 1
        served.blocks.extend(hits)
        served.num_hashed_blocks = len(served.blocks)

    def take(self, wanted: int) -> None:
        """Take so many blocks, no more than are free, from the front of the free list."""
        while self._front < wanted:
            first, length = self._free.popitem(last=False)
            if first > 0:
                self._forget(first)
            self._front += length
        self._front -= wanted
        self.num_free_blocks -= wanted

    def register(self, served: ServedRequest, num_tokens: int) -> None:
        """Make the full blocks among the first ``num_tokens`` tokens findable by their hashes."""
        full = num_tokens // self.block_size
        if not self.enable_prefix_caching or full <= served.num_hashed_blocks:
            return
        served.num_hashed_blocks = full
        if len(served.blocks) < len(served.block_hashes):
            self._make_findable(served, min(full, len(served.block_hashes)))
        self.note_next_event(served)

    def _make_findable(self, served: ServedRequest, full: int) -> None:
        """Keep the first ``full`` blocks of a request one by one from now on."""
        for block_hash in served.block_hashes[len(served.blocks) : full]:
            self._last_block += 1
            block = self._last_block
            served.blocks.append(block)
            self._references[block] = 1
            self._hash_of[block] = block_hash
            self._blocks_of.setdefault(block_hash, {})[block] = None

    def note_next_event(self, served: ServedRequest) -> None:
        """Say up to how many tokens neither ``allocate`` nor ``register`` would change anything."""
        held = served.num_blocks * self.block_size
        if self.enable_prefix_caching:
            held = min(held, (served.num_hashed_blocks + 1) * self.block_size - 1)
        served.block_event = held

    def free(self, served: ServedRequest, *, returns: bool = False) -> None:
        """Drop a request's references, its tail first, so that its prefix is evicted last.

        ``returns`` says that it was preempted: then it will look up also what nobody else has.
        """
        hashed = served.num_hashed_blocks
        if returns and hashed > len(served.blocks):
            for _ in range(len(served.block_hashes), hashed):
                self._last_private_hash -= 1
                served.block_hashes.append(self._last_private_hash)
            self._make_findable(served, hashed)
        alike, unhashed = hashed - len(served.blocks), served.num_blocks - hashed
        if self.unhashed_blocks_first:
            self._front += unhashed
        else:
            alike += unhashed
        if alike:
            self._last_run -= 1
            self._free[self._last_run] = alike
        self.num_free_blocks += served.num_blocks - len(served.blocks)
        for block in reversed(served.blocks):
            self._references[block] -= 1
            if not self._references[block]:
                self._free[block] = 1
                self.num_free_blocks += 1
        served.blocks.clear()
        served.num_blocks = 0
        served.num_hashed_blocks = 0
        served.block_event = 0

    def _forget(self, block: int) -> None:
        del self._references[block]
        block_hash = self._hash_of.pop(block)
        blocks = self._blocks_of[block_hash]
        del blocks[block]
        if not blocks:
            del self._blocks_of[block_hash]
