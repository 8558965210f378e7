"""Shards of a bucket on this disk: no more than fit, none that is not as its manifest says, each brought once."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from dmd2 import recipes, stages
from dmd2.data.cache import ShardCache
from dmd2.io import storage
from dmd2.io.artifact import ArtifactFile
from dmd2.io.gcs import GcsStore
from dmd2.io.storage import open_store, upload_files
from dmd2.io.store import Store
from tests.bucket import DOWNLOAD, Proxy
from tests.conftest import MICRO

SIZE = 1000


@pytest.fixture
def store(bucket: str) -> Store:
    return open_store(f"{bucket}/shards")


def shard(store: Store, name: str, size: int = SIZE) -> ArtifactFile:
    """An object of random bytes, as a manifest lists it."""
    data = os.urandom(size)
    store.write(name, data)
    return ArtifactFile(path=name, size=size, sha256=hashlib.sha256(data).hexdigest())


def there(cache: ShardCache) -> set[str]:
    """All files in the cache but its locks."""
    return {path.name for path in cache.folder.iterdir() if not path.name.endswith(".lock")}


def named(files: Iterable[ArtifactFile]) -> set[str]:
    return {file.sha256 for file in files}


def used_in_turn(cache: ShardCache, files: Iterable[ArtifactFile]) -> None:
    """Bring them, and say when each was used: the clock of a file system is coarse."""
    for when, file in enumerate(files):
        os.utime(cache.path(file), (when, when))


def test_a_shard_is_brought_once_and_is_what_the_bucket_holds(store: Store, proxy: Proxy) -> None:
    cache, file = ShardCache(store, 10 * SIZE), shard(store, "a.tar")
    for _ in range(3):
        assert cache.path(file).read_bytes() == store.read("a.tar")
    assert proxy.count(f"{DOWNLOAD}.*a.tar") == 1 + 3, "the last three are those of this test"


def test_the_cache_holds_no_more_bytes_than_it_may(store: Store) -> None:
    cache, files = ShardCache(store, 3 * SIZE + 1), [shard(store, f"{n}.tar") for n in range(5)]
    for count in range(1, 6):
        used_in_turn(cache, files[:count])
        assert there(cache) == named(files[max(0, count - 3) : count])


def test_what_was_used_last_stays(store: Store) -> None:
    cache, (a, b, c, d) = ShardCache(store, 3 * SIZE), [shard(store, f"{n}.tar") for n in range(4)]
    used_in_turn(cache, (a, b, c))
    cache.path(a)
    cache.path(d)
    assert there(cache) == named((a, c, d))


def test_a_large_shard_puts_out_as_many_as_it_needs(store: Store) -> None:
    cache, small = ShardCache(store, 4 * SIZE), [shard(store, f"{n}.tar") for n in range(4)]
    used_in_turn(cache, small)
    large = shard(store, "large.tar", 2 * SIZE + 1)
    cache.path(large)
    assert there(cache) == named((small[3], large))


def test_a_shard_larger_than_the_cache_is_read_all_the_same(store: Store) -> None:
    cache, file = ShardCache(store, SIZE // 2), shard(store, "a.tar")
    assert cache.path(file).stat().st_size == SIZE


def test_a_limit_counts_the_shards_of_all_folders(bucket: str) -> None:
    one, two = (ShardCache(open_store(f"{bucket}/{name}"), 2 * SIZE) for name in ("one", "two"))
    files = [shard(one.store, "0.tar"), shard(one.store, "1.tar")]
    used_in_turn(one, files)
    other = shard(two.store, "0.tar")
    two.path(other)
    assert there(one) == named((files[1], other))


def changed(store: Store) -> None:
    data = bytearray(store.read("a.tar"))
    data[SIZE // 2] ^= 1
    store.write("a.tar", bytes(data))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (changed, "was changed after its manifest was written"),
        (
            lambda store: store.write("a.tar", store.read("a.tar")[:-1]),
            "has 999 bytes, its manifest says 1000",
        ),
        (lambda store: shard(store, "a.tar"), "was changed after its manifest was written"),
        (lambda store: store.write("a.tar", b""), "has 0 bytes, its manifest says 1000"),
        (lambda store: store.delete(["a.tar"]), "is missing, though the manifest lists it"),
    ],
    ids=["changed", "truncated", "replaced", "emptied", "deleted"],
)
def test_a_damaged_object_is_named_and_never_enters(
    store: Store, refusal: Callable[..., str], damage: Callable[[Store], object], words: str
) -> None:
    cache, file = ShardCache(store, 10 * SIZE), shard(store, "a.tar")
    good = store.read("a.tar")
    damage(store)
    for _ in range(2):
        assert f"{store.uri}/a.tar {words}" in refusal(lambda: cache.path(file))
        assert there(cache) == set()
    store.write("a.tar", good)
    assert cache.path(file).read_bytes() == good


def test_processes_that_ask_at_once_bring_a_shard_once(store: Store, proxy: Proxy) -> None:
    file, context = shard(store, "a.tar", 2**20), multiprocessing.get_context("fork")
    together = context.Barrier(4)
    processes = [context.Process(target=ask, args=(store, file, together)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert proxy.count(DOWNLOAD) == 1


def ask(store: Store, file: ArtifactFile, together: Barrier) -> None:
    cache = ShardCache(store, 2**21)
    together.wait()
    assert hashlib.sha256(cache.path(file).read_bytes()).hexdigest() == file.sha256


def test_what_is_open_is_read_to_its_end_though_it_was_put_out(store: Store) -> None:
    cache, (a, b) = ShardCache(store, SIZE), [shard(store, f"{n}.tar") for n in range(2)]
    with cache.path(a).open("rb") as stream:
        cache.path(b)
        assert there(cache) == named([b])
        assert hashlib.sha256(stream.read()).hexdigest() == a.sha256


def test_what_another_process_puts_out_before_it_is_open_is_brought_again(store: Store, proxy: Proxy) -> None:
    cache, file, tried = ShardCache(store, SIZE), shard(store, "a.tar"), []

    def opener(path: Path) -> bytes:
        tried.append(path)
        if len(tried) == 1:
            path.unlink()
        return path.read_bytes()

    assert hashlib.sha256(cache.open(file, opener)).hexdigest() == file.sha256
    assert proxy.count(DOWNLOAD) == len(tried) == 2


def test_what_a_killed_process_left_is_removed_when_the_shard_is_asked_for_again(store: Store) -> None:
    cache, file = ShardCache(store, 10 * SIZE), shard(store, "a.tar")
    cache.folder.mkdir(parents=True)
    for left in (f".{file.sha256}.123.partial", f"..{file.sha256}.123.partial.123.partial"):
        (cache.folder / left).write_bytes(b"half")
    cache.path(file)
    assert there(cache) == named([file])


class Full(GcsStore):
    """On a disk that has no room while there is a shard on it."""

    def download(self, name: str, path: Path) -> None:
        if list(path.parent.glob("[0-9a-f]*")):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        super().download(name, path)


def test_on_a_full_disk_older_shards_make_room(bucket: str) -> None:
    cache = ShardCache(Full(f"{bucket}/shards"), 100 * SIZE)
    for n in range(3):
        file = shard(cache.store, f"{n}.tar")
        cache.path(file)
        assert there(cache) == named([file])


def test_a_disk_that_others_have_filled_is_the_disks_error(bucket: str) -> None:
    class Fuller(GcsStore):
        def download(self, name: str, path: Path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    cache = ShardCache(Fuller(bucket), 100 * SIZE)
    with pytest.raises(OSError, match="No space left"):
        cache.path(shard(cache.store, "a.tar"))
    assert there(cache) == set()


ON_A_SMALL_DISK = """
import sys
from pathlib import Path
from dmd2 import recipes, stages
from dmd2.data.cache import ShardCache
from dmd2.io import storage
from dmd2.io.artifact import ArtifactFile
from dmd2.io.local import sha256
from dmd2.io.storage import open_store, upload_files
uri, *files = sys.argv[1:]
cache = ShardCache(open_store(uri), 10**9)
for text in files:
    file = ArtifactFile.model_validate_json(text)
    assert sha256(cache.path(file)) == file.sha256
    print(len(list(cache.folder.glob("[0-9a-f]*"))), len(list(cache.folder.glob(".*partial"))))
"""


def test_on_a_disk_of_one_megabyte_five_shards_of_300_kb_are_read(store: Store, tmp_path: Path) -> None:
    """A file system of its own, that only the child sees. Three fit; the fourth puts them out."""
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*alone, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine lets no test have a file system of its own")
    disk = tmp_path / "disk"
    disk.mkdir()
    files = [shard(store, f"{n}.tar", 300_000).model_dump_json() for n in range(5)]
    command = f'mount -t tmpfs -o size=1m none {disk} && exec "$@"'
    ended = subprocess.run(
        [*alone, "sh", "-c", command, "sh", sys.executable, "-c", ON_A_SMALL_DISK, store.uri, *files],
        env=os.environ | {"DMD2_CACHE": str(disk)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == ["1 0", "2 0", "3 0", "1 0", "2 0"]


def test_archives_that_exceed_the_limit_together_are_sharded_one_after_the_other(
    pictures: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, config = tmp_path / "source", recipes.resolve("edm-digits", (*MICRO, "data.holdout=5"))
    source.mkdir()
    images = sorted(pictures.rglob("*.png"))
    for number in range(6):
        with tarfile.open(source / f"{number}.tar", "w") as tar:
            for path in images[number::6]:
                tar.add(path, f"{path.parent.name}-{path.name}")
    names = [path.name for path in source.iterdir()]
    upload_files(source, names, open_store(f"{bucket}/source"))
    sizes = [path.stat().st_size for path in source.iterdir()]
    limit = 2.5 * max(sizes)
    monkeypatch.setenv("DMD2_CACHE_GB", str(limit / 1e9))
    monkeypatch.setattr(storage, "SPARED_S", 0)
    here = stages.shard(config, str(source), str(tmp_path / "here"), workers=1)
    there = stages.shard(config, f"{bucket}/source", str(tmp_path / "there"), workers=1)
    assert there.digest == here.digest
    kept = [path.stat().st_size for path in (storage.cache() / "files").glob("*/*.tar")]
    assert 0 < sum(kept) <= limit < sum(sizes)
