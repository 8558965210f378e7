"""The model card of a package: its README.md."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from dmd2.config import Config
from dmd2.evaluation.scores import markdown_table, score_table
from dmd2.io.artifact import Manifest
from dmd2.licence import UNSTATED, Terms


def model_card(
    run: Manifest,
    evaluation: Manifest,
    gate: Manifest,
    usage: str,
    terms: Terms = UNSTATED,
    data_terms: Terms = UNSTATED,
) -> str:
    """README.md of the package: use, scores, provenance and recipe of the student, from the manifests of its run.

    `usage` is a text about sampling it, from the family."""
    config, facts = run.config, evaluation.facts
    assert config is not None
    timesteps = config.distill.student_timesteps
    calls = f"{len(timesteps)} network call" + ("s" if len(timesteps) > 1 else "")
    return f"""---
{_header(config, terms)}
---
# {config.recipe}: a {len(timesteps)}-step student

Distilled with DMD2 (arXiv 2405.14867) by recipe `{config.recipe}`. Sampling one image takes {calls}; with the teacher it takes {facts["nfe_teacher"]}.

![Samples](samples.png)

## Use

{usage}

## Licence and restrictions of use

{_terms_of_use(terms, data_terms)}

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


def _header(config: Config, terms: Terms) -> str:
    """The metadata by which the Hub shows and finds a model, as YAML."""
    from huggingface_hub import ModelCardData

    texts = config.family.prompts == "texts"
    data = ModelCardData(
        library_name="diffusers" if texts else "dmd2",
        license=terms.license or "other",
        license_name=re.sub(r"[^a-z0-9.]+", "-", terms.name.lower()).strip("-") or None,
        license_link=terms.link or None,
        pipeline_tag="text-to-image" if texts else "unconditional-image-generation",
        tags=["diffusion", "distillation", "dmd2"],
    )
    return data.to_yaml()


def _terms_of_use(terms: Terms, data: Terms) -> str:
    known = [
        f"{of}: {each.sentence}."
        for of, each in (("License", terms), ("License of the data", data))
        if each.sentence
    ]
    if not terms.sentence:
        known.append(
            "Whoever made this package has not said which these are: ask where the teacher and the data come from before you use it."
        )
    restrictions = "\n".join(f"> {line}" for line in terms.restrictions.splitlines())
    first = "The weights are made from the teacher and its training data, whose licences and restrictions of use apply to them."
    return "\n\n".join(filter(None, [first, *known, restrictions]))


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
