"""What a recipe would download is copied to a folder or bucket once, for machines without a way to the Internet."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dmd2.config import Config
from dmd2.evaluation import metrics
from dmd2.evaluation.measurements import FEATURES
from dmd2.io.artifact import MIRRORED_TEACHER
from dmd2.io.local import sha256
from dmd2.io.storage import exists, join_uri, open_store
from dmd2.stages.resolve import resolve

if TYPE_CHECKING:
    from dmd2.config import WeightsConfig


def mirror(config: Config, out: str, teacher: str = "", safety_checker: str = "") -> str:
    """Copy the feature networks and decoders of a recipe, a teacher and a safety checker, and say by which overrides and parameters they
    are used.

    A copy has the digest of its content in its address: what is there already is not copied again, and never changes. Inception, which is
    published as a program (TorchScript), is run here once and copied as tensors.

    Args:
        out: Folder to write to, local or gs://.
        teacher: Teacher to resolve into `<out>/teacher`, as `dmd2 resolve` does; empty = none.
        safety_checker: Pipeline of Stable Diffusion 1.5 whose safety checker packages shall get; empty = none.
    """
    overrides: dict[str, str] = {}
    for field, weights in pretrained_files(config).items():
        overrides |= _copy_file(field, weights, out)
    overrides |= {field: _copy_folder(field, name, out) for field, name in pretrained_folders(config).items()}
    lines = [f"{field}={address}" for field, address in overrides.items()]
    if teacher:
        resolve(config, teacher, join_uri(out, MIRRORED_TEACHER))
        lines.append(f"teacher: {join_uri(out, MIRRORED_TEACHER)}")
    if safety_checker:
        from dmd2.encoders.safety import fetch_safety_checker

        lines.append(f"safety_checker: {_store_by_content(fetch_safety_checker(safety_checker), out)}")
    return "\n".join(lines) or f"{config.recipe} downloads nothing"


def pretrained_files(config: Config) -> dict[str, WeightsConfig]:
    """{field of the Config: file of weights} that the stages of a recipe load beside the teacher."""
    settings, scored = config.distill, config.evaluate
    uses_features = _read_by_metrics(config) & {FEATURES, "patches", "classes"}
    files = {
        "evaluate.inception": scored.inception if uses_features and scored.features == "inception" else None,
        "distill.best.inception": settings.best.inception
        if settings.best.images and settings.best.features == "inception"
        else None,
        "distill.regression.vgg": settings.regression.vgg
        if settings.regression and settings.regression.metric == "lpips"
        else None,
    }
    return {field: file for field, file in files.items() if file}


def pretrained_folders(config: Config) -> dict[str, str]:
    """{field of the Config: folder or name on the hub} of the networks that the stages of a recipe load beside the teacher."""
    regression, reads = config.distill.regression, _read_by_metrics(config)
    folders = {
        "evaluate.clip": config.evaluate.clip if reads & {"clip", "clip_images"} else "",
        "evaluate.dinov2": config.evaluate.dinov2 if "dinov2" in reads else "",
        "distill.regression.decoder": regression.decoder if regression else "",
        "distill.preview_vae": config.distill.preview_vae,
    }
    return {field: folder for field, folder in folders.items() if folder}


def _read_by_metrics(config: Config) -> set[str]:
    """What the metrics of the evaluation are computed from."""
    return {metric.reads for metric in metrics.select(config.evaluate.metrics)}


def _copy_file(field: str, weights: WeightsConfig, out: str) -> dict[str, str]:
    """Overrides that use the copy."""
    from dmd2.evaluation.weights import fetch_weights

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / weights.uri.rpartition("/")[2]
        if field.endswith(".inception") and path.suffix != ".safetensors":
            from dmd2.evaluation.features import fetch_inception_tensors

            path = fetch_inception_tensors(weights, Path(scratch), f"--{field}")
        else:
            fetch_weights(weights, path, f"--{field}")
        digest = sha256(path)
        found = {f"{field}.uri": _store({path.name: path}, out, digest) + f"/{path.name}"}
        return found if digest.startswith(weights.sha256) else found | {f"{field}.sha256": digest}


def _copy_folder(field: str, source: str, out: str) -> str:
    return _store_by_content(
        _transformers_files(source) if field.startswith("evaluate.") else _vae_files(source), out
    )


def _transformers_files(source: str) -> dict[str, Path]:
    from dmd2.encoders.pipeline_folder import TOKENIZER_FILES, fetch_files
    from dmd2.encoders.weight_files import weight_files
    from dmd2.evaluation.clip_score import PREPROCESSOR, WEIGHTS

    names = ["config.json", PREPROCESSOR, *TOKENIZER_FILES]
    folder = fetch_files(source, [*names, WEIGHTS])
    there = {name: folder / name for name in names if (folder / name).is_file()}
    return there | weight_files(folder, WEIGHTS)


def _vae_files(source: str) -> dict[str, Path]:
    from dmd2.encoders.pipeline_folder import find_pipeline

    return find_pipeline(source, text=False).files


def _store_by_content(files: Mapping[str, Path], out: str) -> str:
    """Copy the files below the digest of their names and contents -> the address of their folder."""
    content = repr([(name, sha256(path)) for name, path in sorted(files.items())])
    return _store(files, out, hashlib.sha256(content.encode()).hexdigest())


def _store(files: Mapping[str, Path], out: str, digest: str) -> str:
    """Copy the files below the digest, each whole or not at all -> the address of their folder."""
    folder = join_uri(out, digest[:16])
    missing = {name: path for name, path in files.items() if not exists(join_uri(folder, name))}
    store = open_store(folder)
    for name, path in missing.items():
        store.upload(path.resolve(), name)
    return folder
