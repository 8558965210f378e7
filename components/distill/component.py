from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def distill(
    recipe: str,
    overrides: str,
    root: str,
    samples: dsl.Input[dsl.Dataset],
    teacher: dsl.Input[dsl.Model],
    run: dsl.Output[dsl.Model],
) -> None:
    """Distil the teacher into a student with DMD2. Interrupted, it continues from its last checkpoint.

    Args:
        recipe: Name of a recipe.
        overrides: Fields of the recipe to replace, as `field=value`, separated by spaces.
        root: Folder of the run; the result goes to `<root>/run`.
        samples: Real images, or their latents.
        teacher: The teacher.
        run: Points to the student by URI and digest; the file itself is the manifest of the run.
    """
    from dmd2 import folders, recipes, stages
    from dmd2.errors import one_sentence

    with one_sentence():
        config = recipes.resolve(recipe, overrides.split())
        stages.distill(config, samples.metadata["uri"], teacher.metadata["uri"], f"{root}/run")
        run.metadata.update(folders.point(f"{root}/run", "run", run.path))
