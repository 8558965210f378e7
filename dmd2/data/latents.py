"""Encoding training images with a VAE once, so that no training step has to run it.

A sample is `<key>.npy`: mean and standard deviation of the VAE posterior, so that training draws a new latent every time. Label and
caption are copied; `<key>.emb` and `<key>.pool` hold the text encoders' embeddings of the caption, which training then reads. The unit of work is one input
shard. Batches never span two shards, so any number of processes writes the same bytes, and interrupted work continues with the shards that
have no result file yet.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Self

import torch
from accelerate import PartialState
from torch import Tensor

from dmd2.config import Config
from dmd2.data.encoded_shards import EncodedShard, npy_bytes, write_missing_shards
from dmd2.data.loader import RawBatch, Shards, collate
from dmd2.data.shard_writer import ShardWriter
from dmd2.data.unit_results import UnitResults
from dmd2.encoders.pipeline_folder import PipelineFiles
from dmd2.encoders.text import TextEncoders
from dmd2.encoders.vae import Vae
from dmd2.errors import Refused
from dmd2.io.staging import Draft
from dmd2.parallel.ranks import check_driver

logger = logging.getLogger(__name__)

NAMES = {"npy": "latents", "emb": "embeddings", "pool": "pooled", "txt": "captions"}
"""Contents of the members of a sample, by suffix."""
TAR_BLOCK, NPY_HEADER = 512, 128
SDXL = (500_000, (2, 4, 128, 128))
"""A familiar size for comparison: number of images, and shape of the posterior moments of one image at 1024 pixels."""
PATIENCE = timedelta(days=7)
"""How long a process waits for the others at the end, whose remaining work may take hours."""


def sample_posterior(moments: Tensor, eps: Tensor) -> Tensor:
    """Sample the VAE posterior: mean + std * eps, in float32.

    `moments` is (B, 2, C, h, w), as `RawBatch.image` of latents; `eps` is (B, C, h, w), standard normal. The result has
    the shift and scale of the family already.
    """
    mean, std = moments.float().unbind(1)
    return mean + std * eps


@dataclass
class LatentEncoder:
    """VAE and text encoders on the device of this process, and the shards that they encode."""

    shards: Shards
    config: Config
    vae: Vae
    texts: TextEncoders | None

    @classmethod
    def load(cls, shards: Shards, config: Config, pipeline: PipelineFiles, device: torch.device) -> Self:
        texts = TextEncoders(pipeline, config.encode, device) if config.encode.text else None
        return cls(shards, config, Vae(pipeline, config.encode, device), texts)

    def __post_init__(self) -> None:
        self.shards.max_open = 2
        self.first = collate([self.shards.sample(0, 0)])
        self.shape = self.vae.moments_shape(tuple(self.first.image.shape[1:]))
        if self.texts and not any(self.shards.sample(0, i).text for i in range(self.shards.counts[0])):
            raise Refused(
                f"{self.shards.uri} has no captions in {self.shards.files[0].path}; leave out --encode.text, or shard a source with captions"
            )

    def describe_disk_use(self) -> str:
        """One sentence about the disk space that the latents will take."""
        first = self.encode_batch(self.first, self.shards.keys(0)[:1])[0]
        count, each = len(self.shards), tar_bytes(*map(len, first.values()))
        known = SDXL[0] * tar_bytes(NPY_HEADER + 2 * math.prod(SDXL[1]), 1)
        return (
            f"latents: {count:,} images x {_bytes(each)} = {_bytes(count * each)} "
            f"(an SDXL set of {SDXL[0]:,} images at 1024 px takes {_bytes(known)})"
        )

    def encode_batch(self, batch: RawBatch, keys: Sequence[str]) -> list[dict[str, bytes]]:
        """The members to store for each image of a batch, by suffix."""
        parts = {"npy": self.vae.moments(batch.image)}
        if self.texts:
            states, pooled = self.texts.embed_for_storage(batch.text)
            parts |= {"emb": states} | ({} if pooled is None else {"pool": pooled})
        for suffix, part in parts.items():
            self._check_finite(suffix, part, keys)
        return [
            {suffix: npy_bytes(part[i]) for suffix, part in parts.items()}
            | {"cls": str(label).encode()}
            | ({"txt": text.encode()} if text else {})
            for i, (label, text) in enumerate(zip(batch.label.tolist(), batch.text, strict=True))
        ]

    def _check_finite(self, suffix: str, part: Tensor, keys: Sequence[str]) -> None:
        finite = part.isfinite().flatten(1).all(1)
        if not finite.all():
            dtype = self.config.encode.dtype
            advice = (
                "set --encode.dtype float32"
                if dtype != "float32"
                else "the weights are broken, or of another network"
            )
            raise Refused(
                f"{NAMES[suffix]} of image {keys[int(finite.int().argmin())]} are not finite in float16, computed in {dtype}: {advice}"
            )

    def count_cut(self, texts: Sequence[str]) -> int:
        """Number of captions that are longer than the window of the text encoder."""
        if not self.texts:
            return 0
        cut = self.texts.cut_texts(texts)
        return sum(text in cut for text in texts)

    def _captions_cut(self, results: UnitResults[EncodedShard], images: int) -> dict[str, int]:
        """The fact about captions that were cut off, which is logged too; none without text encoders."""
        if not self.texts:
            return {}
        count = sum(result.captions_cut for result in results)
        if count:
            logger.warning(
                f"{count} of {images} captions are longer than the {self.texts.window} tokens of the text encoder, "
                "which does not see the end of them; shorten them, or accept it"
            )
        return {"captions_cut": count}

    def facts(self, pipeline: PipelineFiles, results: UnitResults[EncodedShard]) -> dict[str, Any]:
        """Facts for the manifest, except the list of shards."""
        count = sum(result.shard.images for result in results)
        spent = Counter[str]()
        for result in results:
            spent.update(result.bytes)
        kinds = {NAMES[suffix]: size for suffix, size in sorted(spent.items())}
        return {
            "classes": self.shards.manifest.facts["classes"],
            "images": count,
            "shape": list(self.shape),
            "scaling_factor": self.vae.scale,
            "shift_factor": self.vae.shift,
            "dtype": self.config.encode.dtype,
            "vae": pipeline.digest,
            **({"text_encoders": pipeline.text_digest} if self.texts else {}),
            "bytes": sum(result.shard.size for result in results),
            "bytes_of": kinds,
            "bytes_per_image": {kind: round(size / count, 1) for kind, size in kinds.items()},
            **self._captions_cut(results, count),
            "images_per_s": round(count / max(1e-9, sum(result.seconds for result in results)), 2),
        }


def write_latents(
    encoder: LatentEncoder, draft: Draft, part: tuple[int, int] = (0, 1), show: bool = True
) -> UnitResults[EncodedShard]:
    """Encode every shard of this part that has no result file yet, and return the results of the part.

    Args:
        show: Whether to show a progress bar.
    """
    counts = encoder.shards.counts
    mine = {number: counts[number] for number in range(len(counts))[part[0] :: part[1]]}
    label = f"encode, part {part[0]} of {part[1]}" if part[1] > 1 else "encode"
    return write_missing_shards(label, "images", mine, partial(_encode_shard, encoder), draft, show)


def _encode_shard(
    encoder: LatentEncoder,
    number: int,
    writer: ShardWriter,
    result: EncodedShard,
    count: Callable[[int], None],
) -> None:
    keys, shard = encoder.shards.keys(number), result.shard
    for batch in _batches(number, encoder):
        named = keys[shard.images : shard.images + len(batch.label)]
        result.captions_cut += encoder.count_cut(batch.text)
        for key, sample in zip(named, encoder.encode_batch(batch, named), strict=True):
            writer.add(key, sample)
            sizes = {suffix: len(data) for suffix, data in sample.items() if suffix in NAMES}
            result.bytes = dict(Counter(result.bytes) + Counter(sizes))
        shard.images += len(named)
        shard.histogram = dict(Counter(shard.histogram) + Counter(batch.label.tolist()))
        count(len(named))


def _batches(number: int, encoder: LatentEncoder) -> Iterator[RawBatch]:
    """The images of a shard in batches of `encode.batch`, loaded ahead by threads."""
    settings, count, size = encoder.config.loader, encoder.shards.counts[number], encoder.config.encode.batch

    def read(start: int) -> RawBatch:
        return collate([encoder.shards.sample(number, i) for i in range(start, min(count, start + size))])

    with ThreadPoolExecutor(settings.threads, "loader") as pool:
        coming: deque[Future[RawBatch]] = deque()
        for start in range(0, count, size):
            coming.append(pool.submit(read, start))
            if len(coming) > settings.prefetch:
                yield coming.popleft().result()
        yield from (future.result() for future in coming)


def tar_bytes(*sizes: int) -> int:
    """Bytes of tar members of these sizes: each has a header block and is padded to whole blocks."""
    return sum(TAR_BLOCK * (1 + -(-size // TAR_BLOCK)) for size in sizes)


def _bytes(count: float) -> str:
    """`8.2 kB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def distributed_state() -> PartialState:
    """Rank and world size of this process."""
    check_driver()
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
