"""Files of clients' benchmark tools, written and read."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
from client_samples import PACKED, SAMPLES

from replay.readers import read_trace
from replay.trace import Trace


@pytest.fixture(scope="session")
def samples() -> dict[str, tuple[str, bytes]]:
    return copy.deepcopy(SAMPLES)


@pytest.fixture(scope="session")
def packer() -> dict[str, Callable[[bytes], bytes]]:
    """How a file may be packed."""
    return PACKED


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Trace]:
    """Write a content and read it; ``name`` as the file is called."""

    def write_and_read(content: bytes, name: str = "data", selection: str | None = None) -> Trace:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return read_trace(path, selection)

    return write_and_read
