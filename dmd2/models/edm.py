"""The EDM family: class-conditional ADM U-Nets under variance exploding noise (Karras et al. 2022), on pixels or latents.

An EDM network has no unconditional class, so there is no guidance."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from dmd2.batch import Batch, Conditioning, CondPair
from dmd2.config import AdmConfig, EdmConfig, LoraConfig
from dmd2.data.latents import sample_posterior
from dmd2.data.loader import RawBatch
from dmd2.denoiser import Denoiser
from dmd2.diffusion import Diffusion, edm_preconditioning, karras_schedule
from dmd2.encoders.vae import Vae, load_vae
from dmd2.errors import Refused
from dmd2.io.local import sha256
from dmd2.io.storage import fetch_file
from dmd2.io.tensors import load_tensors, save_tensors, to_device
from dmd2.models.adm import Adm
from dmd2.models.convert.edm_pickle import read_edm_critic, read_edm_pickle, read_edm_student
from dmd2.models.family import AdoptedWeights, ForeignTeacher, Prompt, check_same_family
from dmd2.models.heads import ConvHead
from dmd2.models.one_file import one_file
from dmd2.rng import Rng
from dmd2.sampler import Timesteps, heun

WEIGHTS, LOADER = "network.safetensors", "edm_student.py"


class Edm:
    """Implements `ModelFamily`. With a network on latents, the folder contains the VAE in `vae/`."""

    files: ClassVar[tuple[str, ...]] = ("network.json", WEIGHTS, "vae/*")
    lora_targets: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: EdmConfig, folder: Path | None, vae: str) -> None:
        self.config, self.folder, self.vae_place = config, folder, vae
        self.diffusion = self._process(config.num_timesteps)

    @cached_property
    def vae(self) -> Vae:
        return load_vae(self.vae_place or self._vae_folder())

    def _vae_folder(self) -> Path:
        assert self.folder is not None, "a network on latents is loaded with its VAE"
        return self.folder / "vae"

    @property
    def shape(self) -> tuple[int, int, int]:
        network = self.config.network
        return network.image_channels, network.resolution, network.resolution

    @cached_property
    def features(self) -> tuple[int, ...]:
        """(C, h, w) of the bottleneck features, from a forward pass on the meta device."""
        with torch.device("meta"):
            cond = Conditioning(label=torch.zeros(1, dtype=torch.int64))
            out = Adm(self.config.network)(
                torch.zeros(1, *self.shape), torch.zeros(1), cond, features_only=True
            )
        return tuple(out.shape[1:])

    @property
    def manifest_facts(self) -> dict[str, Any]:
        return {}

    def network(self) -> nn.Module:
        return Adm(self.config.network)

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        adm = cast(Adm, network)
        return [*adm.encoder, *adm.middle, *adm.decoder, adm.norm, adm.out]

    def head(self) -> nn.Module:
        return ConvHead(self.features[0], self.features[1])

    def read(self, batch: RawBatch, rng: Rng) -> Batch:
        if tuple(batch.image.shape[-3:]) != self.shape:
            raise Refused(
                f"the shards hold samples of {_describe_size(batch.image.shape[-3:])}, the network makes {_describe_size(self.shape)}; shard again with this recipe"
            )
        classes = self.config.network.classes
        if (worst := int(batch.label.max())) >= classes or int(batch.label.min()) < 0:
            raise Refused(
                f"class {worst} is outside 0 to {classes - 1}, the classes of the network; shard again with --family.network.classes {worst + 1}"
            )
        return Batch(self._to_sample(batch.image, rng), Conditioning(label=batch.label), Conditioning(), rng)

    def _to_sample(self, image: Tensor, rng: Rng) -> Tensor:
        if self.config.vae_stride:
            return sample_posterior(to_device(image, rng.device), rng.normal(*self.shape))
        return image.float() / 127.5 - 1

    def read_pairs(self, batch: RawBatch, rng: Rng) -> Batch:
        return Batch(batch.image.float(), Conditioning(label=batch.label), Conditioning(), rng)

    def to_pixels(self, x: Tensor) -> Tensor:
        return self.vae.to_pixels(x) if self.config.vae_stride else x

    def decode(self, x: Tensor) -> Tensor:
        return self.vae.decode(x) if self.config.vae_stride else self.decode_unchecked(x)

    def decode_unchecked(self, x: Tensor) -> Tensor:
        if self.config.vae_stride:
            return self.vae.decode_unchecked(x)
        return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)

    def condition(self, prompts: Sequence[Prompt]) -> CondPair:
        classes = self.config.network.classes
        for prompt in prompts:
            if not isinstance(prompt, int):
                raise Refused(f"{prompt!r} is not a class number; this network is conditioned on classes")
            if not 0 <= prompt < classes:
                raise Refused(f"class {prompt} is outside 0 to {classes - 1}, the classes of the network")
        return CondPair(Conditioning(label=torch.tensor(prompts)), Conditioning())

    def placeholder_condition(self, rows: int) -> Conditioning:
        return Conditioning(label=torch.zeros(rows, dtype=torch.int64))

    def sample_teacher(
        self, network: nn.Module, eps: Tensor, pair: CondPair, steps: int, guidance: float
    ) -> Tensor:
        if guidance != 1:
            raise Refused(
                f"guidance is {guidance}; an EDM network has no unconditional class, so only 1 is possible"
            )
        return heun(Denoiser(network, self._process(steps)), eps, pair.cond)

    def solve_ode(
        self, network: nn.Module, eps: Tensor, pair: CondPair, steps: int, guidance: float
    ) -> Tensor:
        return self.sample_teacher(network, eps, pair, steps, guidance)

    def teacher_calls(self, steps: int, guidance: float) -> int:
        return 2 * steps - 1

    def denoiser(self, network: nn.Module) -> Denoiser:
        return Denoiser(network, self.diffusion)

    def save(self, weights: dict[str, Tensor], folder: Path, timesteps: Timesteps) -> None:
        save_tensors(weights, folder / WEIGHTS)
        if self.config.vae_stride:
            shutil.copytree(self._vae_folder(), folder / "vae", dirs_exist_ok=True)

    def weights(self, folder: Path) -> dict[str, Tensor]:
        return load_tensors(folder / WEIGHTS)

    def write_forms(
        self, folder: Path, timesteps: Timesteps, single_file: str, license: str = ""
    ) -> dict[str, str]:
        (folder / LOADER).write_text(one_file("dmd2.models.edm_student"))
        return {
            LOADER: "Python with torch and safetensors alone: samples the student, as above; copy it where you need it"
        }

    def usage(self, timesteps: Timesteps) -> str:
        labels = ", ".join(str(label) for label in range(min(3, self.config.classes)))
        drawn = f"images = student.sample([{labels}], seed=0)  # uint8 (N, C, H, W)"
        if self.config.vae_stride:
            kind = type(self.vae.network).__name__
            drawn = f"""latents = student.samples([{labels}], seed=0)

from diffusers import {kind}  # for the decoder
vae = {kind}.from_pretrained("path/of/this/folder/vae")
latents = latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0)
images = (vae.decode(latents).sample.detach() * 127.5 + 128).clamp(0, 255).byte()  # (N, C, H, W)"""
        return f"""With torch and safetensors alone:

```python
import sys
sys.path.append("path/of/this/folder")
from {Path(LOADER).stem} import load
student = load("path/of/this/folder")
{drawn}
```

With the library it was made with, which draws the same:

```python
from dmd2.model import load
student = load("path/of/this/folder")
images = student.sample([{labels}], seed=0)  # uint8 (N, C, H, W)
```"""

    @classmethod
    def resolve(cls, config: EdmConfig, source: str, base: str, vae: str, scratch: Path) -> ForeignTeacher:
        """From a pickle in the format of NVIDIA's EDM."""
        path = fetch_file(source)
        network, weights = read_edm_pickle(path)
        cls._check_network(network, config)

        def write(folder: Path) -> None:
            cls(config, None, vae).save(weights, folder, ())

        return ForeignTeacher({"source": sha256(path)}, write)

    def adopt(self, path: Path, teacher: Mapping[str, Tensor], lora: LoraConfig | None) -> AdoptedWeights:
        found = [read_edm_student(path), read_edm_critic(path)]
        for network, _ in filter(None, found):
            self._check_network(network, self.config)
        student, critic = (each and each[1] for each in found)
        assert student is not None
        return AdoptedWeights(student, critic)

    @staticmethod
    def _check_network(network: AdmConfig, config: EdmConfig) -> None:
        check_same_family(config.model_copy(update={"network": network}), config)

    def _process(self, timesteps: int) -> Diffusion:
        c = self.config
        return Diffusion(
            karras_schedule(timesteps, c.sigma_min, c.sigma_max, c.rho), edm_preconditioning(c.sigma_data)
        )


def _describe_size(shape: Sequence[int]) -> str:
    channels, height, width = shape
    return f"{height}x{width} pixels with {channels} channel{'s' if channels > 1 else ''}"
