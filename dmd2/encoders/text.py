"""The text encoders of a Stable Diffusion pipeline: captions -> embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmd2.config import EncodeConfig
from dmd2.denoiser import tf32_on_gpus
from dmd2.encoders.pipeline_folder import (
    TEXT_ENCODERS,
    TEXT_WEIGHTS,
    VOCABULARIES,
    PipelineFiles,
    deterministic_encoding,
    load_from_files,
    load_frozen,
    tokenizer_files,
)
from dmd2.errors import Refused
from dmd2.io.tensors import to_device


class TextEmbeddings(NamedTuple):
    """Embeddings of B captions, on the CPU, in the precision in which they are stored."""

    states: Tensor
    """float16 (B, tokens, width)."""
    pooled: Tensor | None
    """float16 (B, width), if there are two encoders."""


@dataclass
class CutTexts:
    """The texts that are longer than the window of a text encoder, whose end it does not see."""

    texts: set[str] = field(default_factory=set)
    window: int = 0
    """Tokens that the shortest of the encoders takes, with those of start and end."""

    def describe(self, of: int, what: str) -> str:
        """A sentence about them; empty if there are none."""
        if not self.texts:
            return ""
        return (
            f"{len(self.texts)} of {of} {what} are longer than the {self.window} tokens of the text encoder, which does "
            f"not see the end of them, for example of {min(self.texts)[:60]!r}; shorten them"
        )


_counts: ContextVar[CutTexts | None] = ContextVar("cut_texts", default=None)


@contextmanager
def count_cut_texts() -> Iterator[CutTexts]:
    """Collect the texts that are cut off by any text encoder inside of the context."""
    found = CutTexts()
    token = _counts.set(found)
    try:
        yield found
    finally:
        _counts.reset(token)


class TextEncoders:
    """The tokenizers and text encoders of a pipeline.

    With one encoder (SD1.5), a caption becomes its last hidden states. With two (SDXL), the hidden states before the last
    layer of both, concatenated, and the pooled projection of the second.
    """

    def __init__(self, pipeline: PipelineFiles, settings: EncodeConfig, device: torch.device) -> None:
        import transformers

        transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        self.device, dtype = device, getattr(torch, settings.dtype)
        self.parts = []
        for folder, tokenizer_folder in pipeline.text_encoders:
            encoder = load_frozen(
                getattr(transformers, TEXT_ENCODERS[folder.name]), folder, TEXT_WEIGHTS, device, dtype
            )
            if not any(all((tokenizer_folder / name).is_file() for name in names) for names in VOCABULARIES):
                raise Refused(
                    f"{tokenizer_folder} holds no CLIP tokenizer: it has neither tokenizer.json, nor vocab.json and merges.txt"
                )
            tokenizer = load_from_files(
                transformers.CLIPTokenizer, tokenizer_folder, tokenizer_files(tokenizer_folder)
            )
            if (tokens := 1 + max(tokenizer.get_vocab().values())) > (rows := encoder.config.vocab_size):
                raise Refused(
                    f"{tokenizer_folder} has {tokens} tokens, and the text encoder in {folder} has embeddings of {rows}; give the two that belong together"
                )
            self.parts.append((tokenizer, encoder))

    @property
    def window(self) -> int:
        """Tokens that all of the encoders take."""
        return min(_window(tokenizer, encoder) for tokenizer, encoder in self.parts)

    def cut_texts(self, texts: Sequence[str]) -> set[str]:
        """Those of the texts that are longer than the window of an encoder."""
        found: set[str] = set()
        for tokenizer, encoder in self.parts:
            tokens = tokenizer(list(texts), truncation=False, verbose=False).input_ids
            found |= {
                text
                for text, each in zip(texts, tokens, strict=True)
                if len(each) > _window(tokenizer, encoder)
            }
        return found

    def embed_for_storage(self, texts: Sequence[str]) -> TextEmbeddings:
        """As `embed`, in float16 on the CPU."""
        states, pooled = self.embed(texts)
        return TextEmbeddings(states.half().cpu(), None if pooled is None else pooled.half().cpu())

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Captions -> hidden states (B, tokens, width) and, with two encoders, pooled (B, width); float32, on the device."""
        if cut := _counts.get():
            cut.texts |= self.cut_texts(texts)
            cut.window = self.window
        states, pooled = [], None
        for tokenizer, encoder in self.parts:
            length = _window(tokenizer, encoder)
            settings = {"padding": "max_length", "truncation": True, "max_length": length}
            tokens = tokenizer(list(texts), return_tensors="pt", **settings).input_ids
            # TF32 has the digits of the float16 that embeddings are stored in.
            with deterministic_encoding(self.device), tf32_on_gpus(self.device):
                out = encoder(to_device(tokens, self.device), output_hidden_states=True)
            states.append(out.hidden_states[-2] if len(self.parts) > 1 else out.last_hidden_state)
            pooled = out.text_embeds.float() if "text_embeds" in out else None
        return torch.cat(states, -1).float(), pooled


def _window(tokenizer: Any, encoder: Any) -> int:
    return min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
