"""Listing the files at an address: a folder, one file, or the files that a pattern matches; local or remote.

Linked files and folders of a local source are followed. What is hidden or a link to nothing is noted, to be counted.
"""

from __future__ import annotations

import errno
import hashlib
import os
import posixpath
import re
import stat
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from dmd2.data.account import Account
from dmd2.data.archives import is_hidden
from dmd2.data.decode import IMAGE_SUFFIXES
from dmd2.errors import Refused, near_miss
from dmd2.io.storage import join_uri, open_store
from dmd2.io.store import ObjectInfo, Store

SPLITS = (
    "train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation", "holdout", "unlabeled",
    "unlabelled", "extra",
)  # fmt: skip
"""Names of splits."""
SPLIT = re.compile(rf"(?:^|[-_./])({'|'.join(SPLITS)})(?=[-_./\d]|$)", re.IGNORECASE)
"""Names of splits that occur as a word in a name: `train-0.tar`, `train2017`, `test_set`, `seg_train`."""
HUB_SPLIT = re.compile(r"(?:^|/)([^/]+)-\d{5}-of-\d{5}\.")
"""The split in the names of files on the Hugging Face Hub, whatever it is called."""
HIDDEN, DANGLING, CIRCULAR = "hidden files", "links to nothing", "links to a folder above"
NO_SUFFIX = "files without a suffix"
COMMON_SUFFIX = re.compile(r"\.[a-z][a-z0-9_-]{0,11}")
"""Suffixes that are counted one by one; numbers at the end of names are not."""


@dataclass(frozen=True)
class Wanted:
    """What the network is told of each image, and in which columns or fields that is, if it cannot be recognised."""

    labels: bool = True
    """False: classes and labels are not read."""
    captions: bool = False
    """True: a source that has no captions at all is refused, where that is seen early."""
    caption_column: str = ""
    label_column: str = ""


@dataclass(frozen=True)
class Listing:
    """The files at an address."""

    layout: str
    store: Store
    entries: list[ObjectInfo]
    """Without hidden files."""
    names_files: bool
    """Whether the address names files (by name or pattern) and not a folder."""
    unlisted: tuple[tuple[str, str], ...] = ()
    """(reason, name) of what is there and not among the entries."""
    dangling: frozenset[str] = frozenset()
    """Entries that are links to nothing."""
    wanted: Wanted = Wanted()

    def uri(self, name: str) -> str:
        return join_uri(self.store.uri, name)

    def read(self, name: str) -> bytes:
        return read_file(self.store, self.dangling, name)

    def account(self, used: Mapping[str, str], images: Collection[str] = ()) -> Account:
        """What becomes of the files: those that are used, and all others by reason.

        Args:
            used: Name -> purpose.
            images: Names of the images, which are counted when they are read.
        """
        account = Account()
        for reason, name in self.unlisted:
            account.leave_out(reason, name)
        for name in (entry.name for entry in self.entries):
            if purpose := used.get(name):
                account.use(purpose)
            elif name in self.dangling and name not in images:
                account.leave_out(DANGLING, name)
            elif name not in images:
                account.leave_out(f"{kind_of_file(name)} that the layout {self.layout} does not use", name)
        return account

    @property
    def fingerprint(self) -> str:
        """The digest of the layout and the entries, written as a list of Python."""
        total = hashlib.sha256(f"[{self.layout!r}".encode())
        for entry in self.entries:
            total.update(f", {tuple(entry)!r}".encode())
        total.update(b"]")
        return total.hexdigest()


def read_file(store: Store, dangling: Collection[str], name: str) -> bytes:
    """The content of a file of a listing, of which `dangling` are links to nothing."""
    if name in dangling:
        raise Refused(f"{join_uri(store.uri, name)} is a link to nothing; make the link anew or remove it")
    return store.read(name)


def list_files(address: str, known: list[str]) -> Listing:
    """List a folder, a file, or the files that match a pattern in the last component of the address.

    Args:
        known: Names of sources and layouts, to suggest a correction in the error message.
    """
    store = open_store(address)
    found = _find_files(store) if address else Listing("", store, [], names_files=False)
    if found.entries:
        return found
    above, name = os.path.split(address)
    store, pattern = open_store(above or "."), re.search(r"[*?[]", name)
    path = open_store(address).local_folder
    entries: list[ObjectInfo] = []
    if path and path.is_file():  # its folder may have millions of others
        entries = [ObjectInfo(name, path.stat().st_size, str(path.stat().st_mtime_ns))]
    elif pattern or (name and not path):
        there = _visible(store.list_objects(name[: pattern.start()] if pattern else name))
        entries = [e for e in there if e.name == name or ("/" not in e.name and fnmatchcase(e.name, name))]
    if not entries:
        raise _nothing(address, known)
    return Listing("", store, entries, names_files=True)


def _find_files(store: Store) -> Listing:
    """All files of a store."""
    unlisted: list[tuple[str, str]] = []
    dangling: set[str] = set()
    folder = store.local_folder
    if folder is None:
        there = store.list_objects()
    else:
        there = _walk(folder, dangling, unlisted) if folder.is_dir() else []
    entries = _visible(there)
    unlisted += [(HIDDEN, entry.name) for entry in there if is_hidden(entry.name)]
    return Listing("", store, entries, False, tuple(sorted(unlisted)), frozenset(dangling))


def _walk(folder: Path, dangling: set[str], unlisted: list[tuple[str, str]]) -> list[ObjectInfo]:
    """The files of a local folder; links are followed, except to a folder that holds them."""
    found = []
    for above, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        inside = os.path.relpath(above, folder)
        for name in [name for name in folders if _is_circular(folder, Path(inside, name))]:
            folders.remove(name)
            unlisted.append((CIRCULAR, posixpath.normpath(posixpath.join(inside, name))))
        for name in files:
            short = posixpath.normpath(posixpath.join(inside, name))
            try:
                state = os.stat(folder / short)
            except OSError as error:
                if not (error.errno in (errno.ENOENT, errno.ELOOP) and (folder / short).is_symlink()):
                    raise  # it is there and cannot be read
                dangling.add(short)
                found.append(ObjectInfo(short, 0, DANGLING))
                continue
            if stat.S_ISREG(state.st_mode):
                found.append(ObjectInfo(short, state.st_size, str(state.st_mtime_ns)))
            else:
                unlisted.append(("pipes, sockets and devices", short))
    return found


def _raise(error: OSError) -> None:
    """A folder that cannot be listed is an error of the system, whose name says which."""
    raise error


def _is_circular(folder: Path, link: Path) -> bool:
    """Whether a folder inside `folder` is a link to one of the folders on the way to it, or above them."""
    if not (folder / link).is_symlink():
        return False
    target = (folder / link).resolve()
    return any((folder / above).resolve().is_relative_to(target) for above in link.parents)


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


def _visible(entries: Iterable[ObjectInfo]) -> list[ObjectInfo]:
    """Sorted by path components; without hidden files and the empty objects that buckets use as folders."""
    there = (e for e in entries if e.name and not e.name.endswith("/") and not is_hidden(e.name))
    return sorted(there, key=lambda entry: entry.name.replace("/", "\0"))


def kind_of_file(name: str) -> str:
    """A file by its suffix, for counting."""
    base = posixpath.basename(name)
    if base.lower().endswith(IMAGE_SUFFIXES):
        return "images"
    suffix = posixpath.splitext(base)[1].lower()
    if not suffix:
        return NO_SUFFIX
    return f"{suffix} files" if COMMON_SUFFIX.fullmatch(suffix) else "files with another suffix"


def same_name(name: str) -> str:
    """Equal for names that mean the same file: the forms of Unicode (NFC, NFD), `./`, and backslashes of Windows."""
    return posixpath.normpath(unicodedata.normalize("NFC", name).replace("\\", "/"))


def find_named(listing: Listing, below: str = "") -> Callable[[str], str | None]:
    """A function that finds the file which a list names, relative to the folder `below` or with the address of the source."""
    exact = {entry.name for entry in listing.entries}
    there = {same_name(entry.name): entry.name for entry in listing.entries}
    uri = listing.store.uri
    roots = (
        [uri] if listing.store.local_folder is None else [uri, os.path.abspath(uri), os.path.realpath(uri)]
    )

    def find(name: str) -> str | None:
        for root in roots:
            name = name.removeprefix(f"{root}/")
        named = posixpath.normpath(posixpath.join(below, name))
        return named if named in exact else there.get(same_name(posixpath.join(below, name)))

    return find


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
    found = _find_files(store)
    return replace(
        listing,
        store=store,
        entries=found.entries,
        names_files=False,
        unlisted=found.unlisted,
        dangling=found.dangling,
    ), name


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
            f"{listing.uri(stray[0])} lies beside {suffix} files; say folder:{listing.store.uri} for the images, or give a pattern like "
            f"*{suffix} for the archives"
        )
    check_splits(found, listing.store.uri, suffix)
    return found


def check_splits(names: Sequence[str], where: str, pattern: str) -> None:
    """Refuse a mixture of splits: it would train on the images of a test."""
    for expression in (HUB_SPLIT, SPLIT):
        found = {name: match[1] if (match := expression.search(name)) else "" for name in names}
        splits = sorted({split.lower() for split in found.values()})
        if len(splits) < 2:
            continue
        other = next(name for name, split in found.items() if not split or split.lower() == splits[0])
        shown = ", ".join(split or f"none, as {other}" for split in splits)
        raise Refused(
            f"{where} holds several splits ({shown}); give the folder of one, or a pattern like *{splits[-1]}*{pattern}"
        )


def check_folder_splits(names: Sequence[str], where: str) -> None:
    """Refuse sub-folders that are splits and no classes, at any level down to the third."""
    for level in range(3):
        folders = {part[level] for name in names if len(part := name.split("/", level + 1)) > level + 1}
        splits = sorted(name for name in folders if SPLIT.search(name))
        words = {match[1].lower() for name in splits if (match := SPLIT.search(name))}
        plain = [name for name in splits if name.lower() in SPLITS]
        several = len(words) > 1 and (len(plain) > 1 or 2 * len(splits) >= len(folders))
        if several or (splits and level == 0 and len(splits) == len(folders)):
            raise Refused(
                f"{where} holds splits ({', '.join(splits[:5])}) and no classes at level {level + 1} of its folders; give the "
                "folder of one"
            )
