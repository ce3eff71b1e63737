"""Following events with real clients: nothing is missed, nothing comes twice, whatever happens in between."""

import json
import threading
import time
from collections.abc import Iterator

import asyncpg
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from cluster import Cluster
from conftest import environ
from inbox.feed import POLL_S
from server import Server, eventually


@pytest.fixture(scope="module")
def server(cluster: Cluster, migrated: str) -> Iterator[Server]:
    with Server(environ(cluster, migrated), workers=2) as started:
        yield started


@pytest.fixture(autouse=True)
def one_event(cluster: Cluster, database: str) -> None:
    """Leave one event: of an empty table the beginning is the end, and a worker may still keep what was truncated."""
    cluster.admin(
        "INSERT INTO event (idempotency_key, fingerprint, type, payload, size) VALUES ('first', '', 't', '0', 1)",
        database=database,
    )


def end(server: Server) -> str:
    """Return the cursor after everything that is stored."""
    cursor: str = server.client.get("/v1/events").json()["cursor"]
    return cursor


def test_sse_and_websocket_get_what_any_worker_stores(server: Server) -> None:
    with server.sse() as sse, server.websocket() as socket:
        assert sse.response.headers["content-type"].startswith("text/event-stream")
        assert sse.response.headers["x-accel-buffering"] == "no"
        first = sse.next()
        assert first.keys() == {"id", "retry"}
        assert json.loads(socket.recv(10))["event"] is None
        for number in range(20):
            assert server.post(f"k{number}", number).status_code == 201
        assert [sse.payload() for _ in range(20)] == list(range(20))
        assert [json.loads(socket.recv(10))["event"]["payload"] for _ in range(20)] == list(range(20))


def test_notifications_wake_streams_long_before_the_next_poll(server: Server) -> None:
    with server.sse() as sse, server.websocket() as socket:
        sse.next()
        socket.recv(10)
        started = time.monotonic()
        for number in range(20):
            with server.another_client() as other:
                assert other.post(
                    "/v1/events", json={"type": "t", "payload": number}, headers={"Idempotency-Key": f"k{number}"}
                ).is_success
            assert sse.payload() == number
            assert json.loads(socket.recv(10))["event"]["payload"] == number
        assert time.monotonic() - started < 20 * POLL_S / 4


def test_resuming_continues_where_the_client_was(server: Server) -> None:
    start = end(server)
    server.post("k0", 0)
    with server.sse(start) as sse, server.websocket(start) as socket:
        by_sse = sse.next()
        by_socket = json.loads(socket.recv(10))
        assert json.loads(by_sse["data"]) == by_socket["event"]
        assert by_sse["id"] == by_socket["cursor"]
    for number in (1, 2):
        server.post(f"k{number}", number)
    # Last-Event-ID is newer than the cursor in the URL that a browser repeats.
    with server.sse(start, last_event_id=by_sse["id"]) as sse, server.websocket(by_socket["cursor"]) as socket:
        assert [sse.payload(), sse.payload()] == [1, 2]
        assert [json.loads(socket.recv(10))["event"]["payload"] for _ in "12"] == [1, 2]
        server.post("k3", 3)
        assert sse.payload() == 3
        assert json.loads(socket.recv(10))["event"]["payload"] == 3


def test_a_stream_that_starts_now_can_resume_before_its_first_event(server: Server) -> None:
    with server.sse() as sse:
        place = sse.next()["id"]
    server.post("k1", 1)
    with server.sse(last_event_id=place) as sse:
        assert sse.payload() == 1


def test_a_stream_catches_up_over_many_pages(server: Server, cluster: Cluster, database: str) -> None:
    start = end(server)
    cluster.admin(
        "INSERT INTO event (idempotency_key, fingerprint, type, payload, size) "
        "SELECT n::text, '', 't', to_jsonb(n), 4 FROM generate_series(1, 1234) AS n",
        database=database,
    )
    with server.sse(start) as sse:
        assert [sse.payload() for _ in range(1234)] == list(range(1, 1235))


@pytest.mark.anyio
async def test_a_late_commit_reaches_streams(server: Server, cluster: Cluster, database: str) -> None:
    async with cluster.connect(database) as late:
        await a_late_commit(server, late)


async def a_late_commit(server: Server, late: asyncpg.Connection) -> None:
    with server.sse() as sse, server.websocket() as socket:
        sse.next()
        socket.recv(10)
        server.post("before", "before")
        assert sse.payload() == "before"
        transaction = late.transaction()
        await transaction.start()
        await late.execute(
            "INSERT INTO event (idempotency_key, fingerprint, type, payload, size) "
            "VALUES ('late', '', 't', '\"late\"', 6)"
        )
        server.post("early", "early")
        assert json.loads(socket.recv(10))["event"]["payload"] == "before"
        with pytest.raises(TimeoutError):
            socket.recv(1.5)  # longer than POLL_S: nobody shows the later event first
        await transaction.commit()
        assert [sse.payload(), sse.payload()] == ["late", "early"]
        assert [json.loads(socket.recv(10))["event"]["payload"] for _ in "12"] == ["late", "early"]


def test_streams_survive_the_loss_of_the_listening_connections(server: Server, cluster: Cluster) -> None:
    with server.sse() as sse:
        sse.next()
        server.post("k1", 1)
        assert sse.payload() == 1
        killed = cluster.admin(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE query LIKE '%inbox_event%' "
            "AND usename = 'inbox_app' OR application_name = 'inbox'"
        )
        assert killed >= 2
        server.post("k2", 2)
        assert sse.payload() == 2


def test_readers_and_writers_at_once_lose_and_double_nothing(server: Server) -> None:
    def write(writer: int) -> None:
        for number in range(40):
            assert server.post(f"{writer}-{number}", f"{writer}-{number}").status_code == 201

    start = end(server)
    writers = [threading.Thread(target=write, args=(writer,)) for writer in range(5)]
    with server.sse(start) as sse, server.websocket(start) as socket:
        for writer in writers:
            writer.start()
        by_sse = [sse.payload() for _ in range(200)]
        by_socket = [json.loads(socket.recv(10))["event"]["payload"] for _ in range(200)]
        for writer in writers:
            writer.join()
    expected = sorted(f"{writer}-{number}" for writer in range(5) for number in range(40))
    assert sorted(by_sse) == expected
    assert by_socket == by_sse


def test_a_bad_cursor_is_refused_before_the_upgrade(server: Server) -> None:
    with pytest.raises(InvalidStatus) as caught, server.websocket("made-up"):
        pass
    assert caught.value.response.status_code == 400
    assert caught.value.response.headers["Content-Type"] == "application/problem+json"


def test_a_websocket_takes_no_messages(server: Server) -> None:
    with server.websocket() as socket:
        socket.recv(10)
        socket.send("hello")
        with pytest.raises(ConnectionClosed) as caught:
            socket.recv(10)
    assert caught.value.rcvd is not None
    assert caught.value.rcvd.code == 1008


def test_closed_streams_are_counted_out(server: Server) -> None:
    def open_streams() -> dict[str, float]:
        text = server.client.get("/metrics").text
        lines = [line.split() for line in text.splitlines() if line.startswith("inbox_open_streams{")]
        return {name.split('"')[1]: float(value) for name, value in lines}

    with server.sse() as sse, server.websocket() as socket:
        sse.next()
        socket.recv(10)
        assert open_streams() == {"sse": 1, "websocket": 1}
    eventually(lambda: open_streams() == {"sse": 0, "websocket": 0})
