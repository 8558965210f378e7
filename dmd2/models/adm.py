"""The ADM U-Net (Dhariwal & Nichol 2021) in the form EDM trains it (Karras et al. 2022, appendix F).

One class, sized by an `AdmConfig`. Residual blocks resample inside, time and class scale and shift every normalization, and
attention runs at the listed resolutions. The published ImageNet-64 network and the small one for digits differ in numbers
only. There is no dropout, which EDM uses when it trains a teacher on ImageNet, because distillation runs without it.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmd2.batch import Conditioning
from dmd2.config import AdmConfig

MAX_PERIOD = 10_000
"""Longest period of the time embedding, in units of its input."""


class Adm(nn.Module):
    """(x (B, C, H, W), time (B,), cond["label"] (B,)) -> raw output (B, C, H, W), or bottleneck features."""

    def __init__(self, config: AdmConfig) -> None:
        super().__init__()
        width = config.channels
        embedding = width * config.embedding_multiplier
        self.config = config
        self.time_in = nn.Linear(width, embedding)
        self.time_out = nn.Linear(embedding, embedding)
        self.label = nn.Embedding(config.classes, embedding)
        self.stem = nn.Conv2d(config.image_channels * config.patch**2, width, 3, padding=1)
        self.encoder, skips = _encoder(config, embedding)
        self.middle = nn.ModuleList(
            Block(skips[-1], skips[-1], embedding, config.head_channels, attention=attention)
            for attention in (True, False)
        )
        self.decoder = _decoder(config, embedding, skips)
        self.norm = group_norm(width * config.multipliers[0])
        self.out = _zero(
            nn.Conv2d(width * config.multipliers[0], config.image_channels * config.patch**2, 3, padding=1)
        )

    def forward(self, x: Tensor, time: Tensor, cond: Conditioning, features_only: bool = False) -> Tensor:
        x = F.pixel_unshuffle(x.to(self.stem.weight.dtype), self.config.patch)
        embedding = self._embed(time, cond)
        skips = [self.stem(x)]
        for block in self.encoder:
            skips.append(block(skips[-1], embedding))
        if features_only:
            return skips[-1]
        h = skips[-1]
        for block in self.middle:
            h = block(h, embedding)
        for block in map(_as_block, self.decoder):
            h = block(h if block.resample else torch.cat([h, skips.pop()], dim=1), embedding)
        return F.pixel_shuffle(self.out(F.silu(self.norm(h))), self.config.patch)

    @property
    def decoder_start(self) -> nn.Module:
        """The module whose first input is the bottleneck features."""
        return self.middle[0]

    def _embed(self, time: Tensor, cond: Conditioning) -> Tensor:
        # The sinusoids are computed in float32: in bfloat16, neighbouring timesteps would be equal.
        waves = sinusoid(time.float(), self.config.channels).to(self.time_in.weight.dtype)
        return F.silu(self.time_out(F.silu(self.time_in(waves))) + self.label(cond["label"]))


class Block(nn.Module):
    """Residual block with scale-shift conditioning, optional resampling and attention."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        embedding: int,
        head_channels: int,
        *,
        attention: bool = False,
        resample: str = "",
    ) -> None:
        super().__init__()
        self.resample = resample
        self.norm_in = group_norm(channels_in)
        self.conv_in = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.affine = nn.Linear(embedding, 2 * channels_out)
        self.norm_out = group_norm(channels_out)
        self.conv_out = _zero(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        same = channels_in == channels_out
        self.skip = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)
        self.attention = Attention(channels_out, head_channels) if attention else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv_in(_resample(F.silu(self.norm_in(x)), self.resample))
        scale, shift = self.affine(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv_out(F.silu(torch.addcmul(shift, self.norm_out(h), scale + 1)))
        return cast(Tensor, self.attention(self.skip(_resample(x, self.resample)) + h))


class Attention(nn.Module):
    """Self-attention over pixels with a residual connection; heads of a fixed number of channels."""

    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        self.heads = channels // min(channels, head_channels)
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.project = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, height * width)
        # Each (B, heads, pixels, channels per head); fused kernels want the channels side by side.
        q, k, v = qkv.transpose(-1, -2).contiguous().unbind(1)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + cast(Tensor, self.project(h.transpose(-1, -2).reshape(b, c, height, width)))


def sinusoid(time: Tensor, width: int) -> Tensor:
    """Cosines and sines of `time` (B,) at geometrically spaced frequencies -> (B, width)."""
    half = width // 2
    steps = torch.arange(half, device=time.device, dtype=torch.float32) / half
    phase = time[:, None] * torch.exp(-math.log(MAX_PERIOD) * steps)
    return torch.cat([phase.cos(), phase.sin()], dim=1)


def _encoder(config: AdmConfig, embedding: int) -> tuple[nn.ModuleList, list[int]]:
    """The encoder's blocks, and the channels of all its outputs, the stem's first."""
    skips = [config.channels]
    blocks = nn.ModuleList()
    for depth, multiplier in enumerate(config.multipliers):
        if depth:
            blocks.append(Block(skips[-1], skips[-1], embedding, config.head_channels, resample="down"))
            skips.append(skips[-1])
        for _ in range(config.blocks):
            width = config.channels * multiplier
            attention = config.resolution // config.patch >> depth in config.attention
            blocks.append(Block(skips[-1], width, embedding, config.head_channels, attention=attention))
            skips.append(width)
    return blocks, skips


def _decoder(config: AdmConfig, embedding: int, skips: list[int]) -> nn.ModuleList:
    blocks = nn.ModuleList()
    remaining, width = list(skips), skips[-1]
    for depth, multiplier in reversed(list(enumerate(config.multipliers))):
        if depth < len(config.multipliers) - 1:
            blocks.append(Block(width, width, embedding, config.head_channels, resample="up"))
        for _ in range(config.blocks + 1):
            inputs, width = width + remaining.pop(), config.channels * multiplier
            attention = config.resolution // config.patch >> depth in config.attention
            blocks.append(Block(inputs, width, embedding, config.head_channels, attention=attention))
    return blocks


def _resample(x: Tensor, how: str) -> Tensor:
    if how == "down":
        return F.avg_pool2d(x, 2)
    return F.interpolate(x, scale_factor=2, mode="nearest") if how == "up" else x


def group_norm(channels: int) -> nn.GroupNorm:
    """A GroupNorm with the largest number of groups that divides the channels, at most 32, with at least 4 channels per group."""
    groups = max(g for g in range(1, 33) if channels % g == 0 and channels // g >= 4)
    return nn.GroupNorm(groups, channels, eps=1e-5)


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    """Set a layer to zero, so that its residual branch adds nothing at first."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(cast(Tensor, layer.bias))
    return layer


def _as_block(module: nn.Module) -> Block:
    return cast(Block, module)
