"""What a model family must answer; everything that differs between EDM, Stable Diffusion, ... is behind it.

No member is optional. So far there is one family; a second one also makes `Config.family` a union and `build.family` a choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from dmd2.data.stream import Batch
from dmd2.denoiser import Denoiser
from dmd2.diffusion import Diffusion
from dmd2.sample import Conditioning, Sample


class ModelFamily(Protocol):
    """One family at one size."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a sample."""

    @property
    def diffusion(self) -> Diffusion:
        """The process that teacher, student and critic share."""

    def network(self) -> nn.Module:
        """A freshly initialised network."""

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        """The units of sharding and checkpointing: tens of them, each parameter in at most one."""

    def head(self) -> nn.Module:
        """A GAN head that fits the network's features."""

    def read(self, batch: Batch) -> Sample:
        """Samples from a batch of the loader."""

    def decode(self, x: Tensor) -> Tensor:
        """Samples (B, C, H, W) -> images, uint8 (B, C, H, W)."""

    def condition(self, labels: Sequence[int]) -> Conditioning:
        """What samples of these classes are conditioned on."""

    def sample_teacher(self, network: nn.Module, eps: Tensor, cond: Conditioning, steps: int) -> Tensor:
        """The teacher's own many-step sampler, from pure noise eps (B, C, H, W)."""

    def teacher_calls(self, steps: int) -> int:
        """Network calls that takes per image."""

    def teaching_levels(self, ln_sigma: Tensor) -> Tensor:
        """Levels nearest to ln(sigma) (B,), for training a teacher."""

    def denoiser(self, network: nn.Module) -> Denoiser:
        """The network under the family's process."""
