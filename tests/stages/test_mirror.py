"""What a recipe downloads, copied to a place of one's own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from dmd2 import recipes, stages
from dmd2.io.storage import open_store
from dmd2.stages.mirror import pretrained_files, pretrained_folders


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


@pytest.mark.parametrize("name", ["edm-digits"])
def test_a_recipe_that_downloads_nothing_says_so(name: str, tmp_path: Path) -> None:
    assert stages.mirror(recipes.get(name), str(tmp_path)) == "edm-digits downloads nothing"
