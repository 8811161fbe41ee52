"""Sign files in minisign's format, and check signatures: Ed25519 over the BLAKE2b of a file.

A key is a PEM file (`openssl genpkey -algorithm ed25519`) or one of `minisign -G`; a secret key may have a passphrase.
Secret keys stay in memory, and no message shows any part of them.

Source: https://jedisct1.github.io/minisign, "Signature format", "Public key format", "Secret key format"; libsodium
1.0.20, crypto_pwhash/scryptsalsa208sha256, `pickparams`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import logging
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeq.errors import BundleCorrupt, ConfigError, ToolMissing
from edgeq.system.files import write_bytes

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SUFFIX = ".minisig"
KEY_VARIABLE = "EDGEQ_RELEASE_KEY"
PASSPHRASE_VARIABLE = "EDGEQ_RELEASE_PASSPHRASE"

_PLAIN, _PREHASHED, _SCRYPT, _BLAKE2B = b"Ed", b"ED", b"Sc", b"B2"
_SECRET = struct.Struct("<2s2s2s32sQQ104s")  # algorithm, derivation, check sum, salt, operations, memory, keys
_MOST_KEY_BYTES = 16_384
_MOST_SCRYPT_BYTES = 1 << 30  # what minisign itself asks for; hashlib takes up to 2**31 - 1
_ALL = "a key of Ed25519 as PEM, or a key of minisign, is needed"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PublicKey:
    """Hold a public key and its identity of eight bytes."""

    identity: bytes
    key: Ed25519PublicKey

    def text(self) -> str:
        """Give the key in the format of minisign's option `-P`."""
        return base64.b64encode(_PLAIN + self.identity + self.key.public_bytes_raw()).decode()


class Signer:
    """Sign with a secret key; `repr` does not show it."""

    def __init__(self, key: Ed25519PrivateKey, identity: bytes | None = None) -> None:
        """Take a secret key; without an identity the public key's hash gives one."""
        self._key = key
        public = key.public_key()
        self.public = PublicKey(identity or _identity(public), public)

    def sign(self, path: Path) -> Path:
        """Write the detached signature of a file beside it; equal file and key give equal bytes.

        Raises:
            StorageFailed: the disk refuses.
        """
        comment = f"file:{path.name}"
        signature = self._key.sign(_digest(path))
        whole = self._key.sign(signature + comment.encode())
        lines = (
            "untrusted comment: signature of a release of edgeq",
            base64.b64encode(_PREHASHED + self.public.identity + signature).decode(),
            f"trusted comment: {comment}",
            base64.b64encode(whole).decode(),
        )
        signature_path = path.with_name(path.name + SUFFIX)
        write_bytes(signature_path, "".join(f"{line}\n" for line in lines).encode())
        return signature_path


def read_signer(file: Path | None) -> Signer | None:
    """Read the secret key from a file, or from the variable EDGEQ_RELEASE_KEY; None where neither is named.

    The passphrase, if the key has one, is taken from the variable EDGEQ_RELEASE_PASSPHRASE.

    Raises:
        ConfigError: it cannot be read, is not a key, or the passphrase is wrong or missing.
        ToolMissing: cryptography is not installed.
    """
    held = os.environ.get(KEY_VARIABLE)
    if file is None and not held:
        return None
    if file is not None:
        content, where = _read(file), str(file)
        if file.stat().st_mode & 0o077:
            _log.warning("%s: others on this machine may read this secret key; chmod 600 it", file)
    else:
        content, where = (held or "").encode(), KEY_VARIABLE
    phrase = os.environ.get(PASSPHRASE_VARIABLE)
    passphrase = phrase.encode() if phrase else None
    if content.lstrip().startswith(b"-----BEGIN"):
        return Signer(_pem_secret(content, passphrase, where))
    return _minisign_secret(content, passphrase, where)


def read_public_key(file: Path) -> PublicKey:
    """Read a public key.

    Raises:
        ConfigError: it cannot be read, or is not a key.
        ToolMissing: cryptography is not installed.
    """
    content = _read(file)
    serialization, ed25519 = _cryptography()
    if content.lstrip().startswith(b"-----BEGIN"):
        try:
            key = serialization.load_pem_public_key(content)
        except Exception as error:  # the boundary to cryptography, which raises errors of several libraries
            raise ConfigError(f"{file}: no public key ({type(error).__name__}); {_ALL}.") from error
        if not isinstance(key, ed25519.Ed25519PublicKey):
            raise ConfigError(f"{file}: a public key of another kind; {_ALL}.")
        return PublicKey(_identity(key), key)
    raw = _decoded(_lines(content)[-1])
    if len(raw) != 42 or raw[:2] != _PLAIN:
        raise ConfigError(f"{file}: no public key; {_ALL}.")
    return PublicKey(raw[2:10], ed25519.Ed25519PublicKey.from_public_bytes(raw[10:]))


def check(path: Path, public: PublicKey) -> None:
    """Check a file against the signature beside it.

    Raises:
        BundleCorrupt: the signature is missing or malformed, or is of another key or file.
    """
    file = path.with_name(path.name + SUFFIX)
    if not file.is_file():
        raise BundleCorrupt(f"{file}: is not there, so the signature of {path.name} cannot be checked. Fetch it, too.")
    lines = _lines(_read(file))
    if len(lines) != 4 or not lines[2].startswith("trusted comment: "):
        raise BundleCorrupt(f"{file}: no signature of minisign's form. Fetch it again.")
    head, whole = _decoded(lines[1]), _decoded(lines[3])
    comment = lines[2].removeprefix("trusted comment: ")
    if len(head) != 74 or head[:2] != _PREHASHED or len(whole) != 64:
        raise BundleCorrupt(f"{file}: no signature over a file's BLAKE2b. Sign with edgeq release, or minisign -SH.")
    if head[2:10] != public.identity:
        raise BundleCorrupt(
            f"{file}: made with the key {_spelled(head[2:10])}; the public key given is {_spelled(public.identity)}. "
            "Give the public key of who released it."
        )
    _require(public, head[10:], _digest(path), f"{path}: its content is not what was signed. Fetch it again.")
    _require(public, whole, head[10:] + comment.encode(), f"{file}: its comment is not what was signed.")
    named = [part.removeprefix("file:") for part in comment.split("\t") if part.startswith("file:")]
    if named and named != [path.name]:
        raise BundleCorrupt(f"{path}: what was signed is called {named[0]!r}. Give the file its own name again.")


def _require(public: PublicKey, signature: bytes, message: bytes, said: str) -> None:
    from cryptography.exceptions import InvalidSignature

    try:
        public.key.verify(signature, message)
    except InvalidSignature as error:
        raise BundleCorrupt(f"{said} The signature does not hold.") from error


def _cryptography() -> tuple[Any, Any]:
    """Import the modules of `cryptography` for keys and their formats."""
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise ToolMissing(f"signatures need cryptography ({error}); install: pip install 'edgeq[release]'") from error
    return serialization, ed25519


def _pem_secret(content: bytes, passphrase: bytes | None, where: str) -> Ed25519PrivateKey:
    """Read a secret key from PEM; the library's error is not shown, because it could quote the content."""
    serialization, ed25519 = _cryptography()
    try:
        key = serialization.load_pem_private_key(content, passphrase)
    except TypeError:
        said = f"set {PASSPHRASE_VARIABLE}" if passphrase is None else f"it has none: unset {PASSPHRASE_VARIABLE}"
        raise ConfigError(f"{where}: the secret key and the passphrase do not go together; {said}.") from None
    except Exception:  # noqa: BLE001  # the boundary to cryptography, which raises errors of several libraries
        raise ConfigError(f"{where}: no secret key, or the passphrase is wrong; {_ALL}.") from None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise ConfigError(f"{where}: a secret key of another kind; {_ALL}.")
    found: Ed25519PrivateKey = key
    return found


def _minisign_secret(content: bytes, passphrase: bytes | None, where: str) -> Signer:
    """Read a secret key in minisign's format."""
    _, ed25519 = _cryptography()
    raw = _decoded(_lines(content)[-1])
    if len(raw) != _SECRET.size:
        raise ConfigError(f"{where}: no secret key; {_ALL}.")
    algorithm, derivation, summing, salt, operations, memory, keys = _SECRET.unpack(raw)
    if algorithm != _PLAIN or summing != _BLAKE2B or derivation not in (_SCRYPT, bytes(2)):
        raise ConfigError(f"{where}: a secret key of an unknown form; {_ALL}.")
    if derivation == _SCRYPT:
        if passphrase is None:
            raise ConfigError(f"{where}: the secret key has a passphrase; set {PASSPHRASE_VARIABLE}.")
        stream = _derived(passphrase, salt, operations, memory, where)
        keys = bytes(a ^ b for a, b in zip(keys, stream, strict=True))
    identity, seed, public, found = keys[:8], keys[8:40], keys[40:72], keys[72:]
    # minisign writes a zero checksum for a key without passphrase; its two halves are compared below all the same.
    is_summed = derivation == _SCRYPT or found != bytes(32)
    if is_summed and hashlib.blake2b(algorithm + keys[:72], digest_size=32).digest() != found:
        raise ConfigError(f"{where}: the passphrase is wrong, or the secret key is damaged.")
    key = ed25519.Ed25519PrivateKey.from_private_bytes(seed)
    if key.public_key().public_bytes_raw() != public:
        raise ConfigError(f"{where}: the halves of the secret key do not belong together.")
    return Signer(key, identity)


def _derived(passphrase: bytes, salt: bytes, operations: int, memory: int, where: str) -> bytes:
    """Derive the key stream with scrypt, its parameters computed from two limits as libsodium does."""
    operations = max(operations, 32768)
    is_small = operations < memory // 32
    most = operations // 32 if is_small else memory // 1024  # N times two, at r = 8
    exponent = max(1, (most // 2).bit_length())  # the least with 2**exponent > most // 2
    parallel = 1 if is_small else min((operations // 4) // (1 << exponent), 0x3FFFFFFF) // 8
    if (1 << exponent) * 1024 > _MOST_SCRYPT_BYTES or not 1 <= parallel <= 64:
        raise ConfigError(f"{where}: its passphrase asks for more memory or time than is taken; {_ALL}.")
    cost = 1 << exponent
    return hashlib.scrypt(passphrase, salt=salt, n=cost, r=8, p=parallel, maxmem=(1 << 31) - 2, dklen=104)


def _identity(key: Ed25519PublicKey) -> bytes:
    """Give the identity of a key without one: the first eight bytes of its BLAKE2b."""
    return hashlib.blake2b(key.public_bytes_raw(), digest_size=8).digest()


def _spelled(identity: bytes) -> str:
    """Format a key's identity as minisign does."""
    return identity[::-1].hex().upper()


def _digest(path: Path) -> bytes:
    digest = hashlib.blake2b()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.digest()


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_KEY_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); {_ALL}.") from error
    if len(content) > _MOST_KEY_BYTES:
        raise ConfigError(f"{path}: larger than any key or signature; {_ALL}.")
    return content


def _lines(content: bytes) -> list[str]:
    """Give the lines of a text, at least one; one empty line for bytes that are not UTF-8."""
    try:
        return content.decode("utf-8").splitlines() or [""]
    except UnicodeDecodeError:
        return [""]


def _decoded(line: str) -> bytes:
    """Decode a line of base64; empty for anything else."""
    try:
        return base64.b64decode(line.strip(), validate=True)
    except (binascii.Error, ValueError):
        return b""
