"""The zip or folder of EDM's dataset tool."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from dmd2.data.account import Account
from dmd2.data.archives import is_hidden, open_zip, read_zip_member, refuse_broken
from dmd2.data.decode import IMAGE_SUFFIXES
from dmd2.data.listing import HIDDEN, Listing, find_one, same_name
from dmd2.data.sources import ListedImage, Source, source_of_listing
from dmd2.errors import Refused
from dmd2.io.store import ObjectInfo

DATASET = "dataset.json"
PATTERN_EDM = r"dataset\.json|[^/]*\.zip"


def edm(listing: Listing) -> Source:
    """The zip or folder of EDM's dataset tool (Karras et al. 2022): images, and labels in dataset.json."""
    name = find_one(listing, PATTERN_EDM, "dataset.json or zip file")
    if name.endswith(".zip"):
        return _zip(listing, name)
    return _images(listing, listing.read, listing.store.uri, Account())


def _zip(listing: Listing, name: str) -> Source:
    uri = listing.uri(name)
    names = [n for n in open_zip(uri, os.getpid()).namelist() if not n.endswith("/")]
    inside = replace(
        listing,
        entries=[ObjectInfo(n, 0, "") for n in names if not is_hidden(n)],
        unlisted=tuple((HIDDEN, f"{uri}/{n}") for n in names if is_hidden(n)),
    )
    source = _images(inside, partial(read_zip_member, uri), uri, listing.account({name: "archives"}))
    return replace(source, fingerprint=listing.fingerprint)


def _images(listing: Listing, read: Callable[[str], bytes], uri: str, account: Account) -> Source:
    """The source of the images in a listing, of a folder or of the members of a zip."""
    names = [entry.name for entry in listing.entries]
    if DATASET not in names:
        raise Refused(f"{uri} has no {DATASET}; make it with EDM's dataset_tool.py, or choose another layout")
    labels = _labels(read(DATASET), f"{uri}/{DATASET}")
    images = sorted(n for n in names if n.lower().endswith(IMAGE_SUFFIXES))
    if twice := [name for name, count in Counter(map(same_name, images)).items() if count > 1]:
        raise Refused(f"{uri} has two files that are called {twice[0]}; give each image its own name")
    if lost := labels.keys() - {same_name(name) for name in images}:
        raise Refused(f"{uri}/{DATASET} has a label for {min(lost)}, which is not there; make it again")
    account.add(listing.account({DATASET: "lists of labels"}, set(images)))
    rows = [ListedImage(name, labels.get(same_name(name))) for name in images]
    return source_of_listing(listing, rows, account, read, uri)


def _labels(data: bytes, where: str) -> dict[str, Any]:
    with refuse_broken(where, "list of labels", ValueError, KeyError, TypeError):
        pairs = json.loads(data)["labels"] or []
        labels = {same_name(str(file)): label for file, label in pairs}
        other = [file for file, label in pairs if labels[same_name(str(file))] != label]
    if other:
        raise Refused(f"{where} has two labels for {other[0]}; make it again")
    return labels
