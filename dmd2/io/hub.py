"""Names on the Hugging Face Hub, and publishing there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

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


HUB = "hf://"
"""Scheme of an address on the hub: `hf://owner/name`."""


def commit_to_hub(address: str, tag: str, files: Mapping[str, Path | bytes], message: str) -> None:
    """Make these files the content of a repository of the hub, in one commit with a tag that is never moved.

    A repository that is not there is made, for its owner only. Other files leave its main branch; the tags of earlier commits
    still have them. Interrupted, it is completed by the same call. The account is that of `HF_TOKEN`, or of `hf auth login`.

    Args:
        address: `hf://owner/name`.
        files: Name -> local path, or content.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    name, api = repository_name(address), HfApi()
    with _hub_errors(address):
        api.create_repo(name, exist_ok=True, private=True)
        head = api.repo_info(name).sha
        stale = {*api.list_repo_files(name, revision=head)} - {*files, ".gitattributes"}
        additions = [
            CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
            for path, content in files.items()
        ]
        deletions = [CommitOperationDelete(path) for path in sorted(stale)]
        made = api.create_commit(name, [*additions, *deletions], commit_message=message, parent_commit=head)
        api.create_tag(name, tag=tag, revision=made.oid)


def check_hub_account(address: str) -> None:
    """Raise Refused unless there is a token with which the repository can be written to. One that is not there yet would be made."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    name, api = repository_name(address), HfApi()
    with _hub_errors(address):
        account = api.whoami()
        if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise Refused(f"the token of {account['name']} may only read")
        with suppress(RepositoryNotFoundError):
            api.auth_check(name, write=True)


def read_from_hub(address: str, tag: str, file: str) -> bytes | None:
    """The content of a small file under a tag of a repository; None if there is no such repository or tag."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    name, api = repository_name(address), HfApi()
    with _hub_errors(address):
        try:
            commits = [ref.target_commit for ref in api.list_repo_refs(name).tags if ref.name == tag]
        except RepositoryNotFoundError:
            return None
        return Path(api.hf_hub_download(name, file, revision=commits[0])).read_bytes() if commits else None


def repository_name(address: str) -> str:
    """`owner/name` of an address; raises Refused if it is none."""
    name = address.removeprefix(HUB).rstrip("/")
    if not HUB_NAME.fullmatch(name) or "@" in name:
        raise Refused(f"{address} is no repository of the hub; give {HUB}owner/name")
    return name


@contextmanager
def _hub_errors(address: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # those of the HTTP library have no class in common with the hub's
        raise Refused(
            f"{address} cannot be used ({brief(error)}); check the name, the connection and the account (HF_TOKEN, with the right "
            "to write)"
        ) from None
