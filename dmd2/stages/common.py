"""What several stages share: the networks and samples they read, and the pictures they show."""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from dmd2.config import Config, EdmConfig, FamilyConfig
from dmd2.data.prompts import read_prompts
from dmd2.data.stream import Shards
from dmd2.errors import Refused
from dmd2.image_grid import grid
from dmd2.io.artifact import Manifest, opened, read
from dmd2.io.storage import at, is_local, local, replaced
from dmd2.model import Model, load_network
from dmd2.models.family import Prompt

SMALL = 64
"""Pixels along a side up to which a picture grid has 8 rows of 10; of larger images, 2 rows of 4."""


Sampler = Callable[[Sequence[Prompt], int], torch.Tensor]
"""(prompts, seed) -> images, uint8 (N, C, H, W)."""


def network_of(folder: str, manifest: Manifest, weights: bool = True) -> Model:
    parts = ("vae", "unet", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    path = opened(folder, manifest, "network.*", "model_index.json", *(f"{p}/*" for p in parts))
    return load_network(path, weights)


def on(device: torch.device, model: Model) -> Model:
    model.network.to(device)
    return model


def samples_of(config: Config, data: str) -> Manifest:
    """Of what the network is trained on: shards of images, or of latents."""
    return read(data, "latents" if config.family.vae_stride else "shards")


def digests(samples: Manifest) -> dict[str, str]:
    """As an input; that of the images too, from which latents were made."""
    return {samples.kind: samples.digest} | {k: v for k, v in samples.inputs.items() if k == "shards"}


def digest_of(prompts: str) -> dict[str, str]:
    if not prompts:
        return {}
    return {"prompts": hashlib.sha256(json.dumps(read_prompts(prompts)).encode()).hexdigest()}


def same_shape(teacher: FamilyConfig, config: Config) -> None:
    mine, its = (_flat(family.model_dump(mode="json")) for family in (config.family, teacher))
    if differs := [
        f"{name} is {its.get(name)}, not {mine.get(name)}"
        for name in mine | its
        if mine.get(name) != its.get(name)
    ]:
        raise Refused(
            f"the teacher is of another shape than recipe {config.recipe!r}: {', '.join(differs[:3])}; use the recipe it was made for, or set --family to match"
        )


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in settings.items() if k != "network"} | settings.get("network", {})


def student_of(teacher: Model, config: Config) -> Model:
    """A model of the teacher's network that takes the steps of the recipe."""
    return replace(teacher, timesteps=config.distill.student_timesteps)


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def captions(shards: Shards, count: int) -> list[str]:
    found = [text for text in shards.in_order(count).text if text]
    if not found:
        raise Refused(
            f"{shards.uri} has no captions to draw; give --prompts, or shard a source with captions"
        )
    return found


def columns(family: FamilyConfig) -> int:
    """Of a picture grid: a class each, as far as ten go."""
    return min(10 if family.image[1] <= SMALL else 4, family.classes)


def cells(family: FamilyConfig) -> int:
    return columns(family) * (8 if family.image[1] <= SMALL else 2)


def classes(family: EdmConfig) -> list[Prompt]:
    return [cell % columns(family) for cell in range(cells(family))]


def pictured(family: FamilyConfig, shards: Shards, prompts: str = "") -> list[Prompt]:
    """What the pictures of a run show: each class in a column, prompts of a file, or captions of the data."""
    if isinstance(family, EdmConfig):
        return classes(family)
    texts = read_prompts(prompts) if prompts else captions(shards, cells(family))
    return list(itertools.islice(itertools.cycle(texts), cells(family)))


def picture_of(family: FamilyConfig, sampler: Sampler, prompts: Sequence[Prompt], seed: int) -> Image.Image:
    return grid(sampler(prompts, seed), columns(family))


def save_png(picture: Image.Image, path: Path) -> None:
    with replaced(path) as draft:
        picture.save(draft, format="PNG")


@contextmanager
def delivered(out: str) -> Iterator[Path]:
    """A local path for a file that ends up at `out`, wherever that is."""
    if is_local(out):
        yield local(out)
        return
    folder, _, name = out.rpartition("/")
    with tempfile.TemporaryDirectory() as place:
        yield Path(place) / name
        at(folder).put(Path(place) / name, name)
