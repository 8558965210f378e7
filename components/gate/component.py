from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def gate(recipe: str, overrides: str, root: str, factor: float, evaluation: dsl.Input[dsl.Artifact]) -> str:
    """Accept or reject the student by comparing its score with the teacher's. The decision and its reason go to `<root>/gate`.

    Args:
        recipe: Name of a recipe.
        overrides: Fields of the recipe to replace, as `field=value`, separated by spaces.
        root: Folder of the run.
        factor: Largest accepted score as a multiple of the teacher's, or the teacher's as a multiple of it if larger scores are better; 0 for
            the recipe's `gate.factor`.
        evaluation: The scores.

    Returns:
        `accepted` or `rejected`. A single value, because kfp's local runner cannot evaluate conditions on named outputs.
    """
    from dmd2 import recipes, stages
    from dmd2.errors import one_sentence

    with one_sentence():
        changes = [*overrides.split(), *([f"gate.factor={factor}"] if factor else [])]
        config = recipes.resolve(recipe, changes)
        result = stages.gate(config, evaluation.metadata["uri"], f"{root}/gate")
    return str(result.facts["decision"])
