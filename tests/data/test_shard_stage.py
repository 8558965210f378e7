"""`dmd2 shard`: what it makes, and what it says when the source is wrong."""

from __future__ import annotations

import concurrent.futures
import hashlib
import shutil
from collections.abc import Callable, Sized
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import torch
from PIL import Image

from dmd2 import recipes, stages
from dmd2.config import Config
from dmd2.data import workers
from dmd2.data.decode import prepare_image
from dmd2.data.layouts import open_source
from dmd2.data.layouts.arrays import digits
from dmd2.data.loader import Shards
from dmd2.data.shards import write_shards
from dmd2.data.units import ShardingJob, Unit
from dmd2.errors import Refused
from dmd2.io.artifact import read_manifest
from dmd2.io.local import LocalStore
from dmd2.io.staging import draft_artifact


@pytest.fixture
def source(pictures: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pictures, tmp_path / "source"))


def with_data(config: Config, **changes: int) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})


def test_the_same_source_gives_the_same_bytes(
    micro: Config, source: Path, made: Path, tmp_path: Path
) -> None:
    again = stages.shard(micro, str(source), str(tmp_path / "again"))
    assert again.digest == read_manifest(made / "shards", "shards").digest


def test_facts_count_images_classes_and_shards(made: Path) -> None:
    facts = read_manifest(made / "shards", "shards").facts
    assert (facts["train"], facts["holdout"], facts["classes"]) == (48, 12, ["across", "blob", "down"])
    assert sum(facts["histogram"]) == 60
    assert [shard["images"] for shard in facts["shards"]] == [16, 16, 16, 12]


def test_digits_are_5000_of_ten_classes_at_32_pixels() -> None:
    source = digits()
    assert len(source.records) == 5000
    assert source.classes == [str(d) for d in range(10)]
    record = source.records[1234]
    image = record.decode(record.read())
    assert (image.size, image.mode) == ((32, 32), "L")
    pixels = np.asarray(image)
    assert pixels.max() > 200
    assert pixels[:2].max() == 0


def test_a_few_broken_files_are_skipped_and_named(micro: Config, source: Path, tmp_path: Path) -> None:
    (source / "blob" / "broken.png").write_bytes(b"no image at all")
    whole = (source / "blob" / "00.png").read_bytes()
    (source / "down" / "cut.png").write_bytes(whole[: len(whole) // 2])
    facts = stages.shard(with_data(micro, max_broken=2), str(source), str(tmp_path / "out")).facts
    assert facts["train"] + facts["holdout"] == 60
    assert sorted(Path(line.split(":")[0]).name for line in facts["broken"]) == ["broken.png", "cut.png"]


def test_too_many_broken_files_stop_it_and_a_higher_limit_goes_on(
    micro: Config, source: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    for index in range(3):
        (source / "blob" / f"broken{index}.png").write_bytes(b"no image")
    out = tmp_path / "made" / "out"
    sentence = refusal(lambda: stages.shard(with_data(micro, max_broken=2), str(source), str(out)))
    assert "3 files are no readable images" in sentence
    assert "broken" in sentence
    assert not out.exists()


@pytest.mark.parametrize(
    ("prepare_source", "words"),
    [
        (lambda path: shutil.rmtree(path), "does not exist"),
        (lambda path: [shutil.rmtree(p) for p in path.iterdir()], "is empty"),
        (
            lambda path: shutil.copy(path / "blob" / "00.png", path / "stray.png"),
            "lies beside the class folders",
        ),
        (
            lambda path: [shutil.copytree(path / "blob", path / f"more{i}") for i in range(2)],
            "5 classes, the network",
        ),
    ],
)
def test_a_wrong_source_is_refused_in_one_sentence(
    micro: Config,
    source: Path,
    tmp_path: Path,
    refusal: Callable[..., str],
    prepare_source: Callable[[Path], object],
    words: str,
) -> None:
    prepare_source(source)
    assert words in refusal(lambda: stages.shard(micro, str(source), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_an_unknown_source_gets_the_near_miss(
    micro: Config, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    assert "did you mean 'digits'" in refusal(lambda: stages.shard(micro, "digit", str(tmp_path / "out")))


def test_holding_out_everything_is_refused(
    micro: Config, source: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    assert "only 60 images" in refusal(
        lambda: stages.shard(with_data(micro, holdout=60), str(source), str(tmp_path / "out"))
    )


def test_a_finished_folder_is_not_made_again_but_never_reused_for_another_config(
    micro: Config, source: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    out = str(tmp_path / "out")
    first = stages.shard(micro, str(source), out)
    assert stages.shard(micro, str(source), out) == first
    sentence = refusal(lambda: stages.shard(with_data(micro, holdout=10), str(source), out))
    assert "data.holdout: 12 -> 10" in sentence


def test_pictures_are_turned_cropped_and_resized() -> None:
    wide = Image.new("RGB", (40, 20), "black")
    wide.paste("white", (10, 0, 30, 20))
    assert np.asarray(prepare_image(wide, 8, 3)).min() == 255
    turned = Image.new("L", (16, 16))
    turned.paste(255, (0, 0, 16, 8))
    turned.getexif()[0x0112] = 3  # upside down
    pixels = np.asarray(prepare_image(turned, 16, 1))
    assert pixels[0, 0] == 0
    assert pixels[15, 0] == 255


def test_shards_of_one_source_are_not_taken_for_those_of_another(
    micro: Config, source: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    out = str(tmp_path / "out")
    stages.shard(micro, str(source), out)
    Image.new("L", (8, 8)).save(source / "blob" / "new.png")
    assert "other inputs" in refusal(lambda: stages.shard(micro, str(source), out))


def test_hidden_folders_are_no_classes(micro: Config, source: Path, tmp_path: Path) -> None:
    shutil.copytree(source / "blob", source / ".ipynb_checkpoints")
    assert len(stages.shard(micro, str(source), str(tmp_path / "out")).facts["classes"]) == 3


def test_a_higher_limit_takes_up_what_was_done(micro: Config, source: Path, tmp_path: Path) -> None:
    for index in range(3):
        (source / "blob" / f"broken{index}.png").write_bytes(b"no image")
    with pytest.raises(Refused, match="3 files are no readable images"):
        stages.shard(with_data(micro, max_broken=2), str(source), str(tmp_path / "out"))
    manifest = stages.shard(with_data(micro, max_broken=3), str(source), str(tmp_path / "out"))
    assert manifest.facts["train"] + manifest.facts["holdout"] == 60
    assert manifest.digest == stages.shard(micro, str(source), str(tmp_path / "anew")).digest


def test_a_table_holds_the_same_samples_as_the_shards(
    micro: Config, source: Path, made: Path, tmp_path: Path
) -> None:
    tables = micro.model_copy(update={"data": micro.data.model_copy(update={"format": "lmdb"})})
    manifest = stages.shard(tables, str(source), str(tmp_path / "out"))
    assert [file.path for file in manifest.files] == ["holdout.lmdb", "train.lmdb"]
    for split in ("train", "holdout"):
        ours, theirs = (Shards(path, split).evenly_spaced(60) for path in (tmp_path / "out", made / "shards"))
        assert torch.equal(ours.image, theirs.image)
        assert torch.equal(ours.label, theirs.label)


def test_small_and_stretched_images_are_counted_by_reason(
    micro: Config, source: Path, tmp_path: Path
) -> None:
    Image.new("L", (4, 4)).save(source / "blob" / "tiny.png")
    Image.new("L", (64, 8)).save(source / "blob" / "wide.png")
    facts = stages.shard(with_data(micro, min_side=5, max_aspect=4), str(source), str(tmp_path / "out")).facts
    assert {reason: tally["count"] for reason, tally in facts["account"]["left_out"].items()} == {
        "images whose shorter side is below 5 pixels": 1,
        "images with sides beyond 4 to 1": 1,
    }
    assert facts["train"] + facts["holdout"] == 60


def test_each_shard_has_its_checksums_and_histogram(made: Path) -> None:
    manifest = read_manifest(made / "shards", "shards")
    shard = manifest.facts["shards"][0]
    content = (made / "shards" / shard["file"]).read_bytes()
    listed = {file.path: file.sha256 for file in manifest.files}
    assert shard["crc32c"] == google_crc32c.Checksum(content).hexdigest().decode()
    assert listed[shard["file"]] == hashlib.sha256(content).hexdigest()
    assert sum(shard["histogram"].values()) == shard["images"] == 16


def test_a_disk_that_fails_is_not_taken_for_a_broken_image(
    micro: Config, source: Path, tmp_path: Path
) -> None:
    vanishing = source / "blob" / "vanishing.png"
    shutil.copy(source / "blob" / "00.png", vanishing)
    opened = open_source(str(source))
    vanishing.unlink()
    with pytest.raises(FileNotFoundError), draft_artifact(tmp_path / "out", "shards", micro, {}) as draft:
        write_shards(opened, micro, draft, 2)


def test_a_table_without_a_holdout_says_so(
    micro: Config, source: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    data = micro.data.model_copy(update={"format": "lmdb", "holdout": 0})
    stages.shard(micro.model_copy(update={"data": data}), str(source), str(tmp_path / "out"))
    assert "holds no holdout images" in refusal(lambda: Shards(tmp_path / "out", "holdout"))


def test_units_are_given_out_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million units that all wait would each be looked at whenever one of them ends."""
    waiting: list[int] = []

    def wait(futures: Sized, **settings: Any) -> Any:
        waiting.append(len(futures))
        return concurrent.futures.wait(futures, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(workers, "wait", wait)
    units = [Unit(n, lambda account: iter(()), "train", 0) for n in range(30)]
    data = recipes.get("edm-digits").data
    job = ShardingJob(data, 8, 1, tmp_path, LocalStore(tmp_path), False, 0)
    for unit, text in workers.run_in_processes("units", lambda unit, *_: str(unit.number), units, job, 2):
        assert text == str(unit.number)
    assert max(waiting) == 4
