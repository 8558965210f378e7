from typing import NamedTuple

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def begin(
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
) -> NamedTuple("Begun", root=str, gpu=int):  # type: ignore[valid-type]
    """Refuse wrong parameters before anything is paid for, and say where the run will lie.

    Args:
        root: Folder of the run; empty for one beside the artifacts of the run.
        run_id: The platform's name of the run.
        claim: What retraining gave to the run; empty for one that a person has started.
        source: The images.
        teacher: The teacher; only an EDM recipe can do without one.
        recipe: Name of a recipe.
        overrides: Fields of the recipe to replace, as `field=value`, separated by spaces.
        destination: Folder of published models, or empty.
        nodes: Machines of the distillation.
        gpus: GPUs of each of them; 0 for the CPU.
        settings: Every setting of the run, as JSON.

    Returns:
        `root`: the folder of the run; `gpu`: the GPUs of a stage that can use but one.
    """
    from collections import namedtuple
    from pathlib import Path
    from typing import Any

    from components.begin.check import check
    from components.place import place
    from components.record.end import begin as hold
    from dmd2.errors import one_sentence

    with one_sentence():
        config = check(source, teacher, recipe, overrides, destination, nodes, gpus)
        folder = place(root, run_id, settings.uri)
        print(hold(claim, run_id))
    text = config.model_dump_json(indent=1)
    Path(settings.path).write_text(text)
    settings.metadata.update(recipe=recipe, root=folder)
    print(f"the run lies in {folder}\n{text}")
    Begun: Any = namedtuple("Begun", ("root", "gpu"))  # noqa: N806 - a class
    return Begun(folder, min(gpus, 1))
