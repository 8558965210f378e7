"""Stable Diffusion 1.5 (Rombach et al. 2022), and 2 of the same form: one text encoder, nothing else."""

from __future__ import annotations

from torch import Tensor

from dmd2.batch import Conditioning
from dmd2.models.family import CondPair
from dmd2.models.stable import Stable


class Sd15(Stable):
    """A `ModelFamily`. Text: the last hidden states; uncond: those of an empty text."""

    pipeline, embedding = "StableDiffusionPipeline", None

    def _conditioning(self, states: Tensor, pooled: Tensor | None) -> CondPair:
        empty = self.empty_text[0].to(states.device).expand_as(states)
        return CondPair(Conditioning(text=states), Conditioning(text=empty))
