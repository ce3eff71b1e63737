"""Several workers behind one unix socket: metrics, logs, and what a worker may not take with it."""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from cluster import Cluster, free_port
from conftest import PASSWORD, SIGNING_KEY, environ
from server import Server, eventually


@pytest.fixture(scope="module")
def server(cluster: Cluster, migrated: str) -> Iterator[Server]:
    with Server(environ(cluster, migrated), workers=2) as started:
        eventually(lambda: len(started.logged(message="worker started")) == 2)
        yield started


@pytest.fixture(autouse=True)
def empty(database: str) -> str:
    return database


def metric(server: Server, name: str) -> float:
    text = server.client.get("/metrics").text
    values = [float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name + " ")]
    return values[0] if values else 0


def test_metrics_add_up_over_the_workers(server: Server) -> None:
    stored = 'http_requests_total{method="POST",route="/v1/events",status="201"}'
    read = 'http_requests_total{method="GET",route="/v1/events/{event_id}",status="200"}'
    seconds = 'http_request_duration_seconds_count{method="GET",route="/v1/events/{event_id}",status="200"}'
    missed = 'http_requests_total{method="OTHER",route="none",status="404"}'
    before = {name: metric(server, name) for name in (stored, read, missed, "inbox_events_stored_total")}
    for number in range(30):
        with server.another_client() as one:
            answer = one.post("/v1/events", json={"type": "t", "payload": 1}, headers={"Idempotency-Key": f"k{number}"})
            assert one.get(answer.headers["Location"]).status_code == 200
    for _ in range(5):
        server.client.request("PROPFIND", "/never/heard/of")
    # From any worker, every time the same.
    for _ in range(6):
        server.client.close()
        server.client = server.another_client()
        assert metric(server, stored) == before[stored] + 30
        assert metric(server, "inbox_events_stored_total") == before["inbox_events_stored_total"] + 30
        assert metric(server, read) == metric(server, seconds) == before[read] + 30
        assert metric(server, missed) == before[missed] + 5
    text = server.client.get("/metrics").text
    assert "never" not in text
    workers = {line["pid"] for line in server.logged(message="worker started")}
    assert len(workers) == 2


def test_a_killed_worker_is_replaced_and_its_counts_stay(server: Server) -> None:
    stored = "inbox_events_stored_total"
    for number in range(10):
        server.post(f"k{number}")
    before = metric(server, stored)
    booted = server.logged(message="worker started")
    os.kill(booted[0]["pid"], signal.SIGKILL)
    eventually(lambda: len(server.logged(message="worker started")) == len(booted) + 1)
    server.client.close()
    server.client = server.another_client()
    assert metric(server, stored) == before
    assert server.post("after").status_code == 201


def test_a_request_is_one_line_of_json(server: Server) -> None:
    headers = {"X-Request-ID": "0123456789abcdef", "X-Forwarded-For": "2001:DB8::7", "X-Forwarded-Proto": "https"}
    answer = server.client.get("/v1/events?limit=5", headers=headers)
    assert answer.headers["X-Request-ID"] == "0123456789abcdef"
    [line] = eventually(lambda: server.logged(request_id="0123456789abcdef"))
    assert line.pop("duration_ms") >= 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line.pop("timestamp"))
    assert line.pop("pid") > 0
    # What PostgreSQL calls the process that did the work.
    [database_pid] = line.pop("database_pids")
    assert b"inbox_app" in Path(f"/proc/{database_pid}/cmdline").read_bytes()
    assert line == {
        "level": "INFO",
        "logger": "inbox.access",
        "message": "request",
        "request_id": "0123456789abcdef",
        "client": "2001:db8::7",
        "method": "GET",
        "path": "/v1/events",
        "status": 200,
    }


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", 'a","level":"FAKE', "a/../b", "\u00e4".encode()])
def test_a_bad_request_id_is_replaced(server: Server, given: str | bytes) -> None:
    raw = given if isinstance(given, bytes) else given.encode()
    answer = server.client.get("/v1/events", headers=[(b"X-Request-ID", raw)])
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["X-Request-ID"])
    [line] = eventually(lambda: server.logged(request_id=answer.headers["X-Request-ID"]))
    assert line["status"] == 200


@pytest.mark.parametrize("given", ["", "unknown", 'x"}', "203.0.113.9", "999.1.1.1"])
def test_what_is_no_address_is_not_logged_as_one(server: Server, given: str) -> None:
    answer = server.client.get("/v1/events", headers={"X-Forwarded-For": given})
    [line] = eventually(lambda: server.logged(request_id=answer.headers["X-Request-ID"]))
    assert line["client"] == ("203.0.113.9" if "203" in given else None)


def test_a_path_cannot_break_out_of_its_line(server: Server) -> None:
    answer = server.client.get('/%0A%7B"level":"FAKE"%7D')
    assert answer.status_code == 404
    [line] = eventually(lambda: server.logged(request_id=answer.headers["X-Request-ID"]))
    assert line["path"] == '/\n{"level":"FAKE"}'
    assert not server.logged(level="FAKE")


def test_probes_are_not_logged_while_all_is_well(server: Server) -> None:
    for path in ("/health", "/ready", "/metrics"):
        assert server.client.get(path).status_code == 200
    assert not [line for line in server.logged() if line.get("path") in {"/health", "/ready", "/metrics"}]


def test_neither_secrets_nor_made_up_addresses_are_logged(cluster: Cluster, database: str) -> None:
    variables = environ(cluster, database) | {"FORGE_ENVIRONMENT": "staging", "FORGE_DEBUG": "true"}
    cluster.admin(f"ALTER DATABASE {database} SET forge.environment = 'staging'")
    port = free_port()
    try:
        # Over TCP, where only 192.0.2.1 is the proxy.
        with Server(variables, "-b", f"127.0.0.1:{port}", "--forwarded-allow-ips", "192.0.2.1") as server:
            direct = httpx.get(f"http://127.0.0.1:{port}/v1/events", headers={"X-Forwarded-For": "203.0.113.9"})
            server.post("k1", "s3cret-payload")
            server.post("k2", "s3cret-payload\x00")
            server.client.get("/v1/events?cursor=s3cret-cursor", headers={"Authorization": "s3cret-token"})
            server.signal()
            server.wait()
            [line] = server.logged(request_id=direct.headers["X-Request-ID"], message="request")
            output = server.output()
    finally:
        cluster.admin(f"ALTER DATABASE {database} SET forge.environment = 'production'")
    assert line["client"] == "127.0.0.1"
    assert "INSERT INTO event" in output  # FORGE_DEBUG shows statements, and no parameters
    for secret in (SIGNING_KEY, PASSWORD, "s3cret", SIGNING_KEY[:20], PASSWORD[:9]):
        assert secret not in output
