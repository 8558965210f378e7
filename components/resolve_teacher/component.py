from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def resolve_teacher(
    teacher: str,
    recipe: str,
    overrides: str,
    root: str,
    base: str,
    vae: str,
    shards: dsl.Input[dsl.Dataset],
    resolved: dsl.Output[dsl.Model],
) -> None:
    """Find or convert the given teacher, or train a small one on the shards if none is given.

    Args:
        teacher: Folder of a teacher, a pipeline of diffusers, a checkpoint or a pickle; empty = train one, for demos.
        recipe: Name of a recipe.
        overrides: Fields of the recipe to replace, as `field=value`, separated by spaces.
        root: Folder of the run; a converted or trained teacher goes to `<root>/teacher`.
        base: For a checkpoint in a single file: a pipeline folder of diffusers with its configs and tokenizers; empty = none.
        vae: Another VAE to use instead of the teacher's own; empty = its own.
        shards: The shards to train on.
        resolved: Points to the teacher by URI and digest; the file itself is its manifest.
    """
    from dmd2 import recipes, stages
    from dmd2.errors import one_sentence
    from dmd2.io import artifact

    with one_sentence():
        config = recipes.resolve(recipe, overrides.split())
        data, out = shards.metadata["uri"], f"{root}/teacher"
        folder = stages.resolve_or_teach(config, teacher, data, out, base, vae)
        resolved.metadata.update(artifact.write_pointer(folder, "teacher", resolved.path))
