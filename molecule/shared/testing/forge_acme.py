"""Where certificates come from: two ACME servers that share nothing but RFC 8555, own files and an own CA."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import hvac
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from forge_scenario import playbook, until
from forge_vault import STATE, cursor, journal
from forge_wire import tls
from testinfra.host import Host

TRUSTED = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "tls" / "ca.pem"
"""What the tests' clients trust."""

DOMAIN = "inbox.example.com"
ALIASES = ["www.inbox.example.com", "inbox.example.net"]
"""Those of the app in the scenario."""
SERVICE = "forge-certificates.service"
ERR = 3

PEBBLE = "/run/pebble"
PEBBLE_NAME = "acme.example.org"
PEBBLE_CONFIG = {
    "listenAddress": "127.0.0.1:14000",
    "managementListenAddress": "127.0.0.1:15000",
    "certificate": f"{PEBBLE}/cert.pem",
    "privateKey": f"{PEBBLE}/key.pem",
    "httpPort": 80,
    "tlsPort": 443,
    "ocspResponderURL": "",
    "externalAccountBindingRequired": False,
}
# Without them it waits at random, refuses good nonces at random, and does not look at what it has seen before.
PEBBLE_ENVIRONMENT = {"PEBBLE_VA_NOSLEEP": "1", "PEBBLE_WFE_NONCEREJECT": "0", "PEBBLE_AUTHZREUSE": "0"}
PEBBLE_KEY = (
    "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=pebble "
    f"-addext subjectAltName=DNS:{PEBBLE_NAME} -keyout {PEBBLE}/key.pem -out {PEBBLE}/cert.pem"
)


class Authority(Protocol):
    """An ACME server."""

    variables: Mapping[str, str]
    """What an inventory says of it."""

    def has_revoked(self, certificate: x509.Certificate) -> bool:
        """Whether it says of one of its certificates that it is revoked."""


class OpenBao:
    """The scenario's server with the secrets."""

    def __init__(self, vault: hvac.Client) -> None:
        self._vault = vault
        self.variables = {
            "nginx_acme_directory": f"{vault.url}/v1/pki/acme/directory",
            "nginx_acme_ca_file": str(STATE / "ca.pem"),
        }

    def has_revoked(self, certificate: x509.Certificate) -> bool:
        """Whether it says of one of its certificates that it is revoked."""
        number = f"{certificate.serial_number:x}"
        number = number.zfill(len(number) + len(number) % 2)
        path = "pki/cert/" + "-".join(re.findall("..", number))
        return bool(self._vault.read(path)["data"]["revocation_time"])

    @contextmanager
    def aged(self) -> Iterator[None]:
        """Have it issue certificates that are near their end, with the 30 days of the role left."""
        self._role(not_before_duration="2000h")
        try:
            yield
        finally:
            self._role(not_before_duration="30s")

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Have it refuse all that is asked through ACME."""
        self._enabled(False)
        try:
            yield
        finally:
            self._enabled(True)

    def _role(self, **change: str) -> None:
        role = self._vault.read("pki/roles/acme")["data"]
        self._vault.write_data("pki/roles/acme", data=role | change)

    def _enabled(self, enabled: bool) -> None:
        config = self._vault.read("pki/config/acme")["data"]
        self._vault.write_data("pki/config/acme", data=config | {"enabled": enabled})


class Pebble:
    """A server on the host itself, which forgets everything when it stops."""

    def __init__(self, host: Host, folder: Path, names: list[str]) -> None:
        self._host = host
        self._names = names
        server = folder / "pebble.pem"
        self.variables = {
            "nginx_acme_directory": f"https://{PEBBLE_NAME}:14000/dir",
            "nginx_acme_ca_file": str(server),
            "nginx_acme_email": "ops@example.org",
        }
        host.check_output("rm -rf %s /etc/letsencrypt/accounts/%s*; mkdir %s", PEBBLE, PEBBLE_NAME, PEBBLE)
        host.check_output(PEBBLE_KEY)
        host.check_output("printf %%s %s > %s/config.json", json.dumps({"pebble": PEBBLE_CONFIG}), PEBBLE)
        host.check_output("cp /etc/hosts %s/hosts", PEBBLE)
        self._resolve("127.0.0.1")
        environment = " ".join(f"--setenv={name}={value}" for name, value in PEBBLE_ENVIRONMENT.items())
        host.check_output(f"systemd-run --quiet --unit=pebble {environment} pebble -config {PEBBLE}/config.json")
        until(lambda: host.run(self._command("roots/0")).rc == 0, 20)
        server.write_text(host.check_output("cat %s/cert.pem", PEBBLE) + "\n")
        trust(self._ask("roots/0"))

    @contextmanager
    def down(self) -> Iterator[None]:
        """Have its name lead to nobody for a while, for it would forget its accounts."""
        self._resolve("127.0.0.2")
        try:
            yield
        finally:
            self._resolve("127.0.0.1")

    def has_revoked(self, certificate: x509.Certificate) -> bool:
        """Whether it says of one of its certificates that it is revoked."""
        found: dict[str, Any] = json.loads(self._ask(f"cert-status-by-serial/{certificate.serial_number:x}"))
        return bool(found["Status"] == "Revoked")

    def stop(self) -> None:
        """Remove it from the host."""
        self._host.check_output("systemctl stop pebble; cat %s/hosts > /etc/hosts; rm -r %s", PEBBLE, PEBBLE)

    def _resolve(self, address: str) -> None:
        """Have its own name lead to an address, and the apps' names to the host."""
        lines = f"{address} {PEBBLE_NAME}\n127.0.0.1 {' '.join(self._names)}\n"
        # In place: a container's is a mount.
        self._host.check_output("{ cat %s/hosts; printf %%s %s; } > /etc/hosts", PEBBLE, lines)

    def _ask(self, path: str) -> str:
        return str(self._host.check_output(self._command(path)))

    @staticmethod
    def _command(path: str) -> str:
        return f"curl --silent --fail --cacert {PEBBLE}/cert.pem https://{PEBBLE_NAME}:15000/{path}"


def trust(root: str) -> None:
    """Have the tests' clients trust another CA."""
    if root.strip() not in TRUSTED.read_text():
        with TRUSTED.open("a") as file:
            file.write(f"{root.strip()}\n")


def served(host: Host, name: str = DOMAIN) -> x509.Certificate:
    """What Nginx serves, if the tests' clients trust it for that name."""
    with tls(host, name) as connection:
        found = connection.getpeercert(binary_form=True)
    assert found
    return x509.load_der_x509_certificate(found)


def names(certificate: x509.Certificate) -> set[str]:
    """The names of a certificate."""
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return set(found.value.get_values_for_type(x509.DNSName))


def provision(*arguments: str, **variables: Any) -> subprocess.CompletedProcess[str]:
    """Run the role with such variables."""
    return playbook("--tags", "nginx", "--extra-vars", json.dumps(variables), *arguments)


def watch(host: Host) -> list[str]:
    """Do what the timer does, and return the alert lines."""
    since = cursor(host)
    host.check_output("systemctl start %s", SERVICE)
    # Judged here: journalctl 252 skips the first match of its own filters after a cursor.
    lines = [json.loads(line) for line in journal(host, since, "--grep=^ALERT inbox: ", "--output=json")]
    return [line["MESSAGE"] for line in lines if int(line["PRIORITY"]) <= ERR]


@pytest.fixture(scope="session")
def openbao(vault: hvac.Client) -> OpenBao:
    """The one server."""
    return OpenBao(vault)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Bring a certificate along; the variables of an inventory with it."""
    folder = tmp_path_factory.mktemp("own")

    def make(days: int = 300, other_key: bool = False) -> dict[str, Any]:
        key, other = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"own for {days} days")])
        now = datetime.now(UTC)
        signed = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=90))
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(each) for each in (DOMAIN, *ALIASES)]), False)
            # Clients trust all that were ever made, and tell them apart by these.
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), False)
            .sign(key, hashes.SHA256())
        )
        write_pair(folder / "inbox", other if other_key else key, signed)
        trust((folder / "inbox.pem").read_text())
        pair = {"certificate": str(folder / "inbox.pem"), "key": str(folder / "inbox.key")}
        return {"nginx_tls_source": "files", "nginx_tls_certificates": {"inbox": pair}}

    return make


@pytest.fixture
def own_ca(tmp_path: Path) -> dict[str, Any]:
    """A CA of one's own, which clients know already; the variables of an inventory with it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ours")])
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
    now = datetime.now(UTC)
    signed = (
        builder.serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=900))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    write_pair(tmp_path / "ca", key, signed)
    trust((tmp_path / "ca.pem").read_text())
    return {"nginx_tls_source": "own_ca", "nginx_tls_ca_directory": str(tmp_path)}


def write_pair(stem: Path, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
    """Write STEM.key and STEM.pem."""
    encryption = serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    stem.with_suffix(".key").write_bytes(pem)
    stem.with_suffix(".pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
