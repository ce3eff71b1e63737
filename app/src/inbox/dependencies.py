"""What the endpoints depend on."""

import asyncio
from typing import Annotated, TypedDict

from fastapi import Depends, Query
from starlette.requests import HTTPConnection

from inbox import cursors
from inbox.cursors import Position
from inbox.database import Database
from inbox.feed import Feed
from inbox.metrics import Metrics
from inbox.problems import Problem
from inbox.settings import Settings, get_settings


class State(TypedDict):
    """What a worker's lifespan makes and its requests use."""

    database: Database
    feed: Feed
    metrics: Metrics
    draining: asyncio.Event


def _database(connection: HTTPConnection) -> Database:
    database: Database = connection.state.database
    return database


def _feed(connection: HTTPConnection) -> Feed:
    feed: Feed = connection.state.feed
    return feed


def _metrics(connection: HTTPConnection) -> Metrics:
    metrics: Metrics = connection.state.metrics
    return metrics


def _draining(connection: HTTPConnection) -> bool:
    draining: asyncio.Event = connection.state.draining
    return draining.is_set()


SettingsDep = Annotated[Settings, Depends(get_settings)]
DatabaseDep = Annotated[Database, Depends(_database)]
FeedDep = Annotated[Feed, Depends(_feed)]
MetricsDep = Annotated[Metrics, Depends(_metrics)]
DrainingDep = Annotated[bool, Depends(_draining)]


def parse_cursor(text: str | None, settings: Settings) -> Position | None:
    """Return the position that a client's cursor stands for. Raises Problem."""
    if text is None:
        return None
    try:
        return cursors.decode(text, settings.signing_key)
    except cursors.CursorInvalid:
        raise Problem(400, "invalid-cursor", "The cursor was not issued by this service; start without one.") from None


def _position(
    settings: SettingsDep,
    cursor: Annotated[str | None, Query(max_length=100, description="Continue after this place.")] = None,
) -> Position | None:
    return parse_cursor(cursor, settings)


PositionDep = Annotated[Position | None, Depends(_position)]
