"""The CLIP score: how well images fit their captions (Hessel et al. 2021).

The value is the mean cosine of the embeddings of image and caption, unscaled, as DMD2's paper gives it. Each caption follows the words
"A photo depicts", as in the paper on the score and in DMD2's evaluation. Captions are cut at the window of the CLIP; they are counted.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Self

import torch
import transformers
from torch import Tensor

from dmd2.encoders.pipeline_folder import (
    TOKENIZER_FILES,
    fetch_files,
    load_from_files,
    load_frozen,
    tokenizer_files,
)
from dmd2.errors import Refused
from dmd2.evaluation.classifier import rgb
from dmd2.evaluation.metrics import Score
from dmd2.evaluation.neighbours import KeptFeatures, mean_score
from dmd2.io.local import sha256
from dmd2.models.family import Prompt

PREFIX = "A photo depicts "
WEIGHTS, PREPROCESSOR = "model.safetensors", "preprocessor_config.json"

logger = logging.getLogger(__name__)


class Clip:
    """A CLIP with the tokenizer and the image preprocessing that belong to it."""

    def __init__(self, source: str, device: torch.device) -> None:
        """Load it from a folder, local or gs://, or by its name on the Hugging Face Hub, which may end in `@revision`."""
        folder = fetch_files(source, ["config.json", PREPROCESSOR, WEIGHTS, *TOKENIZER_FILES])
        if not (folder / PREPROCESSOR).is_file():
            raise Refused(f"{source} has no {PREPROCESSOR}; give the folder of a whole CLIP of transformers")
        self.device = device
        self.network = load_frozen(transformers.CLIPModel, folder, WEIGHTS, device, torch.float32)
        self.tokenizer = load_from_files(transformers.CLIPTokenizer, folder, tokenizer_files(folder))
        self.processor = load_from_files(
            transformers.CLIPImageProcessor, folder, {PREPROCESSOR: folder / PREPROCESSOR}
        )
        self.window = self.network.config.text_config.max_position_embeddings
        self.digest = sha256(folder / WEIGHTS)

    @torch.no_grad()
    def cosines(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosine of each image, uint8 (B, 1 or 3, H, W), and its caption: float64 (B,) on the CPU."""
        pixels = self.processor(images=list(rgb(images)), return_tensors="pt").pixel_values
        tokens = self._tokenize(captions)
        out = self.network(pixel_values=pixels.to(self.device), **tokens)
        image, text = (
            torch.nn.functional.normalize(e.double(), dim=-1) for e in (out.image_embeds, out.text_embeds)
        )
        return (image * text).sum(-1).cpu()

    def measure(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """`cosines`, (B, 1)."""
        return self.cosines(images, [_caption(prompt) for prompt in prompts])[:, None]

    def count_cut(self, prompts: Sequence[Prompt]) -> dict[str, int]:
        """The fact how many different captions are longer than the window; logged, too."""
        captions = [PREFIX + _caption(prompt) for prompt in dict.fromkeys(prompts)]
        lengths = map(len, self.tokenizer(captions, truncation=False, verbose=False).input_ids)
        if count := sum(length > self.window for length in lengths):
            logger.warning(
                "%d captions are longer than the %d tokens of the CLIP, which does not see the end of them",
                count,
                self.window,
            )
        return {"clip_captions_cut": count}

    def _tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        texts = [PREFIX + caption for caption in captions]
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.window, return_tensors="pt"
        )
        return {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}


class ClipState(KeptFeatures):
    """The cosines of a set of images."""

    def score(self, reference: Self) -> Score:
        """The mean cosine, with its interval of 95 %. It does not depend on the real images."""
        return mean_score(self.features[:, 0])


def _caption(prompt: Prompt) -> str:
    if not isinstance(prompt, str):
        raise Refused(
            f"the CLIP score compares images with captions, and this network is told the class {prompt}; leave clip out of evaluate.metrics"
        )
    return prompt
