"""Stages that make what is trained on: shards of images, their latents, pairs of noise and answer."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from dmd2 import parallel
from dmd2.config import Config
from dmd2.data import latents
from dmd2.data.pairs import write_pairs
from dmd2.data.prompts import read_prompts
from dmd2.data.shards import TRAIN, deliver, told, write_shards
from dmd2.data.sources import open_source
from dmd2.data.stream import Shards
from dmd2.encoders.vae import find
from dmd2.errors import Refused
from dmd2.io.artifact import Manifest, drafted, finished, read
from dmd2.io.storage import is_local
from dmd2.stages.common import captions, digest_of, digests, network_of, on


def shard(config: Config, source: str, out: str, workers: int = 0, part: str = "") -> Manifest:
    """Write the images of a source as shards, with some held out for evaluation.

    The bytes are the same for any number of workers and parts. Killed, the same command continues. To share the work
    among machines, give each a part, `--part 0/4` to `--part 3/4`, and at last call it once without: it makes the
    folder of what the parts have left.

    Args:
        source: `digits`, a folder of images with one sub-folder per class, or another layout (README, Data).
        out: Folder to make, local or gs://.
        workers: Processes; 0 = one per core.
        part: `i/n` for the i-th of n parts, counted from 0; empty for all of it.
    """
    images, share = open_source(source), _part(part)
    inputs = {"source": images.fingerprint}
    if done := finished(out, "shards", config, inputs):
        return done
    if part and config.data.format == "lmdb" and not is_local(out):
        raise Refused(
            "a table on a bucket is made by one machine; leave out --part, or set --data.format tar"
        )
    workers = workers or os.cpu_count() or 1
    with drafted(out, "shards", config, inputs, resumable=True, part=bool(part)) as draft:
        receipts = write_shards(images, config, draft, workers, share)
        if part:
            return _unpublished("shards", config, inputs, {"part": part, "units": len(receipts)})
        draft.facts |= {"source": source, "classes": images.classes} | told(receipts, len(images.classes))
        draft.facts["shards"] = deliver(receipts, config, draft)
    return read(out, "shards")


def encode(config: Config, data: str, vae: str, out: str) -> Manifest:
    """Encode the training images with a VAE, once for all. The images that are held out stay images.

    Started with torchrun or accelerate, each process encodes its share of the shards; the bytes are the same for any
    number of them, on machines of one kind. Killed, the same command continues.

    Args:
        data: Folder of shards.
        vae: Folder of a diffusers AutoencoderKL, or of a pipeline that has one; local, gs://, or a name on the hub.
        out: Folder to make, local or gs://.
    """
    networks = find(vae, config.encode.text)
    inputs = {"shards": read(data, "shards").digest, "vae": networks.digest}
    if done := finished(out, "latents", config, inputs):
        return done
    state, shards = latents.processes(), Shards(data, TRAIN, cache_gb=config.loader.cache_gb)
    encoder = latents.Encoder.load(shards, config, networks, state.device)
    if state.is_main_process:
        print(encoder.cost(), file=sys.stderr, flush=True)
    draft_of = partial(drafted, out, "latents", config, inputs, resumable=True)
    if state.num_processes > 1:
        with draft_of(part=True) as draft:
            latents.write_latents(encoder, draft, (state.process_index, state.num_processes))
        state.wait_for_everyone()
    if state.is_main_process:
        with draft_of() as draft:
            receipts = latents.write_latents(encoder, draft)
            draft.facts |= encoder.facts(networks, receipts)
            draft.facts["shards"] = latents.deliver(receipts, draft)
            alone = find(vae, text=False)
            alone.copy(draft.path)
            draft.facts["vae"] = alone.digest
    state.wait_for_everyone()
    return read(out, "latents")


def pairs(config: Config, data: str, teacher: str, out: str, prompts: str = "") -> Manifest:
    """Sample the teacher, and keep noise and answer: what a one-step student learns from before it is distilled.

    Args:
        data: Folder of shards or latents, whose captions are sampled.
        teacher: Folder of the teacher.
        out: Folder to make. Killed, the same command continues.
        prompts: File of prompts to sample instead.
    """
    described, original = read(data, "shards", "latents"), read(teacher, "teacher")
    inputs = digests(described) | {"teacher": original.digest} | digest_of(prompts)
    if done := finished(out, "pairs", config, inputs):
        return done
    model, settings = on(parallel.device(), network_of(teacher, original)), config.pairs
    texts = (
        read_prompts(prompts) if prompts else captions(Shards(data, TRAIN, described.kind), settings.count)
    )

    def answer(part: Sequence[str], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        return model.pairs(part, seed, settings.steps, settings.guidance)

    with drafted(out, "pairs", config, inputs, resumable=True) as draft:
        receipts = write_pairs(config, texts, answer, draft)
        draft.facts |= {"classes": [""], "images": settings.count, "guidance": settings.guidance}
        draft.facts["shards"] = latents.deliver(receipts, draft)
    return read(out, "pairs")


def what_it_learns_from(config: Config, data: str, teacher: str, out: str) -> str:
    """The folder that `distill` takes: the shards, or for a network on latents what the teacher's VAE makes of them."""
    if not config.family.vae_stride:
        return data
    encode(config, data, teacher, out)
    return out


def _part(text: str) -> tuple[int, int]:
    """`2/8` -> (2, 8)."""
    number, _, count = (text or "0/1").partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise Refused(f"part is {text!r}; give i/n with i from 0 to n - 1, for example 0/4")
    return int(number), int(count)


def _unpublished(kind: str, config: Config, inputs: dict[str, str], facts: dict[str, Any]) -> Manifest:
    """What a part has to tell: there is no folder yet."""
    return Manifest(kind=kind, config=config, inputs=inputs, files=[], facts=facts, versions={}, seconds=0)
