"""The samples and prompts that a stage reads, and their digests, which its output records as inputs."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from dmd2.config import Config
from dmd2.data.prompts import read_prompts
from dmd2.errors import Refused
from dmd2.io.artifact import Manifest, read_manifest

if TYPE_CHECKING:
    from dmd2.data.loader import Shards


def read_training_samples(config: Config, data: str) -> Manifest:
    """The manifest of what a network of this recipe trains on: shards of images, or of latents."""
    return read_manifest(data, "latents" if config.family.vae_stride else "shards")


def sample_digests(samples: Manifest) -> dict[str, str]:
    """{kind: digest} of the samples and, for latents, of the shards they were encoded from."""
    return {samples.kind: samples.digest} | {k: v for k, v in samples.inputs.items() if k == "shards"}


def prompts_digest(prompts: str) -> dict[str, str]:
    """{"prompts": sha256 of the texts} of a file of prompts; empty without a file."""
    if not prompts:
        return {}
    return {"prompts": hashlib.sha256(json.dumps(read_prompts(prompts)).encode()).hexdigest()}


def read_captions(shards: Shards, count: int) -> list[str]:
    """The captions of the first `count` samples that have one."""
    captions = [text for text in shards.evenly_spaced(count).text if text]
    if not captions:
        raise Refused(
            f"{shards.uri} has no captions to draw; give --prompts, or shard a source with captions"
        )
    return captions
