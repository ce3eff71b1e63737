"""The right database or none: the environment marker, outages at start and in mid-service."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack

import pytest
from sqlalchemy import text

from cluster import Cluster
from conftest import environ, migrate, provision, running
from inbox.application import create_app
from inbox.database import EnvironmentMismatch, check_marker
from inbox.settings import Environment, Settings
from server import Server, eventually


@pytest.mark.parametrize(
    ("expected", "found", "fits"),
    [
        ("production", "production", True),
        ("staging", "staging", True),
        ("development", "development", True),
        ("development", None, True),
        ("development", "", True),
        ("production", "staging", False),
        ("development", "production", False),
        ("production", None, False),
        ("staging", "", False),
    ],
)
def test_the_marker_decides(expected: Environment, found: str | None, fits: bool) -> None:
    if fits:
        check_marker(expected, found)
    else:
        with pytest.raises(EnvironmentMismatch, match=f"FORGE_ENVIRONMENT is '{expected}'"):
            check_marker(expected, found)


def test_another_environments_database_stops_the_server(cluster: Cluster) -> None:
    provision(cluster, "staging", "staging")
    with Server(environ(cluster, "staging"), boots=False) as server:
        assert server.wait() == 3
        [line] = server.logged(level="ERROR")
        assert "FORGE_ENVIRONMENT is 'production' and the database is marked 'staging'" in line["message"]
        assert "worker started" not in server.output()


@pytest.fixture
def unmarked(cluster: Cluster) -> str:
    provision(cluster, "unmarked", marker=None)
    return environ(cluster, "unmarked")["FORGE_DATABASE_URL"]


@pytest.mark.anyio
async def test_a_database_that_nobody_provisioned_is_refused(
    unmarked: str, make_settings: Callable[..., Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    lifespan = running(create_app(make_settings(FORGE_DATABASE_URL=unmarked)))
    with pytest.raises(EnvironmentMismatch):
        await lifespan.__aenter__()
    expected = "Provisioning writes it: ALTER DATABASE ... SET forge.environment = 'production'"
    assert expected in capsys.readouterr().out


@pytest.fixture
def unmigrated(cluster: Cluster) -> str:
    provision(cluster, "unmigrated")
    return environ(cluster, "unmigrated")["FORGE_DATABASE_URL"]


@pytest.mark.anyio
async def test_a_schema_that_was_not_migrated_is_not_ready(
    unmigrated: str, make_settings: Callable[..., Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    async with running(create_app(make_settings(FORGE_DATABASE_URL=unmigrated))) as client:
        assert (await client.get("/ready")).status_code == 503
    assert "run the migrations: python -m alembic upgrade head" in capsys.readouterr().out


def test_a_worker_boots_without_the_database_and_finds_it_later(cluster: Cluster, database: str) -> None:
    cluster.stop()
    with Server(environ(cluster, database)) as server:
        try:
            answer = server.client.get("/ready")
            assert answer.status_code == 503
            assert answer.json() == {"status": "unready", "reason": "database"}
            assert server.post("k1").status_code == 503
            # One line for the outage, not one for each request.
            [line] = server.logged(level="ERROR")
            assert line["message"].startswith("database unavailable: FileNotFoundError")
        finally:
            cluster.start()
        eventually(lambda: server.ready() == 200)
        assert server.post("k1").status_code == 201


def test_an_outage_halts_nothing_and_heals_by_itself(cluster: Cluster, database: str) -> None:
    with Server(environ(cluster, database), workers=2) as server:
        eventually(lambda: len(server.logged(message="worker started")) == 2)
        with server.sse() as sse:
            sse.next()
            server.post("k1", 1)
            place = sse.next()["id"]
            cluster.stop()
            try:
                for answer in (
                    server.post("k2"),
                    server.client.get("/v1/events"),
                    server.client.get("/v1/events/stream"),
                ):
                    assert answer.status_code == 503
                    assert answer.headers["Retry-After"] == "2"
                    assert answer.json()["code"] == "database-unavailable"
                    assert "Error" not in answer.text
                assert server.ready() == 503
                assert server.client.get("/health").status_code == 200
            finally:
                cluster.start()
            eventually(lambda: server.ready() == 200)
            assert server.post("k2", 2).status_code == 201
            # The stream was idle and stayed open.
            assert sse.payload() == 2
        with server.sse(last_event_id=place) as sse:
            assert sse.payload() == 2

        # The database that comes back may be another one.
        cluster.admin(f"ALTER DATABASE {database} SET forge.environment = 'staging'")
        try:
            cluster.stop()
            cluster.start()
            assert server.ready() == 503
            assert server.post("k3").status_code == 503
            assert [line for line in server.logged(level="ERROR") if "is marked 'staging'" in line["message"]]
        finally:
            cluster.admin(f"ALTER DATABASE {database} SET forge.environment = 'production'")
        eventually(lambda: server.ready() == 200)
        assert len(server.logged(message="worker started")) == 2
        assert "Traceback" not in server.output()


@pytest.fixture(scope="module")
def pooled(cluster: Cluster) -> str:
    provision(cluster, "pooled")
    migrate(cluster, "pooled")
    return environ(cluster, "pooled")["FORGE_DATABASE_URL"]


@pytest.mark.anyio
async def test_the_pool_is_full_before_the_first_request(
    cluster: Cluster, pooled: str, make_settings: Callable[..., Settings]
) -> None:
    settings = make_settings(FORGE_DATABASE_URL=pooled, FORGE_DATABASE_POOL_MAX="3")
    async with running(create_app(settings)), cluster.connect("pooled") as outside:
        opened = await outside.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = 'pooled' AND usename = 'inbox_app'"
        )
    # One more listens for notifications, or is about to.
    assert opened in (3, 4)


@pytest.mark.anyio
async def test_every_connection_has_rehearsed_before_the_first_request(
    cluster: Cluster, pooled: str, make_settings: Callable[..., Settings]
) -> None:
    app = running(create_app(make_settings(FORGE_DATABASE_URL=pooled, FORGE_DATABASE_POOL_MAX="3")))
    async with app, AsyncExitStack() as held, cluster.connect("pooled") as outside:
        for _ in range(3):
            connection = await held.enter_async_context(app.state["database"].connection())
            prepared = await connection.scalar(
                text("SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE 'INSERT INTO event %'")
            )
            assert prepared == 1
        assert await outside.fetchval("SELECT count(*) FROM event") == 0


@pytest.mark.anyio
async def test_a_database_that_only_reads_does_without_rehearsal(
    cluster: Cluster, pooled: str, make_settings: Callable[..., Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    async with cluster.connect("pooled") as outside:
        await outside.execute("ALTER DATABASE pooled SET default_transaction_read_only = on")
        try:
            async with running(create_app(make_settings(FORGE_DATABASE_URL=pooled))) as client:
                assert (await client.get("/ready")).status_code == 200
                assert (await client.get("/v1/events")).status_code == 200
        finally:
            await outside.execute("ALTER DATABASE pooled RESET default_transaction_read_only")
    assert "cannot execute INSERT in a read-only transaction" in capsys.readouterr().out


@pytest.mark.anyio
async def test_a_table_that_is_locked_keeps_no_worker_from_starting(
    cluster: Cluster, pooled: str, make_settings: Callable[..., Settings]
) -> None:
    async with cluster.connect("pooled") as outside, outside.transaction(), asyncio.timeout(4):
        await outside.execute("LOCK TABLE event IN ACCESS EXCLUSIVE MODE")
        async with running(create_app(make_settings(FORGE_DATABASE_URL=pooled))) as client:
            assert (await client.get("/ready")).status_code == 200
