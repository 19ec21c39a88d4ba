"""Writing records off the hot path: a thread, a bounded queue, gzip members of JSON lines.

Each flush is a whole gzip member, so that a file whose writer was killed is readable up to its last flush, by
``zcat`` too.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORMAT = "servecal.recording/1"
FLUSH_SECONDS = 1.0
"""A killed engine loses no more than this."""
MOST_PENDING = 2_000_000
"""Numbers (of about 32 bytes) that may wait to be written; what comes on top is dropped and counted."""
MEMBER_BYTES = 2**20
"""Bytes of JSON after which a gzip member ends before its time."""

Encode = Callable[[], dict[str, Any] | None]
log = logging.getLogger("servecal.recorder")


class Writer:
    """Append records to a file from a thread of its own.

    Parameters
    ----------
    path : Path
        Created; an existing file is an error (``FileExistsError``).
    first : dict
        The first record, written before the constructor returns.
    flush_seconds, most_pending : float, int
        As the constants of this module.
    """

    def __init__(
        self,
        path: Path,
        first: dict[str, Any],
        *,
        flush_seconds: float = FLUSH_SECONDS,
        most_pending: int = MOST_PENDING,
    ) -> None:
        self.path = path
        self.dropped = 0
        self._pending: deque[tuple[Encode, int]] = deque()
        self._size, self._most, self._every = 0, most_pending, flush_seconds
        self._counting = threading.Lock()
        self._told = 0
        self._unwritable = False
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        self._end = 0
        self._write_member(_line(first))
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="servecal-recorder", daemon=True)
        self._thread.start()

    def put(self, encode: Encode, size: int) -> None:
        """Queue a record of about ``size`` numbers, made into a dict in the writing thread; never blocks."""
        if self._size + size > self._most:
            self.dropped += 1
            return
        with self._counting:
            self._size += size
        self._pending.append((encode, size))

    def close(self, last: dict[str, Any] | None = None) -> None:
        """Write what is pending, then ``last``, and end the thread; a second call does nothing."""
        if self._closing.is_set():
            return
        if last is not None:
            self._pending.append((lambda: last, 0))
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(self._every):
            self._flush()
        self._flush()
        os.close(self._file)

    def _flush(self) -> None:
        """Write everything that is pending now; a record at a time, so that the engine never waits for the GIL long."""
        lines: list[bytes] = []
        size = 0
        for _ in range(len(self._pending)):
            encode, numbers = self._pending.popleft()
            with self._counting:
                self._size -= numbers
            record = _encoded(encode)
            if record is not None:
                lines.append(record)
                size += len(record)
            if size > MEMBER_BYTES:
                self._write_member(b"".join(lines), len(lines))
                lines, size = [], 0
            time.sleep(0)
        dropped = self.dropped
        if dropped > self._told:
            lines.append(_line({"dropped": dropped}))
        if lines and self._write_member(b"".join(lines), len(lines)):
            self._told = dropped

    def _write_member(self, data: bytes, records: int = 1) -> bool:
        """Append one gzip member, or leave the file as it was and count the records as dropped."""
        member = memoryview(gzip.compress(data, compresslevel=4, mtime=0))
        try:
            written = 0
            while written < len(member):
                written += os.write(self._file, member[written:])
            self._end += len(member)
            return True
        except OSError as error:
            self.dropped += records
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._end)
            if not self._unwritable:
                log.warning("servecal: %s cannot be written (%s); what is lost is counted", self.path, error.strerror)
            self._unwritable = True
            return False


def _encoded(encode: Encode) -> bytes | None:
    """A record's line, or one that says why there is none: a recorder must not fall over a request."""
    try:
        record = encode()
        return None if record is None else _line(record)
    except Exception as error:
        return _line({"failed": f"{type(error).__name__}: {error}"[:300]})


def _line(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, separators=(",", ":"), default=str) + "\n").encode()
