"""A network that works on latents: shard, encode, teach, distill, evaluate, package, sample, on paths and on a bucket."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from dmd2 import recipes, stages
from dmd2.config import Config
from dmd2.io.artifact import Manifest, read_manifest
from dmd2.io.storage import join_uri, open_store, upload_files
from dmd2.model import load
from tests.conftest import MICRO

LATENT = ("family.network.image_channels=4", "family.vae_stride=2", "gate.factor=1e6")


@pytest.fixture(scope="module")
def config() -> Config:
    return recipes.resolve("edm-digits", (*MICRO, *LATENT))


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny VAE with random weights: 16x16 pixels in colour are 8x8 latents of 4 channels."""
    torch.manual_seed(0)
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    make: Any = AutoencoderKL
    network = make(
        down_block_types=down,
        up_block_types=up,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
    )
    folder = tmp_path_factory.mktemp("vae")
    network.save_pretrained(folder)
    return folder


def distilled(config: Config, source: str, vae: str, root: str) -> Manifest:
    data, latents, teacher, run = (join_uri(root, name) for name in ("shards", "latents", "teacher", "run"))
    stages.shard(config, source, data, workers=2)
    stages.encode(config, data, vae, latents)
    stages.teach(config, latents, teacher)
    return stages.distill(config, latents, teacher, run)


@pytest.fixture(scope="module")
def made(config: Config, vae: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("latents")
    distilled(config, str(pictures), str(vae), str(root))
    return root


def weights(run: Manifest) -> str:
    return next(file.sha256 for file in run.files if file.path == "network.safetensors")


def test_a_student_of_latents_is_judged_and_packaged_with_its_vae(config: Config, made: Path) -> None:
    data, teacher, run = (str(made / name) for name in ("shards", "teacher", "run"))
    scores = stages.evaluate(config, data, teacher, run, str(made / "evaluation")).facts
    assert (scores["images_real"], scores["nfe_student"]) == (12, 1)
    stages.gate(config, str(made / "evaluation"), str(made / "gate"))
    stages.package(run, str(made / "evaluation"), str(made / "gate"), str(made / "package"))
    images = load(made / "package").sample([0, 1, 2], seed=3)
    assert (images.shape, images.dtype) == ((3, 3, 16, 16), torch.uint8)
    assert (made / "package" / "vae" / "diffusion_pytorch_model.safetensors").is_file()
    code = re.search(r"```python\n(.*?)```", (made / "package" / "README.md").read_text(), re.DOTALL)
    assert code
    exec(code[1].replace("path/of/this/folder", str(made / "package")), names := dict[str, Any]())
    assert torch.equal(names["images"], load(made / "package").sample([0, 1, 2], seed=0))


def test_on_a_bucket_everything_is_the_same(
    config: Config, vae: Path, pictures: Path, made: Path, bucket: str
) -> None:
    """Source, VAE, shards, latents, teacher and run: nothing but gs:// addresses."""
    for folder, name in ((pictures, "pictures"), (vae, "vae")):
        files = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
        upload_files(folder, files, open_store(join_uri(bucket, name)))
    run = distilled(config, join_uri(bucket, "pictures"), join_uri(bucket, "vae"), bucket)
    for kind in ("shards", "latents"):
        assert read_manifest(join_uri(bucket, kind), kind).digest == read_manifest(made / kind, kind).digest
    assert weights(run) == weights(read_manifest(made / "run", "run"))


def test_images_are_no_latents(config: Config, made: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="is a shards folder; a latents folder is needed here"):
        stages.teach(config, str(made / "shards"), str(tmp_path / "teacher"))
