"""Key files: a private key a file, owner-only; the roots' public keys in one text file.

LABEL.key   PEM, PKCS #8, mode 0600; refused when others may read it
roots.txt   one `label base64` a line, # comments; the only trust outside the log
"""

from __future__ import annotations

import base64
import binascii
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from schemas import names
from schemas.errors import SettingsInvalid


def generate(directory: Path, label: str) -> Path:
    """Makes a private key file; refuses to replace one."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{names.name(label, 'key label')}.key"
    pem = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise SettingsInvalid(f"{path} is there already; a key file is never replaced") from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(file.fileno())
    return path


def load_private(path: Path) -> Ed25519PrivateKey:
    try:
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise SettingsInvalid(f"{path} may be read by others; chmod 600 it")
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise SettingsInvalid(f"private key {path}: {error.strerror}") from None
    except (ValueError, TypeError):
        raise SettingsInvalid(f"{path} is not a private key in PEM") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise SettingsInvalid(f"{path} is not an Ed25519 key")
    return key


def load_roots(path: Path) -> tuple[bytes, ...]:
    """The roots' public keys, 32 bytes each; at least one."""
    roots = []
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsInvalid(f"root keys {path}: {error}") from None
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            key = base64.b64decode(words[-1], validate=True)
        except binascii.Error:
            key = b""
        if len(words) != 2 or len(key) != 32:
            raise SettingsInvalid(f"{path} line {number} is not `label base64` of a 32-byte public key")
        roots.append(key)
    if not roots:
        raise SettingsInvalid(f"{path} names no root key")
    return tuple(roots)


def write_roots(path: Path, roots: Mapping[str, Ed25519PrivateKey]) -> Path:
    """The file of public keys of these roots, by label; refuses to replace one, since it is what machines trust."""
    lines = [f"{label} {base64.b64encode(k.public_key().public_bytes_raw()).decode()}\n" for label, k in roots.items()]
    try:
        with path.open("x", encoding="utf-8") as file:
            file.writelines(lines)
    except FileExistsError:
        raise SettingsInvalid(f"{path} is there already; a file of roots is never replaced") from None
    return path
