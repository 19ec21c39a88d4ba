"""Opening foreign files: plain, gzip or zstd, told by their first bytes; never more than a bound is unpacked."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from profiles.errors import InputError

MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
MOST_BYTES = 64 * 2**30
"""Unpacked bytes of one file; a month of a large service's requests is less."""
HEAD = 2**16
"""Bytes from which a format is told."""
BUFFER = 2**20


def compression_of(path: Path) -> str | None:
    """Return ``gzip``, ``zstd`` or None, by the file's first bytes."""
    with path.open("rb") as stream:
        start = stream.read(4)
    return next((name for magic, name in MAGIC.items() if start.startswith(magic)), None)


class _Unpacked(io.RawIOBase):
    """What a compressed file holds, up to a bound."""

    def __init__(self, path: Path, compression: str, most: int) -> None:
        self._path, self._left, self._most = path, most, most
        self._stream: Any = pa.input_stream(str(path), compression=compression)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except OSError as error:
            raise InputError(f"cannot be unpacked: {error}", file=self._path) from None
        self._left -= len(data)
        if self._left < 0:
            raise InputError(f"unpacks to more than {self._most:,} bytes", file=self._path)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


def open_bytes(path: Path, most: int = MOST_BYTES) -> BinaryIO:
    """Open a file for reading, unpacked if it is compressed.

    Reading raises ``InputError`` where the file is damaged or unpacks to more than ``most`` bytes.
    """
    compression = compression_of(path)
    if compression is None:
        return path.open("rb", buffering=BUFFER)
    unpacked: BinaryIO = io.BufferedReader(_Unpacked(path, compression, most), BUFFER)
    return unpacked


def open_text(path: Path, most: int = MOST_BYTES) -> io.TextIOWrapper:
    """The same as UTF-8 text, a byte-order mark left out, any line ends; decoding errors are ``UnicodeDecodeError``."""
    return io.TextIOWrapper(open_bytes(path, most), encoding="utf-8-sig")


def head(path: Path, size: int = HEAD) -> bytes:
    """Return the first bytes of what a file holds; empty if it cannot be read or unpacked."""
    try:
        with open_bytes(path) as stream:
            return stream.read(size)
    except (OSError, InputError):
        return b""
