"""The pipeline: shards, teacher, distillation, evaluation, gate, package, report. Wiring only."""

from kfp import dsl

from components.distill.component import distill as distill_stage
from components.evaluate.component import evaluate
from components.gate.component import gate
from components.package_model.component import package_model
from components.report.component import report
from components.resolve_teacher.component import resolve_teacher
from components.shard_dataset.component import shard_dataset


@dsl.pipeline(name="dmd2-distill")
def distill(
    root: str, source: str = "digits", teacher: str = "", recipe: str = "edm-digits", overrides: str = ""
) -> None:
    """Distil a diffusion teacher into a one- or few-step student with DMD2.

    Args:
        root: Folder that receives everything the run makes.
        source: `digits`, or a folder of images with one sub-folder per class.
        teacher: Folder of a teacher; empty to train a small one on the source, for demos and tests.
        recipe: Name of a recipe, as `dmd2 --help` lists them.
        overrides: Fields of the recipe to replace, as `field=value`, separated by spaces.
    """
    settings = {"recipe": recipe, "overrides": overrides, "root": root}
    shards = shard_dataset(source=source, **settings).outputs["shards"]
    resolved = resolve_teacher(teacher=teacher, shards=shards, **settings).outputs["resolved"]
    run = distill_stage(shards=shards, teacher=resolved, **settings).outputs["run"]
    scores = evaluate(shards=shards, teacher=resolved, run=run, **settings).outputs["evaluation"]
    decision = gate(evaluation=scores, **settings)
    decision.set_caching_options(False)
    told = {"root": root, "shards": shards, "teacher": resolved, "run": run, "evaluation": scores}
    with dsl.If(decision.output == "accepted", name="accepted"):
        packaged = package_model(root=root, run=run, evaluation=scores)
        packaged.set_caching_options(False)
        report(decision=decision.output, **told).after(packaged)
    with dsl.Else(name="rejected"):
        report(decision=decision.output, **told)
