"""The networks of artifacts, and what a network must match."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dmd2.config import Config, FamilyConfig
from dmd2.errors import Refused
from dmd2.io.artifact import Manifest, open_artifact
from dmd2.model import Model, load_network


def network_of(folder: str, manifest: Manifest, weights: bool = True) -> Model:
    parts = ("vae", "unet", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    path = open_artifact(folder, manifest, "network.*", "model_index.json", *(f"{p}/*" for p in parts))
    return load_network(path, weights)


def on(device: torch.device, model: Model) -> Model:
    model.network.to(device)
    return model


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
