from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dmd2 import config, recipes
from dmd2.config import Config, DmdConfig
from dmd2.models.family import make_family
from dmd2.overrides import override_flags, parse_flags
from dmd2.training import build
from tests.conftest import adm


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_recipe_is_listed_under_its_name(name: str) -> None:
    assert recipes.get(name).recipe == name


@pytest.mark.parametrize("name", ["sdxl-4step", "sdxl-4step-shared"])
def test_a_fast_recipe_differs_in_its_calls_only(name: str) -> None:
    published, fast = recipes.get(name).distill, recipes.get(f"{name}-fast").distill
    assert published.gan is not None
    gan = published.gan.model_copy(update={"reuse_denoising_pass": True})
    assert fast == published.model_copy(update={"continue_rollouts": True, "gan": gan})


SDXL_4 = (999, 749, 499, 249)
PUBLISHED = {
    "edm-imagenet64": (2e-6, 280, 5, 200_000, (3e-3, 1e-2), 1.0, (999,), 64),
    "edm-imagenet64-no-gan": (2e-6, 280, 5, 405_500, None, 1.0, (999,), 64),
    "edm-imagenet64-longer": (5e-7, 280, 5, 140_000, (3e-3, 1e-2), 1.0, (999,), 64),
    "sd15-1step": (1e-5, 2048, 10, 39_000, None, 1.75, (999,), 512),
    "sd15-1step-gan": (5e-7, 2048, 10, 2_000, (1e-3, 1e-2), 1.75, (999,), 512),
    "sdxl-4step": (5e-7, 128, 5, 19_000, (5e-3, 1e-2), 8.0, SDXL_4, 1024),
    "sdxl-4step-lora": (5e-5, 128, 5, 16_000, (5e-3, 1e-2), 8.0, SDXL_4, 1024),
    "sdxl-1step": (5e-7, 128, 5, 24_000, (5e-3, 1e-2), 8.0, (399,), 1024),
}
"""Of the reference's runs: learning rate of both networks, batch of all GPUs, critic updates per student update, steps, GAN
weights of student and critic, guidance, timesteps of the student, pixels."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_has_the_published_values(name: str) -> None:
    made = recipes.get(name)
    d = made.distill
    pixels = adm(made).resolution if name.startswith("edm") else getattr(made.family, "resolution")  # noqa: B009 - mypy
    gan = d.gan and (d.gan.student_weight, d.gan.critic_weight)
    found = (d.student.lr, d.batch, d.critic_updates, d.steps, gan, d.guidance, d.student_timesteps, pixels)
    assert found == PUBLISHED[name]
    assert (made.seed, d.dtype) == (10, "bfloat16")


@pytest.mark.parametrize("name", PUBLISHED)
def test_all_published_runs_share_their_optimizer_and_timesteps(name: str) -> None:
    """AdamW, clipping at 10 on each network, no EMA; DMD at 2 to 98 % of the timesteps, GAN at all."""
    d = recipes.get(name).distill
    for o in (d.student, d.critic):
        assert (o.lr, o.betas, o.weight_decay, o.max_grad_norm) == (d.student.lr, (0.9, 0.999), 0.01, 10.0)
        assert o.final_lr_ratio == 1.0
    assert d.student.ema == ()
    assert d.dmd is not None
    assert (d.dmd.min_timestep_fraction, d.dmd.max_timestep_fraction) == (0.02, 0.98)
    assert d.gan is None or d.gan.max_timestep_fraction == 1.0


@pytest.mark.parametrize("name", [*PUBLISHED, "sdxl-1step-warmup"])
def test_the_learning_rate_rises_for_500_steps_but_for_a_twentieth_of_a_run_at_most(name: str) -> None:
    """Published is 500 / GPUs; see docs/recipes.md."""
    d = recipes.get(name).distill
    assert d.student.warmup_steps == min(500, d.steps // 20)
    assert d.critic.warmup_steps in (d.student.warmup_steps, 500)


@pytest.mark.parametrize(
    "name", [name for name in recipes.RECIPES if name.startswith("sdxl") and "emoji" not in name]
)
def test_the_teacher_of_sdxl_is_evaluated_with_50_guided_steps_which_are_100_calls(name: str) -> None:
    made = recipes.get(name)
    settings = made.evaluate
    calls = make_family(made.family).teacher_calls(settings.teacher_steps, settings.teacher_guidance)
    assert (settings.teacher_steps, settings.teacher_guidance, calls) == (50, 6.0, 100)


@pytest.mark.parametrize("kind", ["edm-imagenet64", "edm-digits"])
def test_the_longer_run_is_the_one_with_the_gan_at_a_quarter_of_the_rate(kind: str) -> None:
    full, longer = recipes.get(kind).distill, recipes.get(f"{kind}-longer").distill
    assert longer.student.lr == longer.critic.lr == pytest.approx(full.student.lr / 4)
    assert longer.gan == full.gan
    rest = {"steps", "student", "critic", "first_stage"}
    assert longer.model_dump(exclude=rest) == full.model_dump(exclude=rest)


def test_the_warm_up_of_sdxl_is_as_published() -> None:
    """LPIPS behind the tiny VAE, in bfloat16, without gradient clipping; pairs of 50 guided steps."""
    made = recipes.get("sdxl-1step-warmup")
    assert made.distill.regression
    assert (made.distill.regression.metric, made.distill.regression.decoder) == (
        "lpips",
        "madebyollin/taesdxl",
    )
    assert (made.distill.dtype, made.distill.student.max_grad_norm) == ("bfloat16", 0)
    assert (made.distill.student.lr, made.distill.batch, made.distill.student_timesteps) == (
        1e-5,
        256,
        (399,),
    )
    assert (made.pairs.count, made.pairs.steps, made.pairs.guidance) == (10_000, 50, 8.0)


def test_an_empty_text_is_an_override_of_a_text() -> None:
    """An empty decoder of the regression is the teacher's VAE."""
    made = recipes.resolve("sdxl-1step-warmup", ["distill.regression.decoder="])
    assert made.distill.regression
    assert made.distill.regression.decoder == ""
    assert recipes.resolve("edm-digits", ["distill.student.ema="]).distill.student.ema == ()


DOCS = Path(__file__).parent.parent / "docs" / "recipes.md"


@pytest.mark.parametrize("name", recipes.PUBLISHED)
def test_the_documented_figures_are_those_that_the_list_of_recipes_gives(name: str) -> None:
    published = recipes.PUBLISHED[name]
    rows = [line.split("|") for line in DOCS.read_text().splitlines() if line.startswith("|")]
    (row,) = (cells for cells in rows if f"`{name}`" in cells[1].split(",")[0])
    fid = "" if published.fid is None else f"FID {published.fid:.2f}"
    hours = f"{published.gpus * published.hours:,.0f}" if published.gpus else ""
    steps = f"{recipes.get(name).distill.steps:,}"
    warmup = str(published.warmup_steps or "")
    assert [cell.strip() for cell in row[3:-1]] == [steps, fid, hours, warmup]


def test_variants_differ_from_their_recipe_in_what_their_name_says() -> None:
    full, no_gan, no_ttur = (recipes.get(f"edm-digits{suffix}") for suffix in ("", "-no-gan", "-no-ttur"))
    assert (full.distill.gan is not None, full.distill.critic_updates) == (True, 5)
    assert (no_gan.distill.gan, no_gan.distill.critic_updates) == (None, 5)
    assert (no_ttur.distill.gan, no_ttur.distill.critic_updates) == (None, 1)
    assert no_gan.distill.model_copy(update={"gan": full.distill.gan}) == full.distill


def test_overrides_replace_fields_and_lists() -> None:
    found = recipes.resolve(
        "edm-digits", ["distill.steps=7", "family.network.multipliers=2,1", "teach.optimizer.ema=", "seed=4"]
    )
    assert (
        found.distill.steps,
        adm(found).multipliers,
        found.teach.optimizer.ema,
        found.seed,
    ) == (7, (2, 1), (), 4)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("distill.steps", "must have the form field=value"),
        ("distil.steps=3", "--distill.steps"),
        ("distill.student_timesteps=3,900", "must fall, noisiest first"),
        ("distill.student_timesteps=4000", "beyond the 1000 timesteps"),
        ("family.network.resolution=30", "cannot be divided by patch"),
        ("distill.student.lr=-1", "greater than 0, not -1"),
        ("recipe=mine", "recipe"),
        ("help=1", "Unrecognized options: --help"),
        ("h=", "Unrecognized options"),
        ("seed=1,-h", "Unrecognized options: -h"),
        ("seed=1,--out,/elsewhere", "Unrecognized options: --out"),
        ("seed=-1", "greater than or equal to 0"),
        ("distill.guidance=2", "no unconditional class"),
        ("family.network.multipliers=1,2,4", "2x2 pixels"),
        ("family.network.channels=100", "do not divide into attention heads"),
        ("distill.dmd.min_timestep_fraction=0.99", "must be below max_timestep"),
        ("distill.gan.max_timestep_fraction=0", "greater than 0"),
        ("evaluate.teacher_steps=1", "greater than or equal to 2"),
        ("family.sigma_min=90", "must be below sigma_max"),
    ],
)
def test_a_wrong_override_is_refused_in_one_sentence(
    override: str, words: str, refusal: Callable[..., str]
) -> None:
    assert words in refusal(lambda: recipes.resolve("edm-digits", [override]))


def test_the_teacher_of_a_low_rank_student_stays_on_the_device(refusal: Callable[..., str]) -> None:
    words = refusal(lambda: recipes.resolve("sdxl-4step-lora", ["engine.offload_teacher=True"]))
    assert "offload_teacher is on, but with distill.lora" in words


def test_the_noisiest_level_may_be_the_last_of_the_table() -> None:
    assert build.timestep_range(DmdConfig(min_timestep_fraction=0.5, max_timestep_fraction=1.0), 1000) == (
        500,
        1000,
    )


def test_every_recipe_holds_out_what_its_evaluation_needs() -> None:
    assert all(make().data.holdout >= 2 for make in recipes.RECIPES.values())


@pytest.mark.parametrize(
    ("old", "today"),
    [
        ("distill.student_levels=500", "distill.student_timesteps=500"),
        ("family.levels=2000", "family.num_timesteps=2000"),
        ("distill.critic.warmup=3", "distill.critic.warmup_steps=3"),
        ("distill.gan.shared_view=True", "distill.gan.reuse_denoising_pass=True"),
        ("distill.dmd.min_level=0.1", "distill.dmd.min_timestep_fraction=0.1"),
        ("teach.player.lr=0.5", "teach.optimizer.lr=0.5"),
        ("loader.block=3", "loader.shuffle_block=3"),
        ("engine.hang_s=60", "engine.hang_timeout_s=60"),
    ],
)
def test_an_override_with_the_old_name_of_a_field_sets_the_field(old: str, today: str) -> None:
    assert recipes.resolve("edm-digits", [old]) == recipes.resolve("edm-digits", [today])
    assert recipes.resolve("edm-digits", [old]) != recipes.get("edm-digits")


def test_a_refusal_of_an_old_name_says_the_name_of_today(refusal: Callable[..., str]) -> None:
    assert "--distill.student-timesteps" in refusal(
        lambda: recipes.resolve("edm-digits", ["distill.student_levels=many"])
    )


def test_every_renamed_field_exists() -> None:
    for section, names in config.RENAMED.items():
        assert set(names.values()) <= getattr(config, section).model_fields.keys()


def test_metrics_are_written_apart_as_flags_and_by_commas_as_overrides(refusal: Callable[..., str]) -> None:
    flags = ["--evaluate.metrics", "fid,clip"]
    why = refusal(lambda: parse_flags(Config, flags, "x", default=recipes.get("edm-digits"), add_help=False))
    assert "evaluate.metrics has 'fid,clip'; write names apart, as fid clip" in why
    assert recipes.resolve("edm-digits", ["evaluate.metrics=fid,kid"]).evaluate.metrics == ("fid", "kid")


@pytest.mark.parametrize(
    ("words", "on"), [([], False), (["--encode.text"], True), (["--encode.text", "False"], False)]
)
def test_a_flag_that_is_on_or_off_is_on_without_a_value(words: list[str], on: bool) -> None:
    for flags in (words, [*words, "--seed", "3"]):
        parsed = parse_flags(Config, flags, "x", default=recipes.get("sdxl-4step"), add_help=False)
        assert parsed.encode.text is on


def test_an_override_that_is_on_or_off_needs_its_value(refusal: Callable[..., str]) -> None:
    assert recipes.resolve("sdxl-4step", ["encode.text=True"]).encode.text
    for value in ("", "yes"):
        why = refusal(lambda value=value: recipes.resolve("sdxl-4step", [f"encode.text={value}"]))
        assert f"invalid choice '{value}'" in why


def test_overrides_become_flags(refusal: Callable[..., str]) -> None:
    assert override_flags(["distill.steps=5", "family.network.multipliers=1,2"]) == [
        "--distill.steps", "5", "--family.network.multipliers", "1", "2"
    ]  # fmt: skip
    assert override_flags(["data.background=rgb(1, 2, 3)"]) == ["--data.background", "rgb(1, 2, 3)"]
    assert "must have the form field=value" in refusal(lambda: override_flags(["seed"]))
