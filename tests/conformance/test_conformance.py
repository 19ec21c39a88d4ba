"""The simulated schedule is vLLM's."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from calibrate.conformance import check_golden, check_recording
from profiles.errors import InputError
from reference_traces.library import captures
from replay.golden_schedules import read_golden
from replay.readers import read_trace
from replay.run import facts_of
from simulator.engine_config import resolve_engine_config

HERE = Path(__file__).parent
OWN = sorted((HERE / "schedules").glob("*.json.gz"))
GIVEN = Path(os.environ.get("SERVECAL_GOLDEN", HERE.parents[1] / "../shared/golden_schedules"))


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name.removesuffix(".json.gz"))
def test_schedules_made_by_vllm_are_reproduced(path):
    verdict = check_golden(read_golden(path))
    assert verdict.identical, verdict.divergence
    assert verdict.iterations > 0


def test_given_schedules_are_reproduced():
    paths = sorted(GIVEN.glob("*.json.gz"))
    if not paths:
        pytest.skip(f"no golden schedules in {GIVEN} (SERVECAL_GOLDEN)")
    verdicts = [check_golden(read_golden(path)) for path in paths]
    assert [verdict.file for verdict in verdicts if not verdict.identical] == []
    assert sum(verdict.iterations for verdict in verdicts) >= 1000


@pytest.mark.parametrize("folder", captures(), ids=lambda path: path.name)
def test_recordings_of_a_real_engine_are_reproduced(folder):
    trace = read_trace(folder)
    facts = facts_of(trace)
    config = resolve_engine_config(facts.arguments, version=facts.version).config
    verdict = check_recording(trace, config, folder.name)
    assert verdict.identical, verdict.divergence
    assert verdict.iterations == trace.iterations.num_rows


SMALL = {
    "format": "servecal.golden_schedule/1",
    "engine": "vllm 0.32.0",
    "config": {
        "max_model_len": 64,
        "max_num_seqs": 2,
        "max_num_batched_tokens": 8,
        "block_size": 4,
        "num_gpu_blocks": 20,
        "enable_prefix_caching": True,
        "async_scheduling": False,
        "long_prefill_token_threshold": 0,
        "policy": "fcfs",
        "watermark": 0.0,
        "scheduler_reserve_full_isl": True,
    },
    "step_time": {"base_us": 1000, "per_sequence_us": 10, "per_token_us": 1, "attention_divisor": 100},
    "requests": [{"id": "a", "arrival_us": 0, "prefix": [0, 0], "own_tokens": 4, "output_tokens": 2, "priority": 0}],
    "iterations": [
        {
            "start_us": 0,
            "dur_us": 1014,
            "items": [["a", 0, 4]],
            "preempted": [],
            "running": 1,
            "waiting": 0,
            "free": 18,
        },
        {
            "start_us": 1014,
            "dur_us": 1011,
            "items": [["a", 4, 1]],
            "preempted": [],
            "running": 1,
            "waiting": 0,
            "free": 17,
        },
    ],
    "results": [{"id": "a", "first_us": 1014, "done_us": 2025}],
}


def written(tmp_path: Path, **changes) -> Path:
    path = tmp_path / "schedule.json.gz"
    with gzip.open(path, "wt") as stream:
        json.dump({**SMALL, **changes}, stream)
    return path


def test_a_schedule_worked_out_by_hand_is_reproduced(tmp_path):
    assert check_golden(read_golden(written(tmp_path))).identical


@pytest.mark.parametrize(
    ("where", "field", "value"),
    [
        (0, "start_us", 1),
        (0, "dur_us", 1013),
        (1, "items", [["a", 4, 2]]),
        (1, "preempted", ["a"]),
        (0, "running", 2),
        (1, "waiting", 1),
        (1, "free", 18),
    ],
)
def test_a_single_changed_number_is_found_where_it_is(tmp_path, where, field, value):
    iterations = json.loads(json.dumps(SMALL["iterations"]))
    iterations[where][field] = value
    divergence = check_golden(read_golden(written(tmp_path, iterations=iterations))).divergence
    assert (divergence.iteration, divergence.fields) == (where, (field,))
    assert (divergence.before is None) == (where == 0)


@pytest.mark.parametrize("count", [1, 3])
def test_a_missing_or_surplus_iteration_is_found(tmp_path, count):
    iterations = [*SMALL["iterations"], SMALL["iterations"][1]][:count]
    divergence = check_golden(read_golden(written(tmp_path, iterations=iterations))).divergence
    assert divergence.fields == ("iterations",)
    assert (divergence.expected is None) == (count == 1)


@pytest.mark.parametrize("field", ["first_us", "done_us"])
def test_a_changed_result_is_found(tmp_path, field):
    results = [{**SMALL["results"][0], field: 1}]
    divergence = check_golden(read_golden(written(tmp_path, results=results))).divergence
    assert (divergence.iteration, divergence.fields) == (None, (field,))


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "other"},
        {"engine": "vllm x"},
        {"config": {"max_num_seqs": "many"}},
        {"step_time": {"base_us": -1, "per_sequence_us": 0, "per_token_us": 0, "attention_divisor": 1}},
        {"step_time": {"base_us": 1, "per_sequence_us": 0, "per_token_us": 0, "attention_divisor": 0}},
        {"requests": [SMALL["requests"][0], SMALL["requests"][0]]},
        {"requests": [{**SMALL["requests"][0], "prefix": [1]}]},
        {"requests": [{**SMALL["requests"][0], "continues": "zz"}]},
        {"requests": [{**SMALL["requests"][0], "own_tokens": 10**30}]},
        {"iterations": [{}]},
        {"iterations": 3},
        {"results": None},
    ],
)
def test_a_malformed_file_is_refused_with_file_and_field(tmp_path, changes):
    path = written(tmp_path, **changes)
    with pytest.raises(InputError) as caught:
        read_golden(path)
    assert caught.value.file == path
    assert caught.value.field


def test_a_truncated_archive_is_refused(tmp_path):
    path = written(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError):
        read_golden(path)


def test_a_prompt_that_continues_another_shares_its_output_blocks(tmp_path):
    requests = [
        SMALL["requests"][0] | {"output_tokens": 8},
        {"id": "b", "arrival_us": 10**6, "continues": "a", "own_tokens": 3, "output_tokens": 1, "priority": 0},
    ]
    golden = read_golden(written(tmp_path, requests=requests))
    first, second = golden.requests
    assert second.prompt_tokens == 4 + 8 + 3
    assert list(second.block_hashes[:3]) == list(first.block_hashes)
