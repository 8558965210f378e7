"""Runs: resumed as if nothing had happened, stopped in time, never half a result."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dmd2 import stages
from dmd2.batch import Batch
from dmd2.config import Config
from dmd2.errors import Diverged, Interrupted
from dmd2.io.artifact import read_manifest
from dmd2.io.tensors import load_tensors
from dmd2.training import checkpoint
from dmd2.training.metrics_log import METRICS, read_metrics, truncate_after
from tests import warm
from tests.conftest import MICRO, flags


def distill(config: Config, made: Path, out: Path) -> None:
    stages.distill(config, str(made / "shards"), str(made / "teacher"), str(out))


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors below a folder."""
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{f.relative_to(folder)}:{name}": t for f in files for name, t in load_tensors(f).items()}


def assert_same(one: Path, two: Path) -> None:
    a, b = tensors(one), tensors(two)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def numbers(run: Path) -> list[dict[str, float]]:
    """The log without what depends on the clock."""
    return [
        {k: v for k, v in line.items() if not k.endswith("_s") and k != "peak_memory_gb"}
        for line in read_metrics(run)
    ]


@pytest.mark.parametrize("stop_after", [1, 3, 4, 7])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    micro: Config, made: Path, tmp_path: Path, stop_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, moments, running averages: whether the step of the stop had a checkpoint or not. (In the log, the
    window in which it stopped is told in two lines.)"""
    from dmd2.training.trainer import DMD2Trainer

    config = with_average(micro)
    distill(config, made, tmp_path / "whole")
    steps, original = [], DMD2Trainer.step

    def counted(self: DMD2Trainer, real: object, step: int) -> object:
        steps.append(step)
        if len(steps) == stop_after:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, real, step)  # type: ignore[arg-type]

    monkeypatch.setattr(DMD2Trainer, "step", counted)
    with pytest.raises(Interrupted, match=f"after step {stop_after} of 10, saved"):
        distill(config, made, tmp_path / "parts")
    assert not (tmp_path / "parts").exists()
    distill(config, made, tmp_path / "parts")
    assert steps == list(range(10)), "no step is played twice"
    assert_same(tmp_path / "whole", tmp_path / "parts")
    assert numbers(tmp_path / "parts")[-1] == numbers(tmp_path / "whole")[-1]


def with_average(config: Config) -> Config:
    student = config.distill.student.model_copy(update={"ema": (0.5, 0.9)})
    return config.model_copy(update={"distill": config.distill.model_copy(update={"student": student})})


def test_a_killed_run_goes_on_from_its_last_checkpoint(micro: Config, made: Path, tmp_path: Path) -> None:
    """SIGKILL in a real process, wherever it happens to be; then the same command."""
    slow = micro.model_copy(
        update={"distill": micro.distill.model_copy(update={"steps": 60, "save_every": 3})}
    )
    distill(slow, made, tmp_path / "whole")
    command = [
        *warm.dmd2("distill", "edm-digits"), "--data", str(made / "shards"), "--teacher", str(made / "teacher"),
        "--out", str(tmp_path / "killed"), *flags((*MICRO, "distill.steps=60", "distill.save_every=3")),
    ]  # fmt: skip
    process = subprocess.Popen(command, env=warm.environment(), stderr=subprocess.PIPE)
    checkpoints = tmp_path / ".killed.partial" / "checkpoints"
    while process.poll() is None and not [s for s in checkpoint.saved_steps(checkpoints) if s >= 6]:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert subprocess.run(command, env=warm.environment(), check=False).returncode == 0
    assert_same(tmp_path / "whole", tmp_path / "killed")


def test_ctrl_c_in_a_real_process_saves_and_exits_130(made: Path, tmp_path: Path) -> None:
    command = [
        *warm.dmd2("distill", "edm-digits"), "--data", str(made / "shards"), "--teacher", str(made / "teacher"),
        "--out", str(tmp_path / "run"), *flags((*MICRO, "distill.steps=100000", "distill.save_every=99999")),
    ]  # fmt: skip
    process = subprocess.Popen(command, env=warm.environment(), stderr=subprocess.PIPE, text=True)
    while not (tmp_path / ".run.partial" / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert "saved; the same command resumes" in said
    assert checkpoint.saved_steps(tmp_path / ".run.partial" / "checkpoints")


def poison(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Make the critic's GAN loss no number in these of its updates."""
    from dmd2.training.terms import Adversarial, Losses

    original, calls = Adversarial._real_and_fake_loss, []

    def poisoned(self: Adversarial, fake: Batch, real: Batch) -> Losses:
        calls.append(1)
        factor = float("nan") if len(calls) - 1 in steps else 1
        return {name: factor * loss for name, loss in original(self, fake, real).items()}

    monkeypatch.setattr(Adversarial, "_real_and_fake_loss", poisoned)


def test_an_update_without_a_number_is_skipped_counted_and_told(
    micro: Config,
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    poison(monkeypatch, 2, 7)
    distill(micro, made, tmp_path / "run")
    assert "critic/gan became nan at step 2; this update is skipped" in caplog.messages
    assert [line["critic/skipped"] for line in read_metrics(tmp_path / "run")] == [0, 1, 0, 1, 0]
    kept = tensors(tmp_path / "run" / "checkpoints")
    assert all(t.isfinite().all() for t in kept.values())
    counted = {float(t) for name, t in kept.items() if "critic.optimizer/" in name and name.endswith(".step")}
    assert counted == {6, 8}, (
        "of the checkpoints after 8 and 10 steps, each without the two that were skipped"
    )


def test_too_many_in_a_row_stop_the_run_and_name_the_term(
    micro: Config, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, *range(4, 10))
    with pytest.raises(Diverged, match="critic/gan became nan at step 8, and 5 updates of the critic were"):
        distill(micro, made, tmp_path / "run")
    kept = tmp_path / ".run.partial" / "checkpoints"
    assert all(t.isfinite().all() for t in tensors(kept).values())


def test_the_log_tells_losses_gradients_speed_and_what_is_left(made: Path) -> None:
    lines = read_metrics(made / "run")
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10]
    wanted = {
        "student/dmd",
        "student/gan",
        "student/dmd_grad_l1",
        "student/gan_grad_l1",
        "critic/dmd",
        "critic/gan",
        "student/lr",
        "critic/lr",
        "samples_per_s",
        "peak_memory_gb",
        "time/data_s",
        "time/rollout_s",
        "time/student_s",
        "time/critic_s",
        "eta_s",
    }
    assert wanted <= lines[0].keys()
    assert "mfu" not in lines[0], "the peak of a CPU is not known"
    assert all(
        sum(line[n] for n in line if n.startswith("time/")) < 8 / line["samples_per_s"] for line in lines
    )
    assert "time/student_s" not in lines[1], "it is not the student's turn"
    assert "student/dmd" not in lines[1], "steps 3 and 4 have no update of the student"
    assert lines[-1]["eta_s"] < lines[0]["eta_s"] + 1
    assert [p.name for p in sorted((made / "run" / "previews").iterdir())] == ["00000005.png", "00000010.png"]


def test_tensorboard_has_the_same_numbers(made: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(made / "run" / "tensorboard"))
    events.Reload()
    told = {event.step: event.value for event in events.Scalars("critic/dmd")}
    logged = {int(line["step"]): line["critic/dmd"] for line in read_metrics(made / "run")}
    assert told == pytest.approx(logged, rel=1e-5)


def test_only_the_newest_checkpoints_are_kept(made: Path) -> None:
    assert checkpoint.saved_steps(made / "run" / "checkpoints") == [8, 10]


def test_a_full_disk_keeps_the_last_checkpoint(micro: Config, made: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the write fails in the same place."""
    settings = json.dumps(
        micro.model_copy(update={"distill": micro.distill.model_copy(update={"steps": 8})}).model_dump(
            mode="json"
        )
    )
    code = """
import resource, signal, sys
from dmd2 import stages
from dmd2.training.checkpoint import Checkpoints
from dmd2.config import Config
from dmd2.errors import one_sentence
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save_async = Checkpoints.save_async
def limited(self, step, objects):
    if step == 8:
        self.wait_for_save()
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    save_async(self, step, objects)
Checkpoints.save_async = limited
with one_sentence():
    stages.distill(Config.model_validate_json(sys.argv[1]), *sys.argv[2:])
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    places = [str(made / "shards"), str(made / "teacher"), str(tmp_path / "run")]
    ended = subprocess.run(
        [warm.python(), "-c", code, settings, *places],
        env=warm.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 74, ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "run").exists()
    kept = tmp_path / ".run.partial" / "checkpoints"
    assert checkpoint.saved_steps(kept) == [4]
    assert tensors(kept)


@pytest.mark.parametrize(
    ("pattern", "damaged", "said"),
    [
        ("*.safetensors", lambda data: data[:100], "is not what was saved"),
        ("*.safetensors", lambda data: data[:-4] + bytes(4), "is not what was saved"),
        ("*.safetensors", lambda data: None, "is missing"),
        ("manifest.json", lambda data: b"", "is damaged"),
    ],
    ids=["truncated", "overwritten", "missing", "manifest"],
)
def test_a_damaged_checkpoint_is_named(
    pattern: str,
    damaged: Callable[[bytes], bytes | None],
    said: str,
    made: Path,
    tmp_path: Path,
    refusal: Callable[..., str],
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(made / "run" / "checkpoints", folder)
    (file,) = (folder / "00000010").glob(pattern)
    if (left := damaged(file.read_bytes())) is None:
        file.unlink()
    else:
        file.write_bytes(left)
    message = refusal(lambda: checkpoint.load(folder, 10, {"student": torch.nn.Linear(1, 1)}))
    assert f"{file} {said}" in message
    assert f"remove {folder / '00000010'}" in message


def test_a_torn_last_line_of_the_metrics_is_none(made: Path, tmp_path: Path) -> None:
    shutil.copy(made / "run" / METRICS, tmp_path)
    whole = read_metrics(tmp_path)
    with (tmp_path / METRICS).open("a") as stream:
        stream.write('{"step": 1')
    assert read_metrics(tmp_path) == whole
    truncate_after(tmp_path / METRICS, 10)
    assert (tmp_path / METRICS).read_text().endswith("}\n")


def test_teaching_resumes_too(
    micro: Config, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dmd2.training.trainer import DiffusionTrainer

    original = DiffusionTrainer.step

    def stopped(self: DiffusionTrainer, real: object, step: int) -> object:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, real, step)  # type: ignore[arg-type]

    monkeypatch.setattr(DiffusionTrainer, "step", stopped)
    with pytest.raises(Interrupted) as caught:
        stages.teach(micro, str(made / "shards"), str(tmp_path / "teacher"))
    assert caught.value.status == 75
    monkeypatch.setattr(DiffusionTrainer, "step", original)
    stages.teach(micro, str(made / "shards"), str(tmp_path / "teacher"))
    again, before = read_manifest(tmp_path / "teacher", "teacher"), read_manifest(made / "teacher", "teacher")
    weights = [{f.path: f.sha256 for f in m.files}["network.safetensors"] for m in (again, before)]
    assert weights[0] == weights[1]
