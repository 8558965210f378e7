"""A package is checked: its files, its manifest, and the chain of digests it comes from."""

from __future__ import annotations

import json

from dmd2.errors import Refused
from dmd2.io.artifact import MANIFEST, Manifest, open_artifact, read_manifest
from dmd2.io.storage import join_uri, open_store

OF_THE_HUB = (".gitattributes", ".cache/huggingface/")
"""What a download from the Hugging Face Hub has beside the package."""


def verify(package: str, *, digest: str = "", key: str = "") -> Manifest:
    """Check a package without a network: every file by its digest, and manifest and provenance.json against each other.

    Whoever can write the whole package can write one that agrees with itself. Only its digest or a public key, from another
    place, tells that it is the one that was meant.

    Args:
        package: Folder of the package.
        digest: The digest it must have, or its first 16 digits or more, as in the address of a published model.
        key: PEM file with the public key (Ed25519) that it must be signed with.
    """
    from dmd2.provenance import PROVENANCE, check_statement
    from dmd2.signature import SIGNATURE, check_signature, read_public_key

    signer = read_public_key(key) if key else None
    manifest = read_manifest(package, "package")
    names = {file.path for file in manifest.files}
    found = {info.name for info in open_store(package).list_objects()}
    if others := {name for name in found - names - {MANIFEST} if not name.startswith(OF_THE_HUB)}:
        raise Refused(
            f"{join_uri(package, min(others))} is not in the manifest; remove it, or get the package again"
        )
    folder = open_artifact(package, manifest)
    if PROVENANCE not in names:
        raise Refused(f"{package} has no {PROVENANCE}: it is of an older version, package the run again")
    try:
        statement = json.loads((folder / PROVENANCE).read_bytes())
    except ValueError as error:
        raise Refused(f"{join_uri(package, PROVENANCE)} is no JSON: {error}") from None
    check_statement(package, manifest, statement)
    if signer:
        if SIGNATURE not in names:
            raise Refused(f"{package} is not signed (it has no {SIGNATURE}); package the run with --key")
        envelope = (folder / SIGNATURE).read_bytes()
        check_signature(join_uri(package, SIGNATURE), envelope, (folder / PROVENANCE).read_bytes(), signer)
    if len(digest) not in (0, *range(16, 65)) or not manifest.digest.startswith(digest):
        raise Refused(f"{package} has the digest {manifest.digest}, not {digest!r}; it is another package")
    return manifest
