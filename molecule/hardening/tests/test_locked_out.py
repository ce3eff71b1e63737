"""docs/runbooks/locked-out.md: every command of it works, on a host that its operator can't get into."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import testinfra
from forge_access import DROP_IN, EPHEMERAL, access, begin, gets_in, plan, ssh, vm
from forge_runbook import Place, Runbooks
from forge_scenario import CONTAINER, PODMAN, PROJECT, until
from testinfra.host import Host

PAGE = "locked-out"
PATIENCE = 40


@pytest.fixture(scope="module")
def runbooks(tmp_path_factory: pytest.TempPathFactory) -> Runbooks:
    """The page, and where its commands run: the console is the container's."""
    folder = tmp_path_factory.mktemp("control")
    for name in ("ansible.cfg", "playbooks", "plugins", "roles", "site.yml", "app"):
        (folder / name).symlink_to(PROJECT / name)
    shutil.copytree(Path(os.environ["MOLECULE_INVENTORY_FILE"]).parent, folder / "inventory" / "production")
    known = vm()
    options = ("-o", f"UserKnownHostsFile={EPHEMERAL / 'known_hosts'}", "-o", "BatchMode=yes", "-o", "ControlPath=none")
    ssh_command = ("ssh", "-q", *options, "-i", known["identity_file"], f"{known['user']}@{known['address']}")
    # A connection of its own each time, as of somebody who has none.
    fresh = "-o ControlMaster=no -o ControlPath=none"
    ansible = {
        "ANSIBLE_CONFIG": str(folder / "ansible.cfg"),
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_FORCE_COLOR": "0",
        "ANSIBLE_SSH_ARGS": fresh,
        "ANSIBLE_TIMEOUT": "5",
    }
    return Runbooks(
        PROJECT / "docs" / "runbooks",
        {
            "vm": Place((*ssh_command, "bash", "-euc"), PROJECT, remote=True),
            "control": Place(("bash", "-euc"), folder, ansible),
            "console": Place((str(PODMAN), "exec", "--interactive", CONTAINER, "bash", "-lec"), PROJECT),
        },
    )


@pytest.fixture(scope="module")
def inside() -> Host:
    """The host without SSH, for SSH is what is lost here."""
    return testinfra.get_host(f"podman://{CONTAINER}")


@contextmanager
def over_in_the_end(inside: Host, runbooks: Runbooks) -> Iterator[None]:
    """What comes within has to bring everything back; the page says how to see that."""
    before = access(inside)
    try:
        yield
    except BaseException:
        # The tests that follow have to get in.
        console("fail2ban-client unban --all; forge-trial undo; systemctl restart forge-firewall.service ssh.service")
        raise
    finally:
        # The tests' own connection has lost packets for a while; another one is there at once.
        shared = ("-o", f"ControlPath={EPHEMERAL}/ssh-%h", vm()["address"])
        subprocess.run(["ssh", "-O", "exit", *shared], capture_output=True, timeout=20, check=False)
    assert until(gets_in, PATIENCE, every=1)
    runbooks.follow(PAGE, "See that it is mended")
    assert access(inside) == before


@pytest.mark.exhaustive
def test_banned(inside: Host, runbooks: Runbooks) -> None:
    """By hand, as the operator who is logged in is not banned; the tests' own connection is cut off by it, too."""
    address = f"{vm()['address'].rpartition('.')[0]}.1"
    with over_in_the_end(inside, runbooks):
        console(f"fail2ban-client set sshd banip {address}")
        until(lambda: not gets_in(), PATIENCE, every=0.5)
        runbooks.follow(PAGE, "What you see")
        assert address in runbooks.follow(PAGE, "A ban")


def test_shut_out(inside: Host, runbooks: Runbooks) -> None:
    """By rules that somebody loaded by hand."""
    with over_in_the_end(inside, runbooks):
        handle = "nft --handle list table inet forge | sed -n 's/.*dport 22 .*handle //p'"
        console(f"nft delete rule inet forge input handle $({handle})")
        assert not gets_in()
        runbooks.follow(PAGE, "The firewall")


def test_a_trial_that_has_not_ended(inside: Host, runbooks: Runbooks) -> None:
    """Of a configuration that lets nobody in, for ten minutes."""
    with over_in_the_end(inside, runbooks):
        shut = plan(inside, 600, firewall="flush chain inet forge input")
        assert begin(inside, shut).rc == 0
        assert not gets_in()
        assert '"seconds": 600' in runbooks.follow(PAGE, "Go to the console")


@pytest.mark.exhaustive
def test_sshd_does_not_start(inside: Host, runbooks: Runbooks) -> None:
    """Somebody edited the drop-in by hand."""
    with over_in_the_end(inside, runbooks):
        console(f"echo 'NoSuchOption yes' >> {DROP_IN}; systemctl restart ssh.service || true")
        assert not gets_in()
        runbooks.follow(PAGE, "sshd does not run")
        until(gets_in, PATIENCE, every=0.5)
        runbooks.follow(PAGE, "The firewall")


def test_a_lost_key(inside: Host, runbooks: Runbooks, tmp_path: Path) -> None:
    """Another one gets the operator in."""
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    assert ssh("true", "BatchMode=yes", identity=str(key)).returncode == 255
    with over_in_the_end(inside, runbooks):
        runbooks.follow(PAGE, "A key", {"public-key": Path(f"{key}.pub").read_text().strip()})
        assert ssh("true", "BatchMode=yes", identity=str(key)).returncode == 0
        console("sed -i '$d' ~admin/.ssh/authorized_keys")


@pytest.mark.exhaustive
def test_every_command_was_run(runbooks: Runbooks) -> None:
    """The page has no command that no test of this module has seen work."""
    assert runbooks.left(PAGE) == []


def console(command: str) -> None:
    """Run a command on the host, without SSH."""
    subprocess.run([PODMAN, "exec", CONTAINER, "bash", "-c", command], check=True, capture_output=True, timeout=60)
