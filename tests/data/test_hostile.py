"""Files made to do harm: each is refused or counted in a sentence, with little memory and nothing run."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import resource
import struct
import tarfile
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dmd2 import recipes, stages
from dmd2.data.account import Account
from dmd2.data.decode import decode_image
from dmd2.data.layouts import open_source
from dmd2.data.listing import Wanted
from dmd2.data.prompts import read_prompts
from dmd2.data.sources import SourceImage
from tests.conftest import MICRO

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
    put(tmp_path / "source" / "huge.png", huge_png(13_300))
    for index in range(3):
        put(tmp_path / "source" / f"{index}.png", huge_png(10 + index))
    config = recipes.resolve("edm-digits", (*MICRO, "data.holdout=0"))
    made = stages.shard(config, str(tmp_path / "source"), str(tmp_path / "shards"), workers=1)
    assert made.facts["train"] == 3
    (broken,) = made.facts["broken"]
    assert "--data.max-megapixels" in broken


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("L", (8, 8)).save(stream, format="PNG")
    return stream.getvalue()


def read_all(address: Path | str) -> list[SourceImage]:
    source = open_source(str(address))
    records = source.records or [
        record for archive in source.archives for record in archive.records(Account())
    ]
    for record in records:
        record.read()
    return list(records)


@contextmanager
def little(megabytes: float = 32, seconds: float = 5) -> Iterator[None]:
    """Little memory is taken by Python and numpy, and little time."""
    start = time.monotonic()
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < megabytes * 1e6
    finally:
        tracemalloc.stop()
    assert time.monotonic() - start < seconds


def tar_header(
    name: str, size: int, kind: bytes = tarfile.REGTYPE, more: dict[int, bytes] | None = None
) -> bytes:
    """The first block of a member of a GNU tar, with bytes put at some offsets."""
    member = tarfile.TarInfo(name)
    member.size, member.type = max(size, 0), kind
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT)[:512])
    if size < 0:
        block[124:136] = b"\xff" * 4 + struct.pack(">q", size)
    for offset, data in (more or {}).items():
        block[offset : offset + len(data)] = data
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(**fields: str) -> bytes:
    """Extended headers for the next member."""
    text = b""
    for name, value in fields.items():
        body = f" {name.replace('_', '.')}={value}\n".encode()
        length = next(n for n in range(len(body), len(body) + 9) if n == len(body) + len(str(n)))
        text += str(length).encode() + body
    return tar_header("pax", len(text), tarfile.XHDTYPE) + text + bytes(-len(text) % 512)


CLAIM = 64 * 2**30
HUGE = b"%011o\0" % (8 * 2**30 - 1)
TARS: dict[str, bytes] = {
    "sparse, GNU": tar_header(
        "a.png",
        0,
        tarfile.GNUTYPE_SPARSE,
        {386: HUGE + b"%011o\0" % 0, 483: b"\x80" + CLAIM.to_bytes(11, "big")},
    ),
    "sparse, pax 0.0": pax(GNU_sparse_size=str(CLAIM)) + tar_header("a.png", 0),
    "sparse, pax 0.1": pax(GNU_sparse_map="0,0", GNU_sparse_size=str(CLAIM)) + tar_header("a.png", 0),
    "sparse, pax 1.0, without its end": pax(
        GNU_sparse_major="1", GNU_sparse_minor="0", GNU_sparse_realsize=str(CLAIM)
    )
    + tar_header("a.png", 0),
    "a member longer than the file": tar_header("a.png", CLAIM),
    "a name of 64 GiB": tar_header("././@LongLink", CLAIM, tarfile.GNUTYPE_LONGNAME),
    "extended headers of 64 GiB": tar_header("pax", CLAIM, tarfile.XHDTYPE),
    "a negative size": tar_header("a.png", -1024),
    "a negative size in an extended header": pax(size="-5120") + tar_header("a.png", 0),
    "headers of headers": tar_header("x", 0, tarfile.GNUTYPE_LONGNAME) * 5000,
}


@pytest.mark.parametrize("what", TARS)
@pytest.mark.parametrize("layout", ["webdataset", "imagenet", "inner"])
def test_a_tar_that_claims_more_than_it_has_is_refused(
    what: str, layout: str, tmp_path: Path, refusal: Refusal
) -> None:
    good = tar_header("0.png", len(png())) + png() + bytes(-len(png()) % 512)
    bad = good + TARS[what] + bytes(10240)
    if layout == "inner":
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as outer:
            member = tarfile.TarInfo("n00000001.tar")
            member.size = len(bad)
            outer.addfile(member, io.BytesIO(bad))
        bad = stream.getvalue()
    name = (
        "part.tar"
        if layout == "webdataset"
        else "n00000001.tar"
        if layout == "imagenet"
        else "ILSVRC2012_img_train.tar"
    )
    path = put(tmp_path / name, bad)
    with little():
        assert "is no tar file, or not all of it" in refusal(lambda: read_all(path))


def idx(count: int, side: int = 28) -> bytes:
    return bytes([0, 0, 8, 3]) + struct.pack(">III", count, side, side)


@pytest.mark.parametrize("count", [2**20, 2**31])
def test_a_gzip_that_inflates_a_thousandfold_is_refused(count: int, tmp_path: Path, refusal: Refusal) -> None:
    put(
        tmp_path / "a-images-idx3-ubyte.gz",
        gzip.compress(idx(count) + bytes(2**20)) + gzip.compress(bytes(2**24)),
    )
    put(tmp_path / "a-labels-idx1-ubyte", b"")
    with little():
        assert "more than 200 times as many" in refusal(lambda: open_source(str(tmp_path)))


def test_an_idx_file_that_claims_more_than_it_has_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    put(tmp_path / "a-labels-idx1-ubyte", b"")
    path = put(tmp_path / "a-images-idx3-ubyte", idx(2**31))
    with little():
        assert "or not all of it" in refusal(lambda: open_source(str(tmp_path)))
    path.rename(path.with_suffix(".gone"))
    put(tmp_path / "a-images-idx3-ubyte.gz", gzip.compress(idx(2**16) + bytes(1000)))
    with little(128):
        assert "or not all of it" in refusal(lambda: open_source(str(tmp_path)))


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def test_a_zip_that_inflates_a_thousandfold_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    labels = json.dumps({"labels": [["a.png", 0]]}).encode()
    picture = zipped(tmp_path / "a.zip", {"dataset.json": labels, "a.png": bytes(2**28)})
    json_file = zipped(tmp_path / "b.zip", {"dataset.json": labels + b" " * 2**28, "a.png": png()})
    with little():
        for path in (picture, json_file):
            assert "more than 200 times as many" in refusal(lambda path=path: read_all(path))  # type: ignore[misc]


def test_a_zip_with_a_password_or_an_unknown_compression_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    path = zipped(tmp_path / "a.zip", {"dataset.json": b'{"labels": []}', "a.png": png()})
    data = path.read_bytes()
    for offset, value in ((8, 1), (10, 97)):  # flags and method, in the entry of the directory
        entry = data.index(b"PK\x01\x02") + offset
        put(path.with_name(f"{value}.zip"), data[:entry] + bytes([value]) + data[entry + 1 :])
        assert "is no file in a zip" in refusal(lambda value=value: read_all(path.with_name(f"{value}.zip")))  # type: ignore[misc]


@pytest.mark.parametrize(
    "shape", ["(68719476736,)", "(-1, 8, 8)", "(4, 8, 9)", "(1, 2**99)", "(" * 3000 + ")" * 3000]
)
def test_an_npz_whose_header_claims_more_than_it_has_is_refused(
    shape: str, tmp_path: Path, refusal: Refusal
) -> None:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    array = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + bytes(4 * 64)
    path = zipped(tmp_path / "a.npz", {"images.npy": array})
    with little():
        assert "is no npz file of plain arrays" in refusal(lambda: open_source(str(path)))


def test_an_npz_of_zeros_is_read_up_to_a_size(tmp_path: Path, refusal: Refusal) -> None:
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((1000, 8, 8), np.uint8))
    assert len(open_source(str(tmp_path / "a.npz")).records) == 1000
    np.savez_compressed(tmp_path / "b.npz", images=np.zeros((2**22, 8, 8), np.uint8))
    with little():
        assert "more than 200 times as many" in refusal(lambda: open_source(str(tmp_path / "b.npz")))


DEEP = "[" * 200_000 + "]" * 200_000


def test_json_without_a_bottom_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    put(tmp_path / "coco" / "captions_a.json", DEEP.encode())
    put(tmp_path / "edm" / "dataset.json", DEEP.encode())
    put(tmp_path / "metadata" / "metadata.jsonl", DEEP.encode())
    put(tmp_path / "stats" / "0_stats.json", DEEP.encode())
    tar = tar_header("0.png", len(png())) + png() + bytes(-len(png()) % 512) + bytes(1024)
    put(tmp_path / "stats" / "0.tar", tar)
    table = pa.table({"image": [png()]}).replace_schema_metadata({"huggingface": DEEP})
    (tmp_path / "parquet").mkdir()
    pq.write_table(table, tmp_path / "parquet" / "a.parquet")
    for folder in ("coco", "edm", "metadata", "stats", "parquet"):
        with little(64):
            assert "recursion" in refusal(lambda folder=folder: read_all(tmp_path / folder)), folder  # type: ignore[misc]
    assert "is not JSON" in refusal(lambda: read_prompts(str(put(tmp_path / "a.jsonl", DEEP.encode()))))


def test_a_caption_without_a_bottom_is_a_broken_image(tmp_path: Path, refusal: Refusal) -> None:
    caption = DEEP.encode()
    data = b"".join(
        tar_header(name, len(file)) + file + bytes(-len(file) % 512)
        for name, file in (("0.png", png()), ("0.json", caption), ("1.png", png()))
    )
    put(tmp_path / "a.tar", data + bytes(1024))
    (archive,) = open_source(str(tmp_path / "a.tar"), Wanted(captions=True)).archives
    first, second = archive.records(Account())
    assert "no JSON object with a caption" in refusal(first.read)
    assert second.read() == png()


def test_damaged_metadata_of_parquet_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    table = pa.table({"image": [png()], "label": [0]})
    for number, note in enumerate(
        [
            "{",
            "[]",
            "5",
            '{"info": 5}',
            '{"info": {"features": []}}',
            '{"info": {"features": {"label": {"names": 5}}}}',
        ]
    ):
        pq.write_table(table.replace_schema_metadata({"huggingface": note}), tmp_path / f"{number}.parquet")
        assert "Parquet" in refusal(lambda number=number: read_all(tmp_path / f"{number}.parquet")), note  # type: ignore[misc]


def test_a_column_of_zeros_that_inflates_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    pq.write_table(
        pa.table({"image": [bytes(2**27)]}), tmp_path / "a.parquet", compression="zstd", use_dictionary=False
    )
    pq.write_table(
        pa.table({"text": ["a" * 2**27]}), tmp_path / "b.parquet", compression="zstd", use_dictionary=False
    )
    with little():
        assert "more than 200 times as many" in refusal(lambda: read_all(tmp_path / "a.parquet"))
        assert "more than 200 times as many" in refusal(lambda: read_prompts(str(tmp_path / "b.parquet")))


def test_a_pickle_of_lists_in_lists_is_not_written_out(tmp_path: Path, refusal: Refusal) -> None:
    laugh: list[object] = ["ha"]
    for _ in range(60):
        laugh = [laugh, laugh]
    path = put(tmp_path / "a.pkl", pickle.dumps([laugh]))
    with little():
        assert "all must be strings" in refusal(lambda: read_prompts(str(path)))
