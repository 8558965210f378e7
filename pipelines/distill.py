"""The distillation pipeline: shards, teacher, latents, distillation, evaluation, gate, package, report. Wiring only."""

from kfp import dsl

from components.distill.component import distill as distill_stage
from components.encode_latents.component import encode_latents
from components.evaluate.component import evaluate
from components.finish_run.component import finish_run
from components.gate.component import gate as gate_stage
from components.package_model.component import package_model
from components.prepare_run.component import prepare_run
from components.publish_model.component import publish_model
from components.report.component import report
from components.resolve_teacher.component import resolve_teacher
from components.shard_dataset.component import shard_dataset
from dmd2.recipes import RECIPES
from pipelines.pods import BUSY, HEAVY, LIGHT, on_gpus, pod

H100 = {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}


@dsl.pipeline(name="dmd2-distill")
def distill(
    source: str = "digits",
    teacher: str = "",
    recipe: str = "edm-digits",
    overrides: str = "",
    gate: float = 0.0,
    destination: str = "",
    root: str = "",
    nodes: int = 1,
    gpus: int = 8,
    pool: dict = H100,  # type: ignore[type-arg]
    queue: str = "dmd2",
    claim: str = "",
) -> None:
    """Distil a diffusion teacher into a one- or few-step student with DMD2.

    Args:
        source: `digits`, or the address of images in a layout that `dmd2 shard` reads.
        teacher: Folder of a teacher, a pipeline of diffusers, or a checkpoint; empty to train a small one on the source.
        recipe: Name of a recipe, as `dmd2 --help` lists them.
        overrides: Fields of the recipe to replace, as `field=value`, separated by spaces.
        gate: Largest accepted score of the student as a multiple of the teacher's; 0 for the recipe's `gate.factor`.
        destination: Folder of models; an accepted package is published there as `<recipe>/<digest>`. Empty: it is not published.
        root: Folder of everything the run makes; the same root continues a run. Empty: a folder beside the run's KFP artifacts.
        nodes: Number of machines of the distillation; only 1 is supported.
        gpus: Number of GPUs of the distillation, one process on each; 0 = one process on the CPU.
        pool: Labels of the nodes with GPUs, as JSON; `{}` = any node.
        queue: Kueue's LocalQueue for a distillation on more than one machine.
        claim: Set by retraining for the runs that it starts; leave it empty.
    """
    run = dsl.PIPELINE_JOB_ID_PLACEHOLDER
    finished = pod(finish_run(root=root, run_id=run, claim=claim), LIGHT, retries=2)
    with dsl.ExitHandler(finished, name="distil"):
        prepared = prepare_run(
            root=root, run_id=run, claim=claim, source=source, teacher=teacher, recipe=recipe, overrides=overrides,
            destination=destination, nodes=nodes, gpus=gpus,
        )  # fmt: skip
        pod(prepared, LIGHT)
        folder, gpu = prepared.outputs["root"], prepared.outputs["gpu"]
        settings = {"recipe": recipe, "overrides": overrides, "root": folder}

        sharded = pod(shard_dataset(source=source, **settings), BUSY, retries=2)
        shards = sharded.outputs["shards"]
        resolved = resolve_teacher(teacher=teacher, shards=shards, **settings)
        original = on_gpus(pod(resolved, BUSY, retries=2), gpu, pool).outputs["resolved"]
        encoded = encode_latents(shards=shards, teacher=original, **settings)
        samples = on_gpus(pod(encoded, BUSY, retries=2), gpu, pool).outputs["samples"]
        distilled = distill_stage(
            samples=samples, teacher=original, nodes=nodes, gpus=gpus, queue=queue, **settings
        )
        student = on_gpus(pod(distilled, HEAVY, retries=3), gpus, pool).outputs["run"]
        judged = evaluate(shards=shards, teacher=original, run=student, **settings)
        scores = on_gpus(pod(judged, BUSY, retries=2), gpu, pool).outputs["evaluation"]
        decision = pod(gate_stage(evaluation=scores, factor=gate, **settings), LIGHT)

        made = {"root": folder, "shards": shards, "teacher": original, "run": student, "evaluation": scores}
        with dsl.If(decision.output == "accepted", name="accepted"):
            packaged = package_model(root=folder, run=student, evaluation=scores)
            package = pod(packaged, BUSY).outputs["package"]
            pod(report(decision=decision.output, **made), LIGHT).after(packaged)
            with dsl.If(destination != "", name="published"):
                published = publish_model(destination=destination, recipe=recipe, package=package)
                pod(published, LIGHT, retries=2)
        with dsl.Else(name="rejected"):
            pod(report(decision=decision.output, **made), LIGHT)


def _restrict_recipes() -> None:
    """Restrict the parameter `recipe` to the known recipes, in the form of the UI and on the server; the SDK cannot express it."""
    parameter = distill.pipeline_spec.root.input_definitions.parameters["recipe"]
    for name in RECIPES:
        parameter.literals.add().string_value = name


_restrict_recipes()
