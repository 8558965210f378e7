from typing import NamedTuple

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def prepare_run(
    run_id: str,
    claim: str,
    source: str,
    teacher: str,
    recipe: str,
    overrides: str,
    first_overrides: str,
    start: str,
    prompts: str,
    pairs: str,
    base: str,
    vae: str,
    gate: float,
    license: str,
    license_link: str,
    restrictions: str,
    safety_checker: str,
    low_rank: int,
    destination: str,
    hub: str,
    model_registry: str,
    scores: str,
    root: str,
    nodes: int,
    gpus: int,
    pool: dict,  # type: ignore[type-arg]
    budget: float,
    price: float,
    parts: int,
    queue: str,
    settings: dsl.Output[dsl.Artifact],
    plan: dsl.Output[dsl.Markdown],
) -> NamedTuple(  # type: ignore[valid-type]
    "Prepared",
    root=str,
    gpus=int,
    gpu=int,
    where=str,
    step_gpus=int,
    step_cpu=str,
    step_memory=str,
    step_pool=dict,
    pool=dict,
    parts=list,
    encode_parts=list,
    pairs_recipe=str,
    pairs_overrides=str,
    pairs=str,
    first_recipe=str,
    first_overrides=str,
    start=str,
):
    """Check the parameters before any stage is paid for, decide what the recipe needs first, and choose the folder of the run.

    Args:
        run_id: The KFP id of the run.
        claim: The claim in the ledger, in a run that retraining has started; otherwise empty.
        source: The images.
        teacher: The teacher; only digits can do without one.
        recipe: Name of a recipe.
        overrides: Fields of the recipe to replace, as `field=value`, separated by spaces.
        first_overrides: The same for the recipe of the first stage, beside those of `overrides` that are not about the distillation.
        start: Run to start from; empty = the first stage runs, if the recipe has one.
        prompts: File of prompts of the fake samples, or empty.
        pairs: Pairs of noise and sample; empty = they are sampled, if they are needed.
        base: For a checkpoint in a single file: a pipeline folder with its configs, or empty.
        vae: Another VAE than the teacher's own, or empty.
        gate: Largest accepted score as a multiple of the teacher's; 0 = that of the recipe.
        license: Licence of the student's weights; empty = that of the teacher.
        license_link: Address of its text, or empty.
        restrictions: What users must not do.
        safety_checker: Pipeline whose safety checker the package gets, or empty.
        low_rank: Rank of an update that is extracted from the student, or 0.
        destination: Folder of published models, or empty.
        hub: Repository of the Hugging Face Hub where the package is published too, or empty.
        model_registry: Address of a Kubeflow Model Registry in which it is noted, or empty.
        scores: Folder that keeps the scores of teachers, or empty.
        root: Folder of the run; empty for a folder beside the KFP artifacts of the run.
        nodes: Number of machines of the distillation.
        gpus: Number of GPUs of each machine; 0 = CPU, -1 = that of the recipe.
        pool: Labels of the nodes with GPUs.
        budget: Largest number of GPU-hours; 0 = no limit.
        price: Price of a GPU for an hour.
        parts: Number of pods that share each of sharding, encoding and evaluating.
        queue: Kueue's LocalQueue of a distillation in a TrainJob; empty = it is not queued.
        settings: The Config of the run, as JSON.
        plan: What is run, and what it takes: memory, disk, hours and cost.

    Returns:
        root: The folder of the run.
        gpus: GPUs of each machine of a training.
        gpu: 1 or 0: GPUs of a stage that uses at most one.
        where: `trainjob`, or `here`: where trainings run, in a TrainJob or in the pod of their step.
        step_gpus: GPUs of the pod of the step `distill`.
        step_cpu: Processors that it asks for.
        step_memory: Memory that it asks for.
        step_pool: Labels of its nodes.
        pool: Labels of the nodes with GPUs; empty without any.
        parts: Parts of a shared stage as `i/n`; none for 1.
        encode_parts: The same of the encoding; none if nothing is encoded.
        pairs_recipe: Recipe that pairs are sampled for; empty = they are not sampled.
        pairs_overrides: Its overrides.
        pairs: Address of the pairs, or empty.
        first_recipe: Recipe of the first stage; empty = it is not run.
        first_overrides: Its overrides.
        start: Address of the run to start from, or empty.
    """
    import logging
    from collections import namedtuple
    from pathlib import Path
    from typing import Any

    from components.distill.launch import JobSize, choose
    from components.find_teachers.run_reports import report_start
    from components.prepare_run.parameters import RunParameters, chain_outputs, check_parameters
    from components.prepare_run.plan_page import plan_page
    from components.prepare_run.preflight import check_resources
    from components.prepare_run.queues import check_queues
    from components.run_folder import run_folder
    from dmd2.errors import one_sentence

    logger = logging.getLogger("components.prepare_run")
    with one_sentence():
        given = RunParameters(
            source, teacher, recipe, overrides, first_overrides, start, prompts, pairs, base, vae, gate, license, license_link, restrictions, safety_checker, low_rank, destination, hub, model_registry, scores, root, nodes, gpus, pool, budget, price, parts, queue,
        )  # fmt: skip
        on_cluster = "://" in settings.uri
        config = check_parameters(given, on_cluster)
        folder = run_folder(root, run_id, settings.uri)
        logger.info(report_start(claim, run_id))
        where = choose(JobSize(nodes, given.chosen_gpus), folder) if on_cluster else "here"
        check_resources(given, folder)
        check_queues(given, where)
        Path(plan.path).write_text(plan_page(given, folder))
    text = config.model_dump_json(indent=1)
    Path(settings.path).write_text(text)
    settings.metadata.update(recipe=recipe, root=folder)
    logger.info("folder of the run: %s\n%s", folder, text)
    outputs = {"root": folder} | chain_outputs(given, folder, where)
    kind: Any = namedtuple  # mypy wants the names as literals
    return kind("Prepared", outputs)(**outputs)
