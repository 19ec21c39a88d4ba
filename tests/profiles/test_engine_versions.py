from __future__ import annotations

import pytest

from simulator.engine_config import Semantics, default_batch_limits, parse_version, resolve_engine_config
from simulator.errors import SimulationError

SWITCHES = (
    ("async_scheduling_default", (0, 14)),
    ("reserve_full_isl", (0, 19)),
    ("watermark", (0, 24)),
    ("unhashed_blocks_first", (0, 24)),
    ("lone_request_ignores_threshold", (0, 31)),
    ("capped_requests_skip_the_last_step", (0, 11)),
    ("victims_leave_the_step", (0, 11)),
    ("victims_above_move_the_place", (0, 28)),
    ("aborts_before_update", (0, 13)),
)


@pytest.mark.parametrize("minor", [10, 11, 12, 13, 14, 16, 19, 20, 24, 28, 30, 31, 32])
def test_each_behaviour_begins_with_its_version(minor):
    semantics = Semantics.of((0, minor))
    assert {name: getattr(semantics, name) for name, _ in SWITCHES} == {
        name: (0, minor) >= since for name, since in SWITCHES
    }


def test_later_major_versions_behave_like_the_newest():
    assert Semantics.of((1, 0)) == Semantics.of((0, 32))


@pytest.mark.parametrize(
    ("text", "version"), [("0.19.0", (0, 19)), ("v0.19.1rc1", (0, 19)), (" 0.6.3.post1 ", (0, 6)), ("1.2", (1, 2))]
)
def test_versions_are_read_as_vllm_writes_them(text, version):
    assert parse_version(text) == version


@pytest.mark.parametrize("text", ["", "latest", "19", "x0.19"])
def test_text_that_is_no_version_is_refused(text):
    with pytest.raises(SimulationError, match=r"expected something like '0\.19\.0'"):
        parse_version(text)


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.10.0", (False, False, 0.9)),
        ("0.12.0", (False, False, 0.9)),
        ("0.16.0", (True, False, 0.9)),
        ("0.19.0", (True, True, 0.9)),
        ("0.24.0", (True, True, 0.92)),
        ("0.32.0", (True, True, 0.92)),
    ],
)
def test_defaults_are_those_of_the_version(version, expected):
    config = resolve_engine_config({}, version=version).config
    assert (config.async_scheduling, config.scheduler_reserve_full_isl, config.gpu_memory_utilization) == expected


def test_arguments_that_a_version_does_not_have_are_without_effect():
    given = {"watermark": 0.1, "scheduler_reserve_full_isl": True}
    old, new = (resolve_engine_config(given, version=version).config for version in ("0.16.0", "0.24.0"))
    assert (old.watermark, old.scheduler_reserve_full_isl) == (0.0, False)
    assert (new.watermark, new.scheduler_reserve_full_isl) == (0.1, True)


GIB = 2**30


@pytest.mark.parametrize(
    ("version", "gib", "name", "server", "offline"),
    [
        ((0, 28), 178, "b200", (16384, 1024), (16384, 1024)),
        ((0, 28), 192, "mi300x", (16384, 1024), (16384, 1024)),
        ((0, 24), 178, "b200", (8192, 1024), (16384, 1024)),
        ((0, 32), 79, "h100-sxm", (8192, 1024), (16384, 1024)),
        ((0, 10), 79, "h100-sxm", (8192, 1024), (16384, 1024)),
        ((0, 32), 140, "h200", (8192, 1024), (16384, 1024)),
        ((0, 32), 79, "a100-80g", (2048, 256), (8192, 256)),
        ((0, 32), 79, "NVIDIA A100-SXM4-80GB", (2048, 256), (8192, 256)),
        ((0, 32), 44, "l40s", (2048, 256), (8192, 256)),
        ((0, 32), 23, "rtx-4090", (2048, 256), (8192, 256)),
    ],
)
def test_default_batch_limits_by_device(version, gib, name, server, offline):
    assert default_batch_limits(version, gib * GIB, name, api_server=True) == server
    assert default_batch_limits(version, gib * GIB, name, api_server=False) == offline


def limits(**given) -> tuple[int, int]:
    config = resolve_engine_config(given, version="0.19.0", device_memory=79 * GIB, device_name="h100-sxm").config
    return config.max_num_batched_tokens, config.max_num_seqs


def test_default_batch_limits_are_clamped_to_each_other_as_vllm_does():
    assert limits() == (8192, 1024)
    # No more tokens than all sequences can have, no more sequences than tokens.
    assert limits(max_num_seqs=4, max_model_len=512) == (2048, 4)
    assert limits(max_num_batched_tokens=100) == (100, 100)
    # A prompt must fit a step where it may not be split.
    assert limits(enable_chunked_prefill=False, max_model_len=32768) == (32768, 1024)
    # What is given is kept.
    assert limits(max_num_batched_tokens=100, max_num_seqs=700) == (100, 700)


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ({"max_num_seqs": "64"}, "max_num_seqs", 64),
        ({"policy": "priority"}, "scheduling_policy", "priority"),
        ({"enable_prefix_caching": "False"}, "enable_prefix_caching", False),
        ({"gpu_memory_utilization": 1}, "gpu_memory_utilization", 1.0),
        ({"num_gpu_blocks_override": 99}, "num_gpu_blocks", 99),
        ({"block_size": None}, "block_size", 16),
        ({"a flag of tomorrow": 3}, "block_size", 16),
    ],
)
def test_arguments_are_taken_under_vllms_names_and_aliases_and_in_its_types(given, name, value):
    found = resolve_engine_config(given, version="0.19.0")
    assert getattr(found.config, name) == value
    assert (name in found.assumed) == (name == "block_size")


@pytest.mark.parametrize(
    "given",
    [{"max_num_seqs": "many"}, {"max_num_seqs": 2.5}, {"max_num_seqs": True}, {"enable_prefix_caching": 1}],
)
def test_value_of_another_type_than_vllms_is_refused(given):
    ((name, value),) = given.items()
    with pytest.raises(SimulationError) as caught:
        resolve_engine_config(given, version="0.19.0")
    assert f"engine.{name}={value!r}: expected " in str(caught.value)
