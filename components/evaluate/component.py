from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate(
    recipe: str,
    overrides: str,
    root: str,
    part: str,
    scores: str,
    shards: dsl.Input[dsl.Dataset],
    teacher: dsl.Input[dsl.Model],
    run: dsl.Input[dsl.Model],
    evaluation: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Score student and teacher against held-out real images by the metrics of `evaluate.metrics`.

    Args:
        recipe: Name of a recipe.
        overrides: Fields of the recipe to replace, as `field=value`, separated by spaces.
        root: Folder of the run; the result goes to `<root>/evaluation`.
        part: `i/n`: only the i-th of n parts, which a later call with an empty part puts together.
        scores: Folder that keeps the scores of teachers for later evaluations; empty = none.
        shards: Shards with held-out images.
        teacher: The teacher.
        run: The student.
        evaluation: Points to the result by URI and digest; the file itself is its manifest.
        metrics: The scores as `<metric>_<set of images>`, and the title and direction of each metric, for the table of the UI.
    """
    from dmd2 import recipes, stages
    from dmd2.errors import one_sentence
    from dmd2.evaluation.scores import read_scores
    from dmd2.io import artifact

    with one_sentence():
        config = recipes.resolve(recipe, overrides.split())
        data, original, student = (a.metadata["uri"] for a in (shards, teacher, run))
        result = stages.evaluate(config, data, original, student, f"{root}/evaluation", part, scores)
        if part:
            evaluation.metadata.update(artifact.write_part(result, evaluation.path))
            return
        evaluation.metadata.update(
            artifact.write_pointer(f"{root}/evaluation", "evaluation", evaluation.path)
        )
    for name, value in result.facts.items():
        if isinstance(value, int | float):
            metrics.log_metric(name, value)
    for metric in read_scores(result.facts):
        metrics.metadata[metric.name] = f"{metric.title} ({metric.direction})"
