"""Samples of a trained model as a picture grid."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from dmd2.config import FamilyConfig
from dmd2.errors import Refused
from dmd2.io.artifact import Manifest, read_manifest

if TYPE_CHECKING:
    from dmd2.model import Model
    from dmd2.models.family import Prompt

logger = logging.getLogger(__name__)


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
        count: Number of images.
        seed: Seed of the noise.
        labels: Classes, repeated to `count`; all classes in turn if none are given.
        prompts: Texts, repeated to `count`, for networks that are conditioned on text.
        steps: Number of steps; 0 = all of the student's timesteps, or 30 of a teacher. A student may take fewer.
        guidance: Scale of the teacher's classifier-free guidance; a student has none.
    """
    if count < 1:
        raise Refused(f"count is {count}; draw at least one image")
    if steps < 0:
        raise Refused(f"steps is {steps}; give a positive number, or 0 for the usual one")
    manifest = read_manifest(package, "package", "run", "teacher")
    from dmd2.encoders.text import count_cut_texts
    from dmd2.image_grid import image_grid
    from dmd2.parallel import ranks
    from dmd2.stages.networks import load_on_device
    from dmd2.stages.output_file import local_output
    from dmd2.stages.pictures import save_png

    model = load_on_device(package, manifest, ranks.device())
    choices: list[Prompt] = [*prompts, *labels] or _default_prompts(model.config, manifest)
    conditions = list(itertools.islice(itertools.cycle(choices), count))
    with count_cut_texts() as cut:
        if manifest.kind == "teacher":
            images = model.sample_teacher(conditions, seed, steps or 30, guidance)
        else:
            if guidance != 1:
                raise Refused(f"guidance is {guidance}; it is distilled into a student, so leave it out")
            images = replace(model, timesteps=_first_timesteps(model, steps)).sample(conditions, seed)
    if said := cut.describe(len(set(conditions)), "prompts"):
        logger.warning(said)
    with local_output(out) as path:
        save_png(image_grid(images, min(len(choices), 10)), path)
    return out


def _first_timesteps(model: Model, steps: int) -> tuple[int, ...]:
    """The first `steps` of the student's timesteps, or all of them for 0."""
    if steps > len(model.timesteps):
        raise Refused(
            f"steps is {steps}; this student was made for {len(model.timesteps)}, and may take fewer"
        )
    return model.timesteps[: steps or len(model.timesteps)]


def _default_prompts(family: FamilyConfig, manifest: Manifest) -> list[Prompt]:
    """All classes, or the preview prompts of the run that the network comes from."""
    if family.prompts == "classes":
        return list(range(family.classes))
    if not (prompts := manifest.facts.get("prompts")):
        raise Refused("this network is conditioned on text; give --prompts")
    return list(prompts)
