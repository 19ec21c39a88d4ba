"""The recorder: a scheduler class for vLLM that decides nothing and notes everything.

Switched on with ``--scheduler-cls replay.recorder.RecordingScheduler``. Loaded in vLLM's engine process, so it imports
the standard library only, and vLLM when a scheduler is made. What it writes: ``docs/recorder.md``.
"""

from replay.recorder.scheduler import RecordingScheduler

__all__ = ["RecordingScheduler"]
