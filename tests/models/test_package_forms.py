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
from dmd2.config import LoraConfig, StableConfig
from dmd2.io.tensors import save_tensors
from dmd2.model import Model, load_network, save_network
from dmd2.models.convert.lora_names import to_kohya
from dmd2.models.convert.student_weights import read_unet
from dmd2.models.family import make_family
from dmd2.models.lora import add_low_rank_update, export_low_rank_update, merge_low_rank_update
from dmd2.models.stable import KOHYA_LORA, LORA, Stable
from tests.models.test_convert import sgm
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


# Low-rank students.


def with_update(student: Model, package: Path) -> Model:
    """Save a random low-rank update in a package -> the student with it merged."""
    settings = LoraConfig(rank=4, alpha=2)
    base = {name: tensor.clone() for name, tensor in student.network.state_dict().items()}
    network = add_low_rank_update(student.network, Stable.lora_targets, settings)
    update = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}
    update = {name: torch.randn_like(p) / 8 for name, p in update.items()}
    (package / "lora").mkdir()
    save_tensors(export_low_rank_update(update, settings), package / LORA)
    plain = student.family.network()
    plain.load_state_dict(merge_low_rank_update(base, update, settings))
    return replace(student, network=plain.requires_grad_(False))


@pytest.fixture
def low_rank(kind: str, source: Path, tmp_path: Path) -> tuple[Path, Model, Path]:
    """A low-rank student in all of its forms, the student with its update, and a folder with its teacher."""
    base = student_of(kind, source, tmp_path)
    package = save_package(base, tmp_path / "package")
    teacher = Path(shutil.copytree(package, tmp_path / "base"))
    student = with_update(base, package)
    assert list(base.family.write_forms(package)) == [LORA, KOHYA_LORA]
    return package, student, teacher


@pytest.mark.parametrize("name", [LORA, KOHYA_LORA])
def test_diffusers_draws_the_students_image_with_either_file_of_its_update(
    name: str, kind: str, low_rank: tuple[Path, Model, Path]
) -> None:
    package, student, teacher = low_rank
    pipe = PIPELINES[kind].from_pretrained(teacher)
    plain = image(pipe)
    pipe.load_lora_weights(package / name)
    same_image(pipe, student)
    assert (image(pipe) - plain).abs().max() > 5
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    merged = {name.removeprefix("unet."): w for name, w in student.network.state_dict().items()}
    torch.testing.assert_close(pipe.unet.state_dict(), merged, atol=1e-6, rtol=1e-5)


def test_every_layer_of_the_update_has_the_name_that_kohyas_trainer_gives_it(
    kind: str, low_rank: tuple[Path, Model, Path]
) -> None:
    """ComfyUI knows a layer by the name of its weight in the original checkpoint, and by that in diffusers."""
    package, _, teacher = low_rank
    peft, kohya = load_file(package / LORA), load_file(package / KOHYA_LORA)
    layers = {name.split(".")[0] for name in kohya}
    assert len(layers) == len(peft) / 2 == len(kohya) / 3
    for layer in layers:
        assert kohya[f"{layer}.alpha"].item() == len(kohya[f"{layer}.lora_down.weight"]) == 4
    unet = PIPELINES[kind].from_pretrained(teacher).unet
    original = {name.removeprefix("model.diffusion_model.") for name in sgm(unet)}
    known = original if kind == "sdxl" else unet.state_dict().keys()
    assert layers <= {f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}" for name in known}


@pytest.mark.parametrize("name", [LORA, KOHYA_LORA])
def test_the_update_is_adopted_from_either_file(name: str, low_rank: tuple[Path, Model, Path]) -> None:
    package, student, teacher = low_rank
    base = load_file(teacher / "unet" / "diffusion_pytorch_model.safetensors")
    merged = {name.removeprefix("unet."): weight for name, weight in student.network.state_dict().items()}
    torch.testing.assert_close(read_unet(package / name, base), merged, atol=1e-6, rtol=1e-5)


def test_the_update_of_sdxl_has_the_layer_names_of_its_published_one() -> None:
    """Names in files that kohya's trainer wrote for SDXL, at its real shape."""
    family = make_family(StableConfig(kind="sdxl", resolution=1024))
    with torch.device("meta"):
        network = add_low_rank_update(family.network(), Stable.lora_targets, LoraConfig())
        names = [name.removeprefix("unet.") for name in family.network().state_dict()]
    update = {name: p for name, p in network.named_parameters() if p.requires_grad}
    layers = {name.split(".")[0] for name in to_kohya(export_low_rank_update(update, LoraConfig()), names)}
    assert len(layers) == 788
    assert layers >= {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_input_blocks_8_1_transformer_blocks_9_ff_net_0_proj",
        "lora_unet_middle_block_1_proj_in",
        "lora_unet_output_blocks_5_1_transformer_blocks_1_attn2_to_out_0",
        "lora_unet_input_blocks_3_0_op",
        "lora_unet_output_blocks_2_2_conv",
        "lora_unet_middle_block_0_emb_layers_1",
        "lora_unet_output_blocks_8_0_skip_connection",
        "lora_unet_input_blocks_1_0_in_layers_2",
    }
