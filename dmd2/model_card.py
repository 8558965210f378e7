"""The model card of a package: its README.md."""

from __future__ import annotations

import json
from typing import Any

from dmd2.io.artifact import Manifest


def model_card(run: Manifest, evaluation: Manifest, gate: Manifest, usage: str) -> str:
    """README.md of the package; `usage` is how to sample it, from the family."""
    config, scores = run.config, evaluation.facts
    assert config is not None
    timesteps = config.distill.student_timesteps
    calls = f"{len(timesteps)} network call" + ("s" if len(timesteps) > 1 else "")
    return f"""---
library_name: dmd2
license: other
tags: [diffusion, distillation, dmd2]
---
# {config.recipe}: a {len(timesteps)}-step student

Distilled with DMD2 (arXiv 2405.14867) by recipe `{config.recipe}`. One image takes {calls}; the teacher takes {scores["nfe_teacher"]}.
The weights carry the licences of the teacher and of the data they were made from.

![Samples](samples.png)

## Use

{usage}

## Metrics

| | network calls per image | FID |
|---|--:|--:|
| student | {scores["nfe_student"]} | **{scores["fid_student"]:.2f}** |
| teacher | {scores["nfe_teacher"]} | {scores["fid_teacher"]:.2f} |
| teacher in one step | {_calls(scores, "teacher_1step")} | {scores["fid_teacher_1step"]:.2f} |
| real training images | | {scores["fid_real"]:.2f} |

{scores["images"]} generated images against {scores["images_real"]} held-out real ones; features: {scores["features"]};
seed {scores["seed"]}. {gate.facts["reason"]}. {chosen(run)}

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


def chosen(run: Manifest) -> str:
    """Which checkpoint became the student, where they were judged."""
    facts, config = run.facts, run.config
    if "best_step" not in facts or not config:
        return ""
    best = config.distill.best
    return (
        f"The student is that of step {facts['best_step']} of {facts['steps']}: of the checkpoints, the nearest to training samples "
        f"(FID {facts['best_fid']:.2f}, features {best.features}, {best.images} samples), chosen before it was evaluated."
    )


def _calls(scores: dict[str, Any], name: str) -> int:
    return next(v["calls"] for v in scores["variants"] if v["name"] == name)


def _rows(digests: dict[str, str]) -> str:
    return "\n".join(f"| {name} | `{digest}` |" for name, digest in digests.items())
