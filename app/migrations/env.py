"""Runs the migrations: `python -m alembic upgrade head` in the folder of alembic.ini.

Needs FORGE_ENVIRONMENT, FORGE_DATABASE_URL and FORGE_DATABASE_PASSWORD; no secret of the application itself.
"""

import asyncio
import logging
import sys
import traceback

import asyncpg
from alembic import context
from alembic.runtime.migration import MigrationContext, MigrationInfo
from alembic.script import Script
from alembic.util import CommandError
from sqlalchemy import Connection
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
    # One transaction for all: a failed upgrade leaves the schema as it was. Only autocommit_block() ends it, before its
    # statements; what was done by then stays.
    context.configure(
        connection=connection, target_metadata=metadata, compare_server_default=True, on_version_apply=_keep
    )
    with context.begin_transaction():
        context.run_migrations()


def _keep(ctx: MigrationContext, step: MigrationInfo, *_: object, **__: object) -> None:
    """Commit that a migration ran which was not transactional, lest a later one that fails makes it run again."""
    if isinstance(step.up_revision, Script) and vars(step.up_revision.module).get("repair"):
        with ctx.autocommit_block():
            pass


def _failed(error: Exception) -> str:
    """Say what is left of a migration that failed, found by the module among the frames of its error."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if repair := frame.f_globals.get("repair"):
            revision = frame.f_globals["revision"]
            return f"migration {revision} failed and cannot be rolled back; this undoes what it did: {repair}"
    return "the migration failed and was rolled back"


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
    except CommandError:
        raise  # Alembic says it
    except Exception as error:
        logger.critical(_failed(error), exc_info=True)
        sys.exit(1)


if context.is_offline_mode():
    _offline()
else:
    _main()
