"""Updates by themselves: what runs with replaced files is replaced in turn, and no client notices."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from forge_events import EventContext, assert_one_live
from forge_scenario import Status, main_pid, ready, show, until
from testinfra.host import Host

INSTALL = "DEBIAN_FRONTEND=noninteractive apt-get install --yes --reinstall"
UPGRADE = "/usr/local/sbin/forge-nginx-upgrade"
RESTART_NGINX = "/etc/needrestart/restart.d/nginx.service"


def packages(host: Host, *files: str) -> str:
    """The packages that files belong to."""
    return " ".join(host.check_output("dpkg-query --search %s", file).split(":")[0] for file in files)


def library(host: Host, pid: int, name: str) -> str:
    """The file that a process has mapped of a library."""
    maps = host.check_output("cat /proc/%s/maps", str(pid))
    return str(next(line.split()[5] for line in maps.splitlines() if f"/{name}" in line))


def master(host: Host) -> int:
    """The process of Nginx that new connections belong to."""
    return int(host.check_output("cat /run/nginx.pid"))


def outdated(host: Host) -> set[str]:
    """The units that needrestart finds with what was replaced."""
    lines = host.check_output("needrestart -b -l").splitlines()
    return {line.partition(": ")[2] for line in lines if line.startswith("NEEDRESTART-SVC")}


@pytest.fixture(autouse=True)
def _settled(host: Host) -> Iterator[None]:
    """An Nginx that drains stands in the way of the next upgrade."""
    yield
    until(lambda: host.run("test -e /run/nginx.pid.oldbin").rc != 0, 60, every=0.5)


def test_updates_under_everything(event: EventContext, host: Host, status: Status) -> None:
    """Of Nginx itself, of OpenSSL and of Python at once: Nginx and the app are replaced, PostgreSQL waits."""
    nginx, before = master(host), status()["live"]
    app = main_pid(host, f"inbox@{before['slot']}.service")
    postgres = int(host.check_output("head --lines=1 $(ls /var/lib/postgresql/*/main/postmaster.pid)"))
    ssl = library(host, nginx, "libssl")
    python = host.check_output("readlink --canonicalize /proc/%s/exe", str(app))
    names = packages(host, "/usr/sbin/nginx", "/etc/init.d/nginx", ssl, python)
    with event(f"update of {names}", idle=True):
        done = host.run(f"{INSTALL} {names}")
        assert done.rc == 0, done.stdout + done.stderr
        assert master(host) != nginx, done.stdout
    after = status()["live"]
    assert (after["release"], after["slot"] != before["slot"]) == (before["release"], True), done.stdout
    assert_one_live(host, status, before["release"])
    assert show(host, "nginx.service", "ActiveState") == "active"
    # systemd has followed Nginx to its new first process, and the old one is gone with its last stream.
    until(lambda: main_pid(host, "nginx.service") == master(host), 60, every=0.5)
    left = until(
        lambda: (found := outdated(host)) and not {"nginx.service", f"inbox@{after['slot']}.service"} & found, 60
    )
    assert left
    assert any(unit.startswith("postgresql@") for unit in outdated(host))
    assert host.run("kill -0 %s", str(postgres)).rc == 0
    # What is left is why a reboot is due.
    host.check_output("systemctl start forge-reboot.service")
    said = host.check_output("journalctl --unit=forge-reboot.service --lines=1 --output=cat")
    assert "postgresql@" in said


def test_upgrade_while_streams_of_the_last_one_drain(host: Host, client: httpx.Client) -> None:
    """They get their time, and are cut then; nothing is restarted, and requests are answered throughout."""
    began = show(host, "nginx.service", "ActiveEnterTimestampMonotonic")
    first = master(host)
    with client.stream("GET", "/v1/events/stream", headers={"Accept": "text/event-stream"}) as stream:
        assert stream.status_code == 200
        host.check_output(f"{UPGRADE} 2")
        second = master(host)
        assert second != first
        # Its stream holds the first one.
        assert host.run("kill -0 %s", str(first)).rc == 0
        host.check_output(f"{UPGRADE} 2")
        assert master(host) not in (first, second)
        assert host.run("kill -0 %s", str(first)).rc != 0
    assert ready(client)
    assert show(host, "nginx.service", "ActiveEnterTimestampMonotonic") == began


def test_upgrade_that_does_not_hold_leaves_the_old_one(host: Host, client: httpx.Client) -> None:
    """A configuration that the new one refuses: the old one goes on with its own, and an alert says so."""
    before = master(host)
    host.check_output("echo 'nonsense on;' > /etc/nginx/forge/zz.conf")
    try:
        assert host.run(RESTART_NGINX).rc == 1
    finally:
        host.check_output("rm /etc/nginx/forge/zz.conf")
    assert (master(host), ready(client)) == (before, True)
    assert host.run("test -e /run/forge-nginx-leaving").rc != 0
    said = host.check_output("journalctl --identifier=forge-nginx-upgrade --priority=err --lines=1 --output=cat")
    assert said.startswith("ALERT host: Nginx still runs with what was replaced: its configuration does not hold")


@pytest.mark.exhaustive
def test_new_nginx_that_does_not_start_leaves_the_old_one(host: Host, client: httpx.Client) -> None:
    """Its program is there and says that all is well, and then ends: the old one has the ports and keeps them."""
    before = master(host)
    broken = '#!/bin/sh\\ncase " $* " in *" -t "*) exec /usr/sbin/nginx.real "$@" ;; esac\\nexit 1\\n'
    host.check_output(f"mv /usr/sbin/nginx /usr/sbin/nginx.real && printf '{broken}' > /usr/sbin/nginx")
    host.check_output("chmod 0755 /usr/sbin/nginx")
    try:
        assert host.run(f"{UPGRADE} 2").rc == 1
    finally:
        host.check_output("mv /usr/sbin/nginx.real /usr/sbin/nginx")
    assert (master(host), ready(client)) == (before, True)
    assert show(host, "nginx.service", "ActiveState") == "active"


def test_slot_without_traffic_is_left_alone(host: Host, status: Status) -> None:
    """needrestart may find both slots outdated while one drains: only the live one is replaced, once."""
    live = status()["live"]
    idle = "green" if live["slot"] == "blue" else "blue"
    host.check_output("/etc/needrestart/restart.d/inbox@%s.service", idle)
    assert status()["live"] == live


def test_nginx_that_was_killed_is_started_again(host: Host, client: httpx.Client) -> None:
    """By systemd, at once."""
    before = main_pid(host, "nginx.service")
    host.check_output("kill -KILL %s", str(before))
    until(lambda: ready(client), 20, every=0.5)
    assert main_pid(host, "nginx.service") not in (0, before)
