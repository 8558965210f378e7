"""What the files of a teacher or a student say of themselves is followed, or refused in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from dmd2 import recipes, stages
from dmd2.model import load_network
from dmd2.models.convert.single_file import convert_single_file
from dmd2.models.convert.student_weights import ORIGINAL_PREFIX, read_unet
from dmd2.models.sdxl import Sdxl
from tests.models.test_convert import compvis, prefixed, same, sgm, unet, weights, without_weights
from tests.models.test_convert import pipeline as make_pipeline
from tests.tiny_sdxl import SMALL

Refusal = Callable[[Callable[[], object]], str]
EMPTY = torch.tensor([])
CONFIG = recipes.resolve("sdxl-4step-emoji", SMALL)


@pytest.fixture
def teacher(pipeline: Path, tmp_path: Path) -> Path:
    """A copy of the small pipeline, to be changed."""
    return Path(shutil.copytree(pipeline, tmp_path / "pipeline"))


def rewrite_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def set_value(path: Path, value: float) -> None:
    """Overwrite one value of the first tensor in a safetensors file."""
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = value
    save_file(tensors, path, {"format": "pt"})


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], Path]:
    """Tensors of an SDXL in one file, and a folder with its configs."""
    folder = tmp_path_factory.mktemp("single") / "base"
    return compvis(make_pipeline(True, folder)), without_weights(folder)


@pytest.mark.parametrize(
    ("markers", "metadata", "prediction", "zero_snr"),
    [
        ((), None, "epsilon", False),
        (("v_pred",), None, "v_prediction", False),
        (("v_pred", "ztsnr"), None, "v_prediction", True),
        ((), {"modelspec.prediction_type": "v"}, "v_prediction", False),
        ((), {"modelspec.prediction_type": "epsilon"}, "epsilon", False),
        (("v_pred",), {"ss_v_parameterization": "None"}, "v_prediction", False),
        ((), {"modelspec.predict_key": "v"}, "v_prediction", False),
        ((), {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, "v_prediction", True),
    ],
)
def test_the_process_that_a_single_file_states_is_its_teachers(
    markers: tuple[str, ...],
    metadata: dict[str, str] | None,
    prediction: str,
    zero_snr: bool,
    single: tuple[dict[str, torch.Tensor], Path],
    tmp_path: Path,
) -> None:
    tensors, base = single
    save_file(tensors | dict.fromkeys(markers, EMPTY), tmp_path / "a.safetensors", metadata)
    convert_single_file(tmp_path / "a.safetensors", base, tmp_path / "out")
    scheduler = json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == prediction
    assert scheduler.get("rescale_betas_zero_snr", False) == zero_snr


@pytest.mark.parametrize(
    ("markers", "metadata", "words"),
    [
        (("edm_mean",), None, "follows the process of EDM"),
        (("v_pred",), {"modelspec.prediction_type": "epsilon"}, "predicts epsilon and v_prediction"),
        (
            (),
            {"modelspec.prediction_type": "flow"},
            "modelspec.prediction_type = 'flow', which is no known prediction type",
        ),
    ],
)
def test_a_process_that_is_not_known_or_contradicts_itself_is_refused(
    markers: tuple[str, ...],
    metadata: dict[str, str] | None,
    words: str,
    single: tuple[dict[str, torch.Tensor], Path],
    tmp_path: Path,
    refusal: Refusal,
) -> None:
    tensors, base = single
    save_file(tensors | dict.fromkeys(markers, EMPTY), tmp_path / "a.safetensors", metadata)
    assert words in refusal(lambda: convert_single_file(tmp_path / "a.safetensors", base, tmp_path / "out"))


@pytest.mark.parametrize("prefix", ["", ORIGINAL_PREFIX])
def test_a_unet_alone_in_the_original_naming_is_read(prefix: str, tmp_path: Path) -> None:
    made = unet()
    tensors = {name: tensor.contiguous() for name, tensor in sgm(made).items()}
    tensors = prefixed({name.removeprefix(ORIGINAL_PREFIX): t for name, t in tensors.items()}, prefix)
    save_file(tensors, tmp_path / "a.safetensors")
    same(read_unet(tmp_path / "a.safetensors", weights(made)), weights(made))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "part", ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"]
)
def test_weights_that_are_not_finite_are_refused(
    part: str, value: float, teacher: Path, tmp_path: Path, refusal: Refusal
) -> None:
    set_value(teacher / f"{part}.safetensors", value)
    sentence = refusal(lambda: stages.resolve(CONFIG, str(teacher), str(tmp_path / "out")))
    assert f"{part}.safetensors has 1 infinite or NaN values" in sentence
    assert not (tmp_path / "out").exists()


def test_a_student_whose_weights_are_not_finite_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    tensors = weights(unet())
    save_file(tensors, tmp_path / "a.safetensors")
    set_value(tmp_path / "a.safetensors", float("nan"))
    assert "1 infinite or NaN values" in refusal(lambda: read_unet(tmp_path / "a.safetensors", tensors))


def test_samples_that_are_not_finite_are_no_picture(pipeline: Path, tmp_path: Path, refusal: Refusal) -> None:
    stages.resolve(CONFIG, str(pipeline), str(tmp_path / "teacher"))
    model = load_network(tmp_path / "teacher")
    next(iter(model.network.parameters())).data.view(-1)[0] = float("nan")
    assert "the network's output has" in refusal(lambda: model.sample_teacher(["a red square"], 0, steps=2))


@pytest.mark.parametrize("zeros", [None, True, False])
def test_uncond_of_an_sdxl_is_what_its_pipeline_says(
    zeros: bool | None, teacher: Path, tmp_path: Path
) -> None:
    if zeros is not None:
        rewrite_json(teacher / "model_index.json", force_zeros_for_empty_prompt=zeros)
    stages.resolve(CONFIG, str(teacher), str(tmp_path / "out"))
    family = load_network(tmp_path / "out").family
    assert isinstance(family, Sdxl)
    uncond = family.condition(["a red square", "a blue square"]).uncond
    text, pooled = family.empty_text
    assert pooled is not None
    assert text.any()
    assert pooled.any()
    for name, empty in (("text", text), ("pooled", pooled)):
        wanted = empty.expand_as(uncond[name]) if zeros is False else torch.zeros_like(uncond[name])
        assert torch.equal(uncond[name], wanted)


def write_old_tokenizer(folder: Path, *learned: str) -> CLIPTokenizer:
    """The tokenizer of the folder in files of before tokenizer.json, with learned words in added_tokens.json."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    special = {
        "bos_token": "<|startoftext|>",
        **dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    }
    vocabulary, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    shutil.rmtree(folder)
    folder.mkdir()
    for name, content in {
        "vocab.json": vocabulary,
        "added_tokens.json": {word: len(vocabulary) + n for n, word in enumerate(learned)},
        "special_tokens_map.json": special,
        "tokenizer_config.json": special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": 24},
    }.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]))
    found: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder)
    return found


def add_embedding(folder: Path) -> None:
    """One more row in the table of embeddings of a text encoder."""
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "token_embedding" in name)
    tensors[name] = torch.cat([tensors[name], torch.ones_like(tensors[name][:1])])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    rewrite_json(folder / "config.json", vocab_size=len(tensors[name]))


def test_words_that_were_added_to_a_tokenizer_are_kept(teacher: Path, tmp_path: Path) -> None:
    wanted = write_old_tokenizer(teacher / "tokenizer", "<my-cat>")("<my-cat>").input_ids
    assert len(wanted) == 3
    add_embedding(teacher / "text_encoder")
    stages.resolve(CONFIG, str(teacher), str(tmp_path / "out"))
    family = load_network(tmp_path / "out").family
    assert isinstance(family, Sdxl)
    assert family.text_encoders.parts[0][0]("<my-cat>").input_ids == wanted


def test_a_tokenizer_with_more_words_than_its_encoder_has_embeddings_is_refused(
    teacher: Path, tmp_path: Path, refusal: Refusal
) -> None:
    write_old_tokenizer(teacher / "tokenizer", "<my-cat>")
    sentence = refusal(lambda: stages.resolve(CONFIG, str(teacher), str(tmp_path / "out")))
    assert f"{teacher / 'tokenizer'} has" in sentence
    assert "tokens, and the text encoder in" in sentence
    assert not (tmp_path / "out").exists()


def test_encoders_that_cannot_be_loaded_are_refused_when_the_teacher_is_resolved(
    teacher: Path, tmp_path: Path, refusal: Refusal
) -> None:
    path = teacher / "text_encoder_2" / "model.safetensors"
    tensors = load_file(path)
    del tensors["text_projection.weight"]
    save_file(tensors, path, {"format": "pt"})
    sentence = refusal(lambda: stages.resolve(CONFIG, str(teacher), str(tmp_path / "out")))
    assert "lacks 1 weights of a CLIPTextModelWithProjection" in sentence


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("unet/config.json", {"layers_per_block": 10**6}, "has layers_per_block = 1000000"),
        (
            "unet/config.json",
            {"transformer_layers_per_block": [[1], [10**9, 1]]},
            "at most 64 layers per block",
        ),
        ("unet/config.json", {"down_block_types": ["DownBlock2D"] * 100}, "16 blocks are built"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}, "must be from 1 to 100000"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "many"}, "must be from 1 to 100000"),
        ("unet/config.json", {"more": "x" * 2**22}, "is not JSON, or not a config"),
    ],
)
def test_a_config_that_asks_for_endless_memory_is_refused(
    file: str, changes: dict[str, Any], words: str, teacher: Path, tmp_path: Path, refusal: Refusal
) -> None:
    rewrite_json(teacher / file, **changes)
    assert words in refusal(lambda: stages.resolve(CONFIG, str(teacher), str(tmp_path / "out")))


def test_a_config_without_a_bottom_is_refused(teacher: Path, tmp_path: Path, refusal: Refusal) -> None:
    (teacher / "unet" / "config.json").write_text("[" * 200_000)
    sentence = refusal(lambda: stages.resolve(CONFIG, str(teacher), str(tmp_path / "out")))
    assert "is not JSON, or not a config" in sentence
