"""Tars of samples, as WebDataset and img2dataset write them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial

from dmd2.data.archives import (
    grouped_samples,
    refuse_broken,
)
from dmd2.data.decode import IMAGE_SUFFIXES
from dmd2.data.listing import Listing, archives_ending
from dmd2.data.sources import (
    Archive,
    Label,
    Source,
    SourceImage,
    broken_image,
    check_caption,
    class_names,
    class_of_label,
    classes_of_labels,
    loaded_image,
)
from dmd2.errors import Refused


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
        labels = classes_of_labels(
            (key, _parse_class(files, key)) for uri in tars for key, files in grouped_samples(uri, {"cls"})
        )
    archives = [Archive(uri, partial(_web_records, uri, labels)) for uri in tars]
    return Source(
        names or class_names(labels),
        listing.fingerprint,
        archives=archives,
        count=_img2dataset_count(listing),
    )


def _parse_class(files: dict[str, bytes], where: str) -> int | None:
    try:
        return int(files["cls"]) if "cls" in files else None
    except ValueError:
        raise Refused(f"{where}.cls is {files['cls'][:20]!r}; give the number of the class") from None


def _web_records(uri: str, labels: dict[Label, int]) -> Iterator[SourceImage]:
    images = [suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES]
    for key, files in grouped_samples(uri, {"txt", "json", "cls", *images}):
        label = class_of_label(labels, _parse_class(files, key), key)
        found = [suffix for suffix in images if suffix in files]
        try:
            text = (
                files["txt"].decode()
                if "txt" in files
                else json.loads(files.get("json", b"{}")).get("caption")
            )
            text = "" if text is None else check_caption(text, key)
        except (ValueError, AttributeError, RecursionError):
            yield broken_image(key, "its caption is not UTF-8 or JSON")
            continue
        if len(found) == 1:
            yield loaded_image(f"{key}.{found[0]}", label, files[found[0]], text)
        else:
            yield broken_image(key, f"{len(found)} images have this key")


def _img2dataset_count(listing: Listing) -> int | None:
    """Number of images according to img2dataset's statistics files, if every tar has one."""
    names = {entry.name for entry in listing.entries}
    notes = [name.removesuffix(".tar") + "_stats.json" for name in names if name.endswith(".tar")]
    if not names.issuperset(notes) or not listing.store.local_folder:  # each is a request
        return None
    with refuse_broken(listing.store.uri, "output of img2dataset", ValueError, KeyError, TypeError):
        return sum(int(json.loads(listing.store.read(name))["successes"]) for name in notes)
