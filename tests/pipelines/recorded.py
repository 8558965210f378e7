"""A pipeline with the exit handler of the distillation pipeline, whose only stage may fail."""

from kfp import dsl

from components.finish_run.component import finish_run
from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def stage(fail: bool) -> None:
    """End well, or fail."""
    if fail:
        raise SystemExit("no space left")


@dsl.pipeline
def recorded(claim: str, run: str, root: str, fail: bool) -> None:
    with dsl.ExitHandler(finish_run(claim=claim, run_id=run, root=root, price=0.0)):
        stage(fail=fail)
