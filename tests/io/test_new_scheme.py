"""A storage scheme from outside the package: one class, one row in the table, and every stage works with it."""

from __future__ import annotations

import errno
import multiprocessing
import signal
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dmd2 import stages
from dmd2.config import Config
from dmd2.errors import Interrupted
from dmd2.io.artifact import read_manifest
from dmd2.io.destination import CONTENTS, STARTED_WITH
from dmd2.io.local import atomic_write
from dmd2.io.storage import SCHEMES, cache, is_remote, open_store
from dmd2.io.store import ObjectInfo
from dmd2.training.trainer import DiffusionTrainer, DMD2Trainer
from tests.bucket import list_names, names_in_manifest

File = tuple[bytes, str]
"""(content, version)."""


class MemoryStore:
    """Files in the memory of a process that all processes of a test share."""

    files: dict[str, File]
    """{address: file}, of all stores."""
    lock: Any
    local_folder = None

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")

    def list_objects(self, prefix: str = "") -> list[ObjectInfo]:
        start = f"{self.uri}/"
        found = {
            key.removeprefix(start): f for key, f in self.files.items() if key.startswith(start + prefix)
        }
        return [ObjectInfo(name, len(data), version) for name, (data, version) in sorted(found.items())]

    def has_objects(self, prefix: str = "") -> bool:
        return bool(self.list_objects(prefix))

    def read(self, name: str) -> bytes:
        try:
            return self.files[f"{self.uri}/{name}"][0]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, "no such object", f"{self.uri}/{name}") from None

    def download(self, name: str, path: Path) -> None:
        with atomic_write(path) as draft:
            draft.write_bytes(self.read(name))

    def upload(self, path: Path, name: str) -> None:
        self.write(name, path.read_bytes())

    def create(self, path: Path, name: str) -> None:
        self.compare_and_swap(name, path.read_bytes(), None)

    def write(self, name: str, data: bytes) -> None:
        self.files[f"{self.uri}/{name}"] = data, uuid.uuid4().hex

    def compare_and_swap(self, name: str, data: bytes, expected: str | None) -> str:
        with self.lock:
            if self.version(name) != expected:
                where = f"{self.uri}/{name}"
                raise FileExistsError(errno.EEXIST, "changed by another process meanwhile", where)
            self.write(name, data)
            return self.files[f"{self.uri}/{name}"][1]

    def version(self, name: str) -> str | None:
        found = self.files.get(f"{self.uri}/{name}")
        return found and found[1]

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            self.files.pop(f"{self.uri}/{name}", None)


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """`mem://` and the name of an empty place, read through a cache of this test's own."""
    monkeypatch.setenv("DMD2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(SCHEMES, "mem", MemoryStore)
    with multiprocessing.get_context("fork").Manager() as manager:
        monkeypatch.setattr(MemoryStore, "files", manager.dict(), raising=False)
        monkeypatch.setattr(MemoryStore, "lock", manager.Lock(), raising=False)
        yield "mem://place"


@pytest.fixture
def lost_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """What is in the cache is lost: go on as another machine."""
    return lambda: monkeypatch.setenv("DMD2_CACHE", str(tmp_path / uuid.uuid4().hex))


def interrupt(
    monkeypatch: pytest.MonkeyPatch, trainer: type[Any], at: int, stop: Callable[[], None]
) -> list[int]:
    """Call `stop` in a step of the trainer, once. Returns the steps that are made, as they are made."""
    made: list[int] = []
    original = trainer.step

    def step(self: Any, real: Any, step: int) -> Any:
        made.append(step)
        if step == at and made.count(at) == 1:
            stop()
        return original(self, real, step)

    monkeypatch.setattr(trainer, "step", step)
    return made


def test_every_stage_works_on_it_and_resumes(
    micro: Config,
    made: Path,
    pictures: Path,
    memory: str,
    lost_machine: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Digests and weights are those of local folders, although both trainings were interrupted, one by SIGTERM and one
    by a failure, and went on without the files of the first machine."""
    data, teacher, run, evaluation, gate, package, models = (
        f"{memory}/{name}"
        for name in ("shards", "teacher", "run", "evaluation", "gate", "package", "models/a")
    )
    shards = stages.shard(micro, str(pictures), data, workers=1)
    assert shards.digest == read_manifest(made / "shards", "shards").digest

    def fail() -> None:
        raise RuntimeError("on purpose")

    steps = interrupt(monkeypatch, DiffusionTrainer, 2, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted, match="saved; the same command resumes"):
        stages.teach(micro, data, teacher)
    assert {STARTED_WITH, CONTENTS, "checkpoints/00000003/manifest.json"} <= set(list_names(teacher))
    lost_machine()
    stages.teach(micro, data, teacher)
    assert steps == list(range(6)), "no step twice"

    steps = interrupt(monkeypatch, DMD2Trainer, 9, fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        stages.distill(micro, data, teacher, run)
    lost_machine()
    stages.distill(micro, data, teacher, run)
    assert [steps[:10], steps[10:]] in ([[*range(10)], [*range(first, 10)]] for first in (4, 8))
    for folder, kind in ((teacher, "teacher"), (run, "run")):
        assert weights(folder, kind) == weights(made / kind, kind)

    stages.evaluate(micro, data, teacher, run, evaluation)
    generous = micro.model_copy(update={"gate": micro.gate.model_copy(update={"factor": 1e6})})
    stages.gate(generous, evaluation, gate)
    packaged = stages.package(run, evaluation, gate, package)
    assert stages.publish(package, models).digest == packaged.digest
    for folder in (data, teacher, run, evaluation, gate, package, models):
        assert list_names(folder) == names_in_manifest(folder)
    assert not list((cache() / "drafts").iterdir())


def weights(folder: str | Path, kind: str) -> str:
    files = {file.path: file.sha256 for file in read_manifest(folder, kind).files}
    return files["network.safetensors"]


def test_an_address_is_remote_if_its_scheme_is_known_and_not_a_path(memory: str) -> None:
    addresses = (memory, "gs://bucket/folder", "file:///tmp", "/tmp", "s3://bucket/folder", "")
    assert [is_remote(address) for address in addresses] == [True, True, False, False, False, False]


def test_an_unregistered_scheme_names_the_registered_ones(refusal: Callable[..., str]) -> None:
    sentence = refusal(lambda: open_store("mem://place"))
    assert "'mem' is not supported; give a local path or one of file://, gs://" in sentence
