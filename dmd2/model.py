"""Trained models as users load them: the network of a teacher, a run or a package, with everything needed to sample it.

`network.json` holds the family and the student's timesteps; the weights lie where the family saves them (`network.safetensors`, or
`unet/` of a diffusers pipeline). Both are data: loading executes no code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dmd2.batch import CondPair
from dmd2.config import FamilyConfig, in_first_spelling
from dmd2.denoiser import autocast
from dmd2.errors import Refused
from dmd2.io.artifact import open_artifact, read_manifest
from dmd2.io.json_file import read_json
from dmd2.io.storage import local_path
from dmd2.io.tensors import num_not_finite
from dmd2.models.family import ModelFamily, Prompt, make_family
from dmd2.sampler import Timesteps, generate, usual_batch
from dmd2.training.phase_timer import PhaseTimer


@dataclass(frozen=True)
class Model:
    """A network that can be sampled."""

    config: FamilyConfig
    family: ModelFamily
    network: nn.Module
    timesteps: Timesteps
    """The student's timesteps, noisiest first; empty for a teacher."""
    dtype: torch.dtype = torch.float32
    """The precision in which the network is sampled, by autocast. Noise, steps of the sampler and the decoder stay in their own."""
    timer: PhaseTimer | None = None
    """Measures the phases `text` and `steps` of the samples; whoever sets it starts and stops the other phases."""

    def sample(self, prompts: Sequence[Prompt], seed: int = 0, batch: int = 0) -> Tensor:
        """Sample the student: images of these classes or texts, uint8 (N, C, H, W).

        An image takes len(timesteps) network calls. `batch` is the number of images in a call; 0 = by their size. Equal seeds give
        equal noise for any batch size and device.

        Raises:
            Refused: The network's output has infinite or NaN values, or the VAE makes some of it.
        """
        return self.family.decode(self.samples(prompts, seed, batch))

    def samples(self, prompts: Sequence[Prompt], seed: int = 0, batch: int = 0) -> Tensor:
        """Like `sample`, without the decoder: samples (N, C, H, W), pixels or latents, on the CPU."""
        return _require_finite(self._student_samples(prompts, seed, batch))

    def sample_unchecked(self, prompts: Sequence[Prompt], seed: int = 0) -> Tensor:
        """Like `sample`, but values that are not finite are decoded too.

        For previews and scores during training: there an error on one rank would leave the others waiting for it, and the
        training loop itself stops a run that diverges.
        """
        return self.family.decode_unchecked(self._student_samples(prompts, seed, batch=0))

    def _student_samples(self, prompts: Sequence[Prompt], seed: int, batch: int) -> Tensor:
        """The student's samples before the family's decoder, (N, C, H, W)."""

        def sample_batch(eps: Tensor, cond: CondPair) -> Tensor:
            first, *later = eps.unbind(1)
            noise = iter(later)
            denoiser = self.family.denoiser(self.network)
            return generate(denoiser, first, cond.cond, self.timesteps, lambda x0: next(noise))

        return self._in_batches(sample_batch, prompts, seed, batch, noises=len(self.timesteps))[1]

    def sample_teacher(
        self, prompts: Sequence[Prompt], seed: int, steps: int, guidance: float = 1.0, batch: int = 0
    ) -> Tensor:
        """Sample the family's many-step sampler: images, uint8 (N, C, H, W), from the noise that a one-step student gets for this seed."""
        return self.family.decode(self.teacher_samples(prompts, seed, steps, guidance, batch))

    def teacher_samples(
        self,
        prompts: Sequence[Prompt],
        seed: int,
        steps: int,
        guidance: float = 1.0,
        batch: int = 0,
        noises: int = 1,
    ) -> Tensor:
        """Like `sample_teacher`, without the decoder, from the noise that a student of `noises` steps starts from for this seed."""

        def sample_batch(eps: Tensor, cond: CondPair) -> Tensor:
            return self.family.sample_teacher(self.network, eps[:, 0], cond, steps, guidance)

        return _require_finite(self._in_batches(sample_batch, prompts, seed, batch, noises)[1])

    def pairs(
        self, prompts: Sequence[Prompt], seed: int, steps: int, guidance: float = 1.0, batch: int = 0
    ) -> tuple[Tensor, Tensor]:
        """(noise, the teacher's ODE solution from it), each (N, C, H, W); refused if a sample is not finite."""

        def sample_batch(eps: Tensor, cond: CondPair) -> Tensor:
            return self.family.solve_ode(self.network, eps[:, 0], cond, steps, guidance)

        eps, x0 = self._in_batches(sample_batch, prompts, seed, batch, noises=1)
        return eps[:, 0], _require_finite(x0)

    def _in_batches(
        self,
        sample_batch: Callable[[Tensor, CondPair], Tensor],
        prompts: Sequence[Prompt],
        seed: int,
        batch: int,
        noises: int,
    ) -> tuple[Tensor, Tensor]:
        """(noise (N, noises, C, H, W), samples (N, C, H, W)), both on the CPU.

        All noise, also that between steps, is drawn on the CPU, image by image, from a generator of its own: it depends on the seed
        only, and the global random state does not change."""
        generator = torch.Generator().manual_seed(seed)
        device = next(self.network.parameters()).device
        batch = batch or self.usual_batch
        all_noise, samples = [], []
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            eps = torch.stack([torch.randn(noises, *self.family.shape, generator=generator) for _ in part])
            self._start_phase("text")
            cond, uncond = self.family.condition(part)
            self._start_phase("steps")
            with autocast(device, self.dtype):
                out = sample_batch(eps.to(device), CondPair(cond.to(device), uncond.to(device)))
            samples.append(out.cpu())
            all_noise.append(eps)
        return torch.cat(all_noise), torch.cat(samples)

    @property
    def usual_batch(self) -> int:
        """Images of a network call, where no number is given."""
        return usual_batch(self.family.shape)

    def _start_phase(self, phase: str) -> None:
        if self.timer:
            self.timer.start(phase)


def _require_finite(samples: Tensor) -> Tensor:
    """The samples; refused if one of their values is not finite, which would become a black pixel."""
    if count := num_not_finite(samples):
        raise Refused(
            f"the network's output has {count} infinite or NaN values of {samples.numel()}: its weights are damaged, or a run that "
            "diverged left them; use an earlier checkpoint, or get the weights again"
        )
    return samples


def load(folder: str | Path) -> Model:
    """Load a package: `load("package").sample([0, 1, 2], seed=0)`."""
    return load_network(open_artifact(folder, read_manifest(folder, "package")))


def save_network(folder: Path, model: Model, weights: dict[str, Tensor]) -> None:
    """Save weights of a model's network with everything that a loaded model needs."""
    model.family.save(weights, folder, model.timesteps)
    write_network_json(folder, model.config, model.timesteps)


def write_network_json(folder: Path, family: FamilyConfig, timesteps: Timesteps) -> None:
    """Write family and timesteps with the field names of version 0.1.0: the bytes are part of the digest of every teacher and student."""
    facts = {"family": in_first_spelling(family), "levels": timesteps}
    (folder / "network.json").write_text(json.dumps(facts, indent=1))


def read_network_json(folder: Path) -> tuple[FamilyConfig, Timesteps]:
    """(family, timesteps) of a network; the timesteps of a teacher are empty."""
    path = folder / "network.json"
    if not path.is_file():
        raise Refused(f"{folder} holds no network (no network.json); give a teacher, run or package folder")
    facts = read_json(path)
    return FamilyConfig.model_validate(facts["family"]), tuple(facts["levels"])


def load_network(folder: str | Path, weights: bool = True) -> Model:
    """The model in a teacher, run or package folder, on the CPU; without `weights`, its parameters are on the meta device."""
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
