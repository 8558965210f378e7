"""Latents and ODE pairs of the DMD2 reference code become shards."""

from __future__ import annotations

from dmd2.config import Config
from dmd2.errors import Refused
from dmd2.io.artifact import Manifest, find_finished, read_manifest
from dmd2.io.local import content_digest
from dmd2.io.staging import draft_artifact
from dmd2.io.storage import fetch_file


def convert(config: Config, source: str, out: str, vae: str = "") -> Manifest:
    """Make latents of those that DMD2's reference code stores, with their captions, or pairs of its ODE pairs, with the embeddings
    of their prompts. Interrupted, the same command continues.

    Args:
        source: Folder of vae_latents_*.pt files, of which only tensors and texts are read, or of an LMDB of latents or ODE pairs.
        out: Folder to write the latents or pairs to.
        vae: Folder of the VAE that latents were made with, or of a pipeline that has it; the teacher's must be the same. Pairs
            need none.
    """
    if config.family.prompts != "texts" or not config.family.vae_stride:
        raise Refused(
            f"recipe {config.recipe!r} does not learn from latents with captions; choose one of sd15 or sdxl"
        )
    path = fetch_file(source)
    if not path.exists():
        raise Refused(f"{source} does not exist; give a folder of .pt files or of an LMDB")
    from dmd2.data import published_latents
    from dmd2.data.shard_table import register_shards
    from dmd2.encoders.pipeline_folder import find_pipeline
    from dmd2.models.family import make_family

    kind = "pairs" if published_latents.holds_pairs(path) else "latents"
    if kind == "latents" and not vae:
        raise Refused(f"{source} holds latents; give the VAE that they were made with as --vae")
    pipeline = find_pipeline(vae, text=False) if kind == "latents" else None
    used_vae = {"vae": pipeline.digest} if pipeline else {}
    inputs = {"source": content_digest(path)} | used_vae
    if done := find_finished(out, kind, config, inputs):
        return done
    parts = published_latents.find_parts(path, config.data.images_per_shard)
    with draft_artifact(out, kind, config, inputs, resumable=True) as draft:
        shape = make_family(config.family).shape
        results = published_latents.write_published_latents(parts, shape, draft)
        count = sum(result.shard.images for result in results)
        draft.facts |= {"classes": [""], "images": count, "shape": [2, *shape]} | used_vae
        draft.facts |= register_shards([result.shard for result in results], draft)
        if pipeline:
            pipeline.copy(draft.path)
        else:
            draft.facts["embeddings"] = True
    return read_manifest(out, kind)
