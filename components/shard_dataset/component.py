from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def shard_dataset(
    source: str, recipe: str, overrides: str, root: str, part: str, shards: dsl.Output[dsl.Dataset]
) -> None:
    """Write the images of a source as WebDataset shards.

    Args:
        source: `digits`, or the address of images in a layout that `dmd2 shard` reads.
        recipe: Name of a recipe.
        overrides: Fields of the recipe to replace, as `field=value`, separated by spaces.
        root: Folder of the run; the shards go to `<root>/shards`.
        part: `i/n`: only the i-th of n parts, which a later call with an empty part puts together.
        shards: Points to the shards by URI and digest; the file itself is their manifest.
    """
    from dmd2 import recipes, stages
    from dmd2.errors import one_sentence
    from dmd2.io import artifact

    with one_sentence():
        config = recipes.resolve(recipe, overrides.split())
        made = stages.shard(config, source, f"{root}/shards", part=part)
        if part:
            shards.metadata.update(artifact.write_part(made, shards.path))
            return
        shards.metadata["account"] = made.facts["account"]
        shards.metadata.update(artifact.write_pointer(f"{root}/shards", "shards", shards.path))
