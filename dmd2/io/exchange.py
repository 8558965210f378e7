"""Files of one draft that the machines of a run exchange over the bucket, as they share no disk.

The main process keeps the draft. On its machine other processes write into the same folder. On another machine the
first process uploads what its machine has written (`upload_part`), and the main process collects the names, sizes and
digests (`collect_parts`). With a local output folder all machines must see that folder, and nothing is exchanged.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dmd2.errors import Refused
from dmd2.io.artifact import MANIFEST, ArtifactFile, check_file_name
from dmd2.io.destination import read_contents
from dmd2.io.local import LocalStore, sha256
from dmd2.io.storage import download_files
from dmd2.io.store import CONCURRENT_REQUESTS, Store


class Exchange:
    """The exchange of files between the machines that work at one draft."""

    def __init__(self, folder: Path, store: Store) -> None:
        self.folder, self.store = folder, store
        self.token = 0
        """Number of this start of the run, which all its processes know."""
        self.on_other_machine = False
        """Whether this process does not see the folder of the main process."""
        self._parts: dict[str, ArtifactFile] = {}

    def announce(self, token: int) -> None:
        """Main process: leave a file by which other processes see whether they run on this machine."""
        for earlier in self.folder.glob(".[0-9]*.lock"):
            earlier.unlink()
        self.token = token
        (self.folder / f".{token}.lock").touch()

    def join(self, token: int) -> None:
        """Other processes: find out whether the main process runs on this machine."""
        self.token, self.on_other_machine = token, not (self.folder / f".{token}.lock").exists()
        if self.on_other_machine and self.store.local_folder:
            raise Refused(
                f"{self.folder} is not there on a machine of this run; on several machines choose an --out on a bucket, or on "
                "a disk that all of them share"
            )

    def download_latest(self, parent: str) -> None:
        """Replace the draft's folder here by the last subfolder of `parent` ("checkpoints/") that the bucket has."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        names = [check_file_name(name) for name in read_contents(self.store) if name.startswith(parent)]
        latest = max((name.split("/")[1] for name in names), default="")
        download_files(self.store, [name for name in names if name.split("/")[1] == latest], self.folder)

    def download_missing(self, folder: str) -> None:
        """Download what other machines have uploaded to a folder, by the manifest of that folder."""
        if self.store.local_folder:
            return
        listed = json.loads(self.store.read(f"{folder}/{MANIFEST}"))["files"]
        names = [f"{folder}/{check_file_name(name)}" for name in (*listed, MANIFEST)]
        download_files(self.store, [name for name in names if not (self.folder / name).exists()], self.folder)

    def upload_part(self, path: Path, folder: str, rank: int, digests: Mapping[str, str]) -> None:
        """Upload the files at `path` into `folder`, then their names, sizes and digests for the main process.

        Args:
            digests: SHA-256 of files by name, as far as it is known.
        """

        def upload(name: str, size: int) -> ArtifactFile:
            self.store.upload(path / name, f"{folder}/{name}")
            digest = digests.get(name) or sha256(path / name)
            return ArtifactFile(path=f"{folder}/{name}", size=size, sha256=digest)

        with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
            found = LocalStore(path).list_objects()
            files = list(pool.map(lambda info: upload(info.name, info.size), found))
        text = json.dumps([file.model_dump() for file in files])
        self.store.write(f"{self._receipts(folder)}{rank}.json", text.encode())

    def collect_parts(self, folder: str) -> list[ArtifactFile]:
        """Main process: the files that other machines have uploaded into `folder`."""
        if self.store.local_folder:
            return []
        receipts = [self.store.read(info.name) for info in self.store.list_objects(self._receipts(folder))]
        files = [ArtifactFile.model_validate(file) for text in receipts for file in json.loads(text)]
        self._parts |= {file.path: file for file in files}
        return files

    def parts(self) -> dict[str, ArtifactFile]:
        """All collected files, by name, without those of folders that were deleted here since."""
        kept = {name: file for name, file in self._parts.items() if (self.folder / name).parent.is_dir()}
        self._parts = kept
        return kept

    def _receipts(self, folder: str) -> str:
        return f".given/{self.token}/{folder}/"
