"""What vLLM's versions schedule differently shows in the schedule, each switch on its own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from simulator.engine import Engine
from simulator.engine_config import EngineConfig, resolve_engine_config
from simulator.kv_cache import KVCache
from simulator.request import Request, ServedRequest


class Steady:
    components = ("step",)

    def step(self, batch):
        return (0.01,)


BASE = EngineConfig(num_gpu_blocks=100, max_model_len=4096, async_scheduling=False)


def first_chunk(config: EngineConfig) -> int:
    chunks = []
    Engine(config, Steady()).run(
        [Request("only", 0.0, 100, 2)],
        observe=lambda iteration: chunks.append(iteration.step.items[0].num_scheduled_tokens),
    )
    return chunks[0]


def test_a_lone_long_prompt_ignores_the_threshold_from_0_31_on():
    config = replace(BASE, long_prefill_token_threshold=32)
    assert first_chunk(replace(config, version=(0, 30))) == 32
    assert first_chunk(replace(config, version=(0, 31))) == 100


def test_defaults_follow_the_version():
    def defaults(version: str) -> EngineConfig:
        return resolve_engine_config({}, version=version).config

    assert not defaults("0.12.0").async_scheduling
    assert defaults("0.16.0").async_scheduling
    assert not defaults("0.16.0").scheduler_reserve_full_isl
    assert defaults("0.19.0").scheduler_reserve_full_isl
    assert defaults("0.19.0").gpu_memory_utilization == 0.9
    assert defaults("0.24.0").gpu_memory_utilization == 0.92


def test_options_that_a_version_does_not_have_stay_off():
    old = resolve_engine_config({"watermark": 0.1, "scheduler_reserve_full_isl": True}, version="0.12.0").config
    assert old.watermark == 0.0
    assert not old.scheduler_reserve_full_isl


def cached_tokens_left(unhashed_blocks_first: bool) -> int:
    """Cached tokens of an ended request with one full (hashed) and one partial block, one other block taken since."""
    cache = KVCache(5, 4, 64, unhashed_blocks_first=unhashed_blocks_first)
    ended = ServedRequest.enter(Request("ended", 0.0, 6, 1, block_hashes=[7]), 0, 64)
    assert cache.allocate(ended, 6)
    cache.free(ended)
    # Two blocks were never used: the third is the partial one, or the full one if that was freed before.
    following = ServedRequest.enter(Request("following", 0.0, 12, 1), 1, 64)
    assert cache.allocate(following, 12)
    assert cache.num_free_blocks == 1
    return 4 * len(cache.cached_prefix(ServedRequest.enter(Request("alike", 0.0, 6, 1, block_hashes=[7]), 2, 64)))


def test_a_cached_block_outlives_a_freed_one_without_a_hash_in_any_version():
    assert cached_tokens_left(unhashed_blocks_first=True) == 4
    assert cached_tokens_left(unhashed_blocks_first=False) == 4


@pytest.mark.parametrize(("unhashed_first", "kept"), [(True, 4), (False, 0)])
def test_freed_blocks_without_a_hash_are_reused_first_from_0_24_on(unhashed_first, kept):
    cache = KVCache(4, 4, 64, unhashed_blocks_first=unhashed_first)
    full = ServedRequest.enter(Request("full", 0.0, 4, 1, block_hashes=[7]), 0, 64)
    partial = ServedRequest.enter(Request("partial", 0.0, 6, 1, block_hashes=[8]), 1, 64)
    assert cache.allocate(full, 4)
    assert cache.allocate(partial, 6)
    cache.free(full)
    cache.free(partial)
    following = ServedRequest.enter(Request("following", 0.0, 4, 1), 2, 64)
    assert cache.allocate(following, 4)
    alike = ServedRequest.enter(Request("alike", 0.0, 6, 1, block_hashes=[7]), 3, 64)
    assert 4 * len(cache.cached_prefix(alike)) == kept
