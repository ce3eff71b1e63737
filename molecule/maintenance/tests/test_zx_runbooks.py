"""The runbooks of maintenance: the situation that each page is for, and every command of it."""

from __future__ import annotations

import json
import uuid

import httpx
import pytest
from forge_firmware import Firmware
from forge_receivers import Receivers, alert, state
from forge_runbook import Runbooks
from forge_scenario import CONTAINER, Status, main_pid, podman, reachable, ready, show, until
from testinfra.host import Host

# Whether each page was followed to its end is seen only where all of these run.
pytestmark = pytest.mark.exhaustive

PAGES = ("updates-and-reboot", "maintenance", "alerts-not-delivered", "unit-failed")


@pytest.fixture(scope="module", autouse=True)
def _every_command_was_run(runbooks: Runbooks) -> object:
    """Each page was followed to its end."""
    yield
    assert runbooks.left(*PAGES) == []


def test_maintenance(runbooks: Runbooks, host: Host, client: httpx.Client) -> None:
    page = "maintenance"
    host.check_output("forgectl maintenance inbox on --reason 'a test of the page'")
    runbooks.follow(page, "What you see")
    runbooks.follow(page, "Look")
    runbooks.follow(page, "Mend")
    assert client.get("/ready").status_code == 200
    runbooks.follow(page, "Close an app for a while")
    assert client.get("/ready").status_code == 503
    runbooks.follow(page, "Open it everywhere")
    runbooks.follow(page, "See that it is mended")


def test_alerts_not_delivered(runbooks: Runbooks, host: Host, receivers: Receivers) -> None:
    page, text = "alerts-not-delivered", f"of a runbook {uuid.uuid4().hex}"
    receivers.answer(404)
    alert(host, text)
    until(lambda: (state(host, "webhook")["failing"] or {}).get("attempts", 0) >= 2, 60, every=1)
    runbooks.follow(page, "What you see")
    runbooks.follow(page, "Look")
    runbooks.follow(page, "The receiver has another URL or password")
    receivers.answer(204)
    runbooks.follow(page, "The receiver was away")
    until(lambda: text in receivers.texts(), 60, every=1)
    host.check_output("systemctl kill --signal=KILL forge-alerts.service; systemctl stop forge-alerts.service")
    runbooks.follow(page, "The unit does not run")
    assert show(host, "forge-alerts.service", "ActiveState") == "active"
    runbooks.follow(page, "See that it is mended")


def test_unit_failed(runbooks: Runbooks, host: Host, client: httpx.Client, status: Status) -> None:
    """Somebody took its right to run away from a program."""
    page, live = "unit-failed", status()["live"]
    host.check_output("chmod 0644 /usr/local/sbin/forge-reboot")
    assert host.run("systemctl start forge-reboot.service").rc != 0
    runbooks.follow(page, "What you see")
    runbooks.follow(page, "Look")
    runbooks.follow(page, "Mend")
    assert "forge-reboot" not in runbooks.follow(page, "See that it is mended").replace("is-failed forge-reboot", "")
    assert (status()["live"]["release"], ready(client)) == (live["release"], True)


def test_updates_and_reboot(runbooks: Runbooks, host: Host, client: httpx.Client) -> None:
    """A reboot is due, and Nginx runs with a library that is gone."""
    page = "updates-and-reboot"
    nginx = int(host.check_output("cat /run/nginx.pid"))
    host.check_output("echo libc6 > /run/reboot-required.pkgs && touch /run/reboot-required")
    library = host.check_output("grep --only-matching --max-count=1 '/.*libcrypt.so[^ ]*' /proc/%s/maps", str(nginx))
    # The same file, made anew: what runs has one that is gone.
    host.check_output("cp --preserve %s %s.new && mv %s.new %s", library, library, library, library)
    assert "nginx.service" in json.loads(host.check_output("forge-reboot --report"))["outdated"]
    runbooks.follow(page, "What you see")
    runbooks.follow(page, "Look")
    runbooks.follow(page, "Nginx or an app runs with old files")
    assert int(host.check_output("cat /run/nginx.pid")) != nginx
    assert ready(client)
    host.check_output("systemctl disable --now apt-daily-upgrade.timer")
    runbooks.follow(page, "Updates fail")
    assert show(host, "apt-daily-upgrade.timer", "ActiveState") == "active"
    host.check_output("apt-mark hold tzdata")
    try:
        assert "tzdata" in runbooks.follow(page, "Updates are held back").splitlines()
    finally:
        host.check_output("apt-mark unhold tzdata")
    with Firmware() as firmware:
        runbooks.follow(page, "Reboot")
    assert firmware.boots == 1
    until(lambda: reachable(host) and ready(client), 60, every=0.5)
    runbooks.follow(page, "See that it is mended")
    assert main_pid(host, "nginx.service")
    assert podman("inspect", "--format={{.State.Running}}", CONTAINER).stdout.strip() == b"true"
