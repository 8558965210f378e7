"""Publishing: a package is copied whole, its manifest last, and never replaced."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dmd2 import stages
from dmd2.io import artifact, local, storage
from dmd2.model import load
from tests.bucket import list_names, names_in_manifest


@pytest.fixture(scope="module")
def package(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packages") / "package"
    stages.package(str(made / "run"), str(made / "evaluation"), str(made / "gate"), str(out))
    return out


def test_what_is_published_is_the_package_and_works(package: Path, tmp_path: Path) -> None:
    made = artifact.read_manifest(package, "package")
    published = stages.publish(str(package), str(tmp_path / "models" / "a"))
    assert published.digest == made.digest
    assert (published.inputs, published.config, published.facts) == (made.inputs, made.config, made.facts)
    assert load(str(tmp_path / "models" / "a")).sample([0], seed=0).shape[0] == 1


def test_on_a_bucket_the_manifest_comes_last(package: Path, bucket: str) -> None:
    out = f"{bucket}/models/a"
    stages.publish(str(package), out)
    assert list_names(out) == names_in_manifest(out)
    generations = {
        entry.name: int(entry.fingerprint.split()[0]) for entry in storage.open_store(out).list_objects()
    }
    assert max(generations, key=lambda name: generations[name]) == "manifest.json"


def test_published_again_it_is_left_as_it_is(package: Path, bucket: str) -> None:
    out = f"{bucket}/models/a"
    stages.publish(str(package), out)
    before = storage.open_store(out).list_objects()
    stages.publish(str(package), out)
    assert storage.open_store(out).list_objects() == before


def test_another_package_is_never_overwritten(
    package: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    out, other = tmp_path / "models", tmp_path / "other"
    stages.publish(str(package), str(out))
    shutil.copytree(package, other)
    (other / "README.md").write_text("another")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest.pop("seal", None)
    for file in manifest["files"]:
        if file["path"] == "README.md":
            file |= {"size": 7, "sha256": local.sha256(other / "README.md")}
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert "holds another package" in refusal(lambda: stages.publish(str(other), str(out)))
    assert artifact.read_manifest(out, "package").digest == artifact.read_manifest(package, "package").digest


def test_a_damaged_package_is_not_published(
    package: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    shutil.copytree(package, tmp_path / "damaged")
    (tmp_path / "damaged" / "README.md").write_text("x")
    assert "truncated or replaced" in refusal(
        lambda: stages.publish(str(tmp_path / "damaged"), str(tmp_path / "models"))
    )
    assert not (tmp_path / "models").exists()


def test_only_a_package_is_published(made: Path, tmp_path: Path, refusal: Callable[..., str]) -> None:
    said = refusal(lambda: stages.publish(str(made / "run"), str(tmp_path / "models")))
    assert "is a run folder; a package folder is needed here" in said
