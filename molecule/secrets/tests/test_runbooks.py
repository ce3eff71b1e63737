"""docs/runbooks/: every command of every page works, in the situation that the page is for."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from secrets import token_urlsafe
from typing import Any

import httpx
import hvac
import pytest
import requests
import yaml
from forge_events import Provisioning, Unnoticed
from forge_places import control, runbooks
from forge_runbook import Runbooks
from forge_scenario import CONTAINER as HOST
from forge_scenario import PROJECT, podman, ready, secrets_at, until
from forge_vault import (
    CONTAINER,
    PATH,
    accessors,
    cursor,
    destroy_secret_ids,
    down,
    enrol,
    environment,
    health,
    passed,
    said,
    sealed,
    timer,
    unseal_key,
)
from testinfra.host import Host

__all__ = ["control", "runbooks"]

Status = Callable[[], dict[str, Any]]

SHARED = PROJECT / "molecule" / "shared"
EPHEMERAL = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"])
NEW = f"{CONTAINER}-new"
"""The server that takes over."""
PAGES = {"vault-unreachable-or-sealed", "secret-id-expired", "secret-leaked", "moving-to-another-vault"}
IDENTITIES = ("app", "migrate", "rotate")
OVER = "See that it is mended"


@pytest.fixture(scope="module", autouse=True)
def _provisioned(host: Host, provisioning: Provisioning) -> None:
    """As the inventory says."""
    provisioning.ensure(host)


def test_sealed(host: Host, vault: hvac.Client, client: httpx.Client, runbooks: Runbooks) -> None:
    """Vault is sealed: the alert, what clients notice, the unsealing."""
    page = "vault-unreachable-or-sealed"
    with sealed(vault):
        timer(host)
        runbooks.follow(page, "Sealed")
        assert runbooks.follow(page, "Find out which it is").startswith("503 from https://")
        runbooks.follow(page, "What clients notice")
        assert ready(client)
        runbooks.follow(page, "Unseal it", {"unseal-key": unseal_key()})
        until(lambda: health(vault) == 200, 20)
        runbooks.follow(page, OVER)


@pytest.mark.exhaustive
def test_unreachable(host: Host, vault: hvac.Client, live: str, client: httpx.Client, runbooks: Runbooks) -> None:
    """Vault is down while a slot has to start: what the page says of the waiting slot is so."""
    page = "vault-unreachable-or-sealed"
    with down(vault):
        timer(host)
        runbooks.follow(page, "Unreachable")
        assert "\n000 from https://" in runbooks.follow(page, "Find out which it is")
        since = cursor(host)
        host.check_output("systemctl restart --no-block %s", live)
        until(lambda: said(host, since, live), 30)
        assert "forge-launch: inbox: Vault at" in runbooks.follow(page, "After a reboot or a crash")
    assert runbooks.follow(page, "Find out which it is").startswith(("200 from https://", "503 from https://"))
    assert until(lambda: ready(client), 60, every=0.5)
    runbooks.follow(page, OVER)


@pytest.mark.exhaustive
def test_secret_id_expired(host: Host, vault: hvac.Client, client: httpx.Client, live: str, runbooks: Runbooks) -> None:
    """All of them ended, while a slot had to start."""
    page = "secret-id-expired"
    for identity in IDENTITIES:
        enrol(vault, identity, ttl="8s")
    until(lambda: rejected(host) == 3, 30)
    timer(host)
    runbooks.follow(page, "What you see")
    runbooks.follow(page, "Look")
    host.check_output("systemctl restart --no-block %s", live)
    wrapped = runbooks.follow(page, "Ask for one")
    runbooks.follow(page, "Seal it", {"wrapping-token": wrapped.strip()})
    assert until(lambda: ready(client), 60, every=0.5)
    runbooks.follow(page, OVER)


def test_secret_id_destroyed(host: Host, vault: hvac.Client, runbooks: Runbooks) -> None:
    """All of them, by someone: the control machine brings others."""
    page = "secret-id-expired"
    for identity in IDENTITIES:
        destroy_secret_ids(vault, f"forge-inbox-{identity}")
    assert rejected(host) == 3
    runbooks.follow(page, "With the control machine")
    runbooks.follow(page, OVER)


def rejected(host: Host) -> int:
    """How many identities Vault does not accept."""
    return str(host.run("forgectl secrets check inbox").stdout).count(": rejected")


def test_secret_leaked(
    unnoticed: Unnoticed, host: Host, vault: hvac.Client, status: Status, runbooks: Runbooks
) -> None:
    """Everything is changed while clients go on, and what leaked is worth nothing afterwards."""
    page = "secret-leaked"
    values, migration = secrets_at(vault, PATH), secrets_at(vault, "forge/inbox/migrate")
    with unnoticed("runbook: secret leaked"):
        runbooks.follow(page, "Change a value")
        runbooks.follow(page, "Change the database password")
    now = environment(host, f"inbox@{status()['live']['slot']}.service")
    assert now["PARTNER_TOKEN"] != values["partner_token"]
    assert now["FORGE_DATABASE_PASSWORD"] != values["database_password"]
    metadata = vault.secrets.kv.v2.read_secret_metadata(PATH)["data"]
    alive = [version for version, seen in metadata["versions"].items() if not seen["destroyed"]]
    assert len(alive) <= 2, metadata  # the one with the new value, and that with the new password

    runbooks.follow(page, "Change the migrations' password")
    assert secrets_at(vault, "forge/inbox/migrate")["database_password"] != migration["database_password"]
    before = set(accessors(vault))
    runbooks.follow(page, "Replace the secret ids")
    assert len(accessors(vault)) == 1
    assert not before & set(accessors(vault))

    leaked = vault.auth.token.create(policies=["forge-control"], no_parent=True)["auth"]["client_token"]
    runbooks.follow(page, "Replace the control machine's token", environment={"LEAKED": leaked})
    with pytest.raises(hvac.exceptions.Forbidden):
        vault.auth.token.lookup(leaked)
    runbooks.follow(page, OVER)
    found = runbooks.follow(page, "Look for it on the host", {"leaked": values["partner_token"]})
    assert {"files: none", "lines of rotated logs: 0", "lines of the journal: 0"} <= set(found.splitlines())


def test_search_of_the_runbook_finds(host: Host, runbooks: Runbooks) -> None:
    """In a file, whatever its folder is called; in a rotated log; and in a long entry of the journal."""
    planted = token_urlsafe(32)
    text = f"before {planted} after\n".encode()
    file, log = "/srv/credentials/sys/planted", "/var/log/planted.log.2.gz"
    host.check_output("mkdir --parents %s", str(Path(file).parent))
    write(file, text)
    write(log, gzip.compress(text))
    podman("exec", "--interactive", HOST, "systemd-cat", input=b"x" * 2000 + text)
    host.check_output("journalctl --sync")
    try:
        found = runbooks.follow("secret-leaked", "Look for it on the host", {"leaked": planted})
    finally:
        host.check_output("rm --recursive /srv/credentials %s", log)
    assert f"files: {file}\n" in found
    assert "lines of rotated logs: 1\n" in found
    assert "lines of the journal: 1\n" in found


def write(path: str, content: bytes) -> None:
    """Write a file on the host, past Ansible, which writes down what it does."""
    podman("exec", "--interactive", HOST, "sh", "-c", f"cat > {path}", input=content)


@pytest.fixture
def new_vault(control: Path, elsewhere: dict[str, str]) -> Iterator[dict[str, str]]:
    """How to reach another server, which is set up but for the values; the inventory is changed for it."""
    state = EPHEMERAL / "vault-new"
    image = subprocess.run(
        [SHARED / "image", os.environ.get("DISTRO", "trixie")], capture_output=True, text=True, check=True
    ).stdout.strip()
    network = CONTAINER.removesuffix("-vault")
    up = (sys.executable, str(SHARED / "vault.py"), "up", "--container", NEW, "--network", network, "--number", "6")
    host_vars = control / "inventory" / "production" / "host_vars"
    host_vars.mkdir()
    try:
        options = ("--image", image, "--state", str(state), "--app", "inbox", "--audit")
        told = json.loads(subprocess.run((*up, *options), capture_output=True, check=True).stdout)
        root_token = json.loads((state / "init.json").read_text())["root_token"]
        # From which the inventory has address, CA, role ids and token.
        lookup = f"{{{{ lookup('ansible.builtin.file', '{state}/control.json') | from_json }}}}"
        (host_vars / "vm.yml").write_text(yaml.safe_dump({"vault_control": lookup}))
        yield {"NEW_ADDR": told["address"], "NEW_CACERT": told["ca_file"], "NEW_TOKEN": root_token}
        elsewhere |= {f"{name} at the new server": secret for name, secret in passed(NEW).items()}
    finally:
        shutil.rmtree(host_vars, ignore_errors=True)
        podman("rm", "--force", "--ignore", "--time", "0", NEW)
        podman("volume", "rm", "--force", NEW)


@pytest.mark.exhaustive
def test_moving_to_another_vault(
    unnoticed: Unnoticed,
    host: Host,
    status: Status,
    runbooks: Runbooks,
    vault: hvac.Client,
    new_vault: dict[str, str],
    provisioning: Provisioning,
) -> None:
    """Clients notice nothing; the old server may be down afterwards, and there is no way back even while it is up."""
    page = "moving-to-another-vault"
    before = status()["live"]["release"]
    provisioning.forget()
    runbooks.follow(page, "Set up the new server", environment=new_vault)
    with unnoticed("runbook: moving to another Vault"):
        runbooks.follow(page, "Move the host")
    assert status()["live"]["release"] != before
    with down(vault):
        assert new_vault["NEW_ADDR"] in runbooks.follow(page, OVER)
    refused = host.run("forgectl rollback inbox")
    assert (refused.rc, f"of Vault at {vault.url} is not trusted" in refused.stderr) == (6, True), refused.stderr
    # Here it is the other one that is left behind: the host moves back with the next provisioning.
    old = {f"BAO_{name.removeprefix('NEW_')}": value for name, value in new_vault.items()}
    runbooks.follow(page, "Close the door behind you", environment=old)
    session = requests.Session()
    # No proxy in between.
    session.trust_env = False
    session.verify = old["BAO_CACERT"]
    left = hvac.Client(url=old["BAO_ADDR"], token=old["BAO_TOKEN"], session=session)
    assert [name for name in left.sys.list_policies()["data"]["policies"] if name.startswith("forge-inbox")] == []


@pytest.mark.exhaustive
def test_every_command_was_run(runbooks: Runbooks) -> None:
    """No page has a command that no test of this module has seen work."""
    assert runbooks.left(*PAGES) == []
