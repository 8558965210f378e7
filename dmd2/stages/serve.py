"""A page and an HTTP API that draw with packages."""

from __future__ import annotations

from typing import Literal

from dmd2.errors import Refused
from dmd2.io.artifact import read_manifest


def serve(
    packages: tuple[str, ...],
    *,
    teachers: tuple[str, ...] = (),
    tiny_vae: str = "",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    host: str = "127.0.0.1",
    port: int = 7860,
    queue: int = 32,
    max_images: int = 16,
    max_prompt: int = 1000,
) -> str:
    """Serve a page and an HTTP API that draw with packages, until Ctrl-C. Reads no file that a visitor names, and reaches no other server.

    Args:
        packages: Folders of packages, or of finished runs.
        teachers: Folders of their teachers, which draw beside them from the same noise; each is found by its digest.
        tiny_vae: Folder of a tiny VAE (AutoencoderTiny) for fast decoding, which visitors switch on.
        dtype: Precision of the networks; bfloat16 and float16 are faster on a GPU.
        host: Address to listen at. 127.0.0.1 is this machine only; 0.0.0.0 is whoever reaches it: there are no passwords.
        port: Port to listen at; 0 = a free one.
        queue: Largest number of requests that wait; more are refused.
        max_images: Largest number of images of a request.
        max_prompt: Largest number of characters of a prompt.
    """
    if not packages:
        raise Refused("no package is given; name the folder of one")
    for name, value in {"queue": queue, "max_images": max_images, "max_prompt": max_prompt}.items():
        if value < 1:
            raise Refused(f"{name} is {value}; it must be at least 1")
    found = [(folder, read_manifest(folder, "package", "run")) for folder in packages]
    of_teachers = [(folder, read_manifest(folder, "teacher")) for folder in teachers]
    try:
        from dmd2.serve.page import make_app, run_app
    except ModuleNotFoundError as error:
        raise Refused(
            f"{error.name} is not installed, which the page needs; install dmd2 with the extra `serve`"
        ) from None
    import torch

    from dmd2.serve.request import Limits
    from dmd2.serve.students import load_students

    students = load_students(found, of_teachers, tiny_vae, getattr(torch, dtype))
    run_app(make_app(students, Limits(max_images, max_prompt), queue), host, port)
    return "the page was closed"
