"""docs/runbooks/host-compromised.md: every command of it, up to another host in the place of the one that is lost."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import hvac
import pytest
from forge_places import EPHEMERAL, control, runbooks
from forge_runbook import Runbooks
from forge_scenario import CONTAINER, PLAYBOOK_SECONDS, PROJECT, playbook, podman, ready, secrets_at, until
from forge_vault import accessors
from testinfra.host import Host

__all__ = ["control", "runbooks"]

PAGE = "host-compromised"
PATHS = ("forge/inbox/app", "forge/inbox/migrate")


@pytest.fixture
def _open(host: Host) -> Iterator[None]:
    """Whatever becomes of the isolation."""
    yield
    podman(
        "exec",
        CONTAINER,
        "sh",
        "-c",
        "nft delete table inet quarantine || true; systemctl stop quarantine-undo.timer || true",
    )
    host.run("rm --recursive --force /run/evidence*")


def answers(address: str, port: int) -> bool:
    """Whether somebody elsewhere gets a connection."""
    try:
        with socket.create_connection((address, port), timeout=3):
            return True
    except OSError:
        return False


@pytest.mark.usefixtures("_open")
def test_evidence_and_isolation(
    host: Host, client: httpx.Client, vault: hvac.Client, runbooks: Runbooks, control: Path
) -> None:
    """What is taken tells a lot and holds no secret; whoever isolates it is still let in, and nobody else."""
    runbooks.follow(PAGE, "Take evidence")
    (archive,) = (control / "evidence").rglob("evidence.tar.gz")
    with tarfile.open(archive) as tar:
        files = {member.name: tar.extractfile(member) for member in tar.getmembers() if member.isfile()}
        content = {name: file.read() for name, file in files.items() if file}
    assert {"processes", "sockets", "journal", "changed", "packages", "units"} <= {Path(name).name for name in content}
    assert b"gunicorn" in content["evidence/processes"]
    assert b":443" in content["evidence/sockets"]
    stored = [item for path in PATHS for item in secrets_at(vault, path).items()]
    known = [value for key, value in stored if key != "database_user"]
    known += host.check_output("sed --quiet 2,3p /etc/nginx/tls/inbox.key").split()
    assert [name for name, data in content.items() if any(secret.encode() in data for secret in known)] == []
    # It is in memory only, and nobody but root gets at it.
    assert host.file("/run/evidence.tar.gz").mode == 0o600

    address = host.ansible.get_variables()["ansible_host"]
    assert answers(address, 443)
    runbooks.follow(PAGE, "Isolate")
    assert not answers(address, 443)
    runbooks.follow(PAGE, "Confirm")
    out = f"import socket; socket.create_connection(('{vault.url.split('/')[2].split(':')[0]}', 8200), timeout=3)"
    assert podman_fails("python3", "-c", out)
    assert host.run("systemctl is-active quarantine-undo.timer").rc != 0
    podman("exec", CONTAINER, "nft", "delete", "table", "inet", "quarantine")
    assert answers(address, 443)
    assert ready(client)


def podman_fails(*command: str) -> bool:
    """Whether a command fails on the host."""
    try:
        podman("exec", CONTAINER, *command)
    except subprocess.CalledProcessError:
        return True
    return False


@pytest.mark.usefixtures("_open")
def test_isolation_that_nobody_confirms_ends(host: Host, runbooks: Runbooks) -> None:
    """What it arms for that opens the host: called here as systemd does when its time has come."""
    runbooks.follow(PAGE, "Isolate")
    assert host.check_output("systemctl is-active quarantine-undo.timer") == "active"
    podman("exec", CONTAINER, "systemctl", "start", "quarantine-undo.service")
    assert answers(host.ansible.get_variables()["ansible_host"], 443)


@pytest.mark.exhaustive
def test_another_host_takes_its_place(host: Host, client: httpx.Client, vault: hvac.Client, runbooks: Runbooks) -> None:
    """The identities of the old one open nothing, its secrets are no more; a bare host serves with others."""
    before = {path: secrets_at(vault, path) for path in PATHS}
    known = set(accessors(vault))
    runbooks.follow(PAGE, "Revoke what it had from Vault")
    assert not known & set(accessors(vault))
    assert host.run("forgectl secrets check inbox").rc == 6
    runbooks.follow(PAGE, "Change what it knew")
    after = {path: secrets_at(vault, path) for path in PATHS}
    kept = {key for path in PATHS for key in after[path] if before[path][key] == after[path][key]}
    assert kept <= {"database_user"}

    podman("rm", "--force", "--time", "0", CONTAINER)
    told = {
        "scenario": os.environ["MOLECULE_SCENARIO_NAME"],
        "platforms": [{"name": "vm", "distribution": os.environ.get("DISTRO", "trixie")}],
        "state_directory": str(EPHEMERAL),
    }
    create = ["ansible-playbook", "molecule/shared/create.yml", "--extra-vars", json.dumps(told)]
    environment = {**os.environ, "ANSIBLE_NOCOLOR": "1", "ANSIBLE_FORCE_COLOR": "0"}
    booted = subprocess.run(
        create, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False, timeout=PLAYBOOK_SECONDS
    )
    assert booted.returncode == 0, booted.stdout
    # It has the address of the one before, of which neighbours may remember another place.
    address = host.ansible.get_variables()["ansible_host"]
    assert until(lambda: answers(address, 22), 90, every=0.5)
    runbooks.follow(PAGE, "Rebuild")
    assert until(lambda: ready(client), 30, every=0.5)
    runbooks.follow(PAGE, "See that it is mended")
    again = playbook()
    assert "changed=0 " in again.stdout, again.stdout
    assert [step for step in runbooks.left() if step.startswith(f"{PAGE}:")] == []
