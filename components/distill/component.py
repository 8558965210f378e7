from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def distill(
    recipe: str,
    overrides: str,
    root: str,
    nodes: int,
    gpus: int,
    queue: str,
    samples: dsl.Input[dsl.Dataset],
    teacher: dsl.Input[dsl.Model],
    run: dsl.Output[dsl.Model],
) -> None:
    """Distil the teacher into a student with DMD2. Interrupted, it continues from its last checkpoint.

    The exit status is that of the training: 64 for a wrong input, 74 for the disk or the bucket, 75 stopped after
    saving, 76 diverged.

    Args:
        recipe: Name of a recipe.
        overrides: Fields of the recipe to replace, as `field=value`, separated by spaces.
        root: Folder of the run; the result goes to `<root>/run`.
        nodes: Number of machines; only 1 is supported.
        gpus: Number of GPUs of each machine, one process on each; 0 = one process on the CPU.
        queue: Kueue's LocalQueue of a distillation on more than one machine.
        samples: Real images, or their latents.
        teacher: The teacher.
        run: Points to the student by URI and digest; the file itself is the manifest of the run.
    """
    from components.distill.launch import JobSize, Torchrun, run_to_end
    from dmd2 import recipes
    from dmd2.errors import one_sentence
    from dmd2.io import artifact

    with one_sentence():
        flags = [
            "--data",
            samples.metadata["uri"],
            "--teacher",
            teacher.metadata["uri"],
            "--out",
            f"{root}/run",
        ]
        arguments = ["distill", recipe, *flags, *recipes.override_flags(overrides.split())]
        if status := run_to_end(Torchrun(arguments, JobSize(nodes, gpus, queue))):
            raise SystemExit(status)
        run.metadata.update(artifact.write_pointer(f"{root}/run", "run", run.path))
