"""Sources: every layout gives the same pictures, and what is wrong with one is said in a sentence."""

from __future__ import annotations

import gzip
import io
import json
import multiprocessing
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dmd2.data.account import Account
from dmd2.data.decode import prepare_image
from dmd2.data.layouts import open_source
from dmd2.data.layouts.arrays import digits
from dmd2.data.listing import Wanted
from dmd2.data.sources import Source, SourceImage
from dmd2.errors import Refused
from dmd2.io.storage import open_store

LABELS = [index // 4 for index in range(12)]
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
NAMES = ["cat", "cow", "dog"]
WNIDS = ["n01440764", "n01443537", "n01484850"]

Refusal = Callable[[Callable[[], object]], str]


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


PNGS = [png(pixels) for pixels in PIXELS]


def tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def put(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def folder(root: Path) -> Path:
    for i, label in enumerate(LABELS):
        put(root / NAMES[label] / f"{i:02d}.png", PNGS[i])
    return root


def class_tars(root: Path) -> Path:
    for label, wnid in enumerate(WNIDS):
        tar(
            root / f"{wnid}.tar",
            {f"{wnid}_{i}.JPEG": PNGS[i] for i in range(12) if LABELS[i] == label},
        )
    return root


def tar_of_tars(root: Path) -> Path:
    inner = class_tars(root / "parts")
    return tar(root / "ILSVRC2012_img_train.tar", {p.name: p.read_bytes() for p in sorted(inner.iterdir())})


def coco(root: Path) -> Path:
    images = [{"id": 100 + i, "file_name": f"{i:012d}.png"} for i in range(12)]
    notes = [
        {"id": 50 - i - 12 * n, "image_id": 100 + i, "caption": f"{'second' if n == 0 else 'first'} of {i}"}
        for n in range(2)
        for i in range(12)
    ]
    for i, data in enumerate(PNGS):
        put(root / "val2017" / f"{i:012d}.png", data)
    put(
        root / "annotations" / "captions_val2017.json",
        json.dumps({"images": images, "annotations": notes}),
    )
    put(root / "annotations" / "instances_val2017.json", "{}")
    return root


def metadata(root: Path, **more: object) -> Path:
    rows = [
        {"file_name": f"pictures/{i}.png", "text": f"first of {i}", "label": NAMES[LABELS[i]]} | more
        for i in range(12)
    ]
    for i, data in enumerate(PNGS):
        put(root / "pictures" / f"{i}.png", data)
    put(root / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    return root


def parquet(
    root: Path,
    label: Sequence[int | None] | None = LABELS,
    features: dict[str, object] | None = None,
    bare: bool = False,
) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for part in range(3):
        rows = range(part * 4, part * 4 + 4)
        images = [PNGS[i] if bare else {"bytes": PNGS[i], "path": f"{i}.png"} for i in rows]
        table: dict[str, Sequence[object]] = {"image": images, "caption": [f"first of {i}" for i in rows]}
        if label:
            table["label"] = [label[i] for i in rows]
        made = pa.table(table)
        if features:
            made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(made, root / f"train-{part:05d}-of-00003.parquet", row_group_size=3)
    return root


def webdataset(root: Path) -> Path:
    for part in range(3):
        files: dict[str, bytes] = {}
        for i in range(part * 4, part * 4 + 4):
            files[f"{i:09d}.png"] = PNGS[i]
            files[f"{i:09d}.txt"] = f"first of {i}".encode()
            files[f"{i:09d}.json"] = json.dumps({"caption": "another"}).encode()
            files[f"{i:09d}.cls"] = str(LABELS[i]).encode()
        tar(root / f"{part:05d}.tar", files)
        put(root / f"{part:05d}_stats.json", json.dumps({"successes": 4, "count": 5}))
        put(root / f"{part:05d}.parquet", b"what img2dataset notes about each image")
    return root


def edm_files() -> dict[str, bytes]:
    names = [f"00000/img{i:08d}.png" for i in range(12)]
    labels = json.dumps({"labels": [[n, label] for n, label in zip(names, LABELS, strict=True)]})
    return dict(zip(names, PNGS, strict=True)) | {"dataset.json": labels.encode()}


def edm_folder(root: Path) -> Path:
    for name, data in edm_files().items():
        put(root / name, data)
    return root


def edm_zip(root: Path) -> Path:
    root.mkdir()
    with zipfile.ZipFile(root / "digits-8x8.zip", "w") as archive:
        for name, data in edm_files().items():
            archive.writestr(name, data)
    return root / "digits-8x8.zip"


def reference_lmdb(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(root), map_size=2**20) as env, env.begin(write=True) as transaction:
        transaction.put(b"images_shape", b"12 1 8 8")
        transaction.put(b"labels_shape", b"12")
        for row, (pixels, label) in enumerate(zip(PIXELS, LABELS, strict=True)):
            transaction.put(f"images_{row}_data".encode(), pixels.tobytes())
            transaction.put(f"labels_{row}_data".encode(), np.int64(label).tobytes())
    return root


def npz(root: Path) -> Path:
    root.mkdir()
    np.savez_compressed(root / "pictures.npz", images=PIXELS, labels=np.array(LABELS))
    return root / "pictures.npz"


def idx(root: Path, pack: Callable[[bytes], bytes] = gzip.compress, suffix: str = ".gz") -> Path:
    def header(*shape: int) -> bytes:
        return bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()

    put(root / f"train-images-idx3-ubyte{suffix}", pack(header(12, 8, 8) + PIXELS.tobytes()))
    put(root / f"train-labels-idx1-ubyte{suffix}", pack(header(12) + bytes(LABELS)))
    return root


MADE: dict[str, tuple[str, Callable[[Path], Path], list[str]]] = {
    "a folder": ("folder", folder, NAMES),
    "tars of ImageNet": ("imagenet", class_tars, WNIDS),
    "a tar of tars": ("imagenet", tar_of_tars, WNIDS),
    "captions of COCO": ("coco", coco, [""]),
    "metadata.jsonl": ("metadata", metadata, NAMES),
    "Parquet": ("parquet", parquet, ["0", "1", "2"]),
    "Parquet of bare bytes": ("parquet", lambda root: parquet(root, bare=True), ["0", "1", "2"]),
    "img2dataset": ("webdataset", webdataset, ["0", "1", "2"]),
    "a folder of EDM": ("edm", edm_folder, ["0", "1", "2"]),
    "a zip of EDM": ("edm", edm_zip, ["0", "1", "2"]),
    "npz": ("npz", npz, ["0", "1", "2"]),
    "lmdb": ("lmdb", reference_lmdb, ["0", "1", "2"]),
    "gzipped IDX": ("idx", idx, ["0", "1", "2"]),
    "IDX": ("idx", lambda root: idx(root, bytes, ""), ["0", "1", "2"]),
}
CAPTIONED = {"coco", "metadata", "parquet", "webdataset"}


def every(source: Source) -> Iterator[SourceImage]:
    yield from source.records
    for archive in source.archives:
        yield from archive.records(Account())


def seen(source: Source) -> list[tuple[int, str, bytes]]:
    return [(r.label, r.text, prepare_image(r.decode(r.read()), 8, 1).tobytes()) for r in every(source)]


@pytest.mark.parametrize("what", MADE)
@pytest.mark.parametrize("said", [True, False], ids=["said", "recognised"])
def test_every_layout_gives_the_same_pictures_labels_and_captions(
    what: str, said: bool, tmp_path: Path
) -> None:
    layout, make, classes = MADE[what]
    path = make(tmp_path / "source")
    source = open_source(f"{layout}:{path}" if said else str(path))
    labels = LABELS if len(classes) > 1 else [0] * 12
    texts = [f"first of {i}" if layout in CAPTIONED else "" for i in range(12)]
    assert source.classes == classes
    assert seen(source) == [(labels[i], texts[i], PIXELS[i].tobytes()) for i in range(12)]
    assert seen(source) == seen(source)
    assert source.count == (12 if layout in ("parquet", "webdataset") else None)


@pytest.mark.parametrize("what", MADE)
def test_forked_processes_read_the_same(what: str, tmp_path: Path) -> None:
    source = open_source(str(MADE[what][1](tmp_path / "source")))
    before = seen(source)
    with multiprocessing.get_context("fork").Pool(2, INHERITED.append, (source,)) as pool:
        assert pool.map(_inherited, range(4)) == [before] * 4


@pytest.mark.parametrize("what", MADE)
def test_a_bucket_gives_the_same_as_a_folder(what: str, bucket: str, tmp_path: Path) -> None:
    path = MADE[what][1](tmp_path / "source")
    address = f"{bucket}/{what}/{path.relative_to(tmp_path)}"
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    for file in files:
        open_store(f"{bucket}/{what}").upload(file, file.relative_to(tmp_path).as_posix())
    source = open_source(address)
    here = open_source(str(path))
    assert source.classes == here.classes
    assert [r.name.removeprefix(address) for r in every(source)] == [
        r.name.removeprefix(str(path)) for r in every(here)
    ]
    with multiprocessing.get_context("fork").Pool(2, INHERITED.append, (source,)) as pool:
        assert pool.map(_inherited, range(2)) == [seen(here)] * 2


def test_nothing_on_a_bucket_is_refused(bucket: str, refusal: Refusal) -> None:
    for address in (f"{bucket}/nowhere", f"{bucket}/nowhere/*.tar", f"coco:{bucket}/nowhere"):
        assert "is empty or does not exist" in refusal(lambda address=address: open_source(address))  # type: ignore[misc]


INHERITED: list[Source] = []


def _inherited(_: int) -> list[tuple[int, str, bytes]]:
    return seen(INHERITED[-1])


@pytest.mark.parametrize("what", MADE)
def test_the_fingerprint_changes_with_a_file_and_only_then(what: str, tmp_path: Path) -> None:
    path = MADE[what][1](tmp_path / "source")
    first = open_source(str(path)).fingerprint
    assert open_source(str(path)).fingerprint == first
    file = path if path.is_file() else next(p for p in sorted(path.rglob("*")) if p.is_file())
    os.utime(file, ns=(1, 1))
    assert open_source(str(path)).fingerprint != first


def test_digits_are_what_they_were() -> None:
    source = digits()
    assert source.fingerprint == "df4d2a47363613f3514b157d754bb29b858b2cdaa4a9f953459f6b6502efcd89"
    assert (len(source.records), source.records[0].name) == (5000, "digits:0")


def test_a_folder_is_sorted_folder_by_folder_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    for name in ("a b/1.png", "a/2.png", "a/.3.png", ".cache/4.png", "a/deep/5.png"):
        put(tmp_path / name, PNGS[0])
    source = open_source(str(tmp_path))
    assert source.classes == ["a", "a b"]
    assert [r.name for r in source.records] == [
        f"{tmp_path}/{n}" for n in ("a/2.png", "a/deep/5.png", "a b/1.png")
    ]


def test_a_pattern_chooses_files(tmp_path: Path) -> None:
    parquet(tmp_path)
    assert open_source(f"{tmp_path}/train-0000[02]*.parquet").count == 8
    assert open_source(f"{tmp_path}/train-00001-of-00003.parquet").count == 4


def test_classes_are_called_as_the_parquet_file_says(tmp_path: Path) -> None:
    source = open_source(str(parquet(tmp_path, features={"label": {"_type": "ClassLabel", "names": NAMES}})))
    assert source.classes == NAMES


def test_classes_txt_names_the_classes_of_tars(tmp_path: Path) -> None:
    put(webdataset(tmp_path) / "classes.txt", "\n".join(NAMES))
    assert open_source(str(tmp_path)).classes == NAMES


def test_a_captions_file_can_be_named(tmp_path: Path) -> None:
    coco(tmp_path)
    put(tmp_path / "annotations" / "captions_train2017.json", "{}")
    source = open_source(f"{tmp_path}/annotations/captions_val2017.json")
    assert [r.text for r in source.records] == [f"first of {i}" for i in range(12)]


def test_samples_that_cannot_be_read_are_met_one_at_a_time(tmp_path: Path, refusal: Refusal) -> None:
    files = {"1.png": PNGS[0], "2.txt": b"no image", "3.png": PNGS[1], "3.txt": b"\xff", "4.png": PNGS[2]}
    (archive,) = open_source(str(tar(tmp_path / "0.tar", files)), Wanted(captions=True)).archives
    account = Account()
    records = list(archive.records(account))
    assert [r.name.rpartition("/")[2] for r in records] == ["1.png", "3.png", "4.png"]
    assert account.left_out["files of samples without an image"].example.endswith("0.tar/2")
    assert "UTF-8" in refusal(records[1].read)
    assert records[2].read() == PNGS[2]


def test_names_that_lead_elsewhere_are_never_followed(tmp_path: Path) -> None:
    outside = put(tmp_path / "outside.png", PNGS[0])
    path = tmp_path / "source" / "n00000001.tar"
    tar(path, {"1.png": PNGS[1]})
    with tarfile.open(path, "a") as archive:
        for name, kind in (("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(outside)
            archive.addfile(member)
    assert [r.read() for r in every(open_source(str(path.parent)))] == [PNGS[1]]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["n00000001.tar", "outside.png", "source"]


def cut(path: Path, keep: float | int) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])


def broken(root: Path, what: str) -> str:
    """A source with something wrong; its address."""
    if what == "unknown layout":
        return f"cocoo:{root}"
    if what == "missing":
        return str(root / "nowhere")
    if what == "empty":
        root.mkdir()
    elif what == "stray image":
        put(folder(root) / "stray.png", PNGS[0])
    elif what == "no captions":
        (coco(root) / "annotations" / "captions_val2017.json").unlink()
        return f"coco:{root}"
    elif what == "image of COCO missing":
        (coco(root) / "val2017" / "000000000003.png").unlink()
    elif what == "two captions files":
        put(coco(root) / "annotations" / "captions_train2017.json", "{}")
    elif what == "captions that are something else":
        put(coco(root) / "annotations" / "captions_val2017.json", '{"info": 1}')
    elif what == "some labels missing":
        metadata(root)
        put(root / "13.png", PNGS[0])
        with (root / "metadata.jsonl").open("a") as stream:
            stream.write('\n{"file_name": "13.png", "text": "x"}')
    elif what == "image without a line":
        put(metadata(root) / "13.png", PNGS[0])
    elif what == "caption is a number":
        metadata(root, text=3)
    elif what == "label is a list":
        metadata(root, label=[1])
    elif what == "label below zero":
        parquet(root, [-1, *LABELS[1:]])
    elif what == "label missing in Parquet":
        parquet(root, [None, *LABELS[1:]])
    elif what == "label column missing":
        parquet(root, None, {"fine_label": {"_type": "ClassLabel", "names": NAMES}})
    elif what == "no image column":
        root.mkdir()
        pq.write_table(pa.table({"url": ["x"]}), root / "a.parquet")
    elif what == "splits":
        parquet(root)
        (root / "train-00000-of-00003.parquet").rename(root / "test-00000-of-00001.parquet")
    elif what == "cut Parquet":
        cut(parquet(root) / "train-00001-of-00003.parquet", 0.5)
    elif what == "image beside tars":
        put(webdataset(root) / "stray.png", PNGS[0])
    elif what == "class that is no number":
        tar(root / "0.tar", {"1.png": PNGS[0], "1.cls": b"dog"})
    elif what == "one key twice":
        tar(root / "0.tar", {"1.png": PNGS[0], "1.PNG": PNGS[0]})
    elif what == "cut zip":
        cut(edm_zip(root), 0.5)
    elif what == "zip without labels":
        root.mkdir()
        with zipfile.ZipFile(root / "a.zip", "w") as archive:
            archive.writestr("a.png", PNGS[0])
    elif what == "lost image of EDM":
        (edm_folder(root) / "00000" / "img00000003.png").unlink()
    elif what == "cut npz":
        cut(npz(root), 0.5)
    elif what == "floating point":
        root.mkdir()
        np.savez(root / "a.npz", images=PIXELS / 255)
    elif what == "too few labels":
        root.mkdir()
        np.savez(root / "a.npz", images=PIXELS, labels=np.arange(3))
    elif what == "IDX without labels":
        (idx(root) / "train-labels-idx1-ubyte.gz").unlink()
    elif what == "cut gzip":
        cut(idx(root) / "train-images-idx3-ubyte.gz", 0.5)
    elif what == "cut IDX":
        cut(idx(root, bytes, "") / "train-images-idx3-ubyte", 0.5)
    return str(root)


@pytest.mark.parametrize(
    ("what", "words"),
    {
        "unknown layout": "did you mean 'coco'",
        "missing": "does not exist",
        "empty": "is empty",
        "stray image": "stray.png lies beside the class folders",
        "no captions": "has no captions file",
        "image of COCO missing": "000000000003.png, which is not there",
        "two captions files": "name it: coco:",
        "captions that are something else": "no captions file of COCO",
        "some labels missing": "13.png has no label, though others have (3 classes)",
        "image without a line": "no line for 13.png",
        "caption is a number": "has 3 for a caption",
        "label is a list": "has label [1]",
        "label below zero": "has label -1; labels count from 0",
        "label missing in Parquet": "has no label, though others have",
        "label column missing": "has classes (fine_label), but no column label",
        "no image column": "has columns url",
        "splits": "several splits (test, train)",
        "cut Parquet": "no Parquet file, or not all of it",
        "image beside tars": "stray.png lies beside .tar files",
        "class that is no number": "1.cls is b'dog'",
        "one key twice": "1.PNG is there twice",
        "cut zip": "no zip file, or not all of it",
        "zip without labels": "has no dataset.json",
        "lost image of EDM": "img00000003.png, which is not there",
        "cut npz": "no npz file, or not all of it",
        "floating point": "images are float64 (12, 8, 8)",
        "too few labels": "12 images have 3 labels",
        "IDX without labels": "several classes, but their labels are missing",
        "cut gzip": "no IDX file, or not all of it",
        "cut IDX": "no IDX file of bytes in 3 dimensions, or not all of it",
    }.items(),
)
def test_a_wrong_source_is_refused_in_one_sentence(
    what: str, words: str, tmp_path: Path, refusal: Refusal
) -> None:
    address = broken(tmp_path / "source", what)
    wanted = Wanted(captions=what == "caption is a number")
    assert words in refusal(lambda: list(every(open_source(address, wanted))))


@pytest.mark.parametrize("keep", [100, 512, 700, 1024, 0.5, 5120, 5300, 0])
def test_a_tar_that_just_stops_is_refused_wherever_it_does(
    keep: float | int, tmp_path: Path, refusal: Refusal
) -> None:
    path = tar(tmp_path / "n00000001.tar", {f"{i}.png": PNGS[i] for i in range(5)})
    cut(path, keep)
    assert "no tar file, or not all of it" in refusal(lambda: list(every(open_source(str(path)))))


def test_tars_put_together_with_cat_are_refused(tmp_path: Path, refusal: Refusal) -> None:
    path = tar(tmp_path / "n00000001.tar", {"1.png": PNGS[0]})
    path.write_bytes(path.read_bytes() * 2)
    assert "goes on behind its end" in refusal(lambda: list(every(open_source(str(path)))))


def test_a_class_that_the_tars_do_not_know_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    put(webdataset(tmp_path) / "classes.txt", "cat\ncow")
    assert "has label 2, but there are 2 classes" in refusal(lambda: list(every(open_source(str(tmp_path)))))
    (tmp_path / "classes.txt").unlink()
    tar(tmp_path / "00003.tar", {"1.png": PNGS[0]})
    assert "has no label, though others have" in refusal(lambda: open_source(str(tmp_path)))


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("key", ["images", "labels"])
def test_an_npz_file_with_objects_is_refused_and_nothing_of_it_runs(
    key: str, tmp_path: Path, refusal: Refusal
) -> None:
    marker = tmp_path / "ran"
    arrays = {"images": PIXELS, "labels": np.array(LABELS)}
    arrays[key] = np.array([Hostile(marker)] * 12, dtype=object)
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    assert "plain arrays" in refusal(lambda: open_source(str(tmp_path / "a.npz")))
    put(tmp_path / "b.npz", pickle.dumps(Hostile(marker)))
    assert "is no npz file" in refusal(lambda: open_source(str(tmp_path / "b.npz")))
    assert not marker.exists()


def test_an_image_may_not_start_another_program() -> None:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, format="EPS")
    with pytest.raises(Refused, match="no image of a known format"):
        SourceImage("x", 0, stream.getvalue).decode(stream.getvalue())


def saved(image: Image.Image, kind: str, **how: object) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, format=kind, **how)
    return SourceImage("x", 0, stream.getvalue).decode(stream.getvalue())


def test_a_photograph_is_turned_upright() -> None:
    wide = Image.new("RGB", (16, 16), "black")
    wide.paste("white", (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side: the top is at the left
    pixels = np.asarray(prepare_image(saved(wide, "JPEG", exif=exif), 16, 1))
    assert pixels[:, :7].max() < 10
    assert pixels[:, 9:].min() > 245


@pytest.mark.parametrize(("background", "grey"), [("white", 255), ("#808080", 128), ("black", 0)])
def test_the_background_is_seen_through_and_never_what_lies_below(background: str, grey: int) -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 4, 8))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 255, 255, 0, 0])
    palette.paste(0, (0, 0, 4, 8))
    keyed = Image.new("RGB", (8, 8), (255, 0, 0))
    keyed.paste((0, 0, 255), (0, 0, 4, 8))
    for image in (
        saved(clear, "PNG"),
        saved(palette, "PNG", transparency=1),
        saved(palette, "GIF", transparency=1),
        saved(keyed, "PNG", transparency=(255, 0, 0)),
    ):
        pixels = np.asarray(prepare_image(image, 8, 3, background=background))
        assert (pixels[:, 4:] == grey).all(), image.mode
        assert (pixels[:, :4] == (0, 0, 255)).all(), image.mode
    half = Image.merge("LA", (Image.new("L", (8, 8), 0), Image.new("L", (8, 8), 128)))
    assert (
        abs(int(np.asarray(prepare_image(half, 8, 1, background=background))[0, 0]) - grey * 127 // 255) <= 1
    )


def test_greys_of_16_bits_keep_their_levels() -> None:
    levels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    expected = np.round(levels / 257).astype(np.uint8)
    for kind in ("PNG", "TIFF", "PPM"):
        image = saved(Image.fromarray(levels), kind)
        assert image.mode.startswith("I")
        np.testing.assert_array_equal(np.asarray(prepare_image(image, 8, 1)), expected)
        np.testing.assert_array_equal(np.asarray(prepare_image(image, 8, 3))[..., 2], expected)
    keyed = saved(Image.fromarray(levels), "PNG", transparency=0)
    assert np.asarray(prepare_image(keyed, 8, 1))[0, 0] == 255


def test_printing_inks_become_their_colours() -> None:
    inks = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    for image in (saved(inks, "JPEG", quality=100), saved(inks, "TIFF")):
        assert image.mode == "CMYK"
        assert np.abs(np.asarray(prepare_image(image, 16, 3), np.int64) - (255, 0, 0)).max() <= 2
        assert abs(int(np.asarray(prepare_image(image, 16, 1))[0, 0]) - 76) <= 2


def test_floating_point_pixels_are_refused(refusal: Refusal) -> None:
    assert "floating point" in refusal(lambda: prepare_image(Image.new("F", (8, 8)), 8, 1))


def test_a_filter_is_chosen_by_name(refusal: Refusal) -> None:
    step = Image.fromarray(np.repeat(np.repeat([[0, 255]], 8, 0), 8, 1).astype(np.uint8)).crop((0, 0, 16, 16))
    made = {
        name: prepare_image(step, 4, 1, name).tobytes() for name in ("bicubic", "lanczos", "box", "bilinear")
    }
    assert len(set(made.values())) == 4
    assert made["bicubic"] == step.resize((4, 4), Image.Resampling.BICUBIC).tobytes()
    assert "did you mean 'lanczos'" in refusal(lambda: prepare_image(step, 4, 1, "lanczoss"))
    clear = Image.new("RGBA", (8, 8))
    assert "no colour is named 'whiteish'" in refusal(
        lambda: prepare_image(clear, 8, 3, background="whiteish")
    )


def test_a_square_of_the_right_size_is_not_resampled() -> None:
    for filter in ("bicubic", "lanczos", "box", "bilinear"):
        image = Image.fromarray(PIXELS[0])
        assert prepare_image(image, 8, 1, filter).tobytes() == image.tobytes()
    wide = Image.fromarray(np.concatenate([PIXELS[0], PIXELS[1], PIXELS[2]], axis=1))
    assert prepare_image(wide, 8, 1).tobytes() == PIXELS[1].tobytes()
