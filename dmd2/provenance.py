"""Where a package comes from: an in-toto statement with a SLSA provenance, from the data to every file.

The statement is one of the package's files, so the digest of the package covers it, and it covers the rest of the manifest:
whoever knows the digest can check everything offline. Digests called `dmd2Artifact` are those of the project's own folders,
computed from kind and files (`dmd2.io.artifact`). https://slsa.dev/spec/v1.0/provenance
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import dmd2
from dmd2.config import Config
from dmd2.errors import Refused
from dmd2.evaluation.scores import read_scores
from dmd2.io.artifact import ArtifactFile, Manifest
from dmd2.io.local import content_digest
from dmd2.signature import SIGNATURE

PROVENANCE = "provenance.json"
"""Name of the statement in a package."""
ARTIFACT = "dmd2Artifact"
CHAIN = {"run": (), "evaluation": ("run",), "gate": ("evaluation",)}
"""The artifacts that a package is made of, and which of the others each was made from."""
Statement = dict[str, Any]


def make_statement(
    files: Sequence[ArtifactFile],
    config: Config | None,
    facts: Mapping[str, Any],
    versions: Mapping[str, str],
    dependencies: Sequence[Mapping[str, Any]],
) -> Statement:
    """The statement about the files of a package, without its own.

    The time of packaging is left out, so that the same run gives the same package.
    """
    kept = {name: fact for name, fact in facts.items() if name != "made"}
    made = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": file.path, "digest": {"sha256": file.sha256}} for file in files],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": "https://dmd2.invalid/package/v1",
                "externalParameters": config.model_dump(mode="json") if config else {},
                "resolvedDependencies": dependencies,
            },
            "runDetails": {
                "builder": {"id": "https://dmd2.invalid/package", "version": versions},
                "byproducts": [{"name": "facts", "annotations": kept}],
            },
        },
    }
    return json.loads(json.dumps(made))


def dependencies_of(run: Manifest, evaluation: Manifest, gate: Manifest) -> list[dict[str, Any]]:
    """Code, checkpoint, run with what it was made from, scores, and the gate's decision."""
    code = {
        "name": "code",
        "uri": f"pkg:pypi/dmd2@{version('dmd2')}",
        "digest": {"sha256": code_digest()},
    }
    checkpoint = [
        {"name": f"run/{file.path}", "digest": {"sha256": file.sha256}}
        for file in run.files
        if file.path.endswith(".safetensors") and "/" not in file.path
    ]
    scores = {
        key: evaluation.facts[key]
        for key in ("scores", "metrics", "images", "seed")
        if key in evaluation.facts
    }
    return [
        code,
        *checkpoint,
        *(_descriptor(name, digest) for name, digest in run.inputs.items()),
        _descriptor("run", run.digest, inputs=run.inputs, versions=run.versions),
        _descriptor("evaluation", evaluation.digest, inputs=evaluation.inputs, **scores),
        _descriptor("gate", gate.digest, inputs=gate.inputs, **gate.facts),
    ]


def _descriptor(name: str, digest: str, **annotations: Any) -> dict[str, Any]:
    return {"name": name, "digest": {ARTIFACT: digest}} | (
        {"annotations": annotations} if annotations else {}
    )


def code_digest() -> str:
    """Digest of the source files of this library."""
    return content_digest(Path(dmd2.__file__).parent, "**/*.py")


def digest_of_teacher(statement: Statement) -> str:
    """Digest of the teacher that the run of a package was made from."""
    dependencies = statement["predicate"]["buildDefinition"]["resolvedDependencies"]
    (run,) = (each for each in dependencies if each["name"] == "run")
    return str(run["annotations"]["inputs"]["teacher"])


def check_statement(package: str, manifest: Manifest, found: Statement) -> None:
    """Refuse a package whose manifest says another thing than its statement, or whose chain of digests has a gap."""
    files = [file for file in manifest.files if file.path not in (PROVENANCE, SIGNATURE)]
    try:
        dependencies = found["predicate"]["buildDefinition"]["resolvedDependencies"]
        chain = {each["name"]: each for each in dependencies}
        gaps = [*_gaps(chain, manifest.inputs), *_other_scores(chain, manifest.facts)]
    except (KeyError, TypeError, AttributeError) as error:
        raise Refused(
            f"{package}/{PROVENANCE} is no statement of this version: {error} is missing or wrong"
        ) from None
    expected = make_statement(files, manifest.config, manifest.facts, manifest.versions, dependencies)
    if wrong := [*_differences(found, expected), *gaps]:
        raise Refused(f"{package} is not what its {PROVENANCE} says: {'; '.join(wrong[:3])}")


def _gaps(chain: Mapping[str, Any], inputs: Mapping[str, str]) -> Iterator[str]:
    """Where the digest of an artifact is not the one that the next was made from."""
    for name, before in CHAIN.items():
        digest = chain[name]["digest"][ARTIFACT]
        if inputs.get(name) != digest:
            yield f"the package was made from {name} {inputs.get(name, '')[:16]}, the chain has {digest[:16]}"
        for other in before:
            if chain[name]["annotations"]["inputs"].get(other) != chain[other]["digest"][ARTIFACT]:
                yield f"the {name} is of another {other} than the chain's"
    for name, digest in chain["run"]["annotations"]["inputs"].items():
        if chain[name]["digest"][ARTIFACT] != digest:
            yield f"the run was made from another {name} than the chain's"


def _other_scores(chain: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[str]:
    """Scores of the student in the package that are not those of the evaluation in the chain."""
    for scores in read_scores(chain["evaluation"]["annotations"]):
        noted, measured = facts.get(f"{scores.name}_student"), scores.values["student"]
        if noted != measured:
            yield f"{scores.name} of the student is {noted} in the package and {measured} in the evaluation"


def _differences(found: Any, expected: Any, where: str = "") -> Iterator[str]:
    """`place: value of the statement, not value of the manifest`, for each place that differs."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in sorted(found.keys() | expected.keys()):
            yield from _differences(found.get(key), expected.get(key), f"{where}.{key}".removeprefix("."))
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        for index, pair in enumerate(zip(found, expected, strict=True)):
            yield from _differences(*pair, f"{where}[{index}]")
    elif found != expected:
        yield f"{where} is {str(found)[:80]}, the manifest has {str(expected)[:80]}"
