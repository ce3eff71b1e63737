"""Ways to a host: SSH as its operator, connections of others, and what SSH and the firewall are on it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from forge_scenario import CONTAINER, podman, until
from testinfra.host import Host

EPHEMERAL = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"])
SSH_SECONDS = 20
DROP_IN = "/etc/ssh/sshd_config.d/00-forge.conf"
RULES = "/etc/forge/firewall.nft"
PENDING = "/var/lib/forge-trial/pending.json"
# Tells how a connection ended: taken, refused (somebody says that nobody listens), or lost on the way.
CONNECT = """
import socket, sys
host, port, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3]
with socket.socket(socket.AF_INET, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM) as client:
    client.settimeout(3)
    try:
        client.connect((host, port))
        client.sendall(b"?")
        print("taken" if client.recv(8) else "closed")
    except TimeoutError:
        print("lost")
    except ConnectionRefusedError:
        print("refused")
"""
# Answers on a port of every address, by TCP and UDP.
LISTEN = """
import socket, sys, threading
port = int(sys.argv[1])
tcp = socket.create_server(("", port))
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("", port))
def echo():
    while True:
        data, peer = udp.recvfrom(8)
        udp.sendto(b"!", peer)
threading.Thread(target=echo, daemon=True).start()
while True:
    connection, _ = tcp.accept()
    connection.sendall(b"!")
    connection.close()
"""


def vm() -> dict[str, Any]:
    """How the scenario's host is reached: address, user, identity_file."""
    (found,) = yaml.safe_load((EPHEMERAL / "instance_config.yml").read_text())
    return dict(found)


def ssh(
    command: str,
    *options: str,
    user: str = "",
    environment: dict[str, str] | None = None,
    identity: str = "",
) -> subprocess.CompletedProcess[str]:
    """Run a command on the host over a connection of its own; of `options`, `-o` is left out."""
    known = vm()
    chosen = [
        *options,
        "ControlMaster=no",
        "ControlPath=none",
        f"UserKnownHostsFile={EPHEMERAL / 'known_hosts'}",
        "IdentitiesOnly=yes",
        "ConnectTimeout=5",
    ]
    flags = [option if option.startswith("-") else f"-o{option}" for option in chosen]
    target = f"{user or known['user']}@{known['address']}"
    return subprocess.run(
        [
            "ssh",
            "-F",
            "none",
            *flags,
            "-i",
            identity or known["identity_file"],
            target,
            *([command] if command else []),
        ],
        env=os.environ | (environment or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SSH_SECONDS,
        check=False,
    )


def gets_in() -> bool:
    """Whether the operator gets in by a new connection."""
    return ssh("sudo true", "BatchMode=yes").returncode == 0


class Stranger:
    """Another machine on the host's network."""

    def __init__(self, last: int) -> None:
        self.name = f"{CONTAINER}-stranger-{last}"
        self.address = f"{vm()['address'].rpartition('.')[0]}.{last}"

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command there."""
        done: subprocess.CompletedProcess[str] = podman("exec", self.name, *command, text=True)
        return done

    def connects(self, port: int, kind: str = "tcp") -> str:
        """How a connection to a port of the host ends: taken, refused, or lost."""
        return self.run("python3", "-c", CONNECT, vm()["address"], str(port), kind).stdout.strip()

    def guesses(self, user: str, times: int) -> None:
        """Try to log in with a key that nobody knows."""
        options = "-o BatchMode=yes -o StrictHostKeyChecking=no -o ConnectTimeout=5 -i /root/key"
        attempt = f"ssh {options} {user}@{vm()['address']} true < /dev/null; "
        self.run(
            "sh", "-c", f"test -e /root/key || ssh-keygen -q -t ed25519 -N '' -f /root/key; {attempt * times} true"
        )


@contextmanager
def stranger(last: int) -> Iterator[Stranger]:
    """Have another machine on the network, whose address ends in `last`."""
    made = Stranger(last)
    network = CONTAINER.removesuffix("-vm")
    image = podman("inspect", "--format", "{{.ImageName}}", CONTAINER, text=True).stdout.strip()
    podman(
        *("run", "--detach", "--rm", "--name", made.name, "--network", network, "--ip", made.address),
        *("--entrypoint", "sleep", image, "infinity"),
    )
    try:
        yield made
    finally:
        podman("rm", "--force", "--time", "0", made.name)


@contextmanager
def listening(host: Host, *ports: int) -> Iterator[None]:
    """Have somebody listen on ports of the host, as its loopback shows."""
    for port in ports:
        host.check_output(
            "systemd-run --quiet --collect --unit=listen-%s python3 -c %s %s", str(port), LISTEN, str(port)
        )
    try:
        for port in ports:
            until(partial(taken, host, port), 30)
        yield
    finally:
        for port in ports:
            host.check_output("systemctl stop listen-%s", str(port))


def taken(host: Host, port: int) -> bool:
    """Whether the host takes a connection from itself."""
    return bool(host.check_output("python3 -c %s 127.0.0.1 %s tcp", CONNECT, str(port)).strip() == "taken")


def rules(host: Host) -> str:
    """The firewall as the kernel has it, without what it counted."""
    table = host.check_output("nft --stateless list table inet forge")
    return str(table)


def access(host: Host) -> dict[str, str]:
    """Everything of SSH and the firewall that a trial may change: files, rules, and what sshd goes by."""
    files = f"{DROP_IN} {RULES}"
    return {
        "files": host.check_output(f"stat --format='%n %a %U %s' {files}; sha256sum {files}"),
        "beside": host.check_output("find /etc/ssh/sshd_config.d /etc/forge -maxdepth 1 -printf '%p\\n' | sort"),
        "rules": rules(host),
        "sshd": host.check_output("sshd -T"),
        "units": host.check_output("systemctl list-units --all --no-legend --plain 'forge-trial-*'"),
        "pending": host.run(f"cat {PENDING}").stdout,
    }


def plan(host: Host, seconds: int, **changes: str) -> str:
    """A plan of what is there, with lines added to the file `ssh` or `firewall`."""
    # Without the end of the last line, as all output comes here.
    present = {"ssh": host.check_output(f"cat {DROP_IN}"), "firewall": host.check_output(f"cat {RULES}")}
    wanted = {name: "\n".join([text, *filter(None, [changes.get(name)]), ""]) for name, text in present.items()}
    return json.dumps({"seconds": seconds, **wanted})


def begin(host: Host, text: str, before: Sequence[str] = ()) -> Any:
    """Begin a trial on the host over the connection that the tests have had all along."""
    return host.run("printf %s %s | " + " ".join([*before, "forge-trial begin"]), "%s", text)
