"""A teacher from elsewhere becomes an artifact."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from dmd2.config import Config, EdmConfig
from dmd2.encoders.pipeline_folder import find
from dmd2.io.artifact import MANIFEST, Manifest, find_finished, read_manifest
from dmd2.io.local import sha256
from dmd2.io.staging import draft_artifact
from dmd2.io.storage import fetch_file, local_path, open_store
from dmd2.model import load_network, write_network_json
from dmd2.stages.networks import parameters, same_shape
from dmd2.stages.teach import teach
from dmd2.training import build


def resolve(config: Config, source: str, out: str, base: str = "", vae: str = "") -> Manifest:
    """Bring a teacher from elsewhere into a folder. Nothing of it is executed, and what is not understood is refused.

    Args:
        source: For sd15 and sdxl: a pipeline folder of diffusers with safetensors (local, gs://, or a name on the hub),
            or a single-file checkpoint (.safetensors). For edm: NVIDIA's pickle, read without running it.
        out: Folder to make.
        base: For a single file: a pipeline folder of diffusers whose configs and tokenizers it goes with.
        vae: Another VAE than the teacher's own, such as the fp16-fixed one of SDXL.
    """
    with tempfile.TemporaryDirectory() as scratch:
        bring, inputs = _found(config, source, base, vae, Path(scratch))
        if done := find_finished(out, "teacher", config, inputs):
            return done
        with draft_artifact(out, "teacher", config, inputs) as draft:
            bring(draft.path)
            write_network_json(draft.path, config.family, ())
            teacher = load_network(draft.path)
            draft.facts |= {
                "parameters": parameters(teacher.network),
                "source": source,
            } | teacher.family.facts
    return read_manifest(out, "teacher")


def a_teacher(config: Config, given: str, data: str, out: str) -> str:
    """The folder of the teacher: the one given if it is one already, what is given brought into `out`, or, with nothing
    given, a small one trained on the shards."""
    if not given:
        teach(config, data, out)
    elif open_store(given).generation(MANIFEST) and read_manifest(given, "teacher"):
        return given
    else:
        resolve(config, given, out)
    return out


def _found(
    config: Config, source: str, base: str, vae: str, scratch: Path
) -> tuple[Callable[[Path], None], dict[str, str]]:
    """How to bring a teacher into a folder, and the digest of what it is."""
    from dmd2.models.convert import edm_pickle, single_file

    if isinstance(config.family, EdmConfig):
        path = fetch_file(source)
        network, weights = edm_pickle.edm_pickle(path)
        if network != config.family.network:
            same_shape(config.family.model_copy(update={"network": network}), config)
        return lambda folder: build.family(config.family).save(weights, folder, ()), {"source": sha256(path)}
    if source.endswith((".safetensors", ".ckpt")):
        single_file.single_file(fetch_file(source), local_path(base) if base else None, scratch / "pipeline")
        source = str(scratch / "pipeline")
    networks = find(source, text=True, whole=True)
    other = find(vae, text=False) if vae else None

    def bring(folder: Path) -> None:
        networks.copy(folder)
        if other:
            other.copy(folder)

    return bring, {"source": networks.digest} | ({"vae": other.digest} if other else {})
