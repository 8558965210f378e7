"""The contract of a store, for local folders, buckets and the scheme of a test; and buckets whose requests fail."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dmd2 import cli
from dmd2.io import gcs, storage
from dmd2.io.storage import cache, fetch_file, open_store, upload_files
from dmd2.io.store import Store
from tests.bucket import DOWNLOAD, UPLOAD, Fault, Proxy, start_command, use_host
from tests.io.test_new_scheme import memory  # noqa: F401 - a fixture


@pytest.fixture(params=["local", "bucket", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(tmp_path / "folder")
    return open_store(f"{request.getfixturevalue(request.param)}/some/folder")


@pytest.fixture
def behind(bucket: str, proxy: Proxy) -> Store:
    """A store whose requests all pass through the proxy."""
    return open_store(f"{bucket}/folder")


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> int:
    """Set the chunk size to the smallest one of resumable uploads, so that small files are transferred in chunks."""
    from google.cloud.storage import blob

    monkeypatch.setattr(gcs, "CHUNK_BYTES", 2**18)
    monkeypatch.setattr(blob, "_MAX_MULTIPART_SIZE", 2**18)
    return 2**18


def names(store: Store, prefix: str = "") -> list[str]:
    return [entry.name for entry in store.list_objects(prefix)]


def file(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_an_uploaded_or_written_file_is_read_and_downloaded(store: Store, tmp_path: Path) -> None:
    store.upload(file(tmp_path / "a", b"from a file"), "sub/a")
    store.write("b", b"from memory")
    assert (store.read("sub/a"), store.read("b")) == (b"from a file", b"from memory")
    store.download("sub/a", tmp_path / "deep" / "copy")
    assert (tmp_path / "deep" / "copy").read_bytes() == b"from a file"
    assert [(entry.name, entry.size) for entry in store.list_objects()] == [("b", 11), ("sub/a", 11)]


def test_an_empty_file_is_a_file(store: Store, tmp_path: Path) -> None:
    store.upload(file(tmp_path / "empty", b""), "empty")
    store.download("empty", tmp_path / "copy")
    assert (store.read("empty"), (tmp_path / "copy").read_bytes()) == (b"", b"")
    assert [entry.size for entry in store.list_objects()] == [0]


def test_files_are_uploaded_under_their_names(store: Store, tmp_path: Path) -> None:
    wanted = [f"{folder}/{n}" for folder in "ab" for n in range(5)]
    for name in wanted:
        file(tmp_path / "many" / name, name.encode())
    upload_files(tmp_path / "many", wanted, store)
    assert {name: store.read(name).decode() for name in names(store)} == {name: name for name in wanted}


def test_a_listing_is_sorted_and_begins_with_the_prefix(store: Store) -> None:
    assert names(store) == []
    for name in ("b/2", "a", "b/10", "b-side", "c/x/y"):
        store.write(name, b"")
    assert names(store) == ["a", "b-side", "b/10", "b/2", "c/x/y"]
    assert names(store, "b/") == ["b/10", "b/2"]
    assert names(store, "nothing/") == []


def test_the_fingerprint_in_a_listing_changes_with_the_content(store: Store) -> None:
    store.write("same", b"1")
    store.write("changed", b"1")
    before = versions(store)
    store.write("changed", b"2")
    after = versions(store)
    assert before["same"] == after["same"]
    assert before["changed"] != after["changed"]


def versions(store: Store) -> dict[str, str]:
    return {entry.name: entry.fingerprint for entry in store.list_objects()}


def test_another_folder_with_the_same_beginning_is_not_listed(bucket: str, tmp_path: Path) -> None:
    for root in (bucket, str(tmp_path)):
        open_store(f"{root}/run").write("a", b"")
        open_store(f"{root}/run2").write("b", b"")
        assert names(open_store(f"{root}/run")) == ["a"]


def test_a_file_is_listed_only_when_it_is_complete(store: Store, tmp_path: Path) -> None:
    """List the files repeatedly during an upload."""
    store.write("whole", b"old")
    path, seen = file(tmp_path / "large", os.urandom(2**21)), set()
    with ThreadPoolExecutor(1) as pool:
        for _ in range(5):
            done = pool.submit(store.upload, path, "whole")
            while not done.done():
                seen |= {(entry.name, entry.size) for entry in store.list_objects()}
            done.result()
    assert seen <= {("whole", 3), ("whole", 2**21)}


def test_the_partial_file_of_a_killed_writer_is_not_listed(tmp_path: Path) -> None:
    file(tmp_path / "folder" / "sub" / ".name.123.partial", b"half")
    assert names(open_store(tmp_path / "folder")) == []


def test_a_swap_that_expects_another_version_is_refused(store: Store) -> None:
    assert store.version("state") is None
    first = store.compare_and_swap("state", b"1", None)
    assert first == store.version("state")
    other = store.compare_and_swap("another", b"2", None)
    for wrong in (None, other):
        with pytest.raises(FileExistsError, match="changed by another process meanwhile") as caught:
            store.compare_and_swap("state", b"2", wrong)
        assert caught.value.filename == f"{store.uri}/state"
    assert store.read("state") == b"1"
    second = store.compare_and_swap("state", b"2", first)
    assert store.version("state") == second != first
    assert store.read("state") == b"2"
    store.delete(["state"])
    with pytest.raises(FileExistsError):
        store.compare_and_swap("state", b"3", second)
    assert names(store) == ["another"]


def test_eight_threads_that_increment_a_counter_lose_no_update(store: Store) -> None:
    def add_one(_: int) -> None:
        while True:
            version = store.version("count")
            count = int(store.read("count")) if version else 0
            try:
                store.compare_and_swap("count", str(count + 1).encode(), version)
                return
            except FileExistsError:
                continue

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add_one, range(32)))
    assert store.read("count") == b"32"


def test_of_many_that_create_a_file_one_does_and_nothing_is_replaced(store: Store, tmp_path: Path) -> None:
    def create(number: int) -> int:
        try:
            store.create(file(tmp_path / str(number), b"%d" % number), "sub/a")
        except FileExistsError:
            return -1
        return number

    with ThreadPoolExecutor(8) as pool:
        (first,) = set(pool.map(create, range(8))) - {-1}
    assert store.read("sub/a") == b"%d" % first
    assert names(store) == ["sub/a"]
    store.delete(["sub/a"])
    assert create(9) == 9


def test_deleting_a_missing_file_is_no_error(store: Store) -> None:
    for name in ("a", "b", "c"):
        store.write(name, b"")
    store.delete(name for name in ("a", "none", "c"))
    assert names(store) == ["b"]


def test_the_error_of_a_missing_file_has_its_address(store: Store, tmp_path: Path) -> None:
    for action in (lambda: store.read("none"), lambda: store.download("none", tmp_path / "copy")):
        with pytest.raises(FileNotFoundError) as caught:
            action()
        assert str(caught.value.filename) == f"{store.uri}/none"
    assert not list(tmp_path.glob("**/*copy*"))


def test_the_error_of_a_missing_bucket_has_its_address(bucket: str) -> None:
    with pytest.raises(FileNotFoundError, match="gs://no-such-bucket/folder/"):
        open_store("gs://no-such-bucket/folder").list_objects()


def test_an_address_without_a_bucket_is_refused(refusal: Callable[..., str]) -> None:
    assert "names no bucket" in refusal(lambda: open_store("gs://"))


def test_a_file_is_downloaded_once_per_version(bucket: str, proxy: Proxy) -> None:
    store = open_store(bucket)
    store.write("a.npz", b"1")
    paths = [fetch_file(f"{bucket}/a.npz") for _ in range(3)]
    assert proxy.count(DOWNLOAD) == 1
    assert [path.name for path in paths] == ["a.npz"] * 3
    store.write("a.npz", b"2")
    assert fetch_file(f"{bucket}/a.npz").read_bytes() == b"2"
    assert paths[0].read_bytes() == b"1"


def test_copies_are_deleted_when_they_exceed_the_limit_least_recently_used_first(
    bucket: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DMD2_CACHE_GB", "25e-9")
    monkeypatch.setattr(storage, "SPARED_S", 0)
    store = open_store(bucket)
    paths = []
    for name in "abc":
        store.write(name, b"ten bytes.")
        paths.append(fetch_file(f"{bucket}/{name}"))
        os.utime(paths[-1], (1e9 + len(paths), 1e9 + len(paths)))
    a, b, _ = paths
    assert [path.exists() for path in paths] == [False, True, True]
    with b.open("rb") as opened:
        monkeypatch.setenv("DMD2_CACHE_GB", "15e-9")
        assert fetch_file(f"{bucket}/a") == a
        assert [path.exists() for path in paths] == [True, False, False]
        assert opened.read() == b"ten bytes."
    assert proxy.count(DOWNLOAD) == 4


def test_a_copy_that_was_just_fetched_is_not_deleted(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMD2_CACHE_GB", "1e-9")
    for name in "ab":
        open_store(bucket).write(name, b"ten bytes.")
    assert all(path.exists() for path in [fetch_file(f"{bucket}/{name}") for name in "ab"])


def test_a_limit_that_is_no_number_is_refused(
    bucket: str, monkeypatch: pytest.MonkeyPatch, refusal: Callable[[Callable[[], object]], str]
) -> None:
    open_store(bucket).write("a", b"ten bytes.")
    for limit in ("much", "0", "-1"):
        monkeypatch.setenv("DMD2_CACHE_GB", limit)
        assert "give a number of gigabytes above 0" in refusal(lambda: fetch_file(f"{bucket}/a"))


def test_a_large_file_goes_up_and_down_in_pieces(
    behind: Store, proxy: Proxy, small_pieces: int, tmp_path: Path
) -> None:
    path = file(tmp_path / "large", os.urandom(3 * small_pieces + 5))
    behind.upload(path, "large")
    behind.download("large", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == path.read_bytes()
    assert proxy.count(UPLOAD) >= 4
    assert proxy.count(DOWNLOAD) == 4


FAULTS: list[Fault] = ["503", "drop", "lost", "cut"]


@pytest.mark.parametrize("fault", FAULTS)
def test_failed_requests_are_retried(behind: Store, proxy: Proxy, fault: Fault, tmp_path: Path) -> None:
    proxy.fail(".*", fault, share=0.25)
    data = {f"{n}": os.urandom(1000 + n) for n in range(4)}
    for name, content in data.items():
        file(tmp_path / "many" / name, content)
    upload_files(tmp_path / "many", list(data), behind)
    behind.upload(tmp_path / "many" / "0", "again")
    behind.write("0", data["0"])
    behind.download("1", tmp_path / "copy")
    assert {name: behind.read(name) for name in data} == data
    assert (tmp_path / "copy").read_bytes() == data["1"]
    assert names(behind) == [*sorted(data), "again"]
    behind.delete(["0", "again"])
    assert names(behind) == sorted(data)[1:]
    assert proxy.injected[fault] >= 3


@pytest.mark.parametrize("fault", FAULTS)
def test_failed_requests_of_large_files_are_retried(
    behind: Store, proxy: Proxy, fault: Fault, small_pieces: int, tmp_path: Path
) -> None:
    # Of a piece that comes again, this server takes the bytes twice, which its checksum tells.
    if fault not in ("lost", "cut"):
        proxy.fail(UPLOAD, fault, times=2, share=0.5)
    proxy.fail(DOWNLOAD, fault, times=2, share=0.5)
    path = file(tmp_path / "large", os.urandom(3 * small_pieces + 5))
    behind.upload(path, "large")
    behind.download("large", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == path.read_bytes()
    assert proxy.injected[fault] >= 2


@pytest.mark.parametrize("size", [100, 2**18 + 100])
@pytest.mark.parametrize("fault", ["flip", "short"])
def test_a_download_that_was_corrupted_is_an_error_and_leaves_no_file(
    behind: Store, proxy: Proxy, fault: Fault, size: int, small_pieces: int, tmp_path: Path
) -> None:
    behind.write("a", os.urandom(size))
    proxy.fail(DOWNLOAD, fault)
    actions = [lambda: behind.download("a", tmp_path / "copy")] + (
        [lambda: behind.read("a")] if size < 200 else []
    )
    for action in actions:
        with pytest.raises(OSError, match="does not answer as it should") as caught:
            action()
        assert (caught.value.errno, caught.value.filename) == (errno.EIO, f"{behind.uri}/a")
    assert proxy.injected[fault]
    assert not list(tmp_path.glob("*copy*"))


def test_an_upload_that_was_corrupted_is_an_error_and_leaves_no_object(
    behind: Store, proxy: Proxy, small_pieces: int, tmp_path: Path
) -> None:
    """Only for a chunked upload: the checksum of a small one is compared by the service, but not by the test server."""
    path = file(tmp_path / "a", os.urandom(small_pieces + 100))
    proxy.fail(UPLOAD, "flip", after=1)  # the first request only opens what goes up in pieces
    with pytest.raises(OSError, match="does not answer as it should") as caught:
        behind.upload(path, "a")
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, f"{behind.uri}/a")
    assert proxy.injected["flip"]
    assert names(behind) == []


def test_a_swap_whose_answer_was_lost_succeeds(behind: Store, proxy: Proxy) -> None:
    """The retry finds that the version has changed, and recognizes its own write."""
    proxy.fail(UPLOAD, "lost", times=1)
    first = behind.compare_and_swap("state", b"1", None)
    assert proxy.injected["lost"] == 1
    assert behind.version("state") == first
    with pytest.raises(FileExistsError):
        behind.compare_and_swap("state", b"1", None)


def test_a_creation_whose_answer_was_lost_succeeds(behind: Store, proxy: Proxy, tmp_path: Path) -> None:
    proxy.fail(UPLOAD, "lost", times=1)
    behind.create(file(tmp_path / "a", b"whole"), "a")
    assert proxy.injected["lost"] == 1
    assert behind.read("a") == b"whole"
    with pytest.raises(FileExistsError):
        behind.create(tmp_path / "a", "a")


def test_an_unreachable_bucket_is_an_error_with_the_address_of_the_object(
    bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DMD2_RETRY_S", "0.5")
    use_host("http://127.0.0.1:9", monkeypatch)
    store, path = open_store(f"{bucket}/folder"), file(tmp_path / "a", b"x")
    actions: list[Callable[[], object]] = [
        lambda: store.read("a"), lambda: store.write("a", b""), lambda: store.upload(path, "a"),
        lambda: upload_files(tmp_path, ["a"], store), lambda: store.download("a", tmp_path / "copy"),
        lambda: store.version("a"), lambda: store.delete(["a"]),
    ]  # fmt: skip
    for action in actions:
        with pytest.raises(OSError, match="does not answer as it should") as caught:
            action()
        assert (caught.value.errno, caught.value.filename) == (errno.EIO, f"{bucket}/folder/a")


def test_an_unreachable_bucket_ends_a_command_with_one_sentence_and_74(
    bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = tmp_path / "said"
    process = start_command(
        said, "gate", "edm-digits", "--evaluation", f"{bucket}/evaluation", "--out", f"{bucket}/gate",
        DMD2_RETRY_S="0.5", STORAGE_EMULATOR_HOST="http://127.0.0.1:9",
    )  # fmt: skip
    process.join()
    assert process.exitcode == 74
    sentence = said.read_text()
    assert sentence.count("\n") == 1
    assert re.match(
        rf"dmd2: the bucket does not answer as it should \(.*\) at {bucket}/evaluation/manifest.json; .*: run again",
        sentence,
    )


def test_a_bucket_without_permission_ends_a_command_with_advice_and_74(
    bucket: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy.fail(".*", "403")
    words = ["dmd2", "gate", "edm-digits", "--evaluation", f"{bucket}/evaluation", "--out", f"{bucket}/gate"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 74
    assert "allow access to it" in capsys.readouterr().err


def test_a_failed_download_leaves_nothing_in_the_cache(behind: Store, proxy: Proxy) -> None:
    behind.write("a", b"content")
    proxy.fail(DOWNLOAD, "flip")
    with pytest.raises(OSError, match="does not answer"):
        fetch_file(f"{behind.uri}/a")
    assert not [path for path in cache().rglob("*") if path.is_file()]
