"""After a reboot the app is back with the secrets that it had, as soon as Vault is there; and provisioning agrees."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import httpx
import hvac
import pytest
from forge_events import Provisioning, answer, assert_one_live, forgectl, psql, run_playbook, settle
from forge_scenario import CONTAINER, podman, reachable, ready, secrets_at, show, until
from forge_vault import PATH, changed, cursor, down, said
from testinfra.host import Host

Status = Callable[[], dict[str, Any]]

PASSWORDS = "SELECT rolname FROM pg_authid WHERE rolname ~ '^inbox_app' AND rolpassword IS NOT NULL"


@pytest.fixture(scope="module", autouse=True)
def _provisioned(host: Host, provisioning: Provisioning) -> None:
    """As the inventory says."""
    provisioning.ensure(host)


def reboot() -> None:
    """Reboot the host, in order."""
    podman("restart", "--time", "30", CONTAINER)


def running(host: Host) -> bool:
    """Whether systemd is content with the host."""
    return str(host.run("systemctl is-system-running").stdout).strip() == "running"


def test_reboot_in_the_midst_of_it(host: Host, client: httpx.Client, vault: hvac.Client, status: Status) -> None:
    """A new database password was being watched, and a version that is no good was written.

    What serves afterwards has the version that it was checked with, whatever was written since, and the password that
    the database knows; the other role has none any more.
    """
    answer(forgectl(host, "secrets", "rotate", "inbox", "--database-password", "--no-wait", "--json"))
    before = status()["live"]
    with changed(vault, lambda values: values.pop("signing_key")):
        reboot()
        assert until(lambda: ready(client), 90, every=0.5)
        settle(status)
        assert status()["live"] == before
        assert_one_live(host, status, before["release"])
        assert until(lambda: psql(host, PASSWORDS) == secrets_at(vault, PATH)["database_user"], 30, every=0.5)
    assert client.get("/v1/events?limit=1").status_code == 200
    assert until(lambda: running(host), 60, every=1)


def test_reboot_with_vault_down(host: Host, vault: hvac.Client, client: httpx.Client, status: Status) -> None:
    """Clients get an error meanwhile, the journal says why, and the app is there by itself when Vault is."""
    before = status()["live"]
    service = f"inbox@{before['slot']}.service"
    since = cursor(host)
    with down(vault):
        reboot()
        until(lambda: reachable(host), 60)
        lines = until(lambda: said(host, since, service), 60, every=0.5)
        assert all("is unreachable (" in line for line in lines), lines
        assert not ready(client)
        # Longer than a start asks: systemd has begun another.
        unit = partial(show, host, service)
        until(lambda: unit("NRestarts") != "0", 60, every=0.5)
        assert until(lambda: len(said(host, since, service)) > len(lines), 30, every=0.5)
        assert not ready(client)
    assert until(lambda: ready(client), 60, every=0.5)
    assert status()["live"] == before
    assert until(lambda: running(host), 60, every=1)


def test_provisioning_finds_nothing_to_change(host: Host) -> None:
    """After all of that."""
    again = run_playbook(host, "site.yml")
    assert again.returncode == 0, again.stdout
    assert "changed=0 " in again.stdout, again.stdout
