"""The VAE that encodes images as latents and decodes latents to images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from dmd2.config import EncodeConfig
from dmd2.denoiser import tf32_on_gpus
from dmd2.encoders.pipeline_folder import (
    VAE_WEIGHTS,
    VAES,
    PipelineFiles,
    deterministic_encoding,
    find_pipeline,
    load_frozen,
    read_config,
)
from dmd2.errors import Refused
from dmd2.io.tensors import num_not_finite
from dmd2.parallel import ranks

MAX_DECODED_PIXELS = 8 * 256**2
"""Pixels that are decoded in one call, but at least one image: an image of 1024x1024 takes 4 GB in float32."""


class Vae:
    """A VAE, with the shift and scale between its latents z and the samples x of the diffusion model: x = (z - shift) * scale.

    `stride` is the number of pixels per latent along each side.
    """

    def __init__(self, pipeline: PipelineFiles, settings: EncodeConfig, device: torch.device) -> None:
        import diffusers

        kind = getattr(diffusers, read_config(pipeline.vae)["_class_name"])
        self.device, self.dtype = device, getattr(torch, settings.dtype)
        self.source, self.network = (
            pipeline.source,
            load_frozen(kind, pipeline.vae, VAE_WEIGHTS, device, self.dtype),
        )
        config = self.network.config
        if config.get("latents_mean") or config.get("latents_std"):
            raise Refused(f"{pipeline.vae} scales each channel apart (latents_mean), which is not supported")
        self.scale, self.shift = float(config.scaling_factor), float(config.get("shift_factor") or 0.0)
        blocks = config.get("block_out_channels") or config.encoder_block_out_channels
        self.stride = 2 ** (len(blocks) - 1)

    def moments_shape(self, image: tuple[int, ...]) -> tuple[int, int, int, int]:
        """Shape (2, c, h, w) of the moments of an image of shape (C, H, W).

        Raises:
            Refused: If the image does not fit, or the VAE can only decode.
        """
        if type(self.network).__name__ != VAES[0]:
            raise Refused(
                f"{self.source} holds an AutoencoderTiny, which can only decode; encode with the VAE of the teacher"
            )
        channels, height, width = image
        if height % self.stride or width % self.stride:
            raise Refused(
                f"the images have {height}x{width} pixels, and the VAE makes one latent of {self.stride}x{self.stride}; shard them again at a multiple of {self.stride}"
            )
        if channels not in (1, takes := self.network.config.in_channels):
            raise Refused(f"the images have {channels} channels, the VAE takes {takes}; shard them again")
        return 2, self.network.config.latent_channels, height // self.stride, width // self.stride

    @torch.inference_mode()
    def moments(self, images: Tensor) -> Tensor:
        """Images, uint8 (B, C, H, W) -> the moments of their posterior, float16 (B, 2, c, h, w) on the CPU.

        They are (mean - shift) * scale and std * scale. A grey image is repeated in all channels.
        """
        pixels = images.to(self.device).float() / 127.5 - 1
        pixels = pixels.expand(-1, self.network.config.in_channels, -1, -1)
        with deterministic_encoding(self.device):
            posterior = self.network.encode(pixels.to(self.dtype)).latent_dist
        mean = (posterior.mean.float() - self.shift) * self.scale
        std = torch.exp(0.5 * posterior.logvar.float()) * self.scale
        return torch.stack((mean, std), 1).half().cpu()

    def to_pixels(self, x: Tensor) -> Tensor:
        """Samples (B, c, h, w), scaled and shifted as by `moments` -> float32 (B, C, H, W) in [-1, 1], differentiable."""
        z = x.to(self.device, self.dtype) / self.scale + self.shift
        with tf32_on_gpus(self.device):  # as cuDNN's convolutions are; in float16 SDXL's decoder overflows
            pixels: Tensor = self.network.decode(z).sample
        return pixels.float()

    @torch.inference_mode()
    def decode(self, x: Tensor) -> Tensor:
        """Samples, as for `to_pixels` -> images, uint8 (B, C, H, W) on the CPU.

        Raises:
            Refused: Pixels are infinite or NaN, which would become black.
        """
        return torch.cat([_as_image(self._require_finite(part, x)) for part in self._pixels(x)])

    @torch.inference_mode()
    def decode_unchecked(self, x: Tensor) -> Tensor:
        """Like `decode`, but values that are not finite become black or white pixels."""
        return torch.cat([_as_image(part) for part in self._pixels(x)])

    def _pixels(self, x: Tensor) -> Iterator[Tensor]:
        """The pixels of a few samples after the other, as by `to_pixels`."""
        together = max(1, MAX_DECODED_PIXELS // (x.shape[-2] * x.shape[-1] * self.stride**2))
        yield from map(self.to_pixels, x.split(together))

    def _require_finite(self, pixels: Tensor, x: Tensor) -> Tensor:
        if count := num_not_finite(pixels):
            raise Refused(
                f"the VAE of {self.source} decodes samples up to {float(x.abs().max()):.3g} to {count} infinite or NaN values of "
                f"{pixels.numel()} in {str(self.dtype).removeprefix('torch.')}: its weights are damaged, or the samples are too "
                "large, as after a run that diverged; use another VAE, or an earlier checkpoint"
            )
        return pixels


def _as_image(pixels: Tensor) -> Tensor:
    return (pixels * 127.5 + 128).clamp(0, 255).to(torch.uint8).cpu()


def load_vae(folder: Path | str) -> Vae:
    """The VAE of a local folder, a bucket or the hub, in float32, on the device of this process."""
    return Vae(find_pipeline(str(folder), text=False), EncodeConfig(), ranks.device())
