"""The training behind its launcher: real processes under a real torchrun, real signals, the training's own exit status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from components.distill.launch import JobSize, Torchrun, _child_processes
from dmd2.data.latents import distributed_state
from dmd2.io import artifact
from dmd2.overrides import override_flags
from dmd2.parallel import ranks
from dmd2.training import checkpoint
from tests import conftest, warm

RUN = "import sys; from components.distill.launch import *; from dmd2.errors import one_sentence\n"
RUN += "with one_sentence():\n    size = JobSize(gpus=0, nodes=int(sys.argv[1]))\n"
RUN += "    sys.exit(run_to_end(launcher(Training(sys.argv[2:], size, 'run', '/tmp', 'run', {}), choose(size, '/tmp'))))"


@pytest.fixture
def words(made: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """`distill` of the micro run, with changes."""

    def call(*overrides: str) -> list[str]:
        given = [
            "--data",
            str(made / "shards"),
            "--teacher",
            str(made / "teacher"),
            "--out",
            str(tmp_path / "run"),
        ]
        return ["distill", "edm-digits", *given, *override_flags((*conftest.MICRO, *overrides))]

    return call


@pytest.fixture
def begun(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """A process that launches, in a group of its own. torchrun is a real one; before and behind it are warm processes."""

    def call(*words: str, nodes: int = 1, python: str = "") -> subprocess.Popen[str]:
        command = [python or warm.python(), "-c", RUN, str(nodes), *words]
        return subprocess.Popen(
            command, env=warm.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    return call


Begun = Callable[..., "subprocess.Popen[str]"]
Words = Callable[..., "list[str]"]


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    told, _ = process.communicate(timeout=600)
    return process.returncode, told


def playing(process: subprocess.Popen[str], folder: Path) -> None:
    """Wait until steps are being made."""
    metrics = folder / ".run.partial" / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None, ended(process)
        time.sleep(0.05)


def test_a_training_that_ends_well_ends_with_0(begun: Begun, words: Words, tmp_path: Path) -> None:
    status, told = ended(begun(*words()))
    assert status == 0, told
    assert "distill: " in told
    assert artifact.read_manifest(tmp_path / "run", "run").config


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_training_which_saves_and_says_so(
    number: signal.Signals, begun: Begun, words: Words, tmp_path: Path
) -> None:
    process = begun(*words("distill.steps=100000", "distill.save_every=100000"))
    playing(process, tmp_path)
    process.send_signal(number)
    status, told = ended(process)
    assert status == {signal.SIGTERM: 75, signal.SIGINT: 130}[number], told
    assert f"{number.name}: passed on to the training" in told
    assert "saved; the same command resumes" in told
    assert "Traceback" not in told
    assert checkpoint.saved_steps(tmp_path / ".run.partial" / "checkpoints")


def test_a_wrong_input_ends_with_64_and_its_sentence(begun: Begun, words: Words) -> None:
    status, told = ended(begun(*words("distill.steps=-1")))
    assert status == 64
    assert "steps: Input should be greater than 0, not -1" in told
    assert "Traceback" not in told


def test_a_wrong_input_of_several_processes_ends_with_64_too(words: Words) -> None:
    command = [sys.executable, "-m", "components.distill.launch", "2", *words("distill.steps=-1")]
    done = subprocess.run(command, env=warm.environment(), capture_output=True, text=True)
    assert done.returncode == 64, done.stderr
    assert "of 2 on this machine ended with 64" in done.stderr


def test_a_training_that_diverges_ends_with_76(begun: Begun, words: Words) -> None:
    status, told = ended(begun(*words("distill.student.lr=1e30", "distill.critic.lr=1e30")))
    assert status == 76, told
    assert "became nan" in told or "became inf" in told


def test_a_worker_that_is_killed_ends_as_the_shell_says_it(
    begun: Begun, words: Words, tmp_path: Path
) -> None:
    process = begun(*words("distill.steps=100000"), python=sys.executable)
    playing(process, tmp_path)
    (torchrun,) = _child_processes(process.pid)
    (worker,) = _child_processes(torchrun)
    os.kill(worker, signal.SIGKILL)
    status, told = ended(process)
    assert status == 128 + signal.SIGKILL, told


def test_more_machines_than_one_are_refused_in_one_sentence(begun: Begun, words: Words) -> None:
    status, told = ended(begun(*words(), nodes=2))
    assert status == 64
    assert (
        told
        == "dmd2: nodes is 2, which takes a TrainJob, and there is no cluster; give 1, or see manifests/README.md\n"
    )


def test_missing_gpus_are_refused_and_not_replaced_by_the_cpu(refusal: Callable[..., str]) -> None:
    assert "gpus is 4096, and this machine shows" in refusal(Torchrun([], 4096, 4096).start)
    assert "gpus is -1" in refusal(JobSize(gpus=-1).check)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs GPUs that torch cannot use")
def test_gpus_whose_driver_torch_cannot_use_are_refused_and_not_replaced_by_the_cpu(
    refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old driver counts its GPUs all the same."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert "torch cannot use the GPUs of this machine" in refusal(Torchrun([], 8, 8).start)
    assert "torch cannot use the GPUs of this machine" in refusal(ranks.device)
    assert "torch cannot use the GPUs of this machine" in refusal(distributed_state)
