"""`publish` to the Hugging Face Hub, by its real client, and to Kubeflow's Model Registry, on servers that check what they are sent."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from dmd2 import stages
from dmd2.io.artifact import MANIFEST, read_manifest
from dmd2.io.model_registry import TOKEN_FILE
from dmd2.model import load
from tests.publishing.hub import TOKEN, with_hub

Refusal = Callable[[Callable[[], object]], str]


@pytest.fixture(scope="module")
def package(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packages") / "package"
    stages.package(str(made / "run"), str(made / "evaluation"), str(made / "gate"), str(out))
    return out


def publish(
    package: Path, out: str, address: str, home: Path, *more: str, token: str = TOKEN
) -> tuple[int, str]:
    """(status, output) of the command."""
    return with_hub(["-m", "dmd2", "publish", str(package), "--out", out, *more], address, home, token)


def test_on_the_hub_a_package_is_one_commit_with_a_tag(
    package: Path, hub: tuple[Any, str], tmp_path: Path
) -> None:
    server, address = hub
    manifest, tag = read_manifest(package, "package"), read_manifest(package, "package").digest[:16]
    status, said = publish(package, "hf://owner/digits", address, tmp_path)
    assert status == 0, said
    repository = server.repositories["owner/digits"]
    assert repository.private, "its owner decides who else sees it"
    files = repository.commits[repository.tags[tag]]
    for name in (MANIFEST, *(file.path for file in manifest.files)):
        assert files[name] == (package / name).read_bytes()
    assert files.keys() == {MANIFEST, ".gitattributes", *(file.path for file in manifest.files)}
    assert len(repository.commits) == 2

    for name, content in files.items():
        (tmp_path / "got" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "got" / name).write_bytes(content)
    assert stages.verify(str(tmp_path / "got"), digest=tag).digest == manifest.digest
    assert load(tmp_path / "got").sample([0], seed=0).shape[0] == 1

    server.asked.clear()
    assert publish(package, "hf://owner/digits", address, tmp_path)[0] == 0
    assert set(server.asked) <= {"refs", "file"}, "published again, it is only looked at"


def test_on_the_hub_an_interrupted_publication_is_completed_and_other_files_leave_the_main_branch(
    package: Path, hub: tuple[Any, str], tmp_path: Path
) -> None:
    server, address = hub
    server.fail.add("tag")
    status, said = publish(package, "hf://owner/digits", address, tmp_path)
    assert (status, said.splitlines()[-1].partition(" (")[0]) == (
        64,
        "dmd2: hf://owner/digits cannot be used",
    ), said
    server.fail.clear()
    repository = server.repositories["owner/digits"]
    assert (len(repository.commits), repository.tags) == (2, {})
    before = repository.commits[repository.head]
    repository.commit(before | {"old.bin": b"1"})
    server.asked.clear()
    assert publish(package, "hf://owner/digits", address, tmp_path)[0] == 0
    assert "upload" not in server.asked, "nothing is sent twice"
    assert repository.commits[repository.head] == before
    assert list(repository.tags.values()) == [repository.head]


def test_on_the_hub_mistakes_are_one_sentence(package: Path, hub: tuple[Any, str], tmp_path: Path) -> None:
    server, address = hub
    for out, token, words in (
        ("hf://digits", TOKEN, "give hf://owner/name"),
        ("hf://owner/digits", "hf_wrong", "check the name, the connection and the account (HF_TOKEN"),
    ):
        status, said = publish(package, out, address, tmp_path, token=token)
        assert (status, len(said.splitlines())) == (64, 1), said
        assert words in said
        assert "hf_wrong" not in said
    assert not server.repositories


@pytest.mark.parametrize("version", ["v1", "v1alpha3"])
def test_a_published_package_is_registered_with_digest_and_scores(
    version: str, package: Path, registry: tuple[Any, str], tmp_path: Path
) -> None:
    server, address = registry
    server.version = version
    out, manifest = tmp_path / "models" / "a", read_manifest(package, "package")
    for _ in range(2):  # again: nothing more
        stages.publish(str(package), str(out), registry=address)
    (model,), (at,), (artifact,) = (
        server.rows[n] for n in ("registered_models", "model_versions", "artifacts")
    )
    assert (model["name"], at["name"], at["registeredModelId"]) == (
        "edm-digits",
        manifest.digest[:16],
        model["id"],
    )
    assert (artifact["uri"], artifact["parent"]) == (out.as_uri(), at["id"])
    told = at["customProperties"]
    assert told["digest"]["string_value"] == manifest.digest
    assert told["fid_student"]["double_value"] == manifest.facts["fid_student"]
    assert told["run"]["string_value"] == manifest.inputs["run"]


def test_a_version_that_is_registered_elsewhere_is_left_alone(
    package: Path, registry: tuple[Any, str], tmp_path: Path, refusal: Refusal
) -> None:
    server, address = registry
    stages.publish(str(package), str(tmp_path / "a"), registry=address, model="digits")
    said = refusal(
        lambda: stages.publish(str(package), str(tmp_path / "b"), registry=address, model="digits")
    )
    assert "is never changed" in said
    assert len(server.rows["artifacts"]) == 1
    stages.publish(str(package), str(tmp_path / "b"), registry=address, model="other")
    assert [row["name"] for row in server.rows["registered_models"]] == ["digits", "other"]


def test_the_registry_is_looked_at_before_anything_is_copied(
    package: Path,
    registry: tuple[Any, str],
    tmp_path: Path,
    refusal: Refusal,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, address = registry
    out = str(tmp_path / "models")
    server.token = "of-an-account"
    assert "refused with status 401" in refusal(lambda: stages.publish(str(package), out, registry=address))
    (tmp_path / "token").write_text("of-an-account\n")
    monkeypatch.setenv(TOKEN_FILE, str(tmp_path / "token"))
    assert "is no address" in refusal(lambda: stages.publish(str(package), out, registry="registry:8080"))
    server.version = "v9"
    assert "as no Model Registry does" in refusal(lambda: stages.publish(str(package), out, registry=address))
    with pytest.raises(OSError, match="does not answer"):
        stages.publish(str(package), out, registry="http://127.0.0.1:1")
    assert not Path(out).exists()
    server.version = "v1"
    stages.publish(str(package), out, registry=address)
    assert len(server.rows["artifacts"]) == 1


def test_by_teacher_each_package_has_an_address_of_its_own(
    package: Path, made: Path, tmp_path: Path, refusal: Refusal
) -> None:
    digest, teacher = (
        read_manifest(package, "package").digest,
        read_manifest(made / "teacher", "teacher").digest,
    )
    stages.publish(str(package), str(tmp_path / "models"), by_teacher=True)
    place = tmp_path / "models" / "edm" / teacher[:16] / digest[:16]
    assert stages.verify(str(place), digest=place.name).digest == digest
    said = refusal(lambda: stages.publish(str(package), "hf://owner/name", by_teacher=True))
    assert "on the hub each package has a tag" in said


STEP = """
import sys
from kfp import dsl
from components.publish_model.component import publish_model

package, digest, models, registry, pointer = sys.argv[1:]
made = dsl.Model(metadata={"uri": package, "digest": digest})
publish_model.python_func(models, "edm-digits", "hf://owner/digits", registry, made, dsl.Model(uri=pointer))
"""


@pytest.mark.skipif(not find_spec("kfp"), reason="needs KFP")
def test_the_step_of_the_pipeline_publishes_to_a_folder_the_hub_and_the_registry(
    package: Path, hub: tuple[Any, str], registry: tuple[Any, str], tmp_path: Path
) -> None:
    digest = read_manifest(package, "package").digest
    words = [
        "-c",
        STEP,
        str(package),
        digest,
        str(tmp_path / "models"),
        registry[1],
        str(tmp_path / "pointer"),
    ]
    status, said = with_hub(words, hub[1], tmp_path)
    assert status == 0, said
    place = tmp_path / "models" / "edm-digits" / digest[:16]
    assert (tmp_path / "pointer").read_bytes() == (place / MANIFEST).read_bytes()
    assert stages.verify(str(place)).digest == digest
    assert list(hub[0].repositories["owner/digits"].tags) == [digest[:16]]
    assert [row["uri"] for row in registry[0].rows["artifacts"]] == [place.as_uri()]
