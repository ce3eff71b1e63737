"""Is the host one that the roles support, judged by what `host_probe` read on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .problems import Problem

_DISTRIBUTIONS = {"debian": "Debian", "ubuntu": "Ubuntu"}


def distribution(probe: Mapping[str, Any]) -> str:
    """Return the distribution's name as the inventory spells it."""
    identity = str(probe["distribution_id"])
    return _DISTRIBUTIONS.get(identity, identity or "unknown")


def check(
    probe: Mapping[str, Any],
    distributions: Mapping[str, Sequence[object]],
    systemd_minimum: int,
    disk_minimum_mib: int,
    memory_minimum_mib: int,
    ports: Sequence[int],
) -> list[Problem]:
    """Return why the host cannot be provisioned. A `systemd_minimum` of 0 does not ask for systemd at all."""
    problems = [*_distribution(probe, distributions), *_systemd(probe, systemd_minimum)]
    scarce = {path: free for path, free in probe["disk_free_mib"].items() if free < disk_minimum_mib}
    if scarce:
        problems.append(
            Problem(
                f"free disk for {', '.join(scarce)}",
                f"at least {disk_minimum_mib} MiB (preflight_disk_minimum_mib)",
                ", ".join(f"{free} MiB at {path}" for path, free in scarce.items()),
                "free some space or enlarge the disk",
            )
        )
    if probe["memory_mib"] < memory_minimum_mib:
        problems.append(
            Problem(
                "memory of the host",
                f"at least {memory_minimum_mib} MiB (preflight_memory_minimum_mib)",
                f"{probe['memory_mib']} MiB ({probe['memory_from']})",
                "take a larger host or raise its limit",
            )
        )
    return problems + _ports(probe, ports)


def _distribution(probe: Mapping[str, Any], supported: Mapping[str, Sequence[object]]) -> list[Problem]:
    name, version = distribution(probe), str(probe["distribution_version"])
    if version in {str(item) for item in supported.get(name, [])}:
        return []
    names = ", ".join(f"{known} {item}" for known, versions in supported.items() for item in versions)
    return [
        Problem(
            "distribution of the host",
            f"one of {names}",
            str(probe["distribution_name"]) or f"{name} {version}",
            "install the host with a supported distribution",
        )
    ]


def _systemd(probe: Mapping[str, Any], minimum: int) -> list[Problem]:
    if minimum == 0:
        return []
    version, running = int(probe["systemd_version"]), bool(probe["systemd_running"])
    if version >= minimum and running:
        return []
    found = f"systemd {version}" if version else "no systemd"
    if version and not running:
        found += ", not running as PID 1"
    return [
        Problem(
            "systemd of the host",
            f"systemd {minimum} or newer, running as PID 1 (encrypted credentials need 250)",
            found,
            "use a machine or VM that boots a supported distribution; a plain container has no systemd",
        )
    ]


def _ports(probe: Mapping[str, Any], ports: Sequence[int]) -> list[Problem]:
    problems = []
    for listener in probe["listeners"]:
        processes, units = listener["processes"], listener["units"]
        if listener["port"] not in ports or processes == ["nginx"]:
            continue
        holder = ", ".join(processes) or "a process that cannot be seen"
        unit = next((unit for unit in units if unit.endswith((".service", ".socket"))), None)
        problems.append(
            Problem(
                f"port {listener['port']} of the host",
                "free, or held by nginx",
                f"held by {holder}" + (f" ({', '.join(units)})" if units else ""),
                f"stop it: systemctl disable --now {unit}"
                if unit
                else f"find it with `ss -ltnp sport = :{listener['port']}` and stop it",
            )
        )
    return problems
