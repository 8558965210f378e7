"""Where a draft ends up: a local folder, by renaming the draft, or a bucket, by uploading its files.

On a bucket `.contents.json` lists the files of the draft. It is written after them, by compare-and-swap, so that a
draft is never resumed from half of an upload, and the process that started last wins: every other one finds the list
changed and stops. The manifest is written last, and only if there is none.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from dmd2.errors import Refused
from dmd2.io.artifact import MANIFEST, ArtifactFile, Manifest, check_file_name, sealed_text
from dmd2.io.local import LocalStore, write_text
from dmd2.io.storage import download_files, upload_files
from dmd2.io.store import Store

STARTED_WITH = ".begun.json"
"""Of an unfinished artifact: the configuration and inputs it was started with."""
SECONDS = ".seconds"
"""Of an unfinished artifact: the wall-clock time of earlier starts."""
STARTS = ".starts"
"""Of an unfinished artifact: how often it was started."""
CONTENTS = ".contents.json"
"""Of an unfinished artifact on a bucket: the list of its files, written after them."""
LOCAL_ONLY = ".tars/"
"""Files of a draft that are not uploaded: intermediate files of LMDB tables."""


class Destination(Protocol):
    """Where the files of a draft end up."""

    store: Store

    def restore(self) -> None:
        """Have in the draft's folder what an earlier start has saved, and take over its work."""

    def save(self, parts: Mapping[str, ArtifactFile]) -> None:
        """Save the files of the draft, so that another start can resume, on another machine too.

        Args:
            parts: Files of the draft, by name, that other machines have uploaded already.
        """

    def publish(self, manifest: Manifest) -> None:
        """Write the manifest and give the artifact its name. Hidden files are deleted."""

    def release(self) -> None:
        """After a failure with nothing to resume from: let others begin anew in this place."""


class LocalDestination:
    """A folder of this machine. The draft is a hidden folder beside it."""

    def __init__(self, draft: Path, target: Path) -> None:
        self.draft, self.target = draft, target
        self.store: Store = LocalStore(draft)

    def restore(self) -> None:
        """The files of an earlier start are already there."""

    def save(self, parts: Mapping[str, ArtifactFile]) -> None:
        """The files of the draft are already where a later start looks for them."""

    def publish(self, manifest: Manifest) -> None:
        write_text(self.draft / MANIFEST, sealed_text(manifest))
        self.draft.replace(self.target)
        for hidden in self.target.glob(".*"):
            shutil.rmtree(hidden) if hidden.is_dir() else hidden.unlink(missing_ok=True)

    def release(self) -> None:
        """The draft's folder is deleted, which is enough."""


class RemoteDestination:
    """A prefix of a bucket. The draft is a folder of this machine's cache, of which the bucket has a copy."""

    def __init__(self, draft: Path, store: Store) -> None:
        self.draft = draft
        self.store: Store = store
        self._version = store.version(CONTENTS)
        self._saved: dict[str, str] = {}
        """{name: fingerprint} of the files that the bucket has."""

    def restore(self) -> None:
        if self._version:
            names = [check_file_name(name) for name in read_contents(self.store)]
            download_files(self.store, names, self.draft)
        self._saved = self._present()
        self._claim()

    def save(self, parts: Mapping[str, ArtifactFile]) -> None:
        self._claim()  # before anything is uploaded over the files of another process
        if self.store.version(MANIFEST):
            self.store.delete([CONTENTS])
            raise self._finished_by_another()
        uploaded = {name: file.sha256 for name, file in parts.items()}
        present, before = self._present() | uploaded, self._saved | uploaded
        upload_files(self.draft, [name for name in present if before.get(name) != present[name]], self.store)
        self._saved = present
        self._claim()
        self.store.delete(before.keys() - present.keys())

    def publish(self, manifest: Manifest) -> None:
        try:
            self.store.compare_and_swap(MANIFEST, sealed_text(manifest).encode(), None)
        except FileExistsError:
            raise self._finished_by_another() from None
        self._delete_others({file.path for file in manifest.files} | {MANIFEST})
        shutil.rmtree(self.draft)

    def release(self) -> None:
        marks = {STARTED_WITH, SECONDS, STARTS, CONTENTS}
        with suppress(OSError, Refused):
            self._claim()
            if {info.name for info in self.store.list_objects()} <= marks:
                self.store.delete(marks)

    def _delete_others(self, listed: set[str]) -> None:
        """Delete the hidden files, and unlisted ones of the artifact's own folders. Other artifacts may lie below the
        same prefix."""
        folders = {name.split("/")[0] for name in listed if "/" in name}
        others = [info.name for info in self.store.list_objects() if info.name not in listed]
        self.store.delete(name for name in others if name.startswith(".") or name.split("/")[0] in folders)

    def _present(self) -> dict[str, str]:
        """{name: fingerprint} of the files of the draft that belong on the bucket."""
        found = LocalStore(self.draft).list_objects()
        return {info.name: info.fingerprint for info in found if not info.name.startswith(LOCAL_ONLY)}

    def _claim(self) -> None:
        """Write the list of files. Only the process that started last may."""
        text = json.dumps(sorted(self._saved)).encode()
        try:
            self._version = self.store.compare_and_swap(CONTENTS, text, self._version)
        except FileExistsError:
            raise Refused(
                f"another process has begun to work in {self.store.uri}; this one gives way to it"
            ) from None

    def _finished_by_another(self) -> Refused:
        return Refused(f"{self.store.uri} was finished by another process meanwhile; this result is dropped")


def read_contents(store: Store) -> list[str]:
    """The names of the files of an unfinished artifact on a bucket; empty if there is none."""
    try:
        names: list[str] = json.loads(store.read(CONTENTS))
    except FileNotFoundError:
        return []
    return names
