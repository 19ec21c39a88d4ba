"""A stand-in for vLLM: as much of its scheduler's public interface as the recorder touches."""

from __future__ import annotations

import enum
import sys
import time
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

BLOCK = 4
BLOCKS = 40


class Reason(enum.IntEnum):
    STOP = 0
    LENGTH = 1


class Status(enum.Enum):
    FINISHED_ABORTED = 1


@dataclass
class FakeRequest:
    request_id: str
    prompt_token_ids: list[int] | None
    max_tokens: int = 3
    priority: int = 0
    arrival_time: float = field(default_factory=time.time)
    num_computed_tokens: int = 0
    made: int = 0
    finished: bool = False
    lora_request: Any = None
    cache_salt: str | None = None
    mm_features: list[Any] = field(default_factory=list)

    @property
    def all_token_ids(self) -> list[int]:
        return [*(self.prompt_token_ids or ()), *([7] * self.made)]

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids or ())

    def is_finished(self) -> bool:
        return self.finished


class FakeScheduler:
    """Runs what fits ``budget`` tokens a step, in order; preempts the last request when told to."""

    says_preempted = True

    def __init__(self, vllm_config, budget=8):
        self.vllm_config = vllm_config
        self.requests, self.running, self.waiting = {}, [], []
        self.budget, self.block_size = budget, BLOCK
        self.kv_cache_manager = SimpleNamespace(
            block_pool=SimpleNamespace(num_gpu_blocks=BLOCKS, get_num_free_blocks=self._free)
        )
        self.preempt_next = False
        self.closed = False

    def _free(self):
        return BLOCKS - 1 - sum(-(-one.num_computed_tokens // BLOCK) for one in self.requests.values())

    def get_request_counts(self):
        return len(self.running), len(self.waiting)

    def add_request(self, request):
        self.requests[request.request_id] = request
        self.waiting.append(request)

    def schedule(self, throttle_prefills=False):
        left, counts, preempted = self.budget, {}, []
        if self.preempt_next and self.running:
            victim = self.running.pop()
            victim.num_computed_tokens = 0
            self.waiting.insert(0, victim)
            preempted.append(victim.request_id)
            self.preempt_next = False
        while self.waiting and not preempted:
            self.running.append(self.waiting.pop(0))
        for one in self.running:
            new = min(left, max(one.num_prompt_tokens + one.made - one.num_computed_tokens, 0))
            if new:
                counts[one.request_id] = new
                one.num_computed_tokens += new
                left -= new
        said = set(preempted) if self.says_preempted else None
        return SimpleNamespace(num_scheduled_tokens=counts, preempted_req_ids=said)

    def update_from_output(self, scheduler_output, model_runner_output):
        outputs = []
        for name in scheduler_output.num_scheduled_tokens:
            one = self.requests.get(name)
            if one is None or one.num_computed_tokens < one.num_prompt_tokens + one.made:
                continue
            one.made += 1
            reason = Reason.LENGTH if one.made == one.max_tokens else None
            outputs.append(SimpleNamespace(request_id=name, new_token_ids=[7], finish_reason=reason))
            if reason is not None:
                self._free_request(one)
        return {0: SimpleNamespace(outputs=outputs, timestamp=time.monotonic())} if outputs else {}

    def _free_request(self, one):
        one.finished = True
        del self.requests[one.request_id]
        for queue in (self.running, self.waiting):
            if one in queue:
                queue.remove(one)

    def finish_requests(self, request_ids, finished_status):
        for name in [request_ids] if isinstance(request_ids, str) else list(request_ids or self.requests):
            if name in self.requests:
                self._free_request(self.requests[name])

    def reset_prefix_cache(self, reset_running_requests=False):
        return not self.running

    def shutdown(self):
        self.closed = True


class FakeAsyncScheduler(FakeScheduler):
    pass


def fake_config(**scheduler: Any) -> SimpleNamespace:
    return SimpleNamespace(
        instance_id="run1",
        model_config=SimpleNamespace(model="tiny", dtype="torch.bfloat16", hf_config=SimpleNamespace(hidden_size=8)),
        scheduler_config=SimpleNamespace(
            **{"max_num_seqs": 4, "max_num_batched_tokens": 8, "async_scheduling": False, "policy": "fcfs"} | scheduler
        ),
        cache_config=SimpleNamespace(block_size=BLOCK, enable_prefix_caching=True, cache_dtype="auto"),
        parallel_config=SimpleNamespace(data_parallel_rank=0, tensor_parallel_size=1, pipeline_parallel_size=1),
        load_config=SimpleNamespace(load_format="dummy"),
    )


@pytest.fixture
def fake_vllm(monkeypatch, tmp_path):
    """Put the stand-in where the recorder imports vLLM from, and its recordings into a folder, which is returned."""
    modules = {
        "vllm": {"__version__": "0.32.0"},
        "vllm.v1": {},
        "vllm.v1.core": {},
        "vllm.v1.core.sched": {},
        "vllm.v1.core.sched.scheduler": {"Scheduler": FakeScheduler},
        "vllm.v1.core.sched.async_scheduler": {"AsyncScheduler": FakeAsyncScheduler},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    folder = tmp_path / "recording"
    monkeypatch.setenv("SERVECAL_RECORDING", str(folder))
    return folder


@pytest.fixture
def recorded(fake_vllm):
    """Serve requests with a recording scheduler; return it and the folder once ``close`` is called."""

    def serve(requests, steps=200, abort_at=None, preempt_at=None, **scheduler):
        from replay.recorder import RecordingScheduler

        made = RecordingScheduler(vllm_config=fake_config(**scheduler))
        for one in requests:
            made.add_request(one)
        for step in range(steps):
            if not made.requests:
                break
            made.preempt_next = step == preempt_at
            if step == abort_at:
                made.finish_requests(requests[-1].request_id, Status.FINISHED_ABORTED)
            output = made.schedule()
            made.update_from_output(output, None)
        return made

    serve.folder = fake_vllm
    return serve


@pytest.fixture
def make_request():
    return FakeRequest


@pytest.fixture
def make_config():
    return fake_config
