"""GAN heads: from the critic's bottleneck features to one logit per sample."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmd2.errors import Refused
from dmd2.models.adm import group_norm


class ConvHead(nn.Module):
    """Halve the features to 4x4, pool them to 1x1, read one logit (the head of DMD2, sec. 4.3, by shape).

    (B, C, S, S) in float32 -> (B,). C is kept throughout; S is 4 times a power of two.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        halvings = (size // 4).bit_length() - 1
        if halvings < 0 or size != 4 * 2**halvings:
            raise Refused(
                f"the GAN head needs features of 4, 8, 16, ... pixels, not {size}; change the depth of the network"
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
        return logits.flatten().clone()  # FSDP2 warns of a view
