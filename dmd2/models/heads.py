"""Discriminator heads: from the critic's bottleneck features to one logit per sample."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmd2.errors import Refused
from dmd2.models.adm import group_norm


class ConvHead(nn.Module):
    """Features (B, C, S, S) -> logits (B,), in float32, for S of 4 times a power of two.

    Strided convolutions of C channels halve S to 4, a 4x4 convolution reduces it to 1, and a 1x1 convolution gives the logit.
    The layers have the shapes of the reference implementation (DMD2, sec. 4.3).
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        halvings = (size // 4).bit_length() - 1
        if halvings < 0 or size != 4 * 2**halvings:
            raise Refused(
                f"the discriminator head needs features of 4, 8, 16, ... pixels, not {size}; change the depth of the network"
            )
        layers: list[nn.Module] = []
        for _ in range(halvings):
            layers += [nn.Conv2d(channels, channels, 4, stride=2, padding=1), group_norm(channels), nn.SiLU()]
        layers += [
            nn.Conv2d(channels, channels, 4),
            group_norm(channels),
            nn.SiLU(),
            nn.Conv2d(channels, 1, 1),
        ]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.layers(features.to(torch.float32))
        return logits.flatten().clone()  # FSDP2 warns if a module returns a view
