"""How a run ended, from the folders it left: `outcome.json` for programs, a page for people.

A run that failed or was rejected left what it had finished; the same parameters continue from there.
"""

from __future__ import annotations

import json

from dmd2.io.artifact import MANIFEST, read_manifest
from dmd2.io.storage import join_uri, open_store

OUTCOME = "outcome.json"
FOLDERS = {
    "shards": "shards", "teacher": "teacher", "latents": "latents", "run": "run", "evaluation": "evaluation", "gate": "gate",
    "package": "package",
}  # fmt: skip
"""{what a run makes below its root: its kind}, in the order in which it is made."""


def conclusion(root: str, run: str, state: str, error: str) -> str:
    """Write the outcome into the root -> the page.

    Args:
        root: Folder of the run.
        run: The platform's name of it.
        state: SUCCEEDED, FAILED or CANCELLED, as the platform says.
        error: What the platform says of a failure.
    """
    there = {
        name: join_uri(root, name) for name in FOLDERS if open_store(join_uri(root, name)).version(MANIFEST)
    }
    gate = read_manifest(there["gate"], "gate").facts if "gate" in there else {}
    outcome = {
        "run": run,
        "state": state,
        "error": error,
        "decision": gate.get("decision"),
        "reason": gate.get("reason"),
        "root": root,
        "folders": {name: read_manifest(uri, FOLDERS[name]).digest for name, uri in there.items()},
    }
    open_store(root).write(OUTCOME, json.dumps(outcome, indent=1).encode())
    lines = [f"# {state.lower()}: {gate.get('reason') or error or 'no gate was reached'}", ""]
    lines += [f"- {name}: `{uri}`" for name, uri in there.items()]
    return "\n".join([*lines, "", f"outcome: `{join_uri(root, OUTCOME)}`"])
