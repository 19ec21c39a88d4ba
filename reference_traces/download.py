"""Downloading a file so that it is there whole and with the right content, or not at all.

What has come is kept beside the target as ``<name>.part`` and continued (HTTP Range, RFC 9110 section 14) by the next
try. It is moved to its place once its checksum is right. No more bytes are taken than the catalogue says.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from profiles.errors import InputError

PIECE = 2**18
TRIES = 5
"""Connections for one file; each must bring something."""
MOST_REDIRECTS = 5
MOST_BYTES = 2**34
"""Of a file whose size the catalogue does not know."""
SECONDS = (10.0, 60.0)
"""To connect, and without a byte."""


class DownloadError(Exception):
    """Why a file did not come."""


def download(url: str, target: Path, accepts: Callable[[str], bool], size: int | None) -> str:
    """Bring a file to its place; return its sha256.

    Parameters
    ----------
    url : str
    target : Path
        Its folder is made if need be.
    accepts : callable
        Whether a file of that sha256 is the right one.
    size : int, optional
        Bytes that it has; a file of another size is not taken.

    Raises
    ------
    InputError
        If it cannot be downloaded, or has another content. What came of a broken download is kept.
    """
    part = target.with_name(f"{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        resumed = part.exists()
        digest = _bring(url, part, size)
        if not accepts(digest) and resumed:
            # What was there may have been of another file.
            part.unlink()
            digest = _bring(url, part, size)
        if not accepts(digest):
            part.unlink()
            raise DownloadError(f"has sha256 {digest}, which is not the catalogue's")
        part.replace(target)
        return digest
    except (DownloadError, OSError) as error:
        _forget_nothing(part)
        kept = f" ({part.stat().st_size:,} bytes are kept; fetch again to continue)" if part.exists() else ""
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise InputError(f"cannot be downloaded from {url}: {reason}{kept}", file=target.name) from None


def _forget_nothing(part: Path) -> None:
    """Remove an empty file and empty folders."""
    with contextlib.suppress(OSError):
        if not part.stat().st_size:
            part.unlink()
    with contextlib.suppress(OSError):
        part.parent.rmdir()


def _bring(url: str, part: Path, size: int | None) -> str:
    """Download until all is there; return its sha256."""
    import requests

    with requests.Session() as session:
        session.max_redirects = MOST_REDIRECTS
        for last in [False] * (TRIES - 1) + [True]:
            before = part.stat().st_size if part.exists() else 0
            if size is not None and before > size:
                part.unlink()
                before = 0
            if size is None or before < size:
                try:
                    _continue(session, url, part, before, size)
                except requests.RequestException as error:
                    came = part.exists() and part.stat().st_size > before
                    if last or not came:
                        raise DownloadError(str(error) or type(error).__name__) from None
                    continue
            with part.open("rb") as stream:
                have = part.stat().st_size
                if size is not None and have != size:
                    raise DownloadError(f"{have:,} of {size:,} bytes came")
                return hashlib.file_digest(stream, "sha256").hexdigest()
    raise AssertionError("the last try returns or raises")


def _continue(session: Any, url: str, part: Path, begin: int, size: int | None) -> None:
    """Append to what is there, or begin anew where the server sends all of it."""
    import requests
    import urllib3

    # Compressed on the way, a range would count other bytes.
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={begin}-"} if begin else {})}
    with session.get(url, headers=headers, stream=True, timeout=SECONDS) as response:
        if response.status_code == 416 and begin:
            part.unlink()
            raise DownloadError("the server has fewer bytes than had come; fetch again to begin anew")
        response.raise_for_status()
        if response.status_code != 206:
            begin = 0
        elif not re.match(rf"bytes {begin}-", response.headers.get("Content-Range", "")):
            raise DownloadError("the server sent another part of it than was asked for")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise DownloadError("the server sent it compressed although that was not asked for")
        most = size if size is not None else MOST_BYTES
        with part.open("ab" if begin else "wb") as stream:
            have = begin
            try:
                for piece in response.raw.stream(PIECE, decode_content=False):
                    have += len(piece)
                    if have > most:
                        part.unlink()
                        raise DownloadError(f"more than {most:,} bytes came")
                    stream.write(piece)
            except urllib3.exceptions.HTTPError as error:
                raise requests.ConnectionError(str(error)) from None
