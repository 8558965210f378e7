"""Weights of a pipeline as diffusers writes and publishes them: in one file, in several, as a variant."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers.models.modeling_utils
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from dmd2 import recipes, stages
from dmd2.encoders import weight_files as weights_module
from dmd2.encoders.pipeline_folder import VAE_WEIGHTS, find_pipeline
from dmd2.encoders.weight_files import load_weights, weight_files
from dmd2.io.storage import open_store, upload_files
from dmd2.model import load_network
from dmd2.models.convert.student_weights import read_unet
from tests.models.test_convert import compvis, same, without_weights
from tests.models.test_convert import pipeline as make_pipeline
from tests.models.test_package_forms import (
    CONFIGS,
    PARTS,
    PIPELINES,
    kind,
    same_image,
    save_package,
    source,
    student_of,
)

__all__ = ["kind", "source"]  # fixtures
Refusal = Callable[[Callable[[], object]], str]
CLASSES: dict[str, Any] = PARTS | {"unet": UNet2DConditionModel}


def rename_to_variant(variant: str, source: Path) -> None:
    for path in list(source.rglob("*.safetensors")):
        path.rename(path.with_name(f"{path.stem}.{variant}.safetensors"))


def split(source: Path, variant: str | None = None, parts: tuple[str, ...] = tuple(CLASSES)) -> None:
    """Have diffusers and transformers save networks in several files."""
    for name in parts:
        if (source / name).is_dir():
            network = CLASSES[name].from_pretrained(source / name)
            shutil.rmtree(source / name)
            size = max(t.numel() for t in network.state_dict().values()) * 4
            network.save_pretrained(source / name, max_shard_size=size, variant=variant)
            assert len(list((source / name).glob("*.safetensors"))) > 1


FORMS: dict[str, Callable[[Path], object]] = {
    "fp16": lambda source: rename_to_variant("fp16", source),
    "bf16": lambda source: rename_to_variant("bf16", source),
    "U-Net in several files": lambda source: split(source, parts=("unet",)),
    "all in several files": split,
    "fp16 in several files": lambda source: split(source, "fp16"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_teacher_is_read_under_any_names_of_its_files(
    form: str, kind: str, source: Path, tmp_path: Path
) -> None:
    stages.resolve(CONFIGS[kind], str(source), str(tmp_path / "plain"))
    FORMS[form](source)
    student = student_of(kind, source, tmp_path)
    same(student.network.state_dict(), load_network(tmp_path / "plain").network.state_dict())
    package = save_package(student, tmp_path / "package")
    same_image(PIPELINES[kind].from_pretrained(package), student)
    assert {path.name for path in (package / "unet").iterdir()} == {"config.json", VAE_WEIGHTS}


def test_a_float32_checkpoint_larger_than_one_file_of_diffusers_is_resolved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers splits above 10 GB, which the U-Net of SDXL has in float32; here the limit is lower."""
    tensors = compvis(make_pipeline(True, tmp_path / "base"))
    save_file(tensors, tmp_path / "a.safetensors")
    saving: Any = diffusers.models.modeling_utils
    whole = saving.split_torch_state_dict_into_shards

    def split_early(state: Any, max_shard_size: object, **more: Any) -> Any:
        return whole(state, max_shard_size=20_000, **more)

    monkeypatch.setattr(saving, "split_torch_state_dict_into_shards", split_early)
    config = recipes.resolve("sdxl-4step-emoji", ["family.resolution=16", "family.vae_stride=2"])
    base, out = without_weights(tmp_path / "base"), tmp_path / "teacher"
    stages.resolve(config, str(tmp_path / "a.safetensors"), str(out), base=str(base))
    assert len(list((out / "unet").glob("*.safetensors"))) > 1
    load_network(out)


def test_files_of_a_vae_in_several_files_are_all_part_of_its_digest(pipeline: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pipeline, tmp_path / "pipeline"))
    split(folder, parts=("vae",))
    before = find_pipeline(str(folder), text=False).digest
    assert find_pipeline(str(folder / "vae"), text=False).digest == before
    path = sorted((folder / "vae").glob("*.safetensors"))[-1]
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    assert find_pipeline(str(folder), text=False).digest != before


def test_without_a_variant_is_read_first(pipeline: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pipeline / "vae", tmp_path / "vae"))
    shutil.copy(folder / VAE_WEIGHTS, folder / "diffusion_pytorch_model.fp16.safetensors")
    assert weight_files(folder, VAE_WEIGHTS) == {VAE_WEIGHTS: folder / VAE_WEIGHTS}


@pytest.mark.parametrize("form", FORMS)
def test_on_a_bucket_only_what_is_read_is_downloaded(
    form: str, pipeline: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DMD2_CACHE", str(tmp_path / "cache"))
    folder = Path(shutil.copytree(pipeline, tmp_path / "pipeline"))
    FORMS[form](folder)
    here = find_pipeline(str(folder), text=True, whole=True)
    extra = "unet/diffusion_pytorch_model.bf32.safetensors", "unet/diffusion_pytorch_model.bin"
    for name in extra:
        (folder / name).touch()
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    upload_files(folder, names, open_store(f"{bucket}/teacher"))
    there = find_pipeline(f"{bucket}/teacher", text=True, whole=True)
    assert there.digest == here.digest
    downloaded = {path.name for path in (tmp_path / "cache" / "networks").rglob("*") if path.is_file()}
    assert downloaded == {path.name for path in here.files.values()}


@pytest.mark.parametrize("form", FORMS)
def test_a_copy_of_a_repository_of_the_hub_is_read_without_a_connection(
    form: str, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0" * 40
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--owner--name"
    folder = Path(shutil.copytree(pipeline, repository / "snapshots" / commit))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    FORMS[form](folder)
    here = find_pipeline(str(folder), text=True, whole=True)
    assert find_pipeline("owner/name", text=True, whole=True).digest == here.digest


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is no index of weights"),
        (b"[]", "is no index of weights"),
        (b'{"weight_map": 1}', "is no index of weights"),
        (b'{"weight_map": {"a": ["b"]}}', "is no index of weights"),
        (b'{"weight_map": {"a": 1}}', "is no index of weights"),
        (b"[" * 200_000, "is no index of weights"),
        (b'{"weight_map": {}}', "lists 0 files"),
        (b'{"weight_map": {"a": "../x.safetensors"}}', "is no index of weights"),
        (b'{"weight_map": {"a": "/x.safetensors"}}', "is no index of weights"),
        (
            b'{"weight_map": {"a": "x/y.safetensors"}}',
            "lists 'x/y.safetensors', which is no safetensors file",
        ),
        (b'{"weight_map": {"a": "x.bin"}}', "lists 'x.bin', which is no safetensors file"),
        (b'{"weight_map": {"a": "x.safetensors"}}', "lists x.safetensors, which is not there"),
        (b" " * 2000, "and an index of weights at most 1000"),
    ],
)
def test_a_broken_or_hostile_index_is_refused(
    content: bytes, words: str, tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content == b" " * 2000:
        monkeypatch.setattr(weights_module, "MAX_INDEX_BYTES", 1000)
    (tmp_path / f"{VAE_WEIGHTS}.index.json").write_bytes(content)
    assert words in refusal(lambda: weight_files(tmp_path, VAE_WEIGHTS))


def test_a_weight_in_two_files_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (tmp_path / f"{VAE_WEIGHTS}.index.json").write_text(json.dumps(index))
    for name in ("1.safetensors", "2.safetensors"):
        save_file({"a": torch.zeros(1)}, tmp_path / name)
    assert "'a' is in" in refusal(lambda: load_weights(tmp_path, VAE_WEIGHTS))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.bin, a pickle"),
        ("diffusion_pytorch_model.non_ema.safetensors", "rename it if it holds the weights of this network"),
        ("diffusion_flax_model.msgpack", "neither as several files with an index nor as a variant"),
    ],
)
def test_missing_weights_are_refused_for_the_reason_that_holds(
    name: str, words: str, pipeline: Path, tmp_path: Path, refusal: Refusal
) -> None:
    folder = Path(shutil.copytree(pipeline, tmp_path / "pipeline"))
    (folder / "unet" / VAE_WEIGHTS).rename(folder / "unet" / name)
    sentence = refusal(lambda: stages.resolve(CONFIGS["sdxl"], str(folder), str(tmp_path / "out")))
    assert words in sentence
    assert ("convert" in sentence) == name.endswith(".bin")


@pytest.mark.parametrize("inside", ["unet", "."])
def test_a_student_in_a_folder_of_diffusers_is_adopted(inside: str, pipeline: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pipeline, tmp_path / "pipeline"))
    split(folder, parts=("unet",))
    wanted = load_file(pipeline / "unet" / VAE_WEIGHTS)
    same(read_unet(folder / "unet" if inside == "." else folder, wanted), wanted)


@pytest.mark.parametrize("several", ["teacher", "other"])
def test_another_vae_leaves_no_file_of_the_teachers_own(several: str, pipeline: Path, tmp_path: Path) -> None:
    """diffusers looks for an index first, this library for a single file."""
    folders = {name: Path(shutil.copytree(pipeline, tmp_path / name)) for name in ("teacher", "other")}
    path = folders["other"] / "vae" / VAE_WEIGHTS
    save_file({name: tensor * 2 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    wanted = load_file(path)
    split(folders[several], parts=("vae",))
    source, vae, out = str(folders["teacher"]), str(folders["other"]), tmp_path / "out"
    stages.resolve(CONFIGS["sdxl"], source, str(out), vae=vae)
    same(load_weights(out / "vae", VAE_WEIGHTS), wanted)
    same(AutoencoderKL.from_pretrained(out / "vae").state_dict(), wanted)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder_2"])
def test_a_quantized_network_is_refused(part: str, pipeline: Path, tmp_path: Path, refusal: Refusal) -> None:
    folder = Path(shutil.copytree(pipeline, tmp_path / "pipeline"))
    path = folder / part / "config.json"
    quantized = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    path.write_text(json.dumps(json.loads(path.read_text()) | quantized))
    sentence = refusal(lambda: stages.resolve(CONFIGS["sdxl"], str(folder), str(tmp_path / "out")))
    assert f"{part} holds quantized weights" in sentence
