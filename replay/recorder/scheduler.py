"""Taking notes around vLLM's scheduler.

Only the public interface of a scheduler is overridden (``schedule``, ``update_from_output``, ``add_request``,
``finish_requests``, ``reset_prefix_cache``, ``shutdown``: ``vllm.v1.core.sched.interface``), and the class that vLLM
would have chosen is subclassed, so that the loop stays what it was. A note that cannot be taken ends the recording,
never the serving.
"""

from __future__ import annotations

import atexit
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from replay.recorder import facts
from replay.recorder.hashes import chain, extra_of, salt
from replay.recorder.writer import FORMAT, Writer, log

FOLDER = "SERVECAL_RECORDING"
TOKEN_IDS = "SERVECAL_RECORDING_TOKEN_IDS"
MOST_IN_FLIGHT = 64
"""Steps scheduled and not updated from that are remembered; vLLM has one to a few."""
MOST_ENDED = 16384
"""Requests that have ended and are remembered, as steps scheduled ahead still hold them."""
FINISH_REASONS = ("stop", "length", "abort", "error", "repetition")


class RecordingScheduler:
    """What ``--scheduler-cls`` names: makes vLLM's own scheduler, synchronous or asynchronous, that takes notes."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Take the arguments of vLLM's scheduler, whichever its version has."""
        base = own_scheduler(kwargs["vllm_config"] if "vllm_config" in kwargs else args[0])
        return type(f"Recording{base.__name__}", (Notes, base), {"__module__": __name__})(*args, **kwargs)


def own_scheduler(config: Any) -> type:
    """Return the scheduler class that vLLM would have chosen by itself for this ``VllmConfig``."""
    from vllm.v1.core.sched.scheduler import Scheduler

    if getattr(config.scheduler_config, "async_scheduling", False):
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler

        return AsyncScheduler  # type: ignore[no-any-return]
    return Scheduler  # type: ignore[no-any-return]


def _guarded(note: Callable[..., None]) -> Callable[..., None]:
    """Let a failing note end the recording with one line in the log."""

    @functools.wraps(note)
    def guarded(self: Recorder, *args: Any) -> None:
        if not self.alive:
            return
        try:
            note(self, *args)
        except Exception as error:
            self.fail(error)

    return guarded


class Recorder:
    """What is noted of one engine core, as records of a ``Writer``.

    Parameters
    ----------
    scheduler : object
        The scheduler, fully made.
    """

    def __init__(self, scheduler: Any) -> None:
        self.alive = False
        self._scheduler = scheduler
        self._here: dict[str, Any] = {}
        self._chains: dict[str, tuple[list[int], list[tuple[int, int, str]]]] = {}
        self._handles: dict[str, int] = {}
        self._late: dict[str, int] = {}
        self._next = 0
        self._in_flight: dict[int, tuple[Any, ...]] = {}
        self._idle_calls = 0
        self._spent = 0.0
        self._writer: Writer | None = None
        try:
            self._start(scheduler)
        except Exception as error:
            self.fail(error)

    def _start(self, scheduler: Any) -> None:
        config = scheduler.vllm_config
        pool = getattr(scheduler.kv_cache_manager, "block_pool", None)
        self._free = getattr(pool, "get_num_free_blocks", lambda: None)
        self._key = salt()
        self._token_ids = os.environ.get(TOKEN_IDS, "") not in ("", "0")
        blocks = getattr(pool, "num_gpu_blocks", None)
        self._block_size = int(getattr(scheduler, "block_size", None) or config.cache_config.block_size)
        run = str(getattr(config, "instance_id", "") or os.getppid())
        rank = int(getattr(config.parallel_config, "data_parallel_rank", 0) or 0)
        folder = Path(os.environ.get(FOLDER) or f"servecal-recording-{run}")
        folder.mkdir(parents=True, exist_ok=True)
        import vllm

        first = {
            "format": FORMAT,
            "run": run,
            "rank": rank,
            "pid": os.getpid(),
            "engine": {
                "name": "vllm",
                "version": vllm.__version__,
                "arguments": facts.arguments(config, blocks, self._block_size),
            },
            "loop": "asynchronous" if _runs_ahead(config) else "synchronous",
            "model": facts.plain(config.model_config.model),
            "model_config": facts.shape(config),
            "machine": facts.machine(),
            "clock": facts.clocks(),
            "block_size": self._block_size,
        }
        self._writer = Writer(folder / f"engine-dp{rank}-{os.getpid()}.jsonl.gz", first)
        self._clock_told = time.monotonic()
        self.alive = True
        atexit.register(self.close)
        log.warning("servecal: recording to %s", self._writer.path)

    def fail(self, error: Exception) -> None:
        """Stop recording, and say why once."""
        self.alive = False
        reason = f"{type(error).__name__}: {error}"[:300]
        log.warning("servecal: recording ended: %s", reason)
        if self._writer is not None:
            self._writer.put(lambda: {"failed": reason}, 1)

    def close(self) -> None:
        """Write everything and the end mark."""
        if self._writer is not None:
            ended = {"end": time.monotonic(), "idle_calls": self._idle_calls, "noting_seconds": round(self._spent, 6)}
            self._writer.close(ended | {"clock": facts.clocks()})

    def _put(self, encode: Callable[[], dict[str, Any] | None], size: int) -> None:
        assert self._writer is not None
        self._writer.put(encode, size)

    @_guarded
    def added(self, request: Any, now: float) -> None:
        """Note a request that the scheduler has queued."""
        name = request.request_id
        if name in self._here:
            return  # A further piece of a streamed input.
        self._here[name] = request
        record: dict[str, Any] = {
            "id": name,
            "arrival": request.arrival_time,
            "queued": now,
            "prompt_tokens": request.num_prompt_tokens,
            "max_tokens": request.max_tokens,
            "priority": getattr(request, "priority", 0),
        }
        tokens, extra = request.prompt_token_ids, extra_of(request)
        size, key, ids = self._block_size, self._key, self._token_ids

        def encode() -> dict[str, Any]:
            if tokens is not None:
                record["block_hashes"] = chain(tokens, size, key, extra)
                self._chains[name] = (record["block_hashes"], extra)
                if ids:
                    record["prompt_token_ids"] = list(tokens)
            return {"request": self._handle(name, new=True), **record}

        # The prompt's list lives as long as the request in any case, unless the disk falls behind.
        self._put(encode, 16 + (len(tokens) if tokens is not None else 0))
        self._spent += time.monotonic() - now

    @_guarded
    def scheduled(self, output: Any, called: float, returned: float, before: tuple[Any, int]) -> None:
        """Note what a schedule call composed; it is written when its output is in."""
        scheduler = self._scheduler
        if not output.num_scheduled_tokens:
            self._idle_calls += 1
            victims = _preempted(scheduler, output, before)
            if victims:
                self._put(lambda: {"preempted_idle": sorted(self._handle(one) for one in victims), "at": called}, 4)
            return
        requests = scheduler.requests
        # The dict keeps the order of scheduling. Copied, as a model runner may correct it.
        counts = dict(output.num_scheduled_tokens)
        after = [requests[one].num_computed_tokens for one in counts]
        if len(self._in_flight) >= MOST_IN_FLIGHT:
            self._in_flight.pop(next(iter(self._in_flight)))
        self._in_flight[id(output)] = (
            called,
            counts,
            after,
            _preempted(scheduler, output, before),
            _counts(scheduler),
            self._free(),
            self._idle_calls,
        )
        self._spent += time.monotonic() - returned

    @_guarded
    def updated(self, output: Any, outputs: Any, called: float, returned: float) -> None:
        """Note a step that has ended: its time stamp, and whose tokens carry it."""
        step = self._in_flight.pop(id(output), None)
        if step is None:
            return
        made = [each for one in outputs.values() for each in one.outputs]
        end = min((one.timestamp for one in outputs.values()), default=returned)
        sampled = {one.request_id: len(one.new_token_ids) for one in made}
        finished = [(one.request_id, int(one.finish_reason)) for one in made if one.finish_reason is not None]
        ended = [(name, self._here.pop(name, None)) for name, _ in finished]
        tokens = [(one.request_id, list(one.new_token_ids)) for one in made] if self._token_ids else []
        clock = None
        if returned - self._clock_told > 1.0:
            clock, self._clock_told = facts.clocks(), returned

        def encode() -> dict[str, Any]:
            # In the writing thread: the engine's has only copied what it must.
            started, counts, after, preempted, (running, waiting), free, idle = step
            record: dict[str, Any] = {
                "scheduled_at": started,
                "update_at": called,
                "end": end,
                "requests": [self._handle(one) for one in counts],
                # `schedule` had counted the new tokens as computed already.
                "computed": [have - new for have, new in zip(after, counts.values(), strict=True)],
                "scheduled": list(counts.values()),
                "sampled": [sampled.get(one, 0) for one in counts],
                "running": running,
                "waiting": waiting,
                "free_blocks": free,
                "idle_calls": idle,
            }
            if preempted:
                record["preempted"] = sorted(self._handle(one) for one in preempted)
            if tokens:
                record["token_ids"] = [[self._handle(name), ids] for name, ids in tokens]
            hashes = [[self._handle(name), self._output_hashes(name, one)] for name, one in ended]
            if any(one for _, one in hashes):
                record["output_hashes"] = [one for one in hashes if one[1]]
            if finished:
                record["finished"] = [[self._ended(name), reason_name(reason)] for name, reason in finished]
            if clock is not None:
                record["clock"] = clock
            return record

        self._put(encode, 4 * len(step[1]) + 32)
        self._spent += time.monotonic() - returned

    @_guarded
    def aborted(self, requests: Any, status: Any) -> None:
        """Note requests that were ended from outside, by their ids."""
        known = [one for one in requests if one in self._here]
        if not known:
            return
        for one in known:
            del self._here[one]
        named, now = getattr(status, "name", str(status)), time.monotonic()
        self._put(lambda: {"aborted": [self._ended(one) for one in known], "status": named, "at": now}, 4 * len(known))

    def _output_hashes(self, name: str, request: Any) -> list[int]:
        """Return the hashes of the blocks that a request's output filled, which its next turn may find cached."""
        prompt, extra = self._chains.pop(name, ([], []))
        if request is None or getattr(request, "prompt_token_ids", None) is None:
            return []
        tokens = list(request.all_token_ids[len(prompt) * self._block_size :])
        return chain(tokens, self._block_size, self._key, extra, prompt)

    def _handle(self, name: str, *, new: bool = False) -> int:
        """Return the number that stands for a request in the file; in the writing thread only."""
        if not new and name in self._late:
            return self._late[name]
        if new or name not in self._handles:
            self._handles[name] = self._next
            self._late.pop(name, None)
            self._next += 1
        return self._handles[name]

    def _ended(self, name: str) -> int:
        """Return the number of a request that has ended: its id may come again, and a step ahead may still have it."""
        handle = self._handle(name)
        self._handles.pop(name, None)
        self._chains.pop(name, None)
        self._late[name] = handle
        if len(self._late) > MOST_ENDED:
            del self._late[next(iter(self._late))]
        return handle

    @_guarded
    def emptied(self, success: bool) -> None:
        """Note that the prefix cache was emptied, or was to be."""
        record = {"prefix_cache_reset": success, "at": time.monotonic()}
        self._put(lambda: record, 4)


def reason_name(reason: int) -> str:
    """Return vLLM's name of a finish reason."""
    return FINISH_REASONS[reason] if 0 <= reason < len(FINISH_REASONS) else str(reason)


def _runs_ahead(config: Any) -> bool:
    """Whether the engine schedules a step before the last one has ended."""
    pipelined = int(getattr(config.parallel_config, "pipeline_parallel_size", 1) or 1) > 1
    return bool(getattr(config.scheduler_config, "async_scheduling", False)) or pipelined


def _counts(scheduler: Any) -> tuple[int, int]:
    counts = getattr(scheduler, "get_request_counts", None)
    if counts is not None:
        running, waiting = counts()
        return int(running), int(waiting)
    return len(scheduler.running), len(scheduler.waiting)


def _preempted(scheduler: Any, output: Any, before: tuple[Any, int]) -> list[str]:
    """Return the ids of requests that a schedule call preempted.

    Newer versions say so in the output. In all of them nothing but a preemption makes the waiting queue grow during
    the call, and the requests that ran before it are then asked.
    """
    said = getattr(output, "preempted_req_ids", None)
    if said is not None:
        return list(said)
    ran, waited = before
    if _counts(scheduler)[1] <= waited:
        return []
    still = {one.request_id for one in scheduler.running}
    return [one.request_id for one in ran if one.request_id not in still and not one.is_finished()]


class Notes:
    """The methods of a vLLM scheduler that take notes; mixed in before the scheduler's own class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recorder = Recorder(self)

    def add_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """Queue a request."""
        result = super().add_request(request, *args, **kwargs)  # type: ignore[misc]
        self.recorder.added(request, time.monotonic())
        return result

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Compose a step."""
        before = (list(self.running), _counts(self)[1])  # type: ignore[attr-defined]
        called = time.monotonic()
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        self.recorder.scheduled(output, called, time.monotonic(), before)
        return output

    def update_from_output(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Take in what a step produced."""
        called = time.monotonic()
        outputs = super().update_from_output(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        self.recorder.updated(scheduler_output, outputs, called, time.monotonic())
        return outputs

    def finish_requests(self, request_ids: Any, finished_status: Any, *args: Any, **kwargs: Any) -> Any:
        """End requests from outside."""
        if request_ids is None:
            named = list(self.requests)  # type: ignore[attr-defined]
        else:
            named = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        result = super().finish_requests(  # type: ignore[misc]
            request_ids if request_ids is None else named, finished_status, *args, **kwargs
        )
        self.recorder.aborted(named, finished_status)
        return result

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> Any:
        """Empty the prefix cache."""
        result = super().reset_prefix_cache(*args, **kwargs)  # type: ignore[misc]
        self.recorder.emptied(bool(result))
        return result

    def shutdown(self, *args: Any, **kwargs: Any) -> Any:
        """Shut down, the recording first."""
        self.recorder.close()
        return super().shutdown(*args, **kwargs)  # type: ignore[misc]
