from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def publish_model(
    destination: str,
    recipe: str,
    hub: str,
    model_registry: str,
    package: dsl.Input[dsl.Model],
    model: dsl.Output[dsl.Model],
) -> None:
    """Copy a package to the folder of published models, under its recipe and digest, and to the hub if one is given.

    A published package is never replaced, so the content of an address never changes.

    Args:
        destination: Folder of published models; the package goes to `<destination>/<recipe>/<digest>`.
        recipe: Name of its recipe.
        hub: Repository of the Hugging Face Hub, `hf://owner/name`, or empty. The account is that of the environment variable HF_TOKEN.
        model_registry: Address of a Kubeflow Model Registry in which the folder is noted, or empty.
        package: The package.
        model: Points to the published model by URI and digest; the file itself is its manifest.
    """
    import logging

    from dmd2 import stages
    from dmd2.errors import one_sentence
    from dmd2.io import artifact

    with one_sentence():
        out = f"{destination.rstrip('/')}/{recipe}/{package.metadata['digest'][:16]}"
        made = package.metadata["uri"]
        if hub:
            stages.publish(made, hub)
        stages.publish(made, out, registry=model_registry)
        model.metadata.update(artifact.write_pointer(out, "package", model.path))
    logging.getLogger("components.publish_model").info("published: %s", out)
