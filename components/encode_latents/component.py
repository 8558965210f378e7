from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def encode_latents(
    recipe: str,
    overrides: str,
    root: str,
    part: str,
    shards: dsl.Input[dsl.Dataset],
    teacher: dsl.Input[dsl.Model],
    samples: dsl.Output[dsl.Dataset],
) -> None:
    """Encode the training images with the teacher's VAE; for a network on pixels, return the shards themselves.

    Interrupted, it continues with the missing shards.

    Args:
        recipe: Name of a recipe.
        overrides: Fields of the recipe to replace, as `field=value`, separated by spaces.
        root: Folder of the run; latents go to `<root>/latents`.
        part: `i/n`: only the i-th of n parts, which a later call with an empty part puts together.
        shards: The images.
        teacher: The teacher, and its VAE.
        samples: Points to the training samples by URI and digest; the file itself is their manifest.
    """
    from dmd2 import recipes, stages
    from dmd2.errors import one_sentence
    from dmd2.io import artifact

    with one_sentence():
        config = recipes.resolve(recipe, overrides.split())
        data, original = shards.metadata["uri"], teacher.metadata["uri"]
        if part:
            made = stages.encode(config, data, original, f"{root}/latents", part)
            samples.metadata.update(artifact.write_part(made, samples.path))
            return
        folder = stages.encode_if_needed(config, data, original, f"{root}/latents")
        kind = "latents" if config.family.vae_stride else "shards"
        samples.metadata.update(artifact.write_pointer(folder, kind, samples.path))
