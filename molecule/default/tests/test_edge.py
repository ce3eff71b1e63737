"""What a client, and an attacker, sees of the edge."""

from __future__ import annotations

import json
import os
import socket
import ssl
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from forge_scenario import https_client, playbook, until
from testinfra.host import Host
from websockets.sync.client import connect

DOMAIN = "inbox.example.com"
STATE = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"])


def address(host: Host) -> str:
    """The host's address on the scenario's network."""
    return str(host.ansible.get_variables()["ansible_host"])


def trust() -> ssl.SSLContext:
    """A context that trusts the scenario's CA alone."""
    return ssl.create_default_context(cafile=STATE / "tls" / "ca.pem")


@contextmanager
def tls(host: Host, name: str = DOMAIN, context: ssl.SSLContext | None = None) -> Iterator[ssl.SSLSocket]:
    """A TLS connection to Nginx."""
    raw = socket.create_connection((address(host), 443), timeout=10)
    with (context or trust()).wrap_socket(raw, server_hostname=name) as connection:
        yield connection


def post(client: httpx.Client, payload: object = None, **headers: str) -> httpx.Response:
    """Post an event with a key of its own."""
    body = {"type": "edge.tested", "payload": {"value": payload}}
    return client.post("/v1/events", json=body, headers={"Idempotency-Key": uuid.uuid4().hex, **headers})


def access_log(host: Host, request_id: str) -> list[dict[str, Any]]:
    """Read Nginx's lines about a request."""
    found = host.run("grep --no-filename %s /var/log/nginx/inbox.json", request_id).stdout
    return [json.loads(line) for line in found.splitlines()]


def app_log(host: Host, request_id: str) -> list[dict[str, Any]]:
    """Read the app's lines about a request from the journal."""
    found = host.run("journalctl --no-pager --output=cat --identifier=inbox --grep=%s", request_id).stdout
    return [json.loads(line) for line in found.splitlines()]


def psql(host: Host, query: str) -> str:
    """Ask the app's database as its administrator."""
    with host.sudo("postgres"):
        return str(host.check_output("psql --no-align --tuples-only --dbname=inbox --command=%s", query))


def test_event_posted_over_tls_is_a_row(host: Host, client: httpx.Client) -> None:
    """The main job: through Nginx and the app into PostgreSQL, and back."""
    said = f"hello {uuid.uuid4()} é€"
    answer = post(client, said)
    assert answer.status_code == 201
    number = answer.json()["id"]
    assert json.loads(psql(host, f"SELECT payload FROM event WHERE id = {number}")) == {"value": said}
    assert client.get(f"/v1/events/{number}").json()["payload"] == {"value": said}


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_http2_and_modern_tls_only(host: Host) -> None:
    """HTTP/2 is negotiated; TLS 1.1 is refused."""
    with https_client(host, http2=True) as client:
        assert client.get("/health").http_version == "HTTP/2"
    old = trust()
    old.set_ciphers("ALL:@SECLEVEL=0")
    old.minimum_version = ssl.TLSVersion.TLSv1
    old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError, match=r"PROTOCOL_VERSION|NO_PROTOCOLS"), tls(host, context=old):
        pass


def test_plain_http_is_sent_to_https(host: Host) -> None:
    """With the method and the body kept, and the query."""
    answer = httpx.post(f"http://{address(host)}/v1/events?a=b", headers={"Host": DOMAIN}, content=b"{}")
    assert (answer.status_code, answer.headers["location"]) == (308, f"https://{DOMAIN}/v1/events?a=b")


def test_unknown_names_learn_nothing(host: Host) -> None:
    """No handshake, so not even a certificate; on plain HTTP the connection is closed without an answer."""
    with pytest.raises(ssl.SSLError, match="UNRECOGNIZED_NAME"), tls(host, name="other.example.com"):
        pass
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
        httpx.get(f"http://{address(host)}/", headers={"Host": "other.example.com"})
    # The name of the handshake says nothing about the one of the request.
    with tls(host) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: other.example.com\r\n\r\n")
        assert connection.recv(1024) == b""


def test_versions_are_hidden_and_browsers_told(client: httpx.Client) -> None:
    """No version of anything; HTTPS from now on."""
    headers = client.get("/health").headers
    assert headers["server"] == "nginx"
    assert "max-age=" in headers["strict-transport-security"]
    assert headers["x-content-type-options"] == "nosniff"
    assert "/" not in client.get("/no-such-page").headers["server"]


def test_what_a_client_claims_about_itself_is_overwritten(host: Host, client: httpx.Client) -> None:
    """Address and request id are Nginx's own, the same in its log, in the app's log and in the answer."""
    claims = {
        "X-Forwarded-For": "192.0.2.1",
        "X-Real-IP": "192.0.2.1",
        "Forwarded": "for=192.0.2.1;proto=http",
        "X-Forwarded-Host": "other.example.com",
        "X-Forwarded-Proto": "http",
        "X-Request-ID": "chosen-by-the-client",
    }
    answer = client.get("/v1/events?limit=1", headers=claims)
    (request_id,) = answer.headers.get_list("x-request-id")
    assert request_id != "chosen-by-the-client"
    (nginx,) = until(lambda: access_log(host, request_id), 5)
    (app,) = until(lambda: app_log(host, request_id), 5)
    assert nginx["client"] == app["client"]
    assert app["client"].startswith("10.")
    assert (app["path"], app["status"], nginx["status"]) == ("/v1/events", 200, 200)
    assert app_log(host, "chosen-by-the-client") == []


def test_metrics_and_docs_are_not_for_clients(client: httpx.Client, host: Host) -> None:
    """From outside they are not there; on the host the metrics count over all workers."""
    assert client.get("/metrics").status_code == 403
    assert {client.get(path).status_code for path in ("/docs", "/redoc", "/openapi.json")} == {404}
    local = "curl --silent --insecure --resolve %s:443:127.0.0.1 https://%s/metrics"
    assert "http_requests_total" in host.check_output(local, DOMAIN, DOMAIN)


def test_too_large_is_refused_as_a_problem(client: httpx.Client) -> None:
    """Whoever notices first: Nginx by the length, with a body like the app's."""
    answer = client.post("/v1/events", content=b" " * (1024 * 1024 + 1))
    assert answer.status_code == 413
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == 413
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


def test_large_answer_arrives_whole(client: httpx.Client) -> None:
    """Bodies beyond every buffer on the way, in both directions."""
    number = post(client, "x" * 500_000).json()["id"]
    assert len(client.get(f"/v1/events/{number}").json()["payload"]["value"]) == 500_000


def test_slow_body_costs_the_app_nothing(host: Host) -> None:
    """The app sees a request only when all of it has arrived."""
    body = json.dumps({"type": "edge.slow", "payload": {}}).encode()
    head = f"POST /v1/events HTTP/1.1\r\nHost: {DOMAIN}\r\nIdempotency-Key: {uuid.uuid4().hex}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"

    def to_app() -> int:
        """Count the connections between Nginx and the app that are in use."""
        return int(host.check_output("ss --no-header --unix state established src /run/inbox/\\*.sock | wc --lines"))

    until(lambda: to_app() == 0, 10)
    with tls(host) as connection:
        connection.sendall(head.encode() + body[:5])
        time.sleep(1)
        assert to_app() == 0
        connection.sendall(body[5:])
        assert connection.recv(64).startswith(b"HTTP/1.1 201")


def test_streams_are_not_held_back(host: Host, client: httpx.Client) -> None:
    """An event reaches an SSE client and a WebSocket client through Nginx while both are open."""
    with (
        https_client(host) as follower,
        follower.stream("GET", "/v1/events/stream", timeout=20) as stream,
        socket.create_connection((address(host), 443), timeout=10) as raw,
        connect(f"wss://{DOMAIN}/v1/events/ws", sock=raw, ssl=trust(), server_hostname=DOMAIN) as websocket,
    ):
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = stream.iter_lines()
        # Each begins with its position; what comes from now on is not missed.
        assert any(line.startswith("id:") for line in lines)
        assert json.loads(websocket.recv(timeout=10))["cursor"]
        said = uuid.uuid4().hex
        began = time.monotonic()
        assert post(client, said).status_code == 201
        assert any(said in line for line in lines)
        assert said in str(websocket.recv(timeout=10))
        assert time.monotonic() - began < 10


@contextmanager
def app_down(host: Host) -> Iterator[None]:
    """Stop the live slot with its socket; afterwards do what a boot does."""
    host.check_output("systemctl stop 'inbox@*.socket' 'inbox@*.service'")
    try:
        yield
    finally:
        host.check_output("forgectl boot inbox")


def test_app_that_is_down_is_a_quick_problem(host: Host, client: httpx.Client) -> None:
    """502 at once, in the form of the app's own errors; once the app is back, answers, with no hand on Nginx."""
    with app_down(host):
        answer = client.get("/v1/events")
        assert answer.status_code == 502
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.elapsed.total_seconds() < 2
    assert until(lambda: client.get("/ready").status_code == 200, 30, every=0.5)


def certificate(host: Host) -> bytes:
    """What Nginx serves now."""
    with tls(host) as connection:
        served = connection.getpeercert(binary_form=True)
    assert served
    return served


def test_broken_configuration_never_takes_nginx_down(host: Host, client: httpx.Client) -> None:
    """Refused before it replaces the present one, with Nginx's own reason; what is there would survive a restart."""
    before = host.check_output("sha256sum /etc/nginx/nginx.conf /etc/nginx/forge/inbox.conf")
    master = host.service("nginx").systemd_properties["MainPID"]
    broken = playbook("--tags", "nginx", "--extra-vars", json.dumps({"nginx_real_ip_from": ["not-a-network"]}))
    assert broken.returncode == 2
    assert 'host not found in set_real_ip_from "not-a-network"' in broken.stdout + broken.stderr
    assert host.check_output("sha256sum /etc/nginx/nginx.conf /etc/nginx/forge/inbox.conf") == before
    assert host.service("nginx").systemd_properties["MainPID"] == master
    assert client.get("/ready").status_code == 200
    host.check_output("nginx -t -q && systemctl restart nginx")
    assert client.get("/ready").status_code == 200


def test_certificate_is_renewed_in_time_and_served_at_once(host: Host, client: httpx.Client) -> None:
    """Not before its time; then without a restart and without a failed request."""
    before = certificate(host)
    master = host.service("nginx").systemd_properties["MainPID"]
    early = playbook("--tags", "nginx", "--extra-vars", "__nginx_renewal_days=396")
    assert "changed=0 " in early.stdout, early.stdout
    assert certificate(host) == before
    due = playbook("--tags", "nginx", "--extra-vars", "__nginx_renewal_days=398")
    assert due.returncode == 0, due.stdout
    assert until(lambda: certificate(host) != before, 10)
    assert host.service("nginx").systemd_properties["MainPID"] == master
    assert client.get("/ready").status_code == 200
