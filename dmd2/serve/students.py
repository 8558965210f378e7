"""Loading the packages that a page serves, each with its teacher and a tiny VAE where they are given."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch

from dmd2.config import EvaluateConfig
from dmd2.encoders.safety import FILES, SafetyChecker
from dmd2.encoders.vae import Vae, load_vae
from dmd2.errors import Refused
from dmd2.io.artifact import Manifest, open_artifact
from dmd2.model import Model
from dmd2.parallel import ranks
from dmd2.provenance import PROVENANCE, digest_of_teacher
from dmd2.serve.drawing import Student, Teacher
from dmd2.stages.networks import load_on_device

Found = tuple[str, Manifest]
"""A folder and its manifest."""


def load_students(
    packages: Sequence[Found], teachers: Sequence[Found], tiny_vae: str, dtype: torch.dtype
) -> dict[str, Student]:
    """Name -> student. A student is named after its recipe, and by its digest too where two have one recipe.

    Raises:
        Refused: A teacher is that of no package, or the tiny VAE fits none.
    """
    names = _names([manifest for _, manifest in packages])
    of_packages = [teacher_digest(*package) for package in packages] if teachers else [""] * len(packages)
    for folder, manifest in teachers:
        if manifest.digest not in of_packages:
            raise Refused(
                f"{folder} is the teacher of none of the packages (its digest is {manifest.digest[:16]}); give the teachers they were distilled from"
            )
    vae = load_vae(tiny_vae) if tiny_vae else None
    loaded = {m.digest: Teacher(m.digest, _load((folder, m), dtype)) for folder, m in teachers}
    students = {
        name: replace(_student(name, package, dtype, vae), teacher=loaded.get(digest))
        for name, package, digest in zip(names, packages, of_packages, strict=True)
    }
    if vae and not any(student.tiny_vae for student in students.values()):
        raise Refused(f"no package draws latents that the tiny VAE in {tiny_vae} decodes; leave it out")
    return students


def teacher_digest(folder: str, manifest: Manifest) -> str:
    """Digest of the teacher that the student in a package or a run was distilled from."""
    if manifest.kind == "run":
        return manifest.inputs["teacher"]
    if all(file.path != PROVENANCE for file in manifest.files):
        raise Refused(
            f"{folder} has no {PROVENANCE}, so its teacher is not known; package the run again, or serve the run itself"
        )
    path = open_artifact(folder, manifest, PROVENANCE) / PROVENANCE
    return digest_of_teacher(json.loads(path.read_bytes()))


def _names(manifests: Sequence[Manifest]) -> list[str]:
    recipes = [manifest.config.recipe if manifest.config else manifest.kind for manifest in manifests]
    count = Counter(recipes)
    return [
        recipe if count[recipe] == 1 else f"{recipe} {manifest.digest[:8]}"
        for recipe, manifest in zip(recipes, manifests, strict=True)
    ]


def _load(found: Found, dtype: torch.dtype) -> Model:
    return replace(load_on_device(*found, ranks.device()), dtype=dtype)


def _student(name: str, package: Found, dtype: torch.dtype, vae: Vae | None) -> Student:
    """The student, and the VAE if it decodes its latents."""
    manifest, model = package[1], _load(package, dtype)
    evaluate = manifest.config.evaluate if manifest.config else EvaluateConfig()
    tiny = vae if vae and vae.stride == model.config.vae_stride else None
    return Student(name, manifest.digest, model, evaluate, tiny_vae=tiny, safety=_safety_checker(*package))


def _safety_checker(folder: str, manifest: Manifest) -> SafetyChecker | None:
    """That of the package, if it has one."""
    if not {file.path for file in manifest.files} >= {*FILES}:
        return None
    return SafetyChecker(open_artifact(folder, manifest, *FILES), ranks.device())
