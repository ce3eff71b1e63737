"""Talking to the edge byte by byte, where a well-behaved HTTP client would not send what a test has to."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from forge_scenario import until
from testinfra.host import Host

POOL_EXIT = 5
"""Seconds in which Nginx may still use a connection to the slot that had the traffic before."""
# Listens where a slot does. Answers each request with the same bytes, or with the head of the request.
STAND_IN = """
import os, shutil, socket, sys
path = "/run/inbox/standin.sock"
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(path)
    shutil.chown(path, group="www-data")
    os.chmod(path, 0o660)
    listener.listen()
    os.symlink("standin.sock", "/run/inbox/.standin")
    os.rename("/run/inbox/.standin", "/run/inbox/live.sock")
    while True:
        with listener.accept()[0] as connection:
            head = b""
            while b"\\r\\n\\r\\n" not in head:
                head += connection.recv(65536)
            echo = b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n%s" % (len(head), head)
            connection.sendall(sys.argv[1].encode() or echo)
"""


class Answer(NamedTuple):
    """What came back; `status` 0 means that the connection was closed without an answer."""

    status: int
    head: str
    body: bytes


def address(host: Host) -> str:
    """The host's address on the scenario's network."""
    return str(host.ansible.get_variables()["ansible_host"])


def trust() -> ssl.SSLContext:
    """A context that trusts the scenario's CA alone."""
    return ssl.create_default_context(cafile=Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "tls" / "ca.pem")


@contextlib.contextmanager
def tls(host: Host, name: str | None, context: ssl.SSLContext | None = None) -> Iterator[ssl.SSLSocket]:
    """A TLS connection to Nginx that asks for a name."""
    raw = socket.create_connection((address(host), 443), timeout=10)
    with (context or trust()).wrap_socket(raw, server_hostname=name) as connection:
        yield connection


def exchange(connection: socket.socket, request: bytes) -> Answer:
    """Send one request that asks for the connection to be closed, and read all of the answer."""
    answer = b""
    # Nginx closes with a reset where it gives no answer.
    with contextlib.suppress(ConnectionResetError):
        connection.sendall(request)
        while more := connection.recv(65536):
            answer += more
    head, _, body = answer.partition(b"\r\n\r\n")
    return Answer(int(head.split(b" ", 2)[1]) if head else 0, head.decode("latin-1").lower(), body)


@contextlib.contextmanager
def stand_in(host: Host, answer: str = "") -> Iterator[None]:
    """Put something in the app's place: it gives one answer, or shows what Nginx sends. Then do what a boot does."""
    host.check_output("systemd-run --quiet --unit=forge-standin python3 -c %s %s", STAND_IN, answer)
    try:
        until(lambda: host.check_output("readlink /run/inbox/live.sock") == "standin.sock", 10)
        time.sleep(POOL_EXIT)
        yield
    finally:
        host.check_output("systemctl stop forge-standin; forgectl boot inbox; rm --force /run/inbox/standin.sock")
