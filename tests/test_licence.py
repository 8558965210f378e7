"""What the cards of teacher and data say of their licences, on its way to the model card of the student."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from dmd2 import recipes, stages
from dmd2.io.artifact import Manifest, read_manifest
from dmd2.io.storage import open_store
from dmd2.licence import LICENCES, Terms, carried_licences, stated_licence, terms_of_use
from tests.conftest import MICRO
from tests.publishing.hub import Repository, with_hub
from tests.tiny_sdxl import SMALL

LINK = "https://example.org/licence"


def card(folder: Path, header: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\n{header}\n---\n# A model\n")
    return str(folder)


@pytest.mark.parametrize(
    ("header", "terms"),
    [
        (f"license: openrail++\nlicense_link: {LINK}", {"license": "openrail++", "link": LINK}),
        ("license: MIT\ntags: [a]", {"license": "mit"}),
        (
            f"license: other\nlicense_name: flux-1-dev\nlicense_link: {LINK}",
            {"license": "other", "name": "flux-1-dev", "link": LINK},
        ),
        ("license: Our own licence 2", {"license": "other", "name": "Our own licence 2"}),
        ("license: other\nlicense_name: '<b>[a](javascript:x)</b>'", {"license": "other", "name": "bajavascript:x/b"}),
        ("license: mit\nlicense_link: LICENSE.md", {"license": "mit"}),
        ("license: other", {}),
        ("license: [mit, apache-2.0]", {}),
        ("tags: [a]", {}),
        ("- no\n- mapping", {}),
        ("license: [mit", {}),
    ],
)  # fmt: skip
def test_the_header_of_a_card_is_read_as_the_hub_reads_it(
    header: str, terms: dict[str, str], tmp_path: Path
) -> None:
    found = stated_licence("teacher", card(tmp_path, header))
    assert found == ({LICENCES: {"teacher": terms}} if terms else {})


def test_a_source_without_a_card_says_nothing(tmp_path: Path, bucket: str) -> None:
    (tmp_path / "picture.png").touch()
    (tmp_path / "large").mkdir()
    with (tmp_path / "large" / "README.md").open("w") as file:
        file.write("---\nlicense: mit\n---\n")
        file.truncate(2**31)
    for source in (
        tmp_path,
        tmp_path / "picture.png",
        tmp_path / "large",
        "digits",
        bucket,
        f"{bucket}/a*.png",
    ):
        assert stated_licence("data", str(source)) == {}


def test_a_card_on_a_bucket_and_the_metadata_of_a_single_file_are_read(tmp_path: Path, bucket: str) -> None:
    open_store(f"{bucket}/images").write("README.md", b"---\nlicense: cc-by-4.0\n---\n")
    assert stated_licence("data", f"{bucket}/images/") == {LICENCES: {"data": {"license": "cc-by-4.0"}}}
    file = tmp_path / "model.safetensors"
    for metadata, terms in (
        ({"modelspec.license": "CreativeML Open RAIL++-M"}, {"license": "other", "name": "CreativeML Open RAIL++-M"}),
        ({"modelspec.license": "Apache-2.0"}, {"license": "apache-2.0"}),
        ({}, None),
    ):  # fmt: skip
        save_file({"a": torch.zeros(1)}, file, metadata)
        assert stated_licence("teacher", str(file)).get(LICENCES, {}).get("teacher") == terms


def test_the_title_of_a_licence_is_its_name_or_its_identifier_or_the_address_of_its_text() -> None:
    assert Terms("openrail++", LINK).title == "openrail++"
    assert Terms("other", LINK, name="Our Own").title == "Our Own"
    assert Terms("other", LINK).title == LINK
    assert Terms("other").title == Terms().title == ""


def manifest(**licences: dict[str, str]) -> Manifest:
    facts = {LICENCES: licences} if licences else {}
    return Manifest(kind="run", config=None, inputs={}, files=[], facts=facts, versions={}, seconds=0)


def test_the_user_has_the_last_word_on_the_licence_of_the_student_and_restrictions_are_his_alone() -> None:
    data, teacher = (
        manifest(data={"license": "mit"}),
        manifest(teacher={"license": "openrail++", "link": LINK}),
    )
    made = manifest(**carried_licences(data, manifest(), teacher)[LICENCES])
    assert terms_of_use(made, Terms()) == (Terms("openrail++", LINK), Terms("mit"))
    assert terms_of_use(made, Terms(restrictions="No.")) == (Terms("openrail++", LINK, "No."), Terms("mit"))
    assert terms_of_use(made, Terms("other", restrictions="No.")) == (Terms("other", "", "No."), Terms("mit"))
    assert terms_of_use(manifest(), Terms()) == (Terms(), Terms())


def test_the_licences_of_teacher_and_data_reach_the_card_of_the_student(
    pictures: Path, tmp_path: Path
) -> None:
    """Through every stage: shards, a small teacher trained on them, a run, a package."""
    source = shutil.copytree(pictures, tmp_path / "source")
    card(source, f"license: cc-by-4.0\nlicense_link: {LINK}")
    config = recipes.resolve("edm-digits", [*MICRO, "gate.factor=1e9"])
    shards, teacher, run, evaluation, gate, out = (
        str(tmp_path / name) for name in ("shards", "teacher", "run", "evaluation", "gate", "package")
    )
    stages.shard(config, str(source), shards, workers=1)
    stages.teach(config, shards, teacher)
    stages.distill(config, shards, teacher, run)
    stages.evaluate(config, shards, teacher, run, evaluation)
    stages.gate(config, evaluation, gate)
    stages.package(run, evaluation, gate, out)
    text = ModelCard.load(Path(out) / "README.md").text
    assert f"License of the data: `cc-by-4.0`, {LINK}." in text
    assert "has not said which these are" in text, "nobody has said that of the student"


def test_a_resolved_teacher_has_its_licence_and_so_has_an_adopted_student(
    pipeline: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(pipeline, tmp_path / "source")
    card(source, f"license: other\nlicense_name: Our Own\nlicense_link: {LINK}")
    config, terms = (
        recipes.resolve("sdxl-4step-emoji", SMALL),
        {"license": "other", "link": LINK, "name": "Our Own"},
    )
    teacher, run = tmp_path / "teacher", tmp_path / "run"
    assert stages.resolve(config, str(source), str(teacher)).facts[LICENCES] == {"teacher": terms}
    made = stages.adopt(config, str(source / "unet"), str(teacher), str(run))
    assert made.facts[LICENCES] == {"teacher": terms}
    assert read_manifest(run, "run") == made


def test_a_teacher_in_the_cache_of_the_hub_is_read_without_a_connection_and_without_its_card(
    hub: tuple[Any, str], tmp_path: Path
) -> None:
    repository = hub[0].repositories["owner/name"] = Repository(private=True)
    repository.commit({"README.md": b"---\nlicense: mit\n---\n", "model_index.json": b"{}"})
    fetch = (
        "from dmd2.encoders.pipeline_folder import fetch_files as f; f('owner/name', ['model_index.json'])"
    )
    assert with_hub(["-c", fetch], hub[1], tmp_path)[0] == 0
    read = "from dmd2.licence import stated_licence as read; print(read('teacher', 'owner/name'))"
    status, said = with_hub(["-c", read], "http://127.0.0.1:9", tmp_path)
    assert (status, said.splitlines()[0]) == (0, "{}"), said
    assert "owner/name: the licence is not known, because its card cannot be read" in said


def test_the_card_of_a_teacher_on_the_hub_is_read_with_the_address_of_the_text_beside_it(
    hub: tuple[Any, str], tmp_path: Path
) -> None:
    repository = hub[0].repositories["owner/name"] = Repository(private=True)
    oid = repository.commit(
        {"README.md": b"---\nlicense: other\nlicense_name: x\nlicense_link: LICENSE.md\n---\n"}
    )
    repository.tags["v1"] = oid
    code = "from dmd2.licence import stated_licence as read; print(read('teacher', 'owner/name@v1')['licenses']['teacher']['link'])"
    status, said = with_hub(["-c", code], hub[1], tmp_path)
    assert status == 0, said
    assert said.splitlines()[0] == "https://huggingface.co/owner/name/blob/v1/LICENSE.md"
