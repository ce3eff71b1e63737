"""The API under /v1 on a real database, and the answers to what is wrong."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import text

from cluster import Cluster
from conftest import running
from inbox import events
from inbox.application import create_app
from inbox.cursors import START
from inbox.database import Database
from inbox.logs import JsonFormatter
from inbox.problems import OPENAPI_RESPONSES
from inbox.settings import Settings, get_settings

pytestmark = pytest.mark.anyio

EVENT = {"type": "order.created", "payload": {"order": 17, "note": "\u00e4\u20ac\U0001f600"}}


async def post(client: httpx.AsyncClient, key: str, event: dict[str, Any] = EVENT) -> httpx.Response:
    return await client.post("/v1/events", json=event, headers={"Idempotency-Key": key})


def problem(response: httpx.Response) -> dict[str, Any]:
    """Return the problem document of an error, which every error has to have."""
    assert response.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = response.json()
    assert document["status"] == response.status_code
    assert document["request_id"] == response.headers["X-Request-ID"]
    assert document.keys() >= {"type", "title", "detail", "code"}
    return document


async def test_a_stored_event_can_be_read(client: httpx.AsyncClient) -> None:
    stored = await post(client, "k1")
    assert stored.status_code == 201
    assert stored.json()["payload"] == EVENT["payload"]
    read = await client.get(stored.headers["Location"])
    assert read.status_code == 200
    assert read.json() == stored.json()


async def test_a_repeated_request_stores_nothing(client: httpx.AsyncClient) -> None:
    first = await post(client, "k1")
    again = await post(client, "k1", {"payload": EVENT["payload"], "type": EVENT["type"]})
    assert again.status_code == 200
    assert again.headers["Idempotency-Replayed"] == "true"
    assert again.json() == first.json()
    assert len((await client.get("/v1/events")).json()["events"]) == 1


@pytest.mark.parametrize("other", [{"type": "order.deleted"}, {"payload": {"order": 18}}, {"payload": None}])
async def test_a_key_belongs_to_one_body(client: httpx.AsyncClient, other: dict[str, Any]) -> None:
    await post(client, "k1")
    response = await post(client, "k1", EVENT | other)
    assert response.status_code == 422
    assert problem(response)["code"] == "idempotency-key-reused"


async def test_of_many_simultaneous_requests_with_one_key_one_stores(client: httpx.AsyncClient) -> None:
    responses = await asyncio.gather(*(post(client, "k1") for _ in range(20)))
    assert sorted(response.status_code for response in responses) == [200] * 19 + [201]
    assert len({response.text for response in responses}) == 1
    assert len((await client.get("/v1/events")).json()["events"]) == 1


@pytest.mark.parametrize("key", [None, "", "with space", "\u00e4".encode(), "x" * 256])
async def test_the_key_is_required_and_checked(client: httpx.AsyncClient, key: str | bytes | None) -> None:
    headers: dict[str, Any] = {} if key is None else {"Idempotency-Key": key}
    response = await client.post("/v1/events", json=EVENT, headers=headers)
    assert response.status_code == 422
    [fault] = problem(response)["errors"]
    assert fault["pointer"] == "header/idempotency-key"


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("payload", "status"),
    [
        ("null", 201),
        ("[]", 201),
        ('"text"', 201),
        ("-1.5", 201),
        ("123456789012345678901234567890", 201),
        (r'"\\u0000"', 201),
        (nested(63), 201),
        (r'"\u0000"', 422),
        (r'{"\u0000": 1}', 422),
        (r'"\\\u0000"', 422),
        (r'"\ud800"', 422),
        ("NaN", 422),
        ("1e999", 422),
        (nested(65), 422),
        (nested(100_000), 400),
        ("1" * 5000, 400),
        ("{", 422),
    ],
)
async def test_what_can_be_stored_is_stored_and_the_rest_is_refused(
    client: httpx.AsyncClient, payload: str, status: int
) -> None:
    response = await client.post(
        "/v1/events",
        content=f'{{"type": "t", "payload": {payload}}}',
        headers={"Idempotency-Key": "k1", "Content-Type": "application/json"},
    )
    assert response.status_code == status
    if status == 201:
        assert (await client.get(response.headers["Location"])).json()["payload"] == json.loads(payload)
    else:
        problem(response)


async def test_a_refusal_does_not_repeat_what_was_sent(client: httpx.AsyncClient) -> None:
    response = await post(client, "k1", {"type": "s3cret!", "payload": 1, "s3cret": "s3cret"})
    assert [fault["pointer"] for fault in problem(response)["errors"]] == ["body/type", "body/s3cret"]
    assert response.text.count("s3cret") == 1


async def test_pages_cover_everything_once(client: httpx.AsyncClient) -> None:
    for number in range(7):
        await post(client, f"k{number}", {"type": "t", "payload": number})
    seen: list[int] = []
    query: dict[str, Any] = {"limit": 3}
    more = True
    while more:
        page = (await client.get("/v1/events", params=query)).json()
        seen += [event["payload"] for event in page["events"]]
        query["cursor"], more = page["cursor"], page["more"]
    assert seen == list(range(7))
    await post(client, "later", {"type": "t", "payload": "later"})
    page = (await client.get("/v1/events", params=query)).json()
    assert [event["payload"] for event in page["events"]] == ["later"]


async def test_pages_of_one_type_cover_it_once(client: httpx.AsyncClient) -> None:
    """The types alternate, so that every cursor lies between events of the other one."""
    for number in range(9):
        await post(client, f"k{number}", {"type": ("a", "b:2/c.d_e-F")[number % 2], "payload": number})
    for of_type, numbers in (("a", [0, 2, 4, 6, 8]), ("b:2/c.d_e-F", [1, 3, 5, 7]), ("none", [])):
        seen: list[int] = []
        query: dict[str, Any] = {"limit": 2, "type": of_type}
        more = True
        while more:
            page = (await client.get("/v1/events", params=query)).json()
            assert {event["type"] for event in page["events"]} <= {of_type}
            seen += [event["payload"] for event in page["events"]]
            query["cursor"], more = page["cursor"], page["more"]
        assert seen == numbers
        await post(client, f"other-{of_type}", {"type": "other", "payload": "other"})
        later = await post(client, f"later-{of_type}", {"type": of_type, "payload": "later"})
        page = (await client.get("/v1/events", params=query)).json()
        assert page["events"] == [later.json()]


async def test_a_page_of_one_type_is_bounded_in_bytes(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "PAGE_BYTES", 5000)
    for number in range(8):
        await post(client, f"k{number}", {"type": "ab"[number % 2], "payload": f"{number}" * 4000})
    page = (await client.get("/v1/events", params={"type": "a"})).json()
    assert [event["payload"][0] for event in page["events"]] == ["0", "2"]
    assert page["more"]
    rest = (await client.get("/v1/events", params={"type": "a", "cursor": page["cursor"]})).json()
    assert [event["payload"][0] for event in rest["events"]] == ["4", "6"]


async def test_a_stream_goes_on_where_a_page_of_one_type_ended(
    client: httpx.AsyncClient, cluster: Cluster, database: str
) -> None:
    """Its cursor is a place in the sequence of all events, and none that commits late lies before it."""
    async with cluster.connect(database) as late:
        transaction = late.transaction()
        await transaction.start()
        await late.execute(
            "INSERT INTO event (idempotency_key, fingerprint, type, payload, size) VALUES ('late', '', 'a', '1', 1)"
        )
        await post(client, "early", {"type": "a", "payload": 2})
        first = (await client.get("/v1/events", params={"type": "a"})).json()
        assert (first["events"], first["more"]) == ([], False)
        await transaction.commit()
    for query, payloads in (({"type": "a"}, [1, 2]), ({"type": "b"}, []), ({}, [1, 2])):
        page = (await client.get("/v1/events", params=query | {"cursor": first["cursor"]})).json()
        assert [event["payload"] for event in page["events"]] == payloads


async def test_a_page_of_a_rare_type_reads_nothing_else(settings: Settings, cluster: Cluster, database: str) -> None:
    """And one of a frequent type ends early: what three pages read of many events, as PostgreSQL counted it."""
    async with cluster.connect(database) as admin:
        await admin.execute(
            "INSERT INTO event (xid, idempotency_key, fingerprint, type, payload, size) "
            "SELECT (3 + i / 100)::text::xid8, i, '', CASE i % 5000 WHEN 0 THEN 'rare' ELSE 'many' END, '1', 1 "
            "FROM generate_series(1, 20000) AS i"
        )
        await admin.execute("ANALYZE event")
    read = text("SELECT pg_stat_get_xact_tuples_returned(to_regclass(:name))")
    opened = Database(settings)
    async with opened.connection() as connection:
        in_transaction = await connection.execution_options(isolation_level="REPEATABLE READ")
        rare = await events.read_after(in_transaction, START, 100, "rare")
        place = rare.events[-2].position
        rest = await events.read_after(in_transaction, place, 100, "rare")
        many = await events.read_after(in_transaction, place, 3, "many")
        table, by_place, by_type = [
            (await in_transaction.execute(read, {"name": name})).scalar_one()
            for name in ("event", "event_xid_id_idx", "event_type_xid_id_idx")
        ]
        await in_transaction.rollback()
    await opened.close()
    pages = [[placed.event.id for placed in page.events] for page in (rare, rest, many)]
    assert pages == [[5000, 10000, 15000, 20000], [20000], [15001, 15002, 15003]]
    assert (table, by_type) == (0, 4 + 1)
    assert by_place < 20


async def test_a_page_is_bounded_in_bytes(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "PAGE_BYTES", 5000)
    for number in range(5):
        await post(client, f"k{number}", {"type": "t", "payload": f"{number}" * 4000})
    page = (await client.get("/v1/events")).json()
    assert len(page["events"]) == 2
    assert page["more"]
    rest = (await client.get("/v1/events", params={"cursor": page["cursor"]})).json()
    assert [event["payload"][0] for event in page["events"] + rest["events"]] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("cursor", ["", "x", "AAAA", "A" * 43, "\u00e4", "=" * 8])
async def test_a_cursor_cannot_be_made_up(client: httpx.AsyncClient, cursor: str) -> None:
    response = await client.get("/v1/events", params={"cursor": cursor})
    assert response.status_code == 400
    assert problem(response)["code"] == "invalid-cursor"


async def test_a_cursor_cannot_be_changed(client: httpx.AsyncClient) -> None:
    cursor = (await client.get("/v1/events")).json()["cursor"]
    changed = ("B" if cursor[0] == "A" else "A") + cursor[1:]
    assert (await client.get("/v1/events", params={"cursor": changed})).status_code == 400


async def test_a_late_commit_is_not_skipped(client: httpx.AsyncClient, cluster: Cluster, database: str) -> None:
    """The first id is taken by a transaction that commits last."""
    async with cluster.connect(database) as late:
        transaction = late.transaction()
        await transaction.start()
        held = await late.fetchval(
            "INSERT INTO event (idempotency_key, fingerprint, type, payload, size) "
            "VALUES ('late', '', 't', '\"late\"', 6) RETURNING id"
        )
        early = (await post(client, "early", {"type": "t", "payload": "early"})).json()
        assert early["id"] > held

        first = (await client.get("/v1/events")).json()
        assert first["events"] == []
        assert not first["more"]
        assert (await client.get(f"/v1/events/{early['id']}")).status_code == 200
        await transaction.commit()
    second = (await client.get("/v1/events", params={"cursor": first["cursor"]})).json()
    assert [event["payload"] for event in second["events"]] == ["late", "early"]


async def test_a_crash_of_the_database_hides_no_event_from_a_reader(
    client: httpx.AsyncClient, cluster: Cluster, database: str
) -> None:
    """It gives ids of transactions that stored nothing to others: no cursor may have gone past them."""
    async with cluster.connect(database) as admin:
        # What a rolled-back transaction leaves is written now and then, here hardly ever.
        await admin.execute("ALTER SYSTEM SET wal_writer_delay = '10s'")
        await admin.execute("SELECT pg_reload_conf()")
        await post(client, "before")
        lost = 0
        for pause in (0.5, 0, 0, 0):
            transaction = admin.transaction()
            await transaction.start()
            lost = int(await admin.fetchval("SELECT pg_current_xact_id()::text"))
            await transaction.rollback()
            await asyncio.sleep(pause)
    cursor = (await client.get("/v1/events")).json()["cursor"]
    await asyncio.to_thread(cluster.crash)
    await asyncio.to_thread(cluster.start)
    async with asyncio.timeout(10):
        while (after := await post(client, "after")).status_code != 201:
            assert after.status_code == 503
            await asyncio.sleep(0.1)
    async with cluster.connect(database) as admin:
        await admin.execute("ALTER SYSTEM RESET wal_writer_delay")
        await admin.execute("SELECT pg_reload_conf()")
        reused = int(await admin.fetchval("SELECT max(xid)::text FROM event"))
    assert reused <= lost
    page = (await client.get("/v1/events", params={"cursor": cursor})).json()
    assert page["events"] == [after.json()]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1/events/1", 404),
        ("GET", "/v1/events/0", 422),
        ("GET", "/v1/events/x", 422),
        ("GET", f"/v1/events/{2**63}", 422),
        ("GET", "/v1/events?limit=101", 422),
        ("GET", "/v1/events?type=", 422),
        ("GET", "/v1/events?type=a%20b", 422),
        ("GET", "/v1/events/stream?cursor=x", 400),
        ("DELETE", "/v1/events", 405),
        ("PUT", "/health", 405),
    ],
)
async def test_every_error_is_a_problem_document(
    client: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    response = await client.request(method, path)
    assert response.status_code == status
    problem(response)
    assert ("allow" in response.headers) == (status == 405)


async def test_an_unexpected_error_tells_the_client_nothing(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(*_: object) -> None:
        raise ZeroDivisionError("s3cret")

    monkeypatch.setattr(events, "find", fail)
    response = await client.get("/v1/events/1")
    assert response.status_code == 500
    assert "s3cret" not in response.text
    problem(response)
    [record] = [record for record in caplog.records if record.exc_info]
    [line] = JsonFormatter().format(record).splitlines()
    assert json.loads(line)["level"] == "ERROR"
    assert json.loads(line)["traceback"].endswith("ZeroDivisionError: s3cret\n")


async def chunks(*sizes: int) -> AsyncIterator[bytes]:
    for size in sizes:
        yield b" " * size


async def test_a_large_body_is_refused_by_its_declared_length(client: httpx.AsyncClient, settings: Settings) -> None:
    response = await client.post("/nothing", content=b"x" * (settings.max_body_bytes + 1))
    assert response.status_code == 413
    problem(response)


async def test_a_large_body_is_refused_while_it_arrives(client: httpx.AsyncClient, settings: Settings) -> None:
    half = settings.max_body_bytes // 2
    headers = {"Idempotency-Key": "k1", "Content-Type": "application/json"}
    response = await client.post("/v1/events", content=chunks(half, half, 1), headers=headers)
    assert response.status_code == 413
    problem(response)
    within = await client.post("/v1/events", content=chunks(half, half), headers=headers)
    assert within.status_code == 422  # only spaces: read to the end, and then no JSON


@pytest.mark.parametrize("environment", ["production", "staging"])
async def test_documentation_is_off_in_production(make_settings: Callable[..., Settings], environment: str) -> None:
    app = create_app(make_settings(FORGE_ENVIRONMENT=environment))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://inbox.test") as client:
        for path in ("/docs", "/openapi.json"):
            assert (await client.get(path)).status_code == (404 if environment == "production" else 200)
        assert (await client.get("/redoc")).status_code == 404


async def test_browsers_may_call_from_listed_origins_alone(make_settings: Callable[..., Settings]) -> None:
    app = create_app(make_settings(FORGE_CORS_ORIGINS="https://a.example, https://b.example:8443"))
    async with running(app) as client:
        for origin, allowed in (("https://b.example:8443", True), ("https://evil.example", False)):
            response = await client.get("/v1/events", headers={"Origin": origin})
            assert (response.headers.get("access-control-allow-origin") == origin) == allowed
            preflight = await client.options(
                "/v1/events", headers={"Origin": origin, "Access-Control-Request-Method": "POST"}
            )
            assert (preflight.status_code == 200) == allowed


async def test_the_settings_can_be_overridden(app: FastAPI, make_settings: Callable[..., Settings]) -> None:
    async with running(app) as client:
        cursor = (await client.get("/v1/events")).json()["cursor"]
        other = make_settings(FORGE_SIGNING_KEY="another-key-0123456789-abcdefghijk")
        app.dependency_overrides[get_settings] = lambda: other
        assert (await client.get("/v1/events", params={"cursor": cursor})).status_code == 400


def test_the_schema_of_problems_stands_alone() -> None:
    """A reference in it would be looked up in the whole OpenAPI document, which does not have the part."""
    assert "$ref" not in json.dumps(OPENAPI_RESPONSES)
