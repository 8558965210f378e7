"""Reading and writing the networks of artifacts, and checking that a network fits a recipe or its samples.

Teachers, runs and packages keep their network in the same files, so one function reads it from any of them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from dmd2.config import Config
from dmd2.encoders.pipeline_folder import find_pipeline, text_digest
from dmd2.errors import Refused
from dmd2.io.artifact import Manifest, open_artifact, read_manifest
from dmd2.io.staging import Draft
from dmd2.io.tensors import load_tensors, save_tensors
from dmd2.model import Model, load_network, read_network_json, save_network
from dmd2.models.family import family_class
from dmd2.training import checkpoint
from dmd2.training.networks import Start

CRITIC = "critic.safetensors"
"""The critic of an adopted run, in full; other runs have it in their checkpoints."""


def load_artifact_model(folder: str, manifest: Manifest, weights: bool = True) -> Model:
    """The model of a teacher, a run or a package, on the CPU; only its network's files are fetched.

    With `weights=False` the network is on the meta device: its shapes without its numbers.
    """
    config, _ = read_network_json(open_artifact(folder, manifest, "network.json"))
    return load_network(open_artifact(folder, manifest, *family_class(config).files), weights)


def load_on_device(folder: str, manifest: Manifest, device: torch.device) -> Model:
    """`load_artifact_model` with the network on the given device."""
    model = load_artifact_model(folder, manifest)
    model.network.to(device)
    return model


def student_model(teacher: Model, config: Config) -> Model:
    """A model of the teacher's network that is called at the student's timesteps."""
    return replace(teacher, timesteps=config.distill.student_timesteps)


def starting_weights(run: str, weights: bool) -> Start | None:
    """The student of another run and, if that run has one, its critic without the discriminator head.

    Returns None without a run. `weights=False` is for ranks that receive their weights from rank 0: they read nothing.
    """
    if not run or not weights:
        return Start({}) if run else None
    manifest = read_manifest(run, "run")
    student = load_artifact_model(run, manifest).network.state_dict()
    if any(file.path == CRITIC for file in manifest.files):
        critic = load_tensors(open_artifact(run, manifest, CRITIC) / CRITIC)
        return Start(student, {name: weight.float() for name, weight in critic.items()})
    saved = sorted({f.path.rpartition("/")[0] for f in manifest.files if f.path.startswith("checkpoints/")})
    if not saved or not manifest.config or manifest.config.distill.lora:
        return Start(student)
    best = manifest.facts.get("best_step")
    folder = saved[-1] if best is None else f"checkpoints/{best:08d}"
    critic = checkpoint.load_object(open_artifact(run, manifest, f"{folder}/*") / folder, "critic")
    network = {k.removeprefix("network."): v for k, v in critic.items() if k.startswith("network.")}
    return Start(student, network or None)


def save_student(
    draft: Draft,
    config: Config,
    student: Model,
    result: dict[str, torch.Tensor],
    teacher: str,
    teacher_manifest: Manifest,
) -> None:
    """Write the whole network into the draft; with LoRA also the update alone, in the format of diffusers."""
    if config.distill.lora:
        from dmd2.models.lora import export_low_rank_update, merge_low_rank_update

        (draft.path / "lora").mkdir(exist_ok=True)
        update = draft.path / "lora" / "pytorch_lora_weights.safetensors"
        save_tensors(export_low_rank_update(result, config.distill.lora), update)
        base = student.family.weights(open_artifact(teacher, teacher_manifest))
        result = merge_low_rank_update(base, result, config.distill.lora)
    save_network(draft.path, student, result)


def save_extraction(draft: Draft, student: Model, teacher: str, rank: int) -> float:
    """Write the low-rank update of the teacher that comes closest to the student, in the format of diffusers -> the share of the
    squared change that it holds."""
    from dmd2.models.lora import extract_low_rank_update

    base = load_artifact_model(teacher, read_manifest(teacher, "teacher")).network.state_dict()
    whole, targets = student.network.state_dict(), student.family.lora_targets
    update, share = extract_low_rank_update(base, whole, targets, rank)
    (draft.path / "lora").mkdir(exist_ok=True)
    save_tensors(update, draft.path / "lora" / "pytorch_lora_weights.safetensors")
    return share


def check_same_vae(teacher: Path, samples: Manifest, data: str) -> None:
    """Raise Refused if the samples are latents of another VAE than the teacher's, which the teacher cannot read."""
    if samples.kind == "latents" and samples.facts["vae"] != find_pipeline(str(teacher), text=False).digest:
        raise Refused(
            f"the latents in {data} were made with another VAE than the teacher's; encode the shards again with --vae set to the teacher's folder"
        )


def check_same_text_encoders(teacher: Manifest, samples: Manifest, data: str) -> None:
    """Raise Refused if the samples have embeddings of other text encoders than the teacher's."""
    stored = samples.facts.get("text_encoders") if samples.kind == "latents" else None
    if stored and stored != text_digest({file.path: file.sha256 for file in teacher.files}):
        raise Refused(
            f"the captions in {data} were encoded with other text encoders than the teacher's; encode the shards again with --vae set to the "
            "teacher's folder, or without --encode.text"
        )


def parameter_count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())
