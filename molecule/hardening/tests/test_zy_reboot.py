"""Reboots that updates ask for: when they wait, that they drain, and that everything serves afterwards."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import forge_load
import httpx
import pytest
from forge_events import table
from forge_scenario import CONTAINER, Status, main_pid, podman, reachable, ready, show, until
from testinfra.host import Host

UNIT = "forge-reboot.service"
# The window of the inventory is at night.
ALWAYS = "[Service]\nExecStart=\nExecStart=/usr/local/sbin/forge-reboot --window 00:00-00:00\n"
FLOCK = "flock /var/lib/forge/inbox/lock sleep 60"
APT = "import fcntl, time; f = open('/var/lib/dpkg/lock-frontend', 'r+'); fcntl.lockf(f, fcntl.LOCK_EX); time.sleep(60)"
UPLOAD_SECONDS = 12
"""Longer than Nginx goes on announcing the end of connections: the upload is under way when it closes its ports."""


@pytest.fixture(autouse=True)
def due(host: Host) -> Iterator[None]:
    """A reboot is due, and the window is open."""
    open_window(host)
    host.check_output("echo libc6 > /run/reboot-required.pkgs && touch /run/reboot-required")
    yield
    host.check_output(
        "rm --recursive --force /run/reboot-required* /run/systemd/system/%s.d /var/lib/forge/reboot.json "
        "/etc/tmpfiles.d/due.conf && systemctl daemon-reload",
        UNIT,
    )


def open_window(host: Host) -> None:
    """Open the window until the next boot."""
    folder = f"/run/systemd/system/{UNIT}.d"
    host.check_output(f"mkdir --parents {folder} && printf %%s %s > {folder}/always.conf", ALWAYS)
    host.check_output("systemctl daemon-reload")


def look(host: Host) -> str:
    """Have it look; what it says."""
    since = host.check_output("date +%s.%N")
    host.run("systemctl start %s", UNIT)
    host.check_output("journalctl --sync")
    return str(host.check_output("journalctl --unit=%s --output=cat --since=%s", UNIT, f"@{since}"))


@contextmanager
def held(host: Host, command: str) -> Iterator[None]:
    """Have something under way."""
    host.check_output(f"systemd-run --quiet --unit=forge-held {command}")
    try:
        until(lambda: main_pid(host, "forge-held.service"), 10)
        time.sleep(0.5)
        yield
    finally:
        host.check_output("systemctl stop forge-held.service")


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (FLOCK, "inbox: a command is under way"),
        (f'python3 -c "{APT}"', "packages are being installed (lock-frontend)"),
        ("systemd-inhibit --what=shutdown --who=backup --why=copies sleep 60", "backup inhibits it: copies"),
    ],
)
def test_waits_for_what_is_under_way(host: Host, client: httpx.Client, command: str, why: str) -> None:
    """A release, an update, or whoever inhibits a shutdown: nothing is drained meanwhile."""
    nginx = main_pid(host, "nginx.service")
    with held(host, command):
        assert f"it waits, since {why}" in look(host)
    assert (main_pid(host, "nginx.service"), ready(client)) == (nginx, True)


def test_a_refused_reboot_leaves_nginx_serving(host: Host, client: httpx.Client) -> None:
    """It says so once, tries no second time, and reports it every night."""
    host.check_output("systemctl mask --runtime reboot.target")
    try:
        said = look(host)
        assert "ALERT host: a reboot was due, but systemd refuses it" in said
        assert ready(client)
        nginx = main_pid(host, "nginx.service")
        assert "ALERT host: a reboot did not mend this, and is not tried again: libc6 was updated" in look(host)
    finally:
        host.check_output("systemctl unmask --runtime reboot.target && systemctl reset-failed")
    assert (main_pid(host, "nginx.service"), ready(client)) == (nginx, True)
    assert host.run("test -e /run/forge-nginx-leaving").rc != 0


def test_killed_while_it_drains(host: Host, client: httpx.Client) -> None:
    """Whoever stops it, or kills it: Nginx serves."""
    host.check_output("systemctl start --no-block %s", UNIT)
    until(lambda: host.run("test -e /run/forge-nginx-leaving").rc == 0, 20)
    host.check_output("systemctl kill --signal=KILL --kill-whom=all %s", UNIT)
    until(lambda: show(host, UNIT, "ActiveState") in ("failed", "inactive"), 60)
    until(lambda: ready(client), 20, every=0.5)
    assert host.run("test -e /run/forge-nginx-leaving").rc != 0
    host.check_output("systemctl reset-failed")


def upload() -> Iterator[bytes]:
    """An event that takes its time."""
    yield b'{"type": "upload.slow", "payload": {"text": "'
    for _ in range(UPLOAD_SECONDS):
        time.sleep(1)
        yield b"slow "
    yield b'"}}'


def test_reboot_drains_and_everything_comes_back(host: Host, client: httpx.Client, status: Status) -> None:
    """Under load: who got in is answered, who comes later is refused, and what was acknowledged is there afterwards.

    In a container systemd ends, and somebody has to start it again; on a machine that is the firmware.
    """
    variables = host.ansible.get_variables()
    trust = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "tls" / "ca.pem"
    before = status()["live"]
    # A reason that the boot does not mend.
    host.check_output(
        "printf 'f /run/reboot-required\\nf /run/reboot-required.pkgs - - - - libc6\\n' > /etc/tmpfiles.d/due.conf"
    )
    site = (variables["ansible_host"], variables["apps"]["inbox"]["domain"], trust)
    with ThreadPoolExecutor() as pool, forge_load.running(*site, rate=40.0, extras=False) as load:
        time.sleep(4)
        began = time.time()
        headers = {"Content-Type": "application/json", "Idempotency-Key": uuid.uuid4().hex}
        slow = pool.submit(client.post, "/v1/events", content=upload(), headers=headers)
        host.check_output("systemctl start --no-block %s", UNIT)
        until(
            lambda: podman("inspect", "--format={{.State.Running}}", CONTAINER).stdout.strip() == b"false",
            120,
            every=0.5,
        )
        ended = time.time()
    podman("start", CONTAINER)
    until(lambda: ready(client), 90, every=0.5)
    until(lambda: reachable(host), 60)
    assert slow.result().status_code == 201
    assert client.get(f"/v1/events/{slow.result().json()['id']}").status_code == 200
    inside = load.result.between(began, ended)
    outcomes = {record.outcome for record in inside}
    assert forge_load.OK in outcomes
    assert outcomes <= {forge_load.OK, forge_load.REFUSED, forge_load.UNREACHABLE, forge_load.TIMEOUT}, (
        load.result.counts()
    )
    assert forge_load.lost_and_doubled(load.result, iter(table(host, load.result.run)))[0] == set()
    assert status()["live"] == before
    assert until(lambda: host.run("systemctl is-system-running").stdout.strip() == "running", 60, every=1)
    # The same reason again: it is told, and nothing reboots.
    open_window(host)
    for _ in range(2):
        assert "ALERT host: a reboot did not mend this, and is not tried again: libc6 was updated" in look(host)
    assert ready(client)
    # Once it is over, it is forgotten.
    host.check_output("rm /run/reboot-required*")
    assert "ALERT" not in look(host)
    assert host.run("test -e /var/lib/forge/reboot.json").rc != 0
