"""Checks of the parameters of a run, made before any stage is paid for."""

from __future__ import annotations

from components.distill.launch import JobSize
from dmd2 import recipes
from dmd2.config import Config
from dmd2.errors import Refused
from dmd2.evaluation import metrics
from dmd2.io.storage import open_store


def check_parameters(
    source: str, teacher: str, recipe: str, overrides: str, destination: str, nodes: int, gpus: int
) -> Config:
    """The Config of the run; raises Refused for parameters that a later stage would refuse."""
    config = recipes.resolve(recipe, overrides.split())
    if needs := recipes.needs(config):
        raise Refused(
            f"recipe {recipe!r} needs {' and '.join(needs)}, which this pipeline cannot give; run its stages with dmd2, or override distill.first_stage or distill.fake_prompts"
        )
    JobSize(nodes, gpus).check()
    metrics.select(config.evaluate.metrics)
    if destination:
        open_store(destination)
    if not teacher and not config.family.can_teach:
        raise Refused(f"recipe {recipe!r} needs a teacher; give a folder, a checkpoint or a name on the hub")
    if source == "digits" and config.family.prompts == "texts":
        raise Refused(f"recipe {recipe!r} needs images with captions; give their address as source")
    return config
