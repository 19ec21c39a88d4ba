"""Downloads that break off, lie, loop or want to leave their folder."""

import contextlib
import hashlib
import http.server
import io
import re
import tarfile
import threading
import zipfile

import pytest
from pydantic import ValidationError

from profiles.errors import InputError
from reference_traces import download as downloads
from reference_traces.archives import extract
from reference_traces.library import CataloguedFile, Entry, fetch, find_entry

CONTENT = bytes(range(256)) * 4000


def sha256(content):
    return hashlib.sha256(content).hexdigest()


class Server:
    """Serves one content; ``behaviour`` decides how. Keeps the headers it was asked with."""

    def __init__(self):
        self.content, self.asked, self.break_after, self.status, self.ranges = CONTENT, [], [], 200, True
        self.redirect, self.header = None, None
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                owner.answer(self)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/"

    def answer(self, handler):
        self.asked.append(handler.headers.get("Range"))
        if self.redirect is not None:
            handler.send_response(302)
            handler.send_header("Location", self.redirect)
            handler.end_headers()
            return
        wanted = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range") or "") if self.ranges else None
        begin = int(wanted[1]) if wanted else 0
        if begin >= len(self.content):
            handler.send_response(416)
            handler.end_headers()
            return
        handler.send_response(206 if wanted else self.status)
        if wanted:
            said = self.header or f"bytes {begin}-{len(self.content) - 1}/{len(self.content)}"
            handler.send_header("Content-Range", said)
        body = self.content[begin:]
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        with contextlib.suppress(ConnectionError):
            handler.wfile.write(body[: self.break_after.pop(0)] if self.break_after else body)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    one = Server()
    yield one
    one.server.shutdown()
    one.server.server_close()


@pytest.fixture
def entry(server, tmp_path, monkeypatch):
    """Make an entry of one file on that server."""
    monkeypatch.setenv("SERVECAL_TRACES", str(tmp_path / "cache"))

    def make(**facts):
        file = {"name": "a.csv", "path": "a.csv", "bytes": len(CONTENT), "sha256": sha256(CONTENT), **facts}
        document = find_entry("splitwise-batches").model_dump(by_alias=True)
        archives = facts.pop("archives", None) or []
        file.pop("archives", None)
        return Entry(**document | {"name": "ours", "base_url": server.url, "files": [file], "archives": archives})

    return make


@pytest.fixture
def cache(tmp_path):
    def files():
        return {path.relative_to(tmp_path / "cache").as_posix() for path in (tmp_path / "cache").rglob("*.*")}

    return files


def test_a_download_that_breaks_off_is_continued_where_it_broke(server, entry, tmp_path):
    server.break_after = [300_000, 200_000]
    folder, _ = fetch(entry())
    assert (folder / "a.csv").read_bytes() == CONTENT
    assert not (folder / "a.csv.part").exists()
    assert server.asked[0] is None
    begins = [int(one.removeprefix("bytes=").rstrip("-")) for one in server.asked[1:]]
    assert len(begins) == 2
    assert 0 < begins[0] < begins[1] <= 500_000


def test_the_next_fetch_continues_what_an_earlier_one_left(server, entry, cache, tmp_path):
    server.break_after = [100_000, 0, 0, 0, 0, 0, 0]
    with pytest.raises(InputError, match=r"cannot be downloaded from .* bytes are kept; fetch again to continue"):
        fetch(entry())
    assert cache() == {"ours/a.csv.part"}
    kept = (tmp_path / "cache/ours/a.csv.part").read_bytes()
    assert kept == CONTENT[: len(kept)]
    assert kept
    server.break_after, server.asked = [], []
    fetch(entry())
    assert server.asked == [f"bytes={len(kept)}-"]
    assert cache() == {"ours/a.csv"}
    assert (tmp_path / "cache/ours/a.csv").read_bytes() == CONTENT


def part(tmp_path, content):
    path = tmp_path / "cache/ours/a.csv.part"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)


def test_a_rest_of_another_file_is_thrown_away(server, entry, cache, tmp_path):
    part(tmp_path, b"x" * 1000)
    fetch(entry())
    assert server.asked == ["bytes=1000-", None]
    assert (tmp_path / "cache/ours/a.csv").read_bytes() == CONTENT
    assert cache() == {"ours/a.csv"}


@pytest.mark.parametrize("length", [len(CONTENT), len(CONTENT) + 1])
def test_a_rest_that_is_whole_is_only_checked_and_one_too_long_thrown_away(server, entry, cache, tmp_path, length):
    part(tmp_path, (CONTENT + b"x")[:length])
    fetch(entry())
    assert server.asked == ([] if length == len(CONTENT) else [None])
    assert cache() == {"ours/a.csv"}


def test_a_server_without_ranges_begins_anew(server, entry, tmp_path):
    part(tmp_path, CONTENT[:1000])
    server.ranges = False
    fetch(entry())
    assert (tmp_path / "cache/ours/a.csv").read_bytes() == CONTENT


def test_another_range_than_asked_for_is_refused(server, entry, tmp_path, cache):
    part(tmp_path, CONTENT[:1000])
    server.header = "bytes 0-5/9"
    with pytest.raises(InputError, match=r"another part of it than was asked for"):
        fetch(entry())
    assert cache() == {"ours/a.csv.part"}


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"x", CONTENT[::-1]])
def test_another_content_is_refused_and_nothing_kept(server, entry, cache, content):
    server.content = content
    with pytest.raises(InputError, match=rf"has sha256 {sha256(content)}, which is not the catalogue's"):
        fetch(entry())
    assert cache() == set()


def test_a_file_that_does_not_end_is_cut_off_at_its_size(server, entry, cache):
    server.content = CONTENT * 20
    with pytest.raises(InputError, match=r"more than 1,024,000 bytes came"):
        fetch(entry())
    assert cache() == set()


def test_a_file_of_unknown_size_is_cut_off_too(server, entry, cache, monkeypatch):
    monkeypatch.setattr(downloads, "MOST_BYTES", 10_000)
    with pytest.raises(InputError, match=r"more than 10,000 bytes came"):
        fetch(entry(bytes=None))
    assert cache() == set()


def test_a_short_file_is_refused(server, entry):
    server.content = CONTENT[:5000]
    with pytest.raises(InputError, match=r"5,000 of 1,024,000 bytes came"):
        fetch(entry())


def test_redirects_in_a_circle_end(server, entry, cache):
    server.redirect = server.url + "again"
    with pytest.raises(InputError, match=r"cannot be downloaded from .*[Rr]edirects"):
        fetch(entry())
    assert len(server.asked) == downloads.MOST_REDIRECTS + 1
    assert cache() == set()


def test_a_redirect_away_from_http_is_refused(server, entry, cache, tmp_path):
    (tmp_path / "secret").write_bytes(CONTENT)
    server.redirect = f"file://{tmp_path}/secret"
    with pytest.raises(InputError, match=r"cannot be downloaded from"):
        fetch(entry())
    assert cache() == set()


def test_without_a_checksum_a_file_is_taken_and_said_not_to_be_verified(server, entry, cache):
    folder, unverified = fetch(entry(sha256=None, bytes=None))
    assert unverified == [f"a.csv (sha256 {sha256(CONTENT)})"]
    assert (folder / "a.csv").read_bytes() == CONTENT
    assert fetch(entry(sha256=None, bytes=None)) == (folder, unverified)
    assert len(server.asked) == 1


@pytest.mark.parametrize("name", ["../a.csv", "/etc/a.csv", "b/../../a.csv", "b//a.csv", "", ".", "c:a.csv", "..\\a"])
def test_a_name_that_leads_out_of_the_folder_is_no_name(name):
    with pytest.raises(ValidationError, match=r"expected a name, or a path below the trace's folder"):
        CataloguedFile(name=name, path="a", bytes=1, sha256=None)


def tar(members, mode="w:gz"):
    """An archive; a member that is a string is a link to it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def zipped(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            if isinstance(content, str):
                info.external_attr = 0o120777 << 16
            archive.writestr(info, content)
    return buffer.getvalue()


PACKS = {"tar": lambda members: tar(members, "w"), "tar.gz": tar, "zip": zipped}


@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
def test_a_file_in_an_archive_is_taken_out_checked_and_the_archive_removed(server, entry, cache, pack):
    server.content = pack({"../../evil": b"x", "d/a.csv": CONTENT, "/abs": b"y"})
    archives = [{"path": "all.archive", "bytes": len(server.content), "sha256": sha256(server.content)}]
    folder, unverified = fetch(entry(path="d/a.csv", archive="all.archive", archives=archives))
    assert unverified == []
    assert (folder / "a.csv").read_bytes() == CONTENT
    assert cache() == {"ours/a.csv"}


@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
def test_members_that_lead_out_are_written_where_we_say_and_nowhere_else(tmp_path, pack):
    (tmp_path / "in").mkdir()
    archive = tmp_path / "in" / "archive"
    archive.write_bytes(pack({"../evil": b"evil", "/tmp/evil-of-servecal": b"evil"}))
    extract(archive, "../evil", tmp_path / "in" / "target", 100)
    assert {path.name for path in tmp_path.rglob("*")} == {"in", "archive", "target"}


@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
def test_links_bombs_and_missing_members_are_refused_and_leave_nothing(tmp_path, pack):
    archive, target = tmp_path / "archive", tmp_path / "target"
    archive.write_bytes(pack({"link": "/etc/passwd", "bomb": bytes(10**7)}))
    for member, message in (
        ("link", r"holds no file 'link'"),
        ("other", r"holds no file 'other'"),
        ("bomb", r"unpacks to more than 1,000 bytes"),
    ):
        with pytest.raises(InputError, match=message):
            extract(archive, member, target, 1000)
        assert not target.exists()


@pytest.mark.parametrize("content", [b"", b"hello", tar({"a": bytes(10**5)})[:-50], zipped({"a": CONTENT})[:-30]])
def test_a_damaged_archive_is_refused(tmp_path, content):
    (tmp_path / "archive").write_bytes(content)
    with pytest.raises(InputError):
        extract(tmp_path / "archive", "a.csv", tmp_path / "target", 10**9)
    assert not (tmp_path / "target").exists()


def test_a_wrong_file_in_an_archive_is_refused_and_nothing_kept(server, entry, cache):
    server.content = tar({"d/a.csv": CONTENT[::-1]})
    archives = [{"path": "all.tgz", "bytes": None, "sha256": None}]
    with pytest.raises(InputError, match=r"in its archive, the catalogue says"):
        fetch(entry(path="d/a.csv", archive="all.tgz", archives=archives))
    assert cache() == set()
