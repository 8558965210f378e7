"""Stable Diffusion 1.5 (Rombach et al. 2022), and 2, which has the same form: one text encoder, no other conditioning."""

from __future__ import annotations

from torch import Tensor

from dmd2.batch import Conditioning, CondPair
from dmd2.models.stable import Stable


class Sd15(Stable):
    """Implements `ModelFamily`. `text`: the last hidden states; uncond: those of an empty text."""

    pipeline, embedding = "StableDiffusionPipeline", None

    def _conditioning(self, states: Tensor, pooled: Tensor | None) -> CondPair:
        empty = self.empty_text[0].to(states.device).expand_as(states)
        return CondPair(Conditioning(text=states), Conditioning(text=empty))
