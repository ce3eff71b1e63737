#!/usr/bin/python3
"""Certificates on their way to Nginx: what the inventory's source provides becomes the one file that Nginx reads.

usage: forge-certificates [--config FILE] COMMAND

    install [--dry-run]      what was provided, without a reload; for Ansible, which reloads once for all that changed
    renew [--dry-run]        ask the ACME server for what is due, install it, have Nginx serve it
    watch                    the same for the timer: whatever is wrong with an app is one ALERT line in the journal
    reissue NAME [--revoke]  a new key and certificate from the ACME server at once; the old one is revoked after that
    status                   what each app's clients get, and until when

An app's key and chain are one file: one rename replaces both, so that whatever kills this program, Nginx never finds
the key of one certificate beside another. An app that fails leaves its old file serving and does not stop the others.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import itertools
import os
import re
import socket
import ssl
import stat
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import AuthorityInformationAccessOID, NameOID

CONFIG = Path("/etc/forge/certificates.toml")
ACME = "acme"
PLACEHOLDER = "placeholder until a certificate is issued"
PLACEHOLDER_DAYS = 3650
CERTBOT_SECONDS, RELOAD_SECONDS, SERVED_SECONDS = 300, 120, 30
# What certbot says to people at its own terminal.
CERTBOT_NOISE = ("Saving debug log", "Ask for help", "See the logfile", "- - -")
SAID_LINES = 12
# Of a lifetime, what is left when a certificate is renewed (the integration guide of Let's Encrypt), and when that it
# was not is worth a call.
RENEWED_AT, ALERTED_AT = 1 / 3, 1 / 5
BLOCK = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----\n?", re.DOTALL)


class Mistake(NamedTuple):
    """One thing that is wrong with a pair."""

    part: str
    """`certificate` or `key`."""
    expected: str
    found: str
    do: str


class Refused(Exception):
    """Nothing was changed; what was expected, what was found, what to do."""

    def __init__(self, expected: str, found: str, do: str) -> None:
        super().__init__(f"expected: {expected}; found: {found}; do: {do}")


def now() -> datetime:
    """The time."""
    return datetime.now(UTC)


def not_after(certificate: x509.Certificate) -> datetime:
    """When a certificate ends; Debian 12's library knows times without a zone only."""
    found: datetime = getattr(certificate, "not_valid_after_utc", None) or certificate.not_valid_after.replace(
        tzinfo=UTC
    )
    return found


def not_before(certificate: x509.Certificate) -> datetime:
    """When a certificate begins."""
    found: datetime = getattr(certificate, "not_valid_before_utc", None) or certificate.not_valid_before.replace(
        tzinfo=UTC
    )
    return found


def names_of(certificate: x509.Certificate) -> list[str]:
    """The host names that a certificate is for."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return found.value.get_values_for_type(x509.DNSName)


def covers(pattern: str, name: str) -> bool:
    """Whether a name of a certificate stands for a host name; a wildcard stands for one label (RFC 6125, 6.4.3)."""
    pattern, name = pattern.lower(), name.lower()
    if pattern.startswith("*."):
        return name.partition(".")[2] == pattern[2:]
    return pattern == name


def read_chain(text: bytes) -> list[x509.Certificate]:
    """The certificates of a PEM file, the one of the server first.

    Raises:
        ValueError: there is none, or one that cannot be read.
    """
    found = [x509.load_pem_x509_certificate(block) for block in BLOCK.findall(text)]
    if not found:
        raise ValueError("no certificate")
    return found


def public_bytes(key: object) -> bytes:
    """A public key, comparable."""
    encoding = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_bytes(*encoding)  # type: ignore[attr-defined, no-any-return]


def mistakes(
    chain_text: bytes,
    key_text: bytes,
    names: Iterable[str],
    at: datetime,
    roots: Callable[[], set[bytes]] | None = None,
) -> Iterator[Mistake]:
    """Yield what keeps a pair from serving `names`.

    `roots` gives the subjects of known root CAs (DER), whose signature needs no intermediate; without it, nobody looks
    for one that is missing.
    """
    try:
        chain = read_chain(chain_text)
    except ValueError as error:
        found = " ".join(str(error).split())[:100]
        yield Mistake("certificate", "certificates in PEM, the server's first", found, "give it the whole chain in PEM")
        return
    try:
        key = serialization.load_pem_private_key(key_text, None)
    except (ValueError, TypeError) as error:
        # A TypeError is a key under a passphrase, which nobody could type at a reload.
        found = "one with a passphrase" if isinstance(error, TypeError) else "something else"
        yield Mistake("key", "a private key in PEM without a passphrase", found, "give it the key, decrypted")
        return
    ours, leaf = public_bytes(key.public_key()), chain[0]
    if public_bytes(leaf.public_key()) != ours:
        place = [n for n, each in enumerate(chain) if public_bytes(each.public_key()) == ours]
        expected = f"the key of the first certificate ({subject(leaf)})"
        if place:
            # What follows would be about a certificate of the CA.
            found = f"its certificate is number {place[0] + 1} of the file"
            yield Mistake("key", expected, found, "put the server's certificate first")
            return
        do = "give it the key that the certificate was made for"
        yield Mistake("key", expected, "the key of another certificate", do)
    for signed, signer in itertools.pairwise(chain):
        if signed.issuer != signer.subject:
            found = f"{subject(signed)} is followed by {subject(signer)}"
            yield Mistake("certificate", "each certificate to be followed by its issuer's", found, "put them in order")
            break
    # Whoever says where to get the issuer's certificate has one to be got: a public CA never signs with its root.
    single = len(chain) == 1 and leaf.issuer != leaf.subject and has_issuer_address(leaf)
    if single and roots and leaf.issuer.public_bytes() not in roots():
        found = f"the server's certificate alone, signed by {leaf.issuer.rfc4514_string()}"
        do = "append the CA's intermediate certificate (fullchain.pem), or its root if that signed it"
        yield Mistake("certificate", "the chain up to the root", found, do)
    if at >= not_after(leaf):
        yield Mistake("certificate", "one that is valid now", f"it expired on {shown(not_after(leaf))}", "renew it")
    elif at < not_before(leaf):
        found = f"it begins on {shown(not_before(leaf))}"
        yield Mistake("certificate", "one that is valid now", found, "wait, or set the clock")
    present = names_of(leaf)
    if missing := [name for name in names if not any(covers(pattern, name) for pattern in present)]:
        found = f"{', '.join(present) or 'no name'}, without {', '.join(missing)}"
        yield Mistake("certificate", "one for the domain and every alias", found, "have it issued for all of them")


def has_issuer_address(certificate: x509.Certificate) -> bool:
    """Whether a certificate says where its issuer's is to be had (RFC 5280, 4.2.2.1)."""
    try:
        access = certificate.extensions.get_extension_for_class(x509.AuthorityInformationAccess)
    except x509.ExtensionNotFound:
        return False
    return any(each.access_method == AuthorityInformationAccessOID.CA_ISSUERS for each in access.value)


def subject(certificate: x509.Certificate) -> str:
    """How to name a certificate to people."""
    return certificate.subject.rfc4514_string() or ", ".join(names_of(certificate)) or "no subject"


def shown(time_: datetime) -> str:
    """A time for people."""
    return f"{time_:%Y-%m-%d %H:%M} UTC"


def placeholder(names: Sequence[str], at: datetime) -> bytes:
    """Make a pair that every client refuses, so that Nginx can start before there is one that they accept."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, PLACEHOLDER)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(at - timedelta(minutes=5))
        .not_valid_after(at + timedelta(days=PLACEHOLDER_DAYS))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(each) for each in names]), critical=False)
        .sign(key, hashes.SHA256())
    )
    return private_bytes(key) + certificate.public_bytes(serialization.Encoding.PEM)


def private_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key in PEM."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def is_placeholder(certificate: x509.Certificate) -> bool:
    """Whether a certificate is one that only keeps the place."""
    return any(each.value == PLACEHOLDER for each in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME))


@dataclass(frozen=True)
class Config:
    """What the inventory says, see templates/certificates.toml.j2."""

    source: str
    alert_days: int
    apps: Mapping[str, Sequence[str]]
    """Domain and aliases, by the app's name."""
    directory: str = ""
    email: str = ""
    ca_file: str = ""
    key_type: str = "ecdsa"

    @staticmethod
    def read(path: Path) -> Config:
        """Read it.

        Raises:
            OSError: there is none.
            tomllib.TOMLDecodeError: it is no TOML.
        """
        with path.open("rb") as file:
            return Config(**tomllib.load(file))


@dataclass(frozen=True)
class Places:
    """Where things are; below another root in tests."""

    root: Path = Path("/")

    @property
    def tls(self) -> Path:
        """What Ansible provides: NAME.pem and NAME.key."""
        return self.root / "etc/nginx/tls"

    @property
    def live(self) -> Path:
        """What Nginx reads: NAME.pem, key and chain in one."""
        return self.tls / "live"

    @property
    def certbot(self) -> Path:
        """What certbot keeps."""
        return self.root / "etc/letsencrypt"

    @property
    def webroot(self) -> Path:
        """Where certbot answers challenges."""
        return self.root / "var/lib/forge-acme"

    def removed(self, name: str) -> bool:
        """Whether `forgectl remove` took an app out of service: nobody asks for its certificate until it is back."""
        sites = self.root / "etc/nginx/forge"
        return (sites / f"{name}.conf.removed").exists() and not (sites / f"{name}.conf").exists()


@dataclass
class Outcome:
    """What was done, or would be, and why some apps failed."""

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def read_ours(path: Path) -> bytes:
    """Read a file that nobody else can have put there, wherever links on the way lead.

    Raises:
        OSError: it cannot be read.
        Refused: someone else may write it.
    """
    # O_NONBLOCK: a pipe in its place shall not hold this up.
    descriptor = os.open(path.resolve(strict=True), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise Refused("a file that only root may write", str(path), "find out who put it there, and remove it")
        return file.read()


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file, for its owner only, by one rename that survives a power cut."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def run(command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Run a program; its exit code and all that it said.

    Raises:
        Refused: there is no such program, or it did not end.
    """
    try:
        ended = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **(environment or {})},
            timeout=seconds,
            check=False,
        )
    except FileNotFoundError:
        do = "run site.yml, which installs it"
        raise Refused(f"the program {command[0]}", "it is not installed", do) from None
    except subprocess.TimeoutExpired:
        raise Refused(f"{command[0]} to end within {seconds:.0f} s", "it did not", "try again later") from None
    return ended.returncode, ended.stdout


def reload_nginx() -> bool:
    """Have Nginx read its certificates anew; False where it does not run, and will read them when it starts.

    Raises:
        Refused: it did not reload.
    """
    if run(["systemctl", "is-active", "--quiet", "nginx.service"], RELOAD_SECONDS)[0] != 0:
        return False
    # Its unit tests the configuration first, and lets clients leave.
    code, said = run(["systemctl", "reload", "nginx.service"], RELOAD_SECONDS)
    if code != 0:
        do = "run `sudo nginx -t`, correct what it names, then run this again"
        raise Refused("Nginx to take its certificates", f"it did not reload: {' '.join(said.split())}", do)
    return True


def served(domain: str) -> bytes | None:
    """The certificate (DER) that Nginx gives to who asks for a domain; None when it gives none."""
    # To be compared, not to be trusted.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection(("127.0.0.1", 443), timeout=5) as raw,
            context.wrap_socket(raw, server_hostname=domain) as connection,
        ):
            return connection.getpeercert(binary_form=True)
    except OSError:
        return None


class Certificates:
    """The certificates of one host."""

    def __init__(self, config: Config, places: Places) -> None:
        self.config = config
        self.places = places

    def install(self, dry_run: bool) -> Outcome:
        """Give Nginx what was provided, where it differs from what it has; a placeholder where there is nothing yet."""
        outcome = Outcome()
        for name, names in self.config.apps.items():
            try:
                if self.config.source == ACME and self.due(name):
                    # Until it is issued, what served before serves.
                    if not (self.places.live / f"{name}.pem").exists():
                        self._write(name, placeholder(names, now()), dry_run)
                        outcome.done.append(f"{name}: {'would install' if dry_run else 'installed'} a placeholder")
                elif self._install(name, dry_run) is not None:
                    outcome.done.append(f"{name}: {'would install' if dry_run else 'installed'} a certificate")
            except (Refused, OSError) as error:
                # A check judges what is there, which the run that it is for replaces before.
                if not dry_run or (self.config.source == ACME and not isinstance(error, FileNotFoundError)):
                    outcome.failed[name] = str(error)
        return outcome

    def renew(self, dry_run: bool) -> Outcome:
        """Ask the ACME server for what is due, and have Nginx serve what it does not serve yet."""
        outcome = Outcome()
        if dry_run:
            for name in self.config.apps:
                if why := self.due(name):
                    outcome.done.append(f"{name}: would ask {self.config.directory} for a certificate: {why}")
            return outcome
        for name in self.config.apps:
            try:
                if why := self.due(name):
                    self._obtain(name)
                    outcome.done.append(f"{name}: asked {self.config.directory} for a certificate: {why}")
            except (Refused, OSError) as error:
                outcome.failed[name] = str(error)
        self._serve([name for name in self.config.apps if name not in outcome.failed], outcome)
        return outcome

    def reissue(self, name: str, revoke: bool) -> Outcome:
        """Replace an app's key and certificate by new ones, and revoke the old one once it serves no more.

        Raises:
            Refused: nothing was issued.
            OSError: the same.
        """
        if self.config.source != ACME:
            raise Refused(
                "certificates of an ACME server", f"those of nginx_tls_source: {self.config.source}", "see the runbook"
            )
        old = (self._lineage(name) / "cert.pem").resolve()
        server = self._server(name) or self.config.directory
        known = old.exists()
        self._obtain(name)
        outcome = Outcome([f"{name}: asked {self.config.directory} for a certificate: told to"])
        self._serve([name], outcome)
        if revoke and known and not outcome.failed:
            try:
                self._revoke(old, server)
                outcome.done.append(f"{name}: had the old one revoked")
            except Refused as error:
                outcome.failed[name] = f"the new certificate serves, but the old one was not revoked: {error}"
        return outcome

    def due(self, name: str) -> str | None:
        """Why an app needs a certificate of the ACME server now; None when it does not."""
        if self.config.source != ACME:
            return None
        try:
            leaf = read_chain(read_ours(self._lineage(name) / "fullchain.pem"))[0]
        except (OSError, ValueError):
            return "there is none"
        names = self.config.apps[name]
        if set(names_of(leaf)) != set(names):
            return f"it is for {', '.join(sorted(names_of(leaf)))} and not for {', '.join(sorted(names))}"
        if self._server(name) != self.config.directory:
            return f"it is of {self._server(name)}"
        if isinstance(leaf.public_key(), rsa.RSAPublicKey) != (self.config.key_type == "rsa"):
            return f"its key is not {self.config.key_type}"
        if now() >= not_after(leaf) - (not_after(leaf) - not_before(leaf)) * RENEWED_AT:
            return f"it ends on {shown(not_after(leaf))}"
        return None

    def ending(self, name: str) -> str | None:
        """What is wrong with the certificate that an app has, in the words of an alert."""
        try:
            leaf = self._live(name)
        except (OSError, ValueError, Refused) as error:
            return f"its certificate cannot be read: {error}"
        if is_placeholder(leaf):
            return "clients get a placeholder, which they refuse"
        left, lifetime = not_after(leaf) - now(), not_after(leaf) - not_before(leaf)
        if left < min(timedelta(days=self.config.alert_days), lifetime * ALERTED_AT):
            verb = "ends" if left > timedelta(0) else "ended"
            return f"the certificate of {self.config.apps[name][0]} {verb} on {shown(not_after(leaf))}"
        return None

    def status(self) -> Iterator[str]:
        """A line for each app."""
        for name, names in self.config.apps.items():
            try:
                leaf = self._live(name)
            except (OSError, ValueError, Refused) as error:
                yield f"{name}: {self.config.source}, unreadable: {error}"
                continue
            present = names_of(leaf)
            covered = [*(each for each in names if each in present), *(each for each in present if each not in names)]
            days = (not_after(leaf) - now()) / timedelta(days=1)
            state = "served" if served(names[0]) == der(leaf) else "NOT served"
            yield (
                f"{name}: {self.config.source}, {', '.join(covered)}, from {leaf.issuer.rfc4514_string()}, "
                f"until {shown(not_after(leaf))} ({days:.1f} days), {state}"
            )

    def _provided(self, name: str) -> tuple[bytes, bytes]:
        """Chain and key as the source provides them, judged.

        Raises:
            FileNotFoundError: there is nothing yet.
            OSError: they cannot be read.
            Refused: they cannot serve.
        """
        if self.config.source == ACME:
            chain, key = (read_ours(self._lineage(name) / part) for part in ("fullchain.pem", "privkey.pem"))
        else:
            chain, key = (read_ours(self.places.tls / f"{name}.{kind}") for kind in ("pem", "key"))
        for mistake in mistakes(chain, key, self.config.apps[name], now()):
            raise Refused(mistake.expected, mistake.found, mistake.do)
        return chain, key

    def _install(self, name: str, dry_run: bool = False) -> bytes | None:
        """Install what was provided if it is another than Nginx has; the content before, None if there is no change."""
        chain, key = self._provided(name)
        content = key.rstrip() + b"\n" + chain.rstrip() + b"\n"
        try:
            before = (self.places.live / f"{name}.pem").read_bytes()
        except FileNotFoundError:
            before = b""
        if before == content:
            return None
        self._write(name, content, dry_run)
        return before

    def _write(self, name: str, content: bytes, dry_run: bool) -> None:
        if not dry_run:
            self.places.live.mkdir(mode=0o700, exist_ok=True)
            write_whole(self.places.live / f"{name}.pem", content)

    def _serve(self, names: Iterable[str], outcome: Outcome) -> None:
        """Install what the source provides for these apps, and have Nginx serve what it does not serve yet."""
        before: dict[str, bytes] = {}
        waiting: dict[str, bytes] = {}
        for name in names:
            try:
                if (old := self._install(name)) is not None:
                    before[name] = old
                    outcome.done.append(f"{name}: installed a certificate")
                # Also what an earlier run left behind that was killed before its reload.
                leaf = der(self._live(name))
                if served(self.config.apps[name][0]) != leaf:
                    waiting[name] = leaf
            except (Refused, OSError, ValueError) as error:
                outcome.failed[name] = str(error)
        if not waiting:
            return
        try:
            if not reload_nginx():
                return
        except Refused as error:
            outcome.failed |= dict.fromkeys(waiting, str(error))
            for name, old in before.items():
                if old:
                    try:
                        write_whole(self.places.live / f"{name}.pem", old)
                    except OSError as failure:
                        outcome.failed[name] = f"{error}; nor could the file before be put back: {failure}"
            return
        deadline = time.monotonic() + SERVED_SECONDS
        for name, leaf in waiting.items():
            while served(self.config.apps[name][0]) != leaf:
                if time.monotonic() > deadline:
                    do = "see `sudo journalctl --unit=nginx`"
                    outcome.failed[name] = str(Refused("Nginx to serve the new certificate", "the one before", do))
                    break
                time.sleep(0.1)

    def _live(self, name: str) -> x509.Certificate:
        return read_chain(read_ours(self.places.live / f"{name}.pem"))[0]

    def _lineage(self, name: str) -> Path:
        return self.places.certbot / "live" / name

    def _server(self, name: str) -> str | None:
        """The directory that certbot got an app's certificate from."""
        try:
            text = (self.places.certbot / "renewal" / f"{name}.conf").read_text()
        except OSError:
            return None
        found = re.search(r"^server\s*=\s*(\S+)\s*$", text, re.MULTILINE)
        return found[1] if found else None

    def _obtain(self, name: str) -> None:
        """Have certbot get an app a certificate with a new key.

        Raises:
            Refused: it got none.
        """
        self.places.webroot.mkdir(mode=0o755, exist_ok=True)
        # Nginx's processes read it, whatever the umask.
        self.places.webroot.chmod(0o755)
        names = self.config.apps[name]
        curve = ["--elliptic-curve", "secp256r1"] if self.config.key_type == "ecdsa" else []
        account = ["--email", self.config.email] if self.config.email else ["--register-unsafely-without-email"]
        self._certbot(
            *("certonly", "--agree-tos", *account, "--cert-name", name, "--domains", ",".join(names)),
            *("--webroot", "--webroot-path", str(self.places.webroot), "--preferred-challenges", "http"),
            *("--key-type", self.config.key_type, *curve),
            # Whether it is due was decided above, and the inventory says for what and by whom.
            *("--force-renewal", "--renew-with-new-domains", "--break-my-certs"),
            server=self.config.directory,
            do="if it names a domain, have that point at this host, with port 80 open to the CA; if it names the "
            "server, wait until that answers; then: sudo forge-certificates renew",
        )

    def _revoke(self, certificate: Path, server: str) -> None:
        """Have a certificate revoked because its key is known.

        Raises:
            Refused: it was not.
        """
        command = ("revoke", "--cert-path", str(certificate), "--no-delete-after-revoke", "--reason")
        # Not this program once more, which would revoke the certificate that serves now.
        trust = f"REQUESTS_CA_BUNDLE={self.config.ca_file} " if self.config.ca_file else ""
        again = f"sudo {trust}certbot revoke --cert-path {certificate} --server {server}"
        do = f"wait until the server answers, then: {again}"
        try:
            self._certbot(*command, "keycompromise", server=server, do=do)
        except Refused:
            # A server may know fewer reasons than there are, or none (RFC 8555, 7.6); Debian 12's certbot stumbles over
            # its saying so, and can't be asked why.
            self._certbot(*command, "unspecified", server=server, do=do)

    def _certbot(self, *arguments: str, server: str, do: str) -> None:
        # Instead of all others: a private CA vouches for its own server only.
        trust = {"REQUESTS_CA_BUNDLE": self.config.ca_file} if self.config.ca_file else {}
        command = ["certbot", *arguments, "--non-interactive", "--server", server]
        code, said = run(command, CERTBOT_SECONDS, trust)
        if code != 0:
            lines = [line.strip() for line in said.splitlines()]
            told = [line for line in lines if line and not line.startswith(CERTBOT_NOISE)][-SAID_LINES:]
            raise Refused(f"{server} to do as asked", f"certbot {arguments[0]} failed: {' | '.join(told)}", do)


def der(certificate: x509.Certificate) -> bytes:
    """A certificate as it goes over the wire."""
    return certificate.public_bytes(serialization.Encoding.DER)


DO = {
    ACME: "see why with: sudo forge-certificates renew",
    "files": "put a new pair where nginx_tls_certificates says, and run site.yml --tags nginx",
    "own_ca": "run site.yml --tags nginx",
}


def alerts(certificates: Certificates, outcome: Outcome) -> Iterator[str]:
    """An alert for each app that needs someone, as text."""
    for name in certificates.config.apps:
        ending, failure = certificates.ending(name), outcome.failed.get(name)
        if failure:
            yield f"ALERT {name}: {ending or 'the old certificate serves'}, and no new one is in service: {failure}"
        elif ending:
            yield f"ALERT {name}: {ending}; {DO[certificates.config.source]}"


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process is at it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def arguments_of(given: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="forge-certificates", description="Bring certificates to Nginx.")
    parser.add_argument("--config", type=Path, default=CONFIG, help="what the inventory says (default: %(default)s)")
    commands = parser.add_subparsers(dest="command", required=True)
    for command, text in {
        "install": "give Nginx what was provided, without a reload",
        "renew": "ask the ACME server for what is due, install it, have Nginx serve it",
    }.items():
        commands.add_parser(command, help=text).add_argument("--dry-run", action="store_true", help="only say so")
    commands.add_parser("watch", help="renew, and write an ALERT line for what is wrong; what the timer calls")
    reissue = commands.add_parser("reissue", help="get a new key and certificate from the ACME server")
    reissue.add_argument("name", help="the app")
    reissue.add_argument("--revoke", action="store_true", help="have the old one revoked, as its key is known")
    commands.add_parser("status", help="say what each app's clients get, and until when")
    return parser.parse_args(given)


def main(given: Sequence[str], places: Places | None = None) -> int:
    """Do what the command line says; the exit code."""
    arguments = arguments_of(given)
    places = places or Places()
    try:
        described = Config.read(arguments.config)
        apps = {name: names for name, names in described.apps.items() if not places.removed(name)}
        certificates = Certificates(replace(described, apps=apps), places)
        if arguments.command == "status":
            print("\n".join(certificates.status()))
            return 0
        if arguments.command == "reissue" and arguments.name not in certificates.config.apps:
            known = ", ".join(certificates.config.apps)
            raise Refused(f"one of the apps {known}", arguments.name, "correct the name")  # noqa: TRY301
        dry_run = getattr(arguments, "dry_run", False)
        with contextlib.nullcontext() if dry_run else alone(places.tls):
            if arguments.command == "install":
                outcome = certificates.install(dry_run)
            elif arguments.command == "reissue":
                outcome = certificates.reissue(arguments.name, arguments.revoke)
            else:
                outcome = certificates.renew(dry_run)
    except (Refused, OSError, tomllib.TOMLDecodeError) as error:
        print(f"forge-certificates: {error}", file=sys.stderr)
        if arguments.command == "watch":
            print(f"<3>ALERT host: nobody looks after its certificates: {' '.join(str(error).split())}")
        return 1
    for line in outcome.done:
        print(line)
    if arguments.command == "watch":
        # sd-daemon(3): an error. It is no failed unit: what served still serves.
        for line in alerts(certificates, outcome):
            print(f"<3>{' '.join(line.split())}")
        return 0
    for name, reason in outcome.failed.items():
        print(f"{name}: {reason}", file=sys.stderr)
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    os.umask(0o077)
    sys.exit(main(sys.argv[1:]))
