from __future__ import annotations

import functools
import operator
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch

from dmd2.config import LoaderConfig
from dmd2.data.loader import DataLoader, RawBatch, Shards
from dmd2.errors import Refused


@pytest.fixture
def shards(made: Path) -> Shards:
    return Shards(made / "shards", "train")


def keys(batch: RawBatch) -> list[bytes]:
    """The pixels of each image, which tell all of them apart."""
    return [image.numpy().tobytes() for image in batch.image]


def take(
    shards: Shards, count: int, first: int = 0, seed: int = 0, rank: int = 0, world: int = 1, **settings: int
) -> list[list[bytes]]:
    stream = DataLoader(shards, 6, seed, LoaderConfig(**({"block": 2} | settings)), rank, world)
    return [keys(batch) for batch in islice(stream.batches(first), count)]


def test_an_epoch_sees_every_image_once(shards: Shards) -> None:
    assert len(shards) == 48
    for block in (1, 2, 9):
        seen = Counter(key for batch in take(shards, 8, block=block) for key in batch)
        assert len(seen) == 48
        assert set(seen.values()) == {1}


def test_epochs_and_seeds_differ_in_order(shards: Shards) -> None:
    first, second = take(shards, 8), take(shards, 8, first=8)
    assert first != second
    assert sorted(functools.reduce(operator.iadd, first, [])) == sorted(
        functools.reduce(operator.iadd, second, [])
    )
    assert take(shards, 8, seed=1) != first


@pytest.mark.parametrize("first", [1, 5, 8, 13])
def test_a_resumed_stream_continues_exactly(shards: Shards, first: int) -> None:
    assert take(shards, 4, first=first) == take(shards, first + 4)[first:]


def test_ranks_share_out_each_batch_and_nothing_else(shards: Shards) -> None:
    alone = take(shards, 10)
    ranks = [take(shards, 10, rank=rank, world=3) for rank in range(3)]
    for step, batch in enumerate(alone):
        parts = [ranks[rank][step] for rank in range(3)]
        assert sorted(functools.reduce(operator.iadd, parts, [])) == sorted(batch)
        assert all(len(part) == 2 for part in parts)


def test_a_batch_that_ranks_cannot_share_is_refused(shards: Shards, refusal: Callable[..., str]) -> None:
    assert "6 images cannot be divided among 4" in refusal(
        lambda: DataLoader(shards, 6, 0, LoaderConfig(), world=4)
    )


def test_labels_stay_with_their_images(shards: Shards) -> None:
    """Bars across are constant along rows, bars down along columns; blobs are neither."""
    batch = shards.evenly_spaced(48)
    bright = (batch.image[:, 0] > 100).float()
    across = bright.mean(2).max(1).values == 1
    down = bright.mean(1).max(1).values == 1
    torch.testing.assert_close(batch.label, torch.where(across, 0, torch.where(down, 2, 1)))


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "shards", tmp_path / "shards"))


def damage(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (lambda path: damage(path, 600), "changed after its manifest"),
        (lambda path: path.write_bytes(path.read_bytes()[:-512]), "truncated or replaced"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_a_damaged_shard_is_named_and_not_read(copy: Path, what: Callable[[Path], None], words: str) -> None:
    what(copy / "train-000001-000.tar")
    with pytest.raises(Refused, match=rf"train-000001-000\.tar .*{words}"):
        take(Shards(copy, "train"), 8)


def test_a_split_that_is_not_there_is_refused(copy: Path, refusal: Callable[..., str]) -> None:
    assert "no test images" in refusal(lambda: Shards(copy, "test"))


def test_shards_are_plain_tars_of_png_and_class(made: Path) -> None:
    with tarfile.open(made / "shards" / "train-000000-000.tar") as tar:
        names = tar.getnames()
        assert names[:2] == ["000000-0000000.cls", "000000-0000000.png"]
        assert all(member.mtime == 0 and not member.uname for member in tar.getmembers())


def test_some_samples_in_order_are_from_every_part_of_the_set(shards: Shards) -> None:
    assert torch.equal(shards.evenly_spaced(4).image, shards.evenly_spaced(48).image[[0, 12, 24, 36]])
