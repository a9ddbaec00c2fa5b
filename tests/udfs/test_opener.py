"""Bytes by address from a local disk with odd names and from a real S3 server: what changed, is missing or unreadable has a code."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.object_store import BUCKET, ObjectStore, object_store
from udfs import opener as module
from udfs.handles import Stat
from udfs.opener import Opener, to_path, to_uri
from udfs.reject import Reject

ODD_NAMES = [b"line\nbreak.png", b"caf\xe9 latin-1.png", "katze üñ 猫.png".encode(), b"100%41 #?&+.png", b" .png"]
ODD_KEYS = ["plain.bin", "with space.bin", "katze üñ 猫.bin", "100%41 #?&+=.bin"]


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as started:
        yield started


def refusal(reject: pytest.ExceptionInfo[Reject]) -> str:
    return reject.value.code


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_local_file_of_any_name_has_a_uri_that_leads_back_to_it(tmp_path: Path, name: bytes) -> None:
    path = os.fsencode(tmp_path) + b"/" + name
    with open(path, "wb") as out:
        out.write(b"0123456789")
    uri = to_uri(path)
    assert uri.isascii() and "\n" not in uri and to_path(uri) == path
    (entry,) = Opener().entries(to_uri(str(tmp_path)))
    assert (entry.uri, entry.is_folder, entry.problem) == (uri, False, None)
    assert entry.stat == Opener().stat(uri)
    assert Opener().read(uri, 2, 3, entry.stat) == b"234"


def test_addresses_are_made_absolute_and_of_one_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert to_uri("a b/c") == f"file://{tmp_path}/a%20b/c"
    assert to_uri("s3a://bucket/key") == "s3://bucket/key"
    with pytest.raises(Reject, match="address_refused: ftp://x/y"):
        Opener().read("ftp://x/y")


def test_a_read_gives_the_range_or_all(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"0123456789")
    opener, uri = Opener(), to_uri(str(path))
    assert opener.read(uri) == b"0123456789"
    assert opener.read(uri, 7) == b"789"
    assert opener.read(uri, 0, 0) == b""
    with opener.stream(uri) as stream:
        assert (stream.seek(4), stream.read(2)) == (4, b"45")
    with pytest.raises(Reject) as past_the_end:
        opener.read(uri, 8, 5)
    assert refusal(past_the_end) == "bytes_changed"


@pytest.mark.parametrize("new", [b"0123456789!", b"9876543210"])
@pytest.mark.parametrize("offset, length", [(0, 10), (3, 4)])
def test_a_local_file_that_is_not_what_ingest_saw_is_refused(tmp_path: Path, new: bytes, offset: int, length: int) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"0123456789")
    os.utime(path, ns=(10**18, 10**18))
    opener, uri = Opener(), to_uri(str(path))
    seen = opener.stat(uri)
    assert seen == Stat(10, 10**15)
    opener.read(uri, offset, length, seen)
    path.write_bytes(new)  # in place: an archive that is held open must notice too
    with pytest.raises(Reject) as changed:
        opener.read(uri, offset, length, seen)
    assert refusal(changed) == "bytes_changed"


def test_what_cannot_be_read_is_missing_or_unreadable(tmp_path: Path) -> None:
    opener = Opener()
    (tmp_path / "loop").symlink_to("loop")
    for call in (opener.stat, opener.read, opener.stream, lambda uri: list(opener.entries(uri))):
        for uri, code in ((f"{tmp_path}/none", "missing"), (f"{tmp_path}/loop", "unreadable")):
            with pytest.raises(Reject) as refused:
                call(to_uri(uri))
            assert refusal(refused) == code
    for folder in (opener.stat, opener.read):
        with pytest.raises(Reject) as refused:
            folder(to_uri(str(tmp_path)))
        assert refusal(refused) == "unreadable"
    assert not opener.exists(to_uri(f"{tmp_path}/none"))


def test_a_listing_names_links_pipes_and_folders_for_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "file").write_bytes(b"1")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "folder-link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    found = {entry.uri.rpartition("/")[2]: entry for entry in Opener().entries(to_uri(str(tmp_path)))}
    told = {name: (entry.is_folder, entry.problem) for name, entry in found.items()}
    assert told == {
        "real": (True, None),
        "file": (False, None),
        "link": (False, None),
        "dangling": (False, "missing"),
        "pipe": (False, "unreadable"),
    }


def test_a_reader_never_sees_half_a_written_file(tmp_path: Path) -> None:
    opener, uri = Opener(), to_uri(f"{tmp_path}/deep/er/a")
    whole = {bytes([65 + number]) * 100_000 for number in range(8)}
    opener.write(uri, next(iter(whole)))
    seen: set[bytes] = set()
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen.add(opener.read(uri))

    with ThreadPoolExecutor(5) as pool:
        watcher = pool.submit(watch)
        list(pool.map(lambda data: opener.write(uri, data), sorted(whole) * 5))
        stop.set()
        watcher.result()
    assert seen <= whole
    assert os.listdir(tmp_path / "deep/er") == ["a"]  # no half of one is left


def test_a_file_or_a_folder_is_deleted_and_nothing_there_is_fine(tmp_path: Path) -> None:
    opener = Opener()
    opener.write(to_uri(f"{tmp_path}/a/b/c"), b"1")
    opener.write(to_uri(f"{tmp_path}/a/d"), b"1")
    for gone in ("a/d", "a/d", "a"):
        opener.delete(to_uri(f"{tmp_path}/{gone}"))
        assert not (tmp_path / gone).exists()


def test_the_handles_of_many_archives_do_not_pile_up(tmp_path: Path) -> None:
    opener = Opener()
    for number in range(3 * module.KEPT_OPEN):
        (tmp_path / str(number)).write_bytes(b"0123456789")
        assert opener.read(to_uri(f"{tmp_path}/{number}"), 4, 2, opener.stat(to_uri(f"{tmp_path}/{number}"))) == b"45"
    held = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]
    assert sum(path.startswith(str(tmp_path)) for path in held) == module.KEPT_OPEN


@pytest.mark.parametrize("key", ODD_KEYS)
def test_an_object_of_any_key_is_listed_under_an_address_that_leads_back_to_it(store: ObjectStore, key: str) -> None:
    store.put(f"odd/{key}", b"0123456789")
    opener = Opener(store.stores)
    found = [entry for entry in opener.entries(f"s3://{BUCKET}/odd") if opener.read(entry.uri, 0, 10, entry.stat) == b"0123456789"]
    assert len(found) == len(store.keys("odd/"))  # the listing's time and size are the object's own
    uri = f"s3://{BUCKET}/odd/{module.quote(key, safe='/')}"
    assert uri in {entry.uri for entry in found}
    assert opener.read(uri, 2, 3, opener.stat(uri)) == b"234"


def test_an_s3_folder_holds_its_objects_and_folders_one_level_deep(store: ObjectStore) -> None:
    for key in ("tree/a.bin", "tree/sub/b.bin", "tree/sub/deep/c.bin"):
        store.put(key, b"1")
    opener = Opener(store.stores)
    assert {(entry.uri, entry.is_folder) for entry in opener.entries(f"s3://{BUCKET}/tree")} == {
        (f"s3://{BUCKET}/tree/a.bin", False),
        (f"s3://{BUCKET}/tree/sub", True),
    }
    with pytest.raises(Reject) as missing:
        list(opener.entries(f"s3://{BUCKET}/none"))
    assert refusal(missing) == "missing"


@pytest.mark.parametrize("offset, length", [(0, 10), (3, 4)])
def test_an_object_that_is_not_what_ingest_saw_is_refused(store: ObjectStore, offset: int, length: int) -> None:
    uri = store.put(f"changing-{offset}", b"0123456789")
    seen = Opener(store.stores).stat(uri)
    assert Opener(store.stores).read(uri, offset, length, seen) == b"0123456789"[offset : offset + length]
    store.put(f"changing-{offset}", b"another object")
    with pytest.raises(Reject) as changed:
        Opener(store.stores).read(uri, offset, length, seen)
    assert refusal(changed) == "bytes_changed"


def test_ranges_of_an_archive_on_s3_are_read_by_many_threads_at_once(store: ObjectStore) -> None:
    data = os.urandom(100_000)
    uri = store.put("archive.tar", data)
    opener = Opener(store.stores)
    seen = opener.stat(uri)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda at: opener.read(uri, at, 1000, seen), range(0, 100_000, 1000), timeout=30))
    assert b"".join(found) == data
    with opener.stream(uri) as stream:
        assert (stream.seek(500), stream.read(10)) == (500, data[500:510])


def test_s3_objects_are_written_and_deleted_alone_or_as_a_folder(store: ObjectStore) -> None:
    opener, root = Opener(store.stores), f"s3://{BUCKET}/written"
    for name in ("a", "b/c", "b/d e"):
        opener.write(f"{root}/{module.quote(name, safe='/')}", name.encode())
    assert opener.read(f"{root}/b/d%20e") == b"b/d e"
    opener.delete(f"{root}/a")
    opener.delete(f"{root}/a")
    assert [key for key in store.keys("written/") if not key.endswith("/")] == ["written/b/c", "written/b/d e"]
    opener.delete(f"{root}/b")
    assert not any(entry.uri for entry in opener.entries(root))
    assert not opener.exists(f"{root}/b/c")


def test_what_cannot_be_had_from_s3_has_a_code_or_says_what_to_do(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    opener = Opener(store.stores)
    for call in (opener.stat, opener.read, opener.stream):
        with pytest.raises(Reject) as refused:
            call(f"s3://{BUCKET}/none")
        assert refusal(refused) == "missing"
    with pytest.raises(Reject) as refused:
        Opener({"*": store.stores[BUCKET] | {"endpoint": "http://127.0.0.1:9"}}).read("s3://elsewhere/x")
    assert refusal(refused) == "unreadable" and refused.value.transient
    monkeypatch.delenv(store.stores[BUCKET]["access_key_env"])
    with pytest.raises(ValueError, match="environment variable STUDBOOK_TEST_S3_KEY"):
        Opener(store.stores).read(f"s3://{BUCKET}/none")
