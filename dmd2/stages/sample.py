"""Samples of a trained model as a picture grid."""

from __future__ import annotations

import itertools
from dataclasses import replace

from dmd2.config import EdmConfig, FamilyConfig
from dmd2.errors import Refused
from dmd2.image_grid import image_grid
from dmd2.io.artifact import Manifest, read_manifest
from dmd2.model import Model
from dmd2.models.family import Prompt
from dmd2.parallel import ranks
from dmd2.stages.networks import network_of, on
from dmd2.stages.output_file import delivered
from dmd2.stages.pictures import save_png


def sample(
    package: str,
    out: str,
    count: int = 80,
    seed: int = 0,
    labels: tuple[int, ...] = (),
    prompts: tuple[str, ...] = (),
    steps: int = 0,
    guidance: float = 1.0,
) -> str:
    """Sample a package, the student of a run, or a teacher into a picture grid.

    Args:
        package: Folder of a package, of a finished run, or of a teacher.
        out: PNG file to write.
        count: Images.
        seed: Seed of the noise.
        labels: Classes, repeated to `count`; all classes in turn if none are given.
        prompts: Texts, repeated to `count`; for networks that are told by text.
        steps: Steps; 0 = those of the student, or 30 of a teacher. A student of several steps may take fewer.
        guidance: Scale of a teacher's guidance; a student has none.
    """
    if count < 1:
        raise Refused(f"count is {count}; draw at least one image")
    if steps < 0:
        raise Refused(f"steps is {steps}; give a positive number, or 0 for the usual one")
    manifest = read_manifest(package, "package", "run", "teacher")
    model = on(ranks.device(), network_of(package, manifest))
    shown: list[Prompt] = [*prompts, *labels] or _any(model.config, manifest)
    wanted = list(itertools.islice(itertools.cycle(shown), count))
    if manifest.kind == "teacher":
        images = model.sample_teacher(wanted, seed, steps or 30, guidance)
    else:
        if guidance != 1:
            raise Refused(f"guidance is {guidance}; it is distilled into a student, so leave it out")
        images = replace(model, timesteps=_timesteps(model, steps)).sample(wanted, seed)
    with delivered(out) as path:
        save_png(image_grid(images, min(len(shown), 10)), path)
    return out


def _timesteps(model: Model, steps: int) -> tuple[int, ...]:
    """The first of the student's timesteps; more steps than it was made for are refused."""
    if steps > len(model.timesteps):
        raise Refused(
            f"steps is {steps}; this student was made for {len(model.timesteps)}, and may take fewer"
        )
    return model.timesteps[: steps or len(model.timesteps)]


def _any(family: FamilyConfig, manifest: Manifest) -> list[Prompt]:
    """What to show if nobody says."""
    if isinstance(family, EdmConfig):
        return list(range(family.classes))
    if not (prompts := manifest.facts.get("prompts")):
        raise Refused("this network is told by text; give --prompts")
    return list(prompts)
