"""Headers, methods, body sizes, compression, and what a run that fails leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from forge_scenario import playbook
from forge_wire import exchange, stand_in, tls
from testinfra.host import Host

DOMAIN = "inbox.example.com"
HOST = f"Host: {DOMAIN}\r\nConnection: close\r\n".encode()
PROBLEM = "application/problem+json"
KIB = 1024
METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
# What every answer has, once.
HEADERS = {
    "strict-transport-security": "max-age=63072000",
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


def fields(head: str) -> dict[str, list[str]]:
    """The header of a raw answer."""
    found: dict[str, list[str]] = {}
    for line in head.splitlines()[1:]:
        name, _, value = line.partition(": ")
        found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize(
    ("request_line_and_more", "status"),
    [
        (b"GET /health HTTP/1.1\r\n", 200),
        (b"GET /no-such-page HTTP/1.1\r\n", 404),
        (b"POST /v1/events HTTP/1.1\r\nContent-Length: 2\r\n", 422),
        (b"GET /assets/app.1a2b3c4d.js HTTP/1.1\r\n", 200),
        (b"GET /assets/none.js HTTP/1.1\r\n", 404),
        (b"GET /metrics HTTP/1.1\r\n", 403),
        (b"TRACE / HTTP/1.1\r\n", 405),
        (b"nonsense\r\n", 400),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 9000 + b"\r\n", 400),
        (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\n", 414),
        (b"POST /v1/events HTTP/1.1\r\nContent-Length: 9999999\r\n", 413),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n", 501),
        (b"GET / HTTP/3.0\r\n", 505),
    ],
)
def test_every_answer_has_the_headers(host: Host, request_line_and_more: bytes, status: int) -> None:
    """The app's, those of files, and what Nginx refuses, which is a problem document."""
    body = b"{}" if b"Content-Length: 2" in request_line_and_more else b""
    with tls(host, DOMAIN) as connection:
        answer = exchange(connection, request_line_and_more + HOST + b"\r\n" + body)
    assert answer.status == status
    found = fields(answer.head)
    expected = {name: [value.lower()] for name, value in HEADERS.items()}
    assert {name: found.get(name) for name in expected} == expected
    if status >= 400:
        assert found["content-type"] == [PROBLEM]
        assert json.loads(answer.body)["status"] == status
        assert json.loads(answer.body)["title"] != "Error"


def test_headers_of_the_app_win(host: Host, client: httpx.Client) -> None:
    """What it says itself is not said a second time, nor otherwise."""
    own = {
        **dict.fromkeys(HEADERS, "own"),
        "strict-transport-security": "max-age=5",
        "content-security-policy": "default-src 'self'",
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in own.items())
    with stand_in(host, f"HTTP/1.1 200 OK\r\n{head}Content-Length: 2\r\nConnection: close\r\n\r\nok"):
        answer = client.get("/any")
    assert {name: answer.headers.get_list(name) for name in own} == {name: [value] for name, value in own.items()}


@pytest.mark.parametrize("method", ["TRACE", "CONNECT", "FOO", "get", "PROPFIND", "TRACK"])
def test_unknown_methods_end_at_nginx(
    host: Host, method: str, access_log: Callable[[str], list[dict[str, Any]]]
) -> None:
    """With what it would take; the app never hears of them."""
    target = f"{DOMAIN}:443" if method == "CONNECT" else "/health"
    with tls(host, DOMAIN) as connection:
        answer = exchange(connection, f"{method} {target} HTTP/1.1\r\n".encode() + HOST + b"\r\n")
    # Nginx knows no method with small letters as one.
    assert answer.status in ((400, 405) if method in ("get", "CONNECT") else (405,))
    if answer.status == 405:
        assert fields(answer.head)["allow"] == [METHODS.lower()]
    (logged,) = access_log(json.loads(answer.body)["request_id"])
    assert logged["upstream_status"] == ""


def test_known_methods_reach_the_app(client: httpx.Client, access_log: Callable[[str], list[dict[str, Any]]]) -> None:
    """Which has its own word on them."""
    for method in METHODS.split(", "):
        answer = client.request(method, "/health")
        (logged,) = access_log(answer.headers["x-request-id"])
        assert logged["upstream_status"] == str(answer.status_code)


def test_below_the_metrics_is_nothing_for_clients(host: Host, client: httpx.Client) -> None:
    """Where a mounted application has them."""
    for path in ("/metrics", "/metrics/", "/metrics/x", "/metrics//x", "/x/../metrics/"):
        assert client.get(path).status_code == 403, path
    local = "curl --silent --insecure --output /dev/null --write-out '%%{http_code}' --resolve %s:443:127.0.0.1 %s"
    assert host.check_output(local, DOMAIN, f"https://{DOMAIN}/metrics") == "200"
    assert host.check_output(local, DOMAIN, f"https://{DOMAIN}/metrics/") != "403"


@pytest.mark.parametrize("leaving", [False, True])
@pytest.mark.parametrize(
    ("path", "kib", "refused"),
    [
        *(("/v1/small", 1, False), ("/v1/small", 2, True), ("/v1/small/x", 2, True), ("/v1/smaller", 2, False)),
        *(("/v1/events", 1500, False), ("/v1/events", 2100, True), ("/v1/events/1", 2100, True)),
        *(("/v1/other", 2, False), ("/v1/other", 1500, True), ("/v1/eventsx", 1500, True)),
    ],
)
def test_bodies_are_as_large_as_their_path_allows(
    host: Host, client: httpx.Client, path: str, kib: int, refused: bool, leaving: bool
) -> None:
    """By their length or as they come, with a cookie or without, and while Nginx is about to be reloaded."""
    body = b" " * (kib * KIB)
    if leaving:
        host.check_output("touch /run/forge-nginx-leaving")
    try:
        answers = [
            client.post(path, content=content, headers=headers)
            for headers in ({}, {"Cookie": "a=b"})
            for content in (body, iter([body]))
        ]
    finally:
        host.check_output("rm --force /run/forge-nginx-leaving")
    # The app reads it and refuses it as an event, or has no such path; it redirects nobody.
    due = 413 if refused else 422 if path == "/v1/events" else 404
    assert [answer.status_code for answer in answers] == [due] * 4
    assert {answer.headers["content-type"] for answer in answers} == {PROBLEM}


def test_answers_are_compressed_unless_they_could_leak(client: httpx.Client) -> None:
    """Not what a browser's credentials come with, whoever made it ask."""
    for number in range(30):
        event = {"type": "edge.tested", "payload": {"value": "x" * 100}}
        client.post("/v1/events", json=event, headers={"Idempotency-Key": f"compressed-{number}"})

    def ask(**headers: str) -> httpx.Response:
        return client.get("/v1/events?limit=30", headers={"Accept-Encoding": "gzip"} | headers)

    for plain in (ask(), ask(Authorization="Bearer x")):
        assert plain.headers["content-encoding"] == "gzip"
        assert "accept-encoding" in plain.headers["vary"].lower()
        assert len(plain.json()["events"]) == 30
    for ambient in (ask(Cookie="a=b"), ask(Authorization="Basic eDp4")):
        assert "content-encoding" not in ambient.headers
        assert len(ambient.json()["events"]) == 30
    assert client.get("/v1/events?limit=30", headers={"Accept-Encoding": "br"}).headers["content-encoding"] == "br"


def test_streams_are_not_compressed(client: httpx.Client) -> None:
    """They would be held back."""
    headers = {"Accept": "text/event-stream", "Accept-Encoding": "gzip, br"}
    with client.stream("GET", "/v1/events/stream", headers=headers, timeout=20) as stream:
        assert "content-encoding" not in stream.headers
        assert any(line for line in stream.iter_lines())


def test_a_site_that_fails_leaves_nginx_as_it_is(host: Host, client: httpx.Client) -> None:
    """Not even what was sound is loaded; and the next run loads what is on the disk by then, whatever it changed."""

    def run(**variables: object) -> str:
        done = playbook("--tags", "nginx", "--extra-vars", json.dumps(variables))
        assert done.returncode == (2 if "__nginx_leaving" in variables else 0), done.stdout
        return done.stdout + done.stderr

    def told() -> str:
        return str(client.get("/health").headers["strict-transport-security"])

    workers = "pgrep --parent $(cat /run/nginx.pid)"
    before = host.check_output(workers)
    # Three words in the place of one.
    said = run(nginx_hsts_seconds=5, __nginx_leaving="/run/no such file")
    assert "invalid condition" in " ".join(said.split())
    assert host.check_output(workers) == before
    assert told() == HEADERS["strict-transport-security"]
    # nginx.conf is new already: this run does not change it, and has to load it all the same.
    assert "changed=0" not in run(nginx_hsts_seconds=5)
    assert told() == "max-age=5"
    run()
    assert told() == HEADERS["strict-transport-security"]
