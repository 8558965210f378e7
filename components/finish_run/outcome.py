"""How a run ended, from the artifacts it left: `outcome.json` for programs, a page for people.

The finished artifacts of a run that failed or was rejected stay; a run with the same parameters continues from them.
"""

from __future__ import annotations

import json
from typing import Any

from components.run_folder import browser_link, progress_page
from dmd2.evaluation.scores import markdown_table, read_scores, score_table, scores_by_set
from dmd2.io.artifact import MANIFEST, read_manifest
from dmd2.io.storage import join_uri, open_store

OUTCOME = "outcome.json"
FOLDERS = {
    "shards": "shards", "teacher": "teacher", "latents": "latents", "pairs": "pairs", "first": "run", "run": "run",
    "evaluation": "evaluation", "gate": "gate", "package": "package",
}  # fmt: skip
"""{folder below the root of a run: its kind of artifact}, in the order in which they are made."""


GPU_FOLDERS = ("latents", "pairs", "evaluation")
"""Those that are made on one GPU if the training has any."""


def write_outcome(root: str, run: str, state: str, error: str, price: float = 0.0) -> str:
    """Write `outcome.json` into the root -> the page, as Markdown.

    Args:
        root: Folder of the run.
        run: The KFP id of the run.
        state: SUCCEEDED, FAILED or CANCELLED, as KFP says.
        error: KFP's message about the failure.
        price: Price of a GPU for an hour, in any currency; 0 = unknown.
    """
    finished = {
        name: join_uri(root, name) for name in FOLDERS if open_store(join_uri(root, name)).version(MANIFEST)
    }
    gate = read_manifest(finished["gate"], "gate").facts if "gate" in finished else {}
    evaluation = read_manifest(finished["evaluation"], "evaluation").facts if "evaluation" in finished else {}
    outcome = {
        "run": run,
        "state": state,
        "error": error,
        "decision": gate.get("decision"),
        "reason": gate.get("reason"),
        "scores": scores_by_set(read_scores(evaluation)) if evaluation else {},
        "gpu_hours": (hours := gpu_hours(root)),
        "cost": round(hours * price, 2) if hours is not None and price else None,
        "root": root,
        "folders": {name: read_manifest(uri, FOLDERS[name]).digest for name, uri in finished.items()},
    }
    open_store(root).write(OUTCOME, json.dumps(outcome, indent=1).encode())
    lines = [f"# {state.lower()}: {gate.get('reason') or error or 'no gate was reached'}", ""]
    lines += [markdown_table(*score_table(evaluation)), ""] if evaluation else []
    lines += [f"- {name}: `{uri}`" for name, uri in finished.items()]
    if hours:
        cost = f", {hours * price:,.2f} at {price:g} an hour" if price else ""
        lines.append(f"- spent: {hours:.2f} GPU-hours{cost}")
    for name in ("first", "run"):
        page = progress_page(root, name)
        if open_store(root).version(page.rpartition("/")[2]):
            lines.append(f"- training, {name}: {browser_link(page)}")
    return "\n".join([*lines, "", f"outcome: `{join_uri(root, OUTCOME)}`"])


def gpu_hours(root: str) -> float | None:
    """GPU-hours of the finished stages of a run over all their starts; None if the training is not among them."""
    made = {
        name: read_manifest(join_uri(root, name), FOLDERS[name])
        for name in ("first", "run", *GPU_FOLDERS)
        if open_store(join_uri(root, name)).version(MANIFEST)
    }
    gpus: dict[str, Any] = {name: made[name].facts.get("gpus") for name in ("first", "run") if name in made}
    if "run" not in made or None in gpus.values():
        return None
    single = min(1, gpus["run"])
    return sum(each.seconds * gpus.get(name, single) for name, each in made.items()) / 3600
