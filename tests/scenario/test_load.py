"""The load generator gives up what it has opened, whatever the other side does."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import forge_load
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from forge_pages import Page, PageLoad
from pairs import certificate, pem

DOMAIN = "shop.example.com"
LAST_ANSWER = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}"


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate that is its own CA, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    chain, private = tmp_path / "chain.pem", tmp_path / "key.pem"
    chain.write_bytes(certificate(DOMAIN, key, issuer=DOMAIN, signer=key))
    private.write_bytes(pem(key))
    return chain, private


@pytest.fixture
def vanishing(files: tuple[Path, Path]) -> Iterator[tuple[int, Path]]:
    """A server that announces an end after its answer, and is never heard of again: port, and the CA to trust."""
    chain, private = files
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(chain, private)
    with ExitStack() as kept:
        listener = kept.enter_context(socket.create_server(("127.0.0.1", 0)))
        listener.settimeout(30)

        def serve() -> None:
            plain = listener.accept()[0]
            plain.settimeout(30)
            client = kept.enter_context(tls.wrap_socket(plain, server_side=True))
            client.recv(4096)
            client.sendall(LAST_ANSWER)

        serving = threading.Thread(target=serve)
        serving.start()
        yield listener.getsockname()[1], chain
        serving.join()


def test_connection_without_a_goodbye_is_ended_with_the_load(vanishing: tuple[int, Path]) -> None:
    """Left open, it would fail whatever test runs when Python collects it."""
    port, trust = vanishing

    async def work() -> set[forge_load._Connection]:
        load = forge_load.Load("127.0.0.1", DOMAIN, trust, rate=1, port=port)
        async with asyncio.timeout(30):
            connection = await load.connect(forge_load._Client(load, "1.1"))
            connection.send(forge_load._Request(0, "page", 0.0, None))
            # The answer has come, and TLS waits for the server's goodbye.
            while not connection.transport.is_closing():
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)
            assert load.connections == {connection}
            await load._cancel()
            await asyncio.sleep(0)
        return load.connections

    assert asyncio.run(work()) == set()


PAGES = (
    Page("/one", b"first", headers=(("authorization", "Bearer x"),)),
    Page("/two?x=1", b"second"),
    Page("/three", b"", status=404),
)


@pytest.mark.parametrize(
    ("number", "status", "body", "outcome"),
    [
        (0, 200, b"the first page", "ok"),
        (1, 200, b"the first page", "wrong"),
        (4, 200, b"the second page", "ok"),
        (0, 502, b"the first page", "status"),
        (2, 404, b"anything", "ok"),
        (2, 200, b"anything", "status"),
    ],
)
def test_pages_are_judged(files: tuple[Path, Path], number: int, status: int, body: bytes, outcome: str) -> None:
    """Each page in turn; another content and another status each count as failures."""
    request = forge_load._Request(number, "get", 0.0, None)
    request.status, request.body = status, body
    assert PageLoad("127.0.0.1", DOMAIN, files[0], PAGES, rate=1)._judge(request) == outcome


def test_a_page_says_what_it_holds() -> None:
    """Or no answer with the usual status would be a wrong one."""
    with pytest.raises(ValueError, match="/any; found none"):
        Page("/any", b"")


def test_pages_are_asked_for_in_turn(files: tuple[Path, Path]) -> None:
    """With the headers of each beside those of all."""
    load = PageLoad("127.0.0.1", DOMAIN, files[0], PAGES, rate=1)
    asked = [load.message(forge_load._Request(number, "get", 0.0, None)) for number in range(4)]
    assert [target for _, target, _, _ in asked] == ["/one", "/two?x=1", "/three", "/one"]
    assert [("authorization", "Bearer x") in headers for _, _, headers, _ in asked] == [True, False, False, True]
