"""A small CLIP that knows emoji: the network of the CLIP score of `make demo-sdxl`, trained in 1,800 steps. It finds the right one of ten
captions for 70.5 % of the held-out emoji.

It is transformers' `CLIPModel` with a small vision transformer, the tokenizer of the emoji teacher, and the contrastive loss of the
paper (Radford et al. 2021), trained on the captioned training emoji alone; the held-out ones are not seen. Captions of several
pictures of a batch that are equal count as right for each other. `python -m tests.emoji.clip --data SHARDS --out FOLDER` trains it
and prints how often it finds the right one of ten captions of held-out pictures.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from dmd2.data.loader import RawBatch, Shards
from dmd2.data.shard_table import HOLDOUT, TRAIN
from dmd2.evaluation.clip_score import PREFIX, Clip
from dmd2.progress import Progress

RESOLUTION, TOKENS, WIDTH = 64, 24, 128
TOKENIZER = Path(__file__).with_name("pipeline") / "tokenizer"
CHOICES = 10


def main(data: Path, out: Path, steps: int = 1800, batch: int = 128, lr: float = 1e-3, seed: int = 0) -> None:
    """Train the CLIP.

    Args:
        data: Folder of shards of 64x64 emoji with captions.
        out: Folder to make.
        steps: Updates.
        batch: Images per update.
        lr: Highest learning rate; it rises over a twentieth of the steps and falls to zero along a cosine.
        seed: Seed of everything.
    """
    torch.manual_seed(seed)
    train = Shards(str(data), TRAIN).evenly_spaced(10**9)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    network = fit(new_network(tokenizer), tokenizer, train, steps, batch, lr)
    shutil.rmtree(out, ignore_errors=True)
    network.half().save_pretrained(out)  # type: ignore[no-untyped-call]
    shutil.copytree(TOKENIZER, out, dirs_exist_ok=True)
    size = {"height": RESOLUTION, "width": RESOLUTION}
    CLIPImageProcessor(size={"shortest_edge": RESOLUTION}, crop_size=size).save_pretrained(out)
    found = share_found(Clip(str(out), torch.device("cpu")), Shards(str(data), HOLDOUT).evenly_spaced(10**9))
    print(
        f"finds the right one of {CHOICES} captions for {found:.1%} of the held-out pictures (chance: {1 / CHOICES:.0%})"
    )


def new_network(tokenizer: CLIPTokenizer) -> CLIPModel:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4}
    text = sizes | {
        "num_hidden_layers": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = sizes | {"num_hidden_layers": 4, "image_size": RESOLUTION, "patch_size": 16}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def fit(
    network: CLIPModel, tokenizer: CLIPTokenizer, train: RawBatch, steps: int, batch: int, lr: float
) -> CLIPModel:
    processor = CLIPImageProcessor(do_resize=False, do_center_crop=False)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    captions = [PREFIX + text for text in train.text]
    tokens = tokenizer(
        captions, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
    )
    ids = {caption: number for number, caption in enumerate(sorted(set(captions)))}
    number = torch.tensor([ids[caption] for caption in captions])
    optimizer = torch.optim.AdamW(network.parameters(), lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    with Progress("train the CLIP", steps, "steps") as progress:
        for _ in range(steps):
            rows = torch.randperm(len(captions))[:batch]
            pixels = (shifted(train.image[rows]).float() / 255 - mean) / std
            out = network(
                pixel_values=pixels,
                input_ids=tokens.input_ids[rows],
                attention_mask=tokens.attention_mask[rows],
            )
            loss = contrastive_loss(out.logits_per_image, number[rows])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            network.logit_scale.data.clamp_(max=4.6)
            progress.advance(1, f"loss {loss.item():.3f}")
    return network.eval()  # type: ignore[no-untyped-call]


def shifted(images: Tensor) -> Tensor:
    """Images moved by up to 6 pixels and mirrored at random, each in its own way; uint8 (B, 3, H, W)."""
    padded = F.pad(images, (6, 6, 6, 6), mode="replicate")
    moved = []
    for image, (x, y), mirrored in zip(
        padded, torch.randint(0, 13, (len(images), 2)).tolist(), torch.rand(len(images)) < 0.5, strict=True
    ):
        crop = image[:, y : y + RESOLUTION, x : x + RESOLUTION]
        moved.append(crop.flip(-1) if mirrored else crop)
    return torch.stack(moved)


def contrastive_loss(logits: Tensor, number: Tensor) -> Tensor:
    """Cross-entropy in both directions; `number` says which captions are equal."""
    same = (number[:, None] == number[None]).float()
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def share_found(clip: Clip, holdout: RawBatch, seed: int = 0) -> float:
    """Share of the pictures whose own caption has the highest score among `CHOICES` different captions of held-out pictures."""
    draw, different = torch.Generator().manual_seed(seed), sorted(set(holdout.text))
    found = 0
    for image, text in zip(holdout.image, holdout.text, strict=True):
        order = [different[i] for i in torch.randperm(len(different), generator=draw).tolist()]
        choices = [text, *[other for other in order if other != text][: CHOICES - 1]]
        scores = clip.cosines(image.expand(CHOICES, -1, -1, -1), choices)
        found += int(scores.argmax()) == 0
    return found / len(holdout.text)


if __name__ == "__main__":
    tyro.cli(main)
