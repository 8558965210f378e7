"""Latents of DMD2's reference code: what is in the files, under the captions that belong to them."""

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
from dmd2.config import Config
from dmd2.data.loader import Shards
from dmd2.data.shards import TRAIN
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
    made = stages.convert(config(), source, str(pipeline), out)
    batch = Shards(out, TRAIN, "latents").evenly_spaced(5)
    assert torch.equal(batch.image[:, 0], LATENTS)
    assert batch.image[:, 1].abs().max() == 0
    assert list(batch.text) == PROMPTS
    assert made.facts["images"] == 5
    assert [shard["images"] for shard in made.facts["shards"]] == ([2, 1, 2] if make is files else [2, 2, 1])
    assert stages.convert(config(), source, str(pipeline), out).digest == made.digest


def test_a_student_is_distilled_from_them(pipeline: Path, tmp_path: Path) -> None:
    latents, teacher = str(tmp_path / "latents"), str(tmp_path / "teacher")
    stages.convert(config(), str(files(tmp_path / "source")), str(pipeline), latents)
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
        return refusal(lambda: stages.convert(config(*more), str(source), str(pipeline), str(tmp_path / "x")))

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
    assert "make pairs with dmd2 pairs" in said(table(tmp_path / "pairs", prompt_embeds_list_shape=b"5 77 8"))
    assert "row 2 of latents is 2 bytes long, not 2048" in said(table(tmp_path / "cut", latents_2_data=b"12"))
    digits = recipes.get("edm-digits")
    assert "does not learn from latents with captions" in refusal(
        lambda: stages.convert(digits, str(tmp_path / "empty"), str(pipeline), str(tmp_path / "x"))
    )
