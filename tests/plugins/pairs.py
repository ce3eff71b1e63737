"""Keys and certificates, good ones and others."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from ansible.parsing.vault import VaultLib, VaultSecret
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import AuthorityInformationAccessOID, NameOID

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
NAMES = ("shop.example.com", "*.shop.example.com")
VAULT_PASSWORD = "of-the-vault"  # pragma: allowlist secret
CA = ec.generate_private_key(ec.SECP256R1())


def certificate(
    common_name: str,
    key: Key,
    names: tuple[str, ...] = NAMES,
    *,
    issuer: str = "ca",
    signer: Key = CA,
    begins: timedelta = timedelta(days=-1),
    ends: timedelta = timedelta(days=30),
    issuer_address: bool = False,
) -> bytes:
    """Make a certificate, its times counted from now."""
    now = datetime.now(UTC)
    subject, signed_by = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in (common_name, issuer))
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(signed_by)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + begins)
        .not_valid_after(now + ends)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(each) for each in names]), False)
    if issuer_address:
        where = x509.UniformResourceIdentifier("http://ca.example.com/ca.cer")
        access = x509.AccessDescription(AuthorityInformationAccessOID.CA_ISSUERS, where)
        builder = builder.add_extension(x509.AuthorityInformationAccess([access]), False)
    return builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def pem(key: Key, password: bytes | None = None) -> bytes:
    """Write a private key down."""
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def pairs(folder: Path) -> Path:
    """Write NAME.key and NAME.pem, `good` ones and such as are wrong in one way each."""
    key, other = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    good, ca = certificate("good", key), certificate("ca", CA, ())
    vault = VaultLib([("default", VaultSecret(VAULT_PASSWORD.encode()))])
    contents = {
        "good.key": pem(key),
        "other.key": pem(other),
        "locked.key": pem(key, b"sesame"),
        "vaulted.key": vault.encrypt(pem(key)),
        "good.pem": good,
        "expired.pem": certificate("good", key, ends=timedelta(hours=-1)),
        "future.pem": certificate("good", key, begins=timedelta(hours=1)),
        "chain.pem": certificate("good", key, issuer_address=True) + ca,
        "backwards.pem": ca + good,
        "strangers.pem": good + certificate("other", other),
        "alone.pem": certificate("good", key, issuer_address=True),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "vault-password").write_text(VAULT_PASSWORD)
    return folder
