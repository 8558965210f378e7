"""A small but complete SDXL that draws emoji: the teacher of `make demo-sdxl`, in about 35 minutes on two cores.

Every part is the real one of diffusers and transformers, only small: an `AutoencoderKL` (64x64 pixels -> 4x16x16), two
CLIP text encoders with byte-pair tokenizers, a `UNet2DConditionModel` with `text_time` conditioning, Euler's sampler.
What Stability AI did in stages is done here in two: the VAE first, then the text encoders together with the U-Net
(there are no pretrained ones to freeze). The result is a pipeline folder that `StableDiffusionXLPipeline` loads.

The held-out pictures of the shards are not seen.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dmd2.data.loader import Shards
from dmd2.data.shard_table import TRAIN
from dmd2.diffusion import Diffusion, eps_prediction, scaled_linear_schedule
from dmd2.progress import Progress
from dmd2.training.ema import Ema

RESOLUTION, STRIDE, TOKENS, WORDS = 64, 4, 24, 1400
DROPPED = 0.1
"""Share of the captions that are replaced by nothing, so that guidance has something to guide away from."""


def main(
    data: Path, out: Path, vae_steps: int = 900, steps: int = 2100, batch: int = 64, seed: int = 0
) -> None:
    """Train the teacher. Interrupted, it goes on after the VAE if that was done.

    Args:
        data: Folder of shards of 64x64 emoji with captions.
        out: Folder of the pipeline to make.
        vae_steps: Updates of the VAE.
        steps: Updates of the U-Net and the text encoders.
        batch: Images per update.
        seed: Seed of everything.
    """
    torch.manual_seed(seed)
    train = Shards(str(data), TRAIN).evenly_spaced(10**9)
    pixels = (train.image.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
    draft = out.with_name(f".{out.name}.vae")
    if not draft.is_dir():
        fit_vae(pixels, vae_steps, batch // 2).save_pretrained(draft)
    made: Any = AutoencoderKL
    vae = made.from_pretrained(draft).requires_grad_(False).eval()
    latents = encoded(vae, pixels)
    pipe = assembled(vae, train.text)
    fit(pipe, latents, train.text, steps, batch)
    pipe.to(torch.float16).save_pretrained(out)
    shutil.rmtree(draft)
    print(f"{sum(p.stat().st_size for p in out.rglob('*') if p.is_file()) / 1e6:.1f} MB in {out}")


def fit_vae(pixels: Tensor, steps: int, batch: int) -> Any:
    """Absolute error and a trace of KL, as the VAE of SDXL without its discriminator."""
    make: Any = AutoencoderKL
    vae = make(
        sample_size=RESOLUTION,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
    ).to(memory_format=torch.channels_last)
    for step, rows in updates("vae", vae, 2e-3, steps, len(pixels), batch):
        posterior = vae.encode(pixels[rows]).latent_dist
        error = (vae.decode(posterior.sample()).sample - pixels[rows]).abs().mean()
        (error + 1e-6 * posterior.kl().mean()).backward()
        if step % 200 == 0:
            print(f"vae step {step}: mean absolute error {error.item():.4f}", flush=True)
    return vae.requires_grad_(False).eval()


@torch.no_grad()
def encoded(vae: Any, pixels: Tensor) -> Tensor:
    """Latents of unit deviation; the scale becomes the VAE's scaling factor."""
    latents = torch.cat([vae.encode(part).latent_dist.sample() for part in pixels.split(64)])
    scale = 1 / latents.std().item()
    vae.register_to_config(scaling_factor=scale)
    return latents * scale


def assembled(vae: Any, texts: tuple[str, ...], widths: tuple[int, int, int] = (48, 80, 112)) -> Any:
    """A pipeline whose U-Net and text encoders have learned nothing yet."""
    first, second = tokenizer(texts, pad="<|endoftext|>"), tokenizer(texts, pad="!")
    encoders = (
        CLIPTextModel(text_config(first, 64)),
        CLIPTextModelWithProjection(text_config(second, 96, projection_dim=96)),
    )
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION // STRIDE,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(0, 1, 1),
        attention_head_dim=tuple(width // 16 for width in widths),
        cross_attention_dim=64 + 96,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96 + 6 * 32,
        use_linear_projection=True,
        norm_num_groups=16,
    )
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        timestep_spacing="leading",
        steps_offset=1,
    )
    return StableDiffusionXLPipeline(
        vae, encoders[0], encoders[1], first, second, unet, scheduler, add_watermarker=False
    )


def fit(pipe: Any, latents: Tensor, texts: tuple[str, ...], steps: int, batch: int) -> None:
    """The noise-prediction loss of DDPM at uniform timesteps; the weights end as their running average."""
    diffusion = Diffusion(scaled_linear_schedule(), eps_prediction)
    encoders = (pipe.text_encoder, pipe.text_encoder_2)
    tokens = [tokenized(t, texts) for t in (pipe.tokenizer, pipe.tokenizer_2)]
    learner = nn.ModuleList([pipe.unet, *encoders])
    average, total = Ema(learner, 0.998), 0.0
    for step, rows in updates("unet", learner, 1.5e-3, steps, len(latents), batch):
        states, pooled = embedded(encoders, [t[rows] for t in tokens])
        shown = (torch.rand(len(rows)) >= DROPPED).float()
        timestep = torch.randint(len(diffusion), (len(rows),))
        eps = torch.randn_like(latents[rows])
        out = pipe.unet(
            diffusion.add_noise(latents[rows], eps, timestep),
            timestep,
            states * shown[:, None, None],
            added_cond_kwargs={"text_embeds": pooled * shown[:, None], "time_ids": time_ids(len(rows))},
        ).sample
        loss = F.mse_loss(out, eps)
        loss.backward()
        average.update(learner)
        total += loss.item()
        if (step + 1) % 200 == 0:
            print(f"unet step {step + 1}: loss {total / 200:.4f}", flush=True)
            total = 0.0
    learner.load_state_dict(average.shadow, strict=False)
    learner.requires_grad_(False).eval()


def updates(
    name: str, module: nn.Module, lr: float, steps: int, count: int, batch: int
) -> Iterator[tuple[int, Tensor]]:
    """(step, rows of the batch): the caller leaves a gradient, which is followed at a rate that rises and falls."""
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    order: Iterator[Tensor] = iter(())
    with Progress(name, steps, "steps") as progress:
        for step in range(steps):
            rows = next(order, None)
            if rows is None:
                order = iter(torch.randperm(count)[: count // batch * batch].split(batch))
                rows = next(order)
            yield step, rows
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            rate = min(1, (step + 1) / 100) * (1 + math.cos(math.pi * step / steps)) / 2
            for group in optimizer.param_groups:
                group["lr"] = lr * rate
            optimizer.step()
            optimizer.zero_grad()
            progress.advance()


def embedded(
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection], tokens: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Last but one hidden states, side by side (B, L, 160), and the pooled projection (B, 96), as in SDXL."""
    outs = [encoder(t, output_hidden_states=True) for encoder, t in zip(encoders, tokens, strict=True)]
    return torch.cat([out.hidden_states[-2] for out in outs], -1), outs[1].text_embeds


def time_ids(count: int) -> Tensor:
    return torch.tensor([[RESOLUTION, RESOLUTION, 0, 0, RESOLUTION, RESOLUTION]] * count, dtype=torch.float32)


def text_config(words: CLIPTokenizer, width: int, projection_dim: int = 64) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=projection_dim,
        num_hidden_layers=3,
        num_attention_heads=width // 32,
        max_position_embeddings=TOKENS,
        hidden_act="gelu",
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )


def tokenized(words: CLIPTokenizer, texts: tuple[str, ...]) -> Tensor:
    return words(
        list(texts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
    ).input_ids


def tokenizer(texts: tuple[str, ...], pad: str) -> CLIPTokenizer:
    """Byte-pair encoding in CLIP's form, learned from the captions."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    learner.decoder = decoders.ByteLevel()
    learner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=WORDS, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
        ),
    )
    model = json.loads(learner.to_str())["model"]
    words = dict.fromkeys([*alphabet, *(letter + "</w>" for letter in alphabet), *model["vocab"]])
    vocab = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    merges = [tuple(merge) for merge in model["merges"]]
    make: Any = CLIPTokenizer
    return make(vocab=vocab, merges=merges, pad_token=pad, model_max_length=TOKENS)


if __name__ == "__main__":
    tyro.cli(main)
