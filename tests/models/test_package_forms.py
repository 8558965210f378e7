"""Each form of a student's package is loaded by the library it is made for, and gives the images of our own sampler."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from dmd2 import recipes, stages
from dmd2.model import Model, load_network, save_network
from tests.models.test_stable import stable15  # noqa: F401 - a fixture
from tests.tiny_sdxl import SMALL

CONFIGS = {
    "sd15": recipes.resolve("sd15-1step", SMALL),
    "sdxl": recipes.resolve("sdxl-4step-emoji", SMALL),
}
PIPELINES: dict[str, Any] = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
PARTS: dict[str, Any] = {
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
PROMPT, TIMESTEPS = "a red square", (999,)
Resolve = Callable[..., Model]


@pytest.fixture(params=["sd15", "sdxl"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def source(kind: str, pipeline: Path, stable15: Path, tmp_path: Path) -> Path:  # noqa: F811
    """A copy of a small pipeline, to be changed."""
    return Path(shutil.copytree(stable15 if kind == "sd15" else pipeline, tmp_path / "source"))


def store_encoders_in(dtype: torch.dtype, source: Path) -> None:
    """Rewrite the VAE and the text encoders of a pipeline in another precision."""
    for name in PARTS.keys() & {path.name for path in source.iterdir()}:
        PARTS[name].from_pretrained(source / name).to(dtype).save_pretrained(source / name)


def student_of(kind: str, source: Path, tmp_path: Path) -> Model:
    """The teacher, resolved, as a student of one step."""
    stages.resolve(CONFIGS[kind], str(source), str(tmp_path / "teacher"))
    return replace(load_network(tmp_path / "teacher"), timesteps=TIMESTEPS)


def save_package(student: Model, folder: Path) -> Path:
    folder.mkdir()
    save_network(folder, student, student.network.state_dict())
    return folder


def image(pipe: Any) -> Tensor:
    """The image of the model card's call, uint8 (1, C, H, W), from the noise of our sampler at seed 0."""
    eps = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 32, "width": 32, "output_type": "pt"}
    pixels = pipe(PROMPT, timesteps=list(TIMESTEPS), guidance_scale=0, latents=eps, **size).images
    return (pixels * 255).round()


def same_image(pipe: Any, student: Model, atol: float = 1) -> None:
    torch.testing.assert_close(image(pipe), student.sample([PROMPT], seed=0).float(), atol=atol, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_lines_of_the_model_card_draw_whatever_the_precision_of_the_teachers_encoders(
    dtype: torch.dtype, kind: str, source: Path, tmp_path: Path
) -> None:
    store_encoders_in(dtype, source)
    student = student_of(kind, source, tmp_path)
    package = save_package(student, tmp_path / "package")
    pipe = PIPELINES[kind].from_pretrained(package)
    assert {getattr(pipe, part).dtype for part in ("unet", *PARTS) if hasattr(pipe, part)} == {torch.float32}
    same_image(pipe, student)
    for path in package.rglob("*.safetensors"):
        assert {t.dtype for t in load_file(path).values() if t.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_precision_that_only_the_config_of_an_encoder_names_does_not_count(
    name: str, kind: str, source: Path, tmp_path: Path
) -> None:
    """As in the published SDXL: weights in float32, a config that says float16."""
    path = source / "text_encoder" / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if "dtype" not in key}
    path.write_text(json.dumps(config | {name: "float16"}))
    student = student_of(kind, source, tmp_path)
    package = save_package(student, tmp_path / "package")
    assert json.loads((package / "text_encoder" / "config.json").read_text()) == config | {name: "float32"}
    same_image(PIPELINES[kind].from_pretrained(package), student)
