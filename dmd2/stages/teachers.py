"""Stages that bring a teacher, or a student that was distilled elsewhere."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from dmd2.config import Config, EdmConfig
from dmd2.encoders.vae import find
from dmd2.errors import Refused
from dmd2.io.artifact import MANIFEST, Manifest, drafted, finished, read
from dmd2.io.storage import at, fetched, is_local, local, sha256
from dmd2.model import load_network, save_network, write_network_json
from dmd2.stages.common import classes, network_of, parameters, same_shape, student_of
from dmd2.stages.training import teach
from dmd2.training import build

PROMPTS = (
    "a photo of a red apple",
    "a portrait of an old sailor",
    "a small house by the sea",
    "a green parrot",
)
"""What the pictures of a student show that came without captions."""


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
        if done := finished(out, "teacher", config, inputs):
            return done
        with drafted(out, "teacher", config, inputs) as draft:
            bring(draft.path)
            write_network_json(draft.path, config.family, ())
            teacher = load_network(draft.path)
            draft.facts |= {
                "parameters": parameters(teacher.network),
                "source": source,
            } | teacher.family.facts
    return read(out, "teacher")


def a_teacher(config: Config, given: str, data: str, out: str) -> str:
    """The folder of the teacher: the one given if it is one already, what is given brought into `out`, or, with nothing
    given, a small one trained on the shards."""
    if not given:
        teach(config, data, out)
    elif at(given).generation(MANIFEST) and read(given, "teacher"):
        return given
    else:
        resolve(config, given, out)
    return out


def adopt(config: Config, source: str, teacher: str, out: str) -> Manifest:
    """Make a run of a student that was distilled elsewhere, to evaluate it, to package it, or to start from it.

    Args:
        source: Weights of a U-Net (.safetensors, or .bin, which is read as tensors only), a raw training folder of DMD2, or
            a LoRA in kohya's or diffusers' naming.
        teacher: Folder of the teacher it was distilled from.
        out: Folder to make.
    """
    from dmd2.models.convert import single_file

    path = local(source) if is_local(source) else fetched(source)
    if not path.exists():
        raise Refused(f"{source} does not exist; give weights, or a training folder")
    inputs = {"source": _content(path), "teacher": read(teacher, "teacher").digest}
    if done := finished(out, "run", config, inputs):
        return done
    model = network_of(teacher, read(teacher, "teacher"))
    same_shape(model.config, config)
    if isinstance(config.family, EdmConfig):
        network, weights = single_file.edm_student(path)
        same_shape(config.family.model_copy(update={"network": network}), config)
        prompts = classes(config.family)
    else:
        plain = {name.removeprefix("unet."): weight for name, weight in model.network.state_dict().items()}
        weights = {f"unet.{name}": w for name, w in single_file.unet_weights(path, plain).items()}
        prompts = list(PROMPTS)
    with drafted(out, "run", config, inputs) as draft:
        save_network(draft.path, student_of(model, config), weights)
        load_network(draft.path)
        draft.facts |= {"parameters": parameters(model.network), "adopted": source, "prompts": prompts}
    return read(out, "run")


def _found(
    config: Config, source: str, base: str, vae: str, scratch: Path
) -> tuple[Callable[[Path], None], dict[str, str]]:
    """How to bring a teacher into a folder, and the digest of what it is."""
    from dmd2.models.convert import single_file

    if isinstance(config.family, EdmConfig):
        path = fetched(source)
        network, weights = single_file.edm_pickle(path)
        if network != config.family.network:
            same_shape(config.family.model_copy(update={"network": network}), config)
        return lambda folder: build.family(config.family).save(weights, folder, ()), {"source": sha256(path)}
    if source.endswith((".safetensors", ".ckpt")):
        single_file.single_file(fetched(source), local(base) if base else None, scratch / "pipeline")
        source = str(scratch / "pipeline")
    networks = find(source, text=True, whole=True)
    other = find(vae, text=False) if vae else None

    def bring(folder: Path) -> None:
        networks.copy(folder)
        if other:
            other.copy(folder)

    return bring, {"source": networks.digest} | ({"vae": other.digest} if other else {})


def _content(path: Path) -> str:
    """Digest of a file, or of all files of a folder."""
    if path.is_file():
        return sha256(path)
    files = sorted(p for p in path.rglob("*") if p.is_file())
    told = [(str(p.relative_to(path)), sha256(p)) for p in files]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()
