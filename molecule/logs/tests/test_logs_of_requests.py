"""forgectl logs: one request on its way, the slowest and the errors of a span, and what comes as it comes."""

from __future__ import annotations

import json
import re
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import httpx
import pytest
from forge_events import answer, forgectl, psql, release, settle
from forge_scenario import CONTAINER, PODMAN, Status, https_client, until
from testinfra.host import Host

Asked = Callable[..., dict[str, Any]]


@contextmanager
def every_statement(host: Host) -> Iterator[None]:
    """PostgreSQL logs all that it is asked, and not only what is slow."""
    psql(host, "ALTER SYSTEM SET log_min_duration_statement = 0")
    psql(host, "SELECT pg_reload_conf()")
    # The connections of the pool learn of it with their next statement.
    time.sleep(0.5)
    try:
        yield
    finally:
        psql(host, "ALTER SYSTEM RESET log_min_duration_statement")
        psql(host, "SELECT pg_reload_conf()")


@contextmanager
def no_socket(host: Host) -> Iterator[None]:
    """Nginx does not find the app."""
    host.check_output("mv /run/inbox/live.sock /run/inbox/.live.sock.away")
    # Connections of Nginx's pool live on for two seconds.
    time.sleep(2.5)
    try:
        yield
    finally:
        host.check_output("mv /run/inbox/.live.sock.away /run/inbox/live.sock")


def post(client: httpx.Client, **content: Any) -> str:
    """Store an event; its request id."""
    answered = client.post(
        "/v1/events", json={"type": "test.logs", "payload": content}, headers={"Idempotency-Key": uuid.uuid4().hex}
    )
    assert answered.status_code == 201, answered.text
    return str(answered.headers["x-request-id"])


def test_a_request_is_followed_through_all_three(host: Host, client: httpx.Client, status: Status) -> None:
    """Nginx, the app and PostgreSQL, in the order of time, and nothing of a request beside it."""
    with every_statement(host), https_client(host) as other:
        made = {
            "INSERT INTO event": lambda: post(client),
            "FROM event": lambda: str(other.get("/v1/events?limit=1").headers["x-request-id"]),
        }
        for wanted, ask in made.items():
            trace = until(partial(whole, host, ask), 60, every=1)
            events = trace["events"]
            assert [event["time"] for event in events] == sorted(event["time"] for event in events)
            assert {event["source"] for event in events} == {"nginx", "app", "postgresql"}
            assert all(event["surely"] for event in events), events
            statements = [event["text"] + event["detail"] for event in events if event["source"] == "postgresql"]
            for each in made:
                assert any(each in statement for statement in statements) == (each == wanted), statements
            assert trace["missing"] == []
            assert trace["request"]["release"] == status()["live"]["release"]
        stored = post(client)
        until(lambda: followed(host, stored), 30)
    for_people = host.check_output("forgectl logs --request %s", stored)
    assert re.search(
        r"^inbox  POST /v1/events  201 in \d\.\d{3} s, the app \d\.\d{3} s of it$", for_people, re.MULTILINE
    )
    assert re.search(r"^  \d\d:\d\d:\d\d\.\d{3}  app\[\d+\]  .*request status=201", for_people, re.MULTILINE)


def followed(host: Host, request_id: str) -> dict[str, Any]:
    """The trace of a request; nothing while no log has it yet."""
    done = forgectl(host, "logs", "--request", request_id, "--json")
    found: dict[str, Any] = json.loads(done.stdout) if done.rc == 0 else {}
    return found


def whole(host: Host, ask: Callable[[], str]) -> dict[str, Any]:
    """The trace of a new request, if it comes from everywhere: PostgreSQL may not yet log what is quick."""
    request_id = ask()
    trace = until(lambda: followed(host, request_id), 30)
    return trace if {event["source"] for event in trace["events"]} >= {"nginx", "app", "postgresql"} else {}


def test_what_nobody_says_is_named(host: Host, client: httpx.Client) -> None:
    """PostgreSQL is silent about what is quick and right, and that is no reason to think that it was not asked."""
    request_id = post(client)
    trace = until(lambda: followed(host, request_id), 30)
    assert [text for text in trace["missing"] if "PostgreSQL logged nothing of it" in text], trace


def test_why_nginx_answered_by_itself(host: Host, client: httpx.Client, asked: Asked) -> None:
    """Its own error is found by the connection, though it knows no request id."""
    with no_socket(host):
        failed = client.get("/v1/events?limit=1")
        assert failed.status_code == 502
    request_id = failed.json()["request_id"]
    trace = until(
        lambda: [event for event in followed(host, request_id).get("events", []) if event["level"] == "ERROR"], 30
    )
    (error,) = trace
    assert error["surely"]
    assert "No such file or directory" in error["text"]
    summary = asked("logs", "--app", "inbox", "--errors", "--since", "1m")["apps"]["inbox"]
    (group,) = [group for group in summary["errors"] if group["what"] == "502 by Nginx GET /v1/events"]
    assert (group["source"], group["request_id"]) == ("nginx", request_id)
    assert summary["statuses"]["502"] == group["count"]


@pytest.mark.exhaustive
def test_errors_of_the_app_and_of_postgresql(host: Host, asked: Asked) -> None:
    """What both say, once for all of a kind, with a request id to follow where there is one."""
    marker = f"missing_{uuid.uuid4().hex[:6]}"
    for _ in range(3):
        assert host.run("runuser --user postgres -- psql --quiet inbox --command %s", f"SELECT * FROM {marker}").rc == 1
    host.check_output("systemd-cat --priority=err echo %s", "ALERT inbox: a test of alerts")

    def groups() -> list[dict[str, Any]]:
        found = asked("logs", "--app", "inbox", "--errors", "--since", "1m", "--lines", "50")["apps"]["inbox"]["errors"]
        return [group for group in found if group["source"] == "postgresql" and marker.split("_")[0] in group["what"]]

    (group,) = until(groups, 30)
    assert group["count"] == 3
    assert group["what"].startswith("ERROR: relation")
    assert "ALERT inbox: a test of alerts" in host.check_output("forgectl logs --errors --since 1m")


def test_slowest_requests(host: Host, client: httpx.Client, asked: Asked) -> None:
    """Of so many as asked for, the slowest first; a stream is none of them."""
    with client.stream("GET", "/v1/events/stream", headers={"Accept": "text/event-stream"}) as stream:
        assert stream.status_code == 200
        time.sleep(2)
    with held_table(host, 4):
        slow = post(client)

    def found() -> list[dict[str, Any]]:
        slowest: list[dict[str, Any]] = asked("logs", "--app", "inbox", "--slowest", "--since", "1m", "-n", "3")[
            "apps"
        ]["inbox"]["slowest"]
        return slowest if slow in [line["request_id"] for line in slowest] else []

    lines = until(found, 30)
    assert len(lines) <= 3
    assert lines[0]["request_id"] == slow
    assert lines[0]["duration"] > 1
    assert [line["duration"] for line in lines] == sorted((line["duration"] for line in lines), reverse=True)


@contextmanager
def held_table(host: Host, seconds: float) -> Iterator[None]:
    """Whoever writes events waits so long."""
    query = f"BEGIN; LOCK TABLE event IN ACCESS EXCLUSIVE MODE; SELECT pg_sleep({seconds}); COMMIT"
    command = [
        str(PODMAN),
        "exec",
        CONTAINER,
        "runuser",
        "--user",
        "postgres",
        "--",
        "psql",
        "--quiet",
        "inbox",
        "--command",
        query,
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        until(
            lambda: psql(host, "SELECT count(*) FROM pg_locks WHERE mode = 'AccessExclusiveLock' AND granted") != "0", 5
        )
        yield
        process.wait(30)


@pytest.mark.exhaustive
def test_a_request_is_found_in_rotated_files(host: Host, client: httpx.Client, asked: Asked) -> None:
    """Compressed ones too; and a span of time goes over all of them."""
    marker = uuid.uuid4().hex
    request_id = client.get(f"/v1/events?limit=1&{marker}").headers["x-request-id"]
    for _ in range(2):
        time.sleep(1.1)  # the name of a rotated file has seconds
        client.get("/health")
        host.check_output("logrotate --force /etc/logrotate.d/forge")
    host.check_output("zgrep --quiet %s /var/log/nginx/inbox.json-*.gz", request_id)
    assert asked("logs", "--request", request_id)["request"]["path"] == "/v1/events"
    before = asked("logs", "--app", "inbox", "--since", "10m")["apps"]["inbox"]["requests"]
    client.get("/health")
    assert until(lambda: asked("logs", "--app", "inbox", "--since", "10m")["apps"]["inbox"]["requests"] > before, 30)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--request", "0" * 32), 3, "expected request 0000"),
        (("--request", "; rm"), 2, "X-Request-ID"),
        (("--since", "soon"), 2, "expected 90s, 15m"),
        (("nobody",), 3, "/etc/forge/apps/nobody.toml"),
        (("--app", "nobody"), 3, "/etc/forge/apps/nobody.toml"),
        (("inbox", "--app", "other"), 2, "one app"),
    ],
)
def test_what_is_refused(host: Host, arguments: tuple[str, ...], code: int, says: str) -> None:
    """With what was expected."""
    done = forgectl(host, "logs", *arguments)
    assert (done.rc, says in done.stderr) == (code, True), done.stderr


def test_the_apps_own_log_is_as_before(host: Host, client: httpx.Client) -> None:
    """By its name alone, as journalctl prints it."""
    request_id = client.get("/v1/events?limit=1").headers["x-request-id"]
    assert until(lambda: request_id in host.check_output("forgectl logs inbox --lines 100"), 30)
    entries = [json.loads(line) for line in host.check_output("forgectl logs inbox --json --since 1m").splitlines()]
    assert any(request_id in entry["MESSAGE"] for entry in entries)


def test_what_is_counted_is_the_newest(host: Host) -> None:
    """Of a span as well, in the order of time; and following goes on from there."""
    before = host.check_output("forgectl logs inbox --since 1h").splitlines()
    newest = host.check_output("forgectl logs inbox --since 1h --lines 5").splitlines()
    # The app may say something in between.
    after = host.check_output("forgectl logs inbox --since 1h").splitlines()
    assert len(before) > 5
    assert newest in [after[first : first + 5] for first in range(len(before) - 5, len(after) - 4)]
    followed = host.run("timeout --signal=INT 5 forgectl logs inbox --since 1h --lines 5 --follow").stdout.splitlines()
    assert followed[0] in after[len(before) - 5 :]


def test_following_ends_cleanly(host: Host, client: httpx.Client) -> None:
    """What happens is shown as it happens, over a rotation; Ctrl-C ends it without a word and with 0."""
    command = [str(PODMAN), "exec", CONTAINER, "timeout", "--preserve-status", "--signal=INT", "--kill-after=20", "25"]
    with subprocess.Popen(
        [*command, "forgectl", "logs", "--follow", "--errors", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        time.sleep(6)
        with no_socket(host):
            first = client.get("/v1/events?limit=1").json()["request_id"]
            host.check_output("logrotate --force /etc/logrotate.d/forge")
            second = client.get("/v1/events?limit=1").json()["request_id"]
        said, errors = process.communicate(timeout=90)
    assert (process.returncode, errors) == (0, "")
    shown = [json.loads(line) for line in said.splitlines()]
    assert [line["request_id"] for line in shown if line["app"] == "inbox"] == [first, second]
    # Nothing of it is left.
    assert "--follow" not in host.run("ps -C journalctl -o args=").stdout


@pytest.mark.exhaustive
def test_whoever_stops_reading_hears_no_complaint(host: Host) -> None:
    """As `head` does."""
    done = host.run("bash -o pipefail -c 'forgectl logs --errors --since 1h | head --lines=1'")
    assert (done.rc, done.stderr) == (0, "")


@pytest.mark.exhaustive
def test_an_app_that_logs_no_request_id(host: Host, client: httpx.Client, source: Any, status: Status) -> None:
    """Its request is found by time, what it says is marked as a guess, and what is missing is said."""
    before = status()["live"]["release"]
    logs = source / "src/inbox/logs.py"
    text = logs.read_text()
    assert 'line["request_id"] = current' in text
    logs.write_text(
        text.replace('line["request_id"] = current', "del current").replace(
            '"logger": record.name,', '"logger": record.name, "nothing": 1,'
        )
    )
    found = answer(release(host, source))
    assert found["changed"]
    settle(status)
    try:
        request_id = client.get("/v1/events?limit=1").headers["x-request-id"]
        trace = until(lambda: followed(host, request_id), 30)
        assert [event["surely"] for event in trace["events"] if event["source"] == "nginx"] == [True, True]
        guesses = [event for event in trace["events"] if event["source"] == "app"]
        assert guesses
        assert not any(event["surely"] for event in guesses)
        assert "logs no line with this id" in " ".join(trace["missing"])
    finally:
        answer(forgectl(host, "rollback", "inbox", "--to", before, "--json"))
        settle(status)
