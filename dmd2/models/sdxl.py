"""SDXL (Podell et al. 2023): conditioned on two text encoders, a pooled embedding and the size of the image."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from dmd2.batch import Conditioning, CondPair
from dmd2.io.json_file import read_json
from dmd2.models.stable import Stable


class Sdxl(Stable):
    """Implements `ModelFamily`. `text`: hidden states before the last layer of both encoders, concatenated. Uncond: zeros, or
    the embeddings of an empty text if the pipeline has `force_zeros_for_empty_prompt: false`."""

    pipeline, embedding = "StableDiffusionXLPipeline", "text_time"

    def _conditioning(self, states: Tensor, pooled: Tensor | None) -> CondPair:
        assert pooled is not None, "SDXL has a second text encoder"
        side = float(self.config.resolution)
        # Original size, corner of the crop, target size (ibid., sec. 2.2): the same for all, real or fake.
        # Filled on the device: numbers copied from the host would make it wait.
        size = torch.full((len(states), 6), side, device=states.device)
        size[:, 2:4].zero_()
        cond = Conditioning(text=states, pooled=pooled, size=size)
        empty, empty_pooled = self._uncond(states, pooled)
        return CondPair(cond, Conditioning(text=empty, pooled=empty_pooled, size=size))

    def _uncond(self, states: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states and pooled embeddings of the unconditional pass, in the shapes of the given ones."""
        if self._forces_zeros:
            return torch.zeros_like(states), torch.zeros_like(pooled)
        empty, empty_pooled = self.empty_text
        assert empty_pooled is not None  # SDXL has two text encoders
        return empty.to(states).expand_as(states), empty_pooled.to(pooled).expand_as(pooled)

    @cached_property
    def _forces_zeros(self) -> bool:
        """`force_zeros_for_empty_prompt` of the pipeline. The published folder, which has shapes only, has no index of a pipeline."""
        path = self.folder / "model_index.json"
        return bool(read_json(path).get("force_zeros_for_empty_prompt", True)) if path.is_file() else True
