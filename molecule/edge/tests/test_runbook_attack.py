"""docs/runbooks/under-attack.md: every command of it, while somebody floods the host."""

from __future__ import annotations

import os
from pathlib import Path

import httpx
import pytest
import yaml
from forge_runbook import Place, Runbooks
from forge_scenario import PROJECT, until
from testinfra.host import Host

EPHEMERAL = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"])
PAGE = "under-attack"
DOMAIN = "inbox.example.com"
FILE = "/assets/app.1a2b3c4d.js"
ATTACKER, NEIGHBOUR = "192.0.2.66", "192.0.2.67"


@pytest.fixture(scope="module")
def runbooks() -> Runbooks:
    """The pages, whose commands run on the host."""
    (vm,) = yaml.safe_load((EPHEMERAL / "instance_config.yml").read_text())
    known = f"UserKnownHostsFile={EPHEMERAL / 'known_hosts'}"
    ssh = ("ssh", "-q", "-o", known, "-o", "BatchMode=yes", "-i", vm["identity_file"], f"{vm['user']}@{vm['address']}")
    # What is pasted there is one argument, which ssh hands to a shell.
    return Runbooks(PROJECT / "docs" / "runbooks", {"vm": Place((*ssh, "bash", "-euc"), PROJECT, remote=True)})


def status(client: httpx.Client, who: str) -> int:
    """What somebody whom the load balancer names gets; 0 for no answer."""
    try:
        return client.get(FILE, headers={"X-Forwarded-For": who}).status_code
    except httpx.RemoteProtocolError:
        return 0


def test_under_attack(host: Host, client: httpx.Client, runbooks: Runbooks) -> None:
    """It is found, blocked and let in again, and a neighbour is served all the time."""
    target = host.ansible.get_variables()["ansible_host"]
    flood = (
        f"h2load -n 30000 -c 20 -m 10 -H 'X-Forwarded-For: {ATTACKER}' --connect-to={target}:443 https://{DOMAIN}{FILE}"
    )
    host.check_output(flood)
    assert '"status":429' in runbooks.follow(PAGE, "What is answered")
    most = [line.split()[1] for line in runbooks.follow(PAGE, "Who asks").splitlines() if '"client":' in line]
    assert most[0] == f'"client":"{ATTACKER}"'
    runbooks.follow(PAGE, "Who holds connections")

    before = host.check_output("cat /etc/nginx/denied.conf /run/nginx.pid")
    assert until(lambda: status(client, ATTACKER) == 200, 25)
    with pytest.raises(AssertionError, match="invalid network"):
        runbooks.follow(PAGE, "Block an address", {"address": f"{ATTACKER}0"})
    assert host.check_output("cat /etc/nginx/denied.conf /run/nginx.pid") == before
    runbooks.follow(PAGE, "Block an address", {"address": ATTACKER})
    assert until(lambda: status(client, ATTACKER) == 0, 10)
    runbooks.follow(PAGE, "See that it is blocked", {"address": ATTACKER})
    assert status(client, NEIGHBOUR) == 200
    runbooks.follow(PAGE, "Unblock an address", {"address": ATTACKER})
    assert until(lambda: status(client, ATTACKER) == 200, 10)
    assert host.check_output("cat /etc/nginx/denied.conf /run/nginx.pid") == before
    assert runbooks.left(PAGE) == []
