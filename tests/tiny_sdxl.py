"""A tiny untrained SDXL pipeline and captioned pictures for it: fixtures of several tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

SMALL = (
    "family.resolution=32", "family.vae_stride=2", "data.holdout=6", "data.images_per_shard=10", "loader.shuffle_block=2",
    "distill.steps=6", "distill.batch=4", "engine.micro_batch=2", "distill.log_every=2", "distill.save_every=3",
    "distill.preview_every=6", "evaluate.images=6", "evaluate.teacher_steps=2", "evaluate.batch=6", "gate.factor=1e9",
    "pairs.count=10", "pairs.per_shard=4", "pairs.batch=2", "pairs.steps=2",
)  # fmt: skip
"""Overrides with which the emoji recipes take seconds; six images are evaluated with the features of EfficientNet."""
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 230)}


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SDXL pipeline with random weights: images of 32 pixels, latents of 4x16x16."""
    import torch
    from diffusers import AutoencoderKL

    from tests.emoji import teacher as emoji  # all three are slow to import

    torch.manual_seed(0)
    make: Any = AutoencoderKL
    vae = make(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )
    folder = tmp_path_factory.mktemp("pipeline")
    whole: Any = emoji.assembled(vae, ("a red square", "a green square", "a blue square"), (16, 32, 32))
    whole.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def stable15(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole Stable Diffusion 1.5 with random weights, and the VAE of the tiny SDXL: latents of 4x16x16."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    from dmd2.models.schedulers import SCHEDULER
    from dmd2.models.stable import published_pipeline
    from tests.emoji import teacher as emoji

    torch.manual_seed(0)
    words = emoji.tokenizer(("a red square", "a blue square"), pad="<|endoftext|>")
    cross = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        down_block_types=(cross[0], cross[0], "DownBlock2D"),
        up_block_types=("UpBlock2D", cross[1], cross[1]),
        attention_head_dim=2,
        cross_attention_dim=64,
        norm_num_groups=8,
    )
    make: Any = StableDiffusionPipeline
    whole = make(
        AutoencoderKL.from_pretrained(pipeline / "vae"),
        CLIPTextModel(emoji.text_config(words, 64)),
        words,
        unet,
        PNDMScheduler.from_config(json.loads((published_pipeline("sd15") / SCHEDULER).read_text())),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("stable15")
    whole.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 captioned pictures of 32 pixels: squares in three colours."""
    folder, rng, lines = tmp_path_factory.mktemp("squares"), np.random.default_rng(0), []
    for index in range(30):
        name = list(COLOURS)[index % 3]
        picture = np.full((32, 32, 3), 255, np.uint8)
        x, y = rng.integers(2, 14, 2)
        picture[y : y + 16, x : x + 16] = COLOURS[name]
        Image.fromarray(picture).save(folder / f"{index:02d}.png")
        lines.append(json.dumps({"file_name": f"{index:02d}.png", "text": f"a {name} square"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder
