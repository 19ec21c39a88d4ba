"""The recorder in a real vLLM; needs an interpreter that has one (SERVECAL_VLLM_PYTHON)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from calibrate.conformance import check_recording
from replay.readers import read_trace
from replay.run import facts_of
from simulator.engine_config import resolve_engine_config

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CAPTURES = ROOT / "reference_traces/captures"
SCHEDULES = ROOT / "tests/conformance/schedules"
PYTHON = os.environ.get("SERVECAL_VLLM_PYTHON")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="no interpreter with vLLM named in SERVECAL_VLLM_PYTHON")
QUIET = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
NAMES = ("aborts-async", "priorities-async", "thrash-priority-async", "thrash-fcfs-sync", "multi-turn-small-cache")


def in_vllm(*arguments, cwd, seconds=300, **variables):
    environment = {**os.environ, **QUIET, "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(
        [PYTHON, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def conformant(trace):
    facts = facts_of(trace)
    verdict = check_recording(trace, resolve_engine_config(facts.arguments, version=facts.version).config, trace.name)
    assert verdict.identical, verdict.divergence
    return verdict.iterations


@pytest.fixture(scope="module")
def driven(tmp_path_factory):
    folder = tmp_path_factory.mktemp("driven")
    in_vllm(HERE / "drive_real_scheduler.py", folder, *(SCHEDULES / f"{one}.json.gz" for one in NAMES), cwd=folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_vllm_s_schedulers_in_both_loops_are_recorded_as_they_scheduled(driven, name):
    seen = json.loads((driven / f"{name}.json").read_text())
    trace = read_trace(driven / name)
    ids = trace.ids
    assert trace.iterations.num_rows == len(seen["iterations"]) > 10
    for ours, theirs in zip(trace.iterations.to_pylist(), seen["iterations"], strict=True):
        items = zip(ours["requests"], ours["computed"], ours["scheduled"], strict=True)
        assert [[ids[row], computed, new] for row, computed, new in items] == theirs["items"]
        assert sorted(ids[row] for row in ours["preempted"]) == theirs["preempted"]
        assert (ours["running"], ours["waiting"], ours["free_blocks"]) == tuple(
            theirs[key] for key in ("running", "waiting", "free")
        )
    begun = 1e-6 * min(one["arrival_us"] for one in seen["requests"])
    starts = [one.get("sched_us", one["start_us"]) for one in seen["iterations"]]
    assert trace.iterations.column("scheduled_at").to_numpy() == pytest.approx(
        1e-6 * np.array(starts) - begun, abs=1e-6
    )
    row = {one: number for number, one in enumerate(ids)}
    for result in seen["results"]:
        request = trace.requests.slice(row[result["id"]], 1).to_pylist()[0]
        if result.get("aborted"):
            assert request["status"] == "failed"
            continue
        assert request["status"] == "ok"
        assert request["first_token"] == pytest.approx(1e-6 * result["first_us"] - begun, abs=1e-6)
        assert request["last_token"] == pytest.approx(1e-6 * result["done_us"] - begun, abs=1e-6)
    # Imposing knows neither aborts nor calls that only preempted.
    if name not in ("aborts-async", "thrash-priority-async"):
        assert conformant(trace) == len(seen["iterations"])


OFFLINE = """
import json, os, sys, threading, time, signal
sys.path.insert(0, {captures!r})
from pathlib import Path
from tiny_model import write_model
if __name__ == "__main__":
    write_model(Path("model"))
    import vllm
    llm = vllm.LLM("model", load_format="dummy", skip_tokenizer_init=True, max_model_len=1024, block_size=32,
                   max_num_seqs=4, max_num_batched_tokens=128, scheduler_cls="replay.recorder.RecordingScheduler")
    prompts = [dict(prompt_token_ids=list(range(3, 40 + 30 * n))) for n in range(8)]
    params = [vllm.SamplingParams(max_tokens=5 + 3 * n, min_tokens=5 + 3 * n, ignore_eos=True, temperature=0,
                                  detokenize=False) for n in range(8)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    counts = [[len(one.prompt_token_ids), len(one.outputs[0].token_ids), one.num_cached_tokens] for one in outputs]
    print(json.dumps(counts), flush=True)
    if {kill}:
        def generate():
            long = vllm.SamplingParams(max_tokens=900, min_tokens=900, ignore_eos=True, detokenize=False)
            llm.generate(prompts, long, use_tqdm=False)
        threading.Thread(target=generate, daemon=True).start()
        time.sleep(4)
        children = Path(f"/proc/self/task/{{os.getpid()}}/children").read_text().split()
        for child in map(int, children):
            os.kill(child, signal.SIGKILL)
        os._exit(0)
"""


@pytest.mark.parametrize("kill", [False, True])
def test_an_offline_engine_is_recorded_and_may_be_killed(tmp_path, kill):
    (tmp_path / "run.py").write_text(OFFLINE.format(captures=str(CAPTURES), kill=kill))
    out = in_vllm("run.py", cwd=tmp_path, SERVECAL_RECORDING=str(tmp_path / "recording"))
    counts = json.loads(next(line for line in out.splitlines() if line.startswith("[[")))
    trace = read_trace(tmp_path / "recording")
    assert conformant(trace) > 20
    rows = trace.requests.select(["prompt_tokens", "output_tokens", "cached_tokens"]).to_pylist()
    recorded = sorted(zip(trace.ids, ([*row.values()] for row in rows), strict=True), key=lambda one: int(one[0]))
    assert [row for _, row in recorded[:8]] == counts
    assert len(trace) == (16 if kill else 8)
    if kill:
        unfinished = trace.statuses == "unfinished"
        assert unfinished.sum() == 8
        # Three seconds at least of the four were flushed.
        last = trace.iterations.column("start")[-1].as_py()
        assert last - trace.column("arrival")[unfinished].min() > 2


def test_a_server_is_recorded_under_its_own_benchmark(tmp_path):
    script = CAPTURES / "capture_served.py"
    options = ("served", "--requests", "12", "--rate", "4", "--port", "8191")
    in_vllm(script, *options, cwd=tmp_path, seconds=500)
    engine, client = read_trace(tmp_path / "served"), read_trace(tmp_path / "served/client.json")
    assert conformant(engine) > 100
    order = np.argsort([int(one.split("-")[-2]) for one in engine.ids])
    for name in ("prompt_tokens", "output_tokens"):
        np.testing.assert_array_equal(engine.column(name)[order], client.column(name))
    delay = client.latency("ttft") - engine.latency("ttft")[order]
    assert np.all((delay > 0) & (delay < 0.5))


def test_an_online_engine_is_recorded(tmp_path):
    code = (
        "import sys; sys.argv = ['x', 'small']; import capture_vllm_cpu as c\n"
        "c.SHAPES['small'] = c.Shape('small', requests=12, rate=6.0, prefixes=1, warmup=4, repeats=2)\n"
        "if __name__ == '__main__': c.main()\n"
    )
    (tmp_path / "run.py").write_text(f"import sys; sys.path.insert(0, {str(CAPTURES)!r})\n{code}")
    in_vllm("run.py", cwd=tmp_path, seconds=400)
    for name in ("small-1", "small-2"):
        trace = read_trace(tmp_path / name)
        assert len(trace) == 12
        assert conformant(trace) > 50
        assert np.all(trace.column("arrival") >= trace.column("nominal_arrival") - 1e-4)
    assert sys.version_info  # the recording was read by this interpreter, written by another
