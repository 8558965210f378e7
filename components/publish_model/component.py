from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def publish_model(
    destination: str, recipe: str, package: dsl.Input[dsl.Model], model: dsl.Output[dsl.Model]
) -> None:
    """Copy a package to the folder of published models, under its recipe and digest.

    A published package is never replaced, so the content of an address never changes.

    Args:
        destination: Folder of published models; the package goes to `<destination>/<recipe>/<digest>`.
        recipe: Name of its recipe.
        package: The package.
        model: Points to the published model by URI and digest; the file itself is its manifest.
    """
    import logging

    from dmd2 import stages
    from dmd2.errors import one_sentence
    from dmd2.io import artifact

    with one_sentence():
        out = f"{destination.rstrip('/')}/{recipe}/{package.metadata['digest'][:16]}"
        stages.publish(package.metadata["uri"], out)
        model.metadata.update(artifact.write_pointer(out, "package", model.path))
    logging.getLogger("components.publish_model").info("published: %s", out)
