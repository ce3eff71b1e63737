"""The connection pool of one worker, and the proof that it reaches the right database."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from urllib.parse import unquote

import asyncpg
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from inbox import logs
from inbox.settings import DatabaseSettings, Environment, Settings

# Seconds. A turn at the pool, a new connection and a command take together less than the 25 s that Nginx gives a
# request, and each is long enough that a disk or a host that stands still for a moment makes requests late, not lost.
CONNECT_TIMEOUT_S = 5
POOL_TIMEOUT_S = 8
STATEMENT_TIMEOUT_S = 8
COMMAND_TIMEOUT_S = 10
READY_TIMEOUT_S = 2
# What the rehearsal of a start waits for a lock; those who have it are not kept waiting for longer either.
REHEARSAL_LOCK_TIMEOUT_MS = 100

MARKER = "forge.environment"
_PREFLIGHT = f"SELECT current_setting('{MARKER}', true) AS marker, to_regclass('event') IS NOT NULL AS migrated"

# Conditions that pass: the server went away, is starting, has no connection left, or cancelled a slow statement.
# Classes and codes: PostgreSQL's documentation, appendix A.
_PASSING_CLASSES = frozenset({"08", "53", "57"})

logger = logging.getLogger(__name__)


class DatabaseUnavailable(Exception):
    """The database cannot be used now; the same request may succeed later."""


class EnvironmentMismatch(DatabaseUnavailable):
    """The database belongs to another environment than this process."""


def check_marker(expected: Environment, found: str | None) -> None:
    """Compare the environment of the settings with the marker in the database.

    A database that nobody provisioned has no marker; only development may use it. Raises EnvironmentMismatch.
    """
    if found == expected or (not found and expected == "development"):
        return
    if not found:
        raise EnvironmentMismatch(
            f"FORGE_ENVIRONMENT is {expected!r} and the database has no environment marker. Provisioning writes it: "
            f"ALTER DATABASE ... SET {MARKER} = '{expected}'. Check FORGE_DATABASE_URL"
        )
    raise EnvironmentMismatch(
        f"FORGE_ENVIRONMENT is {expected!r} and the database is marked {found!r}: refusing to use it. "
        "Correct FORGE_DATABASE_URL or FORGE_ENVIRONMENT"
    )


def connect_arguments(settings: DatabaseSettings) -> dict[str, Any]:
    """Translate the URL and password of the settings into arguments of asyncpg.connect()."""
    host = settings.database_url.hosts()[0]
    password = settings.database_password
    arguments: dict[str, Any] = {
        "host": unquote(host["host"] or "localhost"),
        "port": host["port"],
        "user": unquote(host["username"] or ""),
        "password": password.get_secret_value() if password else None,
        "database": unquote((settings.database_url.path or "").removeprefix("/")),
        "timeout": CONNECT_TIMEOUT_S,
    }
    return arguments | dict(settings.database_url.query_params())


class Database:
    """One pool, made inside `lifespan` and used by one event loop.

    Every connection proves on opening that it reached the right environment and a migrated schema, so that an outage
    at start, a failover or a changed DNS entry cannot let a worker in by the back door.

    Every operation of the application is a single statement and runs in autocommit: when the statement has returned,
    it is committed, and no transaction stays open while the event loop is busy elsewhere. Open transactions hold
    back readers, see events.read_after().
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._trouble: str | None = "not connected yet"
        self._pool = self._engine(pool_size=settings.database_pool_max, max_overflow=0, pool_timeout=POOL_TIMEOUT_S)
        self._single = self._engine(poolclass=NullPool)

    def _engine(self, **pool: Any) -> AsyncEngine:  # noqa: ANN401 - passed on to SQLAlchemy
        return create_async_engine(
            "postgresql+asyncpg://",
            async_creator=self._connect,
            isolation_level="AUTOCOMMIT",
            pool_pre_ping=True,
            hide_parameters=True,
            echo=self._settings.debug,
            **pool,
        )

    async def _connect(self) -> asyncpg.Connection:
        try:
            connection: asyncpg.Connection = await asyncpg.connect(
                **connect_arguments(self._settings),
                command_timeout=COMMAND_TIMEOUT_S,
                server_settings={
                    "application_name": "inbox",
                    "statement_timeout": f"{STATEMENT_TIMEOUT_S}s",
                    "idle_in_transaction_session_timeout": f"{STATEMENT_TIMEOUT_S}s",
                },
            )
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise self._unreachable(f"{type(error).__name__}: {error}") from error
        try:
            await self._preflight(connection)
        except BaseException:
            connection.terminate()
            raise
        if self._trouble:
            logger.info("database reached")
            self._trouble = None
        return connection

    async def _preflight(self, connection: asyncpg.Connection) -> None:
        try:
            row = await connection.fetchrow(_PREFLIGHT)
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise self._unreachable(f"{type(error).__name__}: {error}") from error
        if row is None:
            raise self._unreachable("a SELECT without FROM returned no row")
        try:
            check_marker(self._settings.environment, row["marker"])
        except EnvironmentMismatch as mismatch:
            self._report(str(mismatch))
            raise
        if not row["migrated"]:
            raise self._unreachable("the table 'event' is missing; run the migrations: python -m alembic upgrade head")

    def _unreachable(self, reason: str) -> DatabaseUnavailable:
        self._report(f"database unavailable: {reason}")
        return DatabaseUnavailable(reason)

    def _report(self, message: str) -> None:
        # Once for each trouble, not once for each request that meets it.
        if message != self._trouble:
            logger.error(message)
            self._trouble = message

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[AsyncConnection]:
        """Lend a connection of the pool. Raises DatabaseUnavailable when there is none or it breaks."""
        async with _translated(), self._pool.connect() as connection:
            _note_process(connection)
            yield connection

    @asynccontextmanager
    async def own_connection(self) -> AsyncIterator[tuple[AsyncConnection, asyncpg.Connection]]:
        """Open a connection outside the pool, as SQLAlchemy's and the driver's object. Raises DatabaseUnavailable."""
        async with _translated(), self._single.connect() as connection:
            raw = await connection.get_raw_connection()
            if raw.driver_connection is None:
                raise DatabaseUnavailable("the connection closed at once")
            yield connection, raw.driver_connection

    async def open(self, rehearse: Callable[[AsyncConnection], Awaitable[None]]) -> None:
        """Check the database, open every connection of the pool and `rehearse` on each: no first request pays for that.

        Raises DatabaseUnavailable.
        """
        await self.check()
        async with AsyncExitStack() as held:
            for _ in range(self._settings.database_pool_max):
                await _rehearse(await held.enter_async_context(self.connection()), rehearse)

    async def check(self) -> None:
        """Run `SELECT 1` within READY_TIMEOUT_S. Raises DatabaseUnavailable."""
        async with _translated(), asyncio.timeout(READY_TIMEOUT_S), self.connection() as connection:
            await connection.execute(text("SELECT 1"))

    async def close(self) -> None:
        """Close every connection."""
        await self._pool.dispose()
        await self._single.dispose()


async def _rehearse(connection: AsyncConnection, rehearse: Callable[[AsyncConnection], Awaitable[None]]) -> None:
    """Run statements that leave nothing behind, so that both ends have parsed and planned them, and loaded what for."""
    await connection.execution_options(isolation_level="READ COMMITTED")
    try:
        async with connection.begin() as transaction:
            await connection.execute(text(f"SET LOCAL lock_timeout = {REHEARSAL_LOCK_TIMEOUT_MS}"))
            await rehearse(connection)
            await transaction.rollback()
    except DBAPIError as error:
        if error.connection_invalidated:
            raise
        # A table that is locked or may not be written just now: requests find out, and are late as without rehearsal.
        logger.info("the first requests were not rehearsed: %s", error.orig)


def _note_process(connection: AsyncConnection) -> None:
    """Have the log of the request name the server's process, which the driver knows since it connected."""
    pids, lent = logs.database_pids.get(), connection.sync_connection
    if pids is not None and lent is not None and (driver := lent.connection.driver_connection) is not None:
        pids.add(driver.get_server_pid())


@asynccontextmanager
async def _translated() -> AsyncIterator[None]:
    try:
        yield
    except DBAPIError as error:
        if error.connection_invalidated or _sqlstate(error)[:2] in _PASSING_CLASSES:
            raise DatabaseUnavailable(type(error.orig).__name__) from error
        raise
    except (PoolTimeoutError, OSError, asyncpg.InterfaceError, asyncpg.PostgresConnectionError) as error:
        raise DatabaseUnavailable(type(error).__name__) from error


def _sqlstate(error: SQLAlchemyError) -> str:
    return getattr(getattr(error, "orig", None), "sqlstate", None) or ""
