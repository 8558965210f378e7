"""Each form of a student's package is loaded by the library it is made for, and gives the images of our own sampler."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDPMScheduler,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from diffusers.loaders import single_file_utils
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dmd2 import recipes, stages
from dmd2.config import LoraConfig, StableConfig
from dmd2.io.tensors import save_tensors
from dmd2.model import Model, load_network, save_network
from dmd2.models.convert.lora_names import to_kohya
from dmd2.models.convert.original_layout import original_names, write_checkpoint
from dmd2.models.convert.student_weights import read_unet
from dmd2.models.family import make_family
from dmd2.models.lora import add_low_rank_update, export_low_rank_update, merge_low_rank_update
from dmd2.models.schedulers import ZERO_SNR
from dmd2.models.stable import Stable
from dmd2.models.stable_forms import (
    CHECKPOINT,
    KOHYA_LORA,
    LORA,
    WORKFLOW,
    is_uniform,
    sampler_settings,
    workflow,
)
from tests import warm
from tests.models.test_convert import compvis, same, sgm
from tests.tiny_sdxl import SMALL

CONFIGS = {
    "sd15": recipes.resolve("sd15-1step", SMALL),
    "sdxl": recipes.resolve("sdxl-4step-emoji", SMALL),
}
PIPELINES: dict[str, Any] = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
PARTS: dict[str, Any] = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
PROMPT, TIMESTEPS = "a red square", (999,)
EPSILON = {"prediction_type": "epsilon", ZERO_SNR: False}
Refusal = Callable[[Callable[[], object]], str]


@pytest.fixture(params=["sd15", "sdxl"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def source(kind: str, pipeline: Path, stable15: Path, tmp_path: Path) -> Path:
    """A copy of a small pipeline, to be changed."""
    return Path(shutil.copytree(stable15 if kind == "sd15" else pipeline, tmp_path / "source"))


def store_in(dtype: torch.dtype, source: Path) -> None:
    """Rewrite the networks of a pipeline in another precision."""
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


def image(pipe: Any, **more: Any) -> Tensor:
    """The image of the model card's call, uint8 (1, C, H, W), from the noise of our sampler at seed 0."""
    eps = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 32, "width": 32, "output_type": "pt"}
    pixels = pipe(PROMPT, timesteps=list(TIMESTEPS), guidance_scale=0, latents=eps, **size, **more).images
    return (pixels * 255).round()


def same_image(pipe: Any, student: Model, atol: float = 1, **more: Any) -> None:
    torch.testing.assert_close(
        image(pipe, **more), student.sample([PROMPT], seed=0).float(), atol=atol, rtol=0
    )


@pytest.mark.parametrize("timesteps", [(999,), (999, 499), (999, 749, 499, 249)])
def test_diffusers_takes_the_students_timesteps_for_their_number_alone(
    timesteps: tuple[int, ...], pipeline: Path, tmp_path: Path
) -> None:
    """Where they are evenly spaced."""
    student = replace(student_of("sdxl", pipeline, tmp_path), timesteps=timesteps)
    scheduler = LCMScheduler.from_pretrained(save_package(student, tmp_path / "package") / "scheduler")
    scheduler.set_timesteps(len(timesteps))
    assert tuple(scheduler.timesteps.tolist()) == timesteps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_form_draws_the_students_image_whatever_the_precision_of_the_teacher(
    dtype: torch.dtype, kind: str, source: Path, tmp_path: Path
) -> None:
    """As diffusers loads them: the folder by the lines of the model card, the U-Net alone, the single file, either file of an update."""
    store_in(dtype, source)
    student = student_of(kind, source, tmp_path)
    package = save_package(student, tmp_path / "package")
    pipe = PIPELINES[kind].from_pretrained(package)
    assert {getattr(pipe, part).dtype for part in PARTS if hasattr(pipe, part)} == {torch.float32}
    same_image(pipe, student)
    for path in package.rglob("*.safetensors"):
        assert {t.dtype for t in load_file(path).values() if t.is_floating_point()} == {torch.float32}
    pipe.unet = UNet2DConditionModel.from_pretrained(package / "unet")
    same_image(pipe, student)

    updated = with_update(student, package)
    assert list(student.family.write_forms(package, TIMESTEPS, "float16")) == [LORA, KOHYA_LORA, CHECKPOINT]
    same_image(from_single_file(kind, package), student, 3)
    for name in (LORA, KOHYA_LORA):
        pipe.load_lora_weights(package / name)
        same_image(pipe, updated)
        pipe.unload_lora_weights()
    same_image(pipe, student)


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
    assert list(base.family.write_forms(package, TIMESTEPS, "none")) == [LORA, KOHYA_LORA]
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


@pytest.mark.parametrize("name", [LORA, KOHYA_LORA, "lora"])
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


# All networks in one file.


def from_single_file(kind: str, package: Path) -> Any:
    """The student, by diffusers from the file, and from the folder what has no weights."""
    return PIPELINES[kind].from_single_file(
        str(package / CHECKPOINT), config=str(without_weights(package)), local_files_only=True
    )


def without_weights(package: Path) -> Path:
    folder = package.with_name("configs")
    shutil.copytree(package, folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    return folder


@pytest.mark.parametrize(("precision", "atol"), [("float32", 1), ("float16", 3), ("bfloat16", 25)])
def test_diffusers_draws_the_students_image_from_the_single_file(
    precision: str, atol: float, kind: str, source: Path, tmp_path: Path
) -> None:
    student = student_of(kind, source, tmp_path)
    package = save_package(student, tmp_path / "package")
    forms = student.family.write_forms(package, TIMESTEPS, precision)
    assert list(forms) == [CHECKPOINT]
    assert {t.dtype for t in load_file(package / CHECKPOINT).values()} == {getattr(torch, precision)}
    same_image(from_single_file(kind, package), student, atol)
    as_on_the_card = PIPELINES[kind].from_single_file(str(package / CHECKPOINT), config=str(package))
    same_image(as_on_the_card, student, atol)


def published_networks(kind: str) -> dict[str, Any]:
    """The networks of the published models, at their real shapes and without memory."""
    blocks: dict[str, Any] = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
    }
    small: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768}
    big: dict[str, Any] = {"hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1280}
    make: Any = AutoencoderKL
    family = make_family(StableConfig(kind=kind, resolution=512))  # its scheduler computes its noise levels
    with torch.device("meta"):
        networks = {
            "unet": family.network(),
            "vae": make(**blocks),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**small)),
        }
        if kind == "sdxl":
            layers = CLIPTextConfig(**big, num_hidden_layers=32, num_attention_heads=20)
            networks["text_encoder_2"] = CLIPTextModelWithProjection(layers)
    return networks


@pytest.mark.parametrize(
    ("kind", "counts", "bytes_in_float16", "recognised"),
    [("sd15", (686, 248, 196), 2.132e9, "v1"), ("sdxl", (1680, 248, 196, 389), 6.938e9, "xl_base")],
)
def test_the_single_file_of_a_published_size_has_the_names_that_programs_know_it_by(
    kind: str, counts: tuple[int, ...], bytes_in_float16: float, recognised: str
) -> None:
    """Without two tensors of the published files that are no weights: position_ids and logit_scale."""
    networks = published_networks(kind)
    weights = {part: dict(network.state_dict()) for part, network in networks.items()}
    weights["unet"] = {name.removeprefix("unet."): tensor for name, tensor in weights["unet"].items()}
    tensors = original_names(weights)
    assert sum(tensor.numel() for tensor in tensors.values()) * 2 == pytest.approx(bytes_in_float16, rel=1e-3)
    starts = (
        "model.",
        "first_stage_model.",
        ("cond_stage_model.", "conditioner.embedders.0."),
        "conditioner.embedders.1.",
    )
    assert tuple(sum(name.startswith(start) for name in tensors) for start in starts[: len(counts)]) == counts
    assert sum(counts) == len(tensors)
    assert single_file_utils.infer_diffusers_model_type(tensors) == recognised


@pytest.mark.parametrize("old", [False, True])
def test_the_single_file_has_the_names_and_values_of_the_layout_that_was_published(
    old: bool, kind: str, source: Path, tmp_path: Path
) -> None:
    """Also of a VAE in the names of 2022."""
    package = save_package(student_of(kind, source, tmp_path), tmp_path / "package")
    pipe = PIPELINES[kind].from_pretrained(package)
    if old:
        rename_attention(package / "vae" / "diffusion_pytorch_model.safetensors")
    write_checkpoint(package, tmp_path / "a.safetensors", torch.float32, EPSILON)
    wanted = compvis(pipe)
    ignored = {name for name in wanted if name.endswith(("position_ids", "logit_scale", "betas"))}
    same(load_file(tmp_path / "a.safetensors"), {n: t for n, t in wanted.items() if n not in ignored})


def rename_attention(path: Path) -> None:
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        tensors = {name.replace(f".{new}.", f".{old}."): t for name, t in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})


def test_the_single_file_is_resolved_as_a_teacher_and_its_unet_adopted(
    kind: str, source: Path, tmp_path: Path
) -> None:
    student = student_of(kind, source, tmp_path)
    package = save_package(student, tmp_path / "package")
    student.family.write_forms(package, TIMESTEPS, "float32")
    base, again = without_weights(package), tmp_path / "again"
    stages.resolve(CONFIGS[kind], str(package / CHECKPOINT), str(again), base=str(base))
    same(load_network(again).network.state_dict(), student.network.state_dict())
    unet = load_file(package / "unet" / "diffusion_pytorch_model.safetensors")
    same(read_unet(package / CHECKPOINT, unet), unet)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_single_file_says_that_its_unet_predicts_v(
    zero_snr: bool, source: Path, kind: str, tmp_path: Path, refusal: Refusal
) -> None:
    scheduler = source / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text()) | {
        "_class_name": "DDIMScheduler",
        "prediction_type": "v_prediction",
    }
    scheduler.write_text(json.dumps(config | {"rescale_betas_zero_snr": zero_snr}))
    student = student_of(kind, source, tmp_path)
    package = save_package(student, tmp_path / "package")
    student.family.write_forms(package, TIMESTEPS, "float16")
    with safe_open(package / CHECKPOINT, "pt") as file:
        assert file.metadata()["modelspec.prediction_type"] == "v"
        assert ("v_pred" in file.keys(), "ztsnr" in file.keys()) == (True, zero_snr)  # noqa: SIM118
    same_image(from_single_file(kind, package), student, 3)
    unet = load_file(package / "unet" / "diffusion_pytorch_model.safetensors")
    assert "says of its process by" in refusal(lambda: read_unet(package / CHECKPOINT, unet))


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("vae", {"_class_name": "AutoencoderTiny"}, "its VAE is a AutoencoderTiny"),
        ("text_encoder", {"hidden_size": 1024}, "Stable Diffusion 2"),
    ],
)
def test_a_student_that_the_layout_cannot_hold_has_no_single_file_and_a_warning_says_why(
    part: str,
    changes: dict[str, Any],
    words: str,
    stable15: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    student = student_of("sd15", stable15, tmp_path)
    package = save_package(student, tmp_path / "package")
    path = package / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert student.family.write_forms(package, TIMESTEPS, "float16") == {}
    assert words in caplog.text


def test_weights_that_float16_cannot_hold_are_refused(
    pipeline: Path, tmp_path: Path, refusal: Refusal
) -> None:
    student = student_of("sdxl", pipeline, tmp_path)
    student.network.state_dict()["unet.conv_in.bias"][0] = 1e5
    package = save_package(student, tmp_path / "package")
    sentence = refusal(lambda: student.family.write_forms(package, TIMESTEPS, "float16"))
    assert "choose --single-file bfloat16" in sentence
    student.family.write_forms(package, TIMESTEPS, "bfloat16")


def test_the_published_sizes_are_described_for_comfyui_with_the_sigmas_of_the_steps() -> None:
    make: Any = DDPMScheduler
    scheduler = make(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    for name in ("sd15", "sdxl"):
        family = make_family(StableConfig(kind=name, resolution=512))
        assert isinstance(family, Stable)
        assert family._has_published_size
        settings = sampler_settings(family.diffusion, (999, 749, 499, 249))
        sigmas = [float(sigma) for sigma in settings.partition("sigmas ")[2].split(", ")]
        alpha = scheduler.alphas_cumprod[[999, 749, 499, 249]]
        torch.testing.assert_close(torch.tensor(sigmas[:4]), ((1 - alpha) / alpha).sqrt(), atol=1e-4, rtol=0)
        assert sigmas[4] == 0
        assert sampler_settings(family.diffusion, (399,)) == ""  # unit noise at an inner timestep


def test_the_workflow_for_comfyui_is_complete_and_names_the_single_file() -> None:
    """Every input from another node is of the type that the node makes."""
    nodes: dict[str, Any] = json.loads(json.dumps(workflow(1024, 4)))
    outputs = {
        "CheckpointLoaderSimple": ("model", "clip", "vae"),
        "CLIPTextEncode": ("conditioning",),
        "EmptyLatentImage": ("latent",),
        "KSampler": ("latent",),
        "VAEDecode": ("image",),
        "SaveImage": (),
    }
    takes = {
        "positive": "conditioning",
        "negative": "conditioning",
        "latent_image": "latent",
        "samples": "latent",
    }
    takes |= {"images": "image"}
    linked = set()
    for node in nodes.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                assert outputs[nodes[value[0]]["class_type"]][value[1]] == takes.get(name, name)
                linked.add(value[0])
    assert linked == nodes.keys() - {"7"}
    assert nodes["1"]["inputs"]["ckpt_name"] == Path(CHECKPOINT).name
    assert (nodes["5"]["inputs"]["steps"], nodes["5"]["inputs"]["cfg"]) == (4, 1)


def test_of_a_student_of_a_published_size_the_forms_say_what_comfyui_must_be_told(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stable, "_has_published_size", True)  # networks of that size would take minutes
    student = student_of("sdxl", pipeline, tmp_path)
    package = save_package(student, tmp_path / "package")
    with_update(student, package)
    forms = student.family.write_forms(package, (999, 749, 499, 249), "float16")
    assert list(forms) == [LORA, KOHYA_LORA, CHECKPOINT, WORKFLOW]
    assert "sampler LCM, CFG 1, sigmas 14.6146, 4.0817, 1.6129, 0.6932, 0" in forms[CHECKPOINT]
    assert "a LoRA of strength 1, sampler LCM" in forms[KOHYA_LORA]
    assert all((package / name).is_file() for name in forms)
    (package / WORKFLOW).unlink()
    forms = student.family.write_forms(package, (399,), "float16")
    assert list(forms) == [LORA, KOHYA_LORA, CHECKPOINT]
    assert "ComfyUI" not in "".join(forms.values())


@pytest.mark.parametrize(
    ("timesteps", "uniform"),
    [((999, 749, 499, 249), True), ((999,), True), ((999, 499), True), ((399,), False), ((999, 800), False)],
)
def test_a_workflow_is_for_the_timesteps_that_comfyuis_scheduler_takes(
    timesteps: tuple[int, ...], uniform: bool
) -> None:
    family = make_family(StableConfig(kind="sdxl", resolution=1024))
    assert isinstance(family, Stable)
    assert is_uniform(family.diffusion, timesteps) == uniform


# Other software that builds on a package.


def test_the_lines_of_the_model_card_run_as_printed_without_this_library(
    kind: str, source: Path, tmp_path: Path
) -> None:
    student = student_of(kind, source, tmp_path)
    package = save_package(student, tmp_path / "package")
    code = re.search(r"```python\n(.*?)```", student.family.usage(TIMESTEPS), re.DOTALL)
    assert code
    lines = "import sys\nsys.modules['dmd2'] = None\n" + code[1].replace("path/of/this/folder", str(package))
    done = subprocess.run(
        [warm.python(), "-c", f"{lines}\nprint(image.size)"],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout.startswith("(32, 32)")


def steps_of(pipe: Any, timesteps: tuple[int, ...], **more: Any) -> Tensor:
    """The image of the pipeline's call in several steps, with noise of a seed."""
    noise = torch.Generator().manual_seed(0)
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 32, "width": 32, "output_type": "pt"}
    return pipe(PROMPT, timesteps=list(timesteps), guidance_scale=0, generator=noise, **size, **more).images


@pytest.mark.parametrize("timesteps", [(999,), (999, 749, 499, 249)])
def test_a_t2i_adapter_steers_a_student_of_sdxl_at_its_own_timesteps(
    timesteps: tuple[int, ...], pipeline: Path, tmp_path: Path
) -> None:
    """One that has learned nothing yet and adds nothing changes nothing; one with random weights does, each the more by its scale."""
    student = replace(student_of("sdxl", pipeline, tmp_path), timesteps=timesteps)
    pipe = StableDiffusionXLPipeline.from_pretrained(save_package(student, tmp_path / "package"))
    assert isinstance(pipe.scheduler, LCMScheduler)
    make: Any = T2IAdapter
    adapter = make(
        channels=[16, 32, 32, 32], num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter_xl"
    )
    steered = StableDiffusionXLAdapterPipeline(**pipe.components, adapter=adapter)
    drawing: dict[str, Any] = {"image": torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
    plain = steps_of(pipe, timesteps)
    off = steps_of(steered, timesteps, adapter_conditioning_scale=0.0, **drawing)
    torch.testing.assert_close(off, plain, atol=1e-5, rtol=0)
    seen = record_timesteps(steered)
    full = steps_of(steered, timesteps, adapter_conditioning_scale=1.0, **drawing)
    assert seen == list(timesteps)
    assert (full - plain).abs().max() > 1 / 255
    half = steps_of(steered, timesteps, adapter_conditioning_scale=0.5, **drawing)
    assert 0 < (half - plain).abs().mean() < (full - plain).abs().mean()


def record_timesteps(pipe: Any) -> list[int]:
    """A list that gets the timestep of each call of the U-Net."""
    seen: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(int(args[1])))
    return seen


@pytest.mark.parametrize("timesteps", [(999,), (999, 749, 499, 249)])
def test_a_controlnet_steers_the_student_at_its_own_timesteps(
    timesteps: tuple[int, ...], kind: str, source: Path, tmp_path: Path
) -> None:
    """One that has learned nothing yet changes nothing; one with random weights does, each the more by its scale."""
    student = replace(student_of(kind, source, tmp_path), timesteps=timesteps)
    pipe = PIPELINES[kind].from_pretrained(save_package(student, tmp_path / "package"))
    assert isinstance(pipe.scheduler, LCMScheduler)
    make: Any = ControlNetModel
    control = make.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32))
    kinds: dict[str, Any] = {
        "sd15": StableDiffusionControlNetPipeline,
        "sdxl": StableDiffusionXLControlNetPipeline,
    }
    steered = kinds[kind](**pipe.components, controlnet=control)
    drawing: dict[str, Any] = {"image": torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
    plain = steps_of(pipe, timesteps)
    torch.testing.assert_close(steps_of(steered, timesteps, **drawing), plain, atol=1e-5, rtol=0)
    for parameter in control.controlnet_mid_block.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(2))
    seen = record_timesteps(steered)
    full = steps_of(steered, timesteps, **drawing)
    assert seen == list(timesteps)
    assert (full - plain).abs().max() > 1 / 255
    half = steps_of(steered, timesteps, controlnet_conditioning_scale=0.5, **drawing)
    assert 0 < (half - plain).abs().mean() < (full - plain).abs().mean()
