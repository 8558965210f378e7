"""What a model family must answer; everything that differs between EDM, Stable Diffusion, ... is behind it.

No member is optional.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from dmd2.batch import Batch, Conditioning
from dmd2.data.loader import RawBatch
from dmd2.denoiser import Denoiser
from dmd2.diffusion import Diffusion
from dmd2.rng import Rng
from dmd2.sampler import Timesteps

Prompt = int | str
"""What a sample is to show: a class, or a text."""


class CondPair(NamedTuple):
    """What samples show, as networks are told."""

    cond: Conditioning
    uncond: Conditioning
    """Its unconditional counterpart; empty where a network knows none."""


class ModelFamily(Protocol):
    """One family at one size."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a sample."""

    @property
    def diffusion(self) -> Diffusion:
        """The process that teacher, student and critic share."""

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest of a teacher says of it."""

    def network(self) -> nn.Module:
        """A freshly initialised network."""

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        """The units of sharding and checkpointing: tens of them. A parameter belongs to the first one that has it, and the
        few that no unit has, to the network. A unit lies before the bottleneck or behind it, and so do those few before it:
        a pass that ends there then reaches a unit whole or not at all."""

    def head(self) -> nn.Module:
        """A GAN head that fits the network's features."""

    def read(self, batch: RawBatch, rng: Rng) -> Batch:
        """Samples from a batch of the loader."""

    def read_pairs(self, batch: RawBatch, rng: Rng) -> Batch:
        """The same from a batch of pairs; x is (B, 2, C, H, W), noise and answer."""

    def decode(self, x: Tensor) -> Tensor:
        """Samples (B, C, H, W) -> images, uint8 (B, C, H, W)."""

    def pixels(self, x: Tensor) -> Tensor:
        """Samples (B, C, H, W) -> images as float32 (B, C, H, W) in [-1, 1], with gradient."""

    def condition(self, prompts: Sequence[Prompt]) -> CondPair:
        """What samples of these prompts are conditioned on."""

    def sample_teacher(
        self, network: nn.Module, eps: Tensor, shown: CondPair, steps: int, guidance: float
    ) -> Tensor:
        """The teacher's own many-step sampler, from pure noise eps (B, C, H, W)."""

    def teacher_calls(self, steps: int, guidance: float) -> int:
        """Network calls that takes per image."""

    def denoiser(self, network: nn.Module) -> Denoiser:
        """The network under the family's process, in float32."""

    def save(self, weights: dict[str, Tensor], folder: Path, timesteps: Timesteps) -> None:
        """Write the weights of a network, and beside them all that stays as it is (VAE, text encoders, ...). `timesteps` are
        those of a student's steps, and none for a teacher."""

    def weights(self, folder: Path) -> dict[str, Tensor]:
        """The weights that were saved there, in float32."""
