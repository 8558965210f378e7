"""Stages that hand a run over: the package, where it is published, the report."""

from __future__ import annotations

import shutil

import torch

from dmd2 import report as reports
from dmd2.errors import Refused
from dmd2.image_grid import grid
from dmd2.io.artifact import MANIFEST, Manifest, drafted, finished, opened, read
from dmd2.io.storage import at
from dmd2.model import load_network, model_card, save_network
from dmd2.stages.common import columns, delivered, network_of, save_png


def package(run: str, evaluation: str, gate: str, out: str) -> Manifest:
    """Make what users load: weights, how to use them, a model card. Then load it and compare.

    Args:
        run: Folder of the distillation.
        evaluation: Folder of its evaluation.
        gate: Folder of the gate that accepted it.
        out: Folder to make.
    """
    made, judged, decided = read(run, "run"), read(evaluation, "evaluation"), read(gate, "gate")
    if judged.inputs["run"] != made.digest or decided.inputs["evaluation"] != judged.digest:
        raise Refused(
            f"{evaluation} and {gate} do not judge the run in {run}; evaluate that run and pass it through the gate"
        )
    if decided.facts["decision"] != "accepted":
        raise Refused(f"{gate} rejected this run ({decided.facts['reason']}); nothing is packaged")
    inputs = {"run": made.digest, "evaluation": judged.digest, "gate": decided.digest}
    if done := finished(out, "package", made.config, inputs):
        return done
    model = network_of(run, made)
    with drafted(out, "package", made.config, inputs) as draft:
        save_network(draft.path, model, model.network.state_dict())
        if made.config and made.config.distill.lora and not made.facts.get("adopted"):
            shutil.copytree(opened(run, made, "lora/*") / "lora", draft.path / "lora")
        (draft.path / "README.md").write_text(model_card(made, judged, decided))
        prompts = made.facts["prompts"]
        images = model.sample(prompts, seed=0)
        save_png(grid(images, columns(model.config)), draft.path / "samples.png")
        if not torch.equal(load_network(draft.path).sample(prompts, seed=0), images):
            raise Refused(
                "the package, loaded again, does not sample what the run samples; it was not published"
            )
        draft.facts |= {
            "recipe": made.config.recipe if made.config else "",
            "fid_student": judged.facts["fid_student"],
        }
    return read(out, "package")


def publish(package: str, out: str) -> Manifest:
    """Copy a package to where models are kept, its manifest last. What is published is never replaced.

    Args:
        package: Folder of the package.
        out: Folder to make, local or gs://.
    """
    made = read(package, "package")
    if at(out).generation(MANIFEST):
        there = read(out, "package")
        if there.digest != made.digest:
            raise Refused(
                f"{out} holds another package ({there.digest[:16]}, not {made.digest[:16]}); choose another --out"
            )
        return there
    with drafted(out, "package", made.config, made.inputs) as draft:
        whole = opened(package, made)
        for file in made.files:
            (draft.path / file.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(whole / file.path, draft.path / file.path)
        draft.facts |= made.facts
    return read(out, "package")


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
    kinds = {"shards": data, "teacher": teacher, "run": run, "evaluation": evaluation, "gate": gate}
    manifests = {kind: read(folder, kind) for kind, folder in kinds.items()}
    _belong_together(kinds, manifests)
    if package:
        manifests["package"] = read(package, "package")
    curves = opened(run, manifests["run"], "metrics.jsonl", "previews/*")
    pictures = opened(evaluation, manifests["evaluation"])
    with delivered(out) as path:
        reports.write_report(path, manifests, curves, pictures)
    return out


def _belong_together(folders: dict[str, str], manifests: dict[str, Manifest]) -> None:
    """Each was made from the others that are given."""
    for kind, manifest in manifests.items():
        for name, digest in manifest.inputs.items():
            if name in manifests and manifests[name].digest != digest:
                raise Refused(
                    f"{folders[kind]} was not made from {folders[name]}, but from another {name} folder; give folders of one run"
                )
