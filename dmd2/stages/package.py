"""The package of an accepted student: what users load."""

from __future__ import annotations

import json
import os
import shutil
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from dmd2.config import Config
from dmd2.errors import Refused
from dmd2.evaluation.scores import read_scores, student_facts
from dmd2.io.artifact import Manifest, find_finished, open_artifact, read_manifest
from dmd2.io.local import write_text
from dmd2.io.staging import Draft, draft_artifact, package_versions
from dmd2.licence import Terms, terms_of_use
from dmd2.signature import SIGNATURE, key_id, read_private_key, sign

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from dmd2.model import Model
    from dmd2.models.family import Prompt

SingleFile = Literal["float16", "bfloat16", "float32", "none"]


def package(
    run: str,
    evaluation: str,
    gate: str,
    out: str,
    *,
    single_file: SingleFile = "float16",
    teacher: str = "",
    low_rank: int = 0,
    license: str = "",
    license_link: str = "",
    restrictions: str = "",
    safety_checker: str = "",
    key: str = "",
) -> Manifest:
    """Make a package of an accepted student: weights, model card and sample pictures. Then load it and compare its samples.

    Args:
        run: Folder of the distillation.
        evaluation: Folder of its evaluation.
        gate: Folder of the gate that accepted it.
        out: Folder to write the package to.
        single_file: For sd15 and sdxl: precision of all networks in one file for ComfyUI, A1111 and Forge; none = no such file.
        teacher: Folder of the run's teacher; only needed with `low_rank`.
        low_rank: Rank of a low-rank update of the teacher that is extracted from a student whose whole network was trained; 0 = none.
        license: Licence of the weights, for the model card: an identifier of the Hugging Face Hub, such as openrail++; other = none of
            those; empty = what the teacher's own card said when it was resolved.
        license_link: Address of its text.
        restrictions: What users must not do, for the model card.
        safety_checker: Pipeline of Stable Diffusion 1.5 (folder, gs:// or name on the hub) whose safety checker the package gets; empty = none.
        key: PEM file with the private key (Ed25519) that signs where the package comes from; by default the file that the environment
            variable DMD2_SIGNING_KEY names. Without either it is not signed.
    """
    said = Terms(license, license_link, restrictions)
    said.check()
    made, evaluated, decided = _read_accepted(run, evaluation, gate)
    terms, data_terms = terms_of_use(made, said)
    options: dict[str, str | int] = {"single_file": single_file, "low_rank": low_rank}
    options |= {
        "safety_checker": safety_checker,
        "license": terms.license or "other",
        "license_link": terms.link,
        "restrictions": restrictions,
    }
    inputs = {"run": made.digest, "evaluation": evaluated.digest, "gate": decided.digest}
    signer = read_private_key(path) if (path := key or os.environ.get("DMD2_SIGNING_KEY", "")) else None
    signed_by = key_id(signer.public_key()) if signer else ""
    if done := find_finished(out, "package", made.config, inputs):
        _check_same_options(done, out, options, signed_by)
        return done
    if low_rank:
        _check_extraction(made, teacher, low_rank)
    from dmd2.encoders.safety import add_safety_checker
    from dmd2.model_card import forms_table, model_card
    from dmd2.stages.networks import load_artifact_model

    model = load_artifact_model(run, made)
    with draft_artifact(out, "package", made.config, inputs) as draft:
        forms = _write_networks(draft, run, made, model, single_file, teacher, low_rank, terms.title)
        sizes = {name: (draft.path / name).stat().st_size for name in forms}
        usage = model.family.usage(model.timesteps) + forms_table(forms, sizes)
        (draft.path / "README.md").write_text(model_card(made, evaluated, decided, usage, terms, data_terms))
        if safety_checker:
            add_safety_checker(safety_checker, draft.path)
        _write_samples(draft, model, made.facts["prompts"])
        draft.facts |= options | ({"signed_by": signed_by} if signer else {})
        draft.facts["recipe"] = made.config.recipe if made.config else ""
        draft.facts["made"] = datetime.now(UTC).isoformat()
        draft.facts["scored"] = student_facts(evaluated.facts, evaluated.inputs)
        for scores in read_scores(evaluated.facts):
            draft.facts[f"{scores.name}_student"] = scores.values["student"]
        _write_provenance(draft, made, evaluated, decided, signer)
    return read_manifest(out, "package")


def _read_accepted(run: str, evaluation: str, gate: str) -> tuple[Manifest, Manifest, Manifest]:
    """The manifests, or Refused if they do not belong together or the gate did not accept the run."""
    made = read_manifest(run, "run")
    evaluated, decided = read_manifest(evaluation, "evaluation"), read_manifest(gate, "gate")
    if evaluated.inputs["run"] != made.digest or decided.inputs["evaluation"] != evaluated.digest:
        raise Refused(
            f"{evaluation} and {gate} do not belong to the run in {run}; evaluate that run and pass it through the gate"
        )
    if decided.facts["decision"] != "accepted":
        raise Refused(
            f"{gate} did not accept this run ({decided.facts['decision']}: {decided.facts['reason']}); nothing is packaged"
        )
    return made, evaluated, decided


def _check_same_options(done: Manifest, out: str, options: dict[str, str | int], signed_by: str) -> None:
    """Raise Refused if a finished package was made with other options, or should be signed with a key and is not."""
    for name, value in options.items():
        if (was := done.facts.get(name, value)) != value:
            flag = name.replace("_", "-")
            raise Refused(
                f"{out} was made with --{flag} {was}, not {value}; choose another --out or remove it"
            )
    if signed_by and (was := done.facts.get("signed_by")) != signed_by:
        raise Refused(
            f"{out} is {f'signed with the key {was[:16]}' if was else 'not signed'}, and should be with {signed_by[:16]}; choose "
            "another --out or remove it"
        )


def _write_networks(
    draft: Draft,
    run: str,
    made: Manifest,
    model: Model,
    single_file: SingleFile,
    teacher: str,
    low_rank: int,
    title: str,
) -> dict[str, str]:
    """Write the student in all its forms, with the title of its licence. {file: what it is used for}, for the model card."""
    from dmd2.model import save_network
    from dmd2.stages.networks import save_extraction

    save_network(draft.path, model, model.network.state_dict())
    if _has_update(made):
        shutil.copytree(open_artifact(run, made, "lora/*") / "lora", draft.path / "lora")
    if low_rank:
        draft.facts["low_rank_share"] = save_extraction(draft, model, teacher, low_rank)
    forms = model.family.write_forms(draft.path, model.timesteps, single_file, title)
    if low_rank:
        held = f"rank {low_rank}, extracted: it holds {draft.facts['low_rank_share']:.1%} of the squared change of the weights"
        forms |= {name: f"{use}; {held}" for name, use in forms.items() if name.startswith("lora/")}
    return forms


def _write_samples(draft: Draft, model: Model, prompts: list[Prompt]) -> None:
    """Write sample pictures, and compare them with those of the package as users load it."""
    import torch

    from dmd2.image_grid import image_grid
    from dmd2.model import load_network
    from dmd2.stages.pictures import save_png
    from dmd2.stages.prompts import grid_columns

    images = model.sample(prompts, seed=0)
    save_png(image_grid(images, grid_columns(model.config)), draft.path / "samples.png")
    if not torch.equal(load_network(draft.path).sample(prompts, seed=0), images):
        raise Refused("the package, loaded again, does not give the samples of the run; it was discarded")


def _write_provenance(
    draft: Draft, made: Manifest, evaluated: Manifest, decided: Manifest, signer: Ed25519PrivateKey | None
) -> None:
    """Write the list of the environment's packages and where every file comes from, signed if there is a key."""
    from dmd2.provenance import PROVENANCE, dependencies_of, make_statement
    from dmd2.sbom import SBOM, bill_of_materials

    write_text(draft.path / SBOM, json.dumps(bill_of_materials(), indent=1))
    dependencies = dependencies_of(made, evaluated, decided)
    statement = make_statement(draft.list_files(), made.config, draft.facts, package_versions(), dependencies)
    write_text(draft.path / PROVENANCE, text := json.dumps(statement, indent=1))
    if signer:
        write_text(draft.path / SIGNATURE, sign(text.encode(), signer))


def _has_update(run: Manifest) -> bool:
    """Whether a run holds a low-rank update beside the whole network."""
    return bool(run.config and run.config.distill.lora and not run.facts.get("adopted"))


def check_extracts(config: Config, rank: int, has_update: bool) -> None:
    """Raise Refused if students of this Config have no update of this rank to be extracted.

    Args:
        has_update: Whether they were trained as low-rank updates.
    """
    from dmd2.models.family import family_class

    if rank < 1 or not family_class(config.family).lora_targets or has_update:
        raise Refused(
            f"low-rank is {rank}; give a positive rank, for a student of sd15 or sdxl whose whole network was trained: this one is of another "
            "family, or has an update of its own"
        )


def _check_extraction(run: Manifest, teacher: str, rank: int) -> None:
    """Raise Refused if no low-rank update can be extracted from the student of a run."""
    if not teacher:
        raise Refused(f"--low-rank {rank} needs --teacher with the folder of the run's teacher")
    if run.config:
        check_extracts(run.config, rank, _has_update(run))
    if read_manifest(teacher, "teacher").digest != run.inputs["teacher"]:
        raise Refused(f"{teacher} is not the teacher of this run (the digests differ); give that one")
