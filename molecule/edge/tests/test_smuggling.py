"""Two servers that disagree about where a request ends would let one client speak for another. These don't."""

from __future__ import annotations

import re
import socket
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from forge_wire import tls, trust
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import ConnectionTerminated, ResponseReceived, StreamReset
from testinfra.host import Host

DOMAIN = "inbox.example.com"
HOST = f"Host: {DOMAIN}\r\n".encode()
MARK = uuid.uuid4().hex
"""In the path of each request that must not reach the app."""
HIDDEN = f"GET /{MARK} HTTP/1.1\r\nHost: {DOMAIN}\r\n\r\n".encode()
CHUNKED = b"0\r\n\r\n" + HIDDEN
LENGTH = b"Content-Length: %d\r\n"
ALL = len(CHUNKED)
PATIENCE = 1.5
"""Seconds without a further answer after which there comes none: Nginx keeps connections for longer."""

AppLog = Callable[[str], list[dict[str, Any]]]


def post(header: bytes, body: bytes) -> bytes:
    """A request that a body follows."""
    return b"POST /visible HTTP/1.1\r\n" + HOST + header + b"\r\n" + body


REFUSED = {
    "length and chunks": post(LENGTH % 4 + b"Transfer-Encoding: chunked\r\n", CHUNKED),
    "chunks and length": post(b"Transfer-Encoding: chunked\r\n" + LENGTH % ALL, CHUNKED),
    "two lengths": post(LENGTH % 0 + LENGTH % len(HIDDEN), HIDDEN),
    "the same length twice": post(LENGTH % 0 * 2, HIDDEN),
    "list of lengths": post(b"Content-Length: 0, 0\r\n", HIDDEN),
    "length with a sign": post(b"Content-Length: +0\r\n", HIDDEN),
    "negative length": post(b"Content-Length: -1\r\n", HIDDEN),
    "hexadecimal length": post(b"Content-Length: 0x0\r\n", HIDDEN),
    "endless length": post(b"Content-Length: 99999999999999999999999999\r\n", HIDDEN),
    "unknown coding": post(b"Transfer-Encoding: xchunked\r\n" + LENGTH % len(HIDDEN), HIDDEN),
    "two codings": post(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n", CHUNKED),
    "list of codings": post(b"Transfer-Encoding: gzip, chunked\r\n", CHUNKED),
    "space before the colon": post(b"Transfer-Encoding : chunked\r\n" + LENGTH % ALL, CHUNKED),
    "tab before the coding": post(b"Transfer-Encoding:\tchunked\r\n" + LENGTH % ALL, CHUNKED),
    "vertical tab before the coding": post(b"Transfer-Encoding: \x0bchunked\r\n" + LENGTH % ALL, CHUNKED),
    "folded coding": post(b"Transfer-Encoding:\r\n chunked\r\n" + LENGTH % ALL, CHUNKED),
    "coding behind a bare line feed": post(LENGTH % ALL + b"X: a\nTransfer-Encoding: chunked\r\n", CHUNKED),
    "coding behind a bare carriage return": post(LENGTH % ALL + b"X: a\rTransfer-Encoding: chunked\r\n", CHUNKED),
    "chunks in HTTP/1.0": CHUNKED.join(
        [b"POST /visible HTTP/1.0\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n", b""]
    ),
    "negative chunk": post(b"Transfer-Encoding: chunked\r\n", b"-1\r\n\r\n" + HIDDEN),
    "endless chunk": post(b"Transfer-Encoding: chunked\r\n", b"fffffffffffffffff\r\n\r\n" + HIDDEN),
    "NUL in a field": b"GET /visible HTTP/1.1\r\n" + HOST + b"X: a\0b\r\n\r\n" + HIDDEN,
    "space in a name": b"GET /visible HTTP/1.1\r\n" + HOST + b"X Y: a\r\n\r\n" + HIDDEN,
    "two hosts": b"GET /visible HTTP/1.1\r\n" + HOST + b"Host: other.example.com\r\n\r\n" + HIDDEN,
    "no host": b"GET /visible HTTP/1.1\r\n\r\n" + HIDDEN,
    "space in the path": f"GET /visible /{MARK} HTTP/1.1\r\n".encode() + HOST + b"\r\n",
    "another host in the request line": f"GET https://other.example.com/{MARK} HTTP/1.1\r\n".encode() + HOST + b"\r\n",
    "HTTP/0.9": f"GET /{MARK}\r\n".encode(),
    "HTTP/2 without its preface": f"GET /{MARK} HTTP/2.0\r\n".encode() + HOST + b"\r\n",
}
# Each is one request, whose body only looks like another.
ONE = {
    "body of a GET": b"GET /visible HTTP/1.1\r\n" + HOST + LENGTH % len(HIDDEN) + b"\r\n" + HIDDEN,
    "body": post(LENGTH % len(HIDDEN), HIDDEN),
    "chunk": post(b"Transfer-Encoding: chunked\r\n", b"%x\r\n%s\r\n0\r\n\r\n" % (len(HIDDEN), HIDDEN)),
    "extension of a chunk": post(
        b"Transfer-Encoding: chunked\r\n", b"%x;x=y\r\n%s\r\n0\r\n\r\n" % (len(HIDDEN), HIDDEN)
    ),
    "trailer": post(b"Transfer-Encoding: chunked\r\n", b"0\r\nX-Forwarded-For: 192.0.2.1\r\nContent-Length: 9\r\n\r\n"),
    "connection that names fields": b"GET /visible HTTP/1.1\r\n"
    + HOST
    + b"Connection: close, Host, X-Forwarded-For, X-Forwarded-Proto, Content-Length\r\n\r\n",
}


def statuses(host: Host, request: bytes) -> list[int]:
    """Send some bytes; the statuses of all answers."""
    answer = b""
    with tls(host, DOMAIN) as connection:
        connection.settimeout(PATIENCE)
        try:
            connection.sendall(request)
            while more := connection.recv(65536):
                answer += more
        except (TimeoutError, ConnectionResetError):
            pass
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


def test_the_app_would_tell(host: Host, app_log: AppLog) -> None:
    """A request that does reach it is in its log, behind another on the same connection too."""
    mark = uuid.uuid4().hex
    second = HIDDEN.replace(MARK.encode(), mark.encode())
    assert statuses(host, b"GET /visible HTTP/1.1\r\n" + HOST + b"\r\n" + second) == [404, 404]
    assert [entry["path"] for entry in app_log(mark)] == [f"/{mark}"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_ambiguous_is_refused(host: Host, name: str) -> None:
    """With an error of Nginx's, or with nothing; and the connection ends with it."""
    found = statuses(host, REFUSED[name])
    assert len(found) <= 1
    assert set(found) <= {400, 413, 414, 501, 505}


@pytest.mark.parametrize("name", ONE)
def test_what_looks_like_two_requests_is_one(host: Host, name: str) -> None:
    """One request, one answer, which the app gives: there is no such page."""
    assert statuses(host, ONE[name]) == [404]


H2: dict[str, list[tuple[str, str]]] = {
    "coding": [("transfer-encoding", "chunked")],
    "connection": [("connection", "transfer-encoding")],
    "request in a value": [("x", f"a\r\n\r\nGET /{MARK} HTTP/1.1\r\nHost: {DOMAIN}")],
    "line feed in a value": [("x", "a\nTransfer-Encoding: chunked")],
    "colon in a name": [("transfer-encoding: chunked\r\nx", "a")],
    "space in a name": [("transfer-encoding ", "chunked")],
    "large letters": [("Transfer-Encoding", "chunked")],
    "length that is too short": [("content-length", "0")],
    "length that is too long": [("content-length", "9999")],
    "two lengths": [("content-length", str(ALL)), ("content-length", "0")],
    "another host": [("host", "other.example.com")],
    "request in the path": [(":path", f"/visible HTTP/1.1\r\nHost: {DOMAIN}\r\n\r\nGET /{MARK}")],
    "request in the method": [(":method", f"GET /{MARK} HTTP/1.1\r\n\r\nPOST")],
    "another authority": [(":authority", "other.example.com")],
}


@pytest.mark.parametrize("name", H2)
def test_http2_carries_nothing_that_http1_would_read(host: Host, name: str) -> None:
    """Fields that HTTP/2 forbids, and line ends in them, never become those of a request to the app."""
    pseudo = {":method": "POST", ":scheme": "https", ":authority": DOMAIN, ":path": "/visible"}
    sent = H2[name]
    pseudo |= {key: value for key, value in sent if key.startswith(":")}
    headers = [*pseudo.items(), *(each for each in sent if not each[0].startswith(":"))]
    context = trust()
    context.set_alpn_protocols(["h2"])
    own = H2Configuration(validate_outbound_headers=False, normalize_outbound_headers=False)
    http = H2Connection(own)
    answers: list[int] = []
    with tls(host, DOMAIN, context) as connection:
        connection.settimeout(PATIENCE)
        http.initiate_connection()
        http.send_headers(1, headers)
        http.send_data(1, CHUNKED, end_stream=True)
        connection.sendall(http.data_to_send())
        try:
            while data := connection.recv(65536):
                for event in http.receive_data(data):
                    if isinstance(event, ResponseReceived):
                        answers += [int(value) for key, value in event.headers if key == b":status"]
                    if isinstance(event, (StreamReset, ConnectionTerminated)):
                        answers.append(0)
                if answers:
                    break
                connection.sendall(http.data_to_send())
        except (TimeoutError, ConnectionResetError):
            pass
    # The app's own answer is there for a field that Nginx knows how to leave out, as the second `host`.
    assert set(answers) <= {0, 400, 404, 405, 421}, answers


def test_no_hidden_request_arrived(app_log: AppLog) -> None:
    """In all of the above."""
    assert app_log(MARK) == []


def test_plain_http_knows_no_app(host: Host, app_log: AppLog) -> None:
    """Nothing on port 80 gets further than the redirect, whatever it is."""
    mark = uuid.uuid4().hex
    for request in (post(LENGTH % 4 + b"Transfer-Encoding: chunked\r\n", CHUNKED), HIDDEN, b"PRI * HTTP/2.0\r\n\r\n"):
        with socket.create_connection((host.ansible.get_variables()["ansible_host"], 80), timeout=PATIENCE) as plain:
            plain.sendall(request.replace(MARK.encode(), mark.encode()))
            try:
                answer = plain.recv(4096)
            except (TimeoutError, ConnectionResetError):
                answer = b""
        assert answer == b"" or answer.split(b" ", 2)[1] in (b"308", b"400", b"405")
    assert app_log(mark) == []
