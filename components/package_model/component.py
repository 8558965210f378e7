from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def package_model(
    root: str, run: dsl.Input[dsl.Model], evaluation: dsl.Input[dsl.Artifact], package: dsl.Output[dsl.Model]
) -> None:
    """Make a package of an accepted student, load it again and compare its samples with the student's.

    It is signed if the Secret `dmd2-signing-key` of the namespace has a private key (Ed25519) in `key.pem`.

    Args:
        root: Folder of the run; the package goes to `<root>/package`.
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
        stages.package(made, scores, f"{root}/gate", f"{root}/package", key=signed)
        package.metadata.update(artifact.write_pointer(f"{root}/package", "package", package.path))
