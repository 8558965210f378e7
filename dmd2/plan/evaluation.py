"""What the evaluation of a recipe costs: the calls of student and teacher for every set of images, the VAE, the feature networks.

The network's FLOPs are those of the training's own call without gradient, the decoder's are counted on the meta device. An evaluation
samples in bfloat16 and decodes in float32, whose convolutions run in TF32.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from dmd2.config import Config
from dmd2.evaluation import metrics
from dmd2.evaluation.baselines import parse_baselines
from dmd2.evaluation.scores import sets_to_sample
from dmd2.models.family import ModelFamily
from dmd2.plan.hardware import LIKELY, TERA, Gpu
from dmd2.plan.passes import PassCost
from dmd2.sampler import ELEMENTS

MEASURE_TFLOP = {"features": 0.0114, "classes": 0.0114, "clip": 0.53}
"""{measurement: TFLOP for an image}: Inception-v3 at 299 pixels; ViT-g/14 at 224."""
REAL_SETS = 2
"""Reference images, and training images."""
Seconds = dict[str, float]
"""{part: predicted seconds of one GPU}."""


def evaluation_seconds(config: Config, fam: ModelFamily, call: PassCost, gpu: Gpu) -> Seconds:
    """Predicted seconds of one GPU by part; with `call`, a call of the network without gradient, which those of baselines are taken to
    be like."""
    settings = config.evaluate
    sets = sets_to_sample(config, len(config.distill.student_timesteps), fam)
    batch = max(1, min(64, settings.batch, ELEMENTS // math.prod(fam.shape)))
    reached = gpu.efficiency.eager * TERA
    seconds = max(call.flops / call.rows / (gpu.bf16 * reached), call.kernels * LIKELY.kernel_s / batch)
    calls = {"student": 0, "teacher": 0}
    for one in sets:
        calls["teacher" if one.recipe == "teacher" else "student"] += one.calls
    if baselines := parse_baselines(settings.baselines):
        calls["baselines"] = sum(each.calls or len(config.distill.student_timesteps) for each in baselines)
    measured = sum(
        MEASURE_TFLOP.get(name, 0.0) for name in {m.reads for m in metrics.select(settings.metrics)}
    )
    rate = gpu.tf32 * reached
    per_image = {name: count * seconds for name, count in calls.items()}
    sampled = len(sets) + len(baselines)
    per_image["VAE decoder"] = sampled * decoder_flops(config) / rate
    per_image["feature networks"] = (sampled + REAL_SETS) * measured * TERA / rate
    return {name: settings.images * each for name, each in per_image.items()}


def decoder_flops(config: Config) -> int:
    """For one image, by the VAE of Stable Diffusion; 0 for a network on pixels."""
    stride = config.family.vae_stride
    return _decoder_flops(config.family.image[1] // stride, stride) if stride else 0


@cache
def _decoder_flops(side: int, stride: int) -> int:
    from diffusers import AutoencoderKL

    make: type = AutoencoderKL
    widths = (128, 256, 512, 512)[: 1 + round(math.log2(stride))]
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
    }
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae = make(block_out_channels=widths, layers_per_block=2, latent_channels=4, **blocks)
        vae.decode(torch.zeros(1, 4, side, side))
    return counter.get_total_flops()
