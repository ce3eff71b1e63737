#!/usr/bin/python
"""Read what preflight decides on: the distribution, sizes, free disk, listeners and what is provisioned already."""

from __future__ import annotations

DOCUMENTATION = r"""
module: host_probe
short_description: Read the facts that preflight decides on
description:
  - Reads the distribution, systemd, usable processors and memory (as cgroups allow them), free disk, listening TCP
    ports with their owners, how SSH lets people in, other firewalls, and what is provisioned already. It changes
    nothing and needs nothing but Python.
options:
  paths:
    description: Folders whose free disk is wanted; the nearest existing parent stands in for one that does not exist.
    type: list
    elements: path
    default: [/, /srv, /var]
"""

EXAMPLES = r"""
- name: Look at the host
  host_probe:
  register: looked
"""

RETURN = r"""
probe:
  description: The facts; see preflight's C(forge_host).
  type: dict
"""

import json
import os
import platform
import pwd
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

MIB = 1024 * 1024
LISTENING = "0A"  # TCP_LISTEN in include/net/tcp_states.h
SSHD_CONFIG = "etc/ssh/sshd_config"
# What the distribution's /etc/nftables.conf has: tables and chains without a rule.
NO_RULE = re.compile(r"flush ruleset|(table|chain) [\w ]+{|type filter hook \w+ priority \w+;( policy accept;)?|}|#.*|")


def read(path: Path) -> str:
    """Return the content of `path`, or an empty string when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def output(*command: str) -> str:
    """Return what `command` prints, or an empty string when it does not exist or fails."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout if answer.returncode == 0 else ""


def os_release(root: Path) -> dict[str, str]:
    """Return the fields of os-release(5)."""
    text = read(root / "etc/os-release") or read(root / "usr/lib/os-release")
    fields = (line.partition("=") for line in text.splitlines() if "=" in line and not line.startswith("#"))
    return {name.strip(): value.strip().strip("\"'") for name, _, value in fields}


def systemd_version(root: Path) -> int:
    """Return systemd's version, 0 where there is none."""
    for name in ("usr/lib/systemd/systemd", "lib/systemd/systemd"):
        if (root / name).exists():
            match = re.match(r"systemd (\d+)", output(str(root / name), "--version"))
            if match:
                return int(match.group(1))
    return 0


def python_version() -> str:
    """Return the version of the distribution's own Python, which is what releases run on."""
    own = os.path.realpath(sys.executable)
    system = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if system is None or os.path.realpath(system) == own:
        return platform.python_version()
    code = "import platform; print(platform.python_version())"
    return output(system, "-c", code).strip() or platform.python_version()


def controllers(root: Path) -> dict[str, list[Path]]:
    """Return, for cgroup v2 (key "") and the v1 controllers, the folders whose limits a system service is under.

    Those are `system.slice` and everything above it that this host can see. PID 1 is the anchor: the shell of an SSH
    session sits in a slice of its own, whose limits say nothing about services.
    """
    mounts: dict[str, Path] = {}
    for line in read(root / "proc/self/mounts").splitlines():
        fields = line.split()
        if len(fields) < 4:
            continue
        folder = root / fields[1].lstrip("/")
        if fields[2] == "cgroup2":
            mounts[""] = folder
        elif fields[2] == "cgroup":
            for option in fields[3].split(","):
                mounts.setdefault(option, folder)
    found: dict[str, list[Path]] = {}
    for line in read(root / "proc/1/cgroup").splitlines():
        _, names, inside = line.split(":", 2)
        for name in names.split(","):
            if name not in mounts:
                continue
            top = mounts[name]
            leaf = top / inside.lstrip("/")
            if leaf.name == "init.scope":
                leaf = leaf.parent
            chain = [leaf / "system.slice", leaf, *leaf.parents]
            found[name] = [folder for folder in chain if folder == top or top in folder.parents]
    return found


def quota(groups: dict[str, list[Path]]) -> float | None:
    """Return the processors' worth of time that the tightest CPU quota allows, None without one."""
    allowed = []
    for folder in groups.get("", []):
        fields = read(folder / "cpu.max").split()
        if len(fields) == 2 and fields[0] != "max":
            allowed.append(int(fields[0]) / int(fields[1]))
    for folder in groups.get("cpu", []):
        granted = read(folder / "cpu.cfs_quota_us").strip()
        period = read(folder / "cpu.cfs_period_us").strip()
        if granted and period and int(granted) > 0:
            allowed.append(int(granted) / int(period))
    return min(allowed) if allowed else None


def cpus(groups: dict[str, list[Path]]) -> tuple[float, str]:
    """Return how many processors a service may use, and what decides that."""
    cores = os.cpu_count() or 1
    try:
        usable = len(os.sched_getaffinity(1))
    except OSError:
        usable = len(os.sched_getaffinity(0))
    granted = quota(groups)
    if granted is not None and granted < usable:
        return round(granted, 2), "cgroup quota"
    return float(usable), f"CPU affinity of PID 1, of {cores} cores" if usable < cores else "cores"


def memory_mib(root: Path, groups: dict[str, list[Path]]) -> tuple[int, str]:
    """Return the memory that services may use, in MiB, and what decides that."""
    match = re.search(r"^MemTotal:\s+(\d+) kB", read(root / "proc/meminfo"), re.MULTILINE)
    total = int(match.group(1)) * 1024 if match else 0
    limits = [read(folder / "memory.max").strip() for folder in groups.get("", [])]
    limits += [read(folder / "memory.limit_in_bytes").strip() for folder in groups.get("memory", [])]
    # Without a limit v2 says "max", v1 a number near 2**63.
    granted = min((int(limit) for limit in limits if limit.isdigit()), default=total)
    if granted < total:
        return granted // MIB, "cgroup limit"
    return total // MIB, "memory of the machine"


def free_mib(path: Path) -> int:
    """Return what an unprivileged writer may still use below `path` (or its nearest existing parent), in MiB."""
    while not path.exists() and path != path.parent:
        path = path.parent
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize // MIB


def listening_sockets(root: Path) -> dict[str, int]:
    """Return inode to port of every listening TCP socket, by proc_net_tcp(5)."""
    sockets = {}
    for name in ("tcp", "tcp6"):
        for line in read(root / "proc/net" / name).splitlines()[1:]:
            fields = line.split()
            if len(fields) > 9 and fields[3] == LISTENING:
                sockets[fields[9]] = int(fields[1].rsplit(":", 1)[1], 16)
    return sockets


def open_sockets(process: Path) -> Iterator[str]:
    """Yield the inode of every socket that a process has open, as far as they can be read."""
    # The process may end meanwhile, close a file, or belong to someone else.
    with suppress(OSError):
        for descriptor in (process / "fd").iterdir():
            with suppress(OSError):
                link = str(descriptor.readlink())
                if link.startswith("socket:["):
                    yield link[len("socket:[") : -1]


def listeners(root: Path) -> list[dict[str, Any]]:
    """Return every listening TCP port with the processes and units that hold it, where they can be read."""
    sockets = listening_sockets(root)
    owners: dict[int, set[tuple[str, str]]] = {port: set() for port in sockets.values()}
    for process in (root / "proc").iterdir():
        if not process.name.isdigit():
            continue
        held = {sockets[inode] for inode in open_sockets(process) if inode in sockets}
        for port in held:
            owners[port].add((read(process / "comm").strip(), unit_of(read(process / "cgroup"))))
    return [
        {
            "port": port,
            "processes": sorted({name for name, _ in holding}),
            "units": sorted({unit for _, unit in holding if unit}),
        }
        for port, holding in sorted(owners.items())
    ]


def unit_of(cgroup: str) -> str:
    """Return the systemd unit that a process belongs to, from its /proc/PID/cgroup."""
    for line in cgroup.splitlines():
        for part in reversed(line.split("/")):
            if part.endswith((".service", ".socket", ".scope")):
                return part
    return ""


def postgresql(root: Path) -> dict[str, Any]:
    """Return whether the distribution's PostgreSQL is installed and running, and its configured `max_connections`."""
    configured = None
    for folder in sorted((root / "etc/postgresql").glob("*/*")):
        version, cluster = folder.parts[-2:]
        # Later files win, as in the server: main file, its drop-ins, then ALTER SYSTEM.
        files = [folder / "postgresql.conf", *sorted((folder / "conf.d").glob("*.conf"))]
        files.append(root / "var/lib/postgresql" / version / cluster / "postgresql.auto.conf")
        for file in files:
            for match in re.finditer(r"^\s*max_connections\s*=?\s*'?(\d+)", read(file), re.MULTILINE):
                configured = int(match.group(1))
    return {
        "installed": bool(list((root / "usr/lib/postgresql").glob("*/bin/postgres"))),
        "running": bool(list((root / "run/postgresql").glob("*.pid"))),
        "max_connections": configured,
    }


def above(root: Path, process: int) -> Iterator[Path]:
    """Yield the folder in /proc of `process` and of each that it descends from."""
    while process > 0:
        folder = root / "proc" / str(process)
        yield folder
        match = re.search(r"^PPid:\s+(\d+)", read(folder / "status"), re.MULTILINE)
        process = int(match.group(1)) if match else 0


def ssh_session(root: Path, process: int) -> tuple[str, str, int]:
    """Return who logged in on the SSH connection that `process` belongs to, from where, and to which port here."""
    for folder in above(root, process):
        match = re.search(r"(?:^|\0)SSH_CONNECTION=(\S+) \d+ \S+ (\d+)(?:\0|$)", read(folder / "environ"))
        uid = re.search(r"^Uid:\s+(\d+)", read(folder / "status"), re.MULTILINE)
        if match and uid:
            try:
                user = pwd.getpwuid(int(uid.group(1))).pw_name
            except KeyError:
                user = uid.group(1)
            return user, match.group(1).partition("%")[0], int(match.group(2))
    return "", "", 0


def sshd_settings(user: str, client: str) -> dict[str, list[str]]:
    """Return what sshd goes by for a user, in lower case; empty where it can't say."""
    who = ("-C", f"user={user},host={client},addr={client}") if user and client else ()
    settings: dict[str, list[str]] = {}
    for line in output("/usr/sbin/sshd", "-T", *who).splitlines():
        name, _, value = line.partition(" ")
        settings.setdefault(name, []).append(value)
    return settings


def authorized_keys(root: Path, user: str, settings: dict[str, list[str]]) -> int | None:
    """Return how many keys a user may log in with, None where that can't be told from files."""
    known = "authorizedkeysfile" in settings
    if not known or any(settings.get(name) != ["none"] for name in ("authorizedkeyscommand", "trustedusercakeys")):
        return None
    try:
        home = pwd.getpwnam(user).pw_dir
    except KeyError:
        return None
    count = 0
    for name in settings["authorizedkeysfile"][0].split():
        expanded = re.sub("%[hu%]", lambda match: {"%h": home, "%u": user, "%%": "%"}[match.group()], name)
        lines = read(root / os.path.join(home, expanded).lstrip("/")).splitlines()  # noqa: PTH118 - absolute ones win
        count += sum(1 for line in lines if line.strip() and not line.lstrip().startswith("#"))
    return count


def ssh(root: Path) -> dict[str, Any]:
    """Return who is connected from where, how many keys let that user in, and where sshd listens."""
    user, client, port = ssh_session(root, os.getpid())
    settings = sshd_settings(user, client)
    # Where systemd listens in its place, sshd does not know of the port that people come in by.
    ports = {int(text) for text in settings.get("port", []) if text.isdigit()} | ({port} if port else set())
    includes = re.search(
        r"^\s*include\s+(/etc/ssh/)?sshd_config\.d/\*", read(root / SSHD_CONFIG), re.MULTILINE | re.IGNORECASE
    )
    return {
        "user": user,
        "client": client,
        "keys": authorized_keys(root, user, settings),
        "ports": sorted(ports or {22}),
        "includes": bool(includes),
    }


def firewalls(root: Path) -> dict[str, str]:
    """Return other sets of rules for what comes in, and how they show."""
    found = {}
    if re.search(r"^\s*ENABLED=yes", read(root / "etc/ufw/ufw.conf"), re.MULTILINE):
        found["ufw"] = "it is enabled in /etc/ufw/ufw.conf"
    if (root / "etc/systemd/system/multi-user.target.wants/firewalld.service").exists():
        found["firewalld"] = "firewalld.service is enabled"
    rules = [line.strip() for line in read(root / "etc/nftables.conf").splitlines()]
    own = [line for line in rules if not NO_RULE.fullmatch(line)]
    if own:
        found["/etc/nftables.conf"] = f"rules that are not the distribution's, such as: {own[0][:60]}"
    return found


def described(root: Path) -> list[dict[str, Any]]:
    """Return the apps that forgectl knows here, with what each takes of the host; nothing under an older Python."""
    try:
        import tomllib
    except ImportError:
        return []

    def read(path: Path) -> dict[str, Any]:
        try:
            return tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    certificates = read(root / "etc/forge/certificates.toml").get("apps", {})
    apps = []
    for path in sorted((root / "etc/forge/apps").glob("*.toml")):
        app, name = read(path), path.stem
        if not app:
            continue
        database = app.get("database") or {}
        local = database.get("name", "") if database.get("placement") == "local" else ""
        # It is written down where it is not among the settings, or under a name that only the app knows.
        named = next((v for k, v in app.get("settings", {}).items() if k.endswith("DATABASE_POOL_MAX")), "5")
        pool = database.get("pool_max", named)
        commands = list(app.get("commands", {}).values())
        try:
            limit = re.search(r"^MemoryMax=(\d+)M$", (path.parent / f"{name}.d/slot.conf").read_text(), re.MULTILINE)
            state = json.loads((root / "var/lib/forge" / name / "state.json").read_text())
        except (OSError, ValueError):
            limit, state = None, {}
        apps.append(
            {
                "name": name,
                "domains": certificates.get(name) or [app.get("domain", "")],
                "database": local,
                "workers": app.get("workers", {}).get("count", 1),
                "pool_max": int(pool) if str(pool).isdigit() else 5,
                "memory_max_mib": int(limit[1]) if limit else 0,
                "commands": len(commands),
                "slot_commands_mib": sum(each["memory_max_mib"] for each in commands if not each.get("schedule")),
                "host_commands_mib": sum(each["memory_max_mib"] for each in commands if each.get("schedule")),
                "served": bool(state.get("live")),
                # Where no release ever got to serve, nothing runs, but for a first one that is under way.
                "removed": bool(state.get("removed") or not (state.get("live") or state.get("operation"))),
            }
        )
    return apps


def probe(paths: list[str], root: Path = Path("/")) -> dict[str, Any]:
    """Return all facts of the host whose file system starts at `root`."""
    release = os_release(root)
    groups = controllers(root)
    usable, cpus_from = cpus(groups)
    memory, memory_from = memory_mib(root, groups)
    return {
        "distribution_id": release.get("ID", ""),
        "distribution_version": release.get("VERSION_ID", ""),
        "distribution_name": release.get("PRETTY_NAME", ""),
        "architecture": platform.machine(),
        "systemd_version": systemd_version(root),
        "systemd_running": (root / "run/systemd/system").is_dir(),
        # systemd writes down which kind it found itself in.
        "container": (root / "run/systemd/container").exists(),
        "python_version": python_version(),
        "cpus": usable,
        "cpus_from": cpus_from,
        "memory_mib": memory,
        "memory_from": memory_from,
        "disk_free_mib": {path: free_mib(root / path.lstrip("/")) for path in paths},
        "listeners": listeners(root),
        "postgresql": postgresql(root),
        "ssh": ssh(root),
        "firewalls": firewalls(root),
        # A fresh image has none, and its empty folder looks as new as the image.
        "package_lists": any((root / "var/lib/apt/lists").glob("*Packages*")),
        # The apps that were released here; none at all means that the host was never provisioned to its end.
        "apps": described(root),
        "released": sorted(state.parent.name for state in (root / "var/lib/forge").glob("*/state.json")),
        "forgectl": sorted(path.parent.name for path in (root / "opt/forge").glob("forgectl-*/.complete")),
        "manifest": (root / "var/lib/forge/manifest.json").exists(),
        "time": int(time.time()),
    }


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(
        argument_spec={"paths": {"type": "list", "elements": "path", "default": ["/", "/srv", "/var"]}},
        supports_check_mode=True,
    )
    module.exit_json(changed=False, probe=probe(module.params["paths"]))


if __name__ == "__main__":
    main()
