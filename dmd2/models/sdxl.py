"""SDXL (Podell et al. 2023): conditioned on two text encoders, a pooled embedding and the size of the image."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from dmd2.batch import Conditioning
from dmd2.models.family import CondPair
from dmd2.models.stable import Stable, read_json


class Sdxl(Stable):
    """Implements `ModelFamily`. `text`: hidden states before the last layer of both encoders, concatenated; uncond: zeros, or
    an empty text's if the pipeline says so."""

    pipeline, embedding = "StableDiffusionXLPipeline", "text_time"

    def _conditioning(self, states: Tensor, pooled: Tensor | None) -> CondPair:
        assert pooled is not None, "SDXL has a second text encoder"
        side = float(self.config.resolution)
        # Original size, corner of the crop, target size (ibid., sec. 2.2): the same for all, real or fake.
        size = torch.tensor([[side, side, 0, 0, side, side]], device=states.device).repeat(len(states), 1)
        cond = Conditioning(text=states, pooled=pooled, size=size)
        if self.zero_uncond:
            zeros = torch.zeros_like(states), torch.zeros_like(pooled)
            return CondPair(cond, Conditioning(text=zeros[0], pooled=zeros[1], size=size))
        empty, empty_pooled = self.empty_text
        assert empty_pooled is not None
        text, rest = (
            empty.to(states.device).expand_as(states),
            empty_pooled.to(pooled.device).expand_as(pooled),
        )
        return CondPair(cond, Conditioning(text=text, pooled=rest, size=size))

    @cached_property
    def zero_uncond(self) -> bool:
        """Whether uncond is zeros: `force_zeros_for_empty_prompt` of the pipeline, true by default."""
        path = self.folder / "model_index.json"
        return bool(read_json(path).get("force_zeros_for_empty_prompt", True)) if path.is_file() else True
