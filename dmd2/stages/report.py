"""One HTML page about a whole run."""

from __future__ import annotations

from dmd2.errors import Refused
from dmd2.io.artifact import Manifest, open_artifact, read_manifest


def report(data: str, teacher: str, run: str, evaluation: str, gate: str, out: str, package: str = "") -> str:
    """Write one self-contained HTML page about a whole run.

    Args:
        data: Folder of shards.
        teacher: Folder of the teacher.
        run: Folder of the distillation.
        evaluation: Folder of its evaluation.
        gate: Folder of its gate.
        out: HTML file to write.
        package: Folder of the package, if there is one.
    """
    from dmd2.report import write_report
    from dmd2.stages.output_file import local_output

    kinds = {"shards": data, "teacher": teacher, "run": run, "evaluation": evaluation, "gate": gate}
    manifests = {kind: read_manifest(folder, kind) for kind, folder in kinds.items()}
    _belong_together(kinds, manifests)
    if package:
        manifests["package"] = read_manifest(package, "package")
    curves = open_artifact(run, manifests["run"], "metrics.jsonl", "previews/*")
    pictures = open_artifact(evaluation, manifests["evaluation"])
    with local_output(out) as path:
        write_report(path, manifests, curves, pictures)
    return out


def _belong_together(folders: dict[str, str], manifests: dict[str, Manifest]) -> None:
    """Each was made from the others that are given."""
    for kind, manifest in manifests.items():
        for name, digest in manifest.inputs.items():
            if name in manifests and manifests[name].digest != digest:
                raise Refused(
                    f"{folders[kind]} was not made from {folders[name]}, but from another {name} folder; give folders of one run"
                )
