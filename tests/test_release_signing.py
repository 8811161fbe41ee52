from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import pytest

from edgeq.errors import BundleCorrupt, ConfigError
from edgeq.release import sign

pytestmark = pytest.mark.release

# Made by minisign 0.11 for this test and for nothing else: `minisign -G -W`, `minisign -S`.
SECRET_KEY = """untrusted comment: minisign encrypted secret key
RWQAAEIyAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAqt+ekXh4LEBlBUofaK5yz/AfoWZtGE7M5D0+41x+hPgZ+T82jKUvpD/+RMhuHY7l33QGN79j2gv8/nes4tw18MrMzPmglzc/AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=
"""
PUBLIC_KEY = """untrusted comment: minisign public key 402C7878919EDFAA
RWSq356ReHgsQD/+RMhuHY7l33QGN79j2gv8/nes4tw18MrMzPmglzc/
"""
SIGNED = "a file that minisign 0.11 signed\n"
SIGNATURE = """untrusted comment: signature from minisign secret key
RUSq356ReHgsQM8BuCwUAIg8xr7IZpuQkQmosYyTlQm7eqyDir50J48Gbfht8CA9mhPEbtjvMS9QfG2K4xFNoBfBbk3FIjnkFgk=
trusted comment: timestamp:1795285038	file:signed.txt	hashed
FPibKK1ubVS0iuq81abzNAoCB8KrBZdjnlHu5GI6176xIQJe4a6phOc1+ZYwrw85a+uLDdvts1JENMjEkEbeDA==
"""


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(sign.KEY_VARIABLE, raising=False)
    monkeypatch.delenv(sign.PASSPHRASE_VARIABLE, raising=False)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)
    return path


def pem(path: Path, passphrase: bytes | None = None) -> tuple[Path, Path]:
    """Write a new secret key and its public half."""
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    hidden = form.BestAvailableEncryption(passphrase) if passphrase else form.NoEncryption()
    secret = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, hidden)
    public = key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    return write(path / "key.pem", secret.decode()), write(path / "key.pub", public.decode())


def test_what_minisign_signed_is_accepted_and_any_change_is_not(tmp_path: Path) -> None:
    public = sign.read_public_key(write(tmp_path / "key.pub", PUBLIC_KEY))
    file = write(tmp_path / "signed.txt", SIGNED)
    place = write(tmp_path / "signed.txt.minisig", SIGNATURE)
    sign.check(file, public)
    for line in (1, 2, 3):
        lines = SIGNATURE.splitlines()
        for position in (20, len(lines[line]) // 2, len(lines[line]) - 5):
            other = "A" if lines[line][position] != "A" else "B"
            changed = [*lines[:line], lines[line][:position] + other + lines[line][position + 1 :], *lines[line + 1 :]]
            place.write_text("\n".join(changed) + "\n", encoding="utf-8")
            with pytest.raises(BundleCorrupt):
                sign.check(file, public)
    place.write_text(SIGNATURE, encoding="utf-8")
    file.write_text(SIGNED + " ", encoding="utf-8")
    with pytest.raises(BundleCorrupt, match="its content is not what was signed"):
        sign.check(file, public)


def test_a_key_of_minisign_signs_as_its_public_key_expects(tmp_path: Path) -> None:
    signer = sign.read_signer(write(tmp_path / "key", SECRET_KEY))
    assert signer is not None
    assert signer.public.text() == PUBLIC_KEY.splitlines()[1]
    file = write(tmp_path / "signed.txt", SIGNED)
    place = signer.sign(file)
    sign.check(file, sign.read_public_key(write(tmp_path / "key.pub", PUBLIC_KEY)))
    lines, expected = place.read_text(encoding="utf-8").splitlines(), SIGNATURE.splitlines()
    assert lines[1] == expected[1]  # Ed25519 draws nothing: minisign's own signature, byte for byte


def test_the_same_key_and_file_give_the_same_signature(tmp_path: Path) -> None:
    secret, _ = pem(tmp_path)
    file = write(tmp_path / "a.zip", "content")
    signer = sign.read_signer(secret)
    assert signer is not None
    assert signer.sign(file).read_bytes() == signer.sign(file).read_bytes()


def test_a_file_under_another_name_is_found(tmp_path: Path) -> None:
    secret, public = pem(tmp_path)
    file = write(tmp_path / "tool-1.0.0.zip", "an old version with a hole")
    signer = sign.read_signer(secret)
    assert signer is not None
    signer.sign(file)
    renamed = file.rename(tmp_path / "tool-2.0.0.zip")
    (tmp_path / "tool-1.0.0.zip.minisig").rename(tmp_path / "tool-2.0.0.zip.minisig")
    with pytest.raises(BundleCorrupt, match=r"is called 'tool-1\.0\.0\.zip'"):
        sign.check(renamed, sign.read_public_key(public))


def test_another_key_and_no_signature_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "theirs").mkdir()
    secret, _ = pem(tmp_path / "mine")
    _, other = pem(tmp_path / "theirs")
    file = write(tmp_path / "a.zip", "content")
    with pytest.raises(BundleCorrupt, match="is not there"):
        sign.check(file, sign.read_public_key(other))
    signer = sign.read_signer(secret)
    assert signer is not None
    signer.sign(file)
    with pytest.raises(BundleCorrupt, match="made with the key"):
        sign.check(file, sign.read_public_key(other))


def test_a_passphrase_opens_the_key_and_a_wrong_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    secret, _ = pem(tmp_path, b"open sesame")
    body = secret.read_text(encoding="utf-8").splitlines()[1]
    with pytest.raises(ConfigError, match=f"set {sign.PASSPHRASE_VARIABLE}"):
        sign.read_signer(secret)
    monkeypatch.setenv(sign.PASSPHRASE_VARIABLE, "open barley")
    with pytest.raises(ConfigError, match="or the passphrase is wrong") as caught:
        sign.read_signer(secret)
    monkeypatch.setenv(sign.PASSPHRASE_VARIABLE, "open sesame")
    signer = sign.read_signer(secret)
    assert signer is not None
    told = f"{caught.value} {caught.value.__cause__} {caplog.text} {signer!r}"
    assert body not in told
    assert "open barley" not in told
    assert caught.value.__suppress_context__  # what the library said could quote the key


def test_the_key_may_come_from_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sign.read_signer(None) is None
    secret, public = pem(tmp_path)
    monkeypatch.setenv(sign.KEY_VARIABLE, secret.read_text(encoding="utf-8"))
    signer = sign.read_signer(None)
    assert signer is not None
    assert signer.public.text() == sign.read_public_key(public).text()


def test_a_key_that_others_may_read_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    secret, _ = pem(tmp_path)
    sign.read_signer(secret)
    assert not caplog.records
    secret.chmod(0o644)
    sign.read_signer(secret)
    assert "chmod 600" in caplog.text


@pytest.mark.parametrize(
    "content",
    ["", "nothing", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "x" * 20_000, "untrusted\n####"],
)
def test_what_is_no_key_is_refused(tmp_path: Path, content: str) -> None:
    file = write(tmp_path / "key", content)
    with pytest.raises(ConfigError, match="is needed"):
        sign.read_signer(file)
    with pytest.raises(ConfigError, match="is needed"):
        sign.read_public_key(file)


def test_a_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

    key = generate_private_key(SECP256R1())
    secret = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    public = key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    with pytest.raises(ConfigError, match="of another kind"):
        sign.read_signer(write(tmp_path / "key", secret.decode()))
    with pytest.raises(ConfigError, match="of another kind"):
        sign.read_public_key(write(tmp_path / "pub", public.decode()))


@pytest.mark.parametrize(
    ("operations", "memory", "expected"),
    [(33_554_432, 1 << 30, (1 << 20, 8, 1)), (524_288, 16 << 20, (1 << 14, 8, 1)), (32_768, 32 << 20, (1 << 10, 8, 1))],
)
def test_limits_become_the_costs_that_libsodium_takes(
    monkeypatch: pytest.MonkeyPatch, operations: int, memory: int, expected: tuple[int, int, int]
) -> None:
    # minisign's own limits (SENSITIVE) and libsodium's INTERACTIVE ones, whose costs its documentation states.
    asked: list[tuple[int, int, int]] = []

    def scrypt(passphrase: bytes, *, salt: bytes, n: int, r: int, p: int, maxmem: int, dklen: int) -> bytes:
        asked.append((n, r, p))
        return bytes(dklen)

    monkeypatch.setattr(hashlib, "scrypt", scrypt)
    sign._derived(b"", b"", operations, memory, "key")
    assert asked == [expected]


def test_a_key_that_asks_for_all_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match="more memory or time"):
        sign._derived(b"", b"", 1 << 62, 1 << 62, "key")
