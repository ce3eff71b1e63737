"""The maintenance mode, as clients and operators meet it."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from forge_events import answer, forgectl, history, release, settle
from forge_scenario import CONTAINER, Status, https_client, podman, reachable, until
from testinfra.host import Host

REASON = "moving the disk of example.com"
PROBLEM = "application/problem+json"


@pytest.fixture
def closed(host: Host, status: Status) -> Iterator[None]:
    """The app, closed by an operator, and open again afterwards."""
    settle(status)
    answer(forgectl(host, "maintenance", "inbox", "on", "--reason", REASON, "--json"))
    yield
    forgectl(host, "maintenance", "inbox", "off")


class Asking(threading.Thread):
    """A client that asks all the time; notes what it is told, in order, each answer once in a row."""

    def __init__(self, host: Host) -> None:
        super().__init__()
        self.client = https_client(host)
        self.seen: list[int] = []
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.02):
            try:
                found = self.client.get("/ready", timeout=5).status_code
            except httpx.TransportError:
                continue
            if found not in self.seen[-1:]:
                self.seen.append(found)

    def __enter__(self) -> Asking:
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        self.join()
        self.client.close()


@pytest.mark.usefixtures("closed")
def test_clients_are_told_to_come_back(client: httpx.Client) -> None:
    """Every request, in the form of the app's errors, with a time to come back and without the operator's reason."""
    key = {"Idempotency-Key": uuid.uuid4().hex, "Content-Type": "application/json"}
    answers = [
        *(client.get(path) for path in ("/v1/events", "/ready", "/no-such-page")),
        client.post("/v1/events", content=json.dumps({"type": "edge.closed", "payload": {}}), headers=key),
    ]
    for found in answers:
        assert (found.status_code, found.headers["content-type"]) == (503, PROBLEM)
        assert found.json()["status"] == 503
        assert int(found.headers["retry-after"]) > 0
        assert REASON not in found.text


def test_it_is_done_once_and_written_down(host: Host, status: Status, client: httpx.Client) -> None:
    """A second time changes nothing; status and history tell who closed the app, when and why."""
    settle(status)
    before, entries = status()["last"], len(history(host))
    planned = answer(forgectl(host, "maintenance", "inbox", "on", "--dry-run", "--json"))
    assert (planned["changed"], client.get("/ready").status_code) == (True, 200)
    try:
        first, second = (
            answer(forgectl(host, "maintenance", "inbox", "on", "--reason", REASON, "--json")) for _ in range(2)
        )
        assert (first["changed"], second["changed"]) == (True, False)
        mode = status()["maintenance_mode"]
        assert (mode["by"], mode["reason"]) == ("admin", REASON)
        assert f"MAINTENANCE MODE since {mode['since']} by admin: {REASON}" in forgectl(host, "status", "inbox").stdout
    finally:
        last = [answer(forgectl(host, "maintenance", "inbox", "off", "--json"))["changed"] for _ in range(2)]
    assert last == [True, False]
    assert client.get("/ready").status_code == 200
    assert (status()["maintenance_mode"], status()["last"]) == (None, before)
    added = history(host)[entries:]
    assert [(each["action"], each["outcome"], each["by"]) for each in added] == [
        ("maintenance", "on", "admin"),
        ("maintenance", "off", "admin"),
    ]
    assert [each["reason"] for each in added] == [REASON, ""]


@pytest.mark.usefixtures("closed")
def test_releases_go_on_behind_the_page(host: Host, status: Status, source: Path) -> None:
    """A deploy, its watch and a rollback work as ever, and no client sees the app until it is opened."""
    before = status()["live"]["release"]
    with Asking(host) as client:
        until(lambda: client.seen, 10)
        new = answer(release(host, source))
        assert (new["verdict"], status()["live"]["release"]) == ("live", new["release"])
        settle(status)
        answer(forgectl(host, "rollback", "inbox", "--json"))
        settle(status)
        assert status()["live"]["release"] == before
        assert client.seen == [503]
        answer(forgectl(host, "maintenance", "inbox", "off", "--json"))
        # The very next request: the app was ready behind the page.
        until(lambda: client.seen == [503, 200], 5)


@pytest.mark.usefixtures("closed")
def test_a_reboot_does_not_open_it(host: Host) -> None:
    """From the first answer on it is the page, and the app is up behind it."""
    with Asking(host) as client:
        until(lambda: client.seen, 10)
        podman("restart", "--time", "10", CONTAINER)
        client.seen.clear()
        until(lambda: client.seen, 90)
        until(lambda: reachable(host) and is_running(host), 90, every=1)
        time.sleep(1)
        assert client.seen == [503]
        assert json.loads(host.check_output("forgectl status inbox --json"))["ready"] is True
        answer(forgectl(host, "maintenance", "inbox", "off", "--json"))
        until(lambda: client.seen == [503, 200], 10)


def is_running(host: Host) -> bool:
    """Whether the boot is over, and every unit is well."""
    return bool(host.run("systemctl is-system-running").stdout.strip() == "running")


@pytest.mark.parametrize("mode", ["on", "off"])
def test_an_app_that_is_not_there_is_refused(host: Host, mode: str) -> None:
    """Nothing is made for it."""
    refused = forgectl(host, "maintenance", "nothing", mode, "--json")
    assert (refused.rc, json.loads(refused.stdout)["changed"]) == (3, False)
    assert not host.file("/run/nothing").exists
    assert not host.file("/var/lib/forge/nothing").exists
