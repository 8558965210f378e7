"""A few-step student of the EDM family (Karras et al. 2022, distilled with DMD2, arXiv 2405.14867).

    student = load("folder of network.json and network.safetensors")
    images = student.sample([0, 1, 2], seed=0)  # uint8 (N, C, H, W)

Needs torch and safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from dmd2.denoiser import Denoiser
from dmd2.diffusion import Diffusion, edm_preconditioning, karras_schedule
from dmd2.models.adm import Adm
from dmd2.sampler import Timesteps, generate, usual_batch


class EdmStudent:
    """A student that can be sampled."""

    def __init__(self, family: dict[str, Any], timesteps: Timesteps) -> None:
        """`family` and `timesteps` (noisiest first) are those of `network.json`; the weights are on the meta device."""
        size = family["network"]
        self.classes, self.draws_latents = size["classes"], bool(family["latent"])
        self.shape = (size["image_channels"], size["resolution"], size["resolution"])
        self.timesteps = timesteps
        schedule = karras_schedule(family["levels"], family["sigma_min"], family["sigma_max"], family["rho"])
        with torch.device("meta"):
            network = Adm(cast(Any, SimpleNamespace(**size))).requires_grad_(False).eval()
        self.network = network
        self.denoiser = Denoiser(network, Diffusion(schedule, edm_preconditioning(family["sigma_data"])))

    def sample(self, classes: Sequence[int], seed: int = 0) -> Tensor:
        """Images of these classes, uint8 (N, C, H, W), in len(timesteps) network calls each."""
        if self.draws_latents:
            raise ValueError("this student draws latents; decode those of `samples` with the VAE in `vae`")
        return (self.samples(classes, seed) * 127.5 + 128).clamp(0, 255).to(torch.uint8)

    def samples(self, classes: Sequence[int], seed: int = 0) -> Tensor:
        """Samples of these classes, float32 (N, C, H, W) on the CPU: pixels in [-1, 1], or scaled latents."""
        if wrong := [label for label in classes if not 0 <= label < self.classes]:
            raise ValueError(
                f"class {wrong[0]} is outside 0 to {self.classes - 1}, the classes of the network"
            )
        generator = torch.Generator().manual_seed(seed)
        parts = torch.tensor(classes).split(usual_batch(self.shape))
        return torch.cat([self._samples(labels, generator) for labels in parts])

    def _samples(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """The samples of one network call per step. All noise is drawn on the CPU, image by image."""
        device, noises = next(self.network.parameters()).device, len(self.timesteps)
        noise = torch.stack([torch.randn(noises, *self.shape, generator=generator) for _ in labels])
        first, *later = noise.to(device).unbind(1)
        between, cond = iter(later), {"label": labels.to(device)}
        return generate(self.denoiser, first, cast(Any, cond), self.timesteps, lambda x0: next(between)).cpu()


def load(folder: str | Path, device: str = "cpu") -> EdmStudent:
    """The student in the folder of a package, on a device of torch."""
    facts = json.loads((Path(folder) / "network.json").read_text())
    student = EdmStudent(facts["family"], tuple(facts["levels"]))
    student.network.load_state_dict(load_file(Path(folder) / "network.safetensors"), assign=True)
    student.network.requires_grad_(False).to(device)
    return student
