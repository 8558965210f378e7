"""Pairs of noise and the teacher's sample, for the regression warm-up of a one-step student."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dmd2.config import Config
from dmd2.io.artifact import Manifest, find_finished, read_manifest
from dmd2.io.staging import draft_artifact
from dmd2.licence import carried_licences
from dmd2.stages.inputs import prompts_digest, read_captions, sample_digests

if TYPE_CHECKING:
    import torch


def pairs(config: Config, data: str, teacher: str, out: str, prompts: str = "") -> Manifest:
    """Sample the teacher and store pairs of noise and sample, for the regression that warms up a one-step student.

    Interrupted, the same command continues.

    Args:
        data: Folder of shards or latents, whose captions are sampled.
        teacher: Folder of the teacher.
        out: Folder to write the pairs to.
        prompts: File of prompts to sample instead of the captions.
    """
    samples, teacher_manifest = read_manifest(data, "shards", "latents"), read_manifest(teacher, "teacher")
    inputs = sample_digests(samples) | {"teacher": teacher_manifest.digest} | prompts_digest(prompts)
    if done := find_finished(out, "pairs", config, inputs):
        return done
    from dmd2.data.loader import Shards
    from dmd2.data.pairs import write_pairs
    from dmd2.data.prompts import read_prompts
    from dmd2.data.shard_table import TRAIN, register_shards
    from dmd2.parallel import ranks
    from dmd2.stages.networks import load_on_device

    model, settings = load_on_device(teacher, teacher_manifest, ranks.device()), config.pairs
    texts = (
        read_prompts(prompts) if prompts else read_captions(Shards(data, TRAIN, samples.kind), settings.count)
    )

    def sample(part: Sequence[str], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        return model.pairs(part, seed, settings.steps, settings.guidance)

    with draft_artifact(out, "pairs", config, inputs, resumable=True) as draft:
        results = write_pairs(config, texts, sample, draft)
        draft.facts |= {"classes": [""], "images": settings.count, "guidance": settings.guidance}
        draft.facts |= register_shards([result.shard for result in results], draft)
        draft.facts |= carried_licences(samples)
    return read_manifest(out, "pairs")
