"""What a model family must answer. Everything that differs between EDM, Stable Diffusion, ... is behind this protocol.

No member is optional. A family is one file that implements `ModelFamily`, a section of the Config that derives from
`dmd2.config.FamilyConfig`, and one call of `dmd2.config.register_family`; nothing outside asks which family it has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, cast

from torch import Tensor, nn

from dmd2.batch import Batch, Conditioning, CondPair
from dmd2.config import FAMILIES, FamilyConfig, LoraConfig
from dmd2.data.loader import RawBatch
from dmd2.denoiser import Denoiser
from dmd2.diffusion import Diffusion
from dmd2.errors import Refused
from dmd2.rng import Rng
from dmd2.sampler import Timesteps

Prompt = int | str
"""What a sample is conditioned on: a class, or a text (`FamilyConfig.prompts`)."""


class ForeignTeacher(NamedTuple):
    """A teacher in a foreign format, found and understood."""

    inputs: dict[str, str]
    """Name -> sha256 digest of each thing it consists of: `source`, and `vae` if another one is used."""
    write: Callable[[Path], None]
    """Write it to an empty folder, in the layout that `ModelFamily.weights` reads."""


class AdoptedWeights(NamedTuple):
    """State dicts of networks that were distilled by other software."""

    student: dict[str, Tensor]
    critic: dict[str, Tensor] | None
    """None if the source has none."""


class ModelFamily(Protocol):
    """One family at one size. Instances are made by `make_family`, as `cls(config, folder, vae)`:

    config: Its section of the Config.
    folder: A teacher, run or package folder, with what never learns (VAE, text encoders, configs); None if there is none.
        Nothing is read from it before it is needed.
    vae: Folder or hub name of a VAE to decode with, instead of the one in the folder; empty = that one.
    """

    files: ClassVar[tuple[str, ...]]
    """Patterns of the files of a folder that the family reads, relative to it."""
    lora_targets: ClassVar[tuple[str, ...]]
    """Layers that a low-rank update changes, by the ends of their names; empty if `FamilyConfig.check` refuses LoRA."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a sample: pixels, or latents."""

    @property
    def diffusion(self) -> Diffusion:
        """The process that teacher, student and critic share."""

    @property
    def manifest_facts(self) -> dict[str, Any]:
        """Entries for the manifest of a teacher, as plain JSON."""

    def network(self) -> nn.Module:
        """A freshly initialised network, a `dmd2.denoiser.Network`, on the current default device."""

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        """The units of sharding, activation checkpointing and compilation: some tens of modules of `network`, which may contain each other.

        A parameter belongs to the first unit in the list that contains it; parameters in no unit belong to the network as a whole.
        A unit must lie entirely before the bottleneck or entirely after it, and parameters in no unit must lie before it:
        a pass that stops at the bottleneck then uses a unit completely or not at all.
        """

    def head(self) -> nn.Module:
        """A discriminator head: features of `Denoiser.features` -> logits (B,), float32."""

    def read(self, batch: RawBatch, rng: Rng) -> Batch:
        """Samples x (B, C, H, W) and their conditioning from a batch of the data loader.

        Raises:
            Refused: If the data does not fit the network.
        """

    def read_pairs(self, batch: RawBatch, rng: Rng) -> Batch:
        """Pairs of noise and the teacher's answer, x (B, 2, C, H, W), from a batch of the data loader."""

    def condition(self, prompts: Sequence[Prompt]) -> CondPair:
        """The conditioning of these prompts, one row each.

        Raises:
            Refused: For a prompt of the wrong kind, or a class out of range.
        """

    def placeholder_condition(self, rows: int) -> Conditioning:
        """A conditioning of the right shapes and types with arbitrary values, made without text encoders; for `dmd2 plan`."""

    def decode(self, x: Tensor) -> Tensor:
        """Samples (B, C, H, W) -> images, uint8 (B, C, H, W).

        Raises:
            Refused: A VAE makes infinite or NaN values of them.
        """

    def decode_unchecked(self, x: Tensor) -> Tensor:
        """Like `decode`, but values that are not finite are no error. For training, where others would wait for this rank."""

    def to_pixels(self, x: Tensor) -> Tensor:
        """Samples (B, C, H, W) -> images, float32 (B, C, H, W) in [-1, 1], differentiable."""

    def denoiser(self, network: nn.Module) -> Denoiser:
        """The network with the family's process, in float32."""

    def sample_teacher(
        self, network: nn.Module, eps: Tensor, pair: CondPair, steps: int, guidance: float
    ) -> Tensor:
        """Samples (B, C, H, W) by the teacher's own many-step sampler, from pure noise eps (B, C, H, W).

        Raises:
            Refused: For a guidance scale that the network cannot follow.
        """

    def solve_ode(
        self, network: nn.Module, eps: Tensor, pair: CondPair, steps: int, guidance: float
    ) -> Tensor:
        """Samples (B, C, H, W) of the teacher's probability flow ODE, from pure noise eps (B, C, H, W) at the noisiest timestep of the
        process, where a student starts.

        Raises:
            Refused: As `sample_teacher`.
        """

    def teacher_calls(self, steps: int, guidance: float) -> int:
        """Number of network calls per image of `sample_teacher`."""

    def save(self, weights: dict[str, Tensor], folder: Path, timesteps: Timesteps) -> None:
        """Write the weights of a network, and beside them everything else that a user needs to sample it.

        Args:
            weights: State dict of `network()`.
            folder: An existing folder.
            timesteps: Timesteps of the student's steps; empty for a teacher.
        """

    def weights(self, folder: Path) -> dict[str, Tensor]:
        """The state dict that `save` wrote there, in float32."""

    def write_forms(
        self, folder: Path, timesteps: Timesteps, single_file: str, license: str = ""
    ) -> dict[str, str]:
        """Write a student that `save` wrote to a folder in the file formats of other programs too.

        Args:
            timesteps: Timesteps of the student's steps.
            single_file: Precision of all networks in one file (a dtype of torch), or `none` for no such file.
            license: Licence of the weights, for the metadata of files that have some; empty = not known.

        Returns:
            File, relative to the folder, of each form beside the folder itself -> how to use it, in Markdown for the model card.
        """

    def usage(self, timesteps: Timesteps) -> str:
        """How a user samples a saved student, as Markdown for the model card."""

    @classmethod
    def resolve(cls, config: Any, source: str, base: str, vae: str, scratch: Path) -> ForeignTeacher:
        """Understand a teacher in a foreign format, without executing anything of it.

        Args:
            config: The family's section of the Config.
            source: What the user gave: a path, gs:// address or hub name.
            base: Folder of a model with the configs that `source` lacks; empty = none.
            vae: Another VAE than its own; empty = its own.
            scratch: A temporary folder that exists until the teacher is written.

        Raises:
            Refused: If it is not understood completely, or does not fit the config.
        """

    def adopt(self, path: Path, teacher: Mapping[str, Tensor], lora: LoraConfig | None) -> AdoptedWeights:
        """A student that was distilled by other software, and its critic where the source has one.

        Args:
            path: File or folder of the weights.
            teacher: State dict of the teacher it was distilled from, into which a low-rank update is merged.
            lora: Rank and alpha of a low-rank update whose source does not say them.

        Raises:
            Refused: If it does not fit the network.
        """


def make_family(config: FamilyConfig, folder: Path | None = None, vae: str = "") -> ModelFamily:
    """The implementation of a family at the size of its config; see `ModelFamily` for the arguments.

    Raises:
        TypeError: If the registered class lacks a member of `ModelFamily`.
    """
    family = family_class(config)(config, folder, vae)
    if missing := {name for name in vars(ModelFamily) if not name.startswith("_")} - set(dir(family)):
        raise TypeError(f"family {config.kind!r} does not implement {', '.join(sorted(missing))}")
    return cast(ModelFamily, family)


def family_class(config: FamilyConfig) -> Any:
    """The class that implements a family, imported if it is registered by its name."""
    entry = FAMILIES[config.kind].family
    if isinstance(entry, str):
        module, _, name = entry.partition(":")
        return getattr(import_module(module), name)
    return entry


def check_same_family(found: FamilyConfig, wanted: FamilyConfig) -> None:
    """Raise Refused if a network that was found differs from that of the recipe in any setting."""
    has, needs = (_flat(family.model_dump(mode="json")) for family in (found, wanted))
    if differs := [
        f"{name} is {has.get(name)}, not {needs.get(name)}"
        for name in needs | has
        if needs.get(name) != has.get(name)
    ]:
        raise Refused(
            f"the network is of another shape than that of the recipe: {', '.join(differs[:3])}; use the recipe it was made for, or set --family to match"
        )


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with those of nested sections beside the others."""
    flat = {name: value for name, value in settings.items() if not isinstance(value, dict)}
    for section in settings.values():
        flat |= section if isinstance(section, dict) else {}
    return flat
