from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def sample_pairs(
    recipe: str,
    overrides: str,
    root: str,
    prompts: str,
    gpus: int,
    samples: dsl.Input[dsl.Dataset],
    teacher: dsl.Input[dsl.Model],
    pairs: dsl.Output[dsl.Dataset],
) -> None:
    """Sample the teacher, and store pairs of noise and sample for a recipe with a regression.

    Interrupted, it continues with the missing pairs.

    Args:
        recipe: Name of the recipe that learns from the pairs.
        overrides: Fields of the recipe to replace, as `field=value`, separated by spaces.
        root: Folder of the run; the pairs go to `<root>/pairs`.
        prompts: File of prompts to sample instead of the captions; empty = the captions.
        gpus: Number of GPUs that the teacher is sampled on: 1, or 0 = the CPU.
        samples: Shards or latents, whose captions are sampled.
        teacher: The teacher.
        pairs: Points to the pairs by URI and digest; the file itself is their manifest.
    """
    from components.distill.launch import check_gpus
    from dmd2 import recipes, stages
    from dmd2.errors import one_sentence
    from dmd2.io import artifact

    with one_sentence():
        check_gpus(gpus)
        config = recipes.resolve(recipe, overrides.split())
        data, original = samples.metadata["uri"], teacher.metadata["uri"]
        stages.pairs(config, data, original, f"{root}/pairs", prompts)
        pairs.metadata.update(artifact.write_pointer(f"{root}/pairs", "pairs", pairs.path))
