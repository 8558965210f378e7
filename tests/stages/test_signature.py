"""A package that is signed where a key is given, and what `verify --key` refuses."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dmd2 import stages
from dmd2.cli import run
from dmd2.io.artifact import Manifest, read_manifest, sealed_text
from dmd2.io.local import sha256
from dmd2.provenance import PROVENANCE
from dmd2.signature import SIGNATURE, authenticated_bytes, read_private_key, read_public_key, sign

Refusal = Callable[[Callable[[], object]], str]


def write_key(folder: Path, name: str, password: bytes = b"", key: Any = None) -> tuple[str, str]:
    """(private, public) half in PEM files."""
    key = key or Ed25519PrivateKey.generate()
    private, public = folder / f"{name}.pem", folder / f"{name}.public.pem"
    how = s.BestAvailableEncryption(password) if password else s.NoEncryption()
    private.write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, how))
    public.write_bytes(key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo))
    return str(private), str(public)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return write_key(tmp_path_factory.mktemp("keys"), "ours")


@pytest.fixture(scope="module")
def folders(made: Path) -> tuple[str, str, str]:
    return str(made / "run"), str(made / "evaluation"), str(made / "gate")


@pytest.fixture(scope="module")
def signed(
    folders: tuple[str, str, str], keys: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("signed") / "package"
    stages.package(*folders, str(out), key=keys[0])
    return out


@pytest.fixture
def package(signed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(signed, tmp_path / "package"))


def edit_envelope(package: Path, change: Callable[[Any], Any]) -> None:
    """Change the envelope, and list it in the manifest as it is then."""
    envelope = json.loads((package / SIGNATURE).read_text())
    (package / SIGNATURE).write_text(json.dumps(change(envelope)))
    listed = json.loads((package / "manifest.json").read_text())
    now = {"size": (package / SIGNATURE).stat().st_size, "sha256": sha256(package / SIGNATURE)}
    for file in listed["files"]:
        file |= now if file["path"] == SIGNATURE else {}
    (package / "manifest.json").write_text(sealed_text(Manifest.model_validate(listed)))


def test_what_is_signed_is_what_dsse_says() -> None:
    """The example of its specification."""
    assert (
        authenticated_bytes("http://example.com/HelloWorld", b"hello world")
        == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


def test_the_envelope_holds_the_statement_and_a_signature_of_it(signed: Path, keys: tuple[str, str]) -> None:
    envelope = json.loads((signed / SIGNATURE).read_text())
    statement = (signed / PROVENANCE).read_bytes()
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    assert base64.b64decode(envelope["payload"]) == statement
    (signature,) = envelope["signatures"]
    public: Any = s.load_pem_public_key(Path(keys[1]).read_bytes())
    raw = b"DSSEv1 28 application/vnd.in-toto+json %d " % len(statement) + statement
    public.verify(base64.b64decode(signature["sig"]), raw)
    assert read_manifest(signed, "package").facts["signed_by"] == signature["keyid"]


def test_a_signed_package_is_verified_with_the_public_key_alone(
    signed: Path, keys: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(["verify", str(signed), "--key", keys[1]])
    said = capsys.readouterr().out
    assert "signed_by " in said
    assert "restrictions" not in said, "what nobody has set is not listed"
    stages.verify(str(signed))


def test_the_key_may_be_a_mounted_secret(
    folders: tuple[str, str, str],
    signed: Path,
    keys: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Equal runs and equal keys give equal packages."""
    monkeypatch.setenv("DMD2_SIGNING_KEY", keys[0])
    again = stages.package(*folders, str(tmp_path / "again"))
    assert again.digest == read_manifest(signed, "package").digest


def test_a_package_of_another_key_is_not_taken_for_it(
    folders: tuple[str, str, str], made: Path, signed: Path, tmp_path: Path, refusal: Refusal
) -> None:
    other = write_key(tmp_path, "other")[0]
    assert "is signed with the key" in refusal(lambda: stages.package(*folders, str(signed), key=other))
    assert stages.package(*folders, str(signed)).kind == "package"


def other_signature(envelope: dict[str, Any]) -> dict[str, Any]:
    sig = bytearray(base64.b64decode(envelope["signatures"][0]["sig"]))
    sig[3] ^= 1
    return envelope | {"signatures": [envelope["signatures"][0] | {"sig": base64.b64encode(sig).decode()}]}


def other_statement(envelope: dict[str, Any]) -> dict[str, Any]:
    text = base64.b64decode(envelope["payload"]).replace(b'"fid_student": ', b'"fid_student": 1')
    return envelope | {"payload": base64.b64encode(text).decode()}


MISTAKES: list[tuple[str, Callable[[Any], Any]]] = [
    ("the signature was edited", other_signature),
    ("of another statement", other_statement),
    ("of another statement", lambda e: e | {"payloadType": "text/plain"}),
    ("signed with the key of nobody", lambda e: e | {"signatures": []}),
    ("is no DSSE envelope", lambda e: {}),
    ("is no DSSE envelope", lambda e: []),
    ("is no DSSE envelope", lambda e: e | {"payload": "!"}),
]


@pytest.mark.parametrize(("words", "change"), MISTAKES)
def test_an_edited_signature_is_refused(
    package: Path, keys: tuple[str, str], refusal: Refusal, words: str, change: Callable[[Any], Any]
) -> None:
    edit_envelope(package, change)
    assert words in refusal(lambda: stages.verify(str(package), key=keys[1]))


def test_another_signer_and_no_signature_are_refused(
    package: Path, folders: tuple[str, str, str], keys: tuple[str, str], tmp_path: Path, refusal: Refusal
) -> None:
    private, public = write_key(tmp_path, "other")
    assert "not with" in refusal(lambda: stages.verify(str(package), key=public))
    statement = (package / PROVENANCE).read_bytes()
    edit_envelope(package, lambda _: json.loads(sign(statement, read_private_key(private))))
    assert "is signed with the key" in refusal(lambda: stages.verify(str(package), key=keys[1]))
    stages.package(*folders, str(tmp_path / "unsigned"))
    assert "is not signed" in refusal(lambda: stages.verify(str(tmp_path / "unsigned"), key=keys[1]))


def test_what_is_no_key_is_refused_before_any_work(
    folders: tuple[str, str, str], keys: tuple[str, str], tmp_path: Path, refusal: Refusal
) -> None:
    out = str(tmp_path / "package")
    encrypted = write_key(tmp_path, "encrypted", b"secret")[0]
    other = write_key(tmp_path, "other", key=ec.generate_private_key(ec.SECP256R1()))
    (tmp_path / "text").write_text("hello")
    for path, words in (
        (encrypted, "is encrypted"), (other[0], "give an Ed25519 key"), (str(tmp_path / "text"), "is no private key"),
        (keys[1], "is no private key"), (str(tmp_path / "none"), "cannot be read (No such file"),
    ):  # fmt: skip
        said = refusal(lambda path=path: stages.package(*folders, out, key=path))  # type: ignore[misc]
        assert words in said
        assert "secret" not in said
    assert not Path(out).exists()
    assert "give an Ed25519 key" in refusal(lambda: read_public_key(other[1]))
    assert "is no public key" in refusal(lambda: read_public_key(keys[0]))
