"""Who gets in, and by what."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import ssh_audit
from forge_access import gets_in, ssh, stranger, vm
from forge_scenario import podman
from ssh_audit.builtin_policies import BUILTIN_POLICIES
from testinfra.host import Host

AUDIT = "python3 -c 'from ssh_audit.ssh_audit import main; main()'"
PASSWORD = "correct-horse-battery-staple"  # pragma: allowlist secret


def test_the_operator_gets_in() -> None:
    """By a key, as Ansible does, and sftp works."""
    assert gets_in()


def test_passwords_are_not_taken(host: Host, tmp_path: Path) -> None:
    """Not even the right one of a user who may log in: the way is not offered."""
    host.check_output("id guest || useradd --create-home --shell /bin/bash guest")
    host.check_output("printf %s %s | chpasswd", "%s", f"guest:{PASSWORD}")
    typed = tmp_path / "typed"
    typed.write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\necho {PASSWORD}\n")
    typed.chmod(0o700)
    environment = {"SSH_ASKPASS": str(typed), "SSH_ASKPASS_REQUIRE": "force"}
    ways = "PreferredAuthentications=password,keyboard-interactive"
    try:
        refused = ssh("true", ways, "PubkeyAuthentication=no", user="guest", environment=environment)
    finally:
        host.check_output("userdel --remove guest")
    assert refused.returncode == 255
    assert "Permission denied (publickey)." in refused.stderr
    assert not (tmp_path / "asked").exists()


def test_root_does_not_get_in(host: Host) -> None:
    """With a key that is in root's own file."""
    public = Path(f"{vm()['identity_file']}.pub").read_text()
    host.check_output("mkdir -p -m 0700 /root/.ssh && printf %s %s > /root/.ssh/authorized_keys", "%s", public)
    try:
        refused = ssh("true", "BatchMode=yes", user="root")
    finally:
        host.check_output("rm /root/.ssh/authorized_keys")
    assert refused.returncode == 255
    assert "Permission denied (publickey)." in refused.stderr


@pytest.mark.parametrize(
    ("option", "missing"),
    [
        ("KexAlgorithms=diffie-hellman-group14-sha1", "key exchange method"),
        ("KexAlgorithms=diffie-hellman-group14-sha256", "key exchange method"),  # pragma: allowlist secret
        ("KexAlgorithms=ecdh-sha2-nistp256", "key exchange method"),
        ("HostKeyAlgorithms=ssh-rsa", "host key type"),
        ("HostKeyAlgorithms=ecdsa-sha2-nistp256", "host key type"),
        ("Ciphers=aes128-cbc", "cipher"),
        ("MACs=hmac-sha1,Ciphers=aes256-ctr", "MAC"),
        ("MACs=hmac-sha2-256,Ciphers=aes256-ctr", "MAC"),
    ],
)
def test_old_algorithms_are_refused(option: str, missing: str) -> None:
    """By a real client that would take them."""
    options = re.split(r",(?=[A-Z])", option)
    refused = ssh("true", *options, "BatchMode=yes")
    assert refused.returncode == 255
    assert re.search(rf"no matching {missing} found", refused.stderr), refused.stderr


def test_what_a_session_may_not(host: Host) -> None:
    """Forward ports: the connection to Nginx's port on the host's loopback is refused by sshd."""
    refused = ssh("", "BatchMode=yes", "-W127.0.0.1:80")
    assert refused.returncode == 255
    assert "administratively prohibited" in refused.stderr
    assert not {"x11forwarding yes", "allowagentforwarding yes"} & set(host.check_output("sshd -T").splitlines())


def test_the_judge(host: Host) -> None:
    """ssh-audit's newest policy for the distribution passes, with no failure and no warning."""
    release = host.check_output(". /etc/os-release; echo $VERSION_ID")
    policies = [name for name in BUILTIN_POLICIES if name.startswith(f"Hardened Debian {release} (")]
    newest = max(policies, key=lambda name: int(BUILTIN_POLICIES[name]["version"]))
    # From an address that sshd does not penalise for the many connections that it makes.
    with stranger(202) as judge:
        podman("cp", str(Path(ssh_audit.__file__).parent), f"{judge.name}:/root/ssh_audit")
        command = f"cd /root && {AUDIT} --no-colors --policy='{newest}' {vm()['address']} 2>&1; true"
        said = judge.run("sh", "-c", command).stdout
    assert "Passed" in said, said
    assert not re.search("warning|fail", said, re.IGNORECASE), said
