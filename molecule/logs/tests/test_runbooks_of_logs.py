"""docs/runbooks/errors-in-numbers.md and log-rotation.md: every command works, in the situation that it is for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from forge_events import answer, forgectl, release, settle
from forge_runbook import Runbooks
from forge_scenario import Status, until
from testinfra.host import Host

ERRORS, ROTATION = "errors-in-numbers", "log-rotation"
LOG = "/var/log/nginx/inbox.json"


@pytest.fixture
def broken(host: Host, source: Path, status: Status) -> Iterator[str]:
    """A release that passes its gate and answers 500 to all who want to read events; which one was before."""
    before = str(status()["live"]["release"])
    api = source / "src/inbox/api.py"
    line = "        found = await events.read_after("
    assert line in api.read_text()
    api.write_text(
        api.read_text().replace(line, f'        if limit:\n            raise LookupError("a slip of the pen")\n{line}')
    )
    answer(release(host, source))
    settle(status)
    yield before
    if status()["live"]["release"] != before:
        answer(forgectl(host, "rollback", "inbox", "--to", before, "--json"))
        settle(status)


def test_errors_in_numbers(host: Host, client: httpx.Client, runbooks: Runbooks, broken: str, status: Status) -> None:
    """A release that fails at requests, and not at its probes: seen, explained by one request, and taken back."""
    failed = [client.get("/v1/events?limit=1") for _ in range(20)]
    assert {answered.status_code for answered in failed} == {500}
    until(lambda: "LookupError" in host.check_output("forgectl logs inbox --lines 20"), 30)
    seen = runbooks.follow(ERRORS, "What you see")
    assert "LookupError: a slip of the pen" in seen
    day = runbooks.follow(ERRORS, "When it began")
    assert status()["live"]["release"] in day
    said = runbooks.follow(ERRORS, "What one of them says", {"request-id": failed[-1].headers["x-request-id"]})
    assert "raise LookupError" in said
    runbooks.follow(ERRORS, "It began with a release")
    settle(status)
    assert status()["live"]["release"] == broken
    for _ in range(5):
        assert client.get("/v1/events?limit=1").status_code == 200
    until(lambda: "errors: none" in host.check_output("forgectl logs --app inbox --errors --since 10s"), 60, every=2)
    runbooks.follow(ERRORS, "See that it is mended")
    assert runbooks.left(ERRORS) == []


@pytest.mark.exhaustive
def test_log_rotation(host: Host, client: httpx.Client, runbooks: Runbooks) -> None:
    """Each reason why logs are not rotated: caused, found, mended; and they are rotated again."""
    host.check_output("systemctl disable --quiet --now logrotate.timer")
    host.check_output("printf '/var/log/forge-test.log {\\n  rotate many\\n}\\n' > /etc/logrotate.d/broken")
    host.run("systemctl start logrotate.service")
    assert "broken" in runbooks.follow(ROTATION, "What you see")
    runbooks.follow(ROTATION, "The timer is off")
    assert host.service("logrotate.timer").is_running
    assert host.service("logrotate.timer").is_enabled
    runbooks.follow(ROTATION, "A file of its configuration is wrong", {"file": "broken"})
    rotates(host, client, runbooks)

    host.check_output("chmod 0777 /var/log/nginx")
    assert "insecure permissions" in failing(host)
    runbooks.follow(ROTATION, "The folder of the logs is writable by others")
    rotates(host, client, runbooks)

    host.check_output("echo 'what a power cut leaves' > /var/lib/logrotate/status")
    assert "status" in failing(host)
    runbooks.follow(ROTATION, "Its state is damaged")
    rotates(host, client, runbooks)

    # What a postrotate that was cut off leaves: Nginx writes on into the renamed file.
    host.check_output("mv %s %s-20260101-1767225600", LOG, LOG)
    host.check_output("install --owner=www-data --group=adm --mode=0640 /dev/null %s", LOG)
    client.get("/health")
    assert host.file(LOG).size == 0
    runbooks.follow(ROTATION, "Nginx writes on into a renamed file")
    client.get("/health")
    until(lambda: host.file(LOG).size > 0, 30)
    runbooks.follow(ROTATION, "See that it is mended")
    assert runbooks.left(ROTATION) == []


def failing(host: Host) -> str:
    """Run logrotate as its timer does, see it fail, and return what it says."""
    grow(host)
    host.run("systemctl start logrotate.service")
    assert host.check_output("systemctl show logrotate.service --property=Result --value") == "exit-code"
    return str(host.check_output("journalctl --unit=logrotate.service --lines=20 --no-pager --output=cat"))


def rotates(host: Host, client: httpx.Client, runbooks: Runbooks) -> None:
    """A log that is large enough is rotated as the page says, and Nginx goes on in a new one."""
    grow(host)
    newest = host.check_output("stat --format=%%i %s", LOG)
    runbooks.follow(ROTATION, "Rotate now")
    assert host.check_output("stat --format=%%i %s", LOG) != newest
    client.get("/health")
    until(lambda: host.file(LOG).size > 0, 30)


def grow(host: Host) -> None:
    """Have a log that is due."""
    time.sleep(1.1)  # the name of a rotated file has seconds
    host.check_output('yes \'{"timestamp":"2026-01-01T00:00:00+00:00","status":200}\' | head --bytes=2M >> %s', LOG)
