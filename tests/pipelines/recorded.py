"""A pipeline that ends as a distillation does: with `record`, however its stages went."""

from kfp import dsl

from components.image import IMAGE
from components.record.component import record


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def stage(fail: bool) -> None:
    """Stands for all stages."""
    if fail:
        raise SystemExit("no space left")


@dsl.pipeline
def recorded(claim: str, run: str, root: str, fail: bool) -> None:
    with dsl.ExitHandler(record(claim=claim, run_id=run, root=root)):
        stage(fail=fail)
