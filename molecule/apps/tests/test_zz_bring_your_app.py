"""docs/bring-your-app.md, followed literally from an app and a host to a release and back: a ninth app."""

from __future__ import annotations

import json
import os
import ssl
from pathlib import Path

import httpx
import pytest
import yaml
from forge_access import EPHEMERAL, vm
from forge_apps import browser, state
from forge_events import append
from forge_runbook import Place, Runbooks
from forge_scenario import PROJECT, ToHost
from forge_shop import PAGE, control
from forge_wire import address
from testinfra.host import Host

pytestmark = pytest.mark.exhaustive


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A control machine."""
    return control(tmp_path)


@pytest.fixture
def page(project: Path) -> Runbooks:
    """The page, and where its commands run."""
    known = vm()
    options = ("-o", f"UserKnownHostsFile={EPHEMERAL / 'known_hosts'}", "-o", "BatchMode=yes")
    ssh_command = ("ssh", "-q", *options, "-i", known["identity_file"], f"{known['user']}@{known['address']}")
    ansible = {"ANSIBLE_CONFIG": str(project / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1", "ANSIBLE_FORCE_COLOR": "0"}
    return Runbooks(
        PROJECT / "docs",
        {
            "vm": Place((*ssh_command, "bash", "-euc"), PROJECT, remote=True),
            "control": Place(("bash", "-euc"), project, ansible),
        },
    )


def describe(host: Host, file: Path) -> None:
    """Write what the page has a person fill in: how the host is reached, and what this machine needs beside that."""
    known = vm()
    entry = {
        "ansible_host": known["address"],
        "ansible_user": known["user"],
        "ansible_ssh_private_key_file": known["identity_file"],
        "ansible_ssh_common_args": f"-o UserKnownHostsFile={EPHEMERAL / 'known_hosts'} -o IdentitiesOnly=yes",
        "base_package_index_url": os.environ.get("PIP_INDEX_URL", ""),
        # What the apps that the host has already need.
        "postgresql_max_connections": host.ansible.get_variables()["postgresql_max_connections"],
    }
    file.write_text(yaml.safe_dump({"all": {"hosts": {"web1": entry}}}))


def shop(host: Host, project: Path) -> int:
    """How the app answers a client that trusts the CA of the page."""
    trust = ssl.create_default_context(cafile=project / "inventory" / "production" / "tls" / "ca.pem")
    with httpx.Client(transport=ToHost(address(host), verify=trust), timeout=30) as client:
        return client.get("https://shop.example.com/healthz").status_code


def test_from_an_app_to_a_release_and_back(host: Host, page: Runbooks, project: Path) -> None:
    """Every command of the page does what it says, and the apps that were there go on."""
    for section in ("1. Ask whether it will run", "2. Describe the host"):
        page.follow(PAGE, section)
    describe(host, project / "inventory" / "production" / "hosts.yml")
    page.follow(PAGE, "3. Write the entry")
    said = page.follow(PAGE, "4. Provision the host")
    assert "forgectl secrets set shop signing_key" in said
    assert "shop" in page.follow(PAGE, "5. Look")
    assert shop(host, project) == 200
    before = state(host, "shop")["live"]["release"]
    append(project.parent / "shop" / "shop" / "main.py", "AGAIN = 1\n")
    page.follow(PAGE, "6. Deploy")
    assert state(host, "shop")["live"]["release"] != before
    assert shop(host, project) == 200
    page.follow(PAGE, "7. Roll back")
    assert state(host, "shop")["live"]["release"] == before
    assert shop(host, project) == 200
    assert page.left(PAGE) == []
    others = json.loads(host.check_output("forgectl status --json"))["apps"].keys() - {"shop"}
    assert {app: state(host, app)["ready"] for app in others} == dict.fromkeys(others, True)
    with browser(host, "inbox") as client:
        assert client.get("/ready").status_code == 200
