"""The safety checker of a package: copied from a pipeline, used by diffusers and by the page, its absence said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor

from dmd2 import recipes, stages
from dmd2.encoders.safety import FILES, SafetyChecker, add_safety_checker
from dmd2.io.artifact import read_manifest
from dmd2.model import load_network, save_network
from dmd2.serve.drawing import draw
from dmd2.serve.request import Limits
from dmd2.serve.result import answer
from dmd2.serve.students import load_students
from tests.tiny_sdxl import SMALL

Refusal = Callable[[Callable[[], object]], str]
SIZE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def checker(tmp_path: Path) -> Callable[[float], Path]:
    """Write a checker with random weights that withholds images of which a likeness is above a threshold, from -1 to 1."""

    def write(threshold: float) -> Path:
        torch.manual_seed(0)
        vision = SIZE | {"image_size": 32, "patch_size": 16}
        network = StableDiffusionSafetyChecker(
            CLIPConfig(vision_config=vision, text_config=SIZE, projection_dim=8)
        )
        torch.nn.init.normal_(network.concept_embeds)
        network.concept_embeds_weights.fill_(threshold)
        network.special_care_embeds_weights.fill_(2.0)
        folder = tmp_path / f"pipeline{threshold}"
        network.save_pretrained(folder / "safety_checker")
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(
            folder / "feature_extractor"
        )
        return folder

    return write


@pytest.fixture
def stable(stable15: Path, tmp_path: Path) -> Path:
    """A student of Stable Diffusion 1.5, saved as a package is."""
    stages.resolve(recipes.resolve("sd15-1step", SMALL), str(stable15), str(tmp_path / "teacher"))
    student = replace(load_network(tmp_path / "teacher"), timesteps=(999,))
    (tmp_path / "package").mkdir()
    save_network(tmp_path / "package", student, student.network.state_dict())
    return tmp_path / "package"


def test_it_withholds_what_diffusers_does(checker: Callable[[float], Path]) -> None:
    """Some images above a threshold and some below it, of which diffusers says the same."""
    images = torch.randint(
        0, 256, (6, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    images[:3] //= 8
    counts = set()
    for threshold in (-1.0, 0.55, 0.6, 0.65, 0.7, 2.0):
        folder = checker(threshold)
        shown, withheld = SafetyChecker(folder, torch.device("cpu")).withhold(images)
        network = StableDiffusionSafetyChecker.from_pretrained(folder / "safety_checker")
        prepare: Any = CLIPImageProcessor.from_pretrained(folder / "feature_extractor")
        pixels = prepare(images=list(images), return_tensors="pt").pixel_values
        _, found = network(clip_input=pixels, images=[torch.zeros(1)] * 6)
        for image, before, black in zip(shown, images, found, strict=True):
            assert torch.equal(image, torch.zeros_like(before) if black else before)
        assert withheld == sum(found)
        counts.add(withheld)
    assert {0, 6} <= counts


def test_a_package_gets_it_for_diffusers_too(
    stable: Path, checker: Callable[[float], Path], refusal: Refusal, tmp_path: Path
) -> None:
    assert StableDiffusionPipeline.from_pretrained(stable).safety_checker is None
    add_safety_checker(str(checker(-1.0)), stable)
    pipe = StableDiffusionPipeline.from_pretrained(stable)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe("a red square", timesteps=[999], guidance_scale=0, output_type="np", height=32, width=32)
    assert drawn.nsfw_content_detected == [True]
    assert drawn.images.max() == 0
    assert "has no safety_checker/config.json" in refusal(
        lambda: add_safety_checker(str(tmp_path / "teacher"), stable)
    )


def test_the_page_withholds_images_and_says_so(
    made: Path, checker: Callable[[float], Path], tmp_path: Path, refusal: Refusal
) -> None:
    run, evaluation, gate = (str(made / name) for name in ("run", "evaluation", "gate"))
    shown = {}
    for threshold in (-1.0, 2.0):
        package = str(tmp_path / f"package{threshold}")
        manifest = stages.package(run, evaluation, gate, package, safety_checker=str(checker(threshold)))
        assert {file.path for file in manifest.files} >= {*FILES}
        (student,) = load_students([(package, manifest)], [], "", torch.float32).values()
        shown[threshold] = draw(student, {"prompt": "1", "images": 3}, Limits())
    assert shown[-1.0].images.pixels.max() == 0
    assert answer(shown[-1.0])["withheld"] == 3
    assert "has replaced 3 of the images by black ones" in shown[-1.0].note
    assert torch.equal(shown[2.0].images.pixels, load_network(made / "run").sample([1, 1, 1], seed=0))
    assert (answer(shown[2.0])["withheld"], shown[2.0].note) == (0, "")
    assert shown[2.0].images.seconds.keys() == {"text", "steps", "decode", "safety"}


def test_the_page_says_which_packages_have_none(made: Path) -> None:
    pytest.importorskip("gradio")
    from dmd2.serve.page import _safety

    run = str(made / "run")
    students = load_students([(run, read_manifest(run, "run"))], [], "", torch.float32)
    (student,) = students.values()
    checked = replace(student, safety=object())  # type: ignore[arg-type]
    assert _safety(students) == "The packages have no safety checker: no image is withheld."
    assert (
        _safety({"a": checked})
        == "Images that the safety checker of their package finds are replaced by black ones."
    )
    assert _safety({"a": checked, "b": student}).endswith(
        "No image is withheld of b, without a safety checker."
    )
