"""Recipes: functions that return a whole Config. A variant calls the recipe it is based on and replaces some fields."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

from dmd2.config import (
    AdmConfig,
    Config,
    DataConfig,
    DistillConfig,
    EdmConfig,
    EngineConfig,
    GanConfig,
    GateConfig,
    LoaderConfig,
    LoraConfig,
    OptimizerConfig,
    PairsConfig,
    RegressionConfig,
    StableConfig,
    TeachConfig,
)
from dmd2.errors import Refused, near_miss
from dmd2.evaluation.protocols import PROTOCOLS
from dmd2.overrides import override_flags, parse_flags


def spaced_timesteps(count: int, table: int = 1000) -> tuple[int, ...]:
    """Timesteps of a student of `count` steps, at even distances and noisiest first: 4 -> 999, 749, 499, 249."""
    return tuple(range(table - 1, 0, -(table // count)))[:count]


DIGITS = AdmConfig(
    resolution=32,
    image_channels=1,
    classes=10,
    channels=32,
    multipliers=(1, 2),
    blocks=1,
    attention=(8,),
    patch=4,
)
IMAGENET64 = AdmConfig(
    resolution=64,
    image_channels=3,
    classes=1000,
    channels=192,
    multipliers=(1, 2, 3, 4),
    blocks=3,
    attention=(32, 16, 8),
)
"""The published ImageNet-64 network (Karras et al. 2022, table 7; Dhariwal & Nichol 2021, table 4)."""


def edm_digits() -> Config:
    """One step, 32x32 handwritten digits: the demo, which takes minutes on two CPU cores."""
    return Config(
        recipe="edm-digits",
        family=EdmConfig(network=DIGITS),
        data=DataConfig(holdout=1000),
        teach=TeachConfig(
            steps=1500, batch=64, optimizer=OptimizerConfig(lr=2e-3, warmup_steps=100, ema=(0.995,))
        ),
        distill=DistillConfig(
            steps=1600,
            batch=32,
            student=OptimizerConfig(lr=4e-4, warmup_steps=20, final_lr_ratio=0.05, ema=(0.98,)),
            critic=OptimizerConfig(lr=4e-4, warmup_steps=20, final_lr_ratio=0.05),
            gan=GanConfig(student_weight=3e-2, critic_weight=3e-2),
            fake_prompts="independent",
        ),
        evaluate=PROTOCOLS["digits"].settings,
        gate=GateConfig(factor=1.75),  # the ratio of 2,000 images is known to a sixth
    )


def edm_digits_longer() -> Config:
    """The second stage of edm-digits-no-gan, as edm-imagenet64-longer is of edm-imagenet64-no-gan: a GAN, a quarter of the rate."""
    optimizer = OptimizerConfig(lr=1e-4, warmup_steps=20, final_lr_ratio=0.05)
    student = optimizer.model_copy(update={"ema": (0.98,)})
    changes = {"steps": 800, "student": student, "critic": optimizer, "first_stage": "edm-digits-no-gan"}
    return _with(edm_digits(), "edm-digits-longer", **changes)


def edm_imagenet64() -> Config:
    """One step, ImageNet-64, with the GAN: FID 1.51 in the paper (its table 1; reference run of 200 k steps)."""
    optimizer = OptimizerConfig(lr=2e-6, warmup_steps=500)
    return Config(
        recipe="edm-imagenet64",
        seed=10,
        family=EdmConfig(network=IMAGENET64),
        data=DataConfig(holdout=10_000, images_per_shard=10_000),
        loader=LoaderConfig(lanes=64),  # mixes classes in a batch even if the archives are sorted by class
        distill=DistillConfig(
            steps=200_000,
            batch=280,
            dtype="bfloat16",  # in float16 the published run diverges
            student=optimizer,
            critic=optimizer,
            gan=GanConfig(student_weight=3e-3, critic_weight=1e-2),
            fake_prompts="independent",
            preview_every=1000,
            save_every=5000,
        ),
        evaluate=PROTOCOLS["imagenet64-50k"].settings,
    )


def edm_imagenet64_no_gan() -> Config:
    """One step, ImageNet-64, without the GAN: FID 2.61 in the paper; the first stage of edm-imagenet64-longer."""
    return _with(without_gan(edm_imagenet64()), "edm-imagenet64-no-gan", steps=405_500)


def edm_imagenet64_longer() -> Config:
    """The second stage of edm-imagenet64-no-gan, started from its run, with the GAN at a quarter of the rate: FID 1.28 in the paper."""
    optimizer = OptimizerConfig(lr=5e-7, warmup_steps=500)
    changes = {
        "steps": 140_000,
        "student": optimizer,
        "critic": optimizer,
        "first_stage": "edm-imagenet64-no-gan",
    }
    return _with(edm_imagenet64(), "edm-imagenet64-longer", **changes)


def sd15_1step() -> Config:
    """One step, Stable Diffusion 1.5, first stage, without the GAN: FID 9.28 on COCO-30k in the reference."""
    optimizer = OptimizerConfig(lr=1e-5, warmup_steps=500)
    return Config(
        recipe="sd15-1step",
        seed=10,
        family=StableConfig(kind="sd15", resolution=512),
        data=DataConfig(holdout=30_000, images_per_shard=5_000),
        distill=DistillConfig(
            steps=39_000,
            batch=2048,
            dtype="bfloat16",
            student=optimizer,
            critic=optimizer,
            critic_updates=10,
            student_timesteps=spaced_timesteps(1),
            guidance=1.75,
            fake_prompts="list",
            preview_every=1000,
            save_every=1000,
        ),
        engine=EngineConfig(micro_batch=32, activation_checkpointing="full"),
        evaluate=PROTOCOLS["coco30k-256"].settings,
    )


def sd15_1step_gan() -> Config:
    """One step, Stable Diffusion 1.5, second stage with the GAN, started from the first: FID 8.35 in the paper."""
    optimizer = OptimizerConfig(lr=5e-7, warmup_steps=100)
    gan = GanConfig(student_weight=1e-3, critic_weight=1e-2)
    changes = {"student": optimizer, "critic": optimizer, "gan": gan, "first_stage": "sd15-1step"}
    return _with(sd15_1step(), "sd15-1step-gan", steps=2_000, **changes)


def sdxl_4step() -> Config:
    """Four steps, SDXL, by backward simulation: FID 19.32 on COCO-10k in the paper (its table 2)."""
    optimizer = OptimizerConfig(lr=5e-7, warmup_steps=500)
    return Config(
        recipe="sdxl-4step",
        seed=10,
        family=StableConfig(kind="sdxl", resolution=1024),
        data=DataConfig(holdout=10_000, images_per_shard=1_000),
        distill=DistillConfig(
            steps=19_000,
            batch=128,
            dtype="bfloat16",
            student=optimizer,
            critic=optimizer,
            student_timesteps=spaced_timesteps(4),
            guidance=8.0,
            gan=GanConfig(student_weight=5e-3, critic_weight=1e-2),
            fake_prompts="independent",
            preview_every=500,
            save_every=500,
        ),
        engine=EngineConfig(micro_batch=2),
        evaluate=PROTOCOLS["coco10k-1024"].settings,
    )


def sdxl_4step_lora() -> Config:
    """Four steps, SDXL, with a LoRA student and a whole critic: FID 19.68 in the reference."""
    optimizer = OptimizerConfig(lr=5e-5, warmup_steps=500)
    changes = {"steps": 16_000, "student": optimizer, "critic": optimizer, "lora": LoraConfig()}
    return _with(sdxl_4step(), "sdxl-4step-lora", **changes)


def sdxl_4step_shared() -> Config:
    """Four steps, SDXL, with LoRA student and LoRA critic: one copy of the weights for three networks. Not in the paper."""
    return _with(sdxl_4step_lora(), "sdxl-4step-shared", lora=LoraConfig(shared_base=True))


def sdxl_1step_warmup() -> Config:
    """One step, SDXL: regression on the teacher's samples; sdxl-1step starts from its run."""
    changes = {
        "steps": 2_000,
        "batch": 256,
        "student": OptimizerConfig(
            lr=1e-5, warmup_steps=100, max_grad_norm=0
        ),  # the reference does not clip here
        "student_timesteps": (399,),
        "dmd": None,
        "gan": None,
        "fake_prompts": "batch",
        "regression": RegressionConfig(decoder="madebyollin/taesdxl"),
    }
    warmup = _with(sdxl_4step(), "sdxl-1step-warmup", **changes)
    return warmup.model_copy(update={"engine": EngineConfig(micro_batch=4, activation_checkpointing="full")})


def sdxl_1step() -> Config:
    """One step, SDXL, at timestep 399, started from the regression warm-up: FID 19.01 in the paper."""
    changes = {"steps": 24_000, "student_timesteps": (399,), "fake_prompts": "list"}
    return _with(sdxl_4step(), "sdxl-1step", first_stage="sdxl-1step-warmup", **changes)


def steps(config: Config, count: int, name: str) -> Config:
    """The recipe with a student of `count` steps, at even distances."""
    return _with(config, name, student_timesteps=spaced_timesteps(count))


def fast(config: Config) -> Config:
    """The recipe with fewer network calls, each sample distributed as before. Not in the paper; docs/recipes.md compares both on emoji."""
    gan = config.distill.gan and config.distill.gan.model_copy(update={"reuse_denoising_pass": True})
    return _with(config, config.recipe + "-fast", continue_rollouts=True, gan=gan)


def from_real(config: Config) -> Config:
    """The recipe without backward simulation: the student's inputs are noised real samples (ablation, table 4)."""
    return _with(config, config.recipe + "-noised-real", inputs="noised-real", fake_prompts="batch")


def emoji(config: Config, **changes: Any) -> Config:
    """An SDXL recipe at the size of the emoji teacher (64 pixels, 4 M parameters): a quarter of an hour on two CPU cores.

    Prompts are the captions of the emoji where the recipe has a list of prompts."""
    first, prompts = config.distill.first_stage, config.distill.fake_prompts
    lora = config.distill.lora is not None
    rate = 1.5e-3 if lora else 2e-4
    settings = {
        "steps": 800,
        "batch": 16,
        "dtype": "float32",
        "student": OptimizerConfig(lr=rate, warmup_steps=20, final_lr_ratio=0.05, ema=(0.98,)),
        "critic": OptimizerConfig(
            lr=rate if config.distill.lora and config.distill.lora.shared_base else 2e-4,
            warmup_steps=20,
            final_lr_ratio=0.05,
        ),
        "guidance": 3.0,
        "gan": config.distill.gan and GanConfig(student_weight=3e-2, critic_weight=3e-2),
        "fake_prompts": "independent" if prompts == "list" else prompts,
        "first_stage": first if first == "teacher" else f"{first}-emoji",
        "preview_every": 200,
        "save_every": 200,
    }
    small = _with(config, config.recipe + "-emoji", **settings | changes)
    return small.model_copy(
        update={
            "seed": 0,
            "engine": EngineConfig(),
            "family": StableConfig(kind="sdxl", resolution=64, vae_stride=4),
            "data": DataConfig(holdout=786),
            "pairs": PairsConfig(count=1_020, batch=60, steps=30, guidance=3.0),
            "evaluate": PROTOCOLS["emoji"].settings,
            "gate": GateConfig(factor=1.3),
        }
    )


def emoji_warmup() -> Config:
    """The warm-up at the size of the emoji teacher, with a pixel loss: LPIPS would need weights to be downloaded."""
    changes = {
        "steps": 300,
        "student": OptimizerConfig(lr=5e-4, warmup_steps=20, final_lr_ratio=0.05, ema=(0.98,)),
    }
    return emoji(sdxl_1step_warmup(), **changes, regression=RegressionConfig(metric="mse"))


def without_gan(config: Config) -> Config:
    """The recipe without the GAN: DMD with the two time-scale rule."""
    return _with(config, config.recipe + "-no-gan", gan=None)


def without_ttur(config: Config) -> Config:
    """The recipe without GAN and two time-scale rule: the critic is updated as often as the student."""
    return _with(config, config.recipe + "-no-ttur", gan=None, critic_updates=1)


def _with(config: Config, name: str, **changes: Any) -> Config:
    distill = DistillConfig.model_validate({**dict(config.distill), **changes})
    return config.model_copy(update={"recipe": name, "distill": distill})


RECIPES: dict[str, Callable[[], Config]] = {
    "edm-digits": edm_digits,
    "edm-digits-no-gan": lambda: without_gan(edm_digits()),
    "edm-digits-no-ttur": lambda: without_ttur(edm_digits()),
    "edm-digits-longer": edm_digits_longer,
    "edm-imagenet64": edm_imagenet64,
    "edm-imagenet64-no-gan": edm_imagenet64_no_gan,
    "edm-imagenet64-longer": edm_imagenet64_longer,
    "sd15-1step": sd15_1step,
    "sd15-1step-gan": sd15_1step_gan,
    "sdxl-4step": sdxl_4step,
    "sdxl-4step-noised-real": lambda: from_real(sdxl_4step()),
    "sdxl-4step-lora": sdxl_4step_lora,
    "sdxl-4step-lora-noised-real": lambda: from_real(sdxl_4step_lora()),
    "sdxl-4step-shared": sdxl_4step_shared,
    "sdxl-4step-fast": lambda: fast(sdxl_4step()),
    "sdxl-4step-shared-fast": lambda: fast(sdxl_4step_shared()),
    "sdxl-2step": lambda: steps(sdxl_4step(), 2, "sdxl-2step"),
    "sdxl-8step": lambda: steps(sdxl_4step(), 8, "sdxl-8step"),
    "sdxl-1step-warmup": sdxl_1step_warmup,
    "sdxl-1step": sdxl_1step,
    "sdxl-4step-emoji": lambda: emoji(sdxl_4step()),
    "sdxl-4step-noised-real-emoji": lambda: emoji(from_real(sdxl_4step())),
    "sdxl-4step-lora-emoji": lambda: emoji(sdxl_4step_lora()),
    "sdxl-4step-lora-noised-real-emoji": lambda: emoji(from_real(sdxl_4step_lora())),
    "sdxl-4step-shared-emoji": lambda: emoji(sdxl_4step_shared()),
    "sdxl-1step-warmup-emoji": emoji_warmup,
    "sdxl-1step-emoji": lambda: emoji(sdxl_1step()),
}


class Published(NamedTuple):
    """What the paper and its reference code report of a recipe."""

    fid: float | None
    """On ImageNet-64, COCO-30k (SD1.5) or COCO-10k (SDXL)."""
    gpus: int = 0
    """Number of A100 GPUs; 0 = not reported."""
    hours: float = 0
    """Of the whole run."""

    @property
    def warmup_steps(self) -> int:
        """Steps of the learning-rate warm-up, of which the reference counts 500 over all processes."""
        return round(500 / self.gpus) if self.gpus else 0

    def __str__(self) -> str:
        score = "" if self.fid is None else f"FID {self.fid:.2f}"
        cost = (
            f"{self.gpus * self.hours:,.0f} A100-hours ({self.gpus} GPUs, {self.hours:g} hours)"
            if self.gpus
            else ""
        )
        return ", ".join(part for part in (score, cost) if part)


PUBLISHED: dict[str, Published] = {
    "edm-imagenet64": Published(1.51, 7, 53),
    "edm-imagenet64-no-gan": Published(2.61, 7, 70),
    "edm-imagenet64-longer": Published(1.28, 7, 38),
    "sd15-1step": Published(9.28, 64, 25),
    "sd15-1step-gan": Published(8.35, 64, 2),
    "sdxl-4step": Published(19.32, 64, 57),
    "sdxl-4step-noised-real": Published(20.66),
    "sdxl-4step-lora": Published(19.68, 64, 63),
    "sdxl-1step-warmup": Published(None, 64, 2),
    "sdxl-1step": Published(19.01, 64, 57),
}


def summary(config: Config) -> str:
    """Steps, image size and training techniques of a recipe, on one line."""
    distill, steps = config.distill, len(config.distill.student_timesteps)
    parts = [
        "1 step" if steps == 1 else f"{steps} steps",
        f"{config.family.image[1]} px",
        "DMD" if distill.dmd else "",
        "GAN" if distill.gan else "",
        "regression" if distill.regression else "",
        "" if distill.regression else f"critic x{distill.critic_updates}",
        "noised real inputs" if distill.inputs == "noised-real" else "",
        "" if not distill.lora else "LoRA student and critic" if distill.lora.shared_base else "LoRA student",
        "rollouts continued" if distill.continue_rollouts else "",
        "denoising pass reused for the GAN" if distill.gan and distill.gan.reuse_denoising_pass else "",
        f"after {distill.first_stage}" if distill.first_stage != "teacher" else "",
    ]
    return ", ".join(part for part in parts if part)


def overview() -> str:
    """All recipes: what each is, what it needs beside data and teacher, and what was published of its run."""
    return "\n".join(_describe(name) for name in RECIPES)


def _describe(name: str) -> str:
    config = get(name)
    lines = [name, f"  {summary(config)}; {config.distill.steps:,} steps of batch {config.distill.batch}"]
    if found := needs(config):
        lines.append(f"  needs {' and '.join(found)}")
    if name in PUBLISHED:
        lines.append(f"  published: {PUBLISHED[name]}")
    return "\n".join(lines)


def needs(config: Config) -> list[str]:
    """What the distillation of a recipe needs beside data and teacher, each with its flag."""
    settings = config.distill
    found = {
        f"a run of {settings.first_stage} (--start)": settings.first_stage != "teacher",
        "pairs, made by dmd2 pairs (--data)": settings.regression is not None,
        "a file of prompts (--prompts)": settings.fake_prompts == "list",
    }
    return [need for need, needed in found.items() if needed]


def draws_prompts(config: Config) -> bool:
    """Whether the prompts of fake samples may be those of a file: not if they are classes, or those of pairs or noised real samples."""
    own = config.distill.regression or config.distill.inputs == "noised-real"
    return config.family.prompts == "texts" and not own


MACHINE_GPUS = 8
"""GPUs of a machine for the published recipes."""


def default_gpus(config: Config) -> int:
    """GPUs of a machine that a pipeline run of the recipe asks for: none for digits and emoji, which two cores train in minutes."""
    small = {"digits", "emoji"} & {*config.recipe.split("-")}
    return 0 if small else math.gcd(config.distill.batch, MACHINE_GPUS)


def get(name: str) -> Config:
    """The Config of a recipe; raises Refused for an unknown name."""
    if name not in RECIPES:
        raise Refused(f"unknown recipe {name!r}; {near_miss(name, RECIPES)}")
    return RECIPES[name]()


def resolve(name: str, overrides: Sequence[str] = ()) -> Config:
    """A recipe with fields replaced: `resolve("edm-digits", ["distill.steps=100", "seed=1"])`."""
    get(name)
    return _resolve(RECIPES[name], name, tuple(overrides))


@cache
def _resolve(recipe: Callable[[], Config], name: str, overrides: tuple[str, ...]) -> Config:
    """Kept, because tyro reads the types of all fields anew, which takes 0.1 s, and stages and tests ask again."""
    return parse_flags(Config, override_flags(overrides), name, default=recipe(), add_help=False)
