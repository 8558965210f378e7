"""What the accounts of manifests/README.md may do on the bucket, by its own commands, and that it is enough.

The commands are run with a `gcloud` that only says what it was asked. A proxy in front of the object store then answers
403 to what an account may not do: as in Google's, who writes over an object needs the right to delete it.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

import pytest
import yaml

from components.distill.trainjob import ROOT as ROOT_OF_RUNS
from components.find_teachers.entries import ENTRIES, WorkItem
from components.find_teachers.ledger import RESERVATIONS, Ledger
from components.find_teachers.limits import RetrainLimits
from dmd2 import stages
from dmd2.io.artifact import ArtifactFile, Manifest, read_manifest
from dmd2.io.local import sha256
from dmd2.io.storage import open_store
from manifests.__main__ import ROOT, render
from tests.bucket import UPLOAD, Proxy, list_names, names_in_manifest, use_host

READ, CREATE, DELETE = {"get", "list"}, {"create"}, {"delete", "update"}
ROLES = {
    "objectViewer": READ,
    "objectCreator": CREATE,
    "objectUser": READ | CREATE | DELETE,
}
"""What each role of Cloud Storage may do with objects; `roles/storage.` in front."""
Rights = dict[tuple[str, str], set[str]]
"""{(account, folder): roles}."""


@pytest.fixture(scope="module")
def rights() -> Rights:
    (block,) = re.findall(
        r"```\n(for name in steps launcher trainer watcher.*?)```",
        (ROOT / "README.md").read_text(),
        re.DOTALL,
    )
    asked = subprocess.run(
        ["bash", "-eu", "-c", f'gcloud() {{ echo "$@"; }}\nPROJECT=p BUCKET=b\n{block}'],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: Rights = {}
    for folder, account, role in re.findall(
        r"gs://b/(\S+) --member serviceAccount:dmd2-(\w+)@\S+ --role roles/storage\.(\w+)", asked.stdout
    ):
        found.setdefault((account, folder), set()).add(role)
    return found


@dataclass
class Account(Proxy):
    """A proxy that lets an account do what it may."""

    folders: dict[str, set[str]] = field(default_factory=dict)
    """{folder of the bucket: what may be done in it}."""
    refused: list[str] = field(default_factory=list)

    def allows(self, request: str, body: bytes) -> bool:
        if "/o" not in urlsplit(request).path:
            return False  # the client asks for the bucket itself, too, and does without an answer
        action, name = self._asked(request, body)
        granted = [can for folder, can in self.folders.items() if f"{name}/".startswith(f"{folder}/")]
        if action <= set().union(*granted):
            return True
        self.refused.append(request)
        return False

    def _asked(self, request: str, body: bytes) -> tuple[set[str], str]:
        """(what the request does, the name of the object or the prefix of a list)."""
        method, _, address = request.partition(" ")
        path, query = urlsplit(address).path, parse_qs(urlsplit(address).query)
        if "upload_id" in query:  # the request that began this upload was allowed
            return set(), ""
        if "/upload/" in path:
            bucket = path.split("/b/")[1].split("/")[0]
            name = json.loads(re.findall(rb'"name": ("[^"]*")', body)[0])
            return CREATE | (DELETE if self._is_there(bucket, name) else set()), name
        name = path.partition("/o/")[2] or query.get("prefix", [""])[0]
        return (READ if method == "GET" else DELETE), name

    def _is_there(self, bucket: str, name: str) -> bool:
        behind = HTTPConnection(urlsplit(self.upstream).netloc)
        behind.request("GET", f"/storage/v1/b/{bucket}/o/{quote(name, safe='')}")
        return behind.getresponse().status == 200


As = Callable[[str], AbstractContextManager[Account]]


@pytest.fixture
def acting(bucket: str, object_store: str, rights: Rights, monkeypatch: pytest.MonkeyPatch) -> As:
    """`with acting(account) as proxy`: requests have the rights of that account."""

    @contextmanager
    def begin(account: str) -> Iterator[Account]:
        folders = {
            folder: set().union(*(ROLES[role] for role in roles))
            for (who, folder), roles in rights.items() if who == account
        }  # fmt: skip
        proxy = Account(object_store, folders=folders)
        with proxy.serving():
            use_host(proxy.url, monkeypatch)
            yield proxy
        use_host(object_store, monkeypatch)

    return begin


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package by its manifest, with files of some sizes."""
    folder = tmp_path / "package"
    for name, size in (("README.md", 10), ("unet/weights.safetensors", 100_000), ("vae/config.json", 0)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(range(256)) * (size // 256) + bytes(size % 256))
    files = [
        ArtifactFile(path=str(path.relative_to(folder)), size=path.stat().st_size, sha256=sha256(path))
        for path in sorted(folder.rglob("*")) if path.is_file()
    ]  # fmt: skip
    manifest = Manifest(
        kind="package", config=None, inputs={}, files=files, facts={"a": 1}, versions={}, seconds=1
    )
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    return folder


def test_only_watchers_may_change_the_ledger_and_nobody_a_published_model(rights: Rights) -> None:
    changing = {
        folder: {who for (who, where), roles in rights.items() if where == folder and "objectUser" in roles}
        for _, folder in rights
    }
    assert changing == {
        "kfp": {"steps", "launcher", "watcher"}, "runs": {"steps", "launcher", "trainer"}, "ledger": {"watcher"},
        "ledger/claims": set(), "models": set(), "teachers": set(), "sources": set(),
    }  # fmt: skip
    creating = {key for key, roles in rights.items() if "objectCreator" in roles}
    assert creating == {(who, what) for who in ("steps", "launcher") for what in ("models", "ledger/claims")}


def test_the_runtime_names_the_folder_that_a_training_may_write(rights: Rights) -> None:
    objects = yaml.safe_load_all(render("gke-a3-high"))
    (runtime,) = [one for one in objects if one["kind"] == "TrainingRuntime"]
    writable = [where for (who, where), roles in rights.items() if who == "trainer" and "objectUser" in roles]
    assert [runtime["metadata"]["annotations"][ROOT_OF_RUNS]] == [f"gs://my-bucket/{one}" for one in writable]


def test_every_folder_that_is_named_is_made(rights: Rights) -> None:
    (made,) = re.findall(
        r"for folder in (.*); do gcloud storage managed-folders create", (ROOT / "README.md").read_text()
    )
    assert {folder for _, folder in rights} | {"aliases"} == set(made.split())


@pytest.mark.parametrize("account", ["steps", "launcher"])
def test_who_may_only_create_can_publish(account: str, package: Path, bucket: str, acting: As) -> None:
    out = f"{bucket}/models/edm/0123"
    with acting(account) as proxy:
        published = stages.publish(str(package), out)
        assert published == read_manifest(package, "package")
        assert stages.publish(str(package), out) == published, "a second time too"
        assert not proxy.refused
        assert list_names(out) == names_in_manifest(out)


def test_an_interrupted_copy_is_completed_without_more_rights(package: Path, bucket: str, acting: As) -> None:
    out = f"{bucket}/models/edm/0123"
    with acting("steps") as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DMD2_RETRY_S", "0")
        proxy.fail(UPLOAD, "503", after=1)
        with pytest.raises(OSError, match="does not answer as it should"):
            stages.publish(str(package), out)
        assert "manifest.json" not in list_names(out)
        left = set(list_names(out))
        assert left
        proxy.rules.clear()
        before = set(open_store(out).list_objects())
        stages.publish(str(package), out)
        assert before <= set(open_store(out).list_objects()), "what was there is left as it is"
        assert list_names(out) == names_in_manifest(out)


def test_what_is_there_with_another_content_is_refused(
    package: Path, bucket: str, acting: As, refusal: Callable[..., str]
) -> None:
    out = f"{bucket}/models/edm/0123"
    open_store(out).write("README.md", b"0123456789")
    with acting("steps"):
        said = refusal(lambda: stages.publish(str(package), out))
    assert (
        f"{out}/README.md is there with another content, and nothing is replaced; choose another --out"
        in said
    )
    assert open_store(out).read("README.md") == b"0123456789"
    assert "manifest.json" not in list_names(out)


def test_the_steps_can_neither_replace_nor_delete_what_is_published(
    package: Path, bucket: str, acting: As
) -> None:
    stages.publish(str(package), f"{bucket}/models/a")
    store = open_store(f"{bucket}/models/a")
    before = store.list_objects()
    with acting("steps"):
        attempts: list[Callable[[], object]] = [
            lambda: store.write("README.md", b"mine"),
            lambda: store.upload(package / "README.md", "README.md"),
            lambda: store.delete(["manifest.json"]),
            lambda: store.compare_and_swap("manifest.json", b"{}", store.version("manifest.json")),
            lambda: open_store(f"{bucket}/teachers").write("mine", b""),
            lambda: open_store(f"{bucket}/ledger/entries").write("mine.json", b"{}"),
            lambda: open_store(f"{bucket}/aliases").write("latest", b"mine"),
        ]
        for attempt in attempts:
            with pytest.raises(PermissionError):
                attempt()
    assert store.list_objects() == before


def test_a_run_cannot_move_the_name_of_a_model(package: Path, bucket: str, acting: As) -> None:
    model, place = f"{bucket}/models/a", f"{bucket}/aliases"
    stages.publish(str(package), model)
    with acting("steps"), pytest.raises(PermissionError):
        stages.alias("latest", place, model=model)
    stages.alias("latest", place, model=model)
    with acting("launcher"), pytest.raises(PermissionError):
        stages.alias("latest", place, rollback=True)
    assert stages.alias("latest", place).models[0]["model"] == model


def test_a_run_reports_to_the_ledger_and_cannot_change_it(bucket: str, acting: As) -> None:
    place, work = f"{bucket}/ledger", WorkItem(teacher="t", recipe="r", image="i")
    ledger = Ledger(open_store(place))
    with acting("watcher"):
        claim = ledger.claim(work, "gs://b/teacher", "watcher", 1, RetrainLimits(1, 1))
        assert claim
    with acting("steps") as proxy:
        ledger.begin(claim, "run")
        ledger.begin(claim, "run")
        assert ledger.done(claim, "run", "accepted", "gs://b/package").state == "done"
        assert not proxy.refused
        entry = f"{ENTRIES}{work.key}.json"
        attempts: list[Callable[[], object]] = [
            lambda: ledger.store.write(entry, b"{}"),
            lambda: ledger.store.delete([entry]),
            lambda: ledger.store.write(RESERVATIONS, b"{}"),
            lambda: ledger.store.delete([f"claims/{work.key}/{claim.token}-1.json"]),
            lambda: ledger.store.write(f"claims/{work.key}/{claim.token}-1.json", b"{}"),
        ]
        for attempt in attempts:
            with pytest.raises(PermissionError):
                attempt()
    with acting("watcher"):
        ledger.settle(work.key)
    assert json.loads(ledger.store.read(entry))["state"] == "done"
