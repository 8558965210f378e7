"""The samples and prompts that a stage reads, and their digests, which its output records as inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dmd2.config import Config
from dmd2.data.prompts import read_prompts
from dmd2.errors import Refused
from dmd2.io.artifact import Manifest, read_manifest
from dmd2.io.local import json_digest

if TYPE_CHECKING:
    from dmd2.data.loader import Shards


def read_training_samples(config: Config, data: str) -> Manifest:
    """The manifest of what a network of this recipe trains on: shards of images, or of latents."""
    return read_manifest(data, "latents" if config.family.vae_stride else "shards")


def check_start(config: Config, start: str) -> None:
    """Raise Refused if the recipe starts from a run of another, and none is given."""
    if (first := config.distill.first_stage) != "teacher" and not start:
        raise Refused(
            f"recipe {config.recipe!r} starts from a run of {first}; give it as --start, or set --distill.first-stage teacher"
        )


def check_prompts(config: Config, prompts: str) -> None:
    """Raise Refused if a file of prompts is missing, or given to a recipe that cannot use it."""
    settings = config.distill
    if settings.fake_prompts == "list" and not prompts:
        raise Refused(
            f"recipe {config.recipe!r} draws the prompts of fake samples from a list; give a file as --prompts, or set --distill.fake-prompts independent to use the captions of the data"
        )
    if prompts and config.family.prompts == "classes":
        raise Refused("prompts are given, but this network is conditioned on classes; leave out --prompts")
    if prompts and (settings.regression or settings.inputs == "noised-real"):
        raise Refused(
            "prompts are given, but this recipe learns from samples with captions of their own; leave out --prompts"
        )


def sample_digests(samples: Manifest) -> dict[str, str]:
    """{kind: digest} of the samples and, for latents, of the shards they were encoded from."""
    return {samples.kind: samples.digest} | {k: v for k, v in samples.inputs.items() if k == "shards"}


def prompts_digest(prompts: str) -> dict[str, str]:
    """{"prompts": sha256 of the texts} of a file of prompts; empty without a file."""
    if not prompts:
        return {}
    return {"prompts": json_digest(read_prompts(prompts))}


def read_captions(shards: Shards, count: int) -> list[str]:
    """The captions of the first `count` samples that have one."""
    captions = [text for text in shards.evenly_spaced(count).text if text]
    if not captions:
        raise Refused(
            f"{shards.uri} has no captions to draw; give --prompts, or shard a source with captions"
        )
    return captions
