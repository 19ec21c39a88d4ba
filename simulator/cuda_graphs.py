"""Batch sizes for which vLLM captures CUDA graphs. A step's tokens are padded to the next; larger steps run without.

Source: vLLM ``CompilationConfig`` and ``VllmConfig._set_cudagraph_sizes`` (0.10 to 0.32), for engines without
speculative decoding. Not covered: the larger graphs of the Blackwell data-centre family from 0.28 on.
"""

from __future__ import annotations

from simulator.engine_config import EngineConfig

LARGEST = 512


def capture_sizes(config: EngineConfig) -> tuple[int, ...]:
    """Captured sizes in tokens, ascending; none if graphs are switched off (``enforce_eager``)."""
    if config.enforce_eager:
        return ()
    largest = min(2 * config.max_num_seqs, LARGEST, config.max_num_batched_tokens)
    fine = config.version <= (0, 10)
    sizes = {1, 2, 4, *range(8, largest + 1, 8)} if fine else {1, 2, 4, *range(8, min(largest, 248) + 1, 8)}
    if not fine:
        sizes |= set(range(256, largest + 1, 16))
    return tuple(sorted(size for size in sizes if size <= largest))
