"""SDXL (Podell et al. 2023): conditioned on two text encoders, a pooled embedding and the size of the image."""

from __future__ import annotations

import torch
from torch import Tensor

from dmd2.batch import Conditioning
from dmd2.models.family import CondPair
from dmd2.models.stable import Stable


class Sdxl(Stable):
    """Implements `ModelFamily`. `text`: hidden states before the last layer of both encoders, concatenated; uncond: zeros."""

    pipeline, embedding = "StableDiffusionXLPipeline", "text_time"

    def _conditioning(self, states: Tensor, pooled: Tensor | None) -> CondPair:
        assert pooled is not None, "SDXL has a second text encoder"
        side = float(self.config.resolution)
        # Original size, corner of the crop, target size (ibid., sec. 2.2): the same for all, real or fake.
        size = torch.tensor([[side, side, 0, 0, side, side]], device=states.device).repeat(len(states), 1)
        cond = Conditioning(text=states, pooled=pooled, size=size)
        return CondPair(
            cond, Conditioning(text=torch.zeros_like(states), pooled=torch.zeros_like(pooled), size=size)
        )
