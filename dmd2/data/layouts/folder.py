"""A folder of images, with one sub-folder per class, or with captions beside the images."""

from __future__ import annotations

import posixpath
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from unicodedata import normalize

from dmd2.data.account import Account
from dmd2.data.captions import SUFFIXES, caption_in_json, clean, decode_text
from dmd2.data.decode import IMAGE_SUFFIXES
from dmd2.data.listing import Listing, check_folder_splits, same_name, with_siblings
from dmd2.data.sources import NOT_CLASSES, ListedImage, Source, source_of_listing
from dmd2.errors import Refused

REPEATS = re.compile(r"\d+_")
"""Start of a folder's name that says how often kohya's trainer repeats its images."""


def folder(listing: Listing) -> Source:
    """Images; the first sub-folder is the class. Without sub-folders there is a single class.

    The caption of `name.png` is in `name.txt` or `name.caption`, or in a field of `name.json`. If the network is told by texts,
    sub-folders are no classes.
    """
    images = _images(listing)
    check_folder_splits(images, listing.store.uri)
    beside = with_siblings(listing, "")[0]
    captions = _captions(beside, images)
    used = set(captions.values())
    named = [e for e in beside.entries if e.name in used] if listing.names_files else []
    listing = replace(listing, entries=listing.entries + named, dangling=beside.dangling)
    account = listing.account(dict.fromkeys(used, "captions"), set(images))
    rows = [
        ListedImage(
            name,
            sys.intern(label) if (label := _class(name)) else None,
            "",
            partial(_read_caption, listing, captions[name]) if name in captions else None,
        )
        for name in images
    ]
    if listing.wanted.labels:
        _check_stray(listing, rows)
        if len({row.label for row in rows}) == 1 and (
            deep := [name for name in images if name.count("/") > 1]
        ):
            account.remark(NOT_CLASSES, deep[0], len(deep))
    elif repeated := [name for name in images if REPEATS.match(name)]:
        reason = "images in folders like 10_cat, which are used once each and not repeated"
        account.remark(reason, repeated[0], len(repeated))
    return source_of_listing(listing, rows, account)


def _images(listing: Listing) -> list[str]:
    """Files with the suffix of an image; if there are none, those without a suffix."""
    names = [entry.name for entry in listing.entries]
    by_suffix = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
    return by_suffix or [name for name in names if not posixpath.splitext(name)[1]]


def _captions(listing: Listing, images: Sequence[str]) -> dict[str, str]:
    """Image -> file of its caption."""
    suffixes = [".json"] if listing.wanted.caption_column else [*SUFFIXES, ".json"]
    names = [entry.name for entry in listing.entries if entry.name.lower().endswith(tuple(suffixes))]
    there = {_caption_key(*posixpath.splitext(n)): n for n in names if n not in listing.dangling}
    if not there:
        return {}
    found = {}
    for image in images:
        stems = posixpath.splitext(image)[0], image
        keys = [_caption_key(stem, suffix) for suffix in suffixes for stem in stems]
        if file := next((there[key] for key in keys if key in there), None):
            found[image] = file
    return found


def _caption_key(stem: str, suffix: str) -> str:
    return same_name(stem) + suffix.lower()


def _read_caption(listing: Listing, file: str, account: Account) -> str:
    where, column = listing.uri(file), listing.wanted.caption_column
    text = decode_text(listing.read(file), where)
    return caption_in_json(text, column, where, account) if file.lower().endswith(".json") else clean(text)


def _class(name: str) -> str | None:
    return normalize("NFC", name.split("/")[0]) if "/" in name else None


def _check_stray(listing: Listing, rows: Sequence[ListedImage]) -> None:
    stray = [row.name for row in rows if row.label is None]
    if stray and len(stray) < len(rows):
        raise Refused(
            f"{listing.uri(stray[0])} lies beside the class folders of {listing.store.uri}; put it into one of them or remove it"
        )
