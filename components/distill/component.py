from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def distill(
    run_id: str,
    recipe: str,
    overrides: str,
    root: str,
    nodes: int,
    gpus: int,
    pool: dict,  # type: ignore[type-arg]
    queue: str,
    where: str,
    folder: str,
    start: str,
    pairs: str,
    prompts: str,
    price: float,
    budget: float,
    samples: dsl.Input[dsl.Dataset],
    teacher: dsl.Input[dsl.Model],
    run: dsl.Output[dsl.Model],
) -> None:
    """Distil the teacher into a student with DMD2, in a TrainJob or in this pod. Interrupted, it continues from its last checkpoint.

    The exit status is that of the training: 64 for a wrong input, 74 for the disk or the bucket, 75 stopped after
    saving, 76 diverged, 79 if a process was lost and no other says why.

    A wrong input and a divergence are not tried again in the same run, though KFP repeats the step.

    Args:
        run_id: The KFP id of this run.
        recipe: Name of a recipe.
        overrides: Fields of the recipe to replace, as `field=value`, separated by spaces.
        root: Folder of the run; the result goes to `<root>/<folder>`.
        nodes: Number of machines.
        gpus: Number of GPUs of each machine, one process on each; 0 = one process on the CPU.
        pool: Labels of the nodes of a TrainJob.
        queue: Kueue's LocalQueue of a TrainJob; empty = it is not queued.
        where: `trainjob`, or `here`: in the pod of this step.
        folder: `run`, or `first` for a first stage.
        start: Run to start from instead of the teacher: its student and its critic; empty = the teacher.
        pairs: Pairs of noise and sample, for a recipe with a regression.
        prompts: File of prompts of the fake samples; recipes with prompts of their own leave it out. Empty = none.
        price: Price of a GPU for an hour, for the page and the metrics of the training; 0 = unknown.
        budget: Number of GPU-hours of the run, for the same; 0 = none.
        samples: Real images, or their latents.
        teacher: The teacher.
        run: Points to the student by URI and digest; the file itself is the manifest of the run.
    """
    import logging

    from components.distill.launch import JobSize, Training, launcher, run_to_end
    from components.failure import read_failure, write_failure
    from components.run_folder import progress_page
    from dmd2 import recipes
    from dmd2.errors import one_sentence
    from dmd2.io import artifact
    from dmd2.overrides import override_flags

    with one_sentence():
        if failure := read_failure(root, run_id):
            logging.getLogger("components.distill").error(failure.sentence)
            raise SystemExit(failure.status)
        config, out = recipes.resolve(recipe, overrides.split()), f"{root}/{folder}"
        given = {
            "data": pairs if config.distill.regression else samples.metadata["uri"],
            "teacher": teacher.metadata["uri"],
            "out": out,
            "start": start,
            "prompts": prompts if recipes.draws_prompts(config) else "",
            "progress": progress_page(root, folder),
            "price": f"{price:g}" if price else "",
            "budget": f"{budget:g}" if budget else "",
        }
        flags = [word for name, value in given.items() if value for word in (f"--{name}", value)]
        arguments = ["distill", recipe, *flags, *override_flags(overrides.split())]
        training = Training(arguments, JobSize(nodes, gpus, queue), run_id, root, folder, pool)
        if status := run_to_end(launcher(training, "trainjob" if where == "trainjob" else "here")):
            write_failure(root, run_id, folder, status)
            raise SystemExit(status)
        run.metadata.update(artifact.write_pointer(out, "run", run.path))
