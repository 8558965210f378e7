"""What a recipe downloads, copied to a place of one's own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from components.find_teachers.sources import find
from components.prepare_run.parameters import RunParameters
from components.prepare_run.preflight import check_resources
from dmd2 import recipes, stages
from dmd2.encoders.safety import FILES, fetch_safety_checker
from dmd2.io.storage import open_store
from dmd2.stages.mirror import pretrained_files, pretrained_folders
from tests.tiny_sdxl import SMALL


def test_what_a_recipe_loads_beside_its_teacher() -> None:
    fields = {
        name: [*pretrained_files(recipes.get(name)), *pretrained_folders(recipes.get(name))]
        for name in ("edm-digits", "sdxl-4step", "sdxl-1step-warmup")
    }
    assert fields == {
        "edm-digits": [],
        "sdxl-4step": ["evaluate.inception"],
        "sdxl-1step-warmup": ["evaluate.inception", "distill.regression.vgg", "distill.regression.decoder"],
    }


def test_weights_and_decoder_are_copied_once_to_an_address_with_their_digest(
    bucket: str, pipeline: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    weights = tmp_path / "vgg.pth"
    weights.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    changes = [
        f"distill.regression.vgg.uri={weights}", f"distill.regression.vgg.sha256={digest}",
        f"distill.regression.decoder={pipeline}", "evaluate.features=efficientnet",
    ]  # fmt: skip
    config = recipes.resolve("sdxl-1step-warmup", changes)
    said = stages.mirror(config, f"{bucket}/mirror")
    copied = f"distill.regression.vgg.uri={bucket}/mirror/{digest[:16]}/vgg.pth"
    assert said.split("\n")[0] == copied
    there = open_store(f"{bucket}/mirror").list_objects()
    names = {info.name.partition("/")[2] for info in there}
    assert names == {"vgg.pth", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"}
    again = recipes.resolve("sdxl-1step-warmup", [*changes, *said.split("\n")])
    assert stages.mirror(again, f"{bucket}/mirror") == said, (
        "the copies are used, and have the same addresses"
    )
    assert open_store(f"{bucket}/mirror").list_objects() == there, "nothing is copied twice"
    weights.write_bytes(b"other")
    assert "has sha256" in refusal(lambda: stages.mirror(config, f"{bucket}/mirror"))


def test_a_mirrored_teacher_is_found_by_retraining_under_the_name_of_its_mirror_and_passes_the_checks_of_a_run(
    bucket: str, pipeline: Path, refusal: Callable[..., str]
) -> None:
    overrides = [*SMALL, "evaluate.features=efficientnet"]
    place = f"{bucket}/teachers/sdxl"
    said = stages.mirror(recipes.resolve("sdxl-4step-emoji", overrides), place, teacher=str(pipeline))
    assert said == f"teacher: {place}/teacher"
    (found,) = find(f"{bucket}/teachers").teachers
    assert (found.name, found.address) == ("sdxl", f"{place}/teacher")
    given = RunParameters(
        recipe="sdxl-4step-emoji", overrides=" ".join(overrides), teacher=found.address, gpus=0
    )
    check_resources(given, f"{bucket}/runs/a")
    by_mirror = replace(given, teacher=place)
    assert f"teacher {place} is the folder of a mirror; give that of its teacher, {place}/teacher" in refusal(
        lambda: check_resources(by_mirror, f"{bucket}/runs/a")
    )


def test_a_mirrored_safety_checker_is_one_that_packages_get(
    bucket: str, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    for name in FILES:
        path = tmp_path / "stable" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    config, source = recipes.get("edm-digits"), str(tmp_path / "stable")
    said = stages.mirror(config, f"{bucket}/mirror", safety_checker=source)
    name, _, address = said.partition(": ")
    assert name == "safety_checker"
    assert address.startswith(f"{bucket}/mirror/")
    check_resources(RunParameters(safety_checker=address), f"{bucket}/runs/a")
    copied = fetch_safety_checker(address)
    assert {name: path.read_text() for name, path in copied.items()} == {name: name for name in FILES}
    assert stages.mirror(config, f"{bucket}/mirror", safety_checker=address) == said
    (tmp_path / "stable" / FILES[1]).unlink()
    assert f"{source} has no {FILES[1]}; give a pipeline" in refusal(
        lambda: stages.mirror(config, f"{bucket}/mirror", safety_checker=source)
    )


@pytest.mark.parametrize("name", ["edm-digits"])
def test_a_recipe_that_downloads_nothing_says_so(name: str, tmp_path: Path) -> None:
    assert stages.mirror(recipes.get(name), str(tmp_path)) == "edm-digits downloads nothing"
