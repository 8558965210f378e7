"""How a run ended, from the artifacts it left: `outcome.json` for programs, a page for people.

The finished artifacts of a run that failed or was rejected stay; a run with the same parameters continues from them.
"""

from __future__ import annotations

import json

from dmd2.evaluation.scores import markdown_table, read_scores, score_table
from dmd2.io.artifact import MANIFEST, read_manifest
from dmd2.io.storage import join_uri, open_store

OUTCOME = "outcome.json"
FOLDERS = {
    "shards": "shards", "teacher": "teacher", "latents": "latents", "run": "run", "evaluation": "evaluation", "gate": "gate",
    "package": "package",
}  # fmt: skip
"""{folder below the root of a run: its kind of artifact}, in the order in which they are made."""


def write_outcome(root: str, run: str, state: str, error: str) -> str:
    """Write `outcome.json` into the root -> the page, as Markdown.

    Args:
        root: Folder of the run.
        run: The KFP id of the run.
        state: SUCCEEDED, FAILED or CANCELLED, as KFP says.
        error: KFP's message about the failure.
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
        "scores": {scores.name: scores.values for scores in read_scores(evaluation)} if evaluation else {},
        "root": root,
        "folders": {name: read_manifest(uri, FOLDERS[name]).digest for name, uri in finished.items()},
    }
    open_store(root).write(OUTCOME, json.dumps(outcome, indent=1).encode())
    lines = [f"# {state.lower()}: {gate.get('reason') or error or 'no gate was reached'}", ""]
    lines += [markdown_table(*score_table(evaluation)), ""] if evaluation else []
    lines += [f"- {name}: `{uri}`" for name, uri in finished.items()]
    return "\n".join([*lines, "", f"outcome: `{join_uri(root, OUTCOME)}`"])
