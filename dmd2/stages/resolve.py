"""A teacher from elsewhere becomes an artifact."""

from __future__ import annotations

import tempfile
from pathlib import Path

from dmd2.config import Config
from dmd2.errors import Refused
from dmd2.io.artifact import MANIFEST, Manifest, find_finished, read_manifest
from dmd2.io.staging import draft_artifact
from dmd2.io.storage import open_store
from dmd2.licence import stated_licence
from dmd2.stages.teach import teach


def resolve(config: Config, source: str, out: str, base: str = "", vae: str = "") -> Manifest:
    """Convert a teacher from elsewhere into a teacher folder. No code in it is executed; unknown weights, weights that are not finite,
    and teachers that draw one colour or values that are no numbers, are refused.

    Args:
        source: For sd15 and sdxl: a pipeline folder of diffusers with safetensors (local, gs://, or a name on the hub),
            or a single-file checkpoint (.safetensors). For edm: NVIDIA's pickle, read without running it.
        out: Folder to write the teacher to.
        base: For a single file: a pipeline folder of diffusers with the configs and tokenizers that belong to it.
        vae: Another VAE to use instead of the teacher's own, such as SDXL's fp16-fixed one.
    """
    from dmd2.io.tensors import check_files_finite
    from dmd2.model import load_network, write_network_json
    from dmd2.models.family import family_class
    from dmd2.parallel import ranks
    from dmd2.stages.networks import parameter_count
    from dmd2.stages.smoke_sample import check_draws

    with tempfile.TemporaryDirectory() as scratch:
        found = family_class(config.family).resolve(config.family, source, base, vae, Path(scratch))
        if done := find_finished(out, "teacher", config, found.inputs):
            return done
        with draft_artifact(out, "teacher", config, found.inputs) as draft:
            found.write(draft.path)
            check_files_finite(draft.path)
            write_network_json(draft.path, config.family, ())
            teacher = load_network(draft.path)
            teacher.network.to(ranks.device())
            check_draws(teacher, source)
            draft.facts |= {
                "parameters": parameter_count(teacher.network),
                "source": source,
            } | teacher.family.manifest_facts
            draft.facts |= stated_licence("teacher", source)
    return read_manifest(out, "teacher")


def resolve_or_teach(config: Config, source: str, data: str, out: str, base: str = "", vae: str = "") -> str:
    """The folder of the teacher of a pipeline run.

    `source` itself if it is a teacher folder; else `out`, with `source` resolved into it or, if `source` is empty, with
    a small teacher trained on the shards in `data`.
    """
    if not source:
        teach(config, data, out)
    elif open_store(source).version(MANIFEST):
        manifest = read_manifest(source, "teacher")
        if base or vae:
            raise Refused(
                f"{source} is a teacher folder already, so base and vae cannot be used; leave them out"
            )
        _check_teacher(source, manifest)
        return source
    else:
        resolve(config, source, out, base, vae)
    return out


def _check_teacher(folder: str, manifest: Manifest) -> None:
    """Refuse a finished teacher folder that draws nothing: it may have been made by other means than `resolve`."""
    from dmd2.io.tensors import check_finite
    from dmd2.parallel import ranks
    from dmd2.stages.networks import load_on_device
    from dmd2.stages.smoke_sample import check_draws

    teacher = load_on_device(folder, manifest, ranks.device())
    check_finite(teacher.network.state_dict(), folder)
    check_draws(teacher, folder)
