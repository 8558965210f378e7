"""A teacher from elsewhere becomes an artifact."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from dmd2.config import Config, EdmConfig
from dmd2.io.artifact import MANIFEST, Manifest, find_finished, read_manifest
from dmd2.io.local import sha256
from dmd2.io.staging import draft_artifact
from dmd2.io.storage import fetch_file, local_path, open_store
from dmd2.stages.teach import teach


def resolve(config: Config, source: str, out: str, base: str = "", vae: str = "") -> Manifest:
    """Convert a teacher from elsewhere into a teacher folder. No code in it is executed; unknown weights are refused.

    Args:
        source: For sd15 and sdxl: a pipeline folder of diffusers with safetensors (local, gs://, or a name on the hub),
            or a single-file checkpoint (.safetensors). For edm: NVIDIA's pickle, read without running it.
        out: Folder to write the teacher to.
        base: For a single file: a pipeline folder of diffusers with the configs and tokenizers that belong to it.
        vae: Another VAE to use instead of the teacher's own, such as SDXL's fp16-fixed one.
    """
    from dmd2.model import load_network, write_network_json
    from dmd2.stages.networks import parameter_count

    with tempfile.TemporaryDirectory() as scratch:
        copy, inputs = _find_teacher(config, source, base, vae, Path(scratch))
        if done := find_finished(out, "teacher", config, inputs):
            return done
        with draft_artifact(out, "teacher", config, inputs) as draft:
            copy(draft.path)
            write_network_json(draft.path, config.family, ())
            teacher = load_network(draft.path)
            draft.facts |= {
                "parameters": parameter_count(teacher.network),
                "source": source,
            } | teacher.family.facts
    return read_manifest(out, "teacher")


def resolve_or_teach(config: Config, source: str, data: str, out: str) -> str:
    """The folder of the teacher of a pipeline run.

    `source` itself if it is a teacher folder; else `out`, with `source` resolved into it or, if `source` is empty, with
    a small teacher trained on the shards in `data`.
    """
    if not source:
        teach(config, data, out)
    elif open_store(source).version(MANIFEST) and read_manifest(source, "teacher"):
        return source
    else:
        resolve(config, source, out)
    return out


def _find_teacher(
    config: Config, source: str, base: str, vae: str, scratch: Path
) -> tuple[Callable[[Path], None], dict[str, str]]:
    """A function that copies the teacher into a folder, and the digests of its sources."""
    from dmd2.encoders.pipeline_folder import find
    from dmd2.models.convert import edm_pickle, single_file
    from dmd2.stages.networks import check_same_family
    from dmd2.training import build

    if isinstance(config.family, EdmConfig):
        path = fetch_file(source)
        network, weights = edm_pickle.edm_pickle(path)
        if network != config.family.network:
            check_same_family(config.family.model_copy(update={"network": network}), config)
        return lambda folder: build.family(config.family).save(weights, folder, ()), {"source": sha256(path)}
    if source.endswith((".safetensors", ".ckpt")):
        single_file.single_file(fetch_file(source), local_path(base) if base else None, scratch / "pipeline")
        source = str(scratch / "pipeline")
    pipeline = find(source, text=True, whole=True)
    other_vae = find(vae, text=False) if vae else None

    def copy(folder: Path) -> None:
        pipeline.copy(folder)
        if other_vae:
            other_vae.copy(folder)

    return copy, {"source": pipeline.digest} | ({"vae": other_vae.digest} if other_vae else {})
