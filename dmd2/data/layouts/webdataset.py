"""Tars of samples, as WebDataset and img2dataset write them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from functools import partial

from dmd2.data.account import Account
from dmd2.data.archives import grouped_samples, refuse_broken
from dmd2.data.captions import SUFFIXES, caption_in_json, clean, decode_text, require_column
from dmd2.data.decode import IMAGE_SUFFIXES
from dmd2.data.listing import Listing, Wanted, archives_ending
from dmd2.data.sources import (
    Archive,
    Label,
    Source,
    SourceImage,
    broken_image,
    class_names,
    class_of_label,
    classes_of_labels,
    loaded_image,
)
from dmd2.errors import Refused

CLASSES = "classes.txt"
IMAGES = [suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES]
TEXTS = [suffix.removeprefix(".") for suffix in SUFFIXES]


def webdataset(listing: Listing) -> Source:
    """Tars of samples, as img2dataset writes them: `key.jpg` and, of one key, `.txt` or `.caption`, `.json`, `.cls`.

    How many classes there are is in classes.txt (a name per line); without it every tar is looked through.
    """
    found = archives_ending(listing, ".tar")
    used, tars, wanted = (
        dict.fromkeys(found, "archives"),
        [listing.uri(name) for name in found],
        listing.wanted,
    )
    sample = next(grouped_samples(tars[0], {"cls", "tar", "json", *TEXTS}, Account()), None)
    if sample is None or "tar" in sample[1]:
        raise Refused(
            f"{tars[0]} holds {'tars' if sample else 'nothing'}; of ImageNet's archives say imagenet:{tars[0]}"
        )
    _check_captions(*sample, wanted)
    labels: dict[Label, int] = {None: 0}
    names = None
    if not wanted.labels:
        pass
    elif any(entry.name == CLASSES for entry in listing.entries):
        used[CLASSES] = "lists of classes"
        names = decode_text(listing.read(CLASSES), listing.uri(CLASSES)).splitlines()
        labels = {index: index for index in range(len(names))}
    elif "cls" in sample[1]:
        labels = classes_of_labels(
            (key, _parse_class(files, key))
            for uri in tars
            for key, files in grouped_samples(uri, {"cls"}, Account())
        )
    archives = [Archive(uri, partial(_records, uri, labels, wanted)) for uri in tars]
    return Source(
        names or class_names(labels),
        listing.fingerprint,
        archives=archives,
        count=_img2dataset_count(listing),
        account=listing.account(used),
    )


def _check_captions(key: str, files: dict[str, bytes], wanted: Wanted) -> None:
    """Refuse at once if the first sample has fields in JSON, and none of them is a caption."""
    if "json" in files and not any(suffix in files for suffix in TEXTS):
        with suppress(ValueError, RecursionError):
            fields = json.loads(files["json"])
            if isinstance(fields, dict) and (wanted.captions or wanted.caption_column):
                require_column(
                    list(fields), wanted.caption_column, f"{key}.json", "choose one by --data.caption-column"
                )


def _parse_class(files: dict[str, bytes], where: str) -> int | None:
    try:
        return int(files["cls"]) if "cls" in files else None
    except ValueError:
        raise Refused(f"{where}.cls is {files['cls'][:20]!r}; give the number of the class") from None


def _records(uri: str, labels: dict[Label, int], wanted: Wanted, account: Account) -> Iterator[SourceImage]:
    suffixes = {*TEXTS, "json", *IMAGES, *(["cls"] if wanted.labels else [])}
    for key, files in grouped_samples(uri, suffixes, account):
        images = [suffix for suffix in IMAGES if suffix in files]
        if not images:
            account.leave_out("files of samples without an image", key, len(files))
            continue
        label = class_of_label(labels, _parse_class(files, key) if wanted.labels else None, key)
        account.leave_out("further images of a sample", key, len(images) - 1)
        account.use("labels", "cls" in files)
        name = f"{key}.{images[0]}"
        try:
            text = _caption(key, files, wanted, account)
        except Refused as error:
            yield broken_image(name, str(error))
            continue
        if len(images) == 1:
            yield loaded_image(name, label, files[images[0]], text)
        else:
            yield broken_image(name, f"{len(images)} images have this key")


def _caption(key: str, files: dict[str, bytes], wanted: Wanted, account: Account) -> str:
    """The caption of a sample: of its .txt or .caption, or of a field of its .json."""
    there = [suffix for suffix in (*TEXTS, "json") if suffix in files]
    if wanted.caption_column and "json" in there:
        there = ["json", *(suffix for suffix in there if suffix != "json")]
    account.use("captions", bool(there))
    account.leave_out("further files with captions or descriptions of a sample", key, max(0, len(there) - 1))
    if not there:
        return ""
    where = f"{key}.{there[0]}"
    text = decode_text(files[there[0]], where)
    return caption_in_json(text, wanted.caption_column, where) if there[0] == "json" else clean(text)


def _img2dataset_count(listing: Listing) -> int | None:
    """Number of images according to img2dataset's statistics files, if every tar has one."""
    names = {entry.name for entry in listing.entries}
    notes = [name.removesuffix(".tar") + "_stats.json" for name in names if name.endswith(".tar")]
    if not names.issuperset(notes) or not listing.store.local_folder:  # each is a request
        return None
    with refuse_broken(listing.store.uri, "output of img2dataset", ValueError, KeyError, TypeError):
        return sum(int(json.loads(listing.store.read(name))["successes"]) for name in notes)
