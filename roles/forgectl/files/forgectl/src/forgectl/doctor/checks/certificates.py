"""What clients get when they ask for an app's domain, and whether somebody looks after it."""

import re
import socket
import ssl
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, NamedTuple

from forgectl.doctor.checks.provisioning import PROVISION
from forgectl.doctor.findings import HOST, Finding
from forgectl.doctor.sight import HOUR, AppSight, Sight, message, moment, shorten

CONFIG = "/etc/forge/certificates.toml"
PROGRAM = "/usr/local/sbin/forge-certificates"
# The common name of what forge-certificates makes until there is a certificate.
PLACEHOLDER = "placeholder until a certificate is issued"
ALERT_DAYS = 14
# Of a lifetime, what is left when forge-certificates renews, and when it calls for somebody.
RENEWED_AT, ALERTED_AT = 1 / 3, 1 / 5
CONNECT_SECONDS = 1.0
RENEW = "sudo forge-certificates renew"
MEND = {
    "acme": RENEW,
    "files": "ansible-playbook -i inventory/production site.yml --tags nginx",
    "own_ca": "ansible-playbook -i inventory/production site.yml --tags nginx",
}


class Certificate(NamedTuple):
    """Whom a certificate is for, and the days that it has: left, and in all."""

    subject: str
    ends: datetime
    left: float
    lifetime: float


def certificates(sight: Sight) -> Iterator[Finding]:
    """F101, F102 and F104: the certificate of each app, as a client on this host gets it."""
    described = config(sight)
    mend = MEND.get(str(described.get("source")), RENEW)
    for app, domain in _domains(sight, described):
        if why := _no_name(domain):
            # Preflight takes none such: somebody wrote it by hand.
            title = f"its domain {shorten(domain)} is no name that a client could ask for"
            yield Finding("F005", app.name, title, (f"{CONFIG}, {app.layout.description}: {why}",), PROVISION)
            continue
        pem, where = _given(sight, app, domain)
        if not pem:
            # That nobody answers is another finding.
            continue
        found = parse(sight, pem)
        evidence = [f"{where}: {found.subject}, until {found.ends:%Y-%m-%d %H:%M} UTC"]
        if PLACEHOLDER in found.subject:
            title = f"clients of {domain} get a placeholder, which they refuse"
            yield Finding("F104", app.name, title, evidence, mend)
        elif found.left <= 0:
            title = f"the certificate of {domain} expired {_days(-found.left)} ago"
            yield Finding("F102", app.name, title, evidence, mend)
        elif found.left < min(float(described.get("alert_days", ALERT_DAYS)), found.lifetime * ALERTED_AT):
            title = f"the certificate of {domain} expires in {_days(found.left)}"
            yield Finding("F101", app.name, title, evidence, mend)


def renewal(sight: Sight) -> Iterator[Finding]:
    """F103: the timer, the last run, and whether Nginx serves what is on the disk."""
    described = config(sight)
    if not described:
        return
    timer, service = sight.unit("forge-certificates.timer"), sight.unit("forge-certificates.service")
    if timer["ActiveState"] != "active":
        evidence = [f"forge-certificates.timer is {timer['ActiveState']}, {timer['UnitFileState'] or 'not there'}"]
        mend = "sudo systemctl enable --now forge-certificates.timer"
        yield Finding("F103", HOST, "nobody looks after the certificates: the timer is off", evidence, mend)
    if service["Result"] not in ("success", ""):
        evidence = [f"forge-certificates.service: {service['Result']}", *sight.last_words("forge-certificates.service")]
        yield Finding("F103", HOST, "the last look at the certificates failed", evidence, RENEW)
    yield from _last_run(sight, described, service.get("InvocationID", ""))
    for app, domain in _domains(sight, described) if sight.is_root else ():
        path = f"/etc/nginx/tls/live/{app.name}.pem"
        on_disk, served = _leaf(sight.read(path)), None if _no_name(domain) else _served(domain)
        if on_disk and served and ssl.PEM_cert_to_DER_cert(on_disk) != served:
            evidence = [f"{path} holds another certificate than 127.0.0.1:443 gives for {domain}"]
            title = f"Nginx does not serve the newest certificate of {domain}"
            yield Finding("F103", app.name, title, evidence, "sudo systemctl reload nginx")


def config(sight: Sight) -> dict[str, Any]:
    """What forge-certificates goes by; empty where nobody told it yet, or it is broken."""
    try:
        return tomllib.loads(sight.read(CONFIG))
    except tomllib.TOMLDecodeError:
        return {}


def parse(sight: Sight, pem: str) -> Certificate:
    """Have OpenSSL read a certificate, which Python does only of one that it trusts."""
    said = sight.run("openssl", "x509", "-noout", "-subject", "-startdate", "-enddate", "-nameopt", "RFC2253", data=pem)
    fields = dict(line.partition("=")[::2] for line in said.splitlines())
    begins, ends = (
        datetime.strptime(fields[name], "%b %d %H:%M:%S %Y GMT").replace(tzinfo=UTC)
        for name in ("notBefore", "notAfter")
    )
    day = 86400
    left = (ends - datetime.now(UTC)).total_seconds() / day
    return Certificate(fields["subject"], ends, left, (ends - begins).total_seconds() / day)


def _last_run(sight: Sight, described: dict[str, Any], invocation: str) -> Iterator[Finding]:
    """What the last run of the timer complained of, unless it was mended since."""
    if not invocation or not sight.is_root:
        return
    alerts = sight.journal(f"_SYSTEMD_INVOCATION_ID={invocation}", "PRIORITY=3", since=7 * 24 * HOUR, lines=20)
    for entry in alerts:
        found = re.match(r"ALERT (\S+): (.*)", message(entry))
        if not found or "no new one is in service" not in found[2]:
            continue
        name, text = found.groups()
        path = sight.at(f"/etc/nginx/tls/live/{name}.pem")
        mended = path.exists() and path.lstat().st_mtime > moment(entry)
        if name in described.get("apps", {}) and not mended:
            evidence = [f"journal of forge-certificates.service: {shorten(text)}"]
            yield Finding("F103", name, "its certificate could not be renewed", evidence, RENEW)


def _domains(sight: Sight, described: dict[str, Any]) -> Iterator[tuple[AppSight, str]]:
    for app in sight.apps:
        names = described.get("apps", {}).get(app.name) or ([app.described.domain] if app.described else [])
        removed = app.layout.removed_site.exists() and not app.layout.site.exists()
        if names and not removed:
            yield app, names[0]


def _given(sight: Sight, app: AppSight, domain: str) -> tuple[str, str]:
    """The certificate that clients get, and where it was seen; the file where nobody answers."""
    served = _served(domain)
    if served:
        return ssl.DER_cert_to_PEM_cert(served), f"127.0.0.1:443 for {domain}"
    path = f"/etc/nginx/tls/live/{app.name}.pem"
    return (_leaf(sight.read(path)), path) if sight.is_root else ("", "")


def _no_name(domain: str) -> str:
    """Why TLS can't ask for a name; empty where it can."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname=domain)
    except (ValueError, TypeError, ssl.SSLError) as error:
        return shorten(str(error))
    return ""


def _served(domain: str, port: int = 443) -> bytes | None:
    # To be looked at, not to be trusted.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=CONNECT_SECONDS) as raw,
            context.wrap_socket(raw, server_hostname=domain) as connection,
        ):
            return connection.getpeercert(binary_form=True)
    except OSError:
        return None


def _leaf(text: str) -> str:
    """The first certificate of a PEM file that may begin with a key."""
    found = re.search(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----\n?", text, re.DOTALL)
    return found[0] if found else ""


def _days(number: float) -> str:
    return f"{int(number)} days" if number >= 2 else f"{number * 24:.0f} hours"
