"""Stopping with clients connected: streams are told to come back, and the lifespan ends in order."""

import asyncio
import threading
import time

import asyncpg
import httpx
import pytest
from fastapi import FastAPI
from websockets.exceptions import ConnectionClosed

from cluster import Cluster
from conftest import environ, running
from server import Server


async def until(connection: asyncpg.Connection, condition: str) -> None:
    """Wait until a query answers true."""
    async with asyncio.timeout(10):
        while not await connection.fetchval(condition):  # noqa: ASYNC110 - the database sends no event
            await asyncio.sleep(0.05)


@pytest.mark.anyio
async def test_streams_end_requests_finish_and_the_lifespan_ends(cluster: Cluster, database: str) -> None:
    """SIGTERM with an SSE client, a WebSocket client and a POST in flight."""
    async with cluster.connect(database) as blocker:
        answers: list[httpx.Response] = []
        with Server(environ(cluster, database)) as server, server.sse() as sse, server.websocket() as socket:
            sse.next()
            socket.recv(10)
            server.post("k1", 1)
            assert sse.payload() == 1
            transaction = blocker.transaction()
            await transaction.start()
            await blocker.execute("LOCK TABLE event IN SHARE MODE")  # holds up writers alone
            writing = threading.Thread(target=lambda: answers.append(server.post("k2", 2)))
            writing.start()
            waiting = (
                "SELECT count(*) = 1 FROM pg_stat_activity WHERE usename = 'inbox_app' AND wait_event_type = 'Lock'"
            )
            await until(blocker, waiting)

            started = time.monotonic()
            server.signal()
            # A clean end: a stream that was cut would raise.
            assert [message.keys() for message in sse] == [{"retry"}]
            socket.recv(10)
            with pytest.raises(ConnectionClosed) as caught:
                socket.recv(10)
            assert caught.value.rcvd is not None
            assert caught.value.rcvd.code == 1012
            assert time.monotonic() - started < 5  # of the 20 s that Gunicorn would wait
            assert not answers

            await transaction.rollback()
            assert server.wait() == 0
            assert time.monotonic() - started < 10
            writing.join()
            assert [answer.status_code for answer in answers] == [201]
            assert server.logged(message="worker stopped")
            assert "Traceback" not in server.output()
        await until(blocker, "SELECT count(*) = 0 FROM pg_stat_activity WHERE usename = 'inbox_app'")


@pytest.mark.anyio
async def test_a_server_may_announce_the_end_through_the_lifespan_state(app: FastAPI) -> None:
    lifespan = running(app)
    async with lifespan as client:
        assert (await client.get("/ready")).status_code == 200
        lifespan.state["draining"].set()
        ready = await client.get("/ready")
        assert (ready.status_code, ready.json()["reason"]) == (503, "draining")
        assert (await client.get("/health")).status_code == 200
        stream = await client.get("/v1/events/stream")
        assert stream.status_code == 200
        assert "retry: " in stream.text
