from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def package_model(
    root: str,
    license: str,
    license_link: str,
    restrictions: str,
    safety_checker: str,
    low_rank: int,
    teacher: dsl.Input[dsl.Model],
    run: dsl.Input[dsl.Model],
    evaluation: dsl.Input[dsl.Artifact],
    package: dsl.Output[dsl.Model],
) -> None:
    """Make a package of an accepted student, load it again and compare its samples with the student's.

    It is signed if the Secret `dmd2-signing-key` of the namespace has a private key (Ed25519) in `key.pem`.

    Args:
        root: Folder of the run; the package goes to `<root>/package`.
        license: Licence of the weights, for the model card; empty = that of the teacher.
        license_link: Address of its text, or empty.
        restrictions: What users must not do, for the model card.
        safety_checker: Pipeline whose safety checker the package gets, or empty.
        low_rank: Rank of an update of the teacher that is extracted from the student, or 0.
        teacher: The teacher, of which only `low_rank` needs the weights.
        run: The student.
        evaluation: Its scores.
        package: Points to the package by URI and digest; the file itself is its manifest.
    """
    import os

    from dmd2 import stages
    from dmd2.errors import one_sentence
    from dmd2.io import artifact

    key = "/var/run/dmd2-signing-key/key.pem"
    with one_sentence():
        made, scores = run.metadata["uri"], evaluation.metadata["uri"]
        signed = key if os.path.exists(key) else ""
        stages.package(
            made,
            scores,
            f"{root}/gate",
            f"{root}/package",
            license=license,
            license_link=license_link,
            restrictions=restrictions,
            safety_checker=safety_checker,
            low_rank=low_rank,
            teacher=teacher.metadata["uri"],
            key=signed,
        )
        package.metadata.update(artifact.write_pointer(f"{root}/package", "package", package.path))
