"""Names on the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dmd2.errors import Refused, brief

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")
"""`owner/name`, with `@revision` if another one than the default is wanted."""


def check_hub_file(what: str, name: str, files: Sequence[str], timeout_s: float) -> None:
    """Raise Refused unless one of the files of a repository is in the cache, or can be read with the present account.

    Args:
        what: What the name is given as, for errors.
    """
    from huggingface_hub import try_to_load_from_cache

    repository, _, revision = name.partition("@")
    cached = (try_to_load_from_cache(repository, file, revision=revision or None) for file in files)
    if any(isinstance(path, str) for path in cached):
        return
    errors = [_refusal(repository, revision or None, file, timeout_s) for file in files]
    if all(errors):
        raise Refused(
            f"{what} {name} is no local folder, and as a name on the hub it cannot be read ({errors[0]}); check the name, the connection and "
            "the account (HF_TOKEN), or copy it to the bucket and give that address"
        )


def _refusal(repository: str, revision: str | None, file: str, timeout_s: float) -> str:
    """Why the hub does not give a file; empty if it does."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(repository, file, revision=revision), timeout=timeout_s)
    except Exception as error:  # those of the HTTP library have no class in common with the hub's
        return brief(error)
    return ""
