"""Makes the one table of the app, as the role that migrates."""

import asyncio
import os
import urllib.parse

import asyncpg

TABLE = "CREATE TABLE IF NOT EXISTS kept (word text)"


async def migrate() -> None:
    """Make the table where it is not there."""
    parts = urllib.parse.urlsplit(os.environ["FORGE_DATABASE_URL"])
    connection = await asyncpg.connect(
        host=urllib.parse.unquote(parts.netloc.rpartition("@")[2]),
        user=parts.username,
        database=parts.path.lstrip("/"),
        password=os.environ["FORGE_DATABASE_PASSWORD"],
        timeout=10,
    )
    try:
        await connection.execute(TABLE)
    finally:
        await connection.close()


asyncio.run(migrate())
