"""The samples and prompts that a stage reads, and their digests."""

from __future__ import annotations

import hashlib
import json

from dmd2.config import Config
from dmd2.data.prompts import read_prompts
from dmd2.data.stream import Shards
from dmd2.errors import Refused
from dmd2.io.artifact import Manifest, read_manifest


def samples_of(config: Config, data: str) -> Manifest:
    """Of what the network is trained on: shards of images, or of latents."""
    return read_manifest(data, "latents" if config.family.vae_stride else "shards")


def digests(samples: Manifest) -> dict[str, str]:
    """As an input; that of the images too, from which latents were made."""
    return {samples.kind: samples.digest} | {k: v for k, v in samples.inputs.items() if k == "shards"}


def digest_of(prompts: str) -> dict[str, str]:
    if not prompts:
        return {}
    return {"prompts": hashlib.sha256(json.dumps(read_prompts(prompts)).encode()).hexdigest()}


def captions(shards: Shards, count: int) -> list[str]:
    found = [text for text in shards.in_order(count).text if text]
    if not found:
        raise Refused(
            f"{shards.uri} has no captions to draw; give --prompts, or shard a source with captions"
        )
    return found
