"""Certificates: where they come from, how they change while clients ask, and what happens when there are none."""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import forge_load
import httpx
import hvac
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from forge_acme import (
    ALIASES,
    DOMAIN,
    SERVICE,
    TRUSTED,
    Authority,
    OpenBao,
    Pebble,
    names,
    openbao,
    own,
    own_ca,
    provision,
    served,
    watch,
)
from forge_scenario import playbook, show
from forge_vault import down
from forge_wire import address, exchange, tls
from testinfra.host import Host

__all__ = ["openbao", "own", "own_ca"]

EPHEMERAL = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"])
CHALLENGES = "/.well-known/acme-challenge"
RATE = 50.0
MORE = "more.inbox.example.com"


@contextmanager
def unnoticed(host: Host) -> Iterator[None]:
    """Load from outside: no request may fail, and every acknowledged event is stored once."""
    with forge_load.running(address(host), DOMAIN, TRUSTED, rate=RATE) as load:
        yield
    result = load.result
    assert len(result.records) > RATE
    assert result.counts() == {}, result.failed[:20]


@pytest.fixture(scope="module")
def pebble(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pebble]:
    """The other one."""
    server = Pebble(host, tmp_path_factory.mktemp("pebble"), [DOMAIN, *ALIASES, MORE])
    yield server
    server.stop()


@pytest.fixture(scope="module", params=["openbao", "pebble"])
def authority(request: pytest.FixtureRequest) -> Authority:
    """An ACME server that the host has its certificate from, for some of the names."""
    server: Authority = request.getfixturevalue(request.param)
    done = provision(**server.variables, apps=apps(ALIASES[:1]))
    assert done.returncode == 0, done.stdout + done.stderr
    return server


def test_first_certificate(host: Host) -> None:
    """A host that served nothing has one for the domain and its aliases, by a chain that ends at the CA's root."""
    found = served(host)
    assert names(found) == {DOMAIN, *ALIASES}
    assert [served(host, alias) for alias in ALIASES] == [found, found]
    key = found.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert isinstance(key.curve, ec.SECP256R1)
    assert found.issuer.rfc4514_string() == "CN=throwaway"
    status = host.check_output("forge-certificates status")
    assert status.startswith(f"inbox: acme, {DOMAIN}, ")
    assert status.endswith(" days), served")


def test_one_timer_renews(host: Host) -> None:
    """Not the distribution's as well."""
    assert host.service("forge-certificates.timer").is_running
    assert host.service("forge-certificates.timer").is_enabled
    assert not host.service("certbot.timer").is_running
    assert not host.service("certbot.timer").is_enabled
    assert host.check_output("systemctl list-units --state=failed --no-legend") == ""
    assert show(host, "forge-certificates.timer", "RandomizedDelayUSec") == "3h"


def test_challenges_are_answered_by_nginx(host: Host, client: httpx.Client) -> None:
    """Through both ports and in a maintenance, and nothing else is different there."""
    request = f"GET {CHALLENGES}/token HTTP/1.1\r\nHost: {DOMAIN}\r\nConnection: close\r\n\r\n".encode()
    host.check_output(f"mkdir -p /var/lib/forge-acme{CHALLENGES} && echo said > /var/lib/forge-acme{CHALLENGES}/token")
    for maintenance in (False, True):
        if maintenance:
            host.check_output("touch /run/inbox/maintenance")
        try:
            plain = httpx.get(f"http://{address(host)}{CHALLENGES}/token", headers={"Host": DOMAIN})
            with tls(host, DOMAIN) as connection:
                answer = exchange(connection, request)
            ready = client.get("/ready").status_code
        finally:
            host.check_output("rm -f /run/inbox/maintenance")
        assert (plain.status_code, plain.text) == (200, "said\n")
        assert (answer.status, answer.body) == (200, b"said\n")
        assert ready == (503 if maintenance else 200)
    host.check_output(f"rm /var/lib/forge-acme{CHALLENGES}/token")
    for path, status in ((f"{CHALLENGES}/token", 404), (f"{CHALLENGES}/../../x", 308), ("/ready", 308)):
        assert httpx.get(f"http://{address(host)}{path}", headers={"Host": DOMAIN}).status_code == status


def test_nothing_due_asks_nobody(host: Host, vault: hvac.Client) -> None:
    """While the server is gone, a run changes nothing, a check says so, and the timer calls for nobody."""
    before = served(host)
    with down(vault):
        for options in ((), ("--check", "--diff")):
            done = playbook("--tags", "nginx", *options)
            assert done.returncode == 0, done.stdout + done.stderr
            assert "changed=0 " in done.stdout, done.stdout
        assert watch(host) == []
    assert served(host) == before


def test_another_name(host: Host, authority: Authority) -> None:
    """Asked for by the next run, which a check foretells without asking."""
    before = served(host)
    assert names(before) == {DOMAIN, ALIASES[0]}
    check = provision("--check", **authority.variables)
    assert check.returncode == 0, check.stdout
    assert "changed=0 " not in check.stdout
    assert served(host) == before
    done = provision(**authority.variables)
    assert done.returncode == 0, done.stdout + done.stderr
    after = served(host)
    assert names(after) == {DOMAIN, *ALIASES}
    assert after.issuer == before.issuer
    assert after.public_key() != before.public_key()
    assert isinstance(after.public_key(), ec.EllipticCurvePublicKey)


def test_key_that_others_know(host: Host, authority: Authority) -> None:
    """One command, under load: a new key serves, then the old certificate is revoked, and no request fails."""
    before = served(host)
    assert not authority.has_revoked(before)
    with unnoticed(host):
        host.check_output("forge-certificates reissue inbox --revoke")
    after = served(host)
    assert after.public_key() != before.public_key()
    assert authority.has_revoked(before)
    assert not authority.has_revoked(after)


def test_server_that_cannot_be_reached(host: Host, pebble: Pebble) -> None:
    """What serves goes on serving, and one line calls for someone and says why; the unit itself is well."""
    assert provision(**pebble.variables).returncode == 0
    before = served(host)
    description = host.check_output("cat /etc/forge/certificates.toml")
    # What is due for another reason than its age.
    host.check_output("sed -i 's/, \"inbox.example.net\"//' /etc/forge/certificates.toml")
    with pebble.down():
        (alert,) = watch(host)
        assert "the old certificate serves, and no new one is in service" in alert
        assert pebble.variables["nginx_acme_directory"] in alert
        assert "Connection refused" in alert
        assert served(host) == before
        assert host.service(SERVICE).systemd_properties["Result"] == "success"
    host.check_output("printf %%s %s > /etc/forge/certificates.toml", f"{description}\n")
    assert watch(host) == []


def test_domain_that_leads_elsewhere(host: Host, pebble: Pebble) -> None:
    """The run fails and names it; its site has a placeholder, and the other app gets what it needs all the same."""
    lost = {"domain": "lost.example.com", "database": {"name": "lost", "migration": {"role_id": "x"}}}
    try:
        both = apps([*ALIASES, MORE]) | apps([], "lost", **lost)
        done = provision(**pebble.variables, apps=both)
        assert done.returncode == 2
        assert "lost.example.com" in done.stdout
        assert "have that point at this host" in " ".join(done.stdout.split())
        assert names(served(host)) == {DOMAIN, *ALIASES, MORE}
        with pytest.raises(ssl.SSLCertVerificationError):
            served(host, "lost.example.com")
    finally:
        host.check_output("rm -f /etc/nginx/forge/lost.conf /etc/nginx/tls/live/lost.pem")


@pytest.fixture
def near_its_end(host: Host, openbao: OpenBao) -> x509.Certificate:
    """A certificate that is due, and nothing else about it is strange."""
    done = provision(**openbao.variables)
    assert done.returncode == 0, done.stdout + done.stderr
    with openbao.aged():
        host.check_output("forge-certificates reissue inbox")
    return served(host)


def test_renewal_by_the_timer(host: Host, near_its_end: x509.Certificate) -> None:
    """Under load: it is replaced, and no request fails; the timer's next look finds nothing to do."""
    with unnoticed(host):
        assert watch(host) == []
    after = served(host)
    assert after != near_its_end
    assert after.public_key() != near_its_end.public_key()
    host.check_output("systemctl start %s", SERVICE)
    assert served(host) == after


@pytest.mark.exhaustive
def test_server_that_refuses(host: Host, openbao: OpenBao, near_its_end: x509.Certificate) -> None:
    """The old certificate serves, the alert says what the server said, and a run of site.yml fails with it."""
    with openbao.refusing():
        (alert,) = watch(host)
        assert "certbot certonly failed" in alert
        assert "sudo forge-certificates renew" in alert
        done = playbook("--tags", "nginx")
        assert done.returncode == 2
        assert "to do as asked" in done.stdout
        assert served(host) == near_its_end
    assert watch(host) == []


def test_own_files(host: Host, own: Callable[..., dict[str, Any]]) -> None:
    """Under load from the ACME server's to one's own; it calls before it ends, though nobody renews it by itself."""
    variables = own(days=300)
    with unnoticed(host):
        done = provision(**variables)
        assert done.returncode == 0, done.stdout + done.stderr
    assert served(host).subject.rfc4514_string() == "CN=own for 300 days"
    assert watch(host) == []
    assert provision(**own(days=12)).returncode == 0
    (alert,) = watch(host)
    assert f"the certificate of {DOMAIN} ends on " in alert
    assert "put a new pair where nginx_tls_certificates says" in alert


def test_key_of_another_certificate(host: Host, own: Callable[..., dict[str, Any]]) -> None:
    """Refused before anything on the host changes, and the host refuses it as well."""
    before = served(host), host.check_output("sha256sum /etc/nginx/tls/*.* /etc/nginx/tls/live/*")
    done = provision(**own(other_key=True))
    assert done.returncode == 2
    said = " ".join(done.stdout.split())
    assert "Preflight refused vm: 1 problem. Nothing was changed." in said
    assert "nginx_tls_certificates.inbox.key" in said
    host.check_output("cp /etc/nginx/tls/inbox.key /run/kept.key")
    host.check_output("openssl ecparam -name prime256v1 -genkey -noout -out /etc/nginx/tls/inbox.key")
    (alert,) = watch(host)
    assert "no new one is in service: expected: the key of the first certificate" in alert
    host.check_output("cat /run/kept.key > /etc/nginx/tls/inbox.key; rm /run/kept.key")
    assert (served(host), host.check_output("sha256sum /etc/nginx/tls/*.* /etc/nginx/tls/live/*")) == before


@pytest.mark.exhaustive
def test_own_ca_and_back(host: Host, openbao: OpenBao, own_ca: dict[str, Any]) -> None:
    """Under load from files to a CA of one's own, and back to the ACME server, which is not asked again."""
    log = "stat --format=%%s%%n /var/log/letsencrypt/letsencrypt.log"
    asked = host.check_output(log)
    with unnoticed(host):
        done = provision(**own_ca)
        assert done.returncode == 0, done.stdout + done.stderr
    assert served(host).issuer.rfc4514_string() == "CN=ours"
    with unnoticed(host):
        done = provision(**openbao.variables)
        assert done.returncode == 0, done.stdout + done.stderr
    assert served(host).issuer.rfc4514_string() == "CN=throwaway"
    assert host.check_output(log) == asked


def apps(aliases: list[str], name: str = "inbox", **options: Any) -> dict[str, Any]:
    """An inventory's app with such aliases."""
    roles: Mapping[str, str] = json.loads((EPHEMERAL / "vault" / "control.json").read_text())["role_ids"]["inbox"]
    entry = {
        "domain": DOMAIN,
        "aliases": aliases,
        "source": "app",
        "module": "inbox.main:app",
        "python_path": "src",
        "workers": 1,
        "secrets": {"role_id": roles["app"], "variables": {"FORGE_SIGNING_KEY": "signing_key"}},
        "database": {"migration": {"role_id": roles["migrate"]}},
    }
    return {name: entry | options}
