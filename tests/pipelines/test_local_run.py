"""A run on this machine ends with the exit status of the stage that failed."""

from pathlib import Path

import pytest
from kfp import dsl, local

from dmd2.errors import one_sentence
from pipelines.local_run import stage_status


@dsl.component(base_image="python", install_kfp_package=False)
def end_with(status: int) -> None:
    """End as a stage does: with an exit status or, for 130, as Python ends on SIGINT."""
    import os
    import signal

    if status == 130:
        os.kill(os.getpid(), signal.SIGINT)
    raise SystemExit(status)


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (64, "it ended with exit status 64 and says above what was wrong"),
        (74, "it ended with exit status 74"),
        (75, "it ended with exit status 75"),
        (76, "it ended with exit status 76"),
        (130, "interrupted; the same command starts again"),
    ],
)
def test_the_exit_status_of_a_stage_is_that_of_the_run(
    status: int, sentence: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    @dsl.pipeline(name="one-stage")
    def one_stage() -> None:
        end_with(status=status)

    local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path))
    with pytest.raises(SystemExit) as ended, one_sentence(), stage_status():
        one_stage()
    assert ended.value.code == status
    assert sentence in capfd.readouterr().err
