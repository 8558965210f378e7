"""The text encoders of a Stable Diffusion pipeline: captions -> embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dmd2.config import EncodeConfig
from dmd2.encoders.pipeline_folder import (
    TEXT_ENCODERS,
    TEXT_WEIGHTS,
    TOKENIZER_FILES,
    VOCABULARIES,
    PipelineFiles,
    deterministic_encoding,
    load_from_files,
    load_frozen,
)
from dmd2.errors import Refused
from dmd2.io.tensors import to_device


class TextEmbeddings(NamedTuple):
    """Embeddings of B captions, on the CPU, in the precision in which they are stored."""

    states: Tensor
    """float16 (B, tokens, width)."""
    pooled: Tensor | None
    """float16 (B, width), if there are two encoders."""


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
            tokenizer = load_from_files(transformers.CLIPTokenizer, tokenizer_folder, TOKENIZER_FILES)
            if (tokens := 1 + max(tokenizer.get_vocab().values())) > (rows := encoder.config.vocab_size):
                raise Refused(
                    f"{tokenizer_folder} has {tokens} tokens, and the text encoder in {folder} has embeddings of {rows}; give the two that belong together"
                )
            self.parts.append((tokenizer, encoder))

    def embed_for_storage(self, texts: Sequence[str]) -> TextEmbeddings:
        """As `embed`, in float16 on the CPU."""
        states, pooled = self.embed(texts)
        return TextEmbeddings(states.half().cpu(), None if pooled is None else pooled.half().cpu())

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Captions -> hidden states (B, tokens, width) and, with two encoders, pooled (B, width); float32, on the device."""
        states, pooled = [], None
        for tokenizer, encoder in self.parts:
            length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
            settings = {"padding": "max_length", "truncation": True, "max_length": length}
            tokens = tokenizer(list(texts), return_tensors="pt", **settings).input_ids
            with deterministic_encoding(self.device):
                out = encoder(to_device(tokens, self.device), output_hidden_states=True)
            states.append(out.hidden_states[-2] if len(self.parts) > 1 else out.last_hidden_state)
            pooled = out.text_embeds.float() if "text_embeds" in out else None
        return torch.cat(states, -1).float(), pooled
