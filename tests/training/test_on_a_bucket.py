"""Artifacts on a bucket: made, resumed by other machines, contended for, published, and read through the cache."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dmd2 import stages
from dmd2.config import Config
from dmd2.errors import Refused
from dmd2.io.artifact import MANIFEST, open_artifact, read_manifest
from dmd2.io.destination import CONTENTS, SECONDS, STARTED_WITH
from dmd2.io.staging import Draft, draft_artifact
from dmd2.io.storage import cache, open_store, upload_files
from dmd2.training import checkpoint
from dmd2.training.trainer import DMD2Trainer
from tests import warm
from tests.bucket import DOWNLOAD, UPLOAD, Proxy, flip_bit, list_names, names_in_manifest, wait_until
from tests.conftest import MICRO, flags

Node = Callable[[str], None]


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    """Continue as another machine, with an empty cache of its own."""
    return lambda name: monkeypatch.setenv("DMD2_CACHE", str(tmp_path / name))


def copied(folder: Path, uri: str) -> str:
    upload_files(folder, list_names(str(folder)), open_store(uri))
    return uri


def sums(folder: str | Path, kind: str) -> dict[str, str]:
    return {file.path: file.sha256 for file in read_manifest(folder, kind).files}


def files(folder: Path) -> dict[str, str]:
    return {
        e.name: open_store(folder).read(e.name).decode()
        for e in open_store(folder).list_objects()
        if e.name != MANIFEST
    }


def test_a_whole_run_with_nothing_but_a_bucket_is_the_run_with_folders(
    micro: Config, made: Path, pictures: Path, bucket: str, tmp_path: Path
) -> None:
    source = copied(pictures, f"{bucket}/source")
    data, teacher, run, evaluation, gate, package = (
        f"{bucket}/run/{name}" for name in ("shards", "teacher", "run", "evaluation", "gate", "package")
    )
    assert stages.shard(micro, source, data).digest == read_manifest(made / "shards", "shards").digest
    stages.teach(micro, data, teacher)
    stages.distill(micro, data, teacher, run)
    for folder, kind in ((teacher, "teacher"), (run, "run")):
        assert sums(folder, kind)["network.safetensors"] == sums(made / kind, kind)["network.safetensors"]
    facts = stages.evaluate(micro, data, teacher, run, evaluation).facts
    assert facts["fid_student"] == read_manifest(made / "evaluation", "evaluation").facts["fid_student"]
    generous = micro.model_copy(update={"gate": micro.gate.model_copy(update={"factor": 1e6})})
    assert stages.gate(generous, evaluation, gate).facts["decision"] == "accepted"
    stages.package(run, evaluation, gate, package)
    stages.report(data, teacher, run, evaluation, gate, f"{bucket}/report.html", package)
    stages.sample(package, f"{bucket}/grid.png", count=6)
    for folder in (data, teacher, run, evaluation, gate, package):
        assert list_names(folder) == names_in_manifest(folder)
    assert b"accepted" in open_store(bucket).read("report.html")
    open_store(bucket).download("grid.png", tmp_path / "grid.png")
    stages.sample(str(made / "run"), str(tmp_path / "local.png"), count=6)
    grids = [Image.open(tmp_path / name).tobytes() for name in ("grid.png", "local.png")]
    assert grids[0] == grids[1]
    assert not list((cache() / "drafts").iterdir())


def test_a_run_whose_machine_is_lost_goes_on_elsewhere_and_ends_with_the_same_bits(
    micro: Config, made: Path, bucket: str, tmp_path: Path, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL, the cache is deleted, a checkpoint is half uploaded. Then the same stage runs on another machine."""
    more = ("distill.steps=40", "distill.save_every=4")
    slow = micro.model_copy(update={"distill": micro.distill.model_copy(update={"steps": 40})})
    stages.distill(slow, str(made / "shards"), str(made / "teacher"), str(tmp_path / "whole"))
    data, teacher = (copied(made / name, f"{bucket}/{name}") for name in ("shards", "teacher"))
    out = f"{bucket}/run"
    command = [
        *warm.dmd2("distill", "edm-digits"), "--data", data, "--teacher", teacher,
        "--out", out, *flags((*MICRO, *more)),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, env=warm.environment(), start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: process.poll() is not None or max(sent(out), default=0) >= 8)
    os.killpg(process.pid, signal.SIGKILL)
    said = process.communicate()[1]  # which ends when the last of its processes does
    assert process.returncode == -signal.SIGKILL, said
    shutil.rmtree(cache())
    last = max(sent(out))
    open_store(out).write("checkpoints/00000039/student.safetensors", b"half of it")
    node("elsewhere")
    played, original = [], DMD2Trainer.step

    def counted(self: DMD2Trainer, real: object, step: int) -> object:
        played.append(step)
        return original(self, real, step)  # type: ignore[arg-type]

    monkeypatch.setattr(DMD2Trainer, "step", counted)
    stages.distill(slow, data, teacher, out)
    assert played == list(range(last, 40))
    assert sums(out, "run")["network.safetensors"] == sums(tmp_path / "whole", "run")["network.safetensors"]
    assert list_names(out) == names_in_manifest(out)
    open_artifact(out, read_manifest(out, "run"))


def sent(out: str) -> set[int]:
    """The steps of the checkpoints in the list of files of an unfinished run."""
    try:
        named = json.loads(open_store(out).read(CONTENTS))
    except FileNotFoundError:
        return set()
    return {int(name.split("/")[1]) for name in named if name.startswith("checkpoints/")}


def save(draft: Draft, step: int) -> None:
    """Write two files in the place of a checkpoint, and a log beside them."""
    folder = draft.path / "checkpoints" / f"{step:08d}"
    folder.mkdir(parents=True)
    for name in ("critic", MANIFEST):
        (folder / name).write_text(f"{name} {step}")
    (draft.path / "log").write_text(str(step))


def stopped(out: str, config: Config) -> None:
    """A run that fails after a checkpoint."""

    def stop() -> None:
        with draft_artifact(out, "run", config, {}, resumable=True) as draft:
            save(draft, 1)
            draft.save()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        stop()


@pytest.mark.parametrize("let_pass", [0, 2, 4])
def test_a_checkpoint_that_was_sent_by_half_is_not_used(
    micro: Config, bucket: str, proxy: Proxy, node: Node, monkeypatch: pytest.MonkeyPatch, let_pass: int
) -> None:
    """The bucket fails at one of the requests of an upload."""
    out = f"{bucket}/run"
    monkeypatch.setenv("DMD2_RETRY_S", "0.2")

    def stop() -> None:
        with draft_artifact(out, "run", micro, {}, resumable=True) as draft:
            save(draft, 1)
            draft.save()
            save(draft, 2)
            proxy.fail(UPLOAD, "503", after=let_pass)
            draft.save()

    with pytest.raises(OSError, match="does not answer"):
        stop()
    proxy.rules.clear()
    node("elsewhere")
    with draft_artifact(out, "run", micro, {}, resumable=True) as draft:
        assert checkpoint.saved_steps(draft.path / "checkpoints") == [1]
        save(draft, 3)
    assert [name for name in sums(out, "run") if "0002" in name] == []
    assert list_names(out) == names_in_manifest(out)
    open_artifact(out, read_manifest(out, "run"))


def test_what_is_there_is_not_sent_again(micro: Config, bucket: str, proxy: Proxy, node: Node) -> None:
    stopped(f"{bucket}/run", micro)
    node("elsewhere")
    with draft_artifact(f"{bucket}/run", "run", micro, {}, resumable=True) as draft:
        before = proxy.count(UPLOAD)
        draft.save()
        assert proxy.count(UPLOAD) - before == 2, "that it works here, and what there is"
        shutil.rmtree(draft.path / "checkpoints" / "00000001")
        save(draft, 2)
        draft.save()
        assert proxy.count(UPLOAD) - before == 2 + 2 + 3
        assert [n for n in list_names(f"{bucket}/run") if "00000001" in n] == []


def test_time_is_counted_over_machines(micro: Config, bucket: str, node: Node) -> None:
    stopped(f"{bucket}/run", micro)
    open_store(f"{bucket}/run").write(SECONDS, b"1000")
    node("elsewhere")
    with draft_artifact(f"{bucket}/run", "run", micro, {}, resumable=True):
        pass
    assert 1000 <= read_manifest(f"{bucket}/run", "run").seconds < 1100


def test_the_process_that_began_last_goes_on_and_the_one_before_gives_way(
    micro: Config, bucket: str, node: Node
) -> None:
    """A machine that was believed lost comes back."""
    out = f"{bucket}/run"

    def come_back() -> None:
        with draft_artifact(out, "run", micro, {}, resumable=True) as old:
            save(old, 1)
            old.save()
            node("elsewhere")
            with draft_artifact(out, "run", micro, {}, resumable=True) as new:
                assert checkpoint.saved_steps(new.path / "checkpoints") == [1]
                save(new, 2)
                (old.path / "log").write_text("of the old one")
                with pytest.raises(Refused, match="another process has begun to work"):
                    old.save()
                new.save()
            old.save()

    with pytest.raises(Refused, match=f"another process has begun to work in {out}"):
        come_back()
    folder = open_artifact(out, read_manifest(out, "run"))
    assert (folder / "log").read_text() == "2"


@pytest.mark.parametrize("resumable", [True, False])
def test_a_result_that_comes_too_late_is_dropped_and_the_first_stays_whole(
    micro: Config, bucket: str, node: Node, resumable: bool
) -> None:
    out = f"{bucket}/out"

    def finish_late() -> None:
        with draft_artifact(out, "run", micro, {}, resumable=resumable) as late:
            (late.path / "result").write_text("late")
            (late.path / "more").write_text("late")
            node("elsewhere")
            with draft_artifact(out, "run", micro, {}, resumable=resumable) as first:
                (first.path / "result").write_text("first")

    with pytest.raises(Refused, match="another process"):
        finish_late()
    assert files(open_artifact(out, read_manifest(out, "run"))) == {"result": "first"}
    assert list_names(out) == names_in_manifest(out)


def finish(out: str, number: int, together: Barrier, place: Path) -> None:
    os.environ["DMD2_CACHE"] = str(place / str(number))
    try:
        with draft_artifact(out, "gate", None, {}) as draft:
            (draft.path / "winner").write_text(f"{number}")
            (draft.path / f"of {number}").write_text("")
            together.wait()
    except Refused as error:
        os._exit(64 if "another process" in str(error) else 1)


def test_of_four_processes_that_finish_a_folder_at_once_one_wins_and_the_others_are_told(
    bucket: str, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("fork")
    for attempt in range(3):
        out, together = f"{bucket}/{attempt}", context.Barrier(4)
        processes = [
            context.Process(target=finish, args=(out, n, together, tmp_path / str(attempt))) for n in range(4)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        codes = [process.exitcode for process in processes]
        assert sorted(map(str, codes)) == ["0", "64", "64", "64"]
        winner = codes.index(0)
        assert files(open_artifact(out, read_manifest(out, "gate"))) == {
            "winner": f"{winner}",
            f"of {winner}": "",
        }


def test_a_prefix_that_holds_other_things_is_refused_and_left_alone(
    micro: Config, pictures: Path, bucket: str, refusal: Callable[..., str]
) -> None:
    open_store(f"{bucket}/thesis").write("chapters/1.tex", b"years of work")
    sentence = refusal(lambda: stages.shard(micro, str(pictures), f"{bucket}/thesis"))
    assert f"{bucket}/thesis holds other things, 'chapters/1.tex' for one" in sentence
    assert list_names(f"{bucket}/thesis") == ["chapters/1.tex"]
    stages.shard(micro, str(pictures), f"{bucket}/thes")
    assert list_names(f"{bucket}/thesis") == ["chapters/1.tex"]


def test_what_cannot_be_continued_leaves_the_place_free(micro: Config, bucket: str) -> None:
    def fail() -> None:
        with draft_artifact(f"{bucket}/run", "run", micro, {}, resumable=True):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list_names(bucket) == []
    with draft_artifact(f"{bucket}/run", "run", micro.model_copy(update={"seed": 7}), {}, resumable=True):
        pass
    assert read_manifest(f"{bucket}/run", "run").config != micro


def test_unfinished_work_of_another_config_is_refused_by_its_address(
    micro: Config, bucket: str, node: Node, refusal: Callable[..., str]
) -> None:
    out = f"{bucket}/run"
    stopped(out, micro)
    before = list_names(out)
    assert STARTED_WITH in before
    node("elsewhere")
    other = micro.model_copy(update={"seed": 7})
    sentence = refusal(lambda: draft_artifact(out, "run", other, {}, resumable=True).__enter__())
    assert f"the unfinished {out} was begun with another configuration (seed: 0 -> 7)" in sentence
    assert list_names(out) == before


def test_a_checkpoint_that_is_missing_from_the_bucket_is_named(
    micro: Config, bucket: str, node: Node
) -> None:
    out = f"{bucket}/run"
    stopped(out, micro)
    open_store(out).delete(["checkpoints/00000001/critic"])
    node("elsewhere")
    with pytest.raises(FileNotFoundError, match=f"{out}/checkpoints/00000001/critic"):
        draft_artifact(out, "run", micro, {}, resumable=True).__enter__()


def test_a_changed_object_is_named_and_never_enters_the_cache(
    made: Path, bucket: str, refusal: Callable[..., str]
) -> None:
    folder = copied(made / "teacher", f"{bucket}/teacher")
    manifest, good = read_manifest(folder, "teacher"), open_store(folder).read("network.json")
    open_store(folder).write("network.json", good.replace(b"8", b"9"))
    for _ in range(2):
        assert f"{folder}/network.json was changed" in refusal(
            lambda: open_artifact(folder, manifest, "network.*")
        )
    open_store(folder).delete(["network.json"])
    assert f"{folder}/network.json is missing" in refusal(
        lambda: open_artifact(folder, manifest, "network.*")
    )
    open_store(folder).write("network.json", good)
    assert (open_artifact(folder, manifest, "network.*") / "network.json").read_bytes() == good


def test_a_damaged_copy_in_the_cache_is_fetched_again(made: Path, bucket: str, proxy: Proxy) -> None:
    folder = copied(made / "teacher", f"{bucket}/teacher")
    manifest = read_manifest(folder, "teacher")
    path = open_artifact(folder, manifest, "network.*") / "network.safetensors"
    before = proxy.count(DOWNLOAD)
    open_artifact(folder, manifest, "network.*")
    assert proxy.count(DOWNLOAD) == before
    flip_bit(path, 1000)
    open_artifact(folder, manifest, "network.*")
    assert proxy.count(DOWNLOAD) == before + 1
    assert path.read_bytes() == (made / "teacher" / "network.safetensors").read_bytes()


def machines(tmp_path: Path, names: str, *words: str) -> list[subprocess.Popen[str]]:
    """The same command on several machines, each with a disk of its own and one process, as torchrun starts it there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    together = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(names)), "LOCAL_WORLD_SIZE": "1",
        "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "run", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    return [
        subprocess.Popen(
            warm.dmd2(*words), stderr=subprocess.PIPE, text=True, start_new_session=True,
            env=warm.environment(**together, RANK=str(rank), DMD2_CACHE=str(tmp_path / name)),
        )
        for rank, name in enumerate(names)
    ]  # fmt: skip


def test_machines_that_share_nothing_but_the_bucket_bring_their_own_files_there(
    micro: Config, made: Path, bucket: str, tmp_path: Path
) -> None:
    """Two machines are killed after a checkpoint. Two others resume from it, with the result of a single process."""
    run = f"{bucket}/run"
    places = ("--data", str(made / "shards"), "--teacher", str(made / "teacher"))
    words = ("distill", "edm-digits", *places, *flags((*MICRO, "engine.shards=2")))
    first = machines(tmp_path, "ab", *words, "--out", run)
    wait_until(
        lambda: (
            bool(open_store(run).version(CONTENTS))
            and f"checkpoints/00000004/{MANIFEST}" in open_store(run).read(CONTENTS).decode()
        )
    )
    for process in first:
        process.kill()
        process.communicate()
    told = json.loads(open_store(run).read(f"checkpoints/00000004/{MANIFEST}"))
    assert len(told["files"]) == 2
    assert {name for name in list_names(run) if "/00000004/" in name} >= {
        f"checkpoints/00000004/{n}" for n in told["files"]
    }
    for process in machines(tmp_path, "cd", *words, "--out", run):
        said = process.communicate(timeout=600)[1]
        assert process.returncode == 0, said[-3000:]
    assert list_names(run) == names_in_manifest(run), "nothing else is left there"
    assert read_manifest(run, "run").facts.keys() == read_manifest(made / "run", "run").facts.keys()
    found, alone = (
        load_file(open_artifact(place, read_manifest(place, "run"), "network*") / "network.safetensors")
        for place in (run, made / "run")
    )
    for name, weight in alone.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-4)

    for process in machines(tmp_path, "ef", *words, "--out", str(tmp_path / "local")):
        said = process.communicate(timeout=600)[1]
        assert process.returncode == 0, said[-3000:]  # both see this disk
