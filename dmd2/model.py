"""What users load: a network with all that is needed to sample it, and the package made of a finished student.

`network.json` holds the family and the timesteps of the student's steps; the weights lie where the family puts them
(`network.safetensors`, or `unet/` of a pipeline of diffusers). All of it is data: loading executes nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dmd2.config import FamilyConfig, in_first_spelling
from dmd2.errors import Refused
from dmd2.io.artifact import open_artifact, read_manifest
from dmd2.io.storage import local_path
from dmd2.models.family import CondPair, ModelFamily, Prompt, make_family
from dmd2.sampler import Timesteps, generate

ELEMENTS = 2**20
"""Numbers in the samples of one network call when nothing else is said, at 64 samples at most: 16 SDXL latents."""


@dataclass(frozen=True)
class Model:
    """A network that can be sampled."""

    config: FamilyConfig
    family: ModelFamily
    network: nn.Module
    timesteps: Timesteps
    """Timesteps of the student's steps, noisiest first; none for a teacher."""

    def sample(self, prompts: Sequence[Prompt], seed: int = 0, batch: int = 0) -> Tensor:
        """Images of these classes or texts, uint8 (N, C, H, W), in len(timesteps) network calls each."""

        def draw(eps: Tensor, shown: CondPair) -> Tensor:
            first, *later = eps.unbind(1)
            between = iter(later)
            return generate(
                self.family.denoiser(self.network),
                first,
                shown.cond,
                self.timesteps,
                lambda x0: next(between),
            )

        return self.family.decode(self._in_batches(draw, prompts, seed, batch, draws=len(self.timesteps))[1])

    def sample_teacher(
        self, prompts: Sequence[Prompt], seed: int, steps: int, guidance: float = 1.0, batch: int = 0
    ) -> Tensor:
        """Images by the family's many-step sampler; from the noise that a one-step student gets."""
        return self.family.decode(self.pairs(prompts, seed, steps, guidance, batch)[1])

    def pairs(
        self, prompts: Sequence[Prompt], seed: int, steps: int, guidance: float = 1.0, batch: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Noise, and what the teacher makes of it, each (N, C, H, W)."""

        def draw(eps: Tensor, shown: CondPair) -> Tensor:
            return self.family.sample_teacher(self.network, eps[:, 0], shown, steps, guidance)

        eps, x = self._in_batches(draw, prompts, seed, batch, draws=1)
        return eps[:, 0], x

    def _in_batches(
        self,
        sampler: Callable[[Tensor, CondPair], Tensor],
        prompts: Sequence[Prompt],
        seed: int,
        batch: int,
        draws: int,
    ) -> tuple[Tensor, Tensor]:
        """All noise, also that between steps, is drawn on the CPU, image by image, from one generator: neither
        batch size nor device changes it, and the caller's random numbers are left alone. The noise is (N, draws, C, H, W)."""
        noise = torch.Generator().manual_seed(seed)
        device = next(self.network.parameters()).device
        batch = batch or max(1, min(64, ELEMENTS // math.prod(self.family.shape)))
        drawn, made = [], []
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            eps = torch.stack([torch.randn(draws, *self.family.shape, generator=noise) for _ in part])
            cond, uncond = self.family.condition(part)
            made.append(sampler(eps.to(device), CondPair(cond.to(device), uncond.to(device))).cpu())
            drawn.append(eps)
        return torch.cat(drawn), torch.cat(made)


def load(folder: str | Path) -> Model:
    """Load a package: `load("package").sample([0, 1, 2], seed=0)`."""
    return load_network(open_artifact(folder, read_manifest(folder, "package")))


def save_network(folder: Path, model: Model, weights: dict[str, Tensor]) -> None:
    """Write weights for the network of a model, and what belongs to it."""
    model.family.save(weights, folder, model.timesteps)
    write_network_json(folder, model.config, model.timesteps)


def write_network_json(folder: Path, family: FamilyConfig, timesteps: Timesteps) -> None:
    """In the spelling of its first version: its bytes are part of the digest of every teacher and student."""
    facts = {"family": in_first_spelling(family), "levels": timesteps}
    (folder / "network.json").write_text(json.dumps(facts, indent=1))


def read_network_json(folder: Path) -> tuple[FamilyConfig, Timesteps]:
    """The family of a network, and the timesteps of a student's steps."""
    path = folder / "network.json"
    if not path.is_file():
        raise Refused(f"{folder} holds no network (no network.json); give a teacher, run or package folder")
    facts = json.loads(path.read_text())
    return FamilyConfig.model_validate(facts["family"]), tuple(facts["levels"])


def load_network(folder: str | Path, weights: bool = True) -> Model:
    """The network of a teacher, run or package folder; without `weights`, its parameters are on the meta device."""
    path = local_path(folder)
    config, timesteps = read_network_json(path)
    family = make_family(config, path)
    with torch.device("meta"):  # every weight comes from the file
        network = family.network().requires_grad_(False).eval()
    try:
        if weights:
            network.load_state_dict(family.weights(path), assign=True)
    except RuntimeError as error:
        raise Refused(
            f"the weights in {path} do not fit its network: {str(error).splitlines()[1].strip()}"
        ) from None
    return Model(config, family, network.requires_grad_(False), timesteps)
