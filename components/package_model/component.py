from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def package_model(
    root: str, run: dsl.Input[dsl.Model], evaluation: dsl.Input[dsl.Artifact], package: dsl.Output[dsl.Model]
) -> None:
    """Make a package of an accepted student, load it again and compare its samples with the student's.

    Args:
        root: Folder of the run; the package goes to `<root>/package`.
        run: The student.
        evaluation: Its scores.
        package: Points to the package by URI and digest; the file itself is its manifest.
    """
    from dmd2 import stages
    from dmd2.errors import one_sentence
    from dmd2.io import artifact

    with one_sentence():
        stages.package(run.metadata["uri"], evaluation.metadata["uri"], f"{root}/gate", f"{root}/package")
        package.metadata.update(artifact.write_pointer(f"{root}/package", "package", package.path))
