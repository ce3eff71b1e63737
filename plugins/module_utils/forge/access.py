"""Would the roles lock their operator out, and do their ports and networks make sense."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .problems import Problem
from .specs import Options

ROLE = "hardening"
PORTS = (1, 65535)
# Least and most of the numbers; the specification knows types only.
_RANGES = {
    "hardening_trial_seconds": (10, 600),
    "hardening_fail2ban_attempts": (1, 100),
    "hardening_fail2ban_minutes": (1, 60 * 24 * 7),
    "hardening_fail2ban_longest_hours": (1, 24 * 366),
}
_NETWORK = "a network in CIDR notation or an address, such as 192.0.2.0/24 or 2001:db8::1"


@dataclass(frozen=True)
class Connection:
    """How Ansible reaches the host.

    Attributes:
        transport: Name of the connection plugin.
        password: Whether it was given a password to log in with.
    """

    transport: str
    password: bool


def value_problems(values: Mapping[str, Any]) -> list[Problem]:
    """Return what is wrong with the variables of the role beyond their types."""
    problems = []
    for name, (least, most) in _RANGES.items():
        number = values.get(name)
        if isinstance(number, int) and not least <= number <= most:
            problems.append(Problem(name, f"a number from {least} to {most}", str(number), "correct it"))
    for name in ("hardening_ssh_from", "hardening_fail2ban_ignore"):
        problems += _networks(values.get(name), name)
    allowed = values.get("hardening_allowed")
    for index, entry in enumerate(allowed if isinstance(allowed, list) else []):
        if not isinstance(entry, Mapping):
            continue  # The specification has reported it.
        where = f"hardening_allowed[{index}]"
        port = str(entry.get("port", ""))
        if port.isdigit() and not PORTS[0] <= int(port) <= PORTS[1]:
            problems.append(Problem(f"{where}.port", f"a port from {PORTS[0]} to {PORTS[1]}", port, "correct it"))
        problems += _networks(entry.get("from"), f"{where}.from")
    return problems


def _networks(networks: Any, where: str) -> list[Problem]:
    found = [(f"{where}[{i}]", str(item)) for i, item in enumerate(networks if isinstance(networks, list) else [])]
    return [Problem(here, _NETWORK, text, mistake) for here, text in found if (mistake := _network_mistake(text))]


def _network_mistake(text: str) -> str | None:
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        return "use addresses, no names"
    # Bits behind the length make it another network than it looks like.
    return None if text.lower() in (str(network), str(network.network_address)) else f"write {network}"


def host_problems(
    options: Options, values: Mapping[str, Any], probe: Mapping[str, Any], connection: Connection
) -> list[Problem]:
    """Return why the operator would not get in any more, and what else on the host has a say in what comes in."""
    chosen = {name: values.get(name, spec.get("default")) for name, spec in options.items()}
    return [*_ways_in(chosen, probe["ssh"], connection), *_firewalls(probe["firewalls"]), *_drop_in(probe["ssh"])]


def _ways_in(chosen: Mapping[str, Any], ssh: Mapping[str, Any], connection: Connection) -> list[Problem]:
    where = "the connection to the host"
    if connection.transport != "ssh" or not ssh["client"]:
        return [
            Problem(
                where,
                "SSH, because a new connection has to show that the new configuration lets people in",
                connection.transport if connection.transport != "ssh" else "no session of sshd's above Ansible's own",
                "run this over SSH from a control machine, or without the role: --skip-tags hardening",
            )
        ]
    problems = []
    user = ssh["user"]
    if connection.password:
        problems.append(
            Problem(
                where,
                "a key, because the host will take no passwords",
                "a password (ansible_password, or --ask-pass)",
                f"put your key on the host (ssh-copy-id {user}@...) and connect with it, without a password",
            )
        )
    elif ssh["keys"] == 0:
        problems.append(
            Problem(
                f"authorized keys of {user} on the host",
                "at least one, because the host will take keys only",
                "none",
                f"put your key there: ssh-copy-id {user}@...",
            )
        )
    if user == "root" and not chosen["hardening_ssh_root_login"]:
        problems.append(
            Problem(
                where,
                "a user other than root, who will not be let in",
                "root",
                "connect as one of base_users (ansible_user), or set hardening_ssh_root_login: true",
            )
        )
    networks = chosen["hardening_ssh_from"]
    if networks and not any(_network_mistake(str(item)) for item in networks) and not _within(ssh["client"], networks):
        problems.append(
            Problem(
                "hardening_ssh_from",
                "a network that this control machine is in, as the host sees it",
                f"{ssh['client']} is in none of {', '.join(map(str, networks))}",
                f"add {ssh['client']}, or its network",
            )
        )
    return problems


def _within(address: str, networks: Sequence[object]) -> bool:
    client = ipaddress.ip_address(address)
    return any(client in ipaddress.ip_network(str(network), strict=False) for network in networks)


def _firewalls(found: Mapping[str, str]) -> list[Problem]:
    return [
        Problem(
            f"{name} on the host",
            "no other rules for what comes in: a packet has to pass them all, and none knows of the others",
            found[name],
            f"{do}, and put what it allowed into hardening_allowed",
        )
        for name, do in {
            "ufw": "turn it off with `ufw disable`",
            "firewalld": "turn it off with `systemctl disable --now firewalld.service`",
            "/etc/nftables.conf": "move it away, run `systemctl disable nftables.service` and delete its tables"
            " with `nft delete table`",
        }.items()
        if name in found
    ]


def _drop_in(ssh: Mapping[str, Any]) -> list[Problem]:
    if ssh["includes"]:
        return []
    return [
        Problem(
            "/etc/ssh/sshd_config on the host",
            "the distribution's line `Include /etc/ssh/sshd_config.d/*.conf`",
            "none",
            "put it at the top of the file",
        )
    ]
