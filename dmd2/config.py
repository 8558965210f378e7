"""The configuration of a run: one frozen tree of values, checked when it is made.

A recipe (`recipes.py`) returns a whole `Config`; the command line overrides single fields of it; every
folder that a stage writes holds the result. The docstring of a field is its help text on the command line. This module
imports no torch.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self

import tyro
from PIL import ImageColor
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from dmd2.log import without_secrets

Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """A part of the Config: frozen, without unknown fields, and each field with its help text."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _read_old_spellings(cls, values: Any) -> Any:
        renamed = RENAMED.get(cls.__name__, {})
        return {renamed.get(k, k): v for k, v in values.items()} if isinstance(values, dict) else values

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(_sentence(error)) from None


RENAMED: dict[str, dict[str, str]] = {
    "EdmConfig": {"latent": "vae_stride", "levels": "num_timesteps"},
    "StableConfig": {"latent": "vae_stride", "levels": "num_timesteps"},
    "LoaderConfig": {"block": "shuffle_block", "ahead": "prefetch"},
    "OptimizerConfig": {"warmup": "warmup_steps", "final": "final_lr_ratio"},
    "TeachConfig": {"player": "optimizer"},
    "DmdConfig": {"min_level": "min_timestep_fraction", "max_level": "max_timestep_fraction"},
    "GanConfig": {"max_level": "max_timestep_fraction", "shared_view": "reuse_denoising_pass"},
    "EngineConfig": {"checkpointing": "activation_checkpointing", "hang_s": "hang_timeout_s"},
    "DistillConfig": {
        "student_levels": "student_timesteps",
        "every_stop": "continue_rollouts",
        "keep": "keep_checkpoints",
    },
}
"""Section -> {old name of a field: its name today}. Manifests, model folders, flags and overrides with the old names are
still read."""


class FamilyConfig(Section):
    """What a model family says of itself without its networks: the part of its protocol that needs no torch.

    Each family has a subclass, whose fields are its settings, and a row in `FAMILIES`. A dict is read as the section of its
    `kind`. The other half of the protocol is `dmd2.models.family.ModelFamily`.
    """

    kind: Annotated[str, tyro.conf.Fixed]
    if TYPE_CHECKING:  # fields of every subclass, declared there: their order is that of the JSON
        vae_stride: int
        """Pixels per latent along each side; 0 = the network works on pixels."""
        num_timesteps: int
        """Number of timesteps in the noise table."""

    prompts: ClassVar[Literal["classes", "texts"]]
    """What a sample is conditioned on: a class number, or a text."""
    can_teach: ClassVar[bool]
    """Whether `dmd2 teach` can train a teacher: it starts from random weights, without text encoders."""

    @property
    @abstractmethod
    def image(self) -> tuple[int, int, int]:
        """(C, H, W) of an image, in pixels."""

    @property
    @abstractmethod
    def classes(self) -> int:
        """Number of classes that samples may have; labels run from 0 to classes - 1."""

    @abstractmethod
    def check(self, distill: DistillConfig) -> None:
        """Raise ValueError for settings that this family cannot follow."""

    @model_validator(mode="wrap")
    @classmethod
    def _read_by_kind(cls, values: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        if cls is not FamilyConfig or isinstance(values, FamilyConfig):
            return validate(values)
        kind = values.get("kind") if isinstance(values, dict) else None
        if kind not in FAMILIES:
            raise ValueError(f"unknown kind of family {kind!r}; known: {', '.join(FAMILIES)}")
        return FAMILIES[kind].config.model_validate(values)


class FamilyEntry(NamedTuple):
    """A row of the table of families."""

    config: type[FamilyConfig]
    family: str | type
    """The class that implements `ModelFamily`, or where it is, `module:class`, to be imported when it is first needed."""


FAMILIES: dict[str, FamilyEntry] = {}
"""Kind -> its section of the Config and its implementation."""


def register_family(kind: str, config: type[FamilyConfig], family: str | type) -> None:
    """Add a family, after which recipes, stages and the command line can use it.

    Args:
        kind: Value of `family.kind`.
        config: Its section of the Config.
        family: The class that implements `dmd2.models.family.ModelFamily`, or "module:class".

    Raises:
        ValueError: If the kind is registered for another family.
    """
    entry = FamilyEntry(config, family)
    if FAMILIES.setdefault(kind, entry) != entry:
        raise ValueError(
            f"family kind {kind!r} is registered as {FAMILIES[kind].family!r}; choose another name"
        )


class AdmConfig(Section):
    """The size of an ADM U-Net (Dhariwal & Nichol 2021)."""

    resolution: PositiveInt
    """Height and width of an image, in pixels."""
    image_channels: PositiveInt
    """1 for grey images, 3 for colour."""
    classes: PositiveInt
    """Number of classes; labels run from 0 to classes - 1."""
    channels: PositiveInt
    """Channels at full resolution."""
    multipliers: tuple[PositiveInt, ...]
    """Channels at each resolution, as multiples of `channels`; each entry after the first halves the image."""
    blocks: PositiveInt
    """Residual blocks per resolution."""
    attention: tuple[PositiveInt, ...]
    """Resolutions with self-attention, in pixels along a side after folding by `patch`."""
    head_channels: PositiveInt = 64
    """Channels of an attention head."""
    embedding_multiplier: PositiveInt = 4
    """Width of the conditioning vector, as a multiple of `channels`."""
    patch: PositiveInt = 1
    """Side of the squares of pixels folded into channels before the first layer; 1 in the published network."""

    @property
    def bottleneck(self) -> int:
        """Height and width of the encoder's last output, in pixels."""
        return self.resolution // self.patch >> (len(self.multipliers) - 1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        halvings = len(self.multipliers) - 1
        if self.resolution % (self.patch * 2**halvings):
            raise ValueError(
                f"resolution {self.resolution} cannot be divided by patch {self.patch} and halved {halvings} times (multipliers)"
            )
        if self.channels % 4:
            raise ValueError(
                f"channels {self.channels} is not a multiple of 4, the smallest group of a GroupNorm"
            )
        for width in (self.channels * multiplier for multiplier in self.multipliers):
            if width > self.head_channels and width % self.head_channels:
                raise ValueError(
                    f"{width} channels do not divide into attention heads of {self.head_channels}"
                )
        return self


class EdmConfig(FamilyConfig):
    """The EDM family: an ADM U-Net under EDM preconditioning (Karras et al. 2022), on pixels or on a VAE's latents."""

    kind: Annotated[Literal["edm"], tyro.conf.Fixed] = "edm"
    network: AdmConfig
    vae_stride: NonNegativeInt = 0
    """Pixels per latent along each side (often 8) if the network works on the latents of a VAE; 0 = it works on pixels.
    The VAE is stored with the latents, the teacher and the student."""
    sigma_min: PositiveFloat = 0.002
    """Cleanest noise level, in units of the pixels (-1 to 1)."""
    sigma_max: PositiveFloat = 80.0
    """Noisiest noise level."""
    sigma_data: PositiveFloat = 0.5
    """Standard deviation of the images."""
    rho: PositiveFloat = 7.0
    """Spacing of the noise levels (eq. 5)."""
    num_timesteps: Annotated[int, Field(ge=2)] = 1000
    """Number of timesteps in the noise table."""
    prompts: ClassVar[Literal["classes", "texts"]] = "classes"
    can_teach: ClassVar[bool] = True

    @property
    def image(self) -> tuple[int, int, int]:
        """(C, H, W) of an image; behind a VAE, in colour."""
        if self.vae_stride:
            side = self.network.resolution * self.vae_stride
            return 3, side, side
        return self.network.image_channels, self.network.resolution, self.network.resolution

    @property
    def classes(self) -> int:
        """Classes that samples may have."""
        return self.network.classes

    def check(self, distill: DistillConfig) -> None:
        """Refuse settings that this family cannot follow."""
        if distill.guidance != 1:
            raise ValueError(
                f"distill.guidance is {distill.guidance}; an EDM network has no unconditional class, so only 1 is possible"
            )
        if distill.lora:
            raise ValueError("distill.lora is set; LoRA is not supported for the EDM family, leave it out")
        if distill.regression:
            raise ValueError(
                "distill.regression is set; the warm-up needs captions, which the EDM family does not use, leave it out"
            )
        size = self.network.bottleneck
        if distill.gan and (size < 4 or size & (size - 1)):
            raise ValueError(
                f"the bottleneck of family.network has {size}x{size} pixels; the discriminator head needs 4, 8, 16, ..."
            )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} must be below sigma_max {self.sigma_max}")
        return self


class StableConfig(FamilyConfig):
    """Stable Diffusion 1.5 and XL: U-Nets of diffusers on a VAE's latents, conditioned on text.

    Architecture, noise schedule, prediction type, text encoders and VAE are those of the teacher's folder."""

    kind: Annotated[Literal["sd15", "sdxl"], tyro.conf.Fixed]
    resolution: PositiveInt
    """Height and width of an image, in pixels; SDXL's network is also conditioned on it."""
    vae_stride: PositiveInt = 8
    """Pixels per latent along each side."""
    num_timesteps: Annotated[int, Field(ge=2)] = 1000
    """Number of timesteps in the noise table."""
    prompts: ClassVar[Literal["classes", "texts"]] = "texts"
    can_teach: ClassVar[bool] = False

    @property
    def image(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return 3, self.resolution, self.resolution

    @property
    def classes(self) -> int:
        """Classes that samples may have; the network is not conditioned on them."""
        return 2**16

    def check(self, distill: DistillConfig) -> None:
        """Refuse settings that this family cannot follow."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.resolution % self.vae_stride:
            raise ValueError(
                f"resolution {self.resolution} is not a multiple of {self.vae_stride}, the pixels of a latent"
            )
        return self


register_family("edm", EdmConfig, "dmd2.models.edm:Edm")
register_family("sd15", StableConfig, "dmd2.models.sd15:Sd15")
register_family("sdxl", StableConfig, "dmd2.models.sdxl:Sdxl")


class DataConfig(Section):
    """How images become shards."""

    holdout: NonNegativeInt = 0
    """Number of images that are held out as the real images of the evaluation: a random sample of all. Archives are read twice
    for it, and of equal images in archives one is held out and the others are left out."""
    images_per_shard: PositiveInt = 1000
    """Largest number of images in a tar file."""
    shard_mb: PositiveFloat = 256.0
    """Size in megabytes (1e6 bytes) at which a tar file is closed, even with fewer images than `images_per_shard`."""
    format: Literal["tar", "lmdb"] = "tar"
    """`tar`: tar files that are streamed, for data sets of any size. `lmdb`: one LMDB table of decoded images per split, for small
    data sets."""
    filter: Literal["bicubic", "lanczos", "bilinear", "box"] = "bicubic"
    """Resampling filter of the resize, with antialiasing; FID is commonly computed on images resized with `bicubic`."""
    background: str = "white"
    """Colour behind transparent pixels."""
    min_side: NonNegativeInt = 0
    """Images whose shorter side has fewer pixels than this are left out; 0 = no limit."""
    max_aspect: NonNegativeFloat = 0.0
    """Images whose longer side is more than this many times the shorter are left out; 0 = no limit."""
    caption_column: str = ""
    """Column or field with the captions; empty = the first of text, caption, captions, prompt, prompts, description."""
    label_column: str = ""
    """Column or field with the labels; empty = label."""
    allow_empty_captions: bool = False
    """Use images without a caption too, if the network is told by texts; otherwise they are left out and counted."""
    drop_duplicates: bool = False
    """Leave out images whose files are equal to an earlier one; this reads every file a second time."""
    max_megapixels: PositiveFloat = 64.0
    """Images of more pixels (in millions) count as unreadable and are not decoded: a small file can hold a huge picture, and each
    process needs up to 12 bytes per pixel."""
    max_broken: NonNegativeInt = 10
    """Number of unreadable files that are skipped and reported; with more, sharding fails."""

    @field_validator("background")
    @classmethod
    def _check(cls, name: str) -> str:
        ImageColor.getrgb(name)  # raises ValueError with the unknown name
        return name


class LoaderConfig(Section):
    """The order in which shards are read, and how fast."""

    shuffle_block: PositiveInt = 8
    """Number of shards whose samples are shuffled together."""
    lanes: PositiveInt = 1
    """Number of parts of an epoch that are read side by side. With a multiple of the number of processes, each process reads
    only its own shards. The order of samples does not depend on the number of processes."""
    prefetch: NonNegativeInt = 2
    """Number of batches loaded ahead of the current step; 0 = each batch is loaded when it is needed."""
    threads: PositiveInt = 1
    """Number of threads that read and decode."""
    cache_gb: PositiveFloat = 50.0
    """Size in gigabytes of the local cache of shards from a bucket, shared by all processes of a machine."""


class EncodeConfig(Section):
    """How images become latents."""

    batch: PositiveInt = 8
    """Number of images that the VAE encodes at once; at 1024 pixels each takes gigabytes of memory."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the VAE and the text encoders. SDXL's VAE overflows in float16; in `bfloat16` it does not, but is less exact."""
    text: bool = False
    """Encode the captions too, with the text encoders of the VAE's pipeline, so that training does not. Text embeddings often need more
    space than latents."""


class OptimizerConfig(Section):
    """AdamW with a linear learning-rate warm-up, followed by a constant or linearly decaying rate."""

    lr: PositiveFloat
    """Learning rate."""
    warmup_steps: NonNegativeInt = 0
    """Steps (critic updates) over which the learning rate rises linearly to `lr`. The reference asks for 500 but counts each process, so
    its runs took 500 / GPUs: 71 on ImageNet's 7, 8 on 64. The recipes take 500, and 100 where the run has 2,000 steps."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay rates of the two moments of Adam."""
    final_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Learning rate at the last step as a fraction of `lr`; after the warm-up it decays linearly to it. 1 = constant."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay."""
    max_grad_norm: NonNegativeFloat = 10.0
    """Gradient clipping: largest global norm of the gradients; 0 = no clipping."""
    moments: Literal["float32", "8bit"] = "float32"
    """How the two moments of Adam are stored. `8bit`: as codes with a scale per 64 values, rounded at random so that the mean is kept
    (Dettmers et al. 2022): 2.1 instead of 8 bytes per weight. Weights of fewer than 4,096 values keep float32."""
    ema: tuple[Fraction, ...] = ()
    """Decay per update of each exponential moving average (EMA) of the weights. The last EMA is the result; without any, the
    weights themselves are."""


class TeachConfig(Section):
    """Training of a small EDM teacher, for demos, tests and ablations."""

    steps: PositiveInt = 1000
    """Number of optimizer steps."""
    batch: PositiveInt = 64
    """Number of images per optimizer step, over all processes."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3, ema=(0.999,))
    p_mean: float = -1.2
    """Mean of ln(sigma) (Karras et al. 2022, table 1)."""
    p_std: PositiveFloat = 1.2
    """Standard deviation of ln(sigma)."""
    log_every: PositiveInt = 50
    """Number of steps between lines of the log."""
    save_every: PositiveInt = 500
    """Number of steps between checkpoints."""


class DmdConfig(Section):
    """The distribution-matching term (DMD2, sec. 3 and 4)."""

    min_timestep_fraction: Fraction = 0.02
    """Smallest timestep at which the scores of teacher and critic are compared, as a fraction of the noise table."""
    max_timestep_fraction: Fraction = 0.98
    """Largest such timestep, inclusive."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_timestep_fraction >= self.max_timestep_fraction:
            raise ValueError(
                f"min_timestep_fraction {self.min_timestep_fraction} must be below max_timestep_fraction {self.max_timestep_fraction}"
            )
        return self


class GanConfig(Section):
    """The GAN term: a head on the critic's features, under noise (DMD2, sec. 4.3)."""

    student_weight: PositiveFloat
    """Weight in the student's loss."""
    critic_weight: PositiveFloat
    """Weight in the critic's loss."""
    max_timestep_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The discriminator head sees samples noised at timesteps below this fraction of the noise table."""
    reuse_denoising_pass: bool = False
    """The discriminator head reads the critic's features of the fakes from the forward pass of the denoising loss, with the
    same noise and timestep, which saves one forward pass per step."""


def _without_password(uri: str) -> str:
    if without_secrets(uri) != uri:
        raise ValueError(
            "the address holds a password or a token, which every manifest would show; copy the file and give its path"
        )
    return uri


class WeightsConfig(Section):
    """A file of weights of a feature network, with its digest."""

    uri: Annotated[str, AfterValidator(_without_password)]
    """Local path, gs:// or https: address of the file."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{8,64}$")]
    """The sha256 of the file, or its first 8 or more hex digits; a file with another digest is not loaded."""


INCEPTION = WeightsConfig(
    uri="https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
    sha256="f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
)
"""clean-fid's network: the published TorchScript program or, from `dmd2 mirror`, a `.safetensors` file, of which nothing is executed."""


class BestConfig(Section):
    """Choice of the checkpoint that becomes the student: the last one, or the one whose samples have the smallest Fréchet distance
    to training samples. Held-out images are not used, because the evaluation with them would be biased."""

    images: NonNegativeInt = 0
    """Number of student samples that are scored at each checkpoint, and of training samples they are compared with. With fewer
    than a few thousand the choice is mostly noise. 0 = no scores; the last checkpoint is the student."""
    features: Literal["efficientnet", "inception"] = "inception"
    """Network whose features are compared; see evaluate.features."""
    inception: WeightsConfig = INCEPTION
    """clean-fid's network: the published TorchScript program or, from `dmd2 mirror`, a `.safetensors` file, of which nothing is executed."""
    seed: NonNegativeInt = 20
    """Seed of the noise of the samples, the same at every checkpoint."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.images == 1:
            raise ValueError(
                "best.images is 1; a distance between samples needs at least 2, better thousands"
            )
        return self


class LoraConfig(Section):
    """Low-rank updates (Hu et al. 2021) instead of whole networks: weight + alpha / rank * up @ down."""

    rank: PositiveInt = 64
    """Rank of an update."""
    alpha: PositiveFloat = 8.0
    """Scale of an update is alpha / rank; the reference's 8 / 64 is 0.125."""
    shared_base: bool = False
    """Train the critic as a low-rank update too, of the same frozen weights as the student: teacher, student and critic share
    one copy. Otherwise the critic is a whole network, as published."""


class RegressionConfig(Section):
    """Warm-up of a one-step student on the teacher's ODE pairs (DMD2, sec. 4.5 and appendix on SDXL)."""

    metric: Literal["lpips", "mse"] = "lpips"
    """Distance of two images: `lpips`, with average pooling as in the reference, or the mean squared error of pixels. It is computed in
    the precision of the networks (`distill.dtype`)."""
    vgg: WeightsConfig = WeightsConfig(
        uri="https://download.pytorch.org/models/vgg16-397923af.pth", sha256="397923af"
    )
    """Feature network of `lpips`, as published by torchvision; read as tensors only."""
    decoder: str = ""
    """Folder or hub name of the VAE that decodes the images, such as the tiny madebyollin/taesdxl; empty = the teacher's."""


class EngineConfig(Section):
    """How the training uses the hardware. These settings change the result only by rounding, so a run can be resumed with
    others."""

    micro_batch: NonNegativeInt = 0
    """Number of images per process and forward pass; gradients are accumulated until the process has done its part of the
    batch. 0 = the whole part at once."""
    shards: NonNegativeInt = 0
    """Number of processes that trained weights, gradients and optimizer states are sharded over (FSDP); groups of this size are
    replicas (HSDP). 1 = no sharding (DDP), 0 = the processes of one machine."""
    weights: Literal["auto", "resident", "sharded"] = "auto"
    """`resident`: every process keeps whole networks in the compute precision, all-gathered once per optimizer step. `sharded`:
    a unit is all-gathered when it is needed and freed after. `auto`: `resident` if that leaves memory for activations."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Activations that are recomputed in the backward pass instead of stored. `full`: all inside a unit, which saves most memory
    for a third more compute. `selective`: all but the outputs of attention and convolutions; without `compile` it takes more time of
    the host than `full`."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile each unit with torch.compile: it takes minutes at the start and makes steps faster. `auto`: on GPUs, where there are
    triton, a C compiler and Python's headers, unless `deterministic`; the log says how it was decided."""
    compile_cache: str = ""
    """Folder, local or on a bucket, that keeps compiled graphs for later starts: one file per GPU of a machine. Whoever can write there can
    run code in the training. Empty: they are kept as long as the machine's own cache."""
    offload_teacher: bool = False
    """Keep the teacher's weights in the host's memory, and copy each unit to the device for its calls: less device memory, and a
    copy of the teacher over PCIe for each micro-batch of a student update."""
    deterministic: bool = False
    """Use deterministic kernels, so that two runs on the same hardware and number of processes are bit-identical; slower."""
    hang_timeout_s: PositiveFloat = 1800.0
    """Seconds without a finished step after which a process writes its stack traces and ends, so that it can be restarted."""
    compile_timeout_s: PositiveFloat = 3600.0
    """The same for a step in which a process compiles, while the others wait for it; at least `hang_timeout_s`."""

    @field_validator("compile", mode="before")
    @classmethod
    def _read_old_switch(cls, value: Any) -> Any:
        """Version 0.1.0 stored a truth value."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.compile_cache and self.compile == "off":
            raise ValueError(
                f"compile_cache is {self.compile_cache!r}, but compile is off, so there are no graphs to keep; leave one of them out"
            )
        return self


class DistillConfig(Section):
    """Training of student and critic."""

    steps: PositiveInt
    """Number of critic updates; the student is updated once per `critic_updates` of them."""
    batch: PositiveInt
    """Number of images per step, over all processes."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute precision of all networks (mixed precision). Trained weights are stored in float32, the teacher's in this."""
    no_grad_dtype: Literal["same", "tf32"] = "same"
    """Precision of the calls of student and critic without gradient: rollouts, fakes that only the critic sees, and the critic's score.
    `same`: that of `dtype`. `tf32`: float32 with TF32 products on GPUs, as the reference does for SD and SDXL, at about twice the cost
    of these calls; weights are then gathered in float32."""
    student: OptimizerConfig
    critic: OptimizerConfig
    critic_updates: PositiveInt = 5
    """Critic updates per student update: the two time-scale rule (DMD2, sec. 4.2)."""
    student_timesteps: tuple[NonNegativeInt, ...] = (999,)
    """Timesteps at which the student is called, noisiest first, as in diffusers; one timestep makes a one-step student."""
    inputs: Literal["rollout", "noised-real"] = "rollout"
    """Inputs of a student of several steps while it is trained: `rollout`, samples of its own earlier steps (backward simulation,
    DMD2 sec. 4.5), or `noised-real`, real samples noised to one of its timesteps."""
    fake_prompts: Literal["batch", "independent", "list"] = "batch"
    """Classes or texts that rollouts are conditioned on: `batch`, those of the real samples of the step; `independent`, classes drawn
    uniformly, or the captions of other real samples; `list`, those of a file, which must then be given as `--prompts`. Where a file is
    given it is drawn from in any case."""
    first_stage: str = "teacher"
    """Recipe whose run student and critic start from, which must then be given as `--start`; `teacher` = none is needed."""
    continue_rollouts: bool = False
    """Between two student updates, continue one rollout by one student step per critic update and train the critic on the
    sample of every step: 1 network call per sample instead of (steps + 1) / 2 on average."""
    lora: LoraConfig | None = None
    guidance: NonNegativeFloat = 1.0
    """Scale of the teacher's classifier-free guidance; 1 = none."""
    dmd: DmdConfig | None = DmdConfig()
    """None = the GAN alone: the teacher is not asked, and the critic still learns to denoise the student's samples."""
    gan: GanConfig | None = None
    extra_terms: Annotated[dict[str, dict[str, bool | int | float | str]], tyro.conf.Fixed] = {}
    """Further loss terms: the name of a row of `training.build.TERMS` -> its settings, which are checked when the trainer is
    built. Set by a recipe, not on the command line."""
    regression: RegressionConfig | None = None
    """If set, only the student is trained, by regression on pairs of the teacher, without DMD and GAN; `--data` is a folder of
    pairs."""
    log_every: PositiveInt = 50
    """Number of steps between lines of the log and points of the curves."""
    preview_every: PositiveInt = 500
    """Number of steps between preview grids."""
    preview_vae: str = ""
    """Folder or hub name of the VAE that decodes previews, such as the tiny madebyollin/taesdxl; empty = the teacher's."""
    save_every: PositiveInt = 500
    """Number of steps between checkpoints."""
    keep_checkpoints: PositiveInt = 2
    """Number of newest checkpoints that are kept, in addition to the best one if checkpoints are scored."""
    best: BestConfig = BestConfig()

    def term_settings(self) -> dict[str, Section | dict[str, bool | int | float | str]]:
        """The loss terms that are switched on, in order: name -> settings."""
        own: dict[str, Section | None] = {"dmd": self.dmd, "gan": self.gan}
        return {name: section for name, section in own.items() if section} | self.extra_terms

    @model_validator(mode="after")
    def _check(self) -> Self:
        if twice := {"dmd", "gan"} & self.extra_terms.keys():
            raise ValueError(f"extra_terms has {min(twice)}, which has a section of its own; use that one")
        if not self.term_settings() and self.regression is None:
            raise ValueError("dmd and gan are both None, so the student has no loss; set one of them")
        if self.regression and self.term_settings():
            raise ValueError(
                "regression cannot be combined with dmd or gan; set both to None, and start the distillation from the run of the regression"
            )
        if self.regression and self.best.images:
            raise ValueError(
                "best.images is set, but a regression sees no training samples to compare with; set it to 0"
            )
        if self.fake_prompts != "batch" and (self.regression or self.inputs == "noised-real"):
            raise ValueError(
                f"fake_prompts is {self.fake_prompts!r}, but a regression and noised real inputs have prompts of their own; set it to batch"
            )
        if self.no_grad_dtype == "tf32" and self.lora:
            raise ValueError(
                "no_grad_dtype is tf32, but the base of a LoRA is stored in the precision of the teacher; set it to same"
            )
        if self.continue_rollouts and (self.inputs != "rollout" or len(self.student_timesteps) < 2):
            raise ValueError(
                "continue_rollouts needs a student of several steps trained on rollouts; set it to False"
            )
        if (
            list(self.student_timesteps) != sorted(set(self.student_timesteps), reverse=True)
            or not self.student_timesteps
        ):
            raise ValueError(
                f"student_timesteps {self.student_timesteps} must fall, noisiest first, and have at least one timestep"
            )
        return self


class EvaluateConfig(Section):
    """The scores of a student, and what they are compared with."""

    protocol: str = "folder"
    """What the other values are compared with on the card of a result: a row of the table in `evaluation/protocols.py`."""
    metrics: tuple[str, ...] = ("fid",)
    """Metrics that are computed: names of rows of the table in `evaluation/metrics.py`."""
    features: Literal["classifier", "efficientnet", "inception"] = "inception"
    """Feature network. `inception`: clean-fid's. `efficientnet`: EfficientNet-Lite0 trained on ImageNet, from an installed package.
    `classifier`: a small network that the stage trains on the training shards."""
    inception: WeightsConfig = INCEPTION
    """clean-fid's network: the published TorchScript program or, from `dmd2 mirror`, a `.safetensors` file, of which nothing is executed."""
    clip: str = "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"
    """The CLIP of the metric `clip`: a folder of transformers, local or gs://, or a name on the hub, `@revision` to pin it. The default
    is the one of DMD2's paper."""
    dinov2: str = "facebook/dinov2-large"
    """The DINOv2 of the metric `dinov2_fd`, named like `clip`."""
    images: PositiveInt = 50_000
    """Number of generated images per score."""
    prompts: Literal["reference", "balanced"] = "reference"
    """What is sampled. `reference`: the classes or captions of the reference images. `balanced`: all classes, equally often."""
    resize: NonNegativeInt = 0
    """Height and width to which images are cut at their centre and reduced (Lanczos) before the feature network, which has its own size;
    0 = they are not."""
    batch: PositiveInt = 128
    """Number of images that share a seed; a network call takes at most 64 of them."""
    teacher_steps: Annotated[int, Field(ge=2)] = 18
    """Number of steps of the teacher's sampler, not of network calls. EDM: Heun's method, 2 * steps - 1 calls. Others: the scheduler of
    the pipeline, one call per step, or two with guidance: 50 guided steps are 100 calls."""
    teacher_guidance: NonNegativeFloat = 1.0
    """Scale of the teacher's classifier-free guidance, which doubles the network calls of a step; 1 = none."""
    seed: NonNegativeInt = 10
    """Seed of the noise, the same for student and teacher."""
    baselines: tuple[str, ...] = ()
    """Further models that are scored, as NAME=SOURCE:STEPS or NAME=SOURCE:STEPS:GUIDANCE: pipelines of diffusers (LCM, Lightning,
    Turbo) by folder, local or gs://, or by name on the hub, and folders of runs (also of adopted ones), packages and teachers."""


class PairsConfig(Section):
    """Pairs of noise and teacher sample, for the regression warm-up of a one-step student."""

    count: PositiveInt = 10_000
    """Number of pairs."""
    batch: PositiveInt = 8
    """Number of pairs that are sampled at once."""
    steps: Annotated[int, Field(ge=2)] = 50
    """Number of steps of the solver: Euler's method with trailing spacing, from the noisiest timestep on; EDM: Heun's method."""
    guidance: NonNegativeFloat = 8.0
    """Scale of the teacher's classifier-free guidance; 1 = none."""
    per_shard: PositiveInt = 1000
    """Number of pairs in a tar file."""


class GateConfig(Section):
    """The scores that a student must reach to be packaged. A condition is met or violated if it is so over the whole interval of 95 %;
    otherwise there is not enough evidence, and the student is neither accepted nor rejected."""

    factor: PositiveFloat = 1.25
    """Largest accepted score of the student as a multiple of the teacher's: student <= factor * teacher if smaller scores are better,
    student >= teacher / factor if larger ones are."""
    metric: str = "fid"
    """The metric that `factor` and `regression` are about; one of `evaluate.metrics`."""
    regression: NonNegativeFloat = 1.1
    """The same as `factor`, as a multiple of the score of the last accepted student of the same teacher, if there is one; 0 = it is not
    compared."""
    rules: tuple[str, ...] = ()
    """Further conditions: METRIC<=NUMBER or METRIC>=NUMBER, where *teacher or *previous after the number makes it a multiple of the
    teacher's or of the last accepted student's score, as in `clip>=0.3` and `kid<=1.5*teacher`."""
    teacher: tuple[str, ...] = ("fid<=300",)
    """Bounds of the scores of the teacher itself, of those metrics that are computed: no student of a teacher beyond them is accepted."""


class Config(Section):
    """All settings of a run. Together with the data and the teacher they determine its result."""

    recipe: Annotated[str, tyro.conf.Fixed]
    """Name of the recipe that this Config was made from."""
    seed: NonNegativeInt = 0
    """Seed of all random numbers of sharding and training; each number depends on the seed, the step and the row."""
    family: SerializeAsAny[FamilyConfig]
    data: DataConfig = DataConfig()
    loader: LoaderConfig = LoaderConfig()
    encode: EncodeConfig = EncodeConfig()
    pairs: PairsConfig = PairsConfig()
    teach: TeachConfig = TeachConfig()
    distill: DistillConfig
    engine: EngineConfig = EngineConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    gate: GateConfig = GateConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        top = max(self.distill.student_timesteps)
        if top >= self.family.num_timesteps:
            raise ValueError(
                f"distill.student_timesteps has {top}, beyond the {self.family.num_timesteps} timesteps of the family"
            )
        self.family.check(self.distill)
        rules = [("rules", re.split("[<>=]", rule)[0].strip()) for rule in self.gate.rules]
        for name in (name for name in self.evaluate.metrics if "," in name):
            raise ValueError(f"evaluate.metrics has {name!r}; write names apart, as {name.replace(',', ' ')}")
        for name, metric in [("metric", self.gate.metric), *rules]:
            if metric not in self.evaluate.metrics:
                raise ValueError(
                    f"gate.{name} is {metric!r}, which is not among evaluate.metrics {self.evaluate.metrics}; add it to them"
                )
        if self.engine.micro_batch > self.distill.batch:
            raise ValueError(
                f"engine.micro_batch {self.engine.micro_batch} is larger than distill.batch {self.distill.batch}; lower it"
            )
        if self.engine.offload_teacher and self.distill.lora:
            raise ValueError(
                "engine.offload_teacher is on, but with distill.lora the teacher's weights are those that the student computes with; turn it off"
            )
        return self


def in_first_spelling(section: Section) -> dict[str, Any]:
    """The JSON of a section with the oldest names of its fields (`RENAMED`); names in nested sections are today's."""
    first = {new: old for old, new in RENAMED.get(type(section).__name__, {}).items()}
    return {first.get(name, name): value for name, value in section.model_dump(mode="json").items()}


def _sentence(error: ValidationError) -> str:
    """pydantic's first error as a sentence: `steps: Input should be greater than 0, not -1`."""
    first = error.errors()[0]
    message, place = first["msg"].removeprefix("Value error, "), ".".join(map(str, first["loc"]))
    value = "" if first["type"] in ("value_error", "missing") else f", not {first['input']!r}"
    return f"{place + ': ' if place else ''}{message}{value}"
