"""The API under /v1: store events, page through them, follow new ones."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Coroutine
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Path, Query, Response, WebSocket, WebSocketDisconnect
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel

from inbox import cursors, events
from inbox.cursors import START, Position
from inbox.database import DatabaseUnavailable
from inbox.dependencies import DatabaseDep, FeedDep, MetricsDep, PositionDep, SettingsDep, parse_cursor
from inbox.events import Event, EventIn, EventType
from inbox.feed import Follower
from inbox.problems import OPENAPI_RESPONSES, Problem, unavailable
from inbox.settings import Settings

router = APIRouter(prefix="/v1/events", tags=["events"], responses=OPENAPI_RESPONSES)

# WebSocket close codes of RFC 6455 and IANA's registry.
SERVICE_RESTART = 1012
TRY_AGAIN_LATER = 1013
POLICY_VIOLATION = 1008


class EventPage(BaseModel):
    """A piece of the sequence of events."""

    events: list[Event]
    cursor: str
    """Continues after this page; it also opens a stream there."""
    more: bool
    """Whether there are further events already."""


class FollowMessage(BaseModel):
    """A message of the WebSocket; the first one of a stream that starts now has no event."""

    cursor: str
    event: Event | None


@router.post("", status_code=201, responses={200: {"model": Event, "description": "Stored before, by this key."}})
async def store(
    event: EventIn,
    idempotency_key: Annotated[str, Header(pattern=r"^[\x21-\x7e]{1,255}$")],
    response: Response,
    database: DatabaseDep,
    feed: FeedDep,
    metrics: MetricsDep,
) -> Event:
    """Store an event exactly once.

    201 means that it is committed. The same key and body again answer 200 with the event of the first time and
    `Idempotency-Replayed: true`; the same key with another body answers 422.
    """
    async with database.connection() as connection:
        stored = await events.store(connection, idempotency_key, event)
    if not stored.same:
        raise Problem(422, "idempotency-key-reused", "This Idempotency-Key was used with another body.")
    if stored.created:
        metrics.stored()
        feed.announce()
        response.headers["Location"] = f"/v1/events/{stored.event.id}"
    else:
        response.status_code = 200
        response.headers["Idempotency-Replayed"] = "true"
    return stored.event


@router.get("")
async def page(
    database: DatabaseDep,
    settings: SettingsDep,
    position: PositionDep,
    limit: Annotated[int, Query(ge=1, le=100)] = 50,
    of_type: Annotated[EventType | None, Query(alias="type")] = None,
) -> EventPage:
    """Page through all events, or those of one `type`, oldest first.

    A page may hold fewer than `limit` events although `more` is true. The order is that in which events became
    visible; it need not be that of their ids. A cursor is a place in the sequence of all events: go on with the `type`
    that it came from, since events of others may lie before it, unread.
    """
    async with database.connection() as connection:
        found = await events.read_after(connection, position or START, limit, of_type)
    return EventPage(
        events=[placed.event for placed in found.events],
        cursor=cursors.encode(found.position, settings.signing_key),
        more=found.more,
    )


async def _stream_start(
    settings: SettingsDep,
    position: PositionDep,
    last_event_id: Annotated[str | None, Header(max_length=100)] = None,
) -> Position | None:
    # A browser repeats the URL on reconnecting, so what it has seen since then counts.
    return parse_cursor(last_event_id, settings) or position


async def _sse_follower(
    database: DatabaseDep,
    feed: FeedDep,
    metrics: MetricsDep,
    start: Annotated[Position | None, Depends(_stream_start)],
) -> AsyncIterator[Follower]:
    await database.check()  # an outage is answered with a status, not with an empty stream
    with feed.join(start) as follower, metrics.streams("sse").track_inprogress():
        yield follower


@router.get("/stream", response_class=EventSourceResponse)
async def stream(
    settings: SettingsDep, follower: Annotated[Follower, Depends(_sse_follower)]
) -> AsyncIterator[ServerSentEvent]:
    """Follow new events as server-sent events; `Last-Event-ID` or `cursor` resumes without a gap.

    The id of every message is a cursor. When this worker stops, the stream ends and `retry` tells when to come back.
    """
    try:
        while (page := await follower.next()) is not None:
            if not page.events:
                yield ServerSentEvent(id=cursors.encode(page.position, settings.signing_key), retry=_retry_ms())
            for placed in page.events:
                yield ServerSentEvent(
                    raw_data=placed.event.model_dump_json(),
                    event="event",
                    id=cursors.encode(placed.position, settings.signing_key),
                )
    except DatabaseUnavailable:
        pass  # the client comes back, and is told with a status whether the database did
    yield ServerSentEvent(retry=_retry_ms(), comment="reconnect")


@router.websocket("/ws")
async def websocket(
    socket: WebSocket, database: DatabaseDep, feed: FeedDep, metrics: MetricsDep, settings: SettingsDep
) -> None:
    """Follow new events over a WebSocket: each message is `{"cursor": ..., "event": ...}`.

    The query parameter `cursor` resumes without a gap. Close code 1012 means that this worker stops: come back.
    """
    try:
        start = parse_cursor(socket.query_params.get("cursor"), settings)
        await database.check()
    except Problem as problem:
        await socket.send_denial_response(problem.response())
        return
    except DatabaseUnavailable:
        await socket.send_denial_response(unavailable())
        return
    await socket.accept()
    with feed.join(start) as follower, metrics.streams("websocket").track_inprogress():
        code = await _first(_send(socket, follower, settings), _refuse_messages(socket))
        if code is not None:
            # A server that stops may have closed it just before, with the same code.
            with contextlib.suppress(WebSocketDisconnect):
                await socket.close(code)


@router.get("/{event_id}")
async def read(database: DatabaseDep, event_id: Annotated[int, Path(ge=1, le=2**63 - 1)]) -> Event:
    """Read one event."""
    async with database.connection() as connection:
        event = await events.find(connection, event_id)
    if event is None:
        raise Problem(404, "event-not-found", f"There is no event {event_id}.")
    return event


async def _first(*ways: Coroutine[None, None, int | None]) -> int | None:
    """Return the close code of whichever way to end a WebSocket comes first; None when the client is gone."""
    tasks = [asyncio.create_task(way) for way in ways]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return done.pop().result()


async def _send(socket: WebSocket, follower: Follower, settings: Settings) -> int | None:
    try:
        while (page := await follower.next()) is not None:
            if not page.events:
                await socket.send_text(_message(page.position, None, settings))
            for placed in page.events:
                await socket.send_text(_message(placed.position, placed.event, settings))
    except DatabaseUnavailable:
        return TRY_AGAIN_LATER
    except WebSocketDisconnect:
        return None
    return SERVICE_RESTART


async def _refuse_messages(socket: WebSocket) -> int | None:
    message = await socket.receive()
    return None if message["type"] == "websocket.disconnect" else POLICY_VIOLATION


def _message(position: Position, event: Event | None, settings: Settings) -> str:
    return FollowMessage(cursor=cursors.encode(position, settings.signing_key), event=event).model_dump_json()


def _retry_ms() -> int:
    # Spread out, so that the streams of a stopped worker do not all come back in one instant.
    return random.randint(500, 2000)  # noqa: S311 - no secret
