from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def gate(
    recipe: str,
    overrides: str,
    root: str,
    factor: float,
    destination: str,
    evaluation: dsl.Input[dsl.Artifact],
) -> str:
    """Accept or reject the student by its scores, or say that there is not enough evidence. The decision and its reasons go to `<root>/gate`.

    Args:
        recipe: Name of a recipe.
        overrides: Fields of the recipe to replace, as `field=value`, separated by spaces.
        root: Folder of the run.
        factor: Largest accepted score as a multiple of the teacher's, or the teacher's as a multiple of it if larger scores are better; 0 for
            the recipe's `gate.factor`.
        destination: Folder of published models, with whose last student of the same recipe and teacher this one is compared; may be empty.
        evaluation: The scores.

    Returns:
        Output: `accepted`, `rejected` or `not enough evidence`. A single value, because kfp's local runner cannot evaluate conditions on named outputs.
    """
    import logging

    from dmd2 import recipes, stages
    from dmd2.errors import one_sentence

    with one_sentence():
        changes = [*overrides.split(), *([f"gate.factor={factor}"] if factor else [])]
        config = recipes.resolve(recipe, changes)
        published = f"{destination.rstrip('/')}/{recipe}" if destination else ""
        result = stages.gate(config, evaluation.metadata["uri"], f"{root}/gate", published)
    logging.getLogger("components.gate").info("%s: %s", result.facts["decision"], result.facts["reason"])
    return str(result.facts["decision"])
