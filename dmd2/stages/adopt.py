"""A student that was distilled elsewhere becomes a run."""

from __future__ import annotations

from dmd2.config import Config
from dmd2.errors import Refused
from dmd2.io.artifact import Manifest, find_finished, read_manifest
from dmd2.io.local import content_digest
from dmd2.io.staging import draft_artifact
from dmd2.io.storage import fetch_file
from dmd2.licence import carried_licences

PREVIEW_PROMPTS = (
    "a photo of a red apple",
    "a portrait of an old sailor",
    "a small house by the sea",
    "a green parrot",
)
"""Prompts of the pictures of an adopted student, which comes without captions."""


def adopt(config: Config, source: str, teacher: str, out: str) -> Manifest:
    """Make a run of a student that was distilled elsewhere, to evaluate it, to package it, or to start from it.

    Args:
        source: Weights of a U-Net (.safetensors, or .bin, which is read as tensors only), a whole model in one file, whose
            U-Net is taken, a LoRA in kohya's or diffusers' naming, a U-Net or pipeline folder of diffusers, or a training folder of the DMD2 reference code, whose critic is
            taken too. A training folder of a LoRA does not say its alpha, which is that of the recipe (--distill.lora.alpha).
        teacher: Folder of the teacher it was distilled from.
        out: Folder to write the run to.
    """
    path = fetch_file(source)
    if not path.exists():
        raise Refused(f"{source} does not exist; give weights, or a training folder")
    original = read_manifest(teacher, "teacher")
    inputs = {"source": content_digest(path), "teacher": original.digest}
    if done := find_finished(out, "run", config, inputs):
        return done
    from dmd2.io.tensors import check_finite, save_tensors
    from dmd2.model import load_network, save_network
    from dmd2.models.family import check_same_family
    from dmd2.stages.networks import CRITIC, load_artifact_model, parameter_count, student_model
    from dmd2.stages.prompts import grid_classes

    model = load_artifact_model(teacher, original)
    check_same_family(model.config, config.family)
    adopted = model.family.adopt(path, model.network.state_dict(), config.distill.lora)
    check_finite(adopted.student, source)
    prompts = grid_classes(config.family) if config.family.prompts == "classes" else list(PREVIEW_PROMPTS)
    with draft_artifact(out, "run", config, inputs) as draft:
        save_network(draft.path, student_model(model, config), adopted.student)
        if adopted.critic:
            save_tensors(adopted.critic, draft.path / CRITIC)
        load_network(draft.path)
        draft.facts |= {
            "parameters": parameter_count(model.network),
            "adopted": source,
            "critic": adopted.critic is not None,
            "prompts": prompts,
        } | carried_licences(original)
    return read_manifest(out, "run")
