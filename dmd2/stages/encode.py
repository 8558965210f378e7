"""Shards of images become shards of latents."""

from __future__ import annotations

import logging
from functools import partial

from dmd2.config import Config
from dmd2.io.artifact import Manifest, find_finished, read_manifest
from dmd2.io.staging import draft_artifact
from dmd2.licence import carried_licences
from dmd2.stages.parts import parse_part, part_manifest, part_of_part

logger = logging.getLogger(__name__)


def encode(config: Config, data: str, vae: str, out: str, part: str = "") -> Manifest:
    """Encode the training images with a VAE, once, before training. Held-out images are not encoded.

    Started with torchrun or accelerate, each process encodes its share of the shards. To share the work among machines,
    give each a part, `--part 0/4` to `--part 3/4`; then run the command once without `--part`, which publishes the folder
    from the parts. The bytes do not depend on the number of processes or parts, on machines of one kind. Interrupted, the
    same command continues.

    Args:
        data: Folder of shards.
        vae: Folder of a diffusers AutoencoderKL, or of a pipeline that has one; local, gs://, or a name on the hub.
        out: Folder to write the latents to, local or gs://.
        part: `i/n`: only the i-th of n parts of the shards, counted from 0; empty = all.
    """
    from dmd2.data import latents
    from dmd2.data.loader import Shards
    from dmd2.data.shard_table import TRAIN, register_shards
    from dmd2.encoders.pipeline_folder import find_pipeline

    share, pipeline = parse_part(part), find_pipeline(vae, config.encode.text)
    images = read_manifest(data, "shards")
    inputs = {"shards": images.digest, "vae": pipeline.digest}
    if done := find_finished(out, "latents", config, inputs):
        return done
    state, shards = latents.distributed_state(), Shards(data, TRAIN, cache_gb=config.loader.cache_gb)
    encoder = latents.LatentEncoder.load(shards, config, pipeline, state.device)
    if state.is_main_process:
        logger.info(encoder.describe_disk_use())
    open_draft = partial(draft_artifact, out, "latents", config, inputs, resumable=True)
    if part or state.num_processes > 1:
        mine = part_of_part(share, (state.process_index, state.num_processes))
        with open_draft(part=True) as draft:
            written = latents.write_latents(encoder, draft, mine, show=state.is_main_process)
        state.wait_for_everyone()
        if part:
            return part_manifest("latents", config, inputs, {"part": part, "units": len(written)})
    if state.is_main_process:
        with open_draft() as draft:
            results = latents.write_latents(encoder, draft)
            draft.facts |= encoder.facts(pipeline, results)
            draft.facts |= register_shards((result.shard for result in results), draft)
            vae_only = find_pipeline(vae, text=False)
            vae_only.copy(draft.path)
            draft.facts["vae"] = vae_only.digest
            draft.facts |= carried_licences(images)
    state.wait_for_everyone()
    return read_manifest(out, "latents")


def encode_if_needed(config: Config, data: str, vae: str, out: str) -> str:
    """The folder of samples for `distill`: `data` for a network on pixels, else `out` with the encoded latents."""
    if not config.family.vae_stride:
        return data
    encode(config, data, vae, out)
    return out
