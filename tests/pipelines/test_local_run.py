"""A run on this machine ends with the exit status of the stage that failed, and prints what its stages print."""

import builtins
import logging
from pathlib import Path

import pytest
from kfp import dsl, local

from dmd2.errors import Refused, one_sentence
from pipelines.local_run import run_local, stage_status
from pipelines.pods import with_metrics


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


@dsl.component(base_image="python", install_kfp_package=False)
def say(text: str, folder: str) -> None:
    """Print a line once the other task of the loop runs too."""
    import time
    from pathlib import Path

    Path(folder, text).touch()
    while len(list(Path(folder).iterdir())) < 2:
        time.sleep(0.01)
    time.sleep(0.2 * (text == "b"))
    print(text)


def test_tasks_side_by_side_leave_print_as_it_was(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """kfp replaces `print` while a task runs: with two at a time, the second restored the replacement of the first."""
    (tmp_path / "begun").mkdir()

    @dsl.pipeline(name="two-at-a-time")
    def two_at_a_time() -> None:
        with dsl.ParallelFor(["a", "b"], parallelism=2) as text:
            say(text=text, folder=str(tmp_path / "begun"))

    local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "kfp"))
    before = builtins.print, list(logging.getLogger().handlers)
    with stage_status():
        two_at_a_time()
    assert (builtins.print, logging.getLogger().handlers) == before
    printed = capfd.readouterr().out.splitlines()
    assert [line for line in printed if line in ("    a", "    b")] == ["    a", "    b"]
    assert not [line for line in printed if "KFP Executor" in line or "parameterValues" in line]


@dsl.component(base_image="python", install_kfp_package=False)
def write_port(file: str) -> None:
    """Write the port for metrics that the environment names."""
    import os
    from pathlib import Path

    Path(file).write_text(os.environ.get("DMD2_METRICS_PORT", "none"))


def test_a_local_run_opens_no_port_for_metrics(tmp_path: Path) -> None:
    @dsl.pipeline(name="metrics")
    def metrics() -> None:
        with_metrics(write_port(file=str(tmp_path / "port")))

    local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "kfp"))
    with stage_status():
        metrics()
    assert (tmp_path / "port").read_text() == "none"


def test_a_budget_without_a_gpu_is_refused_as_in_the_pipeline(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, one_sentence():
        run_local({"gpus": 0, "budget": 5.0}, tmp_path)
    assert ended.value.code == Refused.status
    assert "budget is 5 GPU-hours, and the run uses no GPU; leave the budget out" in capfd.readouterr().out
    assert not (tmp_path / "shards").exists()
