"""Plain, gzip and zstd files open alike; damaged and endless ones are refused."""

from __future__ import annotations

import gzip

import pyarrow as pa
import pytest

from profiles.errors import InputError
from replay.readers.opening import compression_of, head, open_bytes, open_text

TEXT = "ö,1\r\n" * 5000


def zstd(data):
    return pa.Codec("zstd").compress(data, asbytes=True)


@pytest.mark.parametrize(("pack", "kind"), [(bytes, None), (gzip.compress, "gzip"), (zstd, "zstd")])
def test_files_open_alike_however_they_are_packed(tmp_path, pack, kind):
    path = tmp_path / "data"
    path.write_bytes(pack(TEXT.encode()))
    assert compression_of(path) == kind
    assert head(path, 10) == TEXT.encode()[:10]
    with open_text(path) as stream:
        lines = stream.readlines()
    assert lines == ["ö,1\n"] * 5000


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_damaged_and_endless_files_are_refused(tmp_path, pack):
    path = tmp_path / "data"
    path.write_bytes(pack(bytes(10**6)))
    with pytest.raises(InputError, match="unpacks to more than 100,000 bytes"), open_bytes(path, 100_000) as stream:
        stream.read()
    path.write_bytes(path.read_bytes()[:4] + b"\xff" * 50)
    assert head(path) == b""
    with pytest.raises(InputError, match="cannot be unpacked"), open_bytes(path) as stream:
        stream.read()
