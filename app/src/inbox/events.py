"""The table of events: storing each exactly once, and reading them in an order that never skips one."""

import hashlib
import json
import re
import uuid
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator
from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    DateTime,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Row,
    Select,
    Table,
    Text,
    UniqueConstraint,
    case,
    func,
    literal,
    select,
    true,
    tuple_,
)
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.types import UserDefinedType

from inbox.cursors import START, Position

MAX_DEPTH = 64
PAGE_BYTES = 4 * 1024 * 1024
"""Payload bytes after which a page ends early, so that large events cannot fill a worker's memory."""

# JSON may spell the character NUL, PostgreSQL's jsonb cannot hold it. An escaped backslash before it is no escape.
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


class Xid8(UserDefinedType[int]):
    """PostgreSQL's 64-bit transaction id, which never wraps around."""

    cache_ok = True
    render_bind_cast = True

    def get_col_spec(self, **_: Any) -> str:  # noqa: ANN401 - SQLAlchemy's signature
        """Name the type in DDL and casts."""
        return "xid8"


# The oldest transaction that still runs: every older one has ended, so no row of theirs can appear any more.
_XMIN = func.pg_snapshot_xmin(func.pg_current_snapshot(), type_=Xid8).label("xmin")

metadata = MetaData()
event_table = Table(
    "event",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("xid", Xid8, server_default=func.pg_current_xact_id(), nullable=False),
    Column("idempotency_key", Text, nullable=False),
    Column("fingerprint", LargeBinary, nullable=False),
    Column("type", Text, nullable=False),
    Column("payload", JSONB, nullable=False),
    Column("size", Integer, nullable=False),
    Column("received_at", DateTime(timezone=True), server_default=func.now(), nullable=False),
    UniqueConstraint("idempotency_key", name="event_idempotency_key_key"),
    Index("event_xid_id_idx", "xid", "id"),
    Index("event_type_xid_id_idx", "type", "xid", "id"),
)
_c = event_table.c


EventType = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:/-]{1,200}$", examples=["order.created"])]


class EventIn(BaseModel):
    """An event as a client sends it."""

    model_config = ConfigDict(extra="forbid")

    type: EventType
    payload: Annotated[JsonValue, Field(examples=[{"order": 17, "total": "12.50"}])]

    @field_validator("payload", mode="before")
    @classmethod
    def _can_be_stored(cls, payload: Any) -> Any:  # noqa: ANN401 - any JSON value
        level = [payload]
        for _ in range(MAX_DEPTH):
            level = [child for node in level for child in _children(node)]
            if not level:
                break
        else:
            raise ValueError(f"is nested deeper than {MAX_DEPTH} levels")
        try:
            text = canonical(payload)
            text.encode()
        except ValueError:
            # Python reads NaN, Infinity, 1e999 and lone surrogates; JSON and PostgreSQL know none of them.
            raise ValueError("holds a number or a character that JSON cannot represent") from None
        if _NUL.search(text):
            raise ValueError("holds the character U+0000, which cannot be stored")
        return payload


class Event(BaseModel):
    """An event as it is stored."""

    id: int
    type: str
    payload: JsonValue
    received_at: datetime


class Stored(NamedTuple):
    """Result of storing an event."""

    event: Event
    created: bool
    """False when the idempotency key had been used before."""
    same: bool
    """False when that earlier request had another body."""


class Placed(NamedTuple):
    """An event with its place in the sequence."""

    position: Position
    event: Event
    size: int
    """Bytes of its payload."""


class Page(NamedTuple):
    """A piece of the sequence of events."""

    events: list[Placed]
    position: Position
    """Where the next page starts."""
    more: bool
    """Whether the next page has events already."""


def canonical(value: object) -> str:
    """Return `value` as JSON with sorted keys. Raises ValueError for numbers that JSON does not have."""
    return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"), sort_keys=True)


async def store(connection: AsyncConnection, key: str, event: EventIn) -> Stored:
    """Store `event` under its idempotency key; when this returns, it is committed.

    Of several requests with one key, at the same time or later, the first stores the event and the others find it.
    """
    payload = canonical(event.payload)
    fingerprint = hashlib.sha256(canonical([event.type, event.payload]).encode()).digest()
    statement = (
        insert(event_table)
        .values(
            idempotency_key=key,
            fingerprint=fingerprint,
            type=event.type,
            payload=event.payload,
            size=len(payload.encode()),
        )
        # Waits for a concurrent insert of the same key to commit or to roll back.
        .on_conflict_do_nothing(index_elements=[_c.idempotency_key])
        .returning(_c.id, _c.type, _c.payload, _c.received_at)
    )
    created = (await connection.execute(statement)).one_or_none()
    if created:
        return Stored(_event(created), created=True, same=True)
    earlier = select(_c.id, _c.type, _c.payload, _c.received_at, _c.fingerprint).where(_c.idempotency_key == key)
    row = (await connection.execute(earlier)).one()
    return Stored(_event(row), created=False, same=row.fingerprint == fingerprint)


async def find(connection: AsyncConnection, event_id: int) -> Event | None:
    """Return one event."""
    statement = select(_c.id, _c.type, _c.payload, _c.received_at).where(_c.id == event_id)
    row = (await connection.execute(statement)).one_or_none()
    return _event(row) if row else None


async def read_after(connection: AsyncConnection, position: Position, limit: int, of_type: str | None = None) -> Page:
    """Return up to `limit` events after `position`, in the order in which they became visible.

    With `of_type`, only those of one type; the page then ends where all events of the type have been read.

    Ids come from a sequence when a row is inserted, and transactions commit in any order: a reader that remembers
    the highest id it saw skips every row that commits late. So a row carries the id of its transaction, rows are
    read in the order (xid, id), and only below the oldest transaction that still runs: nothing can appear there any
    more. The price is that one long write transaction, anywhere in the cluster, delays what readers see; it never
    makes them miss anything. Source: PostgreSQL's documentation of pg_snapshot_xmin().

    The page after the last one starts at the newest event that can be read, and not at that oldest transaction: after a
    crash the server may use ids anew whose transactions stored nothing, but none up to that of a stored event.
    """
    horizon = select(_XMIN).subquery("horizon")
    newest = _newest(horizon.c.xmin).lateral("newest")
    window = (
        select(_c.xid, _c.id, _c.type, _c.payload, _c.received_at, _c.size)
        .where(tuple_(_c.xid, _c.id) > tuple_(literal(position.xid, Xid8), literal(position.id, BigInteger)))
        .where(_c.xid < horizon.c.xmin)
        .where(_c.type == of_type if of_type else true())
        .order_by(_c.xid, _c.id)
        .limit(limit + 1)
        .lateral("page")
    )
    size_before = func.sum(window.c.size).over(order_by=(window.c.xid, window.c.id)) - window.c.size
    fits = func.coalesce(size_before < PAGE_BYTES, True).label("fits")
    statement = (
        select(
            newest.c.xid.label("newest_xid"),
            newest.c.id.label("newest_id"),
            window.c.xid,
            window.c.id,
            window.c.type,
            case((fits.element, window.c.payload)).label("payload"),
            window.c.received_at,
            window.c.size,
            fits,
        )
        # Left joins: a row comes back even when there is no event.
        .select_from(horizon.outerjoin(newest, true()).outerjoin(window, true()))
        .order_by(window.c.xid, window.c.id)
    )
    rows = (await connection.execute(statement)).all()
    found = [row for row in rows if row.id is not None]
    fitting = [row for row in found[:limit] if row.fits]
    events = [Placed(Position(row.xid, row.id), _event(row), row.size) for row in fitting]
    if len(fitting) < len(found):
        return Page(events, events[-1].position, more=True)
    # Everything up to the newest has been read, or is of another type.
    return Page(events, max(position, Position(rows[0].newest_xid or 0, rows[0].newest_id or 0)), more=False)


async def horizon(connection: AsyncConnection) -> Position:
    """Return the place after every event that can be read now."""
    newest = (await connection.execute(_newest(select(_XMIN).scalar_subquery()))).one_or_none()
    return Position(newest.xid, newest.id) if newest else START


async def rehearse(connection: AsyncConnection) -> None:
    """Go once through every statement of this module, in a transaction that the caller rolls back."""
    # A key of its own: another worker that rehearses would wait for the end of this transaction.
    key, event = f"rehearsal-{uuid.uuid4()}", EventIn(type="rehearsal", payload=None)
    stored = await store(connection, key, event)
    # Once more, to find it.
    await store(connection, key, event)
    await find(connection, stored.event.id)
    await read_after(connection, START, 1)
    await read_after(connection, START, 1, event.type)
    await horizon(connection)


def _newest(xmin: ColumnElement[int]) -> Select[tuple[int, int]]:
    """Select the place of the newest event of a transaction before `xmin`."""
    return select(_c.xid, _c.id).where(_c.xid < xmin).order_by(_c.xid.desc(), _c.id.desc()).limit(1)


def _event(row: Row[*tuple[Any, ...]]) -> Event:
    return Event(id=row.id, type=row.type, payload=row.payload, received_at=row.received_at)


def _children(node: object) -> Sequence[Any]:
    if isinstance(node, dict):
        return list(node.values())
    return node if isinstance(node, list) else ()
