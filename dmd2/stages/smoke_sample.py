"""A smoke sample of a teacher: a few images in a few steps show whether it draws anything at all, before days of training on it."""

from __future__ import annotations

import torch

from dmd2.errors import Refused
from dmd2.io.tensors import num_not_finite
from dmd2.model import Model
from dmd2.models.family import Prompt

STEPS = 4
PROMPTS: list[Prompt] = ["a red apple on a table", "a portrait of an old man"]
LEVELS = 1.0
"""Largest difference between pixels of a channel, in levels of 0 to 255, at which an image is of one colour."""


@torch.no_grad()
def check_draws(teacher: Model, name: str) -> None:
    """Raise Refused if the samples of a teacher have values that are no numbers, or are of one colour each.

    `name` is what errors call the teacher."""
    family = teacher.family
    prompts: list[Prompt] = PROMPTS
    if teacher.config.prompts == "classes":
        prompts = [0, teacher.config.classes - 1]
    device = next(teacher.network.parameters()).device
    eps = torch.randn(len(prompts), *family.shape, generator=torch.Generator().manual_seed(0)).to(device)
    pair = family.condition(prompts)
    x = family.sample_teacher(teacher.network, eps, pair.to(device), STEPS, 1.0)
    pixels = family.to_pixels(x) if not num_not_finite(x) else x
    if count := num_not_finite(pixels):
        what = "samples" if pixels is x else "decoded images"
        raise Refused(
            f"{name} draws nothing: the {what} of a smoke test have {count} infinite or NaN values of {pixels.numel()}; get its weights "
            "again, and of SDXL a VAE that does not overflow (--vae)"
        )
    spread = (pixels.amax((2, 3)) - pixels.amin((2, 3))).amax() * 127.5
    if spread <= LEVELS:
        raise Refused(
            f"{name} draws images of one colour in a smoke test ({STEPS} steps, prompts {prompts}), so there is nothing to distil; check "
            "that its weights belong to its configuration"
        )
