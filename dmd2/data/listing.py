"""Listing the files at an address: a folder, one file, or the files that a pattern matches; local or remote."""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from dmd2.data.archives import is_hidden
from dmd2.data.decode import IMAGE_SUFFIXES
from dmd2.errors import Refused, near_miss
from dmd2.io.storage import join_uri, open_store
from dmd2.io.store import ObjectInfo, Store

SPLIT = re.compile(r"(?:^|[-_./])(train|test|val|validation)(?=[-_./])")
"""Names of splits that occur as a word in a file name."""


@dataclass(frozen=True)
class Listing:
    """The files at an address."""

    layout: str
    store: Store
    entries: list[ObjectInfo]
    """Without hidden files."""
    names_files: bool
    """Whether the address names files (by name or pattern) and not a folder."""

    def uri(self, name: str) -> str:
        return join_uri(self.store.uri, name)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr([self.layout, *map(tuple, self.entries)]).encode()).hexdigest()


def list_files(address: str, known: list[str]) -> Listing:
    """List a folder, a file, or the files that match a pattern in the last component of the address.

    Args:
        known: Names of sources and layouts, to suggest a correction in the error message.
    """
    store = open_store(address)
    entries = _visible(store.list_objects()) if address else []
    if entries:
        return Listing("", store, entries, names_files=False)
    above, name = os.path.split(address)
    store, pattern = open_store(above or "."), re.search(r"[*?[]", name)
    path = open_store(address).local_folder
    if path and path.is_file():  # its folder may have millions of others
        entries = [ObjectInfo(name, path.stat().st_size, str(path.stat().st_mtime_ns))]
    elif pattern or (name and not path):
        there = _visible(store.list_objects(name[: pattern.start()] if pattern else name))
        entries = [e for e in there if e.name == name or ("/" not in e.name and fnmatchcase(e.name, name))]
    if not entries:
        raise _nothing(address, known)
    return Listing("", store, entries, names_files=True)


def _nothing(address: str, known: list[str]) -> Refused:
    advice = "give a folder of images with one sub-folder per class, or another layout"
    path = open_store(address).local_folder
    if not path:
        return Refused(f"source {address} is empty or does not exist; {advice}")
    if address and path.exists():
        return Refused(f"source {address} is empty; {advice}")
    head = address.split("/")[0]
    if head == address or ":" in head:
        hint = near_miss(head.partition(":")[0], known)
        return Refused(f"unknown source {address!r}: it is no folder, and no named source or layout ({hint})")
    return Refused(f"source {address} does not exist; {advice}")


def _visible(entries: list[ObjectInfo]) -> list[ObjectInfo]:
    """Sorted by path components; without hidden files and the empty objects that buckets use as folders."""
    there = (e for e in entries if e.name and not e.name.endswith("/") and not is_hidden(e.name))
    return sorted(there, key=lambda entry: entry.name.split("/"))


def matching(pattern: str, names: list[str]) -> list[str]:
    """The names that match the regular expression from start to end."""
    return [name for name in names if re.fullmatch(pattern, name)]


def find_one(listing: Listing, pattern: str, what: str) -> str:
    """The only file whose name matches; none or several are refused."""
    found = matching(pattern, [entry.name for entry in listing.entries])
    if not found:
        raise Refused(
            f"{listing.store.uri} has no {what}, which the layout {listing.layout} needs; add it or choose another"
        )
    if len(found) > 1:
        raise Refused(
            f"{listing.store.uri} has several of which one is needed ({', '.join(found[:3])}); "
            f"name it: {listing.layout}:{listing.uri(found[0])}"
        )
    return found[0]


def with_siblings(listing: Listing, name: str) -> tuple[Listing, str]:
    """If the address names a file, the listing of the folder with the files that belong to it, and the file's name there."""
    if not listing.names_files:
        return listing, name
    above, below = posixpath.split(listing.store.uri)
    if below == "annotations":  # of COCO
        store, name = open_store(above or "."), f"{below}/{name}"
    else:
        store = listing.store
    return replace(listing, store=store, entries=_visible(store.list_objects()), names_files=False), name


def archives_ending(listing: Listing, suffix: str) -> list[str]:
    """Archives with this suffix; loose images beside them and a mixture of splits are refused."""
    names = [entry.name for entry in listing.entries]
    found = [name for name in names if name.endswith(suffix)]
    if not found:
        raise Refused(
            f"{listing.store.uri} has no {suffix} files, which the layout {listing.layout} needs; choose another"
        )
    if stray := [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]:
        raise Refused(
            f"{listing.uri(stray[0])} lies beside {suffix} files and would be left out; move them apart, or give a pattern like *{suffix}"
        )
    splits = sorted({match[1] for name in found if (match := SPLIT.search(name))})
    if len(splits) > 1:
        raise Refused(
            f"{listing.store.uri} holds several splits ({', '.join(splits)}); give the folder of one, or a pattern like *{splits[-1]}*{suffix}"
        )
    return found
