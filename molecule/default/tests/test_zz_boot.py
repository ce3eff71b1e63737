"""After a reboot everything is back without a hand. Last, because it takes the host down."""

from __future__ import annotations

import json
import uuid

import httpx
from forge_scenario import Status, cgroup_value, reboot, until
from testinfra.host import Host

CONFIG = "/etc/forge/apps/inbox.d/gunicorn.conf.py"


def test_reboot(host: Host, client: httpx.Client, status: Status, live: str) -> None:
    """The same release in the same slot with its limits, its data, and the journal of before."""
    posted = client.post(
        "/v1/events", json={"type": "boot.tested", "payload": {}}, headers={"Idempotency-Key": uuid.uuid4().hex}
    )
    before = status()["live"]
    limit = cgroup_value(host, live, "memory", "memory.limit_in_bytes", "memory.max")
    boot = host.check_output("cat /proc/sys/kernel/random/boot_id; systemctl show --property=UserspaceTimestamp")
    reboot(client, patience=30)
    assert host.check_output("systemctl show --property=UserspaceTimestamp") not in boot
    assert status()["live"] == before
    assert host.check_output("readlink /run/inbox/live.sock") == f"{before['slot']}.sock"
    assert limit.isdigit()
    assert cgroup_value(host, live, "memory", "memory.limit_in_bytes", "memory.max") == limit
    assert client.get(f"/v1/events/{posted.json()['id']}").status_code == 200
    assert until(lambda: host.run("systemctl is-system-running").stdout.strip() == "running", 60, every=1)
    logged = host.check_output("journalctl --no-pager --output=cat --grep=%s", posted.headers["x-request-id"])
    assert posted.headers["x-request-id"] in logged


def test_power_cut_with_leftovers(host: Host, client: httpx.Client, status: Status) -> None:
    """No orderly stop, a half-written state beside the whole one, a live.sock that leads elsewhere: it comes back."""
    before = status()["live"]
    stale = "/etc/tmpfiles.d/stale.conf"
    host.check_output("echo '{\"live\"' > /var/lib/forge/inbox/.state.json.new")
    # /run is empty after a reboot, so systemd-tmpfiles leaves the links there before anything else runs.
    links = "L+ /run/inbox/live.sock - - - - /run/foreign.sock\nL+ /run/inbox/.live.sock.new - - - - green.sock\n"
    host.check_output("printf %s > " + stale, links)
    try:
        reboot(client, patience=0)
    finally:
        host.check_output("rm " + stale)
    assert status()["live"] == before
    assert host.check_output("readlink /run/inbox/live.sock") == f"{before['slot']}.sock"
    assert until(lambda: host.run("systemctl is-system-running").stdout.strip() == "running", 60, every=1)


def test_power_cut_during_a_release(host: Host, client: httpx.Client, status: Status) -> None:
    """The candidate was starting when everything stopped: what served before serves, and the release is over."""
    before = status()["live"]
    record = json.loads(host.check_output("cat /srv/inbox/releases/%s/release.json", before["release"]))
    host.check_output("cp --preserve %s /var/tmp/gunicorn.conf.py", CONFIG)
    try:
        host.check_output("echo 'import time; time.sleep(600)' >> %s", CONFIG)
        command = "systemd-run --quiet --unit=forge-cut forgectl release inbox --source-digest %s"
        host.check_output(command, record["source_digest"])
        cut = until(lambda: (found := status()["operation"]) and found["phase"] == "starting" and found, 30)
        reboot(client, patience=0)
    finally:
        host.check_output("mv /var/tmp/gunicorn.conf.py %s", CONFIG)
    after = status()
    assert (after["live"], after["operation"]) == (before, None)
    assert (after["last"]["release"], after["last"]["outcome"]) == (cut["release"], "failed")
    assert after["slots"][cut["slot"]]["service"] == "inactive"
    assert until(lambda: host.run("systemctl is-system-running").stdout.strip() == "running", 60, every=1)
