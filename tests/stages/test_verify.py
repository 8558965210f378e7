"""A package says where it comes from, and `verify` refuses by name what differs, offline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from dmd2 import stages
from dmd2.config import Config
from dmd2.io.artifact import MANIFEST, Manifest, read_manifest, sealed_text
from dmd2.io.local import sha256
from dmd2.provenance import PROVENANCE
from dmd2.sbom import SBOM
from tests.bucket import flip_bit


@pytest.fixture(scope="module")
def original(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packages") / "package"
    stages.package(str(made / "run"), str(made / "evaluation"), str(made / "gate"), str(out))
    return out


@pytest.fixture
def package(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "package"))


def statement(package: Path) -> dict[str, Any]:
    return json.loads((package / PROVENANCE).read_text())


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file; a manifest is sealed again."""
    value = json.loads(path.read_text())
    change(value)
    manifest = path.name == MANIFEST
    path.write_text(sealed_text(Manifest.model_validate(value)) if manifest else json.dumps(value))


def evaluated(made: dict[str, Any]) -> dict[str, Any]:
    """The scores of the evaluation in a statement."""
    chain = {each["name"]: each for each in made["predicate"]["buildDefinition"]["resolvedDependencies"]}
    scores: dict[str, Any] = chain["evaluation"]["annotations"]["scores"]
    return scores


def list_anew(package: Path, name: str) -> None:
    """Write size and digest of the file, as it is now, into the manifest."""
    now = {"path": name, "size": (package / name).stat().st_size, "sha256": sha256(package / name)}
    edit(package / "manifest.json", lambda m: [f.update(now) for f in m["files"] if f["path"] == name])


def test_a_package_is_what_it_says(original: Path, made: Path) -> None:
    manifest = stages.verify(str(original))
    assert stages.verify(str(original), digest=manifest.digest) == manifest
    assert stages.verify(str(original), digest=manifest.digest[:16]) == manifest


def test_the_statement_has_the_form_of_in_toto_and_slsa_and_names_everything(
    original: Path, made: Path
) -> None:
    found = statement(original)
    assert (found["_type"], found["predicateType"]) == (
        "https://in-toto.io/Statement/v1", "https://slsa.dev/provenance/v1",
    )  # fmt: skip
    files = {file.path: file.sha256 for file in read_manifest(original, "package").files}
    del files[PROVENANCE]
    assert {each["name"]: each["digest"]["sha256"] for each in found["subject"]} == files
    named = {each["name"]: each for each in found["predicate"]["buildDefinition"]["resolvedDependencies"]}
    for kind in ("shards", "teacher", "run", "evaluation", "gate"):
        assert named[kind]["digest"] == {"dmd2Artifact": read_manifest(made / kind, kind).digest}
    assert named["run/network.safetensors"]["digest"] == {
        "sha256": sha256(made / "run" / "network.safetensors")
    }
    assert len(named["code"]["digest"]["sha256"]) == 64
    scores = read_manifest(made / "evaluation", "evaluation").facts["scores"]
    assert named["evaluation"]["annotations"]["scores"] == json.loads(json.dumps(scores))


def test_the_bill_of_materials_lists_what_is_installed(original: Path) -> None:
    bill = json.loads((original / SBOM).read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.5")
    parts = {part["purl"]: part["version"] for part in bill["components"] if part["type"] == "library"}
    for name in ("torch", "safetensors", "clean-fid", "pillow"):
        assert parts[f"pkg:pypi/{name}@{version(name).replace('+', '%2B')}"] == version(name)
    assert len(parts) > 50
    assert bill["metadata"]["component"]["name"] == "dmd2"


def test_the_image_of_a_step_is_among_its_versions(
    micro: Config, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = "registry.example/dmd2@sha256:" + 64 * "5"
    monkeypatch.setenv("DMD2_IMAGE", image)
    decided = stages.gate(micro, str(made / "evaluation"), str(tmp_path / "local"))
    assert "image" not in decided.versions, "kfp's local runner sets the variable too"
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    stages.gate(micro, str(made / "evaluation"), str(tmp_path / "gate"))
    assert read_manifest(tmp_path / "gate", "gate").versions["image"] == image


def test_the_same_run_gives_the_same_package(original: Path, made: Path, tmp_path: Path) -> None:
    again = stages.package(
        str(made / "run"), str(made / "evaluation"), str(made / "gate"), str(tmp_path / "again")
    )
    assert again.digest == read_manifest(original, "package").digest


MISTAKES: list[tuple[str, Callable[[Path], Any]]] = [
    ("network.safetensors was changed", lambda p: flip_bit(p / "network.safetensors", 1000)),
    ("README.md is missing", lambda p: (p / "README.md").unlink()),
    ("provenance.json was changed", lambda p: flip_bit(p / PROVENANCE, 100)),
    ("extra.bin is not in the manifest", lambda p: (p / "extra.bin").write_bytes(b"")),
    ("manifest.json was changed after it was written", lambda p: (p / "manifest.json").write_text((p / "manifest.json").read_text().replace("fid_student", "fid_teacher", 1))),
    ("byproducts[0].annotations.fid_student is ", lambda p: edit(p / "manifest.json", lambda m: m["facts"].update(fid_student=0.1))),
    ("externalParameters.distill.steps is ", lambda p: edit(p / "manifest.json", lambda m: m["config"]["distill"].update(steps=1))),
    ("the package was made from run 00000", lambda p: edit(p / "manifest.json", lambda m: m["inputs"].update(run=64 * "0"))),
    ("builder.version.torch is ", lambda p: edit(p / "manifest.json", lambda m: m["versions"].update(torch="0"))),
    ("has no provenance.json", lambda p: (p / PROVENANCE).unlink() or edit(p / "manifest.json", lambda m: m.update(files=[f for f in m["files"] if f["path"] != PROVENANCE]))),
    ("subject[0].digest.sha256 is ", lambda p: (p / "README.md").write_text("mine") and list_anew(p, "README.md")),
    ("is no JSON", lambda p: (p / PROVENANCE).write_text("{") and list_anew(p, PROVENANCE)),
    ("is no statement of this version", lambda p: (p / PROVENANCE).write_text("{}") and list_anew(p, PROVENANCE)),
]  # fmt: skip


@pytest.mark.parametrize(("said", "mistake"), MISTAKES, ids=[said for said, _ in MISTAKES])
def test_what_was_changed_is_refused_by_name(
    package: Path, refusal: Callable[..., str], said: str, mistake: Callable[[Path], Any]
) -> None:
    mistake(package)
    assert said in refusal(lambda: stages.verify(str(package)))


@pytest.mark.parametrize(
    ("gap", "name", "input_"),
    [
        ("the evaluation is of another run", "evaluation", "run"),
        ("the gate is of another evaluation", "gate", "evaluation"),
        ("the run was made from another teacher", "run", "teacher"),
    ],
)
def test_a_gap_in_the_chain_is_refused(
    package: Path, refusal: Callable[..., str], gap: str, name: str, input_: str
) -> None:
    def cut(made: dict[str, Any]) -> None:
        for each in made["predicate"]["buildDefinition"]["resolvedDependencies"]:
            if each["name"] == name:
                each["annotations"]["inputs"][input_] = 64 * "0"

    edit(package / PROVENANCE, cut)
    list_anew(package, PROVENANCE)
    assert gap in refusal(lambda: stages.verify(str(package)))


def test_scores_that_are_swapped_in_the_statement_alone_are_refused(
    package: Path, refusal: Callable[..., str]
) -> None:
    def swap(made: dict[str, Any]) -> None:
        scores = evaluated(made)
        scores["student"], scores["teacher"] = scores["teacher"], scores["student"]

    edit(package / PROVENANCE, swap)
    list_anew(package, PROVENANCE)
    said = refusal(lambda: stages.verify(str(package)))
    assert "fid of the student is " in said
    assert " in the package and " in said


def test_a_package_that_agrees_with_itself_is_told_by_its_digest(
    package: Path, original: Path, refusal: Callable[..., str]
) -> None:
    digest = read_manifest(original, "package").digest

    def better(made: dict[str, Any]) -> None:
        made["predicate"]["runDetails"]["byproducts"][0]["annotations"]["fid_student"] = 0.1
        evaluated(made)["student"]["fid"]["value"] = 0.1

    edit(package / PROVENANCE, better)
    edit(package / "manifest.json", lambda m: m["facts"].update(fid_student=0.1))
    list_anew(package, PROVENANCE)
    stages.verify(str(package))
    assert f"not '{digest[:16]}'; it is another package" in refusal(
        lambda: stages.verify(str(package), digest=digest[:16])
    )
    assert "it is another package" in refusal(lambda: stages.verify(str(original), digest=digest[:4]))
