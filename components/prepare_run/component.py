from typing import NamedTuple

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def prepare_run(
    root: str,
    run_id: str,
    claim: str,
    source: str,
    teacher: str,
    recipe: str,
    overrides: str,
    destination: str,
    nodes: int,
    gpus: int,
    settings: dsl.Output[dsl.Artifact],
) -> NamedTuple("Prepared", root=str, gpu=int):  # type: ignore[valid-type]
    """Check the parameters before any stage is paid for, and choose the folder of the run.

    Args:
        root: Folder of the run; empty for a folder beside the KFP artifacts of the run.
        run_id: The KFP id of the run.
        claim: The claim in the ledger, in a run that retraining has started; otherwise empty.
        source: The images.
        teacher: The teacher; only EDM recipes can do without one.
        recipe: Name of a recipe.
        overrides: Fields of the recipe to replace, as `field=value`, separated by spaces.
        destination: Folder of published models, or empty.
        nodes: Number of machines of the distillation.
        gpus: Number of GPUs of each machine; 0 = CPU.
        settings: The Config of the run, as JSON.

    Returns:
        `root`: the folder of the run; `gpu`: 1 or 0, the number of GPUs of stages that use at most one.
    """
    import logging
    from collections import namedtuple
    from pathlib import Path
    from typing import Any

    from components.find_teachers.run_reports import report_start
    from components.prepare_run.parameters import check_parameters
    from components.run_folder import run_folder
    from dmd2.errors import one_sentence

    logger = logging.getLogger("components.prepare_run")
    with one_sentence():
        config = check_parameters(source, teacher, recipe, overrides, destination, nodes, gpus)
        folder = run_folder(root, run_id, settings.uri)
        logger.info(report_start(claim, run_id))
    text = config.model_dump_json(indent=1)
    Path(settings.path).write_text(text)
    settings.metadata.update(recipe=recipe, root=folder)
    logger.info("folder of the run: %s\n%s", folder, text)
    Prepared: Any = namedtuple("Prepared", ("root", "gpu"))  # noqa: N806 - a class
    return Prepared(folder, min(gpus, 1))
