"""After a reboot everything is back without a hand. Last, because it takes the host down."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from forge_scenario import until
from testinfra.host import Host

PODMAN = Path(os.environ["MOLECULE_PROJECT_DIRECTORY"]) / "molecule" / "shared" / "podman"
CONTAINER = f"forge-{os.environ['MOLECULE_SCENARIO_NAME']}-vm"


def ready(client: httpx.Client) -> bool:
    """Whether the app answers through Nginx and TLS."""
    try:
        return client.get("/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def reboot(client: httpx.Client, *arguments: str) -> None:
    """Reboot the host, orderly or not, and wait for the app."""
    subprocess.run([PODMAN, "restart", *arguments, CONTAINER], check=True, capture_output=True)
    assert until(lambda: ready(client), 90, every=0.5)


def test_reboot(host: Host, client: httpx.Client, status: Callable[[], dict[str, Any]], live: str) -> None:
    """The same release in the same slot with its limits, its data, and the journal of before."""
    posted = client.post(
        "/v1/events", json={"type": "boot.tested", "payload": {}}, headers={"Idempotency-Key": uuid.uuid4().hex}
    )
    before = status()["live"]
    limit = host.service(live).systemd_properties["MemoryMax"]
    boot = host.check_output("cat /proc/sys/kernel/random/boot_id; systemctl show --property=UserspaceTimestamp")
    reboot(client, "--time", "30")
    assert host.check_output("systemctl show --property=UserspaceTimestamp") not in boot
    assert status()["live"] == before
    assert host.check_output("readlink /run/inbox/live.sock") == f"{before['slot']}.sock"
    assert host.service(live).systemd_properties["MemoryMax"] == limit
    assert client.get(f"/v1/events/{posted.json()['id']}").status_code == 200
    assert until(lambda: host.run("systemctl is-system-running").stdout.strip() == "running", 60, every=1)
    logged = host.check_output("journalctl --no-pager --output=cat --grep=%s", posted.headers["x-request-id"])
    assert posted.headers["x-request-id"] in logged


def test_power_cut_with_leftovers(host: Host, client: httpx.Client, status: Callable[[], dict[str, Any]]) -> None:
    """No orderly stop, a half-written state beside the whole one, a link of a killed swap: it comes back."""
    before = status()["live"]
    host.check_output("echo '{\"live\"' > /var/lib/forge/inbox/.state.json.new")
    host.check_output("ln --symbolic --force green.sock /run/inbox/.live.sock.new")
    reboot(client, "--time", "0")
    assert status()["live"] == before
    assert until(lambda: host.run("systemctl is-system-running").stdout.strip() == "running", 60, every=1)
