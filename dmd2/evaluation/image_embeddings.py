"""Embeddings of images by published networks of transformers: the images of CLIP for CMMD (Jayasumana et al. 2024), DINOv2 for the
Frechet distance of its features (Stein et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from torch import Tensor

from dmd2.config import EvaluateConfig
from dmd2.encoders.pipeline_folder import fetch_files, load_from_files, load_frozen
from dmd2.evaluation.classifier import rgb
from dmd2.evaluation.clip_score import PREPROCESSOR, WEIGHTS, Clip
from dmd2.evaluation.measurements import Measurement
from dmd2.io.local import sha256
from dmd2.models.family import Prompt

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
"""Width of CMMD's Gaussian kernel, and what its distance is multiplied by, as published."""


def gaussian_kernel(a: Tensor, b: Tensor) -> Tensor:
    """CMMD's kernel exp(-|x - y|^2 / (2 sigma^2)), of the last two axes."""
    return torch.exp(-torch.cdist(a, b).square() / (2 * CMMD_SIGMA**2))


def clip_images(settings: EvaluateConfig, device: torch.device) -> Measurement:
    """The embedding of each image by the CLIP of `evaluate.clip`, of length one."""
    clip = Clip(settings.clip, device)

    @torch.no_grad()
    def measure(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        pixels = clip.processor(images=list(rgb(images)), return_tensors="pt").pixel_values.to(device)
        hidden = clip.network.vision_model(pixel_values=pixels).pooler_output
        return torch.nn.functional.normalize(clip.network.visual_projection(hidden), dim=-1).cpu()

    return Measurement(measure, clip.digest, {"cmmd_model": f"{settings.clip}, sha256 {clip.digest[:12]}"})


def dinov2(settings: EvaluateConfig, device: torch.device) -> Measurement:
    """The class token of each image after the last layer norm of the DINOv2 of `evaluate.dinov2`."""
    folder = fetch_files(settings.dinov2, ["config.json", PREPROCESSOR, WEIGHTS])
    network = load_frozen(transformers.Dinov2Model, folder, WEIGHTS, device, torch.float32)
    processor = load_from_files(transformers.BitImageProcessor, folder, {PREPROCESSOR: folder / PREPROCESSOR})
    digest = sha256(folder / WEIGHTS)

    @torch.no_grad()
    def measure(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        pixels = processor(images=list(rgb(images)), return_tensors="pt").pixel_values.to(device)
        features: Tensor = network(pixel_values=pixels).pooler_output.cpu()
        return features

    return Measurement(measure, digest, {"dinov2_model": f"{settings.dinov2}, sha256 {digest[:12]}"})
