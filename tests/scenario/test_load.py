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
from pairs import certificate, pem

DOMAIN = "shop.example.com"
LAST_ANSWER = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}"


@pytest.fixture
def vanishing(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """A server that announces an end after its answer, and is never heard of again: port, and the CA to trust."""
    key = ec.generate_private_key(ec.SECP256R1())
    chain, private = tmp_path / "chain.pem", tmp_path / "key.pem"
    chain.write_bytes(certificate(DOMAIN, key, issuer=DOMAIN, signer=key))
    private.write_bytes(pem(key))
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
