"""The rows of the table of metrics: each against its definition, computed in another way."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from cleanfid.fid import kernel_distance as cleanfid_kernel_distance
from torch import Tensor

from dmd2 import recipes, stages
from dmd2.data.loader import Shards
from dmd2.data.shard_table import HOLDOUT
from dmd2.evaluation import neighbours
from dmd2.evaluation.clip_score import PREFIX, Clip, ClipState
from dmd2.evaluation.evaluator import Evaluator, score_states
from dmd2.evaluation.influence import scramble
from dmd2.evaluation.measurements import MEASUREMENTS
from dmd2.evaluation.memorisation import Neighbours
from dmd2.evaluation.metrics import METRICS, ImageBatch, MetricState, Score, select
from dmd2.evaluation.patches import centre_patches
from dmd2.models.family import Prompt
from tests.emoji import clip as emoji_clip
from tests.emoji import source as emoji_source

Refusal = Callable[[Callable[[], object]], str]
EMOJI = Path(__file__).parents[1] / "emoji" / "pipeline"
SETTINGS = recipes.get("edm-digits").evaluate
CPU = torch.device("cpu")
BY_FEATURES = ("fid", "kid", "precision", "recall", "density", "coverage")
RNG = np.random.default_rng(0)
REAL = torch.from_numpy(RNG.normal(size=(60, 8)))
FAKE = torch.from_numpy(RNG.normal(0.4, 0.8, size=(50, 8)))


def batch(features: Tensor, prompts: Sequence[Prompt] = ()) -> ImageBatch:
    return ImageBatch(prompts, features)


def state(name: str, *parts: Tensor) -> MetricState:
    """The state of a set that is seen in parts."""
    found = METRICS[name].new_state()
    for features in parts:
        found.update(batch(features))
    return found


def scored(name: str, fake: Tensor = FAKE, real: Tensor = REAL) -> Score:
    return state(name, fake).score(state(name, real))


@pytest.mark.parametrize("name", BY_FEATURES)
def test_any_split_of_a_set_gives_the_same_score(name: str) -> None:
    whole = scored(name)
    parts = state(name, FAKE[:7], FAKE[7:40], FAKE[40:]).score(state(name, REAL[:30], REAL[30:]))
    assert parts.value == pytest.approx(whole.value, abs=1e-9)
    if whole.interval:
        assert parts.interval == pytest.approx(whole.interval, abs=1e-9)
        assert whole.interval[0] <= whole.value <= whole.interval[1]


def test_neighbours_are_those_of_the_definitions() -> None:
    def distances(a: Tensor, b: Tensor) -> np.ndarray:
        return np.linalg.norm(a.numpy()[:, None] - b.numpy()[None], axis=-1)

    def radii(points: Tensor) -> np.ndarray:
        return np.sort(distances(points, points), axis=1)[:, neighbours.NEIGHBOURS]

    in_real = distances(FAKE, REAL) <= radii(REAL)
    in_fake = distances(REAL, FAKE) <= radii(FAKE)
    wanted = {
        "precision": in_real.any(1).mean(),
        "recall": in_fake.any(1).mean(),
        "density": in_real.sum() / neighbours.NEIGHBOURS / len(FAKE),
        "coverage": in_real.any(0).mean(),
    }
    for name, value in wanted.items():
        assert scored(name).value == pytest.approx(value), name
        assert 0 < value < 2


def test_equal_sets_have_perfect_scores_and_distant_ones_the_worst() -> None:
    far = FAKE + 1000
    for name in ("precision", "recall", "coverage"):
        assert scored(name, REAL, REAL).value == 1
        assert scored(name, far, REAL).value == 0
    assert scored("kid", REAL, REAL).value < 1e-9 < scored("kid", far, REAL).value


def test_the_kernel_distance_is_that_of_clean_fid() -> None:
    theirs = cleanfid_kernel_distance(FAKE[:50].numpy(), REAL[:50].numpy(), num_subsets=1, max_subset_size=50)
    assert scored("kid", FAKE[:50], REAL[:50]).value == pytest.approx(theirs, rel=1e-9)


def test_chunks_do_not_change_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {name: scored(name).value for name in BY_FEATURES}
    monkeypatch.setattr(neighbours, "CHUNK", 7)
    assert {name: scored(name).value for name in BY_FEATURES} == whole


def test_too_few_images_are_refused(refusal: Refusal) -> None:
    assert "only 5 images" in refusal(lambda: scored("precision", FAKE[:5]))
    assert "at least 2 images" in refusal(lambda: scored("kid", FAKE[:1]))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP with random weights, and the tokenizer of the emoji teacher."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    width = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = transformers.CLIPTokenizer.from_pretrained(EMOJI / "tokenizer")
    text = width | {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
    text |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    config = transformers.CLIPConfig(
        text_config=text, vision_config=width | {"image_size": 32, "patch_size": 8}, projection_dim=12
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    shutil.copytree(EMOJI / "tokenizer", folder, dirs_exist_ok=True)
    size = {"shortest_edge": 32}
    transformers.CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_the_inception_score_is_that_of_the_paper() -> None:
    """The formula in numpy, of ten random parts; torch-fidelity 0.4 gives the same number for the same parts."""
    logits = 3 * RNG.normal(size=(57, 9))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    order = scramble(torch.arange(57)).argsort().numpy()
    values = []
    for part in (order[i * 57 // 10 : (i + 1) * 57 // 10] for i in range(10)):
        divergence = (p[part] * (np.log(p[part]) - np.log(p[part].mean(0)))).sum(1)
        values.append(np.exp(divergence.mean()))
    rows = torch.from_numpy(p)
    whole = scored("inception_score", rows, rows)
    assert whole.value == pytest.approx(np.mean(values), rel=1e-12)
    assert whole.replicates == pytest.approx(values)
    parts = state("inception_score", rows[:20], rows[20:]).score(state("inception_score", rows))
    assert parts.value == pytest.approx(whole.value, rel=1e-12)
    same, sure = torch.full((40, 8), 1 / 8), torch.eye(8).repeat(10, 1)
    assert scored("inception_score", same, same).value == pytest.approx(1)
    assert scored("inception_score", sure, sure).value == pytest.approx(8, rel=0.35)


def test_the_classes_of_the_inception_score(refusal: Refusal) -> None:
    settings = SETTINGS.model_copy(update={"features": "efficientnet"})
    found = MEASUREMENTS["classes"](settings, CPU).measure(IMAGES[:2], [])
    assert found.shape == (2, 1000)
    torch.testing.assert_close(found.sum(1), torch.ones(2))
    assert "evaluate.features is classifier" in refusal(lambda: MEASUREMENTS["classes"](SETTINGS, CPU))
    assert "only 9 images" in refusal(lambda: scored("inception_score", FAKE[:9]))


def test_repeated_training_images_are_counted_and_found() -> None:
    """Of 400 samples, 100 are training images with a little noise; the others are as new as the held-out ones."""
    training, held_out, new = (torch.from_numpy(RNG.normal(size=(400, 8))) for _ in range(3))
    copies = torch.arange(0, 400, 4)
    new[copies] = training[copies // 2] + 0.01
    found = Neighbours.of(new, training)
    limit = Neighbours.of(held_out, training)
    assert 0.25 < found.share_nearer(limit) < 0.36
    assert found.nearest([0] * 400)[0]["distance"] == pytest.approx(0.01 * 8**0.5)
    for each in found.nearest([0] * 400):
        assert each["training_row"] == each["row"] // 2
    assert limit.share_nearer(limit) == pytest.approx(0.05)


IMAGES = torch.from_numpy(RNG.integers(0, 256, (6, 3, 40, 40), dtype=np.uint8))
CAPTIONS = ["a red heart", "cat", "a smiling face", "sun", "a flag", "two people"]


def test_the_clip_score_is_the_cosine_that_transformers_computes(clip_folder: Path) -> None:
    clip = Clip(str(clip_folder), CPU)
    network = transformers.CLIPModel.from_pretrained(clip_folder)
    processor = transformers.CLIPImageProcessor.from_pretrained(clip_folder)
    pixels = processor(images=list(IMAGES), return_tensors="pt").pixel_values
    wanted = []
    for index, caption in enumerate(CAPTIONS):
        tokens = clip.tokenizer([PREFIX + caption], return_tensors="pt").input_ids
        with torch.no_grad():
            out = network(pixel_values=pixels[index : index + 1], input_ids=tokens)
        wanted.append(float(out.logits_per_image / network.logit_scale.exp()))
    torch.testing.assert_close(
        clip.cosines(IMAGES, CAPTIONS), torch.tensor(wanted).double(), atol=1e-5, rtol=0
    )


def test_clip_scores_of_sets_and_their_parts(clip_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = SETTINGS.model_copy(update={"clip": str(clip_folder), "metrics": ("clip",)})

    def no_features() -> object:
        raise AssertionError("the CLIP score needs none")

    evaluator = Evaluator.load(select(["clip"]), settings, no_features, CPU)  # type: ignore[arg-type]

    def score(*sets: tuple[Tensor, list[str]]) -> Score:
        return score_states(evaluator.accumulate(sets), {"clip": ClipState()})["clip"]

    whole = score((IMAGES, CAPTIONS))
    parts = score((IMAGES[:2], CAPTIONS[:2]), (IMAGES[2:], CAPTIONS[2:]))
    assert parts.value == pytest.approx(whole.value, abs=1e-6)  # float32 in batches of other sizes
    cosines = Clip(str(clip_folder), CPU).cosines(IMAGES, CAPTIONS)
    error = 1.96 * float(cosines.std()) / 6**0.5
    assert whole.value == pytest.approx(float(cosines.mean()), abs=1e-9)
    assert whole.interval == pytest.approx((whole.value - error, whole.value + error), abs=1e-6)
    assert evaluator.prompt_facts(CAPTIONS) == {"clip_captions_cut": 0}
    assert "longer than" not in caplog.text
    long = "a very long caption " * 10
    assert score((IMAGES[:1], [long])).interval is None
    assert evaluator.prompt_facts([long, "cat", long]) == {"clip_captions_cut": 1}
    assert "1 captions are longer than the 16 tokens of the CLIP" in caplog.text


def test_classes_have_no_clip_score(clip_folder: Path, refusal: Refusal) -> None:
    clip = Clip(str(clip_folder), CPU)
    assert "this network is told the class 3" in refusal(lambda: clip.measure(IMAGES[:1], [3]))


def test_a_folder_that_is_no_clip_is_refused(clip_folder: Path, tmp_path: Path, refusal: Refusal) -> None:
    assert "preprocessor_config.json" in refusal(lambda: Clip(str(EMOJI), CPU))
    folder = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refusal(lambda: Clip(str(folder), CPU))
    assert refusal(lambda: Clip(str(tmp_path / "nowhere"), CPU))


def test_cmmd_is_the_published_distance_of_clips_image_embeddings(clip_folder: Path) -> None:
    """The biased estimate of the published code, made unbiased by leaving out the diagonals; sigma 10, times 1000."""
    settings = SETTINGS.model_copy(update={"clip": str(clip_folder)})
    network = transformers.CLIPModel.from_pretrained(clip_folder)
    processor = transformers.CLIPImageProcessor.from_pretrained(clip_folder)
    pixels = processor(images=list(IMAGES), return_tensors="pt").pixel_values
    with torch.no_grad():
        tokens = torch.zeros(1, 3, dtype=torch.long)
        embedded = network(pixel_values=pixels, input_ids=tokens).image_embeds.double().numpy()
    x, y = (e / np.linalg.norm(e, axis=1, keepdims=True) for e in (embedded[:3], embedded[3:]))

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / (2 * 10**2))

    within = [(k.sum() - 3) / 6 for k in (kernel(x, x), kernel(y, y))]
    wanted = 1000 * (sum(within) - 2 * kernel(x, y).mean())
    measured = MEASUREMENTS["clip_images"](settings, CPU).measure(IMAGES, [])
    assert scored("cmmd", measured[:3].double(), measured[3:].double()).value == pytest.approx(
        wanted, abs=1e-4
    )


def test_the_fd_of_dinov2_reads_the_normalized_class_token(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    network = transformers.Dinov2Model(config)
    network.save_pretrained(tmp_path)
    transformers.BitImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    ).save_pretrained(tmp_path)
    processor = transformers.BitImageProcessor.from_pretrained(tmp_path)
    measured = MEASUREMENTS["dinov2"](SETTINGS.model_copy(update={"dinov2": str(tmp_path)}), CPU)
    with torch.no_grad():
        pixels = processor(images=list(IMAGES), return_tensors="pt").pixel_values
        wanted = network(pixel_values=pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(measured.measure(IMAGES, []), wanted, atol=1e-5, rtol=0)


def test_patches_are_the_centres_at_full_resolution(refusal: Refusal) -> None:
    images = torch.arange(2 * 3 * 400 * 301).reshape(2, 3, 400, 301) % 251
    assert torch.equal(centre_patches(images), images[:, :, 50:349, 1:300])
    assert "299 pixels of larger images" in refusal(lambda: centre_patches(images[..., :299]))
    assert "leave patch_fid out" in refusal(lambda: MEASUREMENTS["patches"](SETTINGS, CPU))


def test_per_class_fid_is_the_mean_of_the_distances_of_the_classes(refusal: Refusal) -> None:
    def of_classes(features: Tensor) -> MetricState:
        state = METRICS["class_fid"].new_state()
        for part in (slice(0, 20), slice(20, None)):
            count = len(features[part])
            state.update(batch(features[part], [index % 2 for index in range(count)]))
        return state

    wanted = [scored("fid", FAKE[label::2], REAL[label::2]).value for label in (0, 1)]
    assert of_classes(FAKE).score(of_classes(REAL)).value == pytest.approx(sum(wanted) / 2)
    assert "class 0 has 1 generated" in refusal(lambda: of_classes(FAKE[:1]).score(of_classes(REAL)))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("npm"), reason="the emoji are fetched with npm")
def test_the_clip_of_the_emoji_knows_their_captions(tmp_path: Path) -> None:
    shards, config = str(tmp_path / "shards"), recipes.get("sdxl-4step-emoji")
    stages.shard(config, str(emoji_source.source(tmp_path / "source")), shards)
    clip = Clip(str(EMOJI.with_name("clip_model")), CPU)
    found = emoji_clip.share_found(clip, Shards(shards, HOLDOUT).evenly_spaced(200))
    assert found > 0.5  # chance: 0.1
