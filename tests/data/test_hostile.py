"""Files made to do harm: each is refused or counted in a sentence, with little memory and nothing run."""

from __future__ import annotations

import resource
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from dmd2.data.decode import decode_image

Refusal = Callable[[Callable[[], object]], str]


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def huge_png(side: int) -> bytes:
    """A black picture of 1 bit per pixel, a few kB for any size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((1 + -(-side // 8)) * side), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_a_picture_of_too_many_pixels_is_not_decoded(refusal: Refusal) -> None:
    file = huge_png(13_300)
    assert len(file) < 30_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "13300 x 13300 pixels, more than 64 million" in refusal(lambda: decode_image(file))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kB
    assert "more than 0.01 million" in refusal(lambda: decode_image(huge_png(200), 10_000))
    assert decode_image(huge_png(100), 10_000).size == (100, 100)


def test_a_huge_picture_in_a_folder_is_counted(tmp_path: Path) -> None:
    from dmd2 import recipes, stages
    from tests.conftest import MICRO

    put(tmp_path / "source" / "huge.png", huge_png(13_300))
    for index in range(3):
        put(tmp_path / "source" / f"{index}.png", huge_png(10 + index))
    config = recipes.resolve("edm-digits", (*MICRO, "data.holdout=0"))
    made = stages.shard(config, str(tmp_path / "source"), str(tmp_path / "shards"), workers=1)
    assert made.facts["train"] == 3
    (broken,) = made.facts["broken"]
    assert "--data.max-megapixels" in broken
