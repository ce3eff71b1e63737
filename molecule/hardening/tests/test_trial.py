"""A mistake in SSH or the firewall locks nobody out: it is undone, whatever becomes of the run that made it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from forge_access import DROP_IN, PENDING, access, begin, gets_in, plan, rules, ssh, vm
from forge_scenario import PROJECT, playbook, until
from testinfra.host import Host

PATIENCE = 60
# Mistakes that no check of the syntax finds: no port of SSH's is open; no host key is left that the operator knows.
NO_PORT: dict[str, object] = {"__hardening_open": []}
NO_KEY: dict[str, object] = {"__hardening_host_key_algorithms": ["rsa-sha2-512"]}
# Stands in for a program that forge-trial calls, and kills forge-trial at its nth such call, before it or after it.
KILLER = """#!/bin/sh
n=$(($(cat /run/calls) + 1))
echo $n > /run/calls
[ $n != {before} ] || { kill -KILL $PPID; exit 1; }
PATH=/usr/sbin:/usr/bin:/sbin:/bin "${0##*/}" "$@"
status=$?
[ $n != {after} ] || kill -KILL $PPID
exit $status
"""
# Logs in from the host itself, with a key of its own for that.
LOOP = """
ssh-keygen -q -t ed25519 -N '' -f /root/loop
cat /root/loop.pub >> /home/admin/.ssh/authorized_keys
ssh -i /root/loop -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null admin@$1 sudo forge-trial confirm $2
status=$?
sed -i '$d' /home/admin/.ssh/authorized_keys
rm /root/loop*
exit $status
"""
CALLED = ("nft", "sshd", "systemctl", "systemd-run")


@pytest.fixture(autouse=True)
def _nothing_left(host: Host) -> Iterator[None]:
    """Every test leaves SSH and the firewall as it found them, and the operator gets in."""
    before = access(host)
    yield
    until(lambda: access(host) == before, PATIENCE, every=0.5)
    assert until(gets_in, PATIENCE, every=0.5)


def hardening(**variables: object) -> subprocess.CompletedProcess[str]:
    """Run the role with other variables."""
    return playbook("--tags", "hardening", "--extra-vars", json.dumps(variables))


@contextmanager
def hardening_in_the_background(**variables: object) -> Iterator[subprocess.Popen[str]]:
    """Run the role with other variables, in a process group of its own."""
    inventory = Path(os.environ["MOLECULE_INVENTORY_FILE"]).parent
    command = ["ansible-playbook", "--inventory", str(inventory), "site.yml", "--tags", "hardening"]
    with subprocess.Popen(
        [*command, "--extra-vars", json.dumps(variables)],
        cwd=PROJECT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def pending(host: Host) -> Any:
    """The trial that is under way."""
    return json.loads(host.check_output("forge-trial status"))


def in_force(host: Host) -> Any:
    """The trial that is under way once it is in force."""
    return (found := pending(host)) and found["in_force"] and found


@pytest.mark.parametrize(
    "mistake", [NO_PORT, pytest.param(NO_KEY, marks=pytest.mark.exhaustive)], ids=["no port", "no key"]
)
def test_a_mistake_is_undone(host: Host, mistake: dict[str, object]) -> None:
    """Nobody gets in while it is in force; then all is as before, and the run says so."""
    before = access(host)
    with ThreadPoolExecutor() as pool:
        running = pool.submit(hardening, **mistake)
        until(lambda: in_force(host), PATIENCE, every=0.2)
        assert access(host)["files"] != before["files"]
        assert not gets_in()
        failed = running.result()
    assert failed.returncode == 2, failed.stdout
    said = " ".join(failed.stdout.split())
    assert "Expected: a new SSH connection while the new configuration was in force. Found: " in said
    assert "The old configuration is back in force, seen over a new connection" in said
    assert "changed=0 " in said
    assert access(host) == before


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"__hardening_open": [{"port": "no-such-service"}]}, "nft --check"),
        pytest.param({"__hardening_kex": ["no-such-algorithm"]}, "sshd -T", marks=pytest.mark.exhaustive),
    ],
    ids=["rules", "sshd"],
)
def test_what_is_no_good_is_not_tried(host: Host, variables: dict[str, object], reason: str) -> None:
    """The play fails at once, with the reason."""
    before = access(host)
    failed = hardening(**variables)
    assert failed.returncode == 2, failed.stdout
    assert reason in failed.stdout
    assert access(host) == before


def test_a_run_that_was_killed(host: Host) -> None:
    """The host puts everything back by itself, with nobody connected."""
    before = access(host)
    with hardening_in_the_background(**NO_PORT):
        until(lambda: in_force(host), PATIENCE, every=0.2)
    assert not gets_in()
    until(lambda: access(host) == before, PATIENCE, every=0.5)


def test_a_run_that_follows_one_that_was_killed(host: Host) -> None:
    """It undoes what it finds, and has nothing to do itself."""
    before = access(host)
    # Harmless, so that the next run gets in.
    with hardening_in_the_background(__hardening_open=[{"port": port} for port in (22, 80, 443, 7010)]):
        until(lambda: in_force(host), PATIENCE, every=0.05)
    again = hardening()
    assert again.returncode == 0, again.stdout
    assert "changed=0 " in again.stdout, again.stdout
    assert access(host) == before


def test_a_check_starts_no_trial(host: Host) -> None:
    """It shows what would change in both files."""
    before, changed = access(host), host.check_output(f"stat --format=%Z {DROP_IN}")
    variables = {"hardening_ssh_forwarding": ["tcp"], "hardening_allowed": [{"port": 7003, "protocol": "udp"}]}
    checked = playbook("--tags", "hardening", "--check", "--diff", "--extra-vars", json.dumps(variables))
    assert checked.returncode == 0, checked.stdout
    assert "changed=1 " in checked.stdout
    added = {line[1:].strip() for line in checked.stdout.splitlines() if line.startswith("+")}
    assert {"AllowTcpForwarding local", "udp dport 7003 accept"} <= added
    assert access(host) == before
    # Not even for a moment: a file that was away has another time of its last change.
    assert host.check_output(f"stat --format=%Z {DROP_IN}") == changed


@pytest.mark.exhaustive
def test_a_change_and_back(host: Host) -> None:
    """A good change is confirmed over a new connection, although the old one is there and shared."""
    before = access(host)
    changed = hardening(hardening_allowed=[{"port": 7004}])
    assert changed.returncode == 0, changed.stdout
    assert "tcp dport 7004 accept" in rules(host)
    assert pending(host) is None
    back = hardening()
    assert back.returncode == 0, back.stdout
    assert access(host) == before


def test_who_may_not_confirm(host: Host) -> None:
    """A session from before, a process that is nobody's session, and one that came from the host itself."""
    answer = begin(host, plan(host, 20, firewall="# a remark"))
    assert answer.rc == 0, answer.stderr
    identity = json.loads(answer.stdout)["id"]
    # The tests' own connection, which was there all along, as that of a shared ControlMaster is.
    old = host.run("forge-trial confirm %s", identity)
    assert (old.rc, "one from before the change" in old.stderr) == (1, True), old.stderr
    left = host.run("systemd-run --quiet --collect --pipe --wait forge-trial confirm %s", identity)
    assert (left.rc, "found none above" in left.stderr) == (1, True), left.stderr
    local = host.run("bash -c %s loop %s %s", LOOP, vm()["address"], identity)
    assert (local.rc, "from this host" in local.stderr) == (1, True), local.stderr
    wrong = ssh("sudo forge-trial confirm 0000000000000000", "BatchMode=yes")
    assert (wrong.returncode, "this trial is over" in wrong.stderr) == (1, True), wrong.stderr
    assert pending(host)["id"] == identity
    host.check_output("forge-trial undo")


def test_who_may(host: Host) -> None:
    """Whoever comes in anew."""
    before = access(host)
    text = plan(host, 20, firewall="# a remark")
    identity = json.loads(begin(host, text).stdout)["id"]
    assert ssh(f"sudo forge-trial confirm {identity}", "BatchMode=yes").returncode == 0
    assert pending(host) is None
    assert "# a remark" in host.check_output("cat /etc/forge/firewall.nft")
    back = json.dumps(json.loads(text) | {"firewall": json.loads(text)["firewall"].removesuffix("# a remark\n")})
    identity = json.loads(begin(host, back).stdout)["id"]
    assert ssh(f"sudo forge-trial confirm {identity}", "BatchMode=yes").returncode == 0
    assert access(host) == before


def test_undone_on_a_full_disk(host: Host) -> None:
    """There is no byte left on the file system of the configuration when the time is up."""
    before = access(host)
    folder = "/var/lib/forge-trial"
    # Of the host's own disk nothing may be taken, so the record and the drop-ins lie on small ones.
    for path in (folder, "/etc/ssh/sshd_config.d"):
        host.check_output(
            f"cp -a {path} {path}.kept && mount -t tmpfs -o size=64k tmpfs {path} && cp -a {path}.kept/. {path}/"
        )
    try:
        assert begin(host, plan(host, 3, ssh="# a remark")).rc == 0
        for path in (folder, "/etc/ssh/sshd_config.d"):
            host.run(f"dd if=/dev/zero of={path}/filler bs=1k")
            assert host.run(f"echo 1 > {path}/more").rc != 0
        assert "# a remark" in host.check_output(f"cat {DROP_IN}")
        until(lambda: pending(host) is None, PATIENCE, every=0.5)
        assert "# a remark" not in host.check_output(f"cat {DROP_IN}")
        assert access(host)["sshd"] == before["sshd"]
    finally:
        for path in (folder, "/etc/ssh/sshd_config.d"):
            host.check_output(f"umount --lazy {path} && rm -r {path}.kept")


@pytest.mark.exhaustive
def test_killed_at_every_command(host: Host) -> None:
    """Before each program that it calls, and after it: what the timer finds, it undoes; without one nothing changed."""
    before = access(host)
    folder = "/run/killers"
    host.check_output(f"mkdir -p {folder}")
    number, killed = 0, True
    try:
        while killed:
            number += 1
            for when in ("before", "after"):
                script = KILLER.replace("{before}", str(number) if when == "before" else "-")
                script = script.replace("{after}", str(number) if when == "after" else "-")
                for name in CALLED:
                    host.check_output(f"printf %s %s > {folder}/{name}; chmod 0755 {folder}/{name}", "%s", script)
                host.check_output("echo 0 > /run/calls")
                text = plan(host, 2, firewall="# a remark", ssh="# a remark")
                # In a unit of its own, as the shell of the tests would be told of the kill.
                done = host.run(
                    "printf %s %s | systemd-run --quiet --collect --pipe --wait"
                    f" --setenv=PATH={folder}:/usr/sbin:/usr/bin"
                    " /usr/local/sbin/forge-trial begin || echo killed",
                    "%s",
                    text,
                )
                killed = done.stdout.strip() == "killed"
                timers = host.check_output("systemctl list-units --no-legend --plain 'forge-trial-*.timer'")
                if not timers.strip():
                    assert {key: access(host)[key] for key in ("files", "rules", "sshd")} == {
                        key: before[key] for key in ("files", "rules", "sshd")
                    }, (number, when)
                    host.check_output("forge-trial undo")
                until(lambda: pending(host) is None, PATIENCE, every=0.5)
                # What a killed one left beside the files, the next one takes away.
                begin(host, plan(host, 2))
                until(lambda: access(host) == before, PATIENCE, every=0.5)
    finally:
        host.check_output(f"rm -r {folder}")
    assert number > 6


def test_time_is_up(host: Host) -> None:
    """Nobody confirms: it is over within a few seconds of when it was to be."""
    began = time.monotonic()
    assert begin(host, plan(host, 3, ssh="# a remark")).rc == 0
    assert host.file(PENDING).exists
    until(lambda: pending(host) is None, PATIENCE, every=0.2)
    assert time.monotonic() - began >= 3
