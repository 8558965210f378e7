"""Stable Diffusion 1.5 and XL: their real shapes without their memory, their process, and what they are told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dmd2 import build, recipes
from dmd2.config import Config, StableConfig
from dmd2.models.family import Shown
from dmd2.models.stable import Stable, published, schedule
from dmd2.package import load_network
from dmd2.sample import Conditioning, Sample
from dmd2.trainer import Trainer

Refusal = Callable[[Callable[[], object]], str]
SIZES = {"sd15": 512, "sdxl": 1024}


def family(kind: str, folder: Path | None = None) -> Stable:
    made = build.family(StableConfig(kind=kind, resolution=SIZES[kind]), folder)
    assert isinstance(made, Stable)
    return made


def told(fam: Stable, count: int) -> Conditioning:
    text = torch.zeros(count, 77, fam.unet["cross_attention_dim"])
    if fam.embedding is None:
        return Conditioning(text=text)
    return Conditioning(text=text, pooled=torch.zeros(count, 1280), size=torch.ones(count, 6))


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def real(request: pytest.FixtureRequest) -> tuple[str, Stable, nn.Module]:
    fam = family(request.param)
    with torch.device("meta"):
        network = fam.network()
    return request.param, fam, network


def test_the_networks_have_their_published_number_of_weights(real: tuple[str, Stable, nn.Module]) -> None:
    kind, _, network = real
    count = sum(p.numel() for p in network.parameters())
    assert round(count / 1e6, 2) == {"sd15": 859.52, "sdxl": 2567.46}[kind]


def test_tens_of_units_own_every_weight_once(real: tuple[str, Stable, nn.Module]) -> None:
    kind, fam, network = real
    owned: set[int] = set()
    sizes = []
    for unit in fam.blocks(network):
        mine = {id(p): p.numel() for p in unit.parameters() if id(p) not in owned}
        owned |= mine.keys()
        sizes.append(sum(mine.values()))
    assert owned == {id(p) for p in network.parameters()}
    assert len(sizes) == {"sd15": 48, "sdxl": 97}[kind]
    assert min(sizes) > 0
    assert max(sizes) < 60e6


def test_features_come_from_the_mid_block_at_the_cost_of_the_encoder(
    real: tuple[str, Stable, nn.Module],
) -> None:
    kind, fam, network = real
    spent = []
    with torch.device("meta"):
        head = fam.head()
        x, level, cond = torch.zeros(2, *fam.shape), torch.zeros(2, dtype=torch.int64), told(fam, 2)
        for act in (fam.denoiser(network).output, fam.denoiser(network).features):
            with FlopCounterMode(display=False) as counter:
                out = act(x, level, cond)
            spent.append(counter.get_total_flops() / 2)
        assert tuple(out.shape) == (2, *fam.features)
        assert fam.features == {"sd15": (1280, 8, 8), "sdxl": (1280, 32, 32)}[kind]
        assert head(out).shape == (2,)
    assert round(sum(p.numel() for p in head.parameters()) / 1e6, 1) == {"sd15": 52.4, "sdxl": 104.9}[kind]
    assert round(spent[0] / 1e12, 2) == {"sd15": 0.80, "sdxl": 6.76}[kind]
    assert round(spent[1] / spent[0], 3) == {"sd15": 0.325, "sdxl": 0.434}[kind]


@pytest.mark.parametrize(
    ("recipe", "checkpointing"),
    [
        ("sd15-1step-gan", True),
        ("sdxl-4step", False),
        ("sdxl-4step-lora", False),
        ("sdxl-4step-shared", True),
    ],
)
def test_a_step_of_both_players_runs_at_the_real_shape_in_bfloat16(recipe: str, checkpointing: bool) -> None:
    config = recipes.resolve(recipe, [f"distill.checkpointing={checkpointing}", "distill.micro_batch=1"])
    with FakeTensorMode():
        fam = family(config.family.kind)
        teacher = fam.network()
        game = fake_game(config, fam, teacher)
        cond = told(fam, 2)
        game.step(Sample(torch.zeros(2, *fam.shape), cond, cond), 0)
        learned = [
            p for player in (game.student, game.critic) for p in player.module.parameters() if p.requires_grad
        ]
        assert {p.dtype for p in learned} == {torch.float32}
        assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
        for player in (game.student, game.critic):
            stepped = player.optimizer.state
            assert len(stepped) == sum(p.requires_grad for p in player.module.parameters())


def fake_game(config: Config, fam: Stable, teacher: nn.Module) -> Trainer:
    """By `build.game`. Module.to replaces parameters here: fake ones cannot be changed in place."""

    def replaced(module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for part in module.modules():
            for name, p in part._parameters.items():
                if p is not None:
                    part._parameters[name] = nn.Parameter(convert(p.detach()), requires_grad=p.requires_grad)
        return module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "_apply", replaced)
        patch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, raising=False)
        game = build.game(config, fam, teacher, torch.device("cpu"))
    assert isinstance(game, Trainer)
    return game


def static_gb(recipe: str) -> dict[str, float]:
    """Weights, and of what learns gradients and Adam's two moments, in units of 1e9 bytes; each tensor once."""
    config = recipes.get(recipe)
    with FakeTensorMode():
        fam = family(config.family.kind)
        teacher = fam.network()
        game = fake_game(config, fam, teacher)
    modules = (teacher, game.student.module, game.critic.module)
    tensors = {id(p): p for module in modules for p in module.parameters()}.values()
    held = sum(p.numel() * p.element_size() for p in tensors)
    learns = sum(3 * p.numel() * p.element_size() for p in tensors if p.requires_grad)
    return {"weights": held / 1e9, "gradients and moments": learns / 1e9, "all": (held + learns) / 1e9}


def test_one_shared_base_takes_an_eighth_of_the_memory_of_three_networks() -> None:
    full, lora, shared = (static_gb(f"sdxl-4step{variant}") for variant in ("", "-lora", "-shared"))
    # 2 x 2.567 G learn at 16 bytes, the teacher has 2, the head 0.105 G at 16. The survey's 97.6 GB has no head, and
    # copies of student and critic in bfloat16 that are not kept here.
    assert round(full["all"], 1) == round((2 * 16 + 2) * 2.567464 + 16 * 0.104874, 1) == 89.0
    # The base at 2 bytes, two updates of 0.197 G at 16, the head. The survey's 10.6 GB has 14 bytes and no head.
    assert round(shared["all"], 1) == round(2 * 2.567464 + 2 * 16 * 0.196748 + 16 * 0.104874, 1) == 13.1
    assert round(lora["all"], 1) == round(18 * 2.567464 + 16 * (0.196748 + 0.104874), 1) == 51.0


def test_features_are_what_the_mid_block_returns_and_reach_its_weights(pipeline: Path) -> None:
    fam, network = tiny(pipeline)
    x, level = torch.randn(2, 4, 16, 16), torch.tensor([10, 900])
    cond, _ = fam.condition(["a red square", "a blue square"])
    seen: list[Tensor] = []
    unet: Any = network.unet
    hook = unet.mid_block.register_forward_hook(lambda module, args, out: seen.append(out))
    out = fam.denoiser(network).output(x, level, cond)
    features = fam.denoiser(network).features(x, level, cond)
    hook.remove()
    assert torch.equal(features, seen[0])
    features.square().mean().backward()
    assert unet.conv_in.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in unet.up_blocks.parameters())
    assert torch.equal(fam.denoiser(network).output(x, level, cond), out)  # no hook is left behind


def test_an_error_on_the_way_to_the_features_leaves_no_hook(pipeline: Path) -> None:
    fam, network = tiny(pipeline)
    cond, _ = fam.condition(["a red square"])
    with pytest.raises(RuntimeError):
        fam.denoiser(network).features(torch.randn(1, 5, 16, 16), torch.tensor([3]), cond)
    unet: Any = network.unet
    assert not unet.up_blocks[0]._forward_pre_hooks


def tiny(pipeline: Path) -> tuple[Stable, Any]:
    fam = build.family(StableConfig(kind="sdxl", resolution=32, latent=2), pipeline)
    assert isinstance(fam, Stable)
    network = fam.network()
    network.load_state_dict(fam.weights(pipeline))
    return fam, network


def test_nothing_is_zeros_for_sdxl_of_the_same_size(pipeline: Path) -> None:
    fam, _ = tiny(pipeline)
    cond, null = fam.condition(["a red square"])
    assert cond.text is not None
    assert null.text is not None
    assert null.pooled is not None
    assert cond.text.shape == (1, 24, 160)
    assert cond.text.abs().sum() > 0
    assert null.text.abs().sum() == null.pooled.abs().sum() == 0
    assert cond.size is not None
    assert null.size is not None
    assert cond.size.tolist() == null.size.tolist() == [[32, 32, 0, 0, 32, 32]]


def test_what_sdxl_is_told_is_what_diffusers_own_pipeline_tells_it(pipeline: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    fam, _ = tiny(pipeline)
    cond, _ = fam.condition(["a red square", "a blue"])
    pipe = StableDiffusionXLPipeline.from_pretrained(pipeline)
    states, _, pooled, _ = pipe.encode_prompt(["a red square", "a blue"], do_classifier_free_guidance=False)
    torch.testing.assert_close(cond.text, states)
    torch.testing.assert_close(cond.pooled, pooled)


def test_nothing_is_the_empty_text_for_sd15(pipeline: Path, tmp_path: Path) -> None:
    fam = sd15(pipeline, tmp_path)
    cond, null = fam.condition(["a red square", ""])
    assert isinstance(fam.condition(["x"]), Shown)
    assert cond.text is not None
    assert null.text is not None
    torch.testing.assert_close(null.text[0], cond.text[1])
    assert not torch.equal(cond.text[0], null.text[0])
    assert cond.pooled is None


def sd15(pipeline: Path, folder: Path) -> Stable:
    """One text encoder of the tiny SDXL, and a U-Net's config that it fits."""
    for name in ("text_encoder", "tokenizer", "vae"):
        shutil.copytree(pipeline / name, folder / name)
    shutil.copytree(published("sd15") / "unet", folder / "unet")
    shutil.copytree(published("sd15") / "scheduler", folder / "scheduler")
    return family("sd15", folder)


BASE = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("form", ["linear", "scaled_linear"])
def test_noise_levels_are_those_of_diffusers(form: str, zero: bool) -> None:
    config = BASE | {"beta_schedule": form, "rescale_betas_zero_snr": zero, "prediction_type": "v_prediction"}
    make: Any = DDPMScheduler
    theirs = make(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule=form,
        rescale_betas_zero_snr=zero,
        prediction_type="v_prediction",
    ).alphas_cumprod
    ours = schedule(config)
    torch.testing.assert_close(ours.alpha.square().float(), theirs, atol=1e-6, rtol=1e-4)
    assert (ours.alpha[-1] == 0) == zero
    torch.testing.assert_close(ours.alpha**2 + ours.sigma**2, torch.ones(1000, dtype=torch.float64))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "of a process that is not known"),
        ({"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction'"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule is 'squaredcos_cap_v2'"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"rescale_betas_zero_snr": True}, "must predict v"),
    ],
)
def test_a_schedule_that_is_not_understood_is_refused(
    change: dict[str, Any], said: str, refusal: Refusal
) -> None:
    config = BASE | {"beta_schedule": "scaled_linear", "prediction_type": "epsilon"} | change
    assert said in refusal(lambda: schedule(config))


@pytest.mark.parametrize(
    ("kind", "like", "change", "said"),
    [
        ("sdxl", "sdxl", {"in_channels": 9}, "takes 9 channels and makes 4"),
        ("sd15", "sdxl", {}, "addition_embed_type 'text_time'"),
        ("sdxl", "sd15", {}, "addition_embed_type None"),
        ("sd15", "sd15", {"num_class_embeds": 10}, "num_class_embeds 10"),
        ("sdxl", "sdxl", {"time_cond_proj_dim": 256}, "time_cond_proj_dim 256"),
        ("sdxl", "sdxl", {"_class_name": "UNet2DModel"}, "is a UNet2DModel"),
    ],
)
def test_a_network_that_is_not_understood_is_refused(
    kind: str, like: str, change: dict[str, Any], said: str, tmp_path: Path, refusal: Refusal
) -> None:
    shutil.copytree(published(like), tmp_path / "p")
    path = tmp_path / "p" / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert said in refusal(lambda: family(kind, tmp_path / "p"))


def test_a_config_that_is_missing_or_broken_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    shutil.copytree(published("sdxl"), tmp_path / "p")
    (tmp_path / "p" / "unet" / "config.json").write_text('{"in_ch')
    assert "is not JSON" in refusal(lambda: family("sdxl", tmp_path / "p"))
    (tmp_path / "p" / "unet" / "config.json").unlink()
    assert "is missing" in refusal(lambda: family("sdxl", tmp_path / "p"))


def test_the_committed_teacher_is_below_12_mb_and_complete() -> None:
    folder = Path(__file__).parents[1] / "emoji" / "pipeline"
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 12e6
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pkl", ".pt", ".ckpt")]
    with pytest.raises(Exception, match=r"network\.json"):
        load_network(folder)  # it is a pipeline of diffusers, for `resolve`
