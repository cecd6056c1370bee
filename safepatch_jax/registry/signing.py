"""Signatures of manifests: ed25519, by the package cryptography, which nothing else here needs."""

from __future__ import annotations

import pathlib
import re
from typing import Any

from safepatch_jax.runtime import libraries
from safepatch_jax.runtime.paths import readable
from safepatch_jax.runtime.reading import Refused, reading

KEY, VALUE = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{128}")
_CONTEXT = b"safepatch registry, manifest\n"  # before what is signed
_LARGEST = 1 << 16  # bytes of a file with a key
_MAKE = "Make one: openssl genpkey -algorithm ed25519 -out key.pem"
_PUBLIC = "Give a file with an ed25519 public key (openssl pkey -in key.pem -pubout), or its 64 hex"


def private_key(path: str | pathlib.Path) -> Any:
    """Read a private key (PEM or OpenSSH, without a passphrase). Raises ValueError if it is none,
    or cryptography is not installed."""
    _needed()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    content = _content(path)
    load = serialization.load_pem_private_key
    if b"OPENSSH" in content:
        load = serialization.load_ssh_private_key
    with reading(path, "a private key without a passphrase", f"{_MAKE}."):
        key = load(content, None)
    if not isinstance(key, Ed25519PrivateKey):
        raise Refused(f"{path} is a private key of another kind than ed25519. {_MAKE}.")
    return key


def public_key(text: str) -> str:
    """Return a public key in hex: of a file (PEM or OpenSSH), or as it is. Raises ValueError if it
    is none, or cryptography is not installed."""
    _needed()
    if KEY.fullmatch(text.lower()) and not pathlib.Path(text).exists():
        return text.lower()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    content = _content(text)
    load = serialization.load_pem_public_key
    if content.startswith(b"ssh-"):
        load = serialization.load_ssh_public_key
    with reading(text, "a public key", f"{_PUBLIC} digits."):
        key = load(content)
    if not isinstance(key, Ed25519PublicKey):
        raise Refused(f"{text} is a public key of another kind than ed25519. {_MAKE}.")
    return key.public_bytes_raw().hex()


def sign(key: Any, content: bytes) -> dict[str, str]:
    """Return the signature of a manifest: the public key and the value, in hex."""
    value = key.sign(_CONTEXT + content)
    return {"key": public_of(key), "value": value.hex()}


def public_of(key: Any) -> str:
    """Return the public key of a private one, in hex."""
    return key.public_key().public_bytes_raw().hex()


def is_right(signature: dict[str, str], content: bytes) -> bool:
    """Return whether a signature is its key's of a manifest. Raises ValueError if cryptography is
    not installed."""
    _needed()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signature["key"]))
    try:
        key.verify(bytes.fromhex(signature["value"]), _CONTEXT + content)
    except InvalidSignature:
        return False
    return True


def _needed() -> None:
    libraries.refuse_missing("Signatures ('safepatch-jax[sign]')", "cryptography")


def _content(path: str | pathlib.Path) -> bytes:
    with reading(path, "a key", "Give the path of its file."):
        with open(readable(path), "rb") as file:
            content = file.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise Refused(f"{path} is larger than any key. Give the path of the key's file.")
    return content
