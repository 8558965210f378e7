"""Many shards are listed in index files; few in the manifest, as always."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dmd2 import stages
from dmd2.config import Config
from dmd2.data import shard_table
from dmd2.data.loader import Shards
from dmd2.io.artifact import MANIFEST, read_manifest
from tests.bucket import list_names

PIECES = ["index/000000.json", "index/000001.json"]


@pytest.fixture
def indexed(micro: Config, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shards of `made`, four, with an index file for every two of them."""
    monkeypatch.setattr(shard_table, "SHARDS_PER_INDEX", 2)
    stages.shard(micro, str(pictures), str(tmp_path / "indexed"), workers=1)
    return tmp_path / "indexed"


def contents(folder: str) -> list[tuple[bytes, int, str]]:
    """All samples of both splits."""
    found = []
    for split in ("train", "holdout"):
        shards = Shards(folder, split)
        places = [(n, i) for n, count in enumerate(shards.counts) for i in range(count)]
        found += [(bytes(s.data), s.label, s.text) for s in (shards.sample(*place) for place in places)]
    return found


def test_an_index_lists_the_same_shards(indexed: Path, made: Path) -> None:
    assert contents(str(indexed)) == contents(str(made / "shards"))
    manifest = read_manifest(indexed, "shards")
    assert [file.path for file in manifest.files] == manifest.facts["shard_index"] == PIECES
    assert "shards" not in manifest.facts
    listed, direct = Shards(indexed, "train").files, Shards(made / "shards", "train").files
    assert [listed[n] for n in range(len(listed))] == [direct[n] for n in range(len(direct))]


def test_a_folder_with_an_index_is_finished(indexed: Path, micro: Config, pictures: Path) -> None:
    before = read_manifest(indexed, "shards")
    assert stages.shard(micro, str(pictures), str(indexed)) == before


def test_on_a_bucket_too(
    micro: Config, pictures: Path, made: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_table, "SHARDS_PER_INDEX", 2)
    stages.shard(micro, str(pictures), f"{bucket}/shards", workers=1)
    assert contents(f"{bucket}/shards") == contents(str(made / "shards"))
    shards = sorted(path.name for path in (made / "shards").glob("*.tar"))
    assert sorted(list_names(f"{bucket}/shards")) == sorted([*shards, *PIECES, MANIFEST])


def test_a_changed_index_or_shard_is_refused(
    indexed: Path, tmp_path: Path, refusal: Callable[[Callable[[], object]], str]
) -> None:
    for name, what in (("index/000001.json", "changed after"), ("train-000000-000.tar", "changed after")):
        folder = Path(shutil.copytree(indexed, tmp_path / name.split("/")[0]))
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)
        assert what in refusal(lambda folder=folder: Shards(folder, "train").sample(0, 0))  # type: ignore[misc]
