"""A family that is not part of the package goes through every stage: all of it is in this file, and one call registers it.

It differs from the built-in families in everything that the protocol covers: a transformer on patches instead of a U-Net, flow
matching instead of noise or EDM prediction, a conditioning under a name of its own, features that are tokens, a head of
its own, Euler's method as the teacher's sampler, and a foreign format of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
import torch
import tyro
from torch import Tensor, nn

from dmd2 import cli, recipes, stages
from dmd2.batch import Batch, Conditioning, CondPair
from dmd2.config import Config, DistillConfig, FamilyConfig, GanConfig, LoraConfig, register_family
from dmd2.data.loader import RawBatch
from dmd2.denoiser import Denoiser
from dmd2.diffusion import Diffusion, flow_prediction, flow_schedule
from dmd2.errors import Refused
from dmd2.io.artifact import read_manifest
from dmd2.io.local import sha256
from dmd2.io.tensors import load_tensors, save_tensors
from dmd2.model import load, load_network
from dmd2.models.edm import Edm
from dmd2.models.family import AdoptedWeights, ForeignTeacher, ModelFamily, Prompt, make_family
from dmd2.models.sd15 import Sd15
from dmd2.models.sdxl import Sdxl
from dmd2.plan.prediction import Plan
from dmd2.rng import Rng
from dmd2.sampler import Timesteps


class ToyConfig(FamilyConfig):
    """A tiny class-conditional flow-matching transformer."""

    kind: Annotated[Literal["toy"], tyro.conf.Fixed] = "toy"
    resolution: int = 8
    """Height and width of an image, in pixels."""
    width: int = 16
    """Channels of a token."""
    depth: int = 4
    """Transformer blocks."""
    patch: int = 2
    """Side of a token, in pixels."""
    count: int = 3
    """Number of classes."""
    vae_stride: Literal[0] = 0
    """It works on pixels."""
    num_timesteps: int = 1000
    """Number of timesteps in the noise table."""
    prompts: ClassVar[Literal["classes", "texts"]] = "classes"
    can_teach: ClassVar[bool] = True

    @property
    def image(self) -> tuple[int, int, int]:
        return 1, self.resolution, self.resolution

    @property
    def classes(self) -> int:
        return self.count

    def check(self, distill: DistillConfig) -> None:
        if distill.lora:
            raise ValueError("distill.lora is set; the toy has no low-rank form")


class ToyBlock(nn.Module):
    """Attention and a layer of its own for each token, both shifted by the conditioning."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.shift = nn.LayerNorm(width), nn.Linear(width, width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor, embedding: Tensor) -> Tensor:
        h = self.norm(tokens + self.shift(embedding)[:, None])
        tokens = tokens + self.attention(h, h, h, need_weights=False)[0]
        return tokens + self.mlp(tokens)


class ToyTransformer(nn.Module):
    """(x (B, 1, H, W), time (B,), cond["species"] (B,)) -> velocity (B, 1, H, W), or tokens (B, T, D)."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config, side = config, config.resolution // config.patch
        self.embed = nn.Linear(config.patch**2, config.width)
        self.position = nn.Parameter(0.1 * torch.randn(side**2, config.width))
        self.time = nn.Sequential(
            nn.Linear(1, config.width), nn.SiLU(), nn.Linear(config.width, config.width)
        )
        self.species = nn.Embedding(config.count + 1, config.width)
        self.blocks = nn.ModuleList(ToyBlock(config.width) for _ in range(config.depth))
        self.out = nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, config.patch**2))

    @property
    def decoder_start(self) -> nn.Module:
        return self.blocks[len(self.blocks) // 2]

    def forward(self, x: Tensor, time: Tensor, cond: Conditioning, features_only: bool = False) -> Tensor:
        patches = nn.functional.pixel_unshuffle(x, self.config.patch)
        tokens = self.embed(patches.flatten(2).transpose(1, 2).to(self.embed.weight.dtype)) + self.position
        embedding = self.time((time[:, None] / 1000).to(tokens.dtype)) + self.species(cond["species"])
        for block in self.blocks:
            if features_only and block is self.decoder_start:
                return tokens
            tokens = block(tokens, embedding)
        out = self.out(tokens).transpose(1, 2).reshape(patches.shape)
        return nn.functional.pixel_shuffle(out, self.config.patch)


class TokenHead(nn.Module):
    """Tokens (B, T, D) -> logits (B,), float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(tokens.float()).mean((1, 2))


class Toy:
    """A `ModelFamily`."""

    files: ClassVar[tuple[str, ...]] = ("network.json", "toy.safetensors")
    lora_targets: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: ToyConfig, folder: Path | None, vae: str) -> None:
        self.config = config
        self.diffusion = Diffusion(flow_schedule(config.num_timesteps), flow_prediction)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.config.image

    @property
    def manifest_facts(self) -> dict[str, Any]:
        return {"predicts": "velocity"}

    def network(self) -> nn.Module:
        return ToyTransformer(self.config)

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(network, ToyTransformer)
        return [*network.blocks, network.out]

    def head(self) -> nn.Module:
        return TokenHead(self.config.width)

    def read(self, batch: RawBatch, rng: Rng) -> Batch:
        if tuple(batch.image.shape[1:]) != self.shape:
            raise Refused(f"the images are {tuple(batch.image.shape[1:])}, the network makes {self.shape}")
        return Batch(batch.image.float() / 127.5 - 1, *self.condition(batch.label.tolist()), rng)

    def read_pairs(self, batch: RawBatch, rng: Rng) -> Batch:
        return Batch(batch.image.float(), *self.condition(batch.label.tolist()), rng)

    def condition(self, prompts: Sequence[Prompt]) -> CondPair:
        species = torch.tensor(prompts)
        none = torch.full_like(species, self.config.count)
        return CondPair(Conditioning(species=species), Conditioning(species=none))

    def placeholder_condition(self, rows: int) -> Conditioning:
        return Conditioning(species=torch.zeros(rows, dtype=torch.int64))

    def decode(self, x: Tensor) -> Tensor:
        return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)

    decode_unchecked = decode

    def to_pixels(self, x: Tensor) -> Tensor:
        return x

    def denoiser(self, network: nn.Module) -> Denoiser:
        return Denoiser(network, self.diffusion)

    def sample_teacher(
        self, network: nn.Module, eps: Tensor, pair: CondPair, steps: int, guidance: float
    ) -> Tensor:
        """Euler's method on dx / dsigma = v, from sigma = 1 to 0."""
        denoiser, sigma, x = self.denoiser(network), self.diffusion.schedule.sigma, eps
        indices = torch.linspace(len(sigma) - 1, 0, steps + 1).long()[:-1].tolist()
        for index, following in zip(indices, [*indices[1:], None], strict=True):
            timestep = torch.full((len(x),), index, device=x.device)
            v = denoiser.output(x, timestep, pair.cond)
            if guidance != 1:
                uncond = denoiser.output(x, timestep, pair.uncond)
                v = uncond + guidance * (v - uncond)
            step = (0.0 if following is None else float(sigma[following])) - float(sigma[index])
            x = x + step * v
        return x

    def solve_ode(
        self, network: nn.Module, eps: Tensor, pair: CondPair, steps: int, guidance: float
    ) -> Tensor:
        return self.sample_teacher(network, eps, pair, steps, guidance)

    def teacher_calls(self, steps: int, guidance: float) -> int:
        return steps * (1 if guidance == 1 else 2)

    def save(self, weights: dict[str, Tensor], folder: Path, timesteps: Timesteps) -> None:
        save_tensors(weights, folder / "toy.safetensors")

    def weights(self, folder: Path) -> dict[str, Tensor]:
        return load_tensors(folder / "toy.safetensors")

    def write_forms(
        self, folder: Path, timesteps: Timesteps, single_file: str, license: str = ""
    ) -> dict[str, str]:
        return {}

    def usage(self, timesteps: Timesteps) -> str:
        return f"A toy of {len(timesteps)} steps: `load(folder).sample([0, 1, 2])`"

    @classmethod
    def resolve(cls, config: ToyConfig, source: str, base: str, vae: str, scratch: Path) -> ForeignTeacher:
        path = Path(source)
        return ForeignTeacher(
            {"source": sha256(path)}, lambda folder: cls(config, None, "").save(_ours(path), folder, ())
        )

    def adopt(self, path: Path, teacher: Mapping[str, Tensor], lora: LoraConfig | None) -> AdoptedWeights:
        return AdoptedWeights(_ours(path), None)


def _ours(path: Path) -> dict[str, Tensor]:
    """The weights of a file in the toy's foreign format, in which all names begin with `net.`."""
    return {name.removeprefix("net."): tensor for name, tensor in load_tensors(path).items()}


register_family("toy", ToyConfig, Toy)

IMPLEMENTATIONS: list[type[ModelFamily]] = [Edm, Sd15, Sdxl, Toy]
"""mypy checks here that each has every member of the protocol, with its types."""


@pytest.fixture(scope="module")
def config(micro: Config) -> Config:
    """Two steps, guidance, DMD and a GAN whose head shares the critic's pass."""
    gan = GanConfig(student_weight=1e-2, critic_weight=1e-2, reuse_denoising_pass=True)
    distill = {"student_timesteps": (999, 499), "guidance": 1.5, "gan": gan}
    return Config.model_validate(
        {
            **dict(micro),
            "recipe": "toy-2step",
            "family": ToyConfig(),
            "distill": DistillConfig.model_validate({**dict(micro.distill), **distill}),
            "engine": micro.engine.model_copy(update={"activation_checkpointing": "full", "micro_batch": 4}),
            "evaluate": micro.evaluate.model_copy(update={"teacher_guidance": 2.0}),
            "gate": micro.gate.model_copy(update={"factor": 1e6}),
        }
    )


@pytest.fixture(scope="module")
def folders(config: Config, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything from a source of images to the report of a packaged student."""
    root = tmp_path_factory.mktemp("toy")
    at = {name: str(root / name) for name in ("shards", "teacher", "run", "evaluation", "gate", "package")}
    stages.shard(config, str(pictures), at["shards"])
    stages.teach(config, at["shards"], at["teacher"])
    stages.distill(config, at["shards"], at["teacher"], at["run"])
    stages.evaluate(config, at["shards"], at["teacher"], at["run"], at["evaluation"])
    stages.gate(config, at["evaluation"], at["gate"])
    stages.package(at["run"], at["evaluation"], at["gate"], at["package"])
    made = at["shards"], at["teacher"], at["run"], at["evaluation"], at["gate"]
    stages.report(*made, str(root / "report.html"), at["package"])
    return root


def test_a_new_family_is_taught_distilled_evaluated_packaged_and_loaded(folders: Path) -> None:
    teacher, run = load_network(folders / "teacher"), load_network(folders / "run")
    package = load(str(folders / "package"))
    assert (teacher.timesteps, package.timesteps) == ((), (999, 499))
    assert torch.equal(package.sample([0, 1, 2], seed=1), run.sample([0, 1, 2], seed=1))
    assert not torch.equal(package.sample([0], seed=1), package.sample([1], seed=1))
    moved = {n: (p - teacher.network.state_dict()[n]).abs().max() for n, p in run.network.named_parameters()}
    assert min(moved.values()) > 0
    assert "A toy of 2 steps" in (folders / "package" / "README.md").read_text()
    assert "toy-2step" in (folders / "report.html").read_text()


def test_its_evaluation_counts_the_calls_of_its_own_sampler(folders: Path) -> None:
    facts = read_manifest(folders / "evaluation", "evaluation").facts
    assert (facts["nfe_student"], facts["nfe_teacher"]) == (2, 6)
    assert {row["name"]: row["calls"] for row in facts["variants"]} == {
        "student": 2, "teacher": 6, "teacher_1step": 2, "student_1step": 1, "teacher_2step": 4,
    }  # fmt: skip


def test_its_sampler_and_its_process_describe_the_same_path() -> None:
    """For data that is one point, the exact velocity is (x_t - x0) / sigma, and Euler's method is exact in any number of steps."""
    toy, point = Toy(ToyConfig(), None, ""), 0.3

    class Exact(nn.Module):
        def forward(self, x: Tensor, time: Tensor, cond: Conditioning, features_only: bool = False) -> Tensor:
            return (x - point) / (time / 1000).reshape(-1, 1, 1, 1)

    eps = torch.randn(2, 1, 8, 8)
    x = toy.sample_teacher(Exact(), eps, toy.condition([0, 1]), steps=5, guidance=3.0)
    torch.testing.assert_close(x, torch.full_like(x, point), atol=1e-5, rtol=0)
    x0 = toy.denoiser(Exact())(eps, torch.tensor([999, 999]), toy.condition([0, 1]).cond)
    torch.testing.assert_close(x0, torch.full_like(x0, point), atol=1e-5, rtol=0)


def test_a_plan_counts_it(config: Config) -> None:
    plan = stages.plan(config, "l4-24gb", gpus_per_node=2)
    assert isinstance(plan, Plan)
    weights = sum(p.numel() for p in Toy(ToyConfig(), None, "").network().parameters())
    assert (plan.weights["teacher"], plan.weights["student"]) == (weights, weights)
    assert min(plan.flops.values()) > 0


def test_teachers_and_students_in_its_own_foreign_format_are_read(
    config: Config, folders: Path, tmp_path: Path
) -> None:
    theirs = {f"net.{name}": w for name, w in load_tensors(folders / "run" / "toy.safetensors").items()}
    save_tensors(theirs, tmp_path / "theirs.safetensors")
    source = str(tmp_path / "theirs.safetensors")
    resolved = stages.resolve(config, source, str(tmp_path / "teacher"))
    adopted = stages.adopt(config, source, str(folders / "teacher"), str(tmp_path / "run"))
    assert resolved.facts["predicts"] == "velocity"
    assert set(adopted.facts["prompts"]) == {0, 1, 2}
    images = load_network(folders / "run").sample([0, 1, 2])
    assert torch.equal(load_network(tmp_path / "run").sample([0, 1, 2]), images)


def test_the_command_line_knows_it(
    config: Config, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(recipes.RECIPES, "toy-2step", lambda: config)
    cli.run(
        ["sample", "--package", str(folders / "package"), "--out", str(tmp_path / "a.png"), "--count", "3"]
    )
    assert (tmp_path / "a.png").stat().st_size > 0
    changed = recipes.resolve("toy-2step", ["family.width=8", "distill.guidance=2"])
    assert (changed.family, changed.distill.guidance) == (ToyConfig(width=8), 2.0)
    assert Config.model_validate_json(changed.model_dump_json()) == changed
    with pytest.raises(SystemExit):
        cli.run(["distill", "toy-2step", "--help"])
    assert "Channels of a token" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("family", "words"),
    [({"kind": "tay"}, "unknown kind of family 'tay'"), ({"kind": "toy", "width": "wide"}, "width")],
)
def test_a_config_with_an_unknown_family_or_a_wrong_field_is_refused(
    config: Config, family: dict[str, Any], words: str
) -> None:
    changed = json.loads(config.model_dump_json()) | {"family": family}
    with pytest.raises(ValueError, match=words):
        Config.model_validate(changed)


def test_settings_that_it_cannot_follow_are_refused(
    config: Config, monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str]
) -> None:
    monkeypatch.setitem(recipes.RECIPES, "toy-2step", lambda: config)
    assert "beyond the 400 timesteps" in refusal(
        lambda: recipes.resolve("toy-2step", ["family.num_timesteps=400"])
    )


def test_a_family_that_lacks_a_member_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Toy, "usage")
    with pytest.raises(TypeError, match="family 'toy' does not implement usage"):
        make_family(ToyConfig())


def test_a_kind_that_is_taken_is_refused() -> None:
    register_family("toy", ToyConfig, Toy)
    with pytest.raises(ValueError, match="'edm' is registered"):
        register_family("edm", ToyConfig, Toy)
