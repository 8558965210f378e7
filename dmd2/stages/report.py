"""One HTML page about a whole run, with what was made before it."""

from __future__ import annotations

from dmd2.errors import Refused
from dmd2.io.artifact import Manifest, open_artifact, read_manifest

KINDS = {"start": "run"}
"""Kinds of artifacts that are called otherwise here."""


def report(
    data: str,
    teacher: str,
    run: str,
    evaluation: str,
    gate: str,
    out: str,
    package: str = "",
    start: str = "",
    pairs: str = "",
) -> str:
    """Write one self-contained HTML page about a whole run.

    Args:
        data: Folder of shards.
        teacher: Folder of the teacher.
        run: Folder of the distillation.
        evaluation: Folder of its evaluation.
        gate: Folder of its gate.
        out: HTML file to write.
        package: Folder of the package, if there is one.
        start: Folder of the run that the distillation started from, if it did.
        pairs: Folder of the pairs that it, or the run that it started from, learned from.
    """
    from dmd2.report import write_report
    from dmd2.stages.output_file import local_output

    folders = {
        "shards": data,
        "teacher": teacher,
        "pairs": pairs,
        "start": start,
        "run": run,
        "evaluation": evaluation,
        "gate": gate,
    }
    folders = {name: folder for name, folder in folders.items() if folder}
    manifests = {name: read_manifest(folder, KINDS.get(name, name)) for name, folder in folders.items()}
    _belong_together(folders, manifests)
    if package:
        manifests["package"] = read_manifest(package, "package")
    curves = {
        name: open_artifact(folders[name], manifests[name], "metrics.jsonl", "previews/*")
        for name in ("run", "start")
        if name in folders
    }
    pictures = open_artifact(evaluation, manifests["evaluation"])
    with local_output(out) as path:
        write_report(path, manifests, curves["run"], pictures, curves.get("start"))
    return out


def _belong_together(folders: dict[str, str], manifests: dict[str, Manifest]) -> None:
    """Each was made from the others that are given."""
    for kind, manifest in manifests.items():
        for name, digest in manifest.inputs.items():
            if name in manifests and manifests[name].digest != digest:
                raise Refused(
                    f"{folders[kind]} was not made from {folders[name]}, but from another {name} folder; give folders of one run"
                )
