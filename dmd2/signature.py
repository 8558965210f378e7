"""Signatures of the statement in a package: a DSSE envelope, as in-toto prescribes, with Ed25519.

The key is a PEM file, and stays outside of the package and of the command line:
`openssl genpkey -algorithm ed25519 -out key.pem` makes one, `openssl pkey -in key.pem -pubout -out public.pem` its public half.
https://github.com/secure-systems-lab/dsse
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmd2.errors import Refused, brief

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE = "provenance.dsse.json"
"""Name of the envelope in a package."""
PAYLOAD_TYPE = "application/vnd.in-toto+json"


def sign(statement: bytes, key: Ed25519PrivateKey) -> str:
    """The envelope of a statement, as JSON."""
    signature = key.sign(authenticated_bytes(PAYLOAD_TYPE, statement))
    envelope = {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(statement).decode(),
        "signatures": [{"keyid": key_id(key.public_key()), "sig": base64.b64encode(signature).decode()}],
    }
    return json.dumps(envelope, indent=1)


def check_signature(name: str, envelope: bytes, statement: bytes, key: Ed25519PublicKey) -> None:
    """Raise Refused unless the envelope holds this statement, signed with the private half of the key.

    Args:
        name: Address of the envelope, for errors.
    """
    from cryptography.exceptions import InvalidSignature

    try:
        found = json.loads(envelope)
        kind, payload = found["payloadType"], base64.b64decode(found["payload"], validate=True)
        signed = {each["keyid"]: base64.b64decode(each["sig"], validate=True) for each in found["signatures"]}
    except (ValueError, KeyError, TypeError, binascii.Error):
        raise Refused(f"{name} is no DSSE envelope; get the package again") from None
    if kind != PAYLOAD_TYPE or payload != statement:
        raise Refused(
            f"{name} is the signature of another statement than that of the package; get the package again"
        )
    if (wanted := key_id(key)) not in signed:
        raise Refused(
            f"{name} is signed with the key {', '.join(each[:16] for each in signed) or 'of nobody'}, not with {wanted[:16]}; give the "
            "public half of the key that signs your packages"
        )
    try:
        key.verify(signed[wanted], authenticated_bytes(kind, payload))
    except InvalidSignature:
        raise Refused(
            f"{name} says that it is signed with the key {wanted[:16]}, and is not: the signature was edited; get the package again"
        ) from None


def authenticated_bytes(kind: str, payload: bytes) -> bytes:
    """What is signed (PAE of DSSE 1.0): type and payload, each after its length."""
    return b"DSSEv1 %d %s %d %s" % (len(kind.encode()), kind.encode(), len(payload), payload)


def key_id(key: Ed25519PublicKey) -> str:
    """sha256 of the public key in DER (SubjectPublicKeyInfo)."""
    from cryptography.hazmat.primitives import serialization as s

    der = key.public_bytes(s.Encoding.DER, s.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def read_private_key(path: str) -> Ed25519PrivateKey:
    """The private key in a PEM file; refused if it is none, encrypted, or of another kind."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = _read_key(path, "private", lambda data: serialization.load_pem_private_key(data, None))
    return _require(key, Ed25519PrivateKey, path)


def read_public_key(path: str) -> Ed25519PublicKey:
    """The public key in a PEM file; refused if it is none, or of another kind."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    return _require(_read_key(path, "public", serialization.load_pem_public_key), Ed25519PublicKey, path)


def _read_key(path: str, half: str, parse: Callable[[bytes], Any]) -> Any:
    try:
        return parse(Path(path).read_bytes())
    except OSError as error:
        raise Refused(f"the key {path} cannot be read ({error.strerror}); give a PEM file") from None
    except TypeError:
        raise Refused(
            f"the key {path} is encrypted; give one without a password, readable for this account only"
        ) from None
    except Exception as error:  # those of OpenSSL have no class in common
        raise Refused(f"{path} is no {half} key in PEM ({brief(error)}); give an Ed25519 key") from None


def _require(key: Any, kind: Any, path: str) -> Any:
    if not isinstance(key, kind):
        raise Refused(
            f"the key {path} is a {type(key).__name__.strip('_')}; give an Ed25519 key (openssl genpkey -algorithm ed25519)"
        )
    return key
