"""TLS as Mozilla's intermediate profile has it, and HTTP/3."""

from __future__ import annotations

import json
import socket
import ssl

import httpx
import pytest
from forge_scenario import playbook, until
from forge_wire import address, tls, trust
from testinfra.host import Host

DOMAIN = "inbox.example.com"
QUIC_CLIENTS = 20


def tls12(ciphers: str = "ECDHE+AESGCM") -> ssl.SSLContext:
    """A client that knows nothing newer than TLS 1.2."""
    context = trust()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(ciphers)
    return context


def openssl(host: Host, *options: str) -> str:
    """Connect on the host itself with OpenSSL's client, which may know more than Python's."""
    command = f"openssl s_client -connect 127.0.0.1:443 -servername {DOMAIN} {' '.join(options)} < /dev/null 2>&1"
    return str(host.run(command).stdout)


def test_what_a_client_of_tls_12_gets(host: Host) -> None:
    """Forward secrecy and AEAD, and whichever of them the client likes best; nothing else."""
    for wanted in ("ECDHE-ECDSA-CHACHA20-POLY1305", "ECDHE-ECDSA-AES256-GCM-SHA384", "ECDHE-ECDSA-AES128-GCM-SHA256"):
        with tls(host, DOMAIN, tls12(wanted)) as connection:
            assert connection.cipher() == (wanted, "TLSv1.2", 256 if "128" not in wanted else 128)
    for unwanted in ("ECDHE-ECDSA-AES128-SHA", "ECDHE-ECDSA-AES128-SHA256", "ECDHE-ECDSA-AES128-CCM"):
        with pytest.raises(ssl.SSLError, match="HANDSHAKE_FAILURE"), tls(host, DOMAIN, tls12(unwanted)):
            pass


@pytest.mark.parametrize(("group", "agreed"), [("prime256v1", True), ("secp384r1", True), ("secp521r1", False)])
def test_groups(host: Host, group: str, agreed: bool) -> None:
    """Those of the profile and no other."""
    context = trust()
    context.set_ecdh_curve(group)
    if agreed:
        with tls(host, DOMAIN, context) as connection:
            assert connection.version() == "TLSv1.3"
        return
    with pytest.raises(ssl.SSLError, match="HANDSHAKE_FAILURE"), tls(host, DOMAIN, context):
        pass


def test_key_exchange_withstands_quantum_computers_where_openssl_can(host: Host) -> None:
    """Debian 13's OpenSSL has the hybrid group, Debian 12's does not."""
    if host.system_info.release.startswith("12"):
        assert "X25519" in openssl(host, "-groups", "X25519")
        return
    assert "Negotiated TLS1.3 group: X25519MLKEM768" in openssl(host)


def test_sessions_are_resumed_without_tickets(host: Host) -> None:
    """From Nginx's memory: there is no key that would have to be changed."""
    context = tls12()
    with tls(host, DOMAIN, context) as first:
        session = first.session
        assert session is not None
        assert (session.has_ticket, bool(session.id)) == (False, True)
        assert not first.session_reused
    raw = socket.create_connection((address(host), 443), timeout=10)
    with context.wrap_socket(raw, server_hostname=DOMAIN, session=session) as second:
        assert second.session_reused


def test_nothing_is_stapled(host: Host) -> None:
    """No client waits for what its CA may not have."""
    assert "OCSP response: no response sent" in openssl(host, "-status")


def test_http3(host: Host, client: httpx.Client) -> None:
    """Told of, and there, where the distribution's Nginx has it; refused before anything changes where not."""
    answer = client.get("/health")
    if host.system_info.release.startswith("12"):
        assert "alt-svc" not in answer.headers
        assert not host.socket("udp://0.0.0.0:443").is_listening
        refused = playbook("--extra-vars", json.dumps({"nginx_http3": True}))
        assert refused.returncode == 2
        assert "1. nginx_http3" in refused.stdout
        assert "changed=0" in refused.stdout
        return
    assert answer.headers["alt-svc"] == 'h3=":443"; ma=3600'
    # A worker that leaves after a reload still gets a share of the packets, and takes no new request.
    until(lambda: not host.run("pgrep --full '^nginx: worker process is shutting down'").stdout, 120, every=0.5)
    ask = f"curl --silent --show-error --insecure --http3-only --resolve {DOMAIN}:443:127.0.0.1"
    # Each on a connection of its own; with quic_retry some of them wait in vain. One that fails says so by its line.
    one = f"{ask} --output /dev/null --write-out '%{{http_version}} %{{http_code}}\\n' https://{DOMAIN}/health"
    said = host.check_output(f"for number in $(seq {QUIC_CLIENTS}); do {one} || true; done")
    assert said.splitlines() == ["3 200"] * QUIC_CLIENTS
    metrics = f"{ask} --output /dev/null --write-out '%{{http_code}}' https://{DOMAIN}/no-such-page"
    assert host.check_output(metrics) == "404"


@pytest.mark.exhaustive
def test_http3_over_a_reload(host: Host, pytestconfig: pytest.Config) -> None:
    """Connections of QUIC that outlive it are counted; whoever's did not has an answer over HTTP/2 at once."""
    if host.system_info.release.startswith("12"):
        assert "quic" not in host.check_output("nginx -T 2> /dev/null")
        return
    url = f"https://{DOMAIN}/health"
    curl = f"curl --silent --insecure --resolve {DOMAIN}:443:127.0.0.1 --output /dev/null"
    # Two requests of each client on one connection, six seconds apart.
    shown = "--write-out '%{http_version} %{http_code} %{num_connects}\\n'"
    client = f"{curl} --output /dev/null --http3-only --max-time 10 --rate 10/m {shown} {url} {url}"
    fallback = f"{curl} --http2 --write-out '%{{http_code}}\\n' {url}"
    script = (
        f"for number in $(seq {QUIC_CLIENTS}); do {client} > /tmp/quic.$number & done; sleep 3; "
        f"systemctl reload nginx; for number in $(seq {QUIC_CLIENTS}); do {fallback}; done; "
        "wait; cat /tmp/quic.*; rm /tmp/quic.*"
    )
    said = host.check_output("sh -c %s", script).splitlines()
    assert said[:QUIC_CLIENTS] == ["200"] * QUIC_CLIENTS
    first, second = said[QUIC_CLIENTS::2], said[QUIC_CLIENTS + 1 :: 2]
    assert first == ["3 200 1"] * QUIC_CLIENTS
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n    {second.count('3 200 0')} of {QUIC_CLIENTS} connections of HTTP/3 outlived a reload")
