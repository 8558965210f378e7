from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def gate(recipe: str, overrides: str, root: str, evaluation: dsl.Input[dsl.Artifact]) -> str:
    """Accept or reject the student by its FID. The decision goes to `<root>/gate`, with its reason.

    Args:
        recipe: Name of a recipe.
        overrides: Fields of the recipe to replace, as `field=value`, separated by spaces.
        root: Folder of the run.
        evaluation: The scores.

    Returns:
        `accepted` or `rejected`: a single value, for kfp's local runner resolves no condition on a named one.
    """
    from dmd2 import recipes, stages
    from dmd2.errors import one_sentence

    with one_sentence():
        config = recipes.resolve(recipe, overrides.split())
        result = stages.gate(config, evaluation.metadata["uri"], f"{root}/gate")
    return str(result.facts["decision"])
