"""The teacher's answers to noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dmd2.config import Config
from dmd2.data import latents
from dmd2.data.pairs import write_pairs
from dmd2.data.prompts import read_prompts
from dmd2.data.shards import TRAIN
from dmd2.data.stream import Shards
from dmd2.io.artifact import Manifest, find_finished, read_manifest
from dmd2.io.staging import draft_artifact
from dmd2.parallel import ranks
from dmd2.stages.inputs import captions, digest_of, digests
from dmd2.stages.networks import network_of, on


def pairs(config: Config, data: str, teacher: str, out: str, prompts: str = "") -> Manifest:
    """Sample the teacher, and keep noise and answer: what a one-step student learns from before it is distilled.

    Args:
        data: Folder of shards or latents, whose captions are sampled.
        teacher: Folder of the teacher.
        out: Folder to make. Killed, the same command continues.
        prompts: File of prompts to sample instead.
    """
    described, original = read_manifest(data, "shards", "latents"), read_manifest(teacher, "teacher")
    inputs = digests(described) | {"teacher": original.digest} | digest_of(prompts)
    if done := find_finished(out, "pairs", config, inputs):
        return done
    model, settings = on(ranks.device(), network_of(teacher, original)), config.pairs
    texts = (
        read_prompts(prompts) if prompts else captions(Shards(data, TRAIN, described.kind), settings.count)
    )

    def answer(part: Sequence[str], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        return model.pairs(part, seed, settings.steps, settings.guidance)

    with draft_artifact(out, "pairs", config, inputs, resumable=True) as draft:
        receipts = write_pairs(config, texts, answer, draft)
        draft.facts |= {"classes": [""], "images": settings.count, "guidance": settings.guidance}
        draft.facts["shards"] = latents.deliver(receipts, draft)
    return read_manifest(out, "pairs")
