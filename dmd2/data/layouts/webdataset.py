"""Tars of samples, as WebDataset and img2dataset write them."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial

from dmd2.data.account import Account
from dmd2.data.archives import grouped_samples, refuse_broken
from dmd2.data.captions import (
    SUFFIXES,
    caption_in_json,
    clean,
    decode_text,
    find_column,
    lines_of,
    require_column,
)
from dmd2.data.decode import IMAGE_SUFFIXES
from dmd2.data.listing import SPLIT, Listing, Wanted, archives_ending
from dmd2.data.sources import (
    NOT_CLASSES,
    Archive,
    Label,
    Source,
    SourceImage,
    broken_image,
    class_names,
    class_of_label,
    classes_of_labels,
    loaded_image,
    optional_caption,
)
from dmd2.errors import Refused

CLASSES, FIRST = "classes.txt", 20
"""Names of the classes; number of samples that are looked at before the rest."""
IMAGES = [suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES]
TEXTS = [suffix.removeprefix(".") for suffix in SUFFIXES]


def webdataset(listing: Listing) -> Source:
    """Tars of samples, as img2dataset writes them: `key.jpg` and, of one key, `.txt` or `.caption`, `.json`, `.cls`.

    How many classes there are is in classes.txt (a name per line); without it every tar is looked through.
    """
    found = archives_ending(listing, ".tar")
    used, wanted = dict.fromkeys(found, "archives"), listing.wanted
    tars = [listing.uri(name) for name in found]
    _check_first(tars, wanted)
    labels: dict[Label, int] = {None: 0}
    names = None
    if not wanted.labels:
        pass
    elif any(entry.name == CLASSES for entry in listing.entries):
        used[CLASSES] = "lists of classes"
        names = _class_names(listing)
        labels = {index: index for index in range(len(names))}
    else:
        labels = classes_of_labels(
            (key, _parse_class(files, key))
            for uri in tars
            for key, files in grouped_samples(uri, {"cls"}, Account(), IMAGES)
            if any(suffix in files for suffix in IMAGES)
        )
    archives = [Archive(uri, partial(_records, uri, labels, wanted)) for uri in tars]
    return Source(
        names or class_names(labels),
        listing.fingerprint,
        archives=archives,
        count=_img2dataset_count(listing),
        account=listing.account(used),
    )


def _class_names(listing: Listing) -> list[str]:
    names = [line.strip() for line in lines_of(listing.read(CLASSES), listing.uri(CLASSES))]
    while names and not names[-1]:
        names.pop()
    if not (names and all(names)):
        raise Refused(
            f"{listing.uri(CLASSES)} has an empty line, or no names; write the name of one class per line"
        )
    return names


def _check_first(tars: Sequence[str], wanted: Wanted) -> None:
    """Look at the first samples with an image: tars of tars are another layout, and fields without a caption are refused at once."""
    fields: list[tuple[str, list[str]]] = []
    for key, files in _first_samples(tars):
        if "json" not in files or any(suffix in files for suffix in TEXTS):
            return
        found = _fields(files["json"])
        if found is None or find_column(found, wanted.caption_column):
            return
        fields.append((key, found))
    if not fields:
        raise Refused(f"{tars[0]} and the tars beside it hold no images; give tars of images")
    if wanted.captions or wanted.caption_column:
        key, found = fields[0]
        require_column(found, wanted.caption_column, f"{key}.json", "choose one by --data.caption-column")


def _first_samples(tars: Sequence[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """At most `FIRST` samples with an image; of their files, only .json is read."""
    looked = 0
    for uri in tars:
        for key, files in grouped_samples(uri, {"json"}, Account(), [*IMAGES, *TEXTS, "tar"]):
            if "tar" in files:
                raise Refused(f"{uri} holds tars; of ImageNet's archives say imagenet:{uri}")
            if any(suffix in files for suffix in IMAGES):
                yield key, files
                looked += 1
            if looked == FIRST:
                return


def _fields(data: bytes) -> list[str] | None:
    with suppress(ValueError, RecursionError):
        if isinstance(fields := json.loads(data), dict):
            return list(fields)
    return None


def _parse_class(files: dict[str, bytes], where: str) -> int | None:
    try:
        return int(files["cls"]) if "cls" in files else None
    except ValueError:
        raise Refused(f"{where}.cls is {files['cls'][:20]!r}; give the number of the class") from None


def _records(uri: str, labels: dict[Label, int], wanted: Wanted, account: Account) -> Iterator[SourceImage]:
    suffixes = {*TEXTS, "json", *IMAGES, *(["cls"] if wanted.labels else [])}
    splits: set[str] = set()
    for key, files in grouped_samples(uri, suffixes, account):
        folder = posixpath.dirname(key.removeprefix(f"{uri}/").removeprefix("./"))
        splits |= {match[1].lower() for match in SPLIT.finditer(folder)}
        if len(splits) > 1:
            raise Refused(
                f"{uri} holds several splits ({', '.join(sorted(splits))}) in its folders; make a tar of each"
            )
        images = [suffix for suffix in IMAGES if suffix in files]
        if not images:
            account.leave_out("files of samples without an image", key, len(files))
            continue
        label = class_of_label(labels, _parse_class(files, key) if wanted.labels else None, key)
        account.leave_out("further images of a sample", key, len(images) - 1)
        account.use("labels", "cls" in files)
        name = f"{key}.{images[0]}"
        try:
            read = partial(_caption, key, files, wanted, account)
            text = optional_caption(read, wanted.captions, key, account)
        except Refused as error:
            yield broken_image(name, str(error))
            continue
        if wanted.labels and labels.keys() == {None} and folder:
            account.remark(NOT_CLASSES, key)
        if len(images) == 1:
            yield loaded_image(name, label, files[images[0]], text)
        else:
            yield broken_image(name, f"{len(images)} images have this key")


def _caption(key: str, files: dict[str, bytes], wanted: Wanted, account: Account) -> str:
    """The caption of a sample: of its .txt or .caption, or of a field of its .json."""
    all_there = [suffix for suffix in (*TEXTS, "json") if suffix in files]
    there = [suffix for suffix in all_there if suffix == "json" or not wanted.caption_column]
    account.use("captions", bool(there))
    unused = len(all_there) - bool(there)
    account.leave_out("further files with captions or descriptions of a sample", key, unused)
    if not there:
        return ""
    where = f"{key}.{there[0]}"
    text = decode_text(files[there[0]], where)
    return caption_in_json(text, wanted.caption_column, where, account) if there[0] == "json" else clean(text)


def _img2dataset_count(listing: Listing) -> int | None:
    """Number of images according to img2dataset's statistics files, if every tar has one."""
    names = {entry.name for entry in listing.entries}
    notes = [name.removesuffix(".tar") + "_stats.json" for name in names if name.endswith(".tar")]
    if not names.issuperset(notes) or not listing.store.local_folder:  # each is a request
        return None
    with refuse_broken(listing.store.uri, "output of img2dataset", ValueError, KeyError, TypeError):
        return sum(int(json.loads(listing.store.read(name))["successes"]) for name in notes)
