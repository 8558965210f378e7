"""Latents and ODE pairs of DMD2's reference code: what is in the files, under what belongs to them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch

from dmd2 import recipes, stages
from dmd2.config import Config, EncodeConfig
from dmd2.data.loader import Shards
from dmd2.data.shard_table import TRAIN
from dmd2.encoders.pipeline_folder import find_pipeline
from dmd2.encoders.text import TextEncoders
from dmd2.model import load_network
from dmd2.rng import Rng
from tests.tiny_sdxl import SMALL

Refusal = Callable[[Callable[[], object]], str]
PROMPTS = ["a red square", "a blue square", "", "ein grünes Quadrat", "a square"]
LATENTS = torch.randn(5, 4, 16, 16, generator=torch.Generator().manual_seed(0)).half()


def config(*more: str) -> Config:
    return recipes.resolve("sdxl-4step-emoji", (*SMALL, "data.images_per_shard=2", *more))


def files(folder: Path, prompts: Any = None) -> Path:
    """Two files, as the published ones: a dict of a tensor and an array of texts."""
    folder.mkdir()
    for number, rows in enumerate((slice(0, 3), slice(3, 5))):
        part = {"latents": LATENTS[rows].clone(), "prompts": np.array(PROMPTS[rows])}
        torch.save(part | (prompts or {}), folder / f"vae_latents_{number:03d}.pt")
    return folder


def table(folder: Path, **more: bytes) -> Path:
    with lmdb.open(str(folder), map_size=2**20) as env, env.begin(write=True) as transaction:
        transaction.put(b"latents_shape", b"5 4 16 16")
        transaction.put(b"prompts_shape", b"5")
        for row, (latent, prompt) in enumerate(zip(LATENTS, PROMPTS, strict=True)):
            transaction.put(f"latents_{row}_data".encode(), latent.numpy().tobytes())
            transaction.put(f"prompts_{row}_data".encode(), prompt.encode())
        for name, data in more.items():
            transaction.put(name.encode(), data)
    return folder


@pytest.mark.parametrize("make", [files, table])
def test_latents_and_captions_are_those_of_the_files(
    make: Callable[[Path], Path], pipeline: Path, tmp_path: Path
) -> None:
    out, source = str(tmp_path / "latents"), str(make(tmp_path / "source"))
    made = stages.convert(config(), source, out, str(pipeline))
    batch = Shards(out, TRAIN, "latents").evenly_spaced(5)
    assert torch.equal(batch.image[:, 0], LATENTS)
    assert batch.image[:, 1].abs().max() == 0
    assert list(batch.text) == PROMPTS
    assert made.facts["images"] == 5
    assert [shard["images"] for shard in made.facts["shards"]] == ([2, 1, 2] if make is files else [2, 2, 1])
    assert stages.convert(config(), source, out, str(pipeline)).digest == made.digest


def test_a_student_is_distilled_from_them(pipeline: Path, tmp_path: Path) -> None:
    latents, teacher = str(tmp_path / "latents"), str(tmp_path / "teacher")
    stages.convert(config(), str(files(tmp_path / "source")), latents, str(pipeline))
    stages.resolve(config(), str(pipeline), teacher)
    run = stages.distill(config("distill.steps=1"), latents, teacher, str(tmp_path / "run"))
    assert run.facts["steps"] == 1


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_other_files_are_refused_and_nothing_of_them_runs(
    pipeline: Path, tmp_path: Path, refusal: Refusal
) -> None:
    def said(source: Path, *more: str) -> str:
        return refusal(lambda: stages.convert(config(*more), str(source), str(tmp_path / "x"), str(pipeline)))

    hostile = files(tmp_path / "hostile", {"prompts": Hostile(tmp_path / "ran")})
    assert "nothing of it was run" in said(hostile)
    assert not (tmp_path / "ran").exists()
    assert "one text for each latent" in said(files(tmp_path / "short", {"prompts": np.array(["a"])}))
    (tmp_path / "empty").mkdir()
    assert "no .pt files and no data.mdb" in said(tmp_path / "empty")
    assert "does not exist" in said(tmp_path / "nothing")
    (tmp_path / "empty" / "a.pt").write_bytes(pickle.dumps({"a": 1})[:-2])
    assert "nothing of it was run" in said(tmp_path / "empty")
    assert "the recipe's network takes (4, 8, 8)" in said(files(tmp_path / "large"), "family.resolution=16")
    assert "row 2 of latents is 2 bytes long, not 2048" in said(table(tmp_path / "cut", latents_2_data=b"12"))
    digits = recipes.get("edm-digits")
    assert "does not learn from latents with captions" in refusal(
        lambda: stages.convert(digits, str(tmp_path / "empty"), str(tmp_path / "x"), str(pipeline))
    )


EMBEDDED = ["a red square", "a blue square", "a green square"]
NOISE, SAMPLES = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(1)).half()


@pytest.fixture(scope="module")
def embeddings(pipeline: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and pooled embeddings of the prompts, float16."""
    encoders = TextEncoders(find_pipeline(str(pipeline), text=True), EncodeConfig(), torch.device("cpu"))
    stored = encoders.embed_for_storage(EMBEDDED)
    assert stored.pooled is not None
    return stored.states, stored.pooled


def pairs(folder: Path, states: torch.Tensor, pooled: torch.Tensor, noise: torch.Tensor = NOISE) -> Path:
    """An LMDB as the published one: embeddings in place of the prompts."""
    arrays = {
        "latents": noise, "images": SAMPLES, "prompt_embeds_list": states, "pooled_prompt_embeds": pooled
    }  # fmt: skip
    with lmdb.open(str(folder), map_size=2**22) as env, env.begin(write=True) as transaction:
        for name, array in arrays.items():
            transaction.put(f"{name}_shape".encode(), " ".join(map(str, array.shape)).encode())
            for row, values in enumerate(array):
                transaction.put(f"{name}_{row}_data".encode(), values.contiguous().numpy().tobytes())
    return folder


def test_pairs_have_noise_samples_and_embeddings_of_the_table(
    embeddings: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    trajectory = torch.stack((NOISE, SAMPLES), 1)  # which starts with the noise
    for name, noise in (("noise", NOISE), ("trajectory", trajectory)):
        source, out = pairs(tmp_path / name, *embeddings, noise), str(tmp_path / f"{name}-pairs")
        made = stages.convert(config(), str(source), out)
        batch = Shards(out, TRAIN, "pairs").evenly_spaced(3)
        assert torch.equal(batch.image, torch.stack((NOISE, SAMPLES), 1))
        assert all(torch.equal(a, b) for a, b in zip(batch.embeddings, embeddings, strict=True))
        assert (made.kind, made.facts["images"], batch.text) == ("pairs", 3, ("",) * 3)


def test_the_warm_up_learns_from_them_as_from_pairs_with_the_prompts(
    embeddings: tuple[torch.Tensor, torch.Tensor], pipeline: Path, tmp_path: Path
) -> None:
    """The conditioning is that of the prompts, to the precision of float16."""
    made, teacher = str(tmp_path / "pairs"), str(tmp_path / "teacher")
    stages.convert(config(), str(pairs(tmp_path / "source", *embeddings)), made)
    stages.resolve(config(), str(pipeline), teacher)
    family = load_network(teacher).family
    batch = Shards(made, TRAIN, "pairs").evenly_spaced(3)
    read = family.read_pairs(batch, Rng())
    cond, uncond = family.condition(EMBEDDED)
    assert read.cond.keys() == cond.keys()
    for one, other in ((read.cond, cond), (read.uncond, uncond)):
        for name in other:
            torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-3)
    warm_up = recipes.resolve("sdxl-1step-warmup-emoji", (*SMALL, "distill.steps=1", "distill.batch=2"))
    run = stages.distill(warm_up, made, teacher, str(tmp_path / "run"))
    assert (run.facts["steps"], set(run.facts["prompts"])) == (1, {""})


def test_pairs_that_do_not_fit_are_refused(
    embeddings: tuple[torch.Tensor, torch.Tensor], pipeline: Path, tmp_path: Path, refusal: Refusal
) -> None:
    def said(name: str, *arrays: torch.Tensor) -> str:
        source, out = pairs(tmp_path / name, *arrays), str(tmp_path / f"{name}-pairs")
        return refusal(lambda: stages.convert(config(), str(source), out))

    states, pooled = embeddings
    assert "prompt_embeds_list is (2, " in said("short", states[:2], pooled)
    assert "infinite or NaN" in said("infinite", states / 0, pooled)
    made, teacher = str(tmp_path / "narrow"), str(tmp_path / "teacher")
    stages.convert(config(), str(pairs(tmp_path / "source", states[..., :8], pooled)), made)
    stages.resolve(config(), str(pipeline), teacher)
    warm_up = recipes.resolve("sdxl-1step-warmup-emoji", (*SMALL, "distill.steps=1", "distill.batch=2"))
    assert "the data holds embeddings text (" in refusal(
        lambda: stages.distill(warm_up, made, teacher, str(tmp_path / "run"))
    )
