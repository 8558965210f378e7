"""`dmd2 encode`: the latents are the VAE's, whatever the number of processes and interruptions."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from dmd2 import recipes, stages
from dmd2.config import Config, EncodeConfig, LoaderConfig
from dmd2.data.latents import SDXL, sample_posterior, tar_bytes
from dmd2.data.loader import DataLoader, Shards
from dmd2.encoders.pipeline_folder import find_pipeline
from dmd2.encoders.vae import Vae
from dmd2.io.artifact import read_manifest
from dmd2.io.storage import open_store, upload_files
from tests import warm
from tests.bucket import kill, list_names, names_in_manifest, start_command, wait_for_success, wait_until
from tests.conftest import MICRO

Refusal = Callable[[Callable[[], object]], str]

COLOUR = (*MICRO, "family.network.resolution=16", "family.network.image_channels=3", "data.images_per_shard=6", "encode.batch=4")  # fmt: skip
COUNT, HELD = 240, 12
CAPTIONS = ["a red square", "two dogs", "snow"]


@pytest.fixture(scope="module")
def config() -> Config:
    return recipes.resolve("edm-digits", COLOUR)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("latents")


@pytest.fixture(scope="module")
def shards(root: Path, config: Config) -> Path:
    """240 images of 16x16 in three classes, two of three with a caption; 38 shards for training."""
    source = root / "source"
    source.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i in range(COUNT):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(source / f"{i:03d}.png")
        text = f"{CAPTIONS[i % 3]}, {i}" if i % 3 else ""
        rows.append({"file_name": f"{i:03d}.png", "label": "abc"[i % 3], "text": text})
    (source / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stages.shard(config, str(source), str(root / "shards"), workers=1)
    return root / "shards"


def autoencoder(**changes: Any) -> Any:
    kind: Any = diffusers.AutoencoderKL
    torch.manual_seed(0)
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return kind(**(sizes | blocks | {"scaling_factor": 0.5, "shift_factor": 0.25} | changes))


@pytest.fixture(scope="module")
def vae(root: Path) -> Path:
    autoencoder().save_pretrained(root / "vae")
    return root / "vae"


@pytest.fixture(scope="module")
def encoded(root: Path, config: Config, shards: Path, vae: Path) -> Path:
    stages.encode(config, str(shards), str(vae), str(root / "latents"))
    return root / "latents"


def with_encode(config: Config, **changes: Any) -> Config:
    return config.model_copy(update={"encode": config.encode.model_copy(update=changes)})


def members(folder: Path) -> dict[str, bytes]:
    """All members of the training shards."""
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob("train-*.tar")):
        with tarfile.open(path) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    return found


def decode_array(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False))


def posterior(data: bytes, network: Any) -> torch.Tensor:
    """(2, C, h, w) for an encoded image."""
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB")))
    with torch.no_grad():
        drawn = network.encode(pixels.permute(2, 0, 1)[None].float() / 255 * 2 - 1).latent_dist
    return torch.cat([(drawn.mean - 0.25) * 0.5, drawn.std * 0.5])


def test_latents_are_mean_and_deviation_of_the_posterior_shifted_and_scaled(
    shards: Path, encoded: Path, vae: Path
) -> None:
    images, latents, network = members(shards), members(encoded), autoencoder()
    for name in [name for name in images if name.endswith(".png")][:20]:
        stored_one = decode_array(latents[name.replace(".png", ".npy")])
        assert stored_one.dtype == torch.float16
        wanted = posterior(images[name], network)
        torch.testing.assert_close(stored_one.float(), wanted, rtol=2**-10, atol=2e-6)
        assert wanted[1].std() > 0


def test_keys_labels_and_captions_are_carried_over_and_held_out_images_stay(
    shards: Path, encoded: Path
) -> None:
    images, latents = members(shards), members(encoded)
    assert {name.replace(".png", ".npy") for name in images} == latents.keys()
    assert all(latents[name] == data for name, data in images.items() if not name.endswith(".png"))
    assert sum(name.endswith(".txt") for name in latents) > 100
    assert sum(name.endswith(".npy") for name in latents) == COUNT - HELD
    assert {path.name for path in encoded.glob("*.tar")} == {f"train-{n:06d}.tar" for n in range(38)}
    assert not list(encoded.glob(".*"))


def test_a_loader_reads_them_like_images(shards: Path, encoded: Path) -> None:
    read_back, images = Shards(encoded, "train", kind="latents"), Shards(shards, "train")
    assert read_back.counts == images.counts
    settings = LoaderConfig(shuffle_block=2)
    batch, original = (DataLoader(s, 6, 0, settings).batch(3) for s in (read_back, images))
    assert (batch.image.shape, batch.image.dtype) == ((6, 2, 4, 8, 8), torch.float16)
    assert batch.label.tolist() == original.label.tolist()
    assert batch.text == original.text
    eps = torch.randn(6, 4, 8, 8)
    drawn = sample_posterior(batch.image, eps)
    assert drawn.dtype == torch.float32
    torch.testing.assert_close(drawn, batch.image[:, 0].float() + batch.image[:, 1].float() * eps)


def test_the_facts_say_what_it_is_and_takes(encoded: Path, vae: Path) -> None:
    facts = read_manifest(encoded, "latents").facts
    assert (facts["images"], facts["shape"]) == (COUNT - HELD, [2, 4, 8, 8])
    assert (facts["scaling_factor"], facts["shift_factor"], facts["dtype"]) == (0.5, 0.25, "float32")
    assert facts["vae"] == find_pipeline(str(vae), text=False).digest
    assert facts["classes"] == ["a", "b", "c"]
    assert facts["bytes"] == sum(path.stat().st_size for path in encoded.glob("*.tar"))
    assert facts["bytes_per_image"]["latents"] == 128 + 2 * 4 * 8 * 8 * 2
    assert [shard["split"] for shard in facts["shards"]] == ["train"] * 38
    assert all(len(shard["crc32c"]) == 8 for shard in facts["shards"])


def test_what_it_takes_is_told_before_it_starts(
    config: Config, shards: Path, vae: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "dmd2"):
        stages.encode(config, str(shards), str(vae), str(tmp_path / "out"))
    said = caplog.text
    one = tar_bytes(128 + 1024, 1, *([20] if Shards(shards, "train").sample(0, 0).text else []))
    assert f"latents: 228 images x {one / 1000:.3g} kB = {228 * one / 1000:.3g} kB" in said
    assert "(an SDXL set of 500,000 images at 1024 px takes 132 GB)" in said
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar"))
    assert size == pytest.approx(228 * one + 38 * 10240, rel=0.2), "each tar has an end"
    assert SDXL[1] == (2, 4, 1024 // 8, 1024 // 8)


def command(shards: Path | str, vae: Path | str, out: Path | str) -> list[str]:
    words = ["encode", "edm-digits", "--data", str(shards), "--vae", str(vae), "--out", str(out)]
    return warm.dmd2(*words, "--encode.batch", "4")


def on_two(words: list[str]) -> list[str]:
    python, *rest = words
    return [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *rest]


def results(out: Path) -> dict[str, int]:
    """Shards that are done in an unfinished folder, and when they were written."""
    draft = out.with_name(f".{out.name}.partial")
    return {
        path.stem: (draft / f"train-{path.stem}.tar").stat().st_mtime_ns
        for path in (draft / ".units").glob("[0-9]*.json")
    }


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_anywhere_it_continues_and_makes_the_same_bytes(
    shards: Path, vae: Path, encoded: Path, tmp_path: Path, kills: int
) -> None:
    out, said, done = tmp_path / "out", tmp_path / "said", dict[str, int]()
    words = command(shards, vae, out)[3:]
    for more in np.random.default_rng(0).integers(0, 4, kills):
        process = start_command(said, *words)
        while len(results(out)) < len(done) + more:
            assert process.is_alive(), said.read_text()
            time.sleep(0.002)
        assert kill(process)
        assert done.items() <= results(out).items(), "nothing is encoded twice"
        done = results(out)
    assert 0 < len(done) < 38
    wait_for_success(start_command(said, *words), said)
    times = {path.stem.removeprefix("train-"): path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert done.items() <= times.items()
    assert read_manifest(out, "latents").digest == read_manifest(encoded, "latents").digest


def test_killed_on_a_bucket_it_continues_there(
    shards: Path, vae: Path, encoded: Path, tmp_path: Path, bucket: str
) -> None:
    out, said = f"{bucket}/out", tmp_path / "said"
    words = command(shards, vae, out)[3:]
    process = start_command(said, *words)
    wait_until(lambda: sum(name.startswith(".units/") for name in list_names(out)) >= 5)
    assert kill(process)
    done = open_store(out).list_objects("train-")
    assert 5 <= len(done) < 38
    shutil.rmtree(tmp_path / "cache")  # on another machine
    wait_for_success(start_command(said, *words), said)
    assert set(done[:5]) <= set(open_store(out).list_objects()), "nothing is encoded twice"
    assert list_names(out) == names_in_manifest(out)
    assert read_manifest(out, "latents").digest == read_manifest(encoded, "latents").digest


def test_two_processes_make_the_same_bytes_as_one_also_after_a_kill(
    shards: Path, vae: Path, encoded: Path, tmp_path: Path
) -> None:
    out, draft, words = (
        tmp_path / "out",
        tmp_path / ".out.partial",
        on_two(command(shards, vae, tmp_path / "out")),
    )
    process = subprocess.Popen(words, env=warm.environment(), stderr=subprocess.PIPE)
    open_now: list[Path] = []
    while process.poll() is None and not (len(results(out)) >= 7 and open_now):
        open_now = list(draft.glob(".train-*.partial"))
        time.sleep(0.001)
    os.kill(int(open_now[0].suffixes[-2][1:]), signal.SIGKILL)  # its name has the number of its process
    process.communicate()
    done = results(out)
    assert 7 <= len(done) < 38
    finished = subprocess.run(words, env=warm.environment(), check=False, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.count("latents: 228 images") == 1
    times = {path.stem.removeprefix("train-"): path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert done.items() <= times.items(), "nothing is encoded twice"
    assert read_manifest(out, "latents").digest == read_manifest(encoded, "latents").digest


def test_parts_side_by_side_make_the_same_bytes_also_if_one_was_killed(
    config: Config, shards: Path, vae: Path, encoded: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def start(part: str) -> ForkProcess:
        def encode() -> None:
            torch.set_num_threads(1)
            stages.encode(config, str(shards), str(vae), str(out), part)

        process = multiprocessing.get_context("fork").Process(target=encode)
        process.start()
        return process

    running = [start(f"{n}/3") for n in range(3)]
    wait_until(lambda: len(list((tmp_path / ".out.partial" / ".units").glob("*"))) > 3)
    running[1].kill()
    for process in running:
        process.join()
    assert not out.exists()
    kept = results(out)  # the killed one may have left a shard without its result, which is made anew
    assert len(kept) >= 25  # of 38: those of the two others
    part = stages.encode(config, str(shards), str(vae), str(out), "1/3")
    assert (part.facts, out.exists()) == ({"part": "1/3", "units": 13}, False)
    merged = stages.encode(config, str(shards), str(vae), str(out))
    assert merged.digest == read_manifest(encoded, "latents").digest
    assert members(out) == members(encoded)
    times = {path.stem.removeprefix("train-"): path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert kept.items() <= times.items(), "nothing is encoded twice"


def test_a_vae_that_overflows_is_refused_and_only_training_draws_what_it_gives(
    vae: Path, refusal: Callable[..., str]
) -> None:
    found = Vae(find_pipeline(str(vae), text=False), EncodeConfig(), torch.device("cpu"))
    x = torch.randn(2, *found.moments_shape((3, 16, 16))[1:], generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.decode(x), found.decode_unchecked(x))
    x[1, 0, 0, 0] = 3e38
    said = refusal(lambda: found.decode(x))
    assert f"the VAE of {found.source} decodes samples up to 3e+38 to " in said
    assert "infinite or NaN values of" in said
    assert "in float32" in said
    assert found.decode_unchecked(x).dtype == torch.uint8


def test_the_number_of_threads_changes_nothing(tmp_path: Path) -> None:
    blocks = {"block_out_channels": (32, 64, 64), "down_block_types": ("DownEncoderBlock2D",) * 3}
    autoencoder(**blocks, up_block_types=("UpDecoderBlock2D",) * 3).save_pretrained(tmp_path / "vae")
    vae = Vae(find_pipeline(str(tmp_path / "vae"), text=False), EncodeConfig(), torch.device("cpu"))
    images = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).byte()
    made = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        made.append(vae.moments(images))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    assert torch.equal(*made)


def test_a_finished_folder_is_not_made_again_nor_taken_for_that_of_another_vae(
    config: Config, shards: Path, vae: Path, encoded: Path, tmp_path: Path, refusal: Refusal
) -> None:
    before = read_manifest(encoded, "latents")
    assert stages.encode(config, str(shards), str(vae), str(encoded)) == before
    autoencoder(scaling_factor=0.6).save_pretrained(tmp_path / "other")
    assert "other inputs" in refusal(
        lambda: stages.encode(config, str(shards), str(tmp_path / "other"), str(encoded))
    )
    assert "encode.dtype: float32 -> bfloat16" in refusal(
        lambda: stages.encode(with_encode(config, dtype="bfloat16"), str(shards), str(vae), str(encoded))
    )


def test_bfloat16_is_close(config: Config, shards: Path, vae: Path, encoded: Path, tmp_path: Path) -> None:
    stages.encode(with_encode(config, dtype="bfloat16"), str(shards), str(vae), str(tmp_path / "out"))
    fine, coarse = (
        Shards(p, "train", kind="latents").evenly_spaced(50).image for p in (encoded, tmp_path / "out")
    )
    assert not torch.equal(fine, coarse)
    assert (fine.float() - coarse.float()).abs().mean() < 0.02 * fine.float().std()


def test_grey_images_are_repeated(config: Config, made: Path, root: Path, tmp_path: Path) -> None:
    vae = tmp_path / "vae"
    autoencoder().save_pretrained(vae)
    stages.encode(config, str(made / "shards"), str(vae), str(tmp_path / "out"))
    image = next(data for name, data in members(made / "shards").items() if name.endswith(".png"))
    first = Shards(tmp_path / "out", "train", kind="latents").evenly_spaced(1).image[0]
    torch.testing.assert_close(first.float(), posterior(image, autoencoder()), rtol=2**-10, atol=2e-6)


def test_a_table_is_encoded_too(config: Config, root: Path, shards: Path, vae: Path, tmp_path: Path) -> None:
    table = config.model_copy(update={"data": config.data.model_copy(update={"format": "lmdb"})})
    stages.shard(table, str(root / "source"), str(tmp_path / "table"), workers=1)
    stages.encode(config, str(tmp_path / "table"), str(vae), str(tmp_path / "out"))
    one, other = (Shards(p, "train", kind="latents") for p in (tmp_path / "out", root / "latents"))
    assert other.evenly_spaced(228).text == one.evenly_spaced(228).text
    assert one.evenly_spaced(228).label.tolist() == other.evenly_spaced(228).label.tolist()


def test_on_a_bucket_two_processes_make_the_same(shards: Path, vae: Path, encoded: Path, bucket: str) -> None:
    for folder in (shards, vae):
        upload_files(folder, sorted(p.name for p in folder.iterdir()), open_store(f"{bucket}/{folder.name}"))
    words = on_two(command(f"{bucket}/shards", f"{bucket}/vae", f"{bucket}/out"))
    done = subprocess.run(words, env=warm.environment(), check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read_manifest(f"{bucket}/out", "latents").digest == read_manifest(encoded, "latents").digest
    assert list_names(f"{bucket}/out") == names_in_manifest(f"{bucket}/out")
    assert Shards(f"{bucket}/out", "train", kind="latents").evenly_spaced(3).image.shape == (3, 2, 4, 8, 8)


# What is refused.


def test_images_that_the_stride_does_not_divide_are_refused(
    config: Config, shards: Path, tmp_path: Path, refusal: Refusal
) -> None:
    blocks = {"block_out_channels": (4,) * 6, "down_block_types": ("DownEncoderBlock2D",) * 6}
    autoencoder(**blocks, up_block_types=("UpDecoderBlock2D",) * 6).save_pretrained(tmp_path / "vae")
    said = refusal(lambda: stages.encode(config, str(shards), str(tmp_path / "vae"), str(tmp_path / "out")))
    assert "16x16 pixels" in said
    assert "multiple of 32" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("dtype", "advice"), [("float32", "weights are broken"), ("bfloat16", "float32")])
def test_latents_that_are_not_finite_are_refused_by_name(
    config: Config, shards: Path, tmp_path: Path, refusal: Refusal, dtype: str, advice: str
) -> None:
    autoencoder(scaling_factor=1e9).save_pretrained(tmp_path / "vae")
    key = Shards(shards, "train").keys(0)[0]
    said = refusal(
        lambda: stages.encode(
            with_encode(config, dtype=dtype), str(shards), str(tmp_path / "vae"), str(tmp_path / "out")
        )
    )
    assert f"latents of image {key} are not finite in float16, computed in {dtype}" in said
    assert advice in said


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def only_a_pickle(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Hostile()))


def half(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    weights.pop("encoder.conv_in.weight")
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")


def named(folder: Path, name: str) -> None:
    (folder / "config.json").write_text(json.dumps({"_class_name": name}))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (only_a_pickle, "a pickle, which can run code and is not read; convert them to safetensors"),
        (half, "lacks 1 weights of a AutoencoderKL, encoder.conv_in.weight for one"),
        (lambda folder: named(folder, "UNet2DConditionModel"), "holds a UNet2DConditionModel, not a AutoencoderKL"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "config.json").unlink(), "is no VAE: it has neither"),
        (lambda folder: shutil.rmtree(folder), "is no folder"),
        (lambda folder: (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"\x80\x04."), "cannot be loaded"),
    ],
)  # fmt: skip
def test_what_is_no_vae_is_refused_and_not_run(
    config: Config,
    shards: Path,
    vae: Path,
    tmp_path: Path,
    refusal: Refusal,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Path], object],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(vae, tmp_path / "vae")
    spoil(folder)
    assert words in refusal(lambda: stages.encode(config, str(shards), str(folder), str(tmp_path / "out")))
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_a_pickle_beside_the_weights_is_not_opened(
    config: Config, shards: Path, vae: Path, encoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(vae, tmp_path / "vae")
    for name in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors.index.json"):
        (folder / name).write_bytes(pickle.dumps(Hostile()))
    again = stages.encode(config, str(shards), str(folder), str(tmp_path / "out"))
    assert again.digest == read_manifest(encoded, "latents").digest
    assert not (tmp_path / "ran").exists()


def test_a_hub_that_cannot_be_reached_is_told_in_one_sentence(shards: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            *command(shards, "org/name", tmp_path / "out")[1:],
        ],  # the library reads these when it is imported
        env=warm.environment(HF_HOME=str(tmp_path / "hub"), HF_HUB_OFFLINE="1"),
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 64
    assert done.stderr.startswith(
        "dmd2: org/name is no local folder, and as a name on the hub it cannot be read"
    )
    assert done.stderr.count("\n") == 1


# Captions.


def tokenizer(folder: Path) -> Any:
    kind: Any = transformers.CLIPTokenizer
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "do", "<|startoftext|>", "<|endoftext|>"]
    made = kind({w: i for i, w in enumerate(words)}, [("d", "o")], model_max_length=12)
    made.save_pretrained(folder)
    return made


def clip(kind: str, width: int, folder: Path) -> Any:
    torch.manual_seed(width)
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 2}
    ends: dict[str, Any] = {"vocab_size": 80, "bos_token_id": 75, "eos_token_id": 76}
    settings = transformers.CLIPTextConfig(
        **sizes, **ends, num_hidden_layers=3, max_position_embeddings=12, projection_dim=width + 2
    )
    network = getattr(transformers, kind)(settings).eval()
    network.save_pretrained(folder)
    return network


@pytest.fixture
def pipeline(tmp_path: Path, vae: Path) -> Path:
    """A folder in the layout of Stable Diffusion 1.5, as far as it is read."""
    folder = tmp_path / "pipeline"
    shutil.copytree(vae, folder / "vae")
    tokenizer(folder / "tokenizer")
    clip("CLIPTextModel", 8, folder / "text_encoder")
    return folder


def embeddings(folder: Path) -> tuple[list[str], torch.Tensor, torch.Tensor | None]:
    found = members(folder)
    keys = [name.removesuffix(".emb") for name in found if name.endswith(".emb")]
    texts = [found.get(f"{key}.txt", b"").decode() for key in keys]
    pooled = [decode_array(found[f"{key}.pool"]) for key in keys if f"{key}.pool" in found]
    return (
        texts,
        torch.stack([decode_array(found[f"{key}.emb"]) for key in keys]),
        torch.stack(pooled) if pooled else None,
    )


def test_captions_longer_than_the_window_are_counted_and_told(
    config: Config, shards: Path, pipeline: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = transformers.CLIPTokenizer.from_pretrained(pipeline / "tokenizer")
    words.model_max_length = 6
    words.save_pretrained(pipeline / "tokenizer")
    made = stages.encode(with_encode(config, text=True), str(shards), str(pipeline), str(tmp_path / "out"))
    texts, _, _ = embeddings(tmp_path / "out")
    cut = sum(len(words(text, verbose=False).input_ids) > 6 for text in texts)
    assert 0 < cut < len(texts)
    assert made.facts["captions_cut"] == cut
    (said,) = [record.getMessage() for record in caplog.records if "captions" in record.getMessage()]
    assert f"{cut} of {len(texts)} captions are longer than the 6 tokens of the text encoder" in said
    plain = stages.encode(config, str(shards), str(pipeline), str(tmp_path / "plain"))
    assert "captions_cut" not in plain.facts


def test_captions_are_embedded_as_stable_diffusion_does_it(
    config: Config, shards: Path, pipeline: Path, tmp_path: Path
) -> None:
    stages.encode(with_encode(config, text=True), str(shards), str(pipeline), str(tmp_path / "out"))
    texts, states, pooled = embeddings(tmp_path / "out")
    words = transformers.CLIPTokenizer.from_pretrained(pipeline / "tokenizer")
    encoder = transformers.CLIPTextModel.from_pretrained(pipeline / "text_encoder")
    kind: Any = diffusers.StableDiffusionPipeline
    whole = kind(autoencoder(), encoder, words, None, None, None, None, requires_safety_checker=False)
    wanted, _ = whole.encode_prompt(texts, "cpu", 1, False)
    assert states.shape == (COUNT - HELD, 12, 8)
    assert pooled is None
    torch.testing.assert_close(states.float(), wanted, rtol=2**-10, atol=1e-4)
    assert len({states[i].numpy().tobytes() for i in range(50)}) > 30, "captions differ"


def test_captions_are_embedded_as_stable_diffusion_xl_does_it(
    config: Config, shards: Path, pipeline: Path, tmp_path: Path
) -> None:
    words = tokenizer(pipeline / "tokenizer_2")
    second = clip("CLIPTextModelWithProjection", 16, pipeline / "text_encoder_2")
    manifest = stages.encode(
        with_encode(config, text=True), str(shards), str(pipeline), str(tmp_path / "out")
    )
    texts, states, pooled = embeddings(tmp_path / "out")
    encoder = transformers.CLIPTextModel.from_pretrained(pipeline / "text_encoder")
    first = transformers.CLIPTokenizer.from_pretrained(pipeline / "tokenizer")
    kind: Any = diffusers.StableDiffusionXLPipeline
    whole = kind(autoencoder(), encoder, second, first, words, None, None)
    wanted, _, projected, _ = whole.encode_prompt(texts, device="cpu", do_classifier_free_guidance=False)
    assert states.shape == (COUNT - HELD, 12, 24)
    torch.testing.assert_close(states.float(), wanted, rtol=2**-10, atol=1e-4)
    assert pooled is not None
    torch.testing.assert_close(pooled.float(), projected, rtol=2**-10, atol=1e-4)
    each = manifest.facts["bytes_per_image"]
    assert (each["embeddings"], each["pooled"]) == (128 + 2 * 12 * 24, 128 + 2 * 18)
    assert each["captions"] > 5
    assert Shards(tmp_path / "out", "train", kind="latents").evenly_spaced(4).image.shape == (4, 2, 4, 8, 8)


def test_a_vae_in_a_pipeline_is_the_vae_alone(vae: Path, pipeline: Path) -> None:
    alone, inside, whole = (
        find_pipeline(str(vae), False),
        find_pipeline(str(pipeline), False),
        find_pipeline(str(pipeline), True),
    )
    assert alone.digest == inside.digest != whole.digest


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: shutil.rmtree(folder / "text_encoder"), "needs the folder of a whole pipeline"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "holds no CLIP tokenizer"),
        (
            lambda folder: (folder / "text_encoder" / "model.safetensors").rename(
                folder / "text_encoder" / "pytorch_model.bin"
            ),
            "has its weights in pytorch_model.bin, a pickle",
        ),
        (
            lambda folder: clip("CLIPTextModelWithProjection", 8, folder / "text_encoder"),
            "holds a CLIPTextModelWithProjection, not a CLIPTextModel",
        ),
    ],
)
def test_text_encoders_that_do_not_fit_are_refused(
    config: Config,
    shards: Path,
    pipeline: Path,
    tmp_path: Path,
    refusal: Refusal,
    spoil: Callable[[Path], object],
    words: str,
) -> None:
    spoil(pipeline)
    text = with_encode(config, text=True)
    assert words in refusal(lambda: stages.encode(text, str(shards), str(pipeline), str(tmp_path / "out")))


def test_shards_without_captions_are_not_embedded(
    config: Config, made: Path, pipeline: Path, tmp_path: Path, refusal: Refusal
) -> None:
    said = refusal(
        lambda: stages.encode(
            with_encode(config, text=True), str(made / "shards"), str(pipeline), str(tmp_path / "out")
        )
    )
    assert "has no captions" in said
