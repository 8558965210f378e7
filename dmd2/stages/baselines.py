"""The models that an evaluation compares the student with: other runs, packages and teachers, and pipelines of diffusers.

A baseline draws the same prompts as student and teacher, from the same noise where it has the same shape, in its own number of
steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmd2.config import Config
from dmd2.errors import Refused
from dmd2.evaluation.baselines import BASELINE, Baseline, parse_baselines
from dmd2.evaluation.scores import ImageSet
from dmd2.io.artifact import MANIFEST, Manifest, read_manifest
from dmd2.io.hub import HUB_NAME
from dmd2.io.storage import exists, join_uri
from dmd2.models.family import Prompt
from dmd2.models.pipeline import find_pipeline
from dmd2.sampler import ELEMENTS
from dmd2.stages.image_sets import Network, SampledSet, precision
from dmd2.stages.pictures import Sampler


def baseline_digests(config: Config) -> dict[str, str]:
    """{name of a baseline: digest of its weights and settings}."""
    return {each.name: _digest(each, config) for each in parse_baselines(config.evaluate.baselines)}


def baseline_sets(config: Config, digests: Mapping[str, str], device: torch.device) -> dict[str, SampledSet]:
    """{name: set of images}, with what samples it."""
    found = {}
    for each in parse_baselines(config.evaluate.baselines):
        artifact = _artifact(each)
        steps, calls, sampler = (
            _of_artifact(each, artifact, config, device) if artifact else _of_pipeline(each, config, device)
        )
        pins = {BASELINE: digests[each.name], "steps": steps, "guidance": each.guidance}
        found[each.name] = SampledSet(ImageSet(each.name, BASELINE, steps, calls), sampler, pins)
    return found


def _artifact(baseline: Baseline) -> Manifest | None:
    """The manifest of a run, package or teacher; None of a pipeline."""
    source = baseline.source
    if (HUB_NAME.fullmatch(source) and not exists(source)) or not exists(join_uri(source, MANIFEST)):
        return None
    return read_manifest(source, "run", "package", "teacher")


def _digest(baseline: Baseline, config: Config) -> str:
    if artifact := _artifact(baseline):
        return artifact.digest
    if config.family.prompts == "classes":
        raise Refused(
            f"the baseline {baseline.name} ({baseline.source}) is no run, package or teacher, and pipelines of diffusers are asked by texts, "
            "not by classes; give the folder of one of these"
        )
    if not baseline.steps:
        raise Refused(
            f"the baseline {baseline.name} is a pipeline of diffusers, which does not say in how many steps it is used; add them: "
            f"{baseline.name}={baseline.source}:STEPS"
        )
    return find_pipeline(baseline.source).digest


def _of_artifact(
    baseline: Baseline, made: Manifest, config: Config, device: torch.device
) -> tuple[int, int, Sampler]:
    """(steps, network calls, sampler) of a run, a package or a teacher."""
    network = Network(baseline.source, made, device)
    has, needs = network.shape.config, config.family
    if (has.image, has.prompts) != (needs.image, needs.prompts):
        raise Refused(
            f"the baseline {baseline.name} draws images {has.image} of {has.prompts}, and this evaluation is about {needs.image} of "
            f"{needs.prompts}; leave it out"
        )
    if made.kind == "teacher":
        return _of_teacher(baseline, network, config)
    most = len(network.shape.timesteps)
    if baseline.steps > most or baseline.guidance != 1:
        raise Refused(
            f"the baseline {baseline.name} is a student of {most} steps without guidance; give at most so many, and no guidance"
        )
    steps = baseline.steps or most

    def sample(prompts: Sequence[Prompt], seed: int) -> Tensor:
        model = network.load()
        return replace(model, timesteps=model.timesteps[:steps]).sample(prompts, seed)

    return steps, steps, sample


def _of_teacher(baseline: Baseline, network: Network, config: Config) -> tuple[int, int, Sampler]:
    steps = baseline.steps or config.evaluate.teacher_steps

    def sample(prompts: Sequence[Prompt], seed: int) -> Tensor:
        return network.load().sample_teacher(prompts, seed, steps, baseline.guidance)

    return steps, network.shape.family.teacher_calls(steps, baseline.guidance), sample


def _of_pipeline(baseline: Baseline, config: Config, device: torch.device) -> tuple[int, int, Sampler]:
    _, height, width = config.family.image
    stride = max(1, config.family.vae_stride)
    together = max(1, min(64, ELEMENTS * stride**2 // (4 * height * width)))

    def sample(prompts: Sequence[Prompt], seed: int) -> Tensor:
        pipe, noise = _load(baseline.source, device), torch.Generator().manual_seed(seed)
        settings: dict[str, Any] = {"height": height, "width": width, "num_inference_steps": baseline.steps}
        settings |= {"guidance_scale": baseline.guidance, "generator": noise, "output_type": "np"}
        starts = range(0, len(prompts), together)
        parts = [pipe(prompt=list(prompts[start : start + together]), **settings).images for start in starts]
        return _as_images(np.concatenate(parts), baseline)

    calls = find_pipeline(baseline.source).calls(baseline.steps, baseline.guidance)
    return baseline.steps, calls, sample


@lru_cache(maxsize=1)
def _load(source: str, device: torch.device) -> Any:
    """One pipeline is in memory at a time."""
    return find_pipeline(source).load(device, precision(device))


def _as_images(pixels: np.ndarray, baseline: Baseline) -> Tensor:
    """float (B, H, W, 3) in [0, 1] -> uint8 (B, 3, H, W)."""
    if not np.isfinite(pixels).all():
        raise Refused(
            f"the baseline {baseline.name} draws infinite or NaN values; check its weights and precision ({baseline.source})"
        )
    return torch.from_numpy((255 * pixels + 0.5).astype(np.uint8)).permute(0, 3, 1, 2)
