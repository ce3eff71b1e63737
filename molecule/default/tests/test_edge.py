"""What a client, and an attacker, sees of the edge."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import time
import uuid
from collections.abc import Iterator
from functools import partial
from typing import Any

import httpx
import pytest
from forge_scenario import https_client, playbook, until
from forge_wire import address, exchange, stand_in, tls, trust
from testinfra.host import Host
from websockets.sync.client import connect

DOMAIN = "inbox.example.com"
HOST = f"Host: {DOMAIN}\r\nConnection: close\r\n".encode()
PROBLEM = "application/problem+json"
MIB = 2**20

# What a client might claim about itself, or where it was sent from.
CLAIMS = {
    "X-Forwarded-For": "192.0.2.1",
    "X-Real-IP": "192.0.2.1",
    "Forwarded": "for=192.0.2.1;proto=http",
    "X-Forwarded-Host": "other.example.com",
    "X-Forwarded-Proto": "http",
    "X-Forwarded-Port": "80",
    "X-Forwarded-Prefix": "/other",
    "X-Request-ID": "chosen-by-the-client",
}


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
    """HTTP/2 is negotiated; TLS 1.1 is refused, and by the server."""
    with https_client(host, http2=True) as client:
        assert client.get("/health").http_version == "HTTP/2"
    old = trust()
    old.set_ciphers("ALL:@SECLEVEL=0")
    old.minimum_version = ssl.TLSVersion.TLSv1
    old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError, match="TLSV1_ALERT_PROTOCOL_VERSION"), tls(host, DOMAIN, old):
        pass


def test_plain_http_is_sent_to_https(host: Host) -> None:
    """With the method and the body kept, and the query."""
    answer = httpx.post(f"http://{address(host)}/v1/events?a=b", headers={"Host": DOMAIN}, content=b"{}")
    assert (answer.status_code, answer.headers["location"]) == (308, f"https://{DOMAIN}/v1/events?a=b")


@pytest.mark.parametrize("name", ["other.example.com", "x.inbox.example.com", "192.0.2.1", None])
def test_unknown_names_learn_nothing(host: Host, name: str | None) -> None:
    """No handshake, so not even a certificate; a request by such a name is closed without an answer."""
    curious = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    curious.check_hostname, curious.verify_mode = False, ssl.CERT_NONE
    with pytest.raises(ssl.SSLError, match="UNRECOGNIZED_NAME"), tls(host, name, curious):
        pass
    request = f"GET /health HTTP/1.1\r\nHost: {name or ''}\r\n\r\n".encode()
    with socket.create_connection((address(host), 80), timeout=10) as plain:
        assert exchange(plain, request).head == ""
    # The name of the handshake says nothing about the one of the request; none at all is no HTTP.
    with tls(host, DOMAIN) as connection:
        assert exchange(connection, request).status == (0 if name else 400)


def test_versions_are_hidden_and_browsers_told(client: httpx.Client) -> None:
    """No version of anything; HTTPS from now on."""
    headers = client.get("/health").headers
    assert headers["server"] == "nginx"
    assert "max-age=" in headers["strict-transport-security"]
    assert headers["x-content-type-options"] == "nosniff"
    assert "/" not in client.get("/no-such-page").headers["server"]


def test_one_request_id_and_address_in_every_log(host: Host, client: httpx.Client) -> None:
    """Nginx's own, whatever the client claims: in its log, in the app's log and in the answer."""
    answer = client.get("/v1/events?limit=1", headers=CLAIMS)
    (request_id,) = answer.headers.get_list("x-request-id")
    assert request_id != CLAIMS["X-Request-ID"]
    (nginx,) = until(lambda: access_log(host, request_id), 5)
    (app,) = until(lambda: app_log(host, request_id), 5)
    assert nginx["client"] == app["client"]
    assert app["client"].startswith("10.")
    for name, value in {"method": "GET", "path": "/v1/events", "status": 200}.items():
        assert app[name] == nginx[name] == value
    assert app_log(host, CLAIMS["X-Request-ID"]) == []


def test_claims_of_a_client_end_at_nginx(host: Host, client: httpx.Client) -> None:
    """Byte for byte what the app would read: Nginx's own word on client, scheme and id, and no claim beside it."""
    with stand_in(host):
        answer = client.get("/any", headers=CLAIMS | {"Connection": "upgrade", "Upgrade": "h2c", "Accept": "*/*"})
    lines = [line.partition(": ") for line in answer.text.split("\r\n")[1:-2]]
    received = httpx.Headers([(name, value) for name, _, value in lines])
    known = {"x-forwarded-proto": "https", "x-request-id": answer.headers["x-request-id"], "host": DOMAIN}
    assert {name: received.get_list(name) for name in known} == {name: [value] for name, value in known.items()}
    (claimed,) = received.get_list("x-forwarded-for")
    assert claimed.startswith("10.")
    assert not {name.lower() for name in CLAIMS} & set(received) - {*known, "x-forwarded-for"}
    assert "upgrade" not in received
    assert not set(CLAIMS.values()) & set(received.values())


@pytest.mark.parametrize(
    "target",
    [
        *("/metrics", "/metrics?x", "/metrics;x", "/metrics/", "/metrics%2f", "/metrics%00", "/METRICS"),
        *("//metrics", "/x/../metrics", "/%6detrics", f"https://{DOMAIN}/metrics"),
    ],
)
def test_metrics_are_not_for_clients(host: Host, target: str) -> None:
    """However the path is spelt and whatever a client says of itself."""
    with tls(host, DOMAIN) as connection:
        local = b"X-Forwarded-For: 127.0.0.1\r\nX-Real-IP: 127.0.0.1\r\n"
        answer = exchange(connection, f"GET {target} HTTP/1.1\r\n".encode() + HOST + local + b"\r\n")
    assert answer.status in (307, 400, 403, 404)
    assert b"http_requests" not in answer.body


def test_metrics_are_there_on_the_host_and_docs_nowhere(client: httpx.Client, host: Host) -> None:
    """On the host the metrics count over all workers."""
    local = "curl --silent --insecure --resolve %s:443:127.0.0.1 https://%s/metrics"
    assert "http_requests_total" in host.check_output(local, DOMAIN, DOMAIN)
    assert {client.get(path).status_code for path in ("/docs", "/redoc", "/openapi.json")} == {404}


@pytest.mark.parametrize(
    ("status", "request_line_and_more"),
    [
        (400, b"nonsense\r\n" + HOST),
        (400, b"GET /%00 HTTP/1.1\r\n" + HOST),
        (400, b"GET / HTTP/1.1\r\n" + HOST + b"X: " + b"x" * 9000 + b"\r\n"),
        (403, b"GET /metrics HTTP/1.1\r\n" + HOST),
        (405, b"TRACE / HTTP/1.1\r\n" + HOST),
        (414, b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\n" + HOST),
    ],
)
def test_nginx_refuses_in_the_form_of_the_app(host: Host, status: int, request_line_and_more: bytes) -> None:
    """Whoever answers, an error is a problem document (RFC 9457), and the log tells what was asked."""
    with tls(host, DOMAIN) as connection:
        answer = exchange(connection, request_line_and_more + b"\r\n")
    assert answer.status == status
    assert f"content-type: {PROBLEM}" in answer.head
    problem = json.loads(answer.body)
    assert problem["status"] == status
    assert problem["title"] != "Error"
    (logged,) = until(lambda: access_log(host, problem["request_id"]), 5)
    method, path = request_line_and_more.decode().split(" ")[:2]
    assert logged["status"] == status
    assert (logged["method"], logged["path"]) == (method, path) or status in (400, 414)


def test_too_large_is_refused_by_whoever_counts(host: Host, client: httpx.Client) -> None:
    """Nginx by the declared length or while the body arrives; the app has a limit of its own."""
    for content in (b" " * (MIB + 1), (b" " * MIB for _ in range(2))):
        answer = client.post("/v1/events", content=content)
        assert (answer.status_code, answer.headers["content-type"]) == (413, PROBLEM)
        assert answer.json()["status"] == 413
        assert answer.json()["request_id"] == answer.headers["x-request-id"]
        (logged,) = until(partial(access_log, host, answer.headers["x-request-id"]), 5)
        assert (logged["method"], logged["path"]) == ("POST", "/v1/events")
    direct = "head --bytes=%s /dev/zero | curl --silent --unix-socket /run/inbox/live.sock --data-binary @- %s"
    by_app = json.loads(host.check_output(direct, str(MIB + 1), "http://localhost/v1/events"))
    assert by_app["status"] == 413


def test_large_answer_arrives_whole(client: httpx.Client) -> None:
    """Bodies beyond every buffer on the way, in both directions."""
    number = post(client, "x" * 500_000).json()["id"]
    assert len(client.get(f"/v1/events/{number}").json()["payload"]["value"]) == 500_000


def test_chunked_request_is_stored(client: httpx.Client) -> None:
    """A body in pieces, its length unknown beforehand."""
    whole = json.dumps({"type": "edge.tested", "payload": {"value": "x" * 50_000}}).encode()
    headers = {"Content-Type": "application/json", "Idempotency-Key": uuid.uuid4().hex}
    pieces = (whole[at : at + 1000] for at in range(0, len(whole), 1000))
    answer = client.post("/v1/events", content=pieces, headers=headers)
    assert answer.request.headers["transfer-encoding"] == "chunked"
    assert answer.json()["payload"]["value"] == "x" * 50_000


def test_slow_body_costs_the_app_nothing(host: Host) -> None:
    """The app sees a request only when all of it has arrived."""
    body = json.dumps({"type": "edge.slow", "payload": {}}).encode()
    head = f"POST /v1/events HTTP/1.1\r\nHost: {DOMAIN}\r\nIdempotency-Key: {uuid.uuid4().hex}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"

    def to_app() -> int:
        """Count the connections between Nginx and the app that are in use."""
        return int(host.check_output("ss --no-header --unix state established src /run/inbox/\\*.sock | wc --lines"))

    until(lambda: to_app() == 0, 10)
    with tls(host, DOMAIN) as connection:
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


@contextlib.contextmanager
def app_down(host: Host) -> Iterator[None]:
    """Stop the live slot with its socket; afterwards do what a boot does."""
    host.check_output("systemctl stop 'inbox@*.socket' 'inbox@*.service'")
    try:
        yield
    finally:
        host.check_output("forgectl boot inbox")


def test_app_that_is_down_is_a_quick_problem(host: Host) -> None:
    """502 at once, in the form of the app's own errors, for streams too; then answers on the same old connection."""
    with tls(host, DOMAIN) as kept:
        connection = http.client.HTTPConnection(DOMAIN)
        connection.sock, connection.auto_open = kept, 0

        def ask(method: str, path: str, **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
            body = json.dumps({"type": "edge.down", "payload": {}}) if method == "POST" else None
            key = {"Idempotency-Key": uuid.uuid4().hex, "Content-Type": "application/json"}
            connection.request(method, path, body, key | headers)
            answer = connection.getresponse()
            return answer, answer.read()

        assert ask("POST", "/v1/events")[0].status == 201
        with app_down(host):
            began = time.monotonic()
            refused = [ask("POST", "/v1/events"), ask("GET", "/v1/events/stream", Accept="text/event-stream")]
            assert time.monotonic() - began < 2
        assert until(lambda: ask("GET", "/ready")[0].status == 200, 30, every=0.5)
        assert ask("POST", "/v1/events")[0].status == 201
    for answer, body in refused:
        assert (answer.status, answer.headers["content-type"]) == (502, PROBLEM)
        assert json.loads(body)["title"] == "Bad Gateway"
    (logged,) = until(lambda: access_log(host, str(answer.headers["x-request-id"])), 5)
    assert (logged["path"], logged["upstream_status"]) == ("/v1/events/stream", "502")
    # The reason is in the journal, which is bounded.
    why = "journalctl --no-pager --output=cat --unit=nginx --since=-1min --grep='live.sock failed'"
    assert "POST /v1/events" in host.check_output(why)


def certificate(host: Host) -> bytes:
    """What Nginx serves now."""
    with tls(host, DOMAIN) as connection:
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
    # The next run loads what there is, for it can't tell what a run that failed has left behind.
    assert "changed=0 " not in playbook("--tags", "nginx").stdout


def test_certificate_is_renewed_in_time_and_served_at_once(host: Host, client: httpx.Client) -> None:
    """Not before its time; then without a restart and without a failed request."""
    before = certificate(host)
    master = host.service("nginx").systemd_properties["MainPID"]
    early = playbook("--tags", "nginx", "--extra-vars", "__nginx_renewal_days=364")
    assert "changed=0 " in early.stdout, early.stdout
    assert certificate(host) == before
    due = playbook("--tags", "nginx", "--extra-vars", "__nginx_renewal_days=366")
    assert due.returncode == 0, due.stdout
    assert until(lambda: certificate(host) != before, 10)
    assert host.service("nginx").systemd_properties["MainPID"] == master
    assert client.get("/ready").status_code == 200


def test_certificate_of_another_key_is_replaced(host: Host) -> None:
    """A run that ended between key and certificate, or a key put there by hand, heals with the next run."""
    before = certificate(host)
    host.check_output("openssl ecparam -name prime256v1 -genkey -noout -out /etc/nginx/tls/inbox.key")
    assert playbook("--tags", "nginx").returncode == 0
    assert until(lambda: certificate(host) != before, 10)
