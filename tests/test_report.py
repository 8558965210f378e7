"""The curves of the report: each metric of a training log is in its panel."""

from __future__ import annotations

import html
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dmd2.data.loader import Shards
from dmd2.data.shard_table import HOLDOUT, TRAIN
from dmd2.image_grid import image_grid
from dmd2.io.artifact import ArtifactFile, Manifest, read_manifest
from dmd2.model import load_network
from dmd2.report import panel_metrics, write_report
from dmd2.rng import seed_of_part
from dmd2.training.metrics_log import read_metrics

PINNED = Path(__file__).parent / "pinned"


@pytest.mark.parametrize(
    ("metric", "title"),
    [
        ("checkpoint/fid", "FID to training samples, at the checkpoints"),
        ("student/lr", "Learning rate"),
        ("student/dmd", "Losses of the student"),
        ("student/dmd_grad_l1", "L1 norm of the gradient at the samples, by term"),
        ("student/dmd_gradient", "L1 norm of the gradient at the samples, by term"),
        ("critic/gan", "Losses of the critic (dmd = denoising)"),
        ("critic/grad_norm", "Gradient norm of the weights, before clipping"),
        ("critic/skipped", "Skipped updates"),
        ("samples_per_s", "Samples per second"),
        ("mfu", "Model FLOPs utilization (MFU)"),
        ("peak_memory_gb", "Peak memory, in GB"),
        ("time/data_s", "Time of a mean step by phase, in seconds"),
        ("something/new", "Other metrics"),
    ],
)
def test_a_metric_is_in_its_panel(metric: str, title: str) -> None:
    found = panel_metrics([{"step": 1, metric: 0.5, "eta_s": 3.0}])
    assert {panel.title: names for panel, names in found.items()} == {title: [metric]}


def test_a_log_of_an_earlier_version_has_all_its_curves(tmp_path: Path) -> None:
    shutil.copy(PINNED / "stopped" / "metrics.jsonl", tmp_path)
    found = {panel.title: names for panel, names in panel_metrics(read_metrics(tmp_path)).items()}
    assert {"Losses of the student", "Learning rate", "Samples per second"} - found.keys() == {
        "Learning rate"
    }
    assert "student/dmd" in found["Losses of the student"]
    assert "Other metrics" not in found


def test_a_current_log_has_all_its_curves(made: Path) -> None:
    found = {panel.title: names for panel, names in panel_metrics(read_metrics(made / "run")).items()}
    assert "Other metrics" not in found
    assert {"student/lr", "critic/lr"} <= {*found["Learning rate"]}
    assert "Time of a mean step by phase, in seconds" in found


def test_the_page_shows_what_became_of_the_source_and_the_nearest_training_images(
    made: Path, tmp_path: Path
) -> None:
    kinds = ("shards", "teacher", "run", "evaluation", "gate")
    manifests = {kind: read_manifest(made / kind, kind) for kind in kinds}
    write_report(tmp_path / "report.html", manifests, made / "run", made / "evaluation")
    assert "<h2>Data</h2>" in (page := (tmp_path / "report.html").read_text())
    assert "<li>used: images 60</li>" in page
    nearest = manifests["evaluation"].facts["memorisation"]["nearest"][0]
    assert "to 24 training images: student" in page
    assert f"distance {nearest['distance']:.3g}: class {nearest['prompt']}" in page
    assert "Student, 1 network call; columns: classes 0 to 2" in page
    manifests["shards"].facts.pop("account")  # shards of version 0.1
    write_report(tmp_path / "report.html", manifests, made / "run", made / "evaluation")
    assert "<h2>Data</h2>" not in (tmp_path / "report.html").read_text()


def test_nothing_of_a_manifest_becomes_a_part_of_the_page(made: Path, tmp_path: Path) -> None:
    folders = {
        "shards": "shards",
        "teacher": "teacher",
        "run": "run",
        "evaluation": "evaluation",
        "gate": "gate",
    }
    manifests = {kind: read_manifest(made / name, kind) for kind, name in folders.items()}
    manifests = {kind: manifest.model_copy(update=poisoned(manifest)) for kind, manifest in manifests.items()}
    write_report(tmp_path / "report.html", manifests, made / "run", made / "evaluation")
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert '" onload' not in page
    assert "&lt;script" in page


def poisoned(manifest: Manifest) -> dict[str, Any]:
    """The texts of a manifest that nothing computes with, each with a script."""
    script = '"><script>alert(1)</script><b class="" onload="'

    def poison(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {key: poison(each, key) for key, each in value.items()}
        if isinstance(value, list):
            return [poison(each, name) for each in value]
        computed = {"name", "format", "better", "file", "split"}
        return value + script if isinstance(value, str) and name not in computed else value

    return {
        "facts": poison(manifest.facts),
        "versions": {name + script: script for name in manifest.versions},
    }


def test_the_page_shows_the_files_of_the_package_by_size(made: Path, tmp_path: Path) -> None:
    manifests = {kind: read_manifest(made / kind, kind) for kind in ("run", "evaluation", "gate")}
    write_report(tmp_path / "report.html", manifests, made / "run", made / "evaluation")
    assert "<h2>Package</h2>" not in (tmp_path / "report.html").read_text()
    files = [
        {"path": f"{name}.safetensors", "size": size, "sha256": 64 * "0"}
        for name, size in (("a", 10**6), ("b", 2 * 10**9))
    ]
    manifests["package"] = manifests["run"].model_copy(
        update={"kind": "package", "files": [ArtifactFile(**f) for f in files]}
    )
    write_report(tmp_path / "report.html", manifests, made / "run", made / "evaluation")
    text = re.sub(r"<[^>]+>", " ", (tmp_path / "report.html").read_text())
    assert re.search(r"b.safetensors\s+2,000.0\s+a.safetensors\s+1.0\s+all files\s+2,001.0", text)


@pytest.mark.slow
def test_the_page_of_a_run_at_1024_pixels_is_below_10_mb(made: Path, tmp_path: Path) -> None:
    """Grids of 2 x 4 images of 1024 pixels, noise being the worst that a JPEG can hold."""
    evaluation, run = tmp_path / "evaluation", tmp_path / "run"
    shutil.copytree(made / "evaluation", evaluation)
    shutil.copytree(made / "run", run)
    pixels = np.random.default_rng(0).integers(0, 256, (2048, 4096, 3), dtype=np.uint8)
    noise = Image.fromarray(pixels).resize((1024, 512)).resize((4096, 2048))
    noise.save(tmp_path / "large.png", compress_level=0)
    for path in (*evaluation.rglob("*.png"), *(run / "previews").glob("*.png")):
        shutil.copy(tmp_path / "large.png", path)
    manifests = {kind: read_manifest(made / kind, kind) for kind in ("run", "evaluation", "gate")}
    write_report(tmp_path / "report.html", manifests, run, evaluation)
    page = (tmp_path / "report.html").read_text()
    assert "data:image/jpeg" in page
    assert len(page) < 10e6


def test_the_nearest_training_images_are_pictured(made: Path) -> None:
    """The pictures are those of the rows: each sample drawn again, above its training image."""
    manifest = read_manifest(made / "evaluation", "evaluation")
    about, train = manifest.facts["memorisation"], Shards(made / "shards", TRAIN)
    assert about["shares"].keys() == {"student", "teacher"}
    assert about["training_images"] == 24
    sheet = np.asarray(Image.open(made / "evaluation" / "galleries" / "nearest.png"))
    real = train.select(train.even_positions(24)).image
    student = load_network(made / "run")
    for column, each in enumerate(about["nearest"]):
        row, start = each["row"], each["row"] // 12 * 12
        left = column * 9 + 1
        np.testing.assert_array_equal(sheet[10:18, left : left + 8], real[each["training_row"], 0])
        classes = Shards(made / "shards", HOLDOUT)
        labels = [label for label, _ in classes.labels_and_texts(classes.even_positions(24))]
        prompts = [labels[i % len(labels)] for i in range(start, start + 12)]
        sample = student.sample(prompts, seed_of_part(10, start))[row - start, 0]
        np.testing.assert_array_equal(sheet[1:9, left : left + 8], sample)
        assert each["prompt"] == prompts[row - start]


def test_the_page_shows_intervals_conditions_the_card_and_captions_beside_pictures(
    made: Path, tmp_path: Path
) -> None:
    """The captions and CLIP scores are those of an evaluation of a text-to-image student."""
    evaluation = Path(shutil.copytree(made / "evaluation", tmp_path / "evaluation"))
    texts = [f"<b>picture {index}" for index in range(8)]
    image_grid(torch.randint(0, 256, (8, 3, 160, 160), dtype=torch.uint8), 4).save(evaluation / "student.png")
    shutil.copy(evaluation / "student.png", evaluation / "teacher.png")
    image_grid(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), 2).save(
        evaluation / "galleries" / "lowest_clip.png"
    )
    manifests = {kind: read_manifest(made / kind, kind) for kind in ("run", "evaluation", "gate")}
    lowest = [{"row": i, "score": 0.1 + i, "prompt": f"low {i}"} for i in range(2)]
    manifests["evaluation"].facts.update({"grid_prompts": texts, "lowest_clip": lowest})
    write_report(tmp_path / "report.html", manifests, made / "run", evaluation)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<figcaption>&lt;b&gt;picture ") == 8
    assert "<figcaption>0.100: low 0</figcaption>" in page
    page = html.unescape(page)
    assert "<td>fid<=1e+06*teacher</td><td class=n>met</td>" in page
    assert f'"reference": "{read_manifest(made / "shards", "shards").digest}"' in page
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
