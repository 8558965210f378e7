"""The model card of a package: its README.md."""

from __future__ import annotations

import json
from collections.abc import Mapping

from dmd2.evaluation.scores import markdown_table, score_table
from dmd2.io.artifact import Manifest


def model_card(run: Manifest, evaluation: Manifest, gate: Manifest, usage: str) -> str:
    """README.md of the package: use, scores, provenance and recipe of the student, from the manifests of its run.

    `usage` is a text about sampling it, from the family."""
    config, facts = run.config, evaluation.facts
    assert config is not None
    timesteps = config.distill.student_timesteps
    calls = f"{len(timesteps)} network call" + ("s" if len(timesteps) > 1 else "")
    return f"""---
library_name: dmd2
license: other
tags: [diffusion, distillation, dmd2]
---
# {config.recipe}: a {len(timesteps)}-step student

Distilled with DMD2 (arXiv 2405.14867) by recipe `{config.recipe}`. Sampling one image takes {calls}; with the teacher it takes {facts["nfe_teacher"]}.
The licences of the teacher and of its training data apply to these weights.

![Samples](samples.png)

## Use

{usage}

## Metrics

{markdown_table(*score_table(facts))}

{facts["images"]} generated images against {facts["images_real"]} held-out real ones; features: {facts["features"]};
seed {facts["seed"]}. {gate.facts["reason"]}. {best_checkpoint(run)}

## Provenance

| artifact | sha256 digest |
|---|---|
{_digest_rows({"run": run.digest, "evaluation": evaluation.digest, **run.inputs})}

Versions: {", ".join(f"{k} {v}" for k, v in run.versions.items())}.

## Recipe

```json
{json.dumps(config.model_dump(mode="json", include={"recipe", "seed", "family", "distill"}), indent=1)}
```
"""


def forms_table(forms: Mapping[str, str], sizes: Mapping[str, int]) -> str:
    """The student in the file formats of other programs, as Markdown; empty without any. `forms`: file -> how to use it;
    `sizes`: file -> bytes."""
    rows = [f"| `{name}` | {sizes[name] / 1e6:,.1f} MB | {use} |" for name, use in forms.items()]
    return (
        "\n".join(
            ["\n\nThe same student for other programs:\n", "| file | size | use |", "|---|--:|---|", *rows]
        )
        if rows
        else ""
    )


def best_checkpoint(run: Manifest) -> str:
    """A sentence about the checkpoint that became the student; empty if checkpoints were not scored."""
    facts, config = run.facts, run.config
    if "best_step" not in facts or not config:
        return ""
    best = config.distill.best
    return (
        f"The student is the checkpoint of step {facts['best_step']} of {facts['steps']}, which has the smallest FID to training samples "
        f"(FID {facts['best_fid']:.2f}, features {best.features}, {best.images} samples); it was selected before this evaluation."
    )


def _digest_rows(digests: dict[str, str]) -> str:
    return "\n".join(f"| {name} | `{digest}` |" for name, digest in digests.items())
