"""Stable Diffusion 1.5 and XL: their real shapes without their memory, their process, and their conditioning."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dmd2 import recipes
from dmd2.batch import Batch, Conditioning, CondPair
from dmd2.config import Config, StableConfig
from dmd2.denoiser import autocast
from dmd2.model import load_network
from dmd2.models.family import make_family
from dmd2.models.schedulers import (
    SCHEDULER,
    SCHEDULERS,
    check_sampler,
    complete_scheduler_config,
    noise_schedule,
)
from dmd2.models.stable import UNET, Stable, published_pipeline
from dmd2.models.unet import SHORT_TRANSFORMER
from dmd2.parallel.ranks import World
from dmd2.sampler import Timesteps, generate
from dmd2.training import build
from dmd2.training.trainer import DMD2Trainer
from tests.conftest import ALONE, teacher_of

Refusal = Callable[[Callable[[], object]], str]
SIZES = {"sd15": 512, "sdxl": 1024}


def family(kind: str, folder: Path | None = None) -> Stable:
    made = make_family(StableConfig(kind=kind, resolution=SIZES[kind]), folder)
    assert isinstance(made, Stable)
    return made


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


def test_every_weight_belongs_to_one_of_some_tens_of_blocks(real: tuple[str, Stable, nn.Module]) -> None:
    kind, fam, network = real
    owned: set[int] = set()
    sizes = []
    for unit in (*fam.blocks(network), network):
        mine = {id(p): p.numel() for p in unit.parameters() if id(p) not in owned}
        owned |= mine.keys()
        sizes.append(sum(mine.values()))
    assert owned == {id(p) for p in network.parameters()}
    assert len(sizes) == {"sd15": 47, "sdxl": 95}[kind]
    assert min(sizes) > 0
    assert sizes[-1] < 8e6, "what no unit has is little"
    assert max(sizes) < 60e6


def test_features_come_from_the_mid_block_at_the_cost_of_the_encoder(
    real: tuple[str, Stable, nn.Module],
) -> None:
    kind, fam, network = real
    spent = []
    with torch.device("meta"):
        head = fam.head()
        x, timestep, cond = (
            torch.zeros(2, *fam.shape),
            torch.zeros(2, dtype=torch.int64),
            fam.placeholder_condition(2),
        )
        for act in (fam.denoiser(network).output, fam.denoiser(network).features):
            with FlopCounterMode(display=False) as counter:
                out = act(x, timestep, cond)
            spent.append(counter.get_total_flops() / 2)
        assert tuple(out.shape) == (2, *fam.features)
        assert fam.features == {"sd15": (1280, 8, 8), "sdxl": (1280, 32, 32)}[kind]
        assert head(out).shape == (2,)
    assert round(sum(p.numel() for p in head.parameters()) / 1e6, 1) == {"sd15": 52.4, "sdxl": 104.9}[kind]
    assert round(spent[0] / 1e12, 2) == {"sd15": 0.80, "sdxl": 6.76}[kind]
    assert round(spent[1] / spent[0], 3) == {"sd15": 0.325, "sdxl": 0.434}[kind]


FEWER_LAYERS = {"layers_per_block": 1, "transformer_layers_per_block": [1, 1, SHORT_TRANSFORMER + 1]}
"""A U-Net with every layer of the published SDXL at its real shape, but fewer equal ones after each other; as many
transformer layers as make units of their own."""


@pytest.mark.parametrize(
    ("recipe", "overrides", "layers", "steps"),
    [
        ("sd15-1step-gan", (), {"layers_per_block": 1}, (0, 1)),
        ("sdxl-4step", (), FEWER_LAYERS, (0,)),
        ("sdxl-4step", ("engine.activation_checkpointing=full",), FEWER_LAYERS, (1,)),
        pytest.param("sd15-1step-gan", (), {}, (0, 1), marks=pytest.mark.slow),
        pytest.param("sdxl-4step", (), {}, (0,), marks=pytest.mark.slow),
        pytest.param(
            "sdxl-4step", ("engine.activation_checkpointing=full",), {}, (1,), marks=pytest.mark.slow
        ),
    ],
)
def test_a_step_runs_at_the_real_shape_in_bfloat16(
    recipe: str, overrides: tuple[str, ...], layers: dict[str, Any], steps: tuple[int, ...], tmp_path: Path
) -> None:
    """At the recipe's micro-batch: of both trainables at step 0, of the critic alone at step 1."""
    config = recipes.resolve(recipe, ["seed=6", *overrides])  # a seed that draws short rollouts
    count, kind = config.engine.micro_batch, config.family.kind
    shutil.copytree(published_pipeline(kind), tmp_path / kind)
    change(tmp_path / kind / UNET, layers)
    with FakeTensorMode():
        fam = family(kind, tmp_path / kind)
        teacher = fam.network()
        trainer = fake_trainer(config, fam, teacher)
        cond = fam.placeholder_condition(count)
        for step in steps:
            trainer.step(Batch(torch.zeros(count, *fam.shape), cond, cond), step)
    for trainable in (trainer.student, trainer.critic):
        learns = [p for p in trainable.module.parameters() if p.requires_grad]
        assert {p.dtype for p in learns} == {torch.float32}
        assert len(trainable.optimizer.state) == len(learns)
    assert {p.dtype for p in teacher_of(trainer).parameters()} == {torch.bfloat16}


def fake_trainer(config: Config, fam: Stable, teacher: nn.Module) -> DMD2Trainer:
    """By `build.trainer`. Module.to replaces parameters here: fake ones cannot be changed in place."""

    def replaced(module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for part in module.modules():
            for name, p in part._parameters.items():
                if p is not None:
                    part._parameters[name] = nn.Parameter(convert(p.detach()), requires_grad=p.requires_grad)
        return module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "_apply", replaced)
        patch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, raising=False)
        trainer = build.trainer(config, fam, teacher.state_dict(), ALONE)
    assert isinstance(trainer, DMD2Trainer)
    return trainer


def static_gb(recipe: str) -> dict[str, float]:
    """Weights, and of what learns gradients and Adam's two moments, in units of 1e9 bytes; each tensor once."""
    config = recipes.get(recipe)
    fam = family(config.family.kind)
    with torch.device("meta"):
        teacher = fam.network().state_dict()
        trainer = build.trainer(config, fam, teacher, World(torch.device("meta")))
    assert isinstance(trainer, DMD2Trainer)
    modules = (teacher_of(trainer), trainer.student.module, trainer.critic.module)
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


def tiny(kind: str, folder: Path) -> tuple[Stable, Any]:
    fam = make_family(StableConfig(kind=kind, resolution=32, vae_stride=2), folder)
    assert isinstance(fam, Stable)
    network = fam.network()
    network.load_state_dict(fam.weights(folder))
    return fam, network


@pytest.fixture(params=["sd15", "sdxl"])
def small(request: pytest.FixtureRequest, pipeline: Path, stable15: Path) -> tuple[Stable, Any, Conditioning]:
    """A family, its network with random weights, and what two samples show."""
    fam, network = tiny(request.param, stable15 if request.param == "sd15" else pipeline)
    return fam, network, fam.condition(["a red square", "a blue square"]).cond


LEVELS = torch.tensor([10, 900])


def test_features_are_what_the_mid_block_returns_and_reach_the_weights_before_it(
    small: tuple[Stable, Any, Conditioning],
) -> None:
    fam, network, cond = small
    x, unet, seen = torch.randn(2, 4, 16, 16), network.unet, []
    hook = unet.mid_block.register_forward_hook(lambda module, args, out: seen.append(out))
    out = fam.denoiser(network).output(x, LEVELS, cond)
    features = fam.denoiser(network).features(x, LEVELS, cond)
    hook.remove()
    assert torch.equal(features, seen[0])
    assert tuple(features.shape) == (2, *fam.features)
    features.square().mean().backward()
    encoder = [unet.conv_in, unet.time_embedding, unet.down_blocks, unet.mid_block]
    assert all(p.grad is not None for part in encoder for p in part.parameters())
    assert all(p.grad is None for p in unet.up_blocks.parameters())
    assert torch.equal(fam.denoiser(network).output(x, LEVELS, cond), out)  # no hook is left behind


def test_an_error_before_the_features_leaves_no_hook(small: tuple[Stable, Any, Conditioning]) -> None:
    fam, network, cond = small
    with pytest.raises(RuntimeError):
        fam.denoiser(network).features(torch.randn(2, 5, 16, 16), LEVELS, cond)
    assert not network.unet.up_blocks[0]._forward_pre_hooks


def test_features_free_the_activations_before_them(small: tuple[Stable, Any, Conditioning]) -> None:
    """At once: an exception that held its frames would keep them until the garbage collector comes."""
    fam, network, cond = small
    passed: list[weakref.ref[Tensor]] = []
    block = network.unet.down_blocks[0]
    block.register_forward_hook(lambda module, args, out: passed.append(weakref.ref(out[0])))
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            fam.denoiser(network).features(torch.randn(2, 4, 16, 16), LEVELS, cond)
        assert passed[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("recipe", ["sdxl-4step-emoji", "sdxl-4step-shared-emoji"])
def test_activation_checkpointing_gives_the_same_step_bit_for_bit(recipe: str, pipeline: Path) -> None:
    def step_with(checkpointing: str) -> tuple[dict[str, Tensor], list[Tensor]]:
        fam, teacher = tiny("sdxl", pipeline)
        changes = ["distill.dtype=bfloat16", f"engine.activation_checkpointing={checkpointing}"]
        trainer = build.trainer(recipes.resolve(recipe, changes), fam, teacher.state_dict(), ALONE)
        assert isinstance(trainer, DMD2Trainer)
        torch.manual_seed(0)
        log = trainer.step(Batch(torch.randn(2, *fam.shape), *fam.condition(["a red", "a blue"])), 0)
        return log, [p.detach() for p in trainer.student.module.parameters() if p.requires_grad]

    kept = step_with("none")
    for again in (step_with("full"), step_with("selective")):
        assert kept[0] == again[0]
        assert all(torch.equal(a, b) for a, b in zip(kept[1], again[1], strict=True))


def test_uncond_of_sdxl_is_zeros_with_the_same_image_size(pipeline: Path) -> None:
    fam, _ = tiny("sdxl", pipeline)
    cond, uncond = fam.condition(["a red square"])
    assert cond["text"].shape == (1, 24, 160)
    assert cond["text"].abs().sum() > 0
    assert uncond["text"].abs().sum() == uncond["pooled"].abs().sum() == 0
    assert cond["size"].tolist() == uncond["size"].tolist() == [[32, 32, 0, 0, 32, 32]]


def test_the_conditioning_of_sdxl_is_that_of_diffusers_pipeline(pipeline: Path) -> None:
    fam, _ = tiny("sdxl", pipeline)
    cond, _ = fam.condition(["a red square", "a blue"])
    pipe = StableDiffusionXLPipeline.from_pretrained(pipeline)
    states, _, pooled, _ = pipe.encode_prompt(["a red square", "a blue"], do_classifier_free_guidance=False)
    torch.testing.assert_close(cond["text"], states)
    torch.testing.assert_close(cond["pooled"], pooled)


def test_uncond_of_sd15_is_the_empty_text(stable15: Path) -> None:
    fam, _ = tiny("sd15", stable15)
    pair = fam.condition(["a red square", ""])
    assert isinstance(pair, CondPair)
    cond, uncond = pair
    torch.testing.assert_close(uncond["text"][0], cond["text"][1])
    torch.testing.assert_close(uncond["text"][1], cond["text"][1])
    assert not torch.equal(cond["text"][0], uncond["text"][0])
    assert set(cond) == set(uncond) == {"text"}


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_pairs_begin_at_the_noisiest_timestep_where_the_student_does(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Euler's method with trailing spacing: 999, ..., and sigma 14.6, whatever spacing the folder's scheduler has."""
    fam, network = tiny(kind, request.getfixturevalue("stable15" if kind == "sd15" else "pipeline"))
    called: list[float] = []
    unet = network.unet
    unet.register_forward_pre_hook(lambda _, args, __: called.append(float(args[1])), with_kwargs=True)
    with torch.no_grad():
        fam.solve_ode(network, torch.randn(1, *fam.shape), fam.condition(["a red square"]), 50, 3.0)
    assert called == [999 - 20 * step for step in range(50)]
    schedule = fam.diffusion.schedule
    assert float(schedule.sigma[-1] / schedule.alpha[-1]) == pytest.approx(14.6, abs=0.02)


def test_the_teacher_of_sd15_is_sampled_by_diffusers_own_pipeline(stable15: Path) -> None:
    fam, network = tiny("sd15", stable15)
    prompts, eps = ["a red square", "a blue"], torch.randn(2, *fam.shape)
    with torch.no_grad():
        x = fam.sample_teacher(network, eps, fam.condition(prompts), steps=3, guidance=3.0)
    assert torch.equal(x, drawn(stable15, prompts, eps, num_inference_steps=3, guidance_scale=3.0))
    assert fam.teacher_calls(3, 3.0) == 2 * 4  # PNDM takes one step twice


def test_under_autocast_guidance_and_latents_of_the_teacher_stay_in_float32(stable15: Path) -> None:
    fam, network = tiny("sd15", stable15)
    unet, seen = network.unet, list[torch.dtype]()
    unet.conv_out.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.no_grad(), autocast(torch.device("cpu"), torch.bfloat16):
        x = fam.sample_teacher(network, torch.randn(1, *fam.shape), fam.condition(["a red"]), 2, guidance=3.0)
    assert seen == [torch.float32, torch.bfloat16] * fam.teacher_calls(2, 1.0)
    assert x.dtype == torch.float32


@pytest.mark.parametrize(
    "scheduler", [{}, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}]
)
@pytest.mark.parametrize("timesteps", [(999,), (399,), (999, 499)])
def test_a_student_of_sd15_in_diffusers_gives_the_images_of_our_sampler(
    timesteps: Timesteps, scheduler: dict[str, Any], stable15: Path, tmp_path: Path
) -> None:
    given, made = tmp_path / "given", tmp_path / "made"
    shutil.copytree(stable15, given)
    change(given / SCHEDULER, scheduler)
    fam, network = tiny("sd15", given)
    made.mkdir()
    fam.save(network.state_dict(), made, timesteps)
    prompts, eps = ["a red square", "a blue"], torch.randn(2, *fam.shape)
    theirs = drawn(made, prompts, eps, seed=1, timesteps=list(timesteps), guidance_scale=0)
    between = torch.Generator().manual_seed(1)
    noise = partial(torch.randn, generator=between)
    cond = fam.condition(prompts).cond
    ours = generate(fam.denoiser(network), eps, cond, timesteps, lambda x0: noise(x0.shape))
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def drawn(folder: Path, prompts: list[str], eps: Tensor, seed: int = 0, **settings: Any) -> Tensor:
    """Latents that diffusers alone makes of a pipeline folder."""
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    drawing = torch.Generator().manual_seed(seed)
    side = {"height": 32, "width": 32, "output_type": "latent"}
    return pipe(prompts, latents=eps, generator=drawing, **side, **settings).images


def change(path: Path, values: dict[str, Any]) -> None:
    """Other values in a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


BASE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("form", ["linear", "scaled_linear"])
def test_noise_levels_are_those_of_diffusers(form: str, zero: bool) -> None:
    config = {
        **BASE,
        "beta_schedule": form,
        "rescale_betas_zero_snr": zero,
        "prediction_type": "v_prediction",
    }
    make: Any = DDPMScheduler
    theirs = make(**config).alphas_cumprod
    ours = noise_schedule(complete_scheduler_config({"_class_name": "DDPMScheduler", **config}))
    torch.testing.assert_close(ours.alpha.square().float(), theirs, atol=1e-6, rtol=0)
    assert (ours.alpha[-1] == 0) == zero
    torch.testing.assert_close(ours.alpha**2 + ours.sigma**2, torch.ones(1000, dtype=torch.float64))


@pytest.mark.parametrize(
    ("predicts", "zero"),
    [
        ("epsilon", False),
        ("v_prediction", False),
        ("v_prediction", True),
        ("sample", False),
        ("sample", True),
    ],
)
def test_the_scheduler_config_determines_the_parametrization(
    predicts: str, zero: bool, tmp_path: Path
) -> None:
    """As diffusers reads it, also where nothing is left of the signal."""
    shutil.copytree(published_pipeline("sdxl"), tmp_path / "p")
    settings = {"prediction_type": predicts, "rescale_betas_zero_snr": zero}
    change(tmp_path / "p" / SCHEDULER, settings)
    fam = family("sdxl", tmp_path / "p")
    assert (fam.manifest_facts["predicts"], fam.manifest_facts["zero_terminal_snr"]) == (predicts, zero)
    make: Any = DDIMScheduler
    scheduler = make(**BASE, beta_schedule="scaled_linear", clip_sample=False, **settings)
    scheduler.set_timesteps(1000)
    x_t, out = torch.randn(2, 1, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for timestep in (0, 20, 399, 980, 999):
        ours = fam.diffusion.to_x0(out, x_t, torch.tensor([timestep]))
        theirs = scheduler.step(out, timestep, x_t).pred_original_sample
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=2e-4)  # its table is in float32


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "of a process that is not known"),
        ({"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction'"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule is 'squaredcos_cap_v2'"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"rescale_betas_zero_snr": True}, "must predict v"),
    ],
)
def test_an_unsupported_schedule_is_refused(changed: dict[str, Any], said: str, refusal: Refusal) -> None:
    config = {"_class_name": "DDIMScheduler", **BASE, "beta_schedule": "scaled_linear", **changed}
    assert said in refusal(lambda: noise_schedule(complete_scheduler_config(config)))


@pytest.mark.parametrize(
    ("kind", "like", "changed", "said"),
    [
        ("sdxl", "sdxl", {"in_channels": 9}, "takes 9 channels and makes 4"),
        ("sd15", "sdxl", {}, "addition_embed_type 'text_time'"),
        ("sdxl", "sd15", {}, "addition_embed_type None"),
        ("sd15", "sd15", {"num_class_embeds": 10}, "num_class_embeds 10"),
        ("sdxl", "sdxl", {"time_cond_proj_dim": 256}, "time_cond_proj_dim 256"),
        ("sdxl", "sdxl", {"_class_name": "UNet2DModel"}, "is a UNet2DModel"),
    ],
)
def test_an_unsupported_network_is_refused(
    kind: str, like: str, changed: dict[str, Any], said: str, tmp_path: Path, refusal: Refusal
) -> None:
    shutil.copytree(published_pipeline(like), tmp_path / "p")
    change(tmp_path / "p" / UNET, changed)
    assert said in refusal(lambda: family(kind, tmp_path / "p"))


@pytest.mark.parametrize("name", [UNET, SCHEDULER])
def test_a_config_that_is_missing_or_broken_is_refused(name: str, tmp_path: Path, refusal: Refusal) -> None:
    shutil.copytree(published_pipeline("sdxl"), tmp_path / "p")
    for broken in ('{"in_ch', "[1, 2]"):
        (tmp_path / "p" / name).write_text(broken)
        assert f"{name} is not JSON" in refusal(lambda: family("sdxl", tmp_path / "p"))
    (tmp_path / "p" / name).unlink()
    assert f"{name} is missing" in refusal(lambda: family("sdxl", tmp_path / "p"))


def test_the_committed_teacher_is_below_12_mb_and_complete() -> None:
    folder = Path(__file__).parents[1] / "emoji" / "pipeline"
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 12e6
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pkl", ".pt", ".ckpt")]
    with pytest.raises(Exception, match=r"network\.json"):
        load_network(folder)  # it is a pipeline of diffusers, for `resolve`


def test_a_student_of_the_published_sd15_loads_without_the_safety_checker_its_teacher_lists(
    stable15: Path, tmp_path: Path
) -> None:
    given, made = tmp_path / "given", tmp_path / "made"
    shutil.copytree(stable15, given)
    listed = {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": True,
    }
    change(given / "model_index.json", listed)
    fam, network = tiny("sd15", given)
    made.mkdir()
    fam.save(network.state_dict(), made, (999,))
    drawn(made, ["a red square"], torch.randn(1, *fam.shape), timesteps=[999], guidance_scale=0)


def test_another_number_of_timesteps_and_features_without_a_head_are_refused(
    tmp_path: Path, refusal: Refusal
) -> None:
    shutil.copytree(published_pipeline("sd15"), tmp_path / "p")
    change(tmp_path / "p" / "scheduler" / "scheduler_config.json", {"num_train_timesteps": 500})
    assert "500 timesteps" in refusal(lambda: family("sd15", tmp_path / "p"))
    wide = make_family(StableConfig(kind="sd15", resolution=768), published_pipeline("sd15"))
    assert "not 12" in refusal(wide.head)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_missing_values_of_a_scheduler_config_are_the_defaults_of_its_class(name: str) -> None:
    theirs = getattr(diffusers, name)()
    given = {"_class_name": name}
    ours = noise_schedule(complete_scheduler_config(given))
    torch.testing.assert_close(ours.alpha.square().float(), theirs.alphas_cumprod, atol=1e-6, rtol=0)
    assert given == {"_class_name": name}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": False}, "cannot take fewer than 4 steps"),
        (
            {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "rescale_betas_zero_snr": True},
            "which a PNDMScheduler does not follow",
        ),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "must be 'discrete'"),
    ],
)
def test_a_scheduler_that_cannot_sample_the_teacher_is_refused(
    settings: dict[str, Any], words: str, refusal: Refusal
) -> None:
    assert words in refusal(lambda: check_sampler(complete_scheduler_config(settings)))
