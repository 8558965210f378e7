"""The pipeline: shards, teacher, latents, distillation, evaluation, gate, package, report. Wiring only."""

from kfp import dsl

from components.distill.component import distill as distill_stage
from components.encode_latents.component import encode_latents
from components.evaluate.component import evaluate
from components.gate.component import gate
from components.package_model.component import package_model
from components.report.component import report
from components.resolve_teacher.component import resolve_teacher
from components.shard_dataset.component import shard_dataset


def uncached(task: dsl.PipelineTask) -> dsl.PipelineTask:
    return task.set_caching_options(False)


@dsl.pipeline(name="dmd2-distill")
def distill(
    root: str, source: str = "digits", teacher: str = "", recipe: str = "edm-digits", overrides: str = ""
) -> None:
    """Distil a diffusion teacher into a one- or few-step student with DMD2.

    Args:
        root: Folder that receives everything the run makes.
        source: `digits`, or the address of images in one of the layouts that `dmd2 shard` knows.
        teacher: Folder of a teacher, a pipeline of diffusers, or a checkpoint; empty to train a small one on the source.
        recipe: Name of a recipe, as `dmd2 --help` lists them.
        overrides: Fields of the recipe to replace, as `field=value`, separated by spaces.
    """
    # No caching anywhere: a hit would not look whether the folder is still there, and a stage that is done returns at once.
    settings = {"recipe": recipe, "overrides": overrides, "root": root}
    shards = uncached(shard_dataset(source=source, **settings)).outputs["shards"]
    resolved = uncached(resolve_teacher(teacher=teacher, shards=shards, **settings)).outputs["resolved"]
    samples = uncached(encode_latents(shards=shards, teacher=resolved, **settings)).outputs["samples"]
    run = uncached(distill_stage(samples=samples, teacher=resolved, **settings)).outputs["run"]
    judged = uncached(evaluate(shards=shards, teacher=resolved, run=run, **settings))
    scores = judged.outputs["evaluation"]
    decision = uncached(gate(evaluation=scores, **settings))
    told = {"root": root, "shards": shards, "teacher": resolved, "run": run, "evaluation": scores}
    with dsl.If(decision.output == "accepted", name="accepted"):
        packaged = uncached(package_model(root=root, run=run, evaluation=scores))
        uncached(report(decision=decision.output, **told)).after(packaged)
    with dsl.Else(name="rejected"):
        uncached(report(decision=decision.output, **told))
