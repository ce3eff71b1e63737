"""Following new events: one LISTEN connection a worker, shared by all its streams.

A notification only wakes; what a stream sends is read from the table. The newest events are kept in memory, so that
a thousand streams cost one query, and a stream that lags behind reads the table by itself.
"""

import asyncio
import contextlib
import logging
import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from inbox.cursors import Position
from inbox.database import Database, DatabaseUnavailable
from inbox.events import PAGE_BYTES, Page, Placed, horizon, read_after

CHANNEL = "inbox_event"
PAGE_EVENTS = 100
KEPT_EVENTS = 500
POLL_S = 1.0
"""Longest wait between two looks at the table while someone follows: a lost notification costs no more."""
PAUSE_S = 0.02
"""Shortest time between two notifications of a worker: many commits share one."""
RECONNECT_S = (0.2, 2.0)

logger = logging.getLogger(__name__)


class Feed:
    """The newest events of the table, kept current for the streams of this worker."""

    def __init__(self, database: Database, draining: asyncio.Event) -> None:
        self._database = database
        self._draining = draining
        self._wake = asyncio.Event()
        self._announce = False
        self._followers = 0
        # Complete between two positions, the floor and the tip; nothing is kept while they are None.
        self._kept: deque[Placed] = deque()
        self._kept_bytes = 0
        self._floor: Position | None = None
        self._tip: Position | None = None
        self._changed = asyncio.Event()

    def announce(self) -> None:
        """Tell every worker soon that an event was committed.

        Not by the statement that stores it, since NOTIFY makes commits queue behind each other.
        """
        self._announce = True
        self._wake.set()

    @contextmanager
    def join(self, position: Position | None) -> Iterator["Follower"]:
        """Follow the events after `position`, or those from now on."""
        self._followers += 1
        self._wake.set()
        try:
            yield Follower(self, position)
        finally:
            self._followers -= 1

    async def run(self) -> None:
        """Listen until cancelled, and reconnect when the connection is lost."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._release_when_draining())
            while True:
                try:
                    await self._listen()
                except (DatabaseUnavailable, SQLAlchemyError) as error:
                    logger.warning("listening for events is interrupted", extra={"reason": type(error).__name__})
                except Exception:
                    logger.exception("listening for events failed")
                self._forget()
                await asyncio.sleep(random.uniform(*RECONNECT_S))  # noqa: S311 - spreads reconnects, no secret

    async def after(self, position: Position | None) -> Page | None:
        """Wait for events after `position` and return them; None once the worker drains.

        Returns at once, without an event, when there is no position yet. Raises DatabaseUnavailable.
        """
        while not self._draining.is_set():
            changed = self._changed  # taken before looking, so that no change falls in between
            if position is None:
                async with self._database.connection() as connection:
                    return Page([], await horizon(connection), more=False)
            page = self._kept_after(position)
            if page is None:
                async with self._database.connection() as connection:
                    page = await read_after(connection, position, PAGE_EVENTS)
            if page.events:
                return page
            position = page.position
            await changed.wait()
        return None

    async def _listen(self) -> None:
        async with self._database.own_connection() as (connection, driver):
            lost = asyncio.Event()
            own_pid = driver.get_server_pid()

            def terminated(_: object) -> None:
                lost.set()
                self._wake.set()

            def notified(_: Any, sender: int, *__: Any) -> None:  # noqa: ANN401 - asyncpg's signature
                if sender != own_pid:
                    self._wake.set()

            driver.add_termination_listener(terminated)
            await driver.add_listener(CHANNEL, notified)
            while not lost.is_set():
                await self._advance(connection)
                await asyncio.sleep(PAUSE_S)
                await self._wait()
                if self._announce and not lost.is_set():
                    self._announce = False
                    await connection.exec_driver_sql(f"NOTIFY {CHANNEL}")
        raise DatabaseUnavailable("the LISTEN connection was closed")

    async def _wait(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(POLL_S):
                await self._wake.wait()
        self._wake.clear()

    async def _advance(self, connection: AsyncConnection) -> None:
        if not self._followers:
            self._forget()
            return
        if self._tip is None:
            self._floor = self._tip = await horizon(connection)
            self._tell()
        more = True
        while more:
            page = await read_after(connection, self._tip, PAGE_EVENTS)
            self._tip, more = page.position, page.more
            self._keep(page.events)
            if page.events:
                self._tell()

    def _keep(self, events: list[Placed]) -> None:
        for placed in events:
            self._kept.append(placed)
            self._kept_bytes += placed.size
        while len(self._kept) > KEPT_EVENTS or self._kept_bytes > PAGE_BYTES:
            oldest = self._kept.popleft()
            self._kept_bytes -= oldest.size
            self._floor = oldest.position

    def _kept_after(self, position: Position) -> Page | None:
        if self._floor is None or self._tip is None or position < self._floor:
            return None
        newer = [placed for placed in self._kept if placed.position > position]
        return Page(newer, max(position, self._tip), more=False)

    def _forget(self) -> None:
        self._kept.clear()
        self._kept_bytes = 0
        self._floor = self._tip = None

    def _tell(self) -> None:
        # Whoever waits holds the present event; the next wait needs a fresh one.
        self._changed.set()
        self._changed = asyncio.Event()

    async def _release_when_draining(self) -> None:
        await self._draining.wait()
        self._tell()


class Follower:
    """One stream's place in the sequence of events."""

    def __init__(self, feed: Feed, position: Position | None) -> None:
        self._feed = feed
        self._position = position

    async def next(self) -> Page | None:
        """Wait for the next events; None once the worker drains. Raises DatabaseUnavailable.

        Of a stream that starts now, the first page is empty and holds the place it starts from.
        """
        page = await self._feed.after(self._position)
        if page is not None:
            self._position = page.position
        return page
