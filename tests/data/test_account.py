"""The account of a source: every file, archive member, row and line is used, or left out with a count and a reason."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dmd2 import recipes, stages
from dmd2.config import Config
from dmd2.data.account import Account
from dmd2.data.loader import Shards
from dmd2.data.prompts import read_prompts
from tests.conftest import MICRO
from tests.data.test_sources import put, tar

Refusal = Callable[[Callable[[], object]], str]
TINY_TEXT = ("family.resolution=32", "family.vae_stride=2", "data.holdout=0")


def picture(seed: int, side: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def encoded(seed: int, kind: str = "PNG", side: int = 8) -> bytes:
    stream = io.BytesIO()
    picture(seed, side).save(stream, format=kind)
    return stream.getvalue()


def classes(*more: str) -> Config:
    return recipes.resolve("edm-digits", (*MICRO, "family.network.classes=12", "data.holdout=0", *more))


def texts(*more: str) -> Config:
    return recipes.resolve("sdxl-4step-emoji", (*TINY_TEXT, *more))


def sharded(config: Config, source: Path, out: Path) -> dict[str, Any]:
    """The facts of the shards."""
    return stages.shard(config, str(source), str(out), workers=1).facts


def captions(out: Path) -> list[str]:
    return sorted(Shards(out, "train").evenly_spaced(1000).text)


def left_out(facts: dict[str, Any]) -> dict[str, int]:
    return {reason: tally["count"] for reason, tally in facts["account"]["left_out"].items()}


IMAGE_KINDS = {
    "a.png": "PNG", "b.jpg": "JPEG", "c.jpeg": "JPEG", "d.JPG": "JPEG", "e.jfif": "JPEG", "f.jpe": "JPEG", "g.webp": "WEBP",
    "h.gif": "GIF", "i.bmp": "BMP", "j.tif": "TIFF", "k.tiff": "TIFF", "l.ppm": "PPM", "m.pnm": "PPM", "n.jp2": "JPEG2000",
    "o.avif": "AVIF", "p.PNG": "PNG", "with.dots.png": "PNG", "caf\u00e9.png": "PNG", "a b.png": "PNG",
}  # fmt: skip
BROKEN = {"empty.png": b"", "text.jpg": b"no image", "page.gif": b"<html>", "cut.png": encoded(0)[:60]}
OTHERS = (
    "README.md", "LICENSE", "labels.json", "list.csv", "notes.txt", "a.xml", "a.npy", "movie.mp4", "raw.heic", "photo.cr2", "a.svg",
    "model.safetensors", "archive.rar", "a.pdf", "x.psd", "x.ico", "x.exr", "x.hdr", "Thumbs.db", "desktop.ini", "script.py", "x.bak",
)  # fmt: skip
HIDDEN = (".DS_Store", "cat/._a.png", ".cache/x.png", "__MACOSX/cat/a.png", "cat/.a.txt.swp")


def messy(root: Path) -> int:
    """Make a folder with 50 kinds of files; their number."""
    for seed, (name, kind) in enumerate(IMAGE_KINDS.items()):
        put(root / "cat" / name, encoded(seed, kind))
    for name, data in BROKEN.items():
        put(root / "cat" / name, data)
    for name in OTHERS:
        put(root / "cat" / name, b"something else")
    for name in HIDDEN:
        put(root / name, encoded(0))
    put(root / "cat" / "a.txt", "the caption of a")
    put(root / "cat" / "b.caption", "the caption of b")
    put(root / "cat" / "c.json", json.dumps({"caption": "the caption of c"}))
    put(root / "cat" / "i.txt", "one caption")
    put(root / "cat" / "i.caption", "a second one, which is not used")
    put(root / "cat" / "tiny.png", encoded(1, side=3))
    (root / "dog").symlink_to(put(root.parent / "elsewhere" / "dog" / "1.png", encoded(99)).parent)
    (root / "cat" / "gone.png").symlink_to(root / "nowhere.png")
    (root / "cat" / "again.png").symlink_to(root / "cat" / "a.png")
    (root / "cat" / "above").symlink_to(root)
    os.mkfifo(root / "cat" / "pipe")
    return len(IMAGE_KINDS) + len(BROKEN) + len(OTHERS) + len(HIDDEN) + 6 + 5


def test_the_account_of_a_messy_folder_adds_up(tmp_path: Path) -> None:
    num_files = messy(tmp_path / "source")
    facts = sharded(classes("data.min_side=4"), tmp_path / "source", tmp_path / "out")
    account = Account.model_validate(facts["account"])
    assert account.num_items == num_files > 50
    images = len(IMAGE_KINDS) + 2  # dog/1.png and the linked again.png
    assert account.used == {"images": images, "captions": 4}
    assert facts["train"] == images
    assert facts["classes"] == ["cat", "dog"]
    assert account.left_out["unreadable images"].count == len(BROKEN) + 1 == facts["unreadable"]
    assert left_out(facts)["hidden files"] == len(HIDDEN)
    assert left_out(facts)["links to a folder above"] == 1
    assert left_out(facts)["pipes, sockets and devices"] == 1
    assert left_out(facts)["images whose shorter side is below 4 pixels"] == 1
    others = {
        reason: n for reason, n in left_out(facts).items() if "the layout folder does not use" in reason
    }
    assert sum(others.values()) == len(OTHERS) + 1  # and the second caption of i
    assert "\n".join(account.lines()).count("left out: ") == len(account.left_out)


def test_what_was_left_out_is_printed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    messy(tmp_path / "source")
    with caplog.at_level("INFO", "dmd2"):
        facts = sharded(classes(), tmp_path / "source", tmp_path / "out")
    assert any("gone.png is a link to nothing" in line for line in facts["broken"])
    (record,) = [record for record in caplog.records if "are left out" in record.getMessage()]
    assert record.levelname == "WARNING"
    for words in ("unreadable images: 5", "hidden files: 5", ".heic files"):
        assert words in caplog.text
    assert " object at 0x" not in caplog.text


def test_the_account_of_tars_adds_up(tmp_path: Path) -> None:
    files = {
        "./0.png": encoded(0), "./0.txt": b"zero", "./0.json": b'{"url": "x"}', "./0.cls": b"0",
        "./1.jpg": encoded(1, "JPEG"), "./1.caption": b"one", "./1.mask": b"x", "./1.cls": b"1",
        "./2.txt": b"no image", "./2.cls": b"0", "./3.png": b"broken", "./3.cls": b"1", "./.hidden": b"x",
        "./4.png": encoded(4), "./4.jpg": encoded(4, "JPEG"), "./4.cls": b"0",
    }  # fmt: skip
    path = tar(tmp_path / "source" / "0.tar", files)
    with tarfile.open(path, "a") as archive:
        member = tarfile.TarInfo("./5.png")
        member.type, member.linkname = tarfile.SYMTYPE, "0.png"
        archive.addfile(member)
    put(tmp_path / "source" / "0_stats.txt", "x")
    facts = sharded(classes(), tmp_path / "source", tmp_path / "out")
    account = Account.model_validate(facts["account"])
    assert account.num_items == len(files) + 1 + 2  # the link; the tar and the file beside it
    assert account.used == {"archives": 1, "images": 2, "captions": 2, "labels": 4}
    assert left_out(facts) == {
        ".txt files that the layout webdataset does not use": 1,
        ".mask files in an archive": 1,
        "files of samples without an image": 2,
        "further files with captions or descriptions of a sample": 1,
        "further images of a sample": 1,
        "hidden files": 1,
        "links, pipes and devices in an archive": 1,
        "unreadable images": 2,
    }


def test_rows_and_columns_of_parquet_are_in_the_account(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    table = {
        "image": [encoded(0), None, encoded(2)],
        "caption": ["a", "b", "c"],
        "url": ["x"] * 3,
        "width": [8] * 3,
    }
    pq.write_table(pa.table(table), tmp_path / "source" / "a.parquet")
    put(tmp_path / "source" / "README.md", "x")
    facts = sharded(classes(), tmp_path / "source", tmp_path / "out")
    account = Account.model_validate(facts["account"])
    assert account.num_items == 3 + 2
    assert account.used == {"archives": 1, "images": 2}
    assert account.remarks["columns that are not used"].example == "url, width"


def beside(root: Path, suffix: str, text: str = "caption {}", folder: str = "") -> None:
    for index in range(4):
        put(root / folder / f"{index}.png", encoded(index))
        put(root / folder / f"{index}{suffix}", text.format(index))


def listed(root: Path, name: str, lines: list[str]) -> None:
    for index in range(4):
        put(root / f"{index}.png", encoded(index))
    put(root / name, "\n".join(lines))


def parquet(root: Path, column: str, values: list[Any] | None = None) -> None:
    root.mkdir()
    images = [{"bytes": encoded(index), "path": "x"} for index in range(4)]
    pq.write_table(
        pa.table({"image": images, column: values or [f"caption {i}" for i in range(4)]}), root / "a.parquet"
    )


def in_tar(root: Path, suffix: str, text: str) -> None:
    pairs = [(f"{i}.png", encoded(i)) for i in range(4)], [(f"{i}{suffix}", text % i) for i in range(4)]
    files = {
        name: data.encode() if isinstance(data, str) else data
        for p in zip(*pairs, strict=True)
        for name, data in p
    }
    tar(root / "0.tar", files)


def jsonl(field: str, name: str = "{}.png") -> list[str]:
    return [json.dumps({"file_name": name.format(i), field: f"caption {i}"}) for i in range(4)]


CAPTIONED: dict[str, Callable[[Path], object]] = {
    "files beside the images": lambda root: beside(root, ".txt"),
    "files beside the images, of another suffix": lambda root: beside(root, ".caption"),
    "files named after the whole image": lambda root: beside(root, ".png.txt"),
    "files beside the images of img2dataset": lambda root: beside(
        root, ".json", '{{"caption": "caption {}"}}'
    ),
    "a folder of kohya": lambda root: beside(root, ".txt", folder="10_cat"),
    "byte order marks and line ends": lambda root: beside(root, ".txt", "\ufeffcaption {}\r\n"),
    "a list in CSV": lambda root: listed(
        root, "metadata.csv", ["file_name,text", *(f'{i}.png,"caption {i}"' for i in range(4))]
    ),
    "a list in JSON Lines, with a byte order mark": lambda root: listed(
        root, "metadata.jsonl", ["\ufeff" + jsonl("text")[0], *jsonl("text")[1:]]
    ),
    "prompt": lambda root: listed(root, "metadata.jsonl", jsonl("prompt")),
    "Text": lambda root: listed(root, "metadata.jsonl", jsonl("Text")),
    "names with ./": lambda root: listed(root, "metadata.jsonl", jsonl("text", "./{}.png")),
    "absolute names": lambda root: listed(root, "metadata.jsonl", jsonl("text", f"{root}/{{}}.png")),
    "TEXT in Parquet": lambda root: parquet(root, "TEXT"),
    "a list of captions in Parquet": lambda root: parquet(
        root, "captions", [[f"caption {i}", "another"] for i in range(4)]
    ),
    "description in a tar": lambda root: in_tar(root, ".json", '{"description": "caption %d"}'),
    "a .caption in a tar": lambda root: in_tar(root, ".caption", "caption %d"),
    "capitals in the suffix": lambda root: beside(root, ".TXT"),
    "a list elsewhere that names its images by ..": lambda root: [
        listed(root, "lists/metadata.jsonl", jsonl("text", "../{}.png"))
    ],
}


@pytest.mark.parametrize("what", CAPTIONED)
def test_captions_are_found(what: str, tmp_path: Path) -> None:
    CAPTIONED[what](tmp_path / "source")
    facts = sharded(texts(), tmp_path / "source", tmp_path / "out")
    assert captions(tmp_path / "out") == [f"caption {i}" for i in range(4)]
    assert (facts["train"], facts["without_caption"], facts["unreadable"]) == (4, 0, 0)


@pytest.mark.parametrize("what", ["Parquet", "JSON Lines", "JSON in a tar"])
def test_an_unknown_column_of_captions_is_refused_and_can_be_chosen(
    what: str, tmp_path: Path, refusal: Refusal
) -> None:
    source = tmp_path / "source"
    if what == "Parquet":
        parquet(source, "blip")
    elif what == "JSON Lines":
        listed(source, "metadata.jsonl", jsonl("blip"))
    else:
        in_tar(source, ".json", '{"blip": "caption %d"}')
    sentence = refusal(lambda: sharded(texts(), source, tmp_path / "out"))
    assert "blip" in sentence
    assert "--data.caption-column" in sentence
    sharded(texts("data.caption_column=blip"), source, tmp_path / "out")
    assert captions(tmp_path / "out") == [f"caption {i}" for i in range(4)]


def test_images_without_a_caption_are_left_out_or_kept_on_request(tmp_path: Path, refusal: Refusal) -> None:
    beside(tmp_path / "some", ".txt")
    (tmp_path / "some" / "1.txt").unlink()
    put(tmp_path / "some" / "2.txt", " \n")
    facts = sharded(texts(), tmp_path / "some", tmp_path / "out")
    assert (facts["train"], facts["without_caption"]) == (2, 2)
    facts = sharded(texts("data.allow_empty_captions=True"), tmp_path / "some", tmp_path / "all")
    assert facts["train"] == 4
    for name in ("1.txt", "0.txt", "2.txt", "3.txt"):
        (tmp_path / "some" / name).unlink(missing_ok=True)
    sentence = refusal(lambda: sharded(texts(), tmp_path / "some", tmp_path / "none"))
    assert "none of the 4 images of the source has a caption" in sentence
    parquet(tmp_path / "rows", "text", [None, "", " ", None])
    sentence = refusal(lambda: sharded(texts(), tmp_path / "rows", tmp_path / "none"))
    assert "images without a caption: 4" in sentence
    assert not (tmp_path / "none").exists()


def test_half_a_character_in_a_caption_is_replaced(tmp_path: Path) -> None:
    listed(tmp_path / "source", "metadata.jsonl", [
        json.dumps({"file_name": f"{i}.png", "text": "a cat \ud83d"}) for i in range(4)
    ])  # fmt: skip
    sharded(texts(), tmp_path / "source", tmp_path / "out")
    assert set(captions(tmp_path / "out")) == {"a cat \ufffd"}


def test_names_in_two_forms_of_unicode_are_the_same(tmp_path: Path) -> None:
    for index, form in enumerate(("caf\u00e9", "cafe\u0301")):
        put(tmp_path / "source" / form / f"{index}.png", encoded(index))
    assert sharded(classes(), tmp_path / "source", tmp_path / "out")["classes"] == ["caf\u00e9"]
    put(tmp_path / "listed" / "cafe\u0301.png", encoded(0))
    put(tmp_path / "listed" / "metadata.jsonl", json.dumps({"file_name": "caf\u00e9.png", "text": "x"}))
    assert sharded(texts(), tmp_path / "listed", tmp_path / "texts")["train"] == 1


def odd(folder: Path, name: bytes, data: bytes) -> None:
    path = os.path.join(os.fsencode(folder), name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as stream:
        stream.write(data)


def test_names_that_are_not_utf8_are_read_counted_or_refused(tmp_path: Path, refusal: Refusal) -> None:
    odd(tmp_path / "files", b"a/caf\xe9.png", encoded(0))
    odd(tmp_path / "files", b"a/br\xe9.png", b"no image")
    facts = sharded(classes(), tmp_path / "files", tmp_path / "out")
    assert (facts["train"], facts["unreadable"]) == (1, 1)
    assert "br\\udce9.png" in facts["broken"][0]
    odd(tmp_path / "folders", b"caf\xe9/2.png", encoded(0))
    put(tmp_path / "folders" / "dog" / "1.png", encoded(1))
    sentence = refusal(lambda: sharded(classes(), tmp_path / "folders", tmp_path / "none"))
    assert "the name of its class is not in UTF-8" in sentence


def test_folders_named_by_numbers_are_classes_in_the_order_of_numbers(
    tmp_path: Path, refusal: Refusal
) -> None:
    for number in (0, 1, 2, 10, 11):
        put(tmp_path / "source" / str(number) / "x.png", encoded(number))
    facts = sharded(classes(), tmp_path / "source", tmp_path / "out")
    assert facts["classes"] == [str(number) for number in range(12)]
    assert facts["histogram"] == [1, 1, 1, *[0] * 7, 1, 1]
    assert facts["account"]["remarks"]["classes without an image"]["count"] == 7
    put(tmp_path / "source" / "01" / "x.png", encoded(0))
    sentence = refusal(lambda: sharded(classes(), tmp_path / "source", tmp_path / "none"))
    assert "which is the same number" in sentence


def test_classes_that_the_source_lacks_are_told(tmp_path: Path) -> None:
    put(tmp_path / "source" / "cat" / "x.png", encoded(0))
    remarks = sharded(classes(), tmp_path / "source", tmp_path / "out")["account"]["remarks"]
    assert remarks["classes of the network (12) that the source lacks"]["count"] == 11


@pytest.mark.parametrize(
    "names",
    [
        ["train/cat/1.png", "test/cat/2.png"],
        ["train/cat/1.png", "unlabeled/2.png"],
        ["train/cat/1.png"],
        ["cat/train/1.png", "cat/val/2.png"],
        ["train-0.tar", "bonus-0.tar"],
        ["training_set/cats/1.png", "test_set/cats/2.png"],
        ["train2017/1.png", "val2017/2.png"],
        ["seg_train/a/1.png", "seg_test/a/2.png"],
        ["Data/CLS-LOC/train/n01/1.png", "Data/CLS-LOC/val/2.png"],
        ["train2017.tar", "val2017.tar"],
        ["train0.parquet", "test0.parquet"],
        ["train-0.tar", "dev-0.tar"],
        ["train-00000-of-00001.parquet", "sketches-00000-of-00001.parquet"],
    ],
)
def test_splits_are_not_mixed_and_are_no_classes(names: list[str], tmp_path: Path, refusal: Refusal) -> None:
    for name in names:
        put(tmp_path / "source" / name, encoded(0))
    sentence = refusal(lambda: sharded(classes(), tmp_path / "source", tmp_path / "out"))
    assert "holds splits (" in sentence or "holds several splits (" in sentence


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("train", "car", "plane"):
        put(tmp_path / "source" / name / "1.png", encoded(0))
    assert sharded(classes(), tmp_path / "source", tmp_path / "out")["classes"] == ["car", "plane", "train"]


def test_linked_folders_that_lead_in_a_circle_end(tmp_path: Path) -> None:
    for here, there in (("a", "b"), ("b", "a")):
        put(tmp_path / "source" / here / "1.png", encoded(ord(here)))
        (tmp_path / "source" / here / "link").symlink_to(tmp_path / "source" / there)
    facts = sharded(classes(), tmp_path / "source", tmp_path / "out")
    assert facts["train"] == 4  # a, b, a/link and b/link
    assert left_out(facts) == {"links to a folder above": 2}


def held(out: Path, split: str) -> list[bytes]:
    return [image.numpy().tobytes() for image in Shards(out, split).evenly_spaced(1000).image]


@pytest.mark.parametrize("layout", ["parquet", "tar"])
def test_held_out_images_are_of_all_classes_of_a_sorted_archive(layout: str, tmp_path: Path) -> None:
    labels, source = [index // 20 for index in range(60)], tmp_path / "source"
    source.mkdir()
    if layout == "parquet":
        pq.write_table(
            pa.table({"image": [encoded(i) for i in range(60)], "label": labels}), source / "a.parquet"
        )
    else:
        files = [((f"{i:02d}.png", encoded(i)), (f"{i:02d}.cls", str(labels[i]).encode())) for i in range(60)]
        tar(source / "0.tar", dict(file for pair in files for file in pair))
    facts = sharded(classes("data.holdout=15"), source, tmp_path / "out")
    assert (facts["train"], facts["holdout"]) == (45, 15)
    count = Counter(Shards(tmp_path / "out", "holdout").evenly_spaced(100).label.tolist())
    assert set(count) == {0, 1, 2}
    again = sharded(classes("data.holdout=15", "seed=1"), source, tmp_path / "again")
    assert again["holdout"] == 15
    assert set(held(tmp_path / "out", "holdout")) != set(held(tmp_path / "again", "holdout"))


@pytest.mark.parametrize("parts", [1, 2])
def test_no_image_with_several_captions_is_in_both_splits(parts: int, tmp_path: Path) -> None:
    for part in range(2):
        rows = [(encoded(image), f"{n} of {image}") for n in range(part, 5, 2) for image in range(10)]
        (tmp_path / "source").mkdir(exist_ok=True)
        table = pa.table({"image": [row[0] for row in rows], "text": [row[1] for row in rows]})
        pq.write_table(table, tmp_path / "source" / f"{part}.parquet")
    config = texts("data.holdout=4")
    for part in range(parts) if parts > 1 else ():
        stages.shard(config, str(tmp_path / "source"), str(tmp_path / "out"), 1, f"{part}/{parts}")
    facts = sharded(config, tmp_path / "source", tmp_path / "out")
    assert (facts["holdout"], facts["train"]) == (4, 6 * 5)
    assert left_out(facts) == {"copies of a held-out image": 4 * 4}
    assert not set(held(tmp_path / "out", "holdout")) & set(held(tmp_path / "out", "train"))
    assert len(set(held(tmp_path / "out", "holdout"))) == 4


def test_of_several_lines_about_an_image_one_is_used(tmp_path: Path) -> None:
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"{n} of {i}"}) for i in range(4) for n in range(5)]
    listed(tmp_path / "source", "metadata.jsonl", lines)
    facts = sharded(texts("data.holdout=2"), tmp_path / "source", tmp_path / "out")
    assert (facts["train"], facts["holdout"]) == (2, 2)
    assert left_out(facts) == {"further lines about an image, of which the first is used": 16}
    assert facts["account"]["used"] == {"images": 4, "lines about images": 4, "lists of images": 1}


def test_holding_out_all_different_images_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    (tmp_path / "source").mkdir()
    pq.write_table(pa.table({"image": [encoded(i % 3) for i in range(9)]}), tmp_path / "source" / "a.parquet")
    sentence = refusal(lambda: sharded(classes("data.holdout=3"), tmp_path / "source", tmp_path / "out"))
    assert "only 3 different images" in sentence


def remarks(facts: dict[str, Any]) -> dict[str, int]:
    return {what: tally["count"] for what, tally in facts["account"]["remarks"].items()}


def test_a_pattern_of_images_finds_the_captions_beside_them(tmp_path: Path) -> None:
    beside(tmp_path / "source", ".txt")
    facts = stages.shard(texts(), str(tmp_path / "source" / "*.png"), str(tmp_path / "out"), workers=1).facts
    assert captions(tmp_path / "out") == [f"caption {i}" for i in range(4)]
    assert facts["account"]["used"] == {"images": 4, "captions": 4}


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cat", "dog"):
        put(tmp_path / "source" / name / "1.png", encoded(0))
    scandir = os.scandir

    def denied(path: Any) -> Any:
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(PermissionError, match="dog"):
        sharded(classes(), tmp_path / "source", tmp_path / "out")


def class_label(*names: str) -> dict[bytes, bytes]:
    features = {"label": {"_type": "ClassLabel", "names": names}}
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


@pytest.mark.parametrize("what", ["names of classes", "columns", "twice", "lists"])
def test_parquet_files_that_do_not_fit_together_are_refused(
    what: str, tmp_path: Path, refusal: Refusal
) -> None:
    (tmp_path / "source").mkdir()
    images = pa.array([encoded(0), encoded(1)])
    labelled = pa.table({"image": images, "label": [0, 1]})
    pairs = {
        "names of classes": [
            labelled.replace_schema_metadata(class_label(*n)) for n in (("cat", "dog"), ("dog", "cat"))
        ],
        "columns": [pa.table({"image": images}), labelled],
        "twice": [pa.Table.from_arrays([images, images], ["image", "image"])],
        "lists": [pa.table({"image": images, "label": [[0], [1]]})],
    }
    for number, table in enumerate(pairs[what]):
        pq.write_table(table, tmp_path / "source" / f"{number}.parquet")
    sentence = refusal(lambda: sharded(classes(), tmp_path / "source", tmp_path / "out"))
    assert {"twice": "twice", "lists": "labels are numbers or names"}.get(
        what, f"has other {what}"
    ) in sentence


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        (("0", "2", "10", ""), "has no label, though others have"),
        (("0", "2", "10", "-1"), "has label -1"),
        (("0", " 2", "10 ", "2"), ""),
        (("0.0", "2.0", "10.0", "2.0"), ""),
    ],
)
def test_labels_in_csv_are_numbers_if_all_are(
    cells: tuple[str, ...], words: str, tmp_path: Path, refusal: Refusal
) -> None:
    lines = ["file_name,label", *(f"{i}.png,{cell}" for i, cell in enumerate(cells))]
    listed(tmp_path / "source", "metadata.csv", lines)
    if words:
        assert words in refusal(lambda: sharded(classes(), tmp_path / "source", tmp_path / "out"))
        return
    facts = sharded(classes(), tmp_path / "source", tmp_path / "out")
    assert [label for label, count in enumerate(facts["histogram"]) if count] == [0, 2, 10]


@pytest.mark.parametrize("lines", [["file_name;text", "0.png;a"], ["file_name,text,text", "0.png,a,b"]])
def test_a_list_that_would_be_read_wrongly_is_refused(
    lines: list[str], tmp_path: Path, refusal: Refusal
) -> None:
    listed(tmp_path / "source", "metadata.csv", lines)
    sentence = refusal(lambda: sharded(texts(), tmp_path / "source", tmp_path / "out"))
    assert "separates its values by ';'" in sentence or "the column 'text' twice" in sentence


@pytest.mark.parametrize("layout", ["folder", "tar", "list"])
def test_folders_that_are_no_classes_are_told(layout: str, tmp_path: Path) -> None:
    names = [f"mine/{name}/1.png" for name in ("cat", "dog")]
    if layout == "tar":
        tar(tmp_path / "source" / "0.tar", {name: encoded(0) for name in names})
    else:
        for name in names:
            put(tmp_path / "source" / name, encoded(0))
    if layout == "list":
        put(
            tmp_path / "source" / "metadata.jsonl",
            "\n".join(json.dumps({"file_name": name}) for name in names),
        )
    facts = sharded(classes(), tmp_path / "source", tmp_path / "out")
    assert remarks(facts)["images in folders that are not used as classes"] == 2


def test_of_two_entries_of_an_image_the_first_with_a_caption_is_used(tmp_path: Path) -> None:
    put(tmp_path / "source" / "a.png", encoded(0))
    images = [{"id": i, "file_name": "a.png"} for i in (1, 2, 3)]
    notes = [{"id": 1, "image_id": 2, "caption": "second"}, {"id": 2, "image_id": 9, "caption": "of none"}]
    put(tmp_path / "source" / "captions.json", json.dumps({"images": images, "annotations": notes}))
    facts = sharded(texts(), tmp_path / "source", tmp_path / "out")
    assert captions(tmp_path / "out") == ["second"]
    assert remarks(facts)["captions of images that the list does not have"] == 1
    assert remarks(facts)["further entries of an image, of which the first with a caption is used"] == 2


def test_splits_inside_a_tar_are_refused(tmp_path: Path, refusal: Refusal) -> None:
    tar(tmp_path / "source" / "0.tar", {"./train/0.png": encoded(0), "./test/0.png": encoded(1)})
    sentence = refusal(lambda: sharded(classes(), tmp_path / "source", tmp_path / "out"))
    assert "several splits (test, train) in its folders" in sentence


@pytest.mark.parametrize("layout", ["tar", "folder"])
def test_a_chosen_column_is_read_and_nothing_else(layout: str, tmp_path: Path, refusal: Refusal) -> None:
    files = {
        "0.png": encoded(0),
        "0.json": b'{"blip": "wanted"}',
        "0.txt": b"another",
        "1.png": encoded(1),
        "1.txt": b"x",
    }
    if layout == "tar":
        tar(tmp_path / "source" / "0.tar", files)
    for name, data in files.items() if layout == "folder" else ():
        put(tmp_path / "source" / name, data)
    facts = sharded(texts("data.caption_column=blip"), tmp_path / "source", tmp_path / "out")
    assert captions(tmp_path / "out") == ["wanted"]
    assert facts["without_caption"] == 1
    assert Account.model_validate(facts["account"]).num_items == len(files) + (layout == "tar")
    sentence = refusal(
        lambda: sharded(texts("data.caption_column=nowhere"), tmp_path / "source", tmp_path / "none")
    )
    assert "caption" in sentence


def test_a_caption_file_that_is_a_link_to_nothing_is_no_caption(tmp_path: Path) -> None:
    beside(tmp_path / "source", ".txt")
    (tmp_path / "source" / "1.txt").unlink()
    (tmp_path / "source" / "1.txt").symlink_to(tmp_path / "nowhere")
    facts = sharded(texts(), tmp_path / "source", tmp_path / "out")
    assert (facts["train"], facts["without_caption"], facts["unreadable"]) == (3, 1, 0)
    assert left_out(facts) == {"images without a caption": 1, "links to nothing": 1}


def test_two_labels_of_one_image_are_refused(tmp_path: Path, refusal: Refusal) -> None:
    put(tmp_path / "source" / "0.png", encoded(0))
    put(tmp_path / "source" / "dataset.json", json.dumps({"labels": [["0.png", 1], ["0.png", 2]]}))
    assert "two labels for 0.png" in refusal(
        lambda: sharded(classes(), tmp_path / "source", tmp_path / "out")
    )


@pytest.mark.parametrize("labels", [[False, True], [0.0, 1.0], [0, 1], ["0", "1"]])
def test_labels_of_edm_may_be_truth_values_floats_and_digits(labels: list[Any], tmp_path: Path) -> None:
    for index in range(2):
        put(tmp_path / "source" / f"{index}.png", encoded(index))
    pairs = [[f"{index}.png", label] for index, label in enumerate(labels)]
    put(tmp_path / "source" / "dataset.json", json.dumps({"labels": pairs}))
    facts = sharded(classes(), tmp_path / "source", tmp_path / "out")
    assert (facts["classes"], facts["histogram"]) == (["0", "1"], [1, 1])


def test_a_column_that_a_layout_does_not_have_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    put(tmp_path / "source" / "cat" / "0.png", encoded(0))
    config = classes("data.label_column=kind")
    sentence = refusal(lambda: sharded(config, tmp_path / "source", tmp_path / "out"))
    assert "the layout folder has no columns of labels" in sentence


def test_a_listing_without_duplicates_holds_out_as_many_different_images(tmp_path: Path) -> None:
    for index in range(30):
        put(tmp_path / "source" / "cat" / f"{index:02d}.png", encoded(index % 10))
    facts = sharded(
        classes("data.drop_duplicates=True", "data.holdout=4"), tmp_path / "source", tmp_path / "out"
    )
    assert (facts["train"], facts["holdout"]) == (6, 4)
    assert not set(held(tmp_path / "out", "holdout")) & set(held(tmp_path / "out", "train"))


def test_of_equal_images_the_one_with_a_caption_is_kept(tmp_path: Path) -> None:
    for index in range(4):
        put(tmp_path / "source" / f"{index}a.png", encoded(index))
        put(tmp_path / "source" / f"{index}a.txt", b"" if index else b"caf\xe9")
        put(tmp_path / "source" / f"{index}b.png", encoded(index))
        put(tmp_path / "source" / f"{index}b.txt", f"caption {index}")
    sharded(texts("data.drop_duplicates=True"), tmp_path / "source", tmp_path / "out")
    assert captions(tmp_path / "out") == [f"caption {i}" for i in range(4)]


@pytest.mark.parametrize("text", [b"caf\xe9", b"[1, 2]", b'{"caption": {"a": 1}}'])
def test_captions_that_are_not_needed_cost_no_image(text: bytes, tmp_path: Path) -> None:
    files = {"0.png": encoded(0), "0.json": text, "1.png": encoded(1)}
    tar(tmp_path / "tar" / "0.tar", files)
    for name, data in files.items():
        put(tmp_path / "folder" / "cat" / name, data)
    for layout in ("tar", "folder"):
        facts = sharded(classes(), tmp_path / layout, tmp_path / f"{layout}-out")
        assert (facts["train"], facts["unreadable"]) == (2, 0)
        assert remarks(facts)["captions that cannot be read and are not needed"] == 1


def test_samples_without_an_image_do_not_decide_about_an_archive(tmp_path: Path) -> None:
    info = {"README.md": b"x", "dataset_info.json": b'{"a": 1}'}
    tar(tmp_path / "source" / "0.tar", info)
    tar(tmp_path / "source" / "1.tar", info | {"0.png": encoded(0), "0.cls": b"1", "0.txt": b"zero"})
    facts = sharded(classes(), tmp_path / "source", tmp_path / "out")
    assert (facts["train"], facts["histogram"]) == (1, [0, 1])
    assert sharded(texts(), tmp_path / "source", tmp_path / "texts")["train"] == 1


def test_a_list_of_classes_without_names_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    tar(tmp_path / "source" / "0.tar", {"0.png": encoded(0), "0.cls": b"1"})
    put(tmp_path / "source" / "classes.txt", "")
    assert "or no names" in refusal(lambda: sharded(classes(), tmp_path / "source", tmp_path / "out"))
    put(tmp_path / "source" / "classes.txt", "cat\r\ndog\n\n")
    assert sharded(classes(), tmp_path / "source", tmp_path / "out")["classes"] == ["cat", "dog"]


def test_text_with_nul_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    put(tmp_path / "a.txt", "a cat".encode("utf-16-le"))
    assert "NUL" in refusal(lambda: read_prompts(str(tmp_path / "a.txt")))
    put(tmp_path / "b.txt", b"a cat\ra dog\ra cow")
    assert read_prompts(str(tmp_path / "b.txt")) == ["a cat", "a dog", "a cow"]
