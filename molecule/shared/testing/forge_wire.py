"""Talking to the edge byte by byte, where a well-behaved HTTP client would not send what a test has to."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from testinfra.host import Host


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
