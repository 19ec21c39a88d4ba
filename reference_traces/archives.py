"""Taking single files out of an archive: to a place that we name, never to one that the archive names."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path
from typing import IO

from profiles.errors import InputError

PIECE = 2**18
MOST_MEMBERS = 100_000
MOST_PASSED = 2**36
"""Unpacked bytes before the file that is looked for."""


def extract(archive: Path, member: str, target: Path, most: int) -> None:
    """Write one regular file of a tar (plain, gzip, bzip2, xz) or zip archive to ``target``.

    Parameters
    ----------
    archive : Path
    member : str
        Its path in the archive, compared as it stands there.
    target : Path
        Written to by us: no path or link of the archive is followed.
    most : int
        Bytes that it may unpack to.

    Raises
    ------
    InputError
        If the archive is none, has no such file, a link or a device there, or unpacks to more; nothing is left then.
    """
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                info = next((one for one in opened.infolist()[:MOST_MEMBERS] if one.filename == member), None)
                # The upper half of external_attr is the Unix mode; a link says so there.
                if info is None or info.is_dir() or (info.external_attr >> 28) not in (0, 8):
                    raise InputError(f"holds no file {member!r}", file=archive)
                with opened.open(info) as stream:
                    _write(stream, target, most, archive)
            return
        with tarfile.open(archive) as opened_tar:
            passed = 0
            for number, entry in enumerate(opened_tar):
                passed += entry.size
                if entry.name == member and entry.isreg():
                    stream_of_tar = opened_tar.extractfile(entry)
                    assert stream_of_tar is not None
                    _write(stream_of_tar, target, most, archive)
                    return
                if number >= MOST_MEMBERS or passed > MOST_PASSED:
                    raise InputError("holds too much to look for a file in it", file=archive)
        raise InputError(f"holds no file {member!r}", file=archive)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        target.unlink(missing_ok=True)
        raise InputError(f"cannot be unpacked: {error}", file=archive) from None


def _write(stream: IO[bytes], target: Path, most: int, archive: Path) -> None:
    have = 0
    with target.open("wb") as written:
        while piece := stream.read(PIECE):
            have += len(piece)
            if have > most:
                break
            written.write(piece)
    if have > most:
        target.unlink()
        raise InputError(f"unpacks to more than {most:,} bytes", file=archive)
