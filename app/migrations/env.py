"""Runs the migrations: `python -m alembic upgrade head` in the folder of alembic.ini.

Needs FORGE_ENVIRONMENT, FORGE_DATABASE_URL and FORGE_DATABASE_PASSWORD; no secret of the application itself.
"""

import asyncio
import logging
import sys

import asyncpg
from alembic import context
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from inbox import logs
from inbox.database import MARKER, DatabaseUnavailable, check_marker, connect_arguments
from inbox.events import metadata
from inbox.settings import DatabaseSettings, SettingsInvalid, load

# A migration that waits for a lock makes every later query of that table wait behind it.
LOCK_TIMEOUT_S = 5

logger = logging.getLogger("inbox.migrations")


async def _migrate(settings: DatabaseSettings) -> None:
    async def connect() -> asyncpg.Connection:
        try:
            connection: asyncpg.Connection = await asyncpg.connect(
                **connect_arguments(settings),
                server_settings={"application_name": "inbox-migrate", "lock_timeout": f"{LOCK_TIMEOUT_S}s"},
            )
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise DatabaseUnavailable(f"{type(error).__name__}: {error}") from error
        check_marker(settings.environment, await connection.fetchval("SELECT current_setting($1, true)", MARKER))
        return connection

    engine = create_async_engine(
        "postgresql+asyncpg://", async_creator=connect, poolclass=NullPool, hide_parameters=True
    )
    async with engine.connect() as connection:
        await connection.run_sync(_run)
    await engine.dispose()


def _run(connection: Connection) -> None:
    # One transaction for all: a failed upgrade leaves the schema as it was.
    context.configure(connection=connection, target_metadata=metadata, compare_server_default=True)
    with context.begin_transaction():
        context.run_migrations()


def _offline() -> None:
    context.configure(dialect_name="postgresql", target_metadata=metadata, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()


def _main() -> None:
    try:
        settings = load(DatabaseSettings)
    except SettingsInvalid as invalid:
        logs.configure("INFO")
        for problem in invalid.problems:
            logger.critical("invalid setting: %s", problem)
        sys.exit(1)
    logs.configure(settings.log_level)
    try:
        asyncio.run(_migrate(settings))
    except DatabaseUnavailable as error:
        logger.critical("cannot migrate: %s", error)
        sys.exit(1)
    except SQLAlchemyError:
        logger.critical("the migration failed and was rolled back", exc_info=True)
        sys.exit(1)


if context.is_offline_mode():
    _offline()
else:
    _main()
