"""Numbers that must stay what they are, bit for bit, while code is moved and things get other names.

`pinned.json` has what tiny runs gave: random numbers, digests, losses, every tensor of the checkpoints, pictures, scores.
Text that begins with `~` is the digest of something that was computed in floating point: it is compared where PyTorch
and processor are those it was noted with. Elsewhere floats are compared to a tolerance, and the rest exactly, as always.
Names of settings, metrics and the like are in this file only, so that they can change without the numbers.

If a number is to change: `python -m tests.test_pinned --write` notes all of them anew.

`pinned/` has folders of version 0.1.0, which later versions must read and go on with; nothing makes them anew:
`shards`, `teacher` (without checkpoints), `stopped` (a run by the overrides `TINY`, stopped after 5 of 8 steps), and `recipes.json.gz`, of
every recipe a manifest as that version wrote it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Iterable, Iterator
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from dmd2 import recipes, stages
from dmd2.config import Config
from dmd2.data.order import Order
from dmd2.io.artifact import Manifest, read_manifest
from dmd2.models.edm import LOADER
from dmd2.provenance import PROVENANCE
from dmd2.rng import Rng, draw_shared, reseed, seed_of_part
from dmd2.sbom import SBOM
from dmd2.training.optim import OptimizerState

torch.set_num_threads(1)  # the bits of a sum depend on the number of threads

HERE = Path(__file__).parent / "pinned"
DATA = Path(__file__).with_name("pinned.json")
WRITE = "DMD2_PIN"
"""Set in the environment: note the numbers instead of comparing them."""
RTOL, ATOL = 1e-3, 1e-5
"""Between machines of different kinds."""
Tree = Any
"""Dictionaries and lists of numbers, texts and nothing: what JSON can say."""

# What things are called today.

TINY = (
    "family.network.resolution=8", "family.network.channels=4", "family.network.multipliers=1", "family.network.attention=8",
    "family.network.patch=2", "family.network.classes=3", "family.network.embedding_multiplier=1", "data.holdout=4",
    "data.images_per_shard=4", "loader.shuffle_block=2",
    "teach.steps=4", "teach.batch=8", "teach.log_every=2", "teach.save_every=2",
    "distill.steps=8", "distill.batch=8", "distill.log_every=2", "distill.preview_every=8", "distill.save_every=4",
    "distill.critic_updates=3", "distill.student.ema=0.9", "distill.fake_prompts=batch",
    "evaluate.images=12", "evaluate.teacher_steps=3", "evaluate.batch=8", "gate.factor=1e9",
)  # fmt: skip
"""Of a one-step student of 8x8 pixels, which learns from DMD and GAN."""
IN_PARTS = (
    "engine.micro_batch=4",
    "distill.gan.reuse_denoising_pass=True",
    "seed=3",
    "loader.lanes=2",
    "distill.student.ema=0.5,0.9",
)
TEXT = (
    "family.resolution=32", "family.vae_stride=2", "data.holdout=6", "data.images_per_shard=10", "loader.shuffle_block=2",
    "distill.steps=3", "distill.batch=4", "distill.dtype=float32", "engine.micro_batch=2", "distill.log_every=1",
    "distill.save_every=3", "distill.preview_every=3", "distill.critic_updates=2", "distill.fake_prompts=batch",
    "pairs.count=6", "pairs.per_shard=4", "pairs.batch=2", "pairs.steps=2",
)  # fmt: skip
"""Of students that are told by text, at 32x32 pixels."""
TEXT_RUNS = {
    "four steps": ("sdxl-4step-emoji", ()),
    "low rank": ("sdxl-4step-lora-emoji", ("distill.lora.rank=4",)),
    "shared base": ("sdxl-4step-shared-emoji", ("distill.lora.rank=4", "distill.continue_rollouts=True", "distill.steps=4")),
    "noised real": ("sdxl-4step-shared-emoji", ("distill.lora.rank=4", "distill.inputs=noised-real")),
    "regression": ("sdxl-1step-warmup-emoji", ()),
    "one step": ("sd15-1step", ()),
}  # fmt: skip
SAMPLED = ("four steps", "one step")
TABLE = ("data.format=lmdb",)
METRICS = (
    "critic/dmd", "critic/gan", "critic/grad_norm", "critic/skipped",
    "student/dmd", "student/dmd_grad_l1", "student/gan", "student/gan_grad_l1", "student/grad_norm", "student/regression",
    "student/skipped",
    "teacher/denoising", "teacher/grad_norm", "teacher/skipped",
)  # fmt: skip
"""In the order in which their values are noted."""
RATES = ("student/lr", "critic/lr", "teacher/lr")
"""Learning rates, which are not noted."""
OLD_METRICS = {f"student/{term}_gradient": f"student/{term}_grad_l1" for term in ("dmd", "gan")}
"""Names that version 0.1.0 wrote."""
CLOCK = re.compile(r"time/\w+|samples_per_s|eta_s|peak_memory_gb|images_per_s|loader/wait_s")
"""Metrics that are never twice the same; the last two were written by version 0.1.0."""
STEP = "step"
OBJECTS = {
    "critic": "critic", "moments of the critic": "critic.optimizer", "student": "student",
    "moments of the student": "student.optimizer", "first average": "student.average0", "second average": "student.average1",
    "teacher": "teacher", "moments of the teacher": "teacher.optimizer", "average of the teacher": "teacher.average0",
}  # fmt: skip
"""What a checkpoint holds, by what it is."""
SCORES = ("fid_real", "fid_student", "fid_teacher", "fid_teacher_1step", "features_accuracy")
COUNTS = ("nfe_student", "nfe_teacher", "images", "images_real", "seed", "features_accuracy_images")
DECISION = "decision"
LOG, CHECKPOINTS, PREVIEWS, NETWORK, WEIGHTS = "metrics.jsonl", "checkpoints", "previews", "network.json", "network.safetensors"  # fmt: skip
UNFINISHED = ".{}.partial"


# What is noted of things.


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def rounded(value: float) -> float:
    return float(f"{value:.5g}")


def tensor(x: torch.Tensor) -> Tree:
    """Numbers as they were computed."""
    values = x.double().flatten()
    return {
        "shape": list(x.shape),
        "bytes": "~" + sha(x.contiguous().numpy().tobytes()),
        "size": [rounded(values.mean().item()), rounded(values.std().item())],
        "first": [rounded(value) for value in values[:4].tolist()],
    }


def picture(path: Path) -> Tree:
    pixels = np.asarray(Image.open(path))
    return {
        "shape": list(pixels.shape),
        "bytes": "~" + sha(pixels.tobytes()),
        "size": [rounded(float(pixels.mean())), rounded(float(pixels.std()))],
    }


ORDER: dict[frozenset[str], list[str]] = {}
"""{names of the parameters of an optimizer: the same in the order of its network}, of every optimizer that was saved."""


@pytest.fixture(scope="module", autouse=True)
def parameter_order() -> Iterator[None]:
    """Note the order of parameters when an optimizer is saved: the pinned moments are numbered, not named."""
    original = OptimizerState.state_dict

    def noted(self: OptimizerState) -> dict[str, torch.Tensor]:
        state = original(self)
        names = list(dict.fromkeys(key.rpartition(".")[0] for key in state))
        ORDER[frozenset(names)] = names
        return state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OptimizerState, "state_dict", noted)
        yield


def numbered(moments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    order = ORDER[frozenset(key.rpartition(".")[0] for key in moments)]
    position = {name: index for index, name in enumerate(order)}
    return {
        f"{position[n]}.{slot}": x for (n, _, slot), x in ((k.rpartition("."), x) for k, x in moments.items())
    }


def checkpoint(folder: Path) -> Tree:
    """Of the newest one: what `_object` notes of each of its objects."""
    newest = max(path.parent for path in (folder / CHECKPOINTS).glob("[0-9]*/*.safetensors"))
    found: dict[str, dict[str, torch.Tensor]] = {}
    for path in sorted(newest.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is no dictionary
                thing, _, name = key.partition("/")
                found.setdefault(thing, {})[name] = file.get_tensor(key)
    found |= {thing: numbered(tensors) for thing, tensors in found.items() if thing.endswith(".optimizer")}
    known = {name: what for what, name in OBJECTS.items()}
    return {"step": int(newest.name)} | {known[thing]: _object(found[thing]) for thing in sorted(found)}


def _object(tensors: dict[str, torch.Tensor]) -> Tree:
    """A digest of names, shapes and types; of the tensors, sorted by name, a digest of all, the first digits of that of each,
    and the roots of their mean squares (of moments, of all together)."""
    there = sorted(tensors.items())
    form = [[name, list(x.shape), str(x.dtype)] for name, x in there]
    digests = [sha(x.contiguous().numpy().tobytes()) for _, x in there]
    squares = [(x.numel(), x.double().square().mean().item()) for _, x in there]
    if any(name.endswith("exp_avg") for name in tensors):
        count = sum(size for size, _ in squares)
        squares = [(count, sum(size * square for size, square in squares) / count)]
    return {
        "tensors": len(there),
        "form": sha(json.dumps(form).encode()),
        "bytes": "~" + sha("".join(digests).encode()),
        "each": "~" + " ".join(digest[:8] for digest in digests),
        "sizes": [rounded(square**0.5) for _, square in squares],
    }


def log(folder: Path) -> Tree:
    """A list per line: the step, and the value of each of METRICS."""
    read = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    lines = [{OLD_METRICS.get(name, name): value for name, value in line.items()} for line in read]
    names = {name for line in lines for name in line if not CLOCK.fullmatch(name)}
    assert names <= {STEP, *METRICS, *RATES}
    return [[line[STEP], *(line.get(name) for name in METRICS)] for line in lines]


def run_of(folder: Path) -> Tree:
    noted = {
        "log": log(folder),
        "checkpoint": checkpoint(folder),
        "form of the network": sha((folder / NETWORK).read_bytes()),
    }
    pictures = sorted((folder / PREVIEWS).glob("*.png"))
    return noted | {"previews": [[int(path.stem), picture(path)] for path in pictures]}


def files(manifest: Manifest, bound: str = "") -> Tree:
    """Files with their digests, of which `bound` says whether they depend on the machine."""
    return [bound + manifest.digest, *([f.path, f.size, bound + f.sha256] for f in manifest.files)]


def members(folder: Path) -> Tree:
    """What is in tar files, by what it decodes to."""
    told = []
    for path in sorted(folder.glob("*.tar")):
        digest, labels = hashlib.sha256(), []
        with tarfile.open(path) as tar:
            for member in tar:
                stream = tar.extractfile(member)
                assert stream
                data = stream.read()
                if member.name.endswith(".png"):
                    digest.update(np.asarray(Image.open(io.BytesIO(data))).tobytes())
                elif member.name.endswith(".cls"):
                    labels.append(int(data))
        told.append([path.name, labels, digest.hexdigest()])
    return told


# Comparing.


def machine() -> dict[str, str]:
    """What the last bits of a float depend on."""
    cpu = Path("/proc/cpuinfo")
    told = (
        dict(re.findall(r"^([\w ]+?)\s*: (.*)$", cpu.read_text().split("\n\n")[0], re.MULTILINE))
        if cpu.exists()
        else {}
    )
    kind = " ".join(told.get(name, "?") for name in ("model name", "cpu family", "model", "stepping"))
    return {
        "torch": torch.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "processor": kind,
    }


def differences(was: Tree, now: Tree, same: bool, place: str = "") -> Iterable[str]:
    """Where two trees differ; `same` is whether they are of machines of the same kind."""
    if isinstance(was, dict) and isinstance(now, dict):
        for name in was.keys() | now.keys():
            yield from differences(was.get(name), now.get(name), same, f"{place}/{name}")
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for index, pair in enumerate(zip(was, now, strict=True)):
            yield from differences(*pair, same, f"{place}/{index}")
    elif isinstance(was, float) and isinstance(now, float) and not same:
        if abs(was - now) > ATOL + RTOL * max(abs(was), abs(now)):
            yield f"{place}: {was} -> {now}"
    elif isinstance(was, str) and isinstance(now, str) and was[:1] == now[:1] == "~":
        if same and " " in was + now:
            yield from differences(was[1:].split(), now[1:].split(), same, place)
        elif same and was != now:
            yield f"{place}: {was} -> {now}"
    elif was != now:
        yield f"{place}: {was} -> {now}"


def pinned(name: str, tree: Tree) -> None:
    """Compare with what is noted under this name, or note it."""
    tree = json.loads(json.dumps(tree))
    there = json.loads(DATA.read_text()) if DATA.exists() else {"machine": machine(), "numbers": {}}
    if os.environ.get(WRITE):
        there = {"machine": machine(), "numbers": there["numbers"] | {name: tree}}
        text = json.dumps(there, indent=1, sort_keys=True)
        lines = re.sub(r"\[[^\[\]{}]*\]", lambda found: re.sub(r"\s*\n\s*", " ", found[0]), text)
        DATA.write_text(lines + "\n")
        return
    found = sorted(differences(there["numbers"].get(name), tree, there["machine"] == machine()))
    assert not found, "\n".join([f"{len(found)} of the numbers differ", *found[:20]])


# Random numbers and order.


def test_random_numbers() -> None:
    def rng() -> Rng:
        return Rng.at(7, 3, range(2, 6), torch.device("cpu"))

    one = rng()
    with torch.random.fork_rng():
        reseed(5)
        after = torch.randint(1000, (4,)).tolist()
    pinned(
        "random numbers",
        {
            "seeds": [str(seed) for seed in rng().seeds],
            "normal": tensor(rng().normal(3, 2)),
            "twice": [
                tensor(one.normal_like(torch.zeros(4, 5))),
                one.integers(0, 1000, torch.zeros(4)).tolist(),
            ],
            "integers": rng().integers(20, 981, torch.zeros(4)).tolist(),
            "rows": rng()[1:3].integers(0, 1000, torch.zeros(2)).tolist(),
            "choices": [rng().indices(count) for count in (3, 1000)],
            "shared": [draw_shared(seed, step, 4) for seed in (0, 10) for step in range(20)],
            "parts": [seed_of_part(seed, first) for seed in (0, 10) for first in (0, 64)],
            "reseeded": after,
        },
    )


@pytest.mark.parametrize(("block", "lanes"), [(2, 1), (3, 4)])
def test_order_of_samples(block: int, lanes: int) -> None:
    order = Order((5, 3, 0, 7, 4, 6), seed=11, block=block, lanes=lanes)
    pinned(
        f"order {block} {lanes}",
        {
            "samples": [list(order.sample(position)) for position in range(60)],
            "shards": [order.shards_of(epoch, lane) for epoch in range(2) for lane in range(lanes)],
        },
    )


# A one-step student of pixels, from shards to a package.


def config(*overrides: str) -> Config:
    return recipes.resolve("edm-digits", (*TINY, *overrides))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 pictures in three classes, always of the same size and age."""
    root, rng = tmp_path_factory.mktemp("source") / "pictures", np.random.default_rng(0)
    for index in range(16):
        path = root / "abc"[index % 3] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 8 + index % 3), dtype=np.uint8)).save(path)
        os.utime(path, ns=(10**18, 10**18))
    return root


@pytest.fixture(scope="module")
def edm(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("edm")
    stages.shard(config(), str(source), str(root / "shards"), workers=1)
    stages.teach(config(), str(root / "shards"), str(root / "teacher"))
    stages.distill(config(), *(str(root / name) for name in ("shards", "teacher", "run")))
    return root


def test_shards(source: Path, edm: Path, tmp_path: Path) -> None:
    made = read_manifest(edm / "shards", "shards")
    table = stages.shard(config(*TABLE), str(source), str(tmp_path / "table"), workers=1)
    other = stages.shard(config("seed=1"), str(source), str(tmp_path / "other"), workers=1)
    noted = {"source": made.inputs["source"], "files": files(made), "members": members(edm / "shards")}
    pinned("shards", noted | {"table": files(table), "other seed": files(other)})


def test_a_teacher_is_trained(edm: Path, tmp_path: Path) -> None:
    out = stages.sample(str(edm / "teacher"), str(tmp_path / "a.png"), count=6, seed=4, steps=3)
    weights = "~" + sha((edm / "teacher" / WEIGHTS).read_bytes())
    pinned("teacher", run_of(edm / "teacher") | {"weights": weights, "sample": picture(Path(out))})


def test_a_student_is_distilled(edm: Path, tmp_path: Path) -> None:
    out = stages.sample(str(edm / "run"), str(tmp_path / "a.png"), count=6, seed=4)
    weights = "~" + sha((edm / "run" / WEIGHTS).read_bytes())
    pinned("student", run_of(edm / "run") | {"weights": weights, "sample": picture(Path(out))})


def test_a_student_is_distilled_in_parts(edm: Path, tmp_path: Path) -> None:
    stages.distill(config(*IN_PARTS), str(edm / "shards"), str(edm / "teacher"), str(tmp_path / "run"))
    pinned("student in parts", run_of(tmp_path / "run"))


def test_a_student_is_judged_and_packaged(edm: Path, tmp_path: Path) -> None:
    names = [str(tmp_path / name) for name in ("evaluation", "gate", "package")]
    run = str(edm / "run")
    judged = stages.evaluate(config(), str(edm / "shards"), str(edm / "teacher"), run, names[0])
    decided = stages.gate(config(), *names[:2])
    packaged = stages.package(run, *names)
    pinned(
        "evaluation",
        {
            "scores": [rounded(judged.facts[name]) for name in SCORES],
            "counts": [judged.facts[name] for name in COUNTS],
            "pictures": [picture(path) for path in sorted((tmp_path / "evaluation").glob("*.png"))],
            "decision": decided.facts[DECISION],
            "package": [file.path for file in packaged.files if file.path not in (PROVENANCE, LOADER, SBOM)],
            "form of the network": sha((tmp_path / "package" / NETWORK).read_bytes()),
        },
    )


# Folders of version 0.1.0.


def test_a_run_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    """To the very end that it would have come to without the stop."""
    root = Path(shutil.copytree(HERE, tmp_path / "pinned"))
    (root / "stopped").rename(root / UNFINISHED.format("run"))
    before = {
        path: sha(path.read_bytes()) for name in ("shards", "teacher") for path in (root / name).rglob("*")
    }
    made = stages.teach(config(), str(root / "shards"), str(root / "teacher"))
    stages.distill(config(), *(str(root / name) for name in ("shards", "teacher", "run")))
    assert {path: sha(path.read_bytes()) for path in before} == before
    out = stages.sample(str(root / "teacher"), str(tmp_path / "a.png"), count=6, seed=4, steps=3)
    digests = [made.digest, read_manifest(root / "shards", "shards").digest]
    pinned("run that went on", run_of(root / "run") | {"digests": digests, "sample": picture(Path(out))})


def _mended(name: str) -> dict[str, Any]:
    """Fields of a recipe that version 0.1.0 had otherwise than the published run, or not at all -> their values today."""
    full, sdxl = not name.endswith("-emoji"), name.startswith("sdxl")
    found: dict[str, Any] = {}
    if not ("noised-real" in name or "warmup" in name):
        from_list = name in ("sd15-1step", "sd15-1step-gan", "sdxl-1step")
        found["distill.fake_prompts"] = "list" if from_list else "independent"
    if full and sdxl:
        found["evaluate.teacher_steps"] = 50
    found["evaluate.protocol"], pins = PROTOCOL_OF[
        name.split("-")[int(name.startswith("edm"))] if full else "emoji"
    ]
    found |= pins
    found["engine.compile"] = "auto"
    return found | MENDED.get(name, {})


PROTOCOL_OF: dict[str, tuple[str, dict[str, Any]]] = {
    "digits": ("digits", {}),
    "emoji": ("emoji", {}),
    "imagenet64": ("imagenet64-50k", {"evaluate.prompts": "balanced"}),
    "sd15": ("coco30k-256", {"evaluate.resize": 256}),
    "sdxl": ("coco10k-1024", {"evaluate.resize": 512}),
}
"""Network -> protocol of its evaluation, and what the published one has that version 0.1.0 had not."""
MENDED: dict[str, dict[str, Any]] = {
    **{f"edm-digits{variant}": {"gate.factor": 1.75} for variant in ("", "-no-gan", "-no-ttur")},
    "edm-imagenet64": {"distill.dtype": "bfloat16"},
    "edm-imagenet64-no-gan": {"distill.dtype": "bfloat16", "distill.steps": 405_500},
    "sd15-1step-gan": {
        "distill.steps": 2_000,
        "distill.student.warmup_steps": 100,
        "distill.critic.warmup_steps": 100,
        "distill.first_stage": "sd15-1step",
    },
    "sdxl-1step-warmup": {"distill.student.warmup_steps": 100, "distill.student.max_grad_norm": 0},
    "sdxl-1step": {"distill.first_stage": "sdxl-1step-warmup"},
    "sdxl-1step-emoji": {"distill.first_stage": "sdxl-1step-warmup-emoji"},
}
MANIFESTS = json.loads(gzip.decompress((HERE / "recipes.json.gz").read_bytes()))


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_of_an_earlier_version_says_what_the_recipe_says_now(name: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFESTS[name]))
    then = read_manifest(tmp_path, "gate").config
    assert then
    values = then.model_dump()
    for field, today in _mended(name).items():
        *sections, last = field.split(".")
        reduce(getitem, sections, values)[last] = today
    assert Config.model_validate(values) == recipes.get(name)


# Students that are told by text.


@pytest.fixture(scope="module")
def text(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 30 captioned squares."""
    root = tmp_path_factory.mktemp("text")
    stages.shard(text_config("four steps"), str(squares), str(root / "shards"), workers=1)
    return root


def text_config(which: str) -> Config:
    recipe, overrides = TEXT_RUNS[which]
    return recipes.resolve(recipe, (*TEXT, *overrides))


def described(root: Path, name: str, which: str, source: Path) -> tuple[Path, Path]:
    """Teacher and latents of a pipeline, made once."""
    teacher, latents = root / f"teacher-{name}", root / f"latents-{name}"
    stages.resolve(text_config(which), str(source), str(teacher))
    if not latents.exists():
        stages.encode(text_config(which), str(root / "shards"), str(teacher), str(latents))
    return teacher, latents


def test_latents(text: Path, pipeline: Path) -> None:
    _, latents = described(text, "sdxl", "four steps", pipeline)
    noted = {"shards": files(read_manifest(text / "shards", "shards")), "members": members(text / "shards")}
    pinned("latents", noted | {"latents": files(read_manifest(latents, "latents"), "~")})


@pytest.mark.parametrize("which", TEXT_RUNS)
def test_a_student_of_text_is_distilled(
    which: str, text: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    kind = "sd15" if which == "one step" else "sdxl"
    source: Path = request.getfixturevalue("stable15" if kind == "sd15" else "pipeline")
    teacher, data = described(text, kind, which, source)
    noted: dict[str, Tree] = {}
    if which == "regression":
        made = stages.pairs(text_config(which), str(data), str(teacher), str(tmp_path / "pairs"))
        data, noted["pairs"] = tmp_path / "pairs", files(made, "~")
    stages.distill(text_config(which), str(data), str(teacher), str(tmp_path / "run"))
    show = ("a red square", "a blue square")
    if which in SAMPLED:
        out = stages.sample(str(tmp_path / "run"), str(tmp_path / "a.png"), count=4, seed=4, prompts=show)
        noted["sample"] = picture(Path(out))
    pinned(which, noted | run_of(tmp_path / "run"))


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit("usage: python -m tests.test_pinned --write")
    os.environ[WRITE] = "yes"
    DATA.unlink(missing_ok=True)
    raise SystemExit(pytest.main([__file__, "-q", "-p", "no:xdist"]))
