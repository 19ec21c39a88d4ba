"""Queues of requests that wait for admission. Source: vLLM ``v1/core/sched/request_queue.py``."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator

from simulator.request import ServedRequest


class FCFSQueue(deque[ServedRequest]):
    """First come, first served; a preempted request returns to the very front."""

    def add(self, served: ServedRequest) -> None:
        """Queue an arrival."""
        self.append(served)

    def put_back(self, served: ServedRequest) -> None:
        """Queue a request that was admitted before, or set aside."""
        self.appendleft(served)

    def peek(self) -> ServedRequest:
        """Return the next request."""
        return self[0]

    def take(self) -> ServedRequest:
        """Remove and return the next request."""
        return self.popleft()


class PriorityQueue:
    """Smallest (priority, arrival, id) first, preempted requests included."""

    def __init__(self) -> None:
        self._heap: list[ServedRequest] = []

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[ServedRequest]:
        return iter(self._heap)

    def add(self, served: ServedRequest) -> None:
        """Queue an arrival."""
        heapq.heappush(self._heap, served)

    put_back = add

    def peek(self) -> ServedRequest:
        """Return the next request."""
        return self._heap[0]

    def take(self) -> ServedRequest:
        """Remove and return the next request."""
        return heapq.heappop(self._heap)

    def remove(self, served: ServedRequest) -> None:
        """Take a request out, wherever it stands."""
        self._heap.remove(served)
        heapq.heapify(self._heap)


def waiting_queue(scheduling_policy: str) -> FCFSQueue | PriorityQueue:
    """Return an empty queue for vLLM's ``scheduling_policy``, ``"fcfs"`` or ``"priority"``."""
    return PriorityQueue() if scheduling_policy == "priority" else FCFSQueue()
