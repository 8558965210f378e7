"""A tar of images per class, as ImageNet is distributed."""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Iterator
from functools import partial

from dmd2.data.archives import (
    members,
    open_tar,
    read_member,
)
from dmd2.data.listing import Listing, archives_ending
from dmd2.data.sources import (
    Archive,
    Source,
    SourceImage,
    class_names,
    classes_of_labels,
    loaded_image,
)


def imagenet(listing: Listing) -> Source:
    """A tar of images per class, named after it, or one tar of such tars."""
    tars = [listing.uri(name) for name in archives_ending(listing, ".tar")]
    parts: list[tuple[str, str, tarfile.TarInfo | None]] = [(uri, uri, None) for uri in tars]
    if len(tars) == 1:
        with open_tar(tars[0]) as whole:
            inner = [member for member in members(whole, tars[0]) if member.name.endswith(".tar")]
        parts = [(f"{tars[0]}/{member.name}", tars[0], member) for member in inner] or parts
    labels = classes_of_labels((name, _stem(name)) for name, _, _ in parts)
    archives = [Archive(n, partial(_class_tar, uri, m, labels[_stem(n)])) for n, uri, m in parts]
    return Source(class_names(labels), listing.fingerprint, archives=archives)


def _stem(name: str) -> str:
    return posixpath.basename(name).removesuffix(".tar")


def _class_tar(uri: str, part: tarfile.TarInfo | None, label: int) -> Iterator[SourceImage]:
    where = f"{uri}/{part.name}" if part else uri
    with open_tar(uri, part) as tar:
        for member in members(tar, where):
            yield loaded_image(f"{where}/{member.name}", label, read_member(tar, member))
