"""A tar of images per class, as ImageNet is distributed."""

from __future__ import annotations

import posixpath
import re
import tarfile
from collections.abc import Iterator
from functools import partial
from unicodedata import normalize

from dmd2.data.account import Account
from dmd2.data.archives import members, open_tar, read_member
from dmd2.data.listing import NO_SUFFIX, Listing, archives_ending, kind_of_file
from dmd2.data.sources import Archive, Source, SourceImage, class_names, classes_of_labels, loaded_image

CLASS_TAR = re.compile(r"n\d{8}\.tar$")
"""A tar of one class."""


def imagenet(listing: Listing) -> Source:
    """A tar of images per class, named after it, or one tar of such tars."""
    names = archives_ending(listing, ".tar")
    account = listing.account(dict.fromkeys(names, "archives"))
    tars = [listing.uri(name) for name in names]
    parts: list[tuple[str, str, tarfile.TarInfo | None]] = []
    for uri in tars:
        of_a_class = len(tars) > 1 and CLASS_TAR.search(uri)
        parts += (not of_a_class and _inner_tars(uri, account)) or [(uri, uri, None)]
    found = [(name, _stem(name) if listing.wanted.labels else None) for name, _, _ in parts]
    labels = classes_of_labels(found)
    archives = [
        Archive(name, partial(_class_tar, uri, member, labels[label]))
        for (name, uri, member), (_, label) in zip(parts, found, strict=True)
    ]
    return Source(class_names(labels), listing.fingerprint, archives=archives, account=account)


def _inner_tars(uri: str, account: Account) -> list[tuple[str, str, tarfile.TarInfo | None]]:
    """(address, address of the tar, member) of the tars in a tar; empty if there are none."""
    there = Account()
    with open_tar(uri) as whole:
        inner = []
        for member in members(whole, uri, there):
            if member.name.endswith(".tar"):
                inner.append(member)
            else:
                there.leave_out(
                    f"{kind_of_file(member.name)} beside the tars of classes", f"{uri}/{member.name}"
                )
    if inner:
        account.add(there)
        account.use("archives", len(inner))
    return [(f"{uri}/{member.name}", uri, member) for member in inner]


def _stem(name: str) -> str:
    return normalize("NFC", posixpath.basename(name).removesuffix(".tar"))


def _class_tar(uri: str, part: tarfile.TarInfo | None, label: int, account: Account) -> Iterator[SourceImage]:
    where = f"{uri}/{part.name}" if part else uri
    with open_tar(uri, part) as tar:
        for member in members(tar, where, account):
            name = f"{where}/{member.name}"
            kind = kind_of_file(member.name)
            if kind in ("images", NO_SUFFIX):
                yield loaded_image(name, label, read_member(tar, member))
            else:
                account.leave_out(f"{kind} in an archive", name)
