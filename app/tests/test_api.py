"""The API under /v1 on a real database."""

from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.anyio

EVENT = {"type": "order.created", "payload": {"order": 17, "note": "\u00e4\u20ac\U0001f600"}}


async def post(client: httpx.AsyncClient, key: str, event: dict[str, Any] = EVENT) -> httpx.Response:
    return await client.post("/v1/events", json=event, headers={"Idempotency-Key": key})


async def test_a_stored_event_can_be_read(client: httpx.AsyncClient) -> None:
    stored = await post(client, "k1")
    assert stored.status_code == 201
    assert stored.json()["payload"] == EVENT["payload"]
    read = await client.get(stored.headers["Location"])
    assert read.json() == stored.json()
