"""What Stable Diffusion 1.5 and XL have in common: the U-Net of diffusers, wrapped, and the noise schedule of its scheduler.

A family is made from a pipeline folder of diffusers: the configs of the U-Net and the scheduler determine the network and the
process. The text encoders and the VAE are loaded when they are first used, and are not trained. `published_pipeline` gives
such folders, without weights, of the published models.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from dmd2.batch import Batch, Conditioning, CondPair
from dmd2.config import EncodeConfig, LoraConfig, StableConfig
from dmd2.data.latents import sample_posterior
from dmd2.data.loader import RawBatch
from dmd2.denoiser import Denoiser
from dmd2.diffusion import Diffusion
from dmd2.encoders.pipeline_folder import VAE_WEIGHTS, copy_as_float32, fetch_configs, find_pipeline
from dmd2.encoders.text import TextEncoders
from dmd2.encoders.vae import Vae, load_vae
from dmd2.encoders.weight_files import load_weights
from dmd2.errors import Refused
from dmd2.io.json_file import read_json
from dmd2.io.storage import fetch_file
from dmd2.io.tensors import save_tensors, to_device
from dmd2.models.convert.single_file import convert_single_file
from dmd2.models.convert.student_weights import read_critic, read_unet
from dmd2.models.family import AdoptedWeights, ForeignTeacher, Prompt
from dmd2.models.heads import ConvHead
from dmd2.models.schedulers import (
    PREDICTIONS,
    PROCESS,
    SCHEDULER,
    ZERO_SNR,
    check_sampler,
    complete_scheduler_config,
    noise_schedule,
)
from dmd2.models.stable_forms import (
    CHECKPOINT,
    is_uniform,
    sampler_settings,
    write_low_rank,
    write_single_file,
    write_workflow,
)
from dmd2.models.unet import Unet, check_unet, float32_outputs
from dmd2.parallel import ranks
from dmd2.rng import Rng
from dmd2.sampler import Timesteps

UNET = "unet/config.json"
STUDENT_SCHEDULER = "LCMScheduler"
WEIGHTS = f"unet/{VAE_WEIGHTS}"
UNET_SIZE = (
    "block_out_channels",
    "layers_per_block",
    "transformer_layers_per_block",
    "cross_attention_dim",
    "down_block_types",
)
CLIP_TOKENS = 77
"""Number of tokens that a CLIP text encoder takes."""

FROZEN = (
    "vae",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "scheduler",
    "model_index.json",
)
"""Files and folders of a pipeline that training does not change."""


class Stable(ABC):
    """Implements `ModelFamily`, except for `_conditioning` and the class variables without a value."""

    pipeline: ClassVar[str]
    """Class name of the pipeline in diffusers."""
    embedding: ClassVar[str | None]
    """`addition_embed_type` that the U-Net must have."""
    files: ClassVar[tuple[str, ...]] = (
        "network.json",
        "unet/*",
        *(n if "." in n else f"{n}/*" for n in FROZEN),
    )
    lora_targets: ClassVar[tuple[str, ...]] = (
        "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
        "conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv",
    )  # fmt: skip
    """Those of the published LoRA of SDXL."""

    def __init__(self, config: StableConfig, folder: Path | None, vae: str) -> None:
        """`folder` is a pipeline of diffusers, by default the published one without weights; of its U-Net, only the config is
        read here."""
        folder = folder or published_pipeline(config.kind)
        self.config, self.folder, self.vae_place = config, folder, vae or folder / "vae"
        self.unet = read_json(folder / UNET)
        self.scheduler = complete_scheduler_config(read_json(folder / SCHEDULER))
        check_unet(self.unet, folder, config.kind, self.embedding)
        self.diffusion = Diffusion(
            noise_schedule(self.scheduler), PREDICTIONS[self.scheduler["prediction_type"]]
        )
        if len(self.diffusion) != config.num_timesteps:
            raise Refused(
                f"the scheduler in {folder} has {len(self.diffusion)} timesteps, family.num_timesteps is {config.num_timesteps}; set both alike"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        side = self.config.resolution // self.config.vae_stride
        return self.unet["in_channels"], side, side

    @property
    def features(self) -> tuple[int, int, int]:
        """(C, s, s) of the output of the mid block."""
        widths = self.unet["block_out_channels"]
        side = self.shape[1] >> (len(widths) - 1)
        return widths[-1], side, side

    @property
    def manifest_facts(self) -> dict[str, Any]:
        facts = {"predicts": self.scheduler["prediction_type"], "scheduler": self.scheduler["_class_name"]}
        return facts | {"zero_terminal_snr": bool(self.diffusion.schedule.alpha[-1] == 0)}

    @cached_property
    def text_encoders(self) -> TextEncoders:
        return TextEncoders(find_pipeline(str(self.folder), text=True), EncodeConfig(), ranks.device())

    @cached_property
    def vae(self) -> Vae:
        return load_vae(self.vae_place)

    @cached_property
    def empty_text(self) -> tuple[Tensor, Tensor | None]:
        """The embeddings of an empty text: (1, L, D), and pooled (1, P) with two encoders."""
        return self.text_encoders.embed([""])

    def network(self) -> nn.Module:
        make: Any = UNet2DConditionModel
        return Unet(make.from_config(self.unet))

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        return cast(Unet, network).blocks()

    def head(self) -> nn.Module:
        return ConvHead(*self.features[:2])

    def read(self, batch: RawBatch, rng: Rng) -> Batch:
        if tuple(batch.image.shape[2:]) != self.shape or batch.image.ndim != 5:
            raise Refused(
                f"the data holds arrays of shape {tuple(batch.image.shape[1:])}, the network works on latents of shape "
                f"(2, {', '.join(map(str, self.shape))}); make them with the VAE of the teacher and this recipe's resolution"
            )
        x = sample_posterior(to_device(batch.image, rng.device), rng.normal(*self.shape))
        return Batch(x, *self._read_condition(batch, rng), rng)

    def read_pairs(self, batch: RawBatch, rng: Rng) -> Batch:
        return Batch(batch.image.float(), *self._read_condition(batch, rng), rng)

    def _read_condition(self, batch: RawBatch, rng: Rng) -> CondPair:
        """The conditioning of a batch from stored embeddings of its captions, or else by the text encoders."""
        if not batch.embeddings:
            return self.condition(batch.text)
        return self._stored_condition([to_device(part, rng.device).float() for part in batch.embeddings])

    def _stored_condition(self, embeddings: Sequence[Tensor]) -> CondPair:
        """The conditioning from stored embeddings of the prompts, whose sizes must be those that the network takes."""
        states, *pooled = embeddings
        wanted = self.placeholder_condition(len(states))
        for name, part in zip(("text", "pooled"), (states, *pooled), strict=False):
            if name not in wanted or part.shape != wanted[name].shape:
                raise Refused(
                    f"the data holds embeddings {name} {tuple(part.shape[1:])}, the network takes "
                    f"{tuple(wanted[name].shape[1:]) if name in wanted else 'none'}; make them with its text encoders"
                )
        return self._conditioning(states, pooled[0] if pooled else None)

    def to_pixels(self, x: Tensor) -> Tensor:
        return self.vae.to_pixels(x)

    def decode(self, x: Tensor) -> Tensor:
        return self.vae.decode(x)

    def decode_unchecked(self, x: Tensor) -> Tensor:
        return self.vae.decode_unchecked(x)

    def condition(self, prompts: Sequence[Prompt]) -> CondPair:
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise Refused(f"{prompt!r} is not a text; this network is conditioned on texts")
        return self._conditioning(*self.text_encoders.embed(cast(Sequence[str], prompts)))

    @abstractmethod
    def _conditioning(self, states: Tensor, pooled: Tensor | None) -> CondPair:
        """The conditioning from the embeddings of texts: hidden states (B, L, D), and pooled (B, P) with two encoders."""

    def placeholder_condition(self, rows: int) -> Conditioning:
        text = torch.zeros(rows, self._text_tokens(), self.unet["cross_attention_dim"])
        if not (width := self.unet.get("projection_class_embeddings_input_dim")):
            return Conditioning(text=text)
        pooled = width - 6 * self.unet["addition_time_embed_dim"]
        return Conditioning(text=text, pooled=torch.zeros(rows, pooled), size=torch.ones(rows, 6))

    def _text_tokens(self) -> int:
        """Number of tokens of a text; `CLIP_TOKENS` if the pipeline folder has no text encoders."""
        path = self.folder / "text_encoder" / "config.json"
        return int(read_json(path)["max_position_embeddings"]) if path.exists() else CLIP_TOKENS

    def sample_teacher(
        self, network: nn.Module, eps: Tensor, pair: CondPair, steps: int, guidance: float
    ) -> Tensor:
        import diffusers

        kind = getattr(diffusers, self.scheduler["_class_name"])
        return self._sample(network, kind.from_config(self.scheduler), eps, pair, steps, guidance)

    def solve_ode(
        self, network: nn.Module, eps: Tensor, pair: CondPair, steps: int, guidance: float
    ) -> Tensor:
        from diffusers import EulerDiscreteScheduler

        make: Any = EulerDiscreteScheduler
        scheduler = make(**self._process_settings(), timestep_spacing="trailing")
        return self._sample(network, scheduler, eps, pair, steps, guidance)

    def _sample(
        self, network: nn.Module, scheduler: Any, eps: Tensor, pair: CondPair, steps: int, guidance: float
    ) -> Tensor:
        """Samples by the pipeline of diffusers with this scheduler."""
        if guidance < 1:
            raise Refused(f"guidance is {guidance}; diffusers guides above 1 only, and 1 is none")
        cond, uncond = pair
        pooled = (
            {"pooled_prompt_embeds": cond["pooled"], "negative_pooled_prompt_embeds": uncond["pooled"]}
            if "pooled" in cond
            else {}
        )
        pipe = self._pipeline(network, scheduler)
        with float32_outputs(cast(Unet, network).unet):
            out: Tensor = pipe(
                prompt_embeds=cond["text"],
                negative_prompt_embeds=uncond["text"],
                **pooled,
                latents=eps,
                height=self.config.resolution,
                width=self.config.resolution,
                num_inference_steps=steps,
                guidance_scale=guidance,
                output_type="latent",
            ).images
        return out

    def _pipeline(self, network: nn.Module, scheduler: Any) -> Any:
        """The pipeline of diffusers with this network and scheduler, without text encoders."""
        import diffusers

        parts: dict[str, Any] = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
        if self.embedding is None:
            parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
            parts["requires_safety_checker"] = False
        pipe = getattr(diffusers, self.pipeline)(
            vae=self.vae.network,
            unet=cast(Unet, network).unet,
            scheduler=scheduler,
            **parts,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def teacher_calls(self, steps: int, guidance: float) -> int:
        import diffusers

        scheduler = getattr(diffusers, self.scheduler["_class_name"]).from_config(self.scheduler)
        scheduler.set_timesteps(steps)
        return len(scheduler.timesteps) * (2 if guidance > 1 else 1)

    def denoiser(self, network: nn.Module) -> Denoiser:
        return Denoiser(network, self.diffusion)

    def save(self, weights: dict[str, Tensor], folder: Path, timesteps: Timesteps) -> None:
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder)
            if path.is_file() and (name.parts[0] in FROZEN or str(name) == UNET):
                copy_as_float32(path, folder / name)
        unet = {name.removeprefix("unet."): value.float() for name, value in weights.items()}
        save_tensors(unet, folder / WEIGHTS)
        if timesteps:
            self._write_sampler(folder)

    def _write_sampler(self, folder: Path) -> None:
        """Write the scheduler that samples a student in diffusers: LCM's steps denoise and add noise of the next timestep, as ours."""
        # Without effect on a call with timesteps; without them diffusers warns of a call as the model card's.
        quiet = {"steps_offset": 1, "original_inference_steps": len(self.diffusion)}
        config = {"_class_name": STUDENT_SCHEDULER, **quiet} | self._process_settings()
        (folder / SCHEDULER).write_text(json.dumps(config, indent=1) + "\n")
        index = read_json(folder / "model_index.json") | {"scheduler": ["diffusers", STUDENT_SCHEDULER]}
        # Diffusers requires all components in the index; the safety checker of Stable Diffusion 1.5 is not part of the folder.
        gone = [n for n, part in index.items() if isinstance(part, list) and not (folder / n).is_dir()]
        index |= {name: [None, None] for name in gone}
        if "requires_safety_checker" in index:
            index["requires_safety_checker"] = False
        (folder / "model_index.json").write_text(json.dumps(index, indent=1) + "\n")

    def _process_settings(self) -> dict[str, Any]:
        """The settings of the scheduler that say what the network was trained for, which all schedulers understand."""
        return {name: self.scheduler[name] for name in PROCESS if name in self.scheduler}

    def weights(self, folder: Path) -> dict[str, Tensor]:
        return {
            f"unet.{name}": value.float()
            for name, value in load_weights(folder / "unet", VAE_WEIGHTS).items()
        }

    def write_forms(
        self, folder: Path, timesteps: Timesteps, single_file: str, license: str = ""
    ) -> dict[str, str]:
        with torch.device("meta"):
            names = [name.removeprefix("unet.") for name in self.network().state_dict()]
        programs = sampler_settings(self.diffusion, timesteps) if self._has_published_size else ""
        forms = write_low_rank(folder, names, programs, license)
        if single_file != "none":
            process = {key: self.scheduler.get(key) for key in ("prediction_type", ZERO_SNR)}
            forms |= write_single_file(folder, self.pipeline, process, single_file, programs, license)
        if CHECKPOINT in forms and programs and is_uniform(self.diffusion, timesteps):
            forms |= write_workflow(folder, self.config.resolution, len(timesteps))
        return forms

    @property
    def _has_published_size(self) -> bool:
        """Whether the U-Net has the shape by which other programs recognise its kind."""
        published = read_json(published_pipeline(self.config.kind) / UNET)
        return all(self.unet.get(name) == published.get(name) for name in UNET_SIZE)

    def usage(self, timesteps: Timesteps) -> str:
        return f"""With diffusers alone:

```python
from diffusers import {self.pipeline}
pipe = {self.pipeline}.from_pretrained("path/of/this/folder")
image = pipe("a prompt", timesteps={list(timesteps)}, guidance_scale=0).images[0]
```

Use exactly these timesteps and no guidance; a negative prompt has no effect."""

    @classmethod
    def resolve(cls, config: StableConfig, source: str, base: str, vae: str, scratch: Path) -> ForeignTeacher:
        """From a pipeline folder of diffusers, or a checkpoint in a single file, which diffusers converts."""
        if source.endswith((".safetensors", ".ckpt")):
            convert_single_file(
                fetch_file(source), fetch_configs(base) if base else None, scratch / "pipeline"
            )
            source = str(scratch / "pipeline")
        pipeline = find_pipeline(source, text=True, whole=True)
        other = find_pipeline(vae, text=False) if vae else None

        def write(folder: Path) -> None:
            """Copy the files, and load the encoders once, which refuses what a later stage could not use."""
            parts, cpu = pipeline.with_vae(other) if other else pipeline, torch.device("cpu")
            parts.copy(folder)
            check_sampler(complete_scheduler_config(read_json(folder / SCHEDULER)))
            Vae(parts, EncodeConfig(), cpu)
            TextEncoders(parts, EncodeConfig(), cpu)

        return ForeignTeacher({"source": pipeline.digest} | ({"vae": other.digest} if other else {}), write)

    def adopt(self, path: Path, teacher: Mapping[str, Tensor], lora: LoraConfig | None) -> AdoptedWeights:
        base = {name.removeprefix("unet."): weight for name, weight in teacher.items()}
        student, critic = read_unet(path, base, lora), read_critic(path, base)
        return AdoptedWeights(_inside_wrapper(student), None if critic is None else _inside_wrapper(critic))


def _inside_wrapper(unet: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a diffusers U-Net with the names it has in `Unet`."""
    return {f"unet.{name}": weight for name, weight in unet.items()}


def published_pipeline(name: str) -> Path:
    """The pipeline folder of the published `sd15` or `sdxl`, with configs and without weights."""
    return Path(__file__).parent / "published" / name
