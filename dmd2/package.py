"""What users load: a network with all that is needed to sample it, and the package made of a finished student.

`network.safetensors` holds the weights, `network.json` the family and the levels of the student's steps. Both are
data: loading them executes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmd2 import build
from dmd2.checkpoint import load_tensors, save_tensors
from dmd2.config import EdmConfig
from dmd2.errors import Refused
from dmd2.models.family import ModelFamily
from dmd2.sampler import Levels, generate
from dmd2.storage import Manifest, check, local, read

BATCH = 64
"""Images per network call when nothing else is said."""


@dataclass(frozen=True)
class Model:
    """A network that can be sampled."""

    config: EdmConfig
    family: ModelFamily
    network: nn.Module
    levels: Levels
    """Levels of the student's steps, noisiest first; none for a teacher."""

    def sample(self, labels: Sequence[int], seed: int = 0) -> Tensor:
        """Images of these classes, uint8 (N, C, H, W), in len(levels) network calls each."""
        return self.family.decode(self._in_batches(labels, seed, self._student))

    def sample_teacher(self, labels: Sequence[int], seed: int, steps: int) -> Tensor:
        """Images by the family's many-step sampler, from the same noise as `sample`."""
        return self.family.decode(
            self._in_batches(labels, seed, lambda n, e, c: self.family.sample_teacher(n, e, c, steps))
        )

    def _student(self, network: nn.Module, eps: Tensor, cond: Any) -> Tensor:
        return generate(self.family.denoiser(network), eps, cond, self.levels)

    def _in_batches(self, labels: Sequence[int], seed: int, sampler: Any) -> Tensor:
        """Noise is drawn on the CPU, image by image, so that neither batch size nor device changes it."""
        noise = torch.Generator().manual_seed(seed)
        device = next(self.network.parameters()).device
        out = []
        for start in range(0, len(labels), BATCH):
            part = list(labels[start : start + BATCH])
            eps = torch.stack([torch.randn(self.family.shape, generator=noise) for _ in part]).to(device)
            cond = self.family.condition(part).map(lambda t: t.to(device))
            torch.manual_seed(seed + start)  # the noise between the steps of a few-step student
            out.append(sampler(self.network, eps, cond).cpu())
        return torch.cat(out)


def load(folder: str | Path) -> Model:
    """Load a package: `load("package").sample(labels=[0, 1, 2], seed=0)`."""
    check(folder, read(folder, "package"))
    return load_network(folder)


def save_network(folder: Path, config: EdmConfig, levels: Levels, weights: dict[str, Tensor]) -> None:
    save_tensors(weights, folder / "network.safetensors")
    (folder / "network.json").write_text(
        json.dumps({"family": config.model_dump(mode="json"), "levels": levels}, indent=1)
    )


def load_network(folder: str | Path) -> Model:
    """The network of a teacher, run or package folder."""
    path = local(folder)
    facts = json.loads((path / "network.json").read_text())
    config = EdmConfig.model_validate(facts["family"])
    family = build.family(config)
    network = family.network().requires_grad_(False).eval()
    try:
        network.load_state_dict(load_tensors(path / "network.safetensors"))
    except RuntimeError as error:
        raise Refused(
            f"{path}/network.safetensors does not fit network.json: {str(error).splitlines()[1].strip()}"
        ) from None
    return Model(config, family, network, tuple(facts["levels"]))


def model_card(run: Manifest, evaluation: Manifest, gate: Manifest) -> str:
    """README.md of the package."""
    config, scores = run.config, evaluation.facts
    assert config is not None
    levels = config.distill.student_levels
    calls = f"{len(levels)} network call" + ("s" if len(levels) > 1 else "")
    labels = ", ".join(str(label) for label in range(min(3, config.family.network.classes)))
    return f"""---
library_name: dmd2
license: other
tags: [diffusion, distillation, dmd2]
---
# {config.recipe}: a {len(levels)}-step student

Distilled with DMD2 (arXiv 2405.14867) by recipe `{config.recipe}`. One image takes {calls}; the teacher takes {scores["nfe_teacher"]}.
The weights carry the licences of the teacher and of the data they were made from.

![Samples, one class per column](samples.png)

## Use

```python
from dmd2.package import load
student = load("path/of/this/folder")
images = student.sample(labels=[{labels}], seed=0)  # uint8 (N, C, H, W)
```

## Metrics

| | network calls per image | FID |
|---|--:|--:|
| student | {scores["nfe_student"]} | **{scores["fid_student"]:.2f}** |
| teacher | {scores["nfe_teacher"]} | {scores["fid_teacher"]:.2f} |
| teacher in one step | 1 | {scores["fid_teacher_1step"]:.2f} |
| real training images | | {scores["fid_real"]:.2f} |

{scores["images"]} generated images against {scores["images_real"]} held-out real ones; features: {scores["features"]};
seed {scores["seed"]}. {gate.facts["reason"]}.

## Provenance

| folder | sha256 digest |
|---|---|
{_rows({"run": run.digest, "evaluation": evaluation.digest, **run.inputs})}

Versions: {", ".join(f"{k} {v}" for k, v in run.versions.items())}.

## Recipe

```json
{json.dumps(config.model_dump(mode="json", include={"recipe", "seed", "family", "distill"}), indent=1)}
```
"""


def _rows(digests: dict[str, str]) -> str:
    return "\n".join(f"| {name} | `{digest}` |" for name, digest in digests.items())
