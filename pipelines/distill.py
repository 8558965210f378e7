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
from components.sample_pairs.component import sample_pairs
from components.shard_dataset.component import shard_dataset
from dmd2.recipes import RECIPES
from pipelines.parts import encode_parts, evaluate_parts, shard_parts
from pipelines.pods import (
    BUSY,
    COPYING,
    HEAVY,
    LIGHT,
    on_gpus,
    pod,
    requesting,
    with_hub,
    with_metrics,
    with_registry,
    with_signing_key,
)

H100 = {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}


@dsl.pipeline(name="pairs")
def pairs_if_needed(
    recipe: str,
    overrides: str,
    root: str,
    prompts: str,
    gpu: int,
    pool: dict,  # type: ignore[type-arg]
    samples: dsl.Input[dsl.Dataset],
    teacher: dsl.Input[dsl.Model],
) -> None:
    """Sample pairs for this recipe; nothing if its name is empty.

    A pipeline of its own, because kfp's local runner evaluates conditions on inputs of a pipeline and not on named outputs.
    """
    with dsl.If(recipe != "", name="needed"):
        sampled = sample_pairs(
            recipe=recipe,
            overrides=overrides,
            root=root,
            prompts=prompts,
            gpus=gpu,
            samples=samples,
            teacher=teacher,
        )  # gpu as an argument too, or the compiler would not give it to the condition
        on_gpus(pod(sampled, BUSY, retries=2), gpu, pool)


@dsl.pipeline(name="first-stage")
def first_stage_if_needed(
    recipe: str,
    overrides: str,
    root: str,
    prompts: str,
    pairs: str,
    nodes: int,
    gpus: int,
    pool: dict,  # type: ignore[type-arg]
    queue: str,
    where: str,
    price: float,
    budget: float,
    step_gpus: int,
    step_cpu: str,
    step_memory: str,
    step_pool: dict,  # type: ignore[type-arg]
    samples: dsl.Input[dsl.Dataset],
    teacher: dsl.Input[dsl.Model],
) -> None:
    """Distil by the recipe of the first stage, into `<root>/first`; nothing if its name is empty."""
    with dsl.If(recipe != "", name="needed"):
        distilled = distill_stage(
            recipe=recipe, overrides=overrides, root=root, folder="first", start="", pairs=pairs, prompts=prompts,
            price=price, budget=budget, nodes=nodes, gpus=gpus, pool=pool, queue=queue, where=where, samples=samples, teacher=teacher, run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
        )  # fmt: skip
        trained = requesting(pod(distilled, HEAVY, retries=3), step_cpu, step_memory)
        on_gpus(with_metrics(trained), step_gpus, step_pool)


@dsl.pipeline(name="dmd2-distill")
def distill(
    source: str = "digits",
    teacher: str = "",
    recipe: str = "edm-digits",
    overrides: str = "",
    first_overrides: str = "",
    start: str = "",
    prompts: str = "",
    pairs: str = "",
    base: str = "",
    vae: str = "",
    gate: float = 0.0,
    license: str = "",
    license_link: str = "",
    restrictions: str = "",
    safety_checker: str = "",
    low_rank: int = 0,
    destination: str = "",
    hub: str = "",
    model_registry: str = "",
    scores: str = "",
    root: str = "",
    nodes: int = 1,
    gpus: int = -1,
    pool: dict = H100,  # type: ignore[type-arg]
    budget: float = 0.0,
    price: float = 0.0,
    parts: int = 1,
    queue: str = "dmd2",
    claim: str = "",
) -> None:
    """Distil a diffusion teacher into a one- or few-step student with DMD2, with the stages that the recipe needs before.

    Args:
        source: `digits`, or the address of images in a layout that `dmd2 shard` reads.
        teacher: Folder of a teacher, a pipeline of diffusers, or a checkpoint; empty to train a small one on the source.
        recipe: Name of a recipe, as `dmd2 recipes` lists them.
        overrides: Fields of the recipe to replace, as `field=value`, separated by spaces. Those outside `distill` hold for a first stage too.
        first_overrides: The same for the first stage alone, where the recipe has one.
        start: Run to start from, with its student and its critic. Empty: the first stage that the recipe names is run before.
        prompts: File of prompts of the fake samples and pairs, which some recipes need (.txt, .jsonl, .csv, .parquet).
        pairs: Pairs of noise and sample for a recipe with a warm-up. Empty: the teacher is sampled.
        base: For a teacher in a single file: a pipeline folder of diffusers with its configs and tokenizers.
        vae: Another VAE to use instead of the teacher's own, such as one that was mended for float16.
        gate: Largest accepted score of the student as a multiple of the teacher's; 0 for the recipe's `gate.factor`.
        license: Licence of the student's weights, an identifier of the Hugging Face Hub, for the model card. Empty: that of the teacher, if it says one.
        license_link: Address of its text.
        restrictions: What users must not do, for the model card.
        safety_checker: Pipeline of Stable Diffusion 1.5 (folder, gs:// or name on the hub) whose safety checker the package gets. Empty: none.
        low_rank: Rank of a LoRA that is extracted from a student of sd15 or sdxl whose whole network was trained, as a further form of it; 0: none.
        destination: Folder of models; an accepted package is published there as `<recipe>/<digest>`. Empty: it is not published.
        hub: Repository of the Hugging Face Hub, `hf://owner/name`, where it is published too; the token is in the Secret `dmd2-hub-token`. Empty: none.
        model_registry: Address of a Kubeflow Model Registry in which the published package is noted. Empty: none.
        scores: Folder that keeps the scores of teachers, so that a teacher is sampled once for all its students. Empty: none are kept.
        root: Folder of everything the run makes; the same root continues a run. Empty: a folder beside the run's KFP artifacts, which a TrainJob may not be allowed to write.
        nodes: Number of machines of the distillation. More than 1 needs Kubeflow Trainer, and the account `launcher`.
        gpus: Number of GPUs of the distillation, one process on each; 0 = one process on the CPU, -1 = the recipe decides; without a cluster, all GPUs of the machine.
        pool: Labels of the nodes with GPUs, as JSON; `{}` = any node.
        budget: Largest number of GPU-hours that the trainings may take by their plan, which needs a GPU; 0 = no limit.
        price: Price of a GPU for an hour in any currency, for the cost in the plan.
        parts: Number of pods that share the sharding, and those that share encoding and evaluating, each with a GPU; the results are the same.
        queue: Kueue's LocalQueue of a distillation in a TrainJob; empty = it is not queued.
        claim: Set by retraining for the runs that it starts; leave it empty.
    """
    run = dsl.PIPELINE_JOB_ID_PLACEHOLDER
    shipped = {
        "license": license, "license_link": license_link, "restrictions": restrictions, "safety_checker": safety_checker,
        "low_rank": low_rank,
    }  # fmt: skip
    finished = pod(finish_run(root=root, run_id=run, claim=claim, price=price), LIGHT, retries=2)
    with dsl.ExitHandler(finished, name="distil"):
        prepared = prepare_run(
            run_id=run, claim=claim, source=source, teacher=teacher, recipe=recipe, overrides=overrides,
            first_overrides=first_overrides, start=start, prompts=prompts, pairs=pairs, base=base, vae=vae, gate=gate,
            destination=destination, hub=hub, model_registry=model_registry, scores=scores, **shipped, root=root, nodes=nodes, gpus=gpus, pool=pool, budget=budget, price=price, parts=parts,
            queue=queue,
        )  # fmt: skip
        chosen = with_registry(with_hub(pod(prepared, LIGHT))).outputs
        folder, gpu, nodes_with_gpus = chosen["root"], chosen["gpu"], chosen["pool"]
        settings = {"recipe": recipe, "overrides": overrides, "root": folder}

        on_pool = {"gpu": gpu, "pool": nodes_with_gpus}
        in_parts = shard_parts(parts=chosen["parts"], source=source, **settings)
        sharded = pod(shard_dataset(source=source, part="", **settings), BUSY, retries=2).after(in_parts)
        shards = sharded.outputs["shards"]
        resolved = resolve_teacher(teacher=teacher, base=base, vae=vae, shards=shards, **settings)
        original = with_hub(pod(resolved, BUSY, retries=2)).outputs["resolved"]
        images = {"shards": shards, "teacher": original}
        in_parts = encode_parts(parts=chosen["encode_parts"], **images, **on_pool, **settings)
        encoded = encode_latents(part="", **images, **settings).after(in_parts)
        samples = on_gpus(pod(encoded, BUSY, retries=2), gpu, nodes_with_gpus).outputs["samples"]
        data = {
            "root": folder,
            "prompts": prompts,
            "samples": samples,
            "teacher": original,
            "pool": nodes_with_gpus,
        }
        sampled = pairs_if_needed(
            recipe=chosen["pairs_recipe"], overrides=chosen["pairs_overrides"], gpu=gpu, **data
        )
        training = {
            "pairs": chosen["pairs"], "nodes": nodes, "gpus": chosen["gpus"], "queue": queue, "where": chosen["where"],
            "price": price, "budget": budget,
        }  # fmt: skip
        step = {name: chosen[name] for name in ("step_gpus", "step_pool", "step_cpu", "step_memory")}
        before = first_stage_if_needed(
            recipe=chosen["first_recipe"], overrides=chosen["first_overrides"], **data, **training, **step
        ).after(sampled)
        distilled = distill_stage(
            samples=samples,
            teacher=original,
            prompts=prompts,
            start=chosen["start"],
            folder="run",
            run_id=run,
            pool=nodes_with_gpus,
            **training,
            **settings,
        ).after(before)
        trained = requesting(pod(distilled, HEAVY, retries=3), chosen["step_cpu"], chosen["step_memory"])
        trained = on_gpus(with_metrics(trained), chosen["step_gpus"], chosen["step_pool"])
        student = trained.outputs["run"]
        in_parts = evaluate_parts(
            parts=chosen["parts"], run=student, scores=scores, **images, **on_pool, **settings
        )
        judged = evaluate(part="", run=student, scores=scores, **images, **settings).after(in_parts)
        evaluation = on_gpus(pod(judged, BUSY, retries=2), gpu, nodes_with_gpus).outputs["evaluation"]
        decided = gate_stage(evaluation=evaluation, factor=gate, destination=destination, **settings)
        decision = pod(decided, LIGHT)

        made = {
            "root": folder, "shards": shards, "teacher": original, "run": student, "evaluation": evaluation,
            "start": chosen["start"], "pairs": chosen["pairs"],
        }  # fmt: skip
        with dsl.If(decision.output == "accepted", name="accepted"):
            packaged = package_model(
                root=folder, teacher=original, run=student, evaluation=evaluation, **shipped
            )
            package = with_hub(with_signing_key(pod(packaged, BUSY))).outputs["package"]
            pod(report(decision=decision.output, **made), LIGHT).after(packaged)
            with dsl.If(destination != "", name="published"):
                published = publish_model(
                    destination=destination,
                    recipe=recipe,
                    hub=hub,
                    model_registry=model_registry,
                    package=package,
                )
                with_registry(with_hub(pod(published, COPYING, retries=2)))
        with dsl.Else(name="rejected"):
            pod(report(decision=decision.output, **made), LIGHT)


def _restrict_recipes() -> None:
    """Restrict the parameter `recipe` to the known recipes, in the form of the UI and on the server; the SDK cannot express it."""
    parameter = distill.pipeline_spec.root.input_definitions.parameters["recipe"]
    for name in RECIPES:
        parameter.literals.add().string_value = name


_restrict_recipes()
