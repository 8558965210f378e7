"""Text-to-image from end to end on a tiny SDXL: resolve, encode, pairs, distill, evaluate, package, sample; and diffusers."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLPipeline,
)
from PIL import Image

from dmd2 import recipes, stages
from dmd2.batch import Batch
from dmd2.config import Config
from dmd2.data.loader import Shards
from dmd2.data.shard_table import TRAIN
from dmd2.evaluation.scores import score_table
from dmd2.io.artifact import Manifest, read_manifest
from dmd2.io.tensors import load_tensors
from dmd2.licence import LICENCES, stated_licence
from dmd2.model import load, load_network
from dmd2.models.convert.student_weights import read_unet
from dmd2.models.family import ModelFamily
from dmd2.models.lora import export_low_rank_update
from dmd2.models.stable_forms import CHECKPOINT, KOHYA_LORA, LORA
from dmd2.sampler import generate
from dmd2.stages.distributed import batch_reader
from dmd2.training import checkpoint
from dmd2.training.checkpoint import Checkpoints
from dmd2.training.metrics_log import checkpoint_scores, read_metrics
from tests.conftest import ALONE
from tests.tiny_sdxl import SMALL


def config(recipe: str = "sdxl-4step-emoji", *overrides: str) -> Config:
    return recipes.resolve(recipe, (*SMALL, *overrides))


@pytest.fixture(scope="module")
def root(pipeline: Path, squares: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of the four-step recipe. Read only."""
    root = tmp_path_factory.mktemp("text")
    names = ("shards", "teacher", "latents", "run", "evaluation", "gate", "package")
    shards, teacher, latents, run, evaluation, gate, package = (str(root / name) for name in names)
    stages.shard(config(), str(squares), shards, workers=1)
    stages.resolve(config(), str(pipeline), teacher)
    stages.encode(config(), shards, teacher, latents)
    stages.distill(config(), latents, teacher, run)
    stages.evaluate(config(), shards, teacher, run, evaluation)
    stages.gate(config(), evaluation, gate)
    stages.package(run, evaluation, gate, package)
    return root


def distilled(
    root: Path, out: Path, recipe: str, *overrides: str, data: str = "latents", **more: Any
) -> Path:
    """A run without previews, unless the overrides say when to make them."""
    changed = config(recipe, "distill.preview_every=100", *overrides)
    stages.distill(changed, str(root / data), str(root / "teacher"), str(out), **more)
    return out


@pytest.fixture(scope="module")
def low_rank(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A low-rank student. Read only."""
    out = tmp_path_factory.mktemp("low_rank") / "run"
    return distilled(root, out, "sdxl-4step-lora-emoji", "distill.student.ema=0.9")


@pytest.fixture(scope="module")
def adopted(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student of `root` as weights from elsewhere: its run, evaluation and gate. Read only."""
    folder = tmp_path_factory.mktemp("adopted")
    weights = root / "run" / "unet" / "diffusion_pytorch_model.safetensors"
    run, evaluation, gate = (str(folder / name) for name in ("run", "evaluation", "gate"))
    stages.adopt(config(), str(weights), str(root / "teacher"), run)
    stages.evaluate(config(), str(root / "shards"), str(root / "teacher"), run, evaluation)
    stages.gate(config(), evaluation, gate)
    return folder


def first_batch(root: Path, data: Path) -> tuple[ModelFamily, Batch]:
    family = load_network(root / "teacher").family
    batches = batch_reader(config(), str(data), 4, ALONE, "latents", family.read)
    return family, next(batches(0))


def test_captions_that_were_encoded_once_are_those_that_training_encodes(
    root: Path, tmp_path: Path, refusal: Callable[[Callable[[], object]], str]
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(root / "teacher", changed)
    (changed / "text_encoder" / "config.json").write_text(
        (root / "teacher" / "text_encoder" / "config.json").read_text() + " "
    )
    for name, source in (("stored", root / "teacher"), ("others", changed)):
        stages.encode(
            config("sdxl-4step-emoji", "encode.text=True"),
            str(root / "shards"),
            str(source),
            str(tmp_path / name),
        )
    (encoding, wanted), (reading, found) = (
        first_batch(root, root / "latents"),
        first_batch(root, tmp_path / "stored"),
    )
    assert "text_encoders" in vars(encoding)
    assert "text_encoders" not in vars(reading), "they take no memory"
    assert torch.equal(found.x, wanted.x)
    for mine, theirs in ((found.cond, wanted.cond), (found.uncond, wanted.uncond)):
        assert mine.keys() == theirs.keys()
        for part, value in mine.items():
            assert torch.equal(value, theirs[part].half().float()), "as they are stored"
    said = refusal(
        lambda: stages.distill(
            config(), str(tmp_path / "others"), str(root / "teacher"), str(tmp_path / "run")
        )
    )
    assert "were encoded with other text encoders than the teacher's" in said


def learned(run: Path, *names: str) -> torch.Tensor:
    weights = load_tensors(run / "unet" / "diffusion_pytorch_model.safetensors")
    return torch.cat([weights[n].flatten() for n in names or sorted(weights)])


def test_the_package_in_stock_diffusers_draws_what_our_sampler_does_for_the_same_noises(root: Path) -> None:
    student = load(root / "package")
    prompts = ["a red square", "a blue square", "a green square"]
    eps = torch.randn(3, *student.family.shape, generator=torch.Generator().manual_seed(1))
    between = torch.Generator().manual_seed(2)
    ours = student.family.to_pixels(
        generate(
            student.family.denoiser(student.network),
            eps,
            student.family.condition(prompts).cond,
            student.timesteps,
            lambda x: torch.randn(x.shape, generator=between),
        )
    )
    pipe = StableDiffusionXLPipeline.from_pretrained(root / "package")
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        prompts,
        timesteps=[999, 749, 499, 249],
        guidance_scale=0,
        latents=eps,
        generator=torch.Generator().manual_seed(2),
        output_type="pt",
    ).images
    assert type(pipe.scheduler).__name__ == "LCMScheduler"
    torch.testing.assert_close(ours.clamp(-1, 1) / 2 + 0.5, theirs, atol=1e-3, rtol=0)
    assert theirs.std() > 1e-3  # a picture, not a grey field


def test_the_teacher_is_sampled_by_diffusers_own_pipeline(root: Path, pipeline: Path) -> None:
    teacher = load_network(root / "teacher")
    images = teacher.sample_teacher(["a red square"], seed=3, steps=5, guidance=3.0)
    eps, x = teacher.pairs(["a red square"], seed=3, steps=5, guidance=3.0)
    pipe = StableDiffusionXLPipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)

    def theirs() -> torch.Tensor:
        drawn: torch.Tensor = pipe(
            "a red square", latents=eps, num_inference_steps=5, guidance_scale=3.0, output_type="latent"
        ).images
        return drawn

    assert torch.equal(images, teacher.family.decode(theirs()))
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    torch.testing.assert_close(x, theirs(), atol=1e-5, rtol=1e-4)


def test_an_evaluation_scores_student_and_teacher_at_few_and_many_steps(root: Path) -> None:
    facts = read_manifest(root / "evaluation", "evaluation").facts
    told = [(v["name"], v["recipe"], v["steps"], v["calls"]) for v in facts["variants"]]
    assert told == [
        ("student", "sdxl-4step-emoji", 4, 4),
        ("teacher", "teacher", 2, 4),
        ("teacher_1step", "teacher", 1, 2),
        ("student_1step", "sdxl-4step-emoji", 1, 1),
        ("teacher_4step", "teacher", 4, 8),
    ]
    assert all(facts[f"fid_{name}"] == v["fd"] for v in facts["variants"] for name in [v["name"]])


def test_a_report_shows_every_variant(root: Path, tmp_path: Path) -> None:
    names = ("shards", "teacher", "run", "evaluation", "gate")
    folders = {name if name != "shards" else "data": str(root / name) for name in names}
    page = stages.report(**folders, out=str(tmp_path / "report.html"), package=str(root / "package"))
    text = Path(page).read_text()
    for told in ("student in 1 step", "teacher in 4 steps", "teacher in 1 step", "Held-out real images"):
        assert told in text


def test_a_low_rank_student_is_published_whole_and_as_an_update_that_gives_the_same_network(
    root: Path, low_rank: Path, tmp_path: Path
) -> None:
    run = low_rank
    update = run / "lora" / "pytorch_lora_weights.safetensors"
    stages.adopt(
        config("sdxl-4step-lora-emoji"), str(update), str(root / "teacher"), str(tmp_path / "adopted")
    )
    torch.testing.assert_close(learned(tmp_path / "adopted"), learned(run), atol=1e-6, rtol=1e-5)
    assert not torch.equal(learned(run), learned(root / "teacher").float())
    pipe = StableDiffusionXLPipeline.from_pretrained(root / "teacher")
    pipe.load_lora_weights(str(update))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    theirs = torch.cat([v.flatten() for _, v in sorted(pipe.unet.state_dict().items())])
    torch.testing.assert_close(theirs, learned(run), atol=1e-6, rtol=1e-5)


def test_the_package_of_a_low_rank_student_lists_all_of_its_forms_and_those_for_other_programs_name_its_licence(
    root: Path, low_rank: Path, tmp_path: Path, refusal: Callable[[Callable[[], object]], str]
) -> None:
    run = str(low_rank)
    evaluation, gate, out = (str(tmp_path / name) for name in ("evaluation", "gate", "package"))
    stages.evaluate(config(), str(root / "shards"), str(root / "teacher"), run, evaluation)
    stages.gate(config(), evaluation, gate)
    said: dict[str, Any] = {"single_file": "bfloat16", "license": "openrail++"}
    made = stages.package(run, evaluation, gate, out, **said)
    assert stages.package(run, evaluation, gate, out, **said) == made
    again = refusal(lambda: stages.package(run, evaluation, gate, out))
    assert "was made with --single-file bfloat16, not float16" in again
    card, sizes = (tmp_path / "package" / "README.md").read_text(), {f.path: f.size for f in made.files}
    for name in (LORA, KOHYA_LORA, CHECKPOINT):
        assert f"| `{name}` | {sizes[name] / 1e6:,.1f} MB | diffusers" in card
    for name in (KOHYA_LORA, CHECKPOINT):
        read = stated_licence("teacher", str(tmp_path / "package" / name))
        assert read == {LICENCES: {"teacher": {"license": "openrail++"}}}


def test_a_low_rank_update_is_extracted_from_a_student_whose_whole_network_was_trained(
    root: Path, tmp_path: Path, refusal: Callable[[Callable[[], object]], str]
) -> None:
    run, evaluation, gate, teacher = (str(root / name) for name in ("run", "evaluation", "gate", "teacher"))
    out = tmp_path / "package"

    def packaged(rank: int = 0, teacher: str = "") -> Manifest:
        return stages.package(
            run, evaluation, gate, str(out), single_file="none", low_rank=rank, teacher=teacher
        )

    assert "needs --teacher with the folder" in refusal(lambda: packaged(8))
    share = packaged(32, teacher).facts["low_rank_share"]
    assert 0.5 < share < 1
    assert f"rank 32, extracted: it holds {share:.1%}" in (out / "README.md").read_text()
    base = load_network(teacher).network.state_dict()
    whole = load_network(out).network.state_dict()
    bare = {name.removeprefix("unet."): tensor for name, tensor in base.items()}
    merged = {f"unet.{name}": tensor for name, tensor in read_unet(out / KOHYA_LORA, bare).items()}
    change = sum((whole[name] - base[name]).square().sum() for name in base)
    left = sum((whole[name] - merged[name]).square().sum() for name in base)
    torch.testing.assert_close(1 - float(left / change), share, atol=1e-4, rtol=0)
    assert "made with --low-rank 32, not 0" in refusal(packaged)


def test_a_low_rank_student_on_latents_is_judged_by_its_pictures(root: Path, tmp_path: Path) -> None:
    """What is judged are pictures behind the VAE, of prompts from a file; what is published is the best, not the last."""
    (tmp_path / "prompts.txt").write_text("a red square\na green square\n")
    judged = ("distill.best.images=6", "distill.best.features=efficientnet", "distill.save_every=2")
    run = distilled(
        root,
        tmp_path / "run",
        "sdxl-4step-lora-emoji",
        *judged,
        "distill.critic_updates=1",
        "distill.student.lr=3",
        prompts=str(tmp_path / "prompts.txt"),
    )
    told, facts = checkpoint_scores(run), read_manifest(run, "run").facts
    assert facts["best_step"] == min(told, key=told.__getitem__) < max(told)
    lora = recipes.get("sdxl-4step-lora-emoji").distill.lora
    assert lora
    average = checkpoint.load_object(run / "checkpoints" / f"{facts['best_step']:08d}", "student.average0")
    saved = {name.removeprefix("shadow."): weight for name, weight in average.items() if name != "updates"}
    update = load_tensors(run / "lora" / "pytorch_lora_weights.safetensors")
    assert update.keys() == export_low_rank_update(saved, lora).keys()
    assert all(
        torch.equal(update[name], weight) for name, weight in export_low_rank_update(saved, lora).items()
    )


def test_in_shared_base_mode_a_checkpoint_holds_only_what_learns(root: Path, tmp_path: Path) -> None:
    run = distilled(root, tmp_path / "run", "sdxl-4step-shared-emoji", "distill.steps=2")
    saved = [checkpoint.load_object(run / "checkpoints" / "00000002", name) for name in ("student", "critic")]
    assert all(".lora_" in name for name in saved[0])
    assert {name.split(".")[0] for name in saved[1]} == {"network", "head"}
    assert all(".lora_" in name for name in saved[1] if name.startswith("network."))


def test_without_backward_simulation_the_student_is_another_one(root: Path, tmp_path: Path) -> None:
    run = distilled(root, tmp_path / "run", "sdxl-4step-noised-real-emoji")
    assert not torch.equal(learned(run), learned(root / "run"))


def test_a_one_step_student_learns_the_teachers_pairs_and_starts_from_that(
    root: Path, tmp_path: Path
) -> None:
    pairs, teacher = tmp_path / "pairs", str(root / "teacher")
    stages.pairs(config("sdxl-1step-emoji"), str(root / "latents"), teacher, str(pairs))
    batch = Shards(str(pairs), TRAIN, "pairs").evenly_spaced(3)
    assert batch.image.shape == (3, 2, 4, 16, 16)
    again = load_network(teacher).pairs([batch.text[0]], seed=0, steps=2, guidance=3.0)
    torch.testing.assert_close(batch.image[0, 0], again[0][0].half())  # the first noise has the first seed
    warm = tmp_path / "warm"
    stages.distill(config("sdxl-1step-warmup-emoji", "distill.steps=12"), str(pairs), teacher, str(warm))
    told = [line["student/regression"] for line in read_metrics(warm)]
    assert told[-1] < told[0]
    run = distilled(
        root,
        tmp_path / "run",
        "sdxl-1step-emoji",
        "distill.steps=1",
        "distill.student.lr=1e-12",
        start=str(warm),
    )
    torch.testing.assert_close(learned(run), learned(warm), atol=1e-6, rtol=1e-5)
    assert load_network(run).timesteps == (399,)


def test_pairs_killed_between_shards_continue_with_the_same_bytes(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dmd2.model import Model

    arguments = config("sdxl-1step-emoji"), str(root / "latents"), str(root / "teacher")
    whole = stages.pairs(*arguments, str(tmp_path / "whole"))
    sampled = Model.pairs
    calls: list[int] = []

    def failing(self: Model, *given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return sampled(self, *given, **named)

    monkeypatch.setattr(Model, "pairs", failing)
    with pytest.raises(KeyboardInterrupt):
        stages.pairs(*arguments, str(tmp_path / "parts"))
    assert not (tmp_path / "parts").exists()
    assert stages.pairs(*arguments, str(tmp_path / "parts")).digest == whole.digest
    assert len(calls) == 4 + 3  # the first shard, two batches, was kept


def test_prompts_of_a_file_replace_those_of_the_data_and_not_captions_of_real_samples(
    root: Path, tmp_path: Path, refusal: Callable[[Callable[[], object]], str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a green square\na blue square\n")
    run = distilled(root, tmp_path / "run", "sdxl-4step-emoji", prompts=str(prompts))
    assert not torch.equal(learned(run), learned(root / "run"))
    assert "prompts" in read_manifest(run, "run").inputs
    other = "sdxl-4step-noised-real-emoji"
    assert "leave out --prompts" in refusal(
        lambda: distilled(root, tmp_path / "x", other, prompts=str(prompts))
    )


def test_a_picture_of_any_folder_with_a_network(root: Path, tmp_path: Path) -> None:
    for name, more in (("package", {"steps": 2}), ("run", {}), ("teacher", {"steps": 3, "guidance": 3.0})):
        out = tmp_path / f"{name}.png"
        stages.sample(str(root / name), str(out), count=4, prompts=("a red square", "a blue square"), **more)
        assert Image.open(out).size == (2 * 33 + 1, 2 * 33 + 1)


def test_a_run_is_the_same_when_it_was_interrupted(root: Path, low_rank: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    original, seen = Checkpoints.wait_for_save, []

    def finish(self: Checkpoints) -> bool:
        if original(self):
            seen.append(1)
            if len(seen) == 1:
                raise KeyboardInterrupt
        return bool(seen)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "wait_for_save", finish)
        with pytest.raises(KeyboardInterrupt):
            distilled(root, parts, "sdxl-4step-lora-emoji", "distill.student.ema=0.9")
    distilled(root, parts, "sdxl-4step-lora-emoji", "distill.student.ema=0.9")
    assert torch.equal(learned(low_rank), learned(parts))


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda r: stages.teach(config(), str(r / "latents"), str(r / "x")), "bring one with dmd2 resolve"),
        (lambda r: stages.resolve(config(), str(r / "shards"), str(r / "x")), "is no VAE"),
        (lambda r: stages.sample(str(r / "run"), str(r / "x.png"), labels=(1,)), "is not a text"),
        (lambda r: stages.sample(str(r / "run"), str(r / "x.png"), steps=5), "was made for 4"),
        (lambda r: stages.sample(str(r / "run"), str(r / "x.png"), guidance=2.0), "distilled into a student"),
        (lambda r: stages.sample(str(r / "teacher"), str(r / "x.png")), "give --prompts"),
        (lambda r: distilled(r, r / "x", "sdxl-4step-emoji", data="shards"), "a latents folder is needed"),
        (lambda r: distilled(r, r / "x", "sdxl-4step-emoji", "family.vae_stride=4"), "vae_stride is 2, not 4"),
        (lambda r: distilled(r, r / "x", "sdxl-4step-lora-emoji", start=str(r / "run")), "leave out --start"),
        (lambda r: distilled(r, r / "x", "sdxl-1step-warmup-emoji"), "a pairs folder is needed"),
        (lambda r: distilled(r, r / "x", "sdxl-4step-emoji", prompts=__file__[:-2] + "txt"), "does not exist"),
        (lambda r: stages.sample(str(r / "teacher"), str(r / "x.png"), prompts=("a",), guidance=0.5), "guides above 1"),
    ],
)  # fmt: skip
def test_a_mistake_is_answered_in_one_sentence(
    act: Callable[[Path], object], said: str, root: Path, refusal: Callable[[Callable[[], object]], str]
) -> None:
    assert said in refusal(lambda: act(root))


def test_latents_of_another_vae_are_refused(
    root: Path, pipeline: Path, tmp_path: Path, refusal: Callable[[Callable[[], object]], str]
) -> None:
    torch.manual_seed(1)
    other = AutoencoderKL.from_pretrained(pipeline / "vae")
    for parameter in other.parameters():
        parameter.data += 0.01
    other.save_pretrained(tmp_path / "vae")
    stages.encode(config(), str(root / "shards"), str(tmp_path / "vae"), str(tmp_path / "latents"))
    sentence = refusal(
        lambda: stages.distill(
            config(), str(tmp_path / "latents"), str(root / "teacher"), str(tmp_path / "run")
        )
    )
    assert "another VAE" in sentence


def test_a_published_unet_becomes_a_run_that_is_evaluated_and_packaged(
    root: Path, adopted: Path, tmp_path: Path
) -> None:
    run, evaluation, gate = (str(adopted / name) for name in ("run", "evaluation", "gate"))
    stages.package(run, evaluation, gate, str(tmp_path / "package"))
    scores = [
        read_manifest(folder / "evaluation", "evaluation").facts["fid_student"] for folder in (root, adopted)
    ]
    assert scores[0] == scores[1]
    assert torch.equal(learned(tmp_path / "package"), learned(root / "package"))


def test_a_pickle_that_would_run_something_is_not_adopted(
    root: Path, tmp_path: Path, refusal: Callable[[Callable[[], object]], str]
) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    (tmp_path / "student.bin").write_bytes(pickle.dumps(Hostile()))
    out = tmp_path / "adopted"
    refusal(lambda: stages.adopt(config(), str(tmp_path / "student.bin"), str(root / "teacher"), str(out)))
    assert not (tmp_path / "ran").exists()
    assert not out.exists()


def test_another_vae_takes_the_place_of_the_teachers(root: Path, pipeline: Path, tmp_path: Path) -> None:
    other = AutoencoderKL.from_pretrained(pipeline / "vae")
    for parameter in other.parameters():
        parameter.data *= 0.5
    other.save_pretrained(tmp_path / "vae")
    stages.resolve(config(), str(pipeline), str(tmp_path / "teacher"), vae=str(tmp_path / "vae"))
    files = [Path(f, "vae", "diffusion_pytorch_model.safetensors") for f in (tmp_path, tmp_path / "teacher")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert (
        read_manifest(tmp_path / "teacher", "teacher").digest
        != read_manifest(root / "teacher", "teacher").digest
    )


def test_a_teacher_says_what_it_predicts(root: Path) -> None:
    facts = read_manifest(root / "teacher", "teacher").facts
    told = facts["predicts"], facts["zero_terminal_snr"], facts["scheduler"]
    assert told == ("epsilon", False, "EulerDiscreteScheduler")


def test_a_tiny_vae_makes_previews_and_warm_up_images_but_no_latents(
    root: Path, tmp_path: Path, refusal: Callable[[Callable[[], object]], str]
) -> None:
    torch.manual_seed(0)
    widths = (8, 8)
    make: Any = AutoencoderTiny
    tiny = make(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    tiny.save_pretrained(tmp_path / "tiny")
    place = f"distill.preview_vae={tmp_path / 'tiny'}"
    run = distilled(root, tmp_path / "run", "sdxl-4step-emoji", place, "distill.preview_every=6")
    assert torch.equal(learned(run), learned(root / "run"))
    picture = "previews/00000006.png"
    assert (run / picture).read_bytes() != (root / "run" / picture).read_bytes()
    pairs = tmp_path / "pairs"
    stages.pairs(config("sdxl-1step-emoji"), str(root / "latents"), str(root / "teacher"), str(pairs))
    decoder = f"distill.regression.decoder={tmp_path / 'tiny'}", "distill.steps=1"
    warm = tmp_path / "warm"
    stages.distill(config("sdxl-1step-warmup-emoji", *decoder), str(pairs), str(root / "teacher"), str(warm))
    assert "which can only decode" in refusal(
        lambda: stages.encode(config(), str(root / "shards"), str(tmp_path / "tiny"), str(tmp_path / "x"))
    )


def test_data_without_captions_is_not_learned_from_as_if_it_had_some(
    root: Path, tmp_path: Path, refusal: Callable[[Callable[[], object]], str]
) -> None:
    (tmp_path / "source").mkdir()
    for index in range(12):
        Image.new("RGB", (32, 32), (20 * index, 90, 30)).save(tmp_path / "source" / f"{index}.png")
    shards, latents, teacher = str(tmp_path / "shards"), str(tmp_path / "latents"), str(root / "teacher")
    assert "none of the 12 images of the source has a caption" in refusal(
        lambda: stages.shard(config(), str(tmp_path / "source"), shards, workers=1)
    )
    kept = config("sdxl-4step-emoji", "data.allow_empty_captions=True")
    stages.shard(kept, str(tmp_path / "source"), shards, workers=1)
    stages.encode(config(), shards, teacher, latents)
    assert "no captions to draw" in refusal(
        lambda: stages.distill(config(), latents, teacher, str(tmp_path / "run"))
    )
    (tmp_path / "prompts.txt").write_text("a green square")
    run = tmp_path / "told"
    stages.distill(
        config("sdxl-4step-emoji", "distill.steps=1", "distill.preview_every=100"),
        latents,
        teacher,
        str(run),
        prompts=str(tmp_path / "prompts.txt"),
    )
    assert set(read_manifest(run, "run").facts["prompts"]) == {"a green square"}


def test_a_run_started_from_a_published_stage_has_its_student_and_its_critic(
    root: Path, tmp_path: Path
) -> None:
    folder, run = tmp_path / "training", str(tmp_path / "adopted")
    folder.mkdir()
    weights = load_tensors(root / "run" / "unet" / "diffusion_pytorch_model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    torch.save({f"fake_unet.{n}": w + 0.5 for n, w in weights.items()}, folder / "pytorch_model_1.bin")
    assert stages.adopt(config(), str(folder), str(root / "teacher"), run).facts["critic"]
    tiny = [f"distill.{role}.lr=1e-12" for role in ("student", "critic")]
    started = distilled(root, tmp_path / "run", "sdxl-4step-emoji", "distill.steps=1", *tiny, start=run)
    (newest,) = (started / "checkpoints").glob("[0-9]*")
    found = {name: checkpoint.load_object(newest, name) for name in ("student", "critic")}
    for name, weight in weights.items():
        torch.testing.assert_close(found["student"][f"unet.{name}"], weight, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(
            found["critic"][f"network.unet.{name}"], weight + 0.5, atol=1e-6, rtol=1e-5
        )


def test_adopting_depends_on_every_file_of_a_training_folder(
    root: Path, tmp_path: Path, refusal: Callable[[Callable[[], object]], str]
) -> None:
    folder, out = tmp_path / "training", tmp_path / "run"
    folder.mkdir()
    (folder / "a.json").write_text("{}")
    weights = load_tensors(root / "run" / "unet" / "diffusion_pytorch_model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    stages.adopt(config(), str(folder), str(root / "teacher"), str(out))
    torch.save({k: v + 1 for k, v in weights.items()}, folder / "pytorch_model.bin")
    again = [str(folder), str(root / "teacher"), str(out)]
    assert "made from other inputs" in refusal(lambda: stages.adopt(config(), *again))
    (tmp_path / "empty").mkdir()

    def adopted(name: str) -> object:
        return stages.adopt(config(), str(tmp_path / name), str(root / "teacher"), str(tmp_path / "x"))

    assert "without pytorch_model.bin" in refusal(lambda: adopted("empty"))
    assert "does not exist" in refusal(lambda: adopted("no.bin"))


def test_a_report_of_an_adopted_student_has_no_curves_and_is_written(
    root: Path, adopted: Path, tmp_path: Path
) -> None:
    run, evaluation, gate = (str(adopted / name) for name in ("run", "evaluation", "gate"))
    out = str(tmp_path / "report.html")
    stages.report(str(root / "shards"), str(root / "teacher"), run, evaluation, gate, out)
    assert "student in 1 step" in Path(out).read_text()


def test_prompts_longer_than_the_window_are_counted_and_told(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = "a red square " * 40
    for folder in ("teacher", "package"):
        caplog.clear()
        stages.sample(str(root / folder), str(tmp_path / "a.png"), 2, prompts=(long, "a red square"), steps=1)
        (said,) = [record.getMessage() for record in caplog.records if "prompts" in record.getMessage()]
        assert "1 of 2 prompts are longer than the" in said
        assert "'a red square a red" in said
    caplog.clear()
    stages.sample(str(root / "package"), str(tmp_path / "a.png"), 2, prompts=("a red square",), steps=1)
    assert "prompts" not in caplog.text


@pytest.mark.slow
def test_pipelines_and_adopted_students_are_rows_of_the_same_table(
    root: Path, adopted: Path, pipeline: Path, tmp_path: Path
) -> None:
    """The teacher's own pipeline draws what the teacher does, and the same student adopted what the student does."""
    lcm = Path(shutil.copytree(pipeline, tmp_path / "lcm"))
    scheduler: Any = LCMScheduler()
    scheduler.save_pretrained(lcm / "scheduler")
    index = json.loads((lcm / "model_index.json").read_text())
    (lcm / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "LCMScheduler"]}))
    baselines = f"lcm={lcm}:2,original={pipeline}:2:3.0,dmd2={adopted / 'run'}"
    shards, teacher, run = (str(root / name) for name in ("shards", "teacher", "run"))
    out, gate, page = (str(tmp_path / name) for name in ("evaluation", "gate", "report.html"))
    changed = config("sdxl-4step-emoji", f"evaluate.baselines={baselines}", "evaluate.metrics=fid")
    made = stages.evaluate(changed, shards, teacher, run, out)
    assert {"baseline.lcm", "baseline.original", "baseline.dmd2"} < made.inputs.keys()
    scores = {name: each["fid"]["value"] for name, each in made.facts["scores"].items()}
    assert scores["original"] == pytest.approx(scores["teacher"], rel=1e-3)
    assert scores["dmd2"] == scores["student"]
    assert scores["lcm"] not in (scores["teacher"], scores["student"])
    rows = {row[0]: row[1:3] for row in score_table(made.facts)[1]}
    assert (rows["lcm in 2 steps"], rows["original in 2 steps"]) == (["2", "2"], ["2", "4"])
    assert rows["dmd2 in 4 steps"] == ["4", "4"]
    assert (Path(out) / "lcm.png").is_file()
    stages.gate(changed, out, gate)
    stages.report(shards, teacher, run, out, gate, page)
    assert "Lcm in 2 steps, 2 network calls" in Path(page).read_text()


def test_an_evaluation_counts_the_captions_that_were_cut(
    root: Path, squares: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert read_manifest(root / "evaluation", "evaluation").facts["prompts_cut"] == 0
    source, config_ = tmp_path / "source", config()
    shutil.copytree(squares, source)
    lines = [json.loads(line) for line in (source / "metadata.jsonl").read_text().splitlines()]
    texts = [json.dumps(line | {"text": f"{line['text']} " * 40}) for line in lines]
    (source / "metadata.jsonl").write_text("\n".join(texts))
    shards, latents, run, out = (str(tmp_path / name) for name in ("shards", "latents", "run", "evaluation"))
    stages.shard(config_, str(source), shards, workers=1)
    stages.encode(config_, shards, str(root / "teacher"), latents)
    stages.distill(
        config("sdxl-4step-emoji", "distill.steps=1", "distill.preview_every=100"),
        latents,
        str(root / "teacher"),
        run,
    )
    facts = stages.evaluate(config_, shards, str(root / "teacher"), run, out).facts
    assert facts["prompts_cut"] == facts["prompts"] > 0
    assert f"{facts['prompts']} of {facts['prompts']} prompts are longer" in caplog.text
