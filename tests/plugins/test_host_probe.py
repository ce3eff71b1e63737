"""What `host_probe` reads: on this machine as it is, and on others by the files that they show."""

from __future__ import annotations

import os
import platform
import pwd
import socket
import subprocess
from pathlib import Path

import host_probe
import pytest
from host_probe import (
    authorized_keys,
    controllers,
    cpus,
    firewalls,
    listeners,
    memory_mib,
    postgresql,
    probe,
    ssh,
    ssh_session,
    unit_of,
)

CPUS = os.cpu_count() or 1
USABLE = len(os.sched_getaffinity(1))


def machine(root: Path, files: dict[str, str]) -> Path:
    """Lay out the files of a machine."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


V2 = {
    "proc/self/mounts": "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n",
    "proc/1/cgroup": "0::/init.scope\n",
    "proc/meminfo": "MemTotal:        4194304 kB\n",
}
V1 = {
    "proc/self/mounts": "cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0\n"
    "cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n",
    "proc/1/cgroup": "3:cpu,cpuacct:/\n2:memory:/\n1:name=systemd:/init.scope\n",
    "proc/meminfo": "MemTotal:        4194304 kB\n",
}


@pytest.mark.parametrize(
    ("files", "granted", "memory"),
    [
        (V2, (USABLE, "cores"), (4096, "memory of the machine")),
        (
            V2 | {"sys/fs/cgroup/cpu.max": "25000 100000\n", "sys/fs/cgroup/memory.max": "536870912\n"},
            (0.25, "cgroup quota"),
            (512, "cgroup limit"),
        ),
        (
            V2 | {"sys/fs/cgroup/system.slice/cpu.max": "50000 100000\n", "sys/fs/cgroup/cpu.max": "max 100000\n"},
            (0.5, "cgroup quota"),
            (4096, "memory of the machine"),
        ),
        # More than the machine has limits nothing; nor does the slice of the session that asks.
        (
            V2
            | {
                "sys/fs/cgroup/cpu.max": f"{CPUS + 1}00000 100000\n",
                "sys/fs/cgroup/memory.max": "max\n",
                "sys/fs/cgroup/user.slice/cpu.max": "10000 100000\n",
            },
            (USABLE, "cores"),
            (4096, "memory of the machine"),
        ),
        (
            V1
            | {
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "30000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "1073741824\n",
            },
            (0.3, "cgroup quota"),
            (1024, "cgroup limit"),
        ),
        (
            V1
            | {
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            (USABLE, "cores"),
            (4096, "memory of the machine"),
        ),
    ],
)
def test_processors_and_memory(
    tmp_path: Path, files: dict[str, str], granted: tuple[float, str], memory: tuple[int, str]
) -> None:
    """The tightest limit above a system service counts, under both versions of cgroups."""
    root = machine(tmp_path, files)
    groups = controllers(root)
    found, source = cpus(groups)
    if granted[1] == "cores" and USABLE < CPUS:
        granted = (USABLE, f"CPU affinity of PID 1, of {CPUS} cores")
    assert (found, source) == granted
    assert memory_mib(root, groups) == memory


def test_a_listener_with_its_owner() -> None:
    """Of both address families, with the process that holds it, although a file of the process is gone meanwhile."""
    # The probe's own listing of /proc/self/fd takes this number, so that it comes before the socket and then is gone.
    spare = os.open(os.devnull, os.O_RDONLY)
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        os.close(spare)
        port = server.getsockname()[1]
        found = [listener for listener in listeners(Path("/")) if listener["port"] == port]
    assert [listener["processes"] for listener in found] == [[Path("/proc/self/comm").read_text().strip()]]
    assert all(listener["port"] != port for listener in listeners(Path("/")))


def test_unit_of_a_process() -> None:
    """The innermost unit in its control group."""
    assert unit_of("0::/system.slice/apache2.service\n") == "apache2.service"
    assert unit_of("1:name=systemd:/user.slice/user-0.slice/session-1.scope\n0::/\n") == "session-1.scope"
    assert unit_of("0::/\n") == ""


def test_postgresql_as_configured(tmp_path: Path) -> None:
    """Later files win, as in the server."""
    main = "etc/postgresql/17/main"
    root = machine(tmp_path, {f"{main}/postgresql.conf": "max_connections = 100\t# (change requires restart)\n"})
    assert postgresql(root) == {"installed": False, "running": False, "max_connections": 100}
    machine(root, {f"{main}/conf.d/forge.conf": "#max_connections = 7\nmax_connections = '250'\n"})
    assert postgresql(root)["max_connections"] == 250
    machine(root, {"var/lib/postgresql/17/main/postgresql.auto.conf": "max_connections = 300\n"})
    machine(root, {"usr/lib/postgresql/17/bin/postgres": "", "run/postgresql/17-main.pid": ""})
    assert postgresql(root) == {"installed": True, "running": True, "max_connections": 300}


def test_what_is_provisioned_already(tmp_path: Path) -> None:
    """An image has neither package lists nor released apps; `partial` alone is no list."""
    root = machine(tmp_path, V2 | {"var/lib/apt/lists/partial/x": "", "var/lib/apt/lists/lock": ""})
    bare = probe(["/srv"], root)
    assert (bare["released"], bare["package_lists"], bare["systemd_version"]) == ([], False, 0)
    assert (bare["forgectl"], bare["manifest"]) == ([], False)
    assert not bare["container"]
    machine(root, {"run/systemd/container": "podman\n"})
    assert probe(["/srv"], root)["container"]
    machine(root, {"var/lib/forge/shop/state.json": "{}", "var/lib/forge/blog/state.json": "{}"})
    machine(root, {"var/lib/forge/half/lock": "", "var/lib/apt/lists/mirror.example_dists_trixie_Packages.lz4": ""})
    done = probe(["/srv"], root)
    assert (done["released"], done["package_lists"]) == (["blog", "shop"], True)
    machine(root, {"opt/forge/forgectl-0a1b/.complete": "", "opt/forge/forgectl-2c3d/bin/python": ""})
    machine(root, {"var/lib/forge/manifest.json": "{}"})
    done = probe(["/srv"], root)
    assert (done["forgectl"], done["manifest"], done["released"]) == (["forgectl-0a1b"], True, ["blog", "shop"])


ME = pwd.getpwuid(os.getuid())
CONNECTION = "LANG=C\0SSH_CONNECTION=198.51.100.7 50022 203.0.113.10 2222\0SHELL=/bin/bash\0"


def test_the_ssh_session(tmp_path: Path) -> None:
    """Of the process above that has it: sudo leaves nothing of it in the environment below."""
    parent = {"proc/20/status": f"Name:\tsh\nPPid:\t1\nUid:\t{ME.pw_uid}\t0\t0\t0\n", "proc/20/environ": CONNECTION}
    below = {"proc/30/status": "Name:\tpython3\nPPid:\t20\nUid:\t0\t0\t0\t0\n", "proc/30/environ": "LANG=C\0"}
    root = machine(tmp_path, parent | below | {"proc/1/status": "Name:\tsystemd\nPPid:\t0\n"})
    assert ssh_session(root, 30) == (ME.pw_name, "198.51.100.7", 2222)
    assert ssh_session(root, 1) == ("", "", 0)


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 2),
        ({"authorizedkeysfile": ["/etc/ssh/keys/%u .ssh/authorized_keys"]}, 3),
        ({"authorizedkeysfile": ["none"]}, 0),
        ({"trustedusercakeys": ["/etc/ssh/ca.pub"]}, None),
        ({"authorizedkeyscommand": ["/usr/bin/keys"]}, None),
    ],
)
def test_authorized_keys(tmp_path: Path, settings: dict[str, list[str]], count: int | None) -> None:
    """In every file that sshd looks in; who may log in by a certificate or a command can't be told."""
    keys = {
        f"{ME.pw_dir}/.ssh/authorized_keys": "# mine\n\nssh-ed25519 AAAA one\nssh-ed25519 AAAA two\n",
        f"/etc/ssh/keys/{ME.pw_name}": "ssh-ed25519 AAAA three\n",
    }
    root = machine(tmp_path, {name.lstrip("/"): content for name, content in keys.items()})
    stock = {
        "authorizedkeysfile": [".ssh/authorized_keys .ssh/authorized_keys2"],
        "authorizedkeyscommand": ["none"],
        "trustedusercakeys": ["none"],
    }
    assert authorized_keys(root, ME.pw_name, stock | settings) == count
    assert authorized_keys(root, ME.pw_name, {}) is None


def test_where_sshd_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says, and the port that Ansible came in by, which may be systemd's."""
    monkeypatch.setattr(host_probe, "sshd_settings", lambda *_: {"port": ["22", "2200"]})
    monkeypatch.setattr(host_probe, "ssh_session", lambda *_: ("admin", "198.51.100.7", 2222))
    root = machine(tmp_path, {"etc/ssh/sshd_config": "#Include x\ninclude sshd_config.d/*.conf\n"})
    assert ssh(root) == {
        "user": "admin",
        "client": "198.51.100.7",
        "keys": None,
        "ports": [22, 2200, 2222],
        "includes": True,
    }
    monkeypatch.setattr(host_probe, "sshd_settings", lambda *_: {})
    monkeypatch.setattr(host_probe, "ssh_session", lambda *_: ("", "", 0))
    root = machine(tmp_path, {"etc/ssh/sshd_config": "# Include /etc/ssh/sshd_config.d/*.conf\n"})
    assert (ssh(root)["ports"], ssh(root)["includes"]) == ([22], False)


# As Debian ships it.
RULES = """#!/usr/sbin/nft -f

flush ruleset

table inet filter {
\tchain input {
\t\ttype filter hook input priority filter;
\t}
\tchain forward {
\t\ttype filter hook forward priority filter;
\t}
\tchain output {
\t\ttype filter hook output priority filter;
\t}
}
"""


def test_other_firewalls(tmp_path: Path) -> None:
    """Those that are on, and rules of the host's own."""
    root = machine(tmp_path, {"etc/ufw/ufw.conf": "# ENABLED=yes\nENABLED=no\n", "etc/nftables.conf": RULES})
    assert firewalls(root) == {}
    own = RULES.replace("hook input priority filter;", "hook input priority filter; policy drop;")
    machine(root, {"etc/ufw/ufw.conf": "ENABLED=yes\n", "etc/nftables.conf": own})
    machine(root, {"etc/systemd/system/multi-user.target.wants/firewalld.service": ""})
    assert set(firewalls(root)) == {"ufw", "firewalld", "/etc/nftables.conf"}
    assert "policy drop" in firewalls(root)["/etc/nftables.conf"]
    machine(root, {"etc/nftables.conf": f'{RULES}include "/etc/nftables.d/*.nft"\n'})
    assert "include" in firewalls(root)["/etc/nftables.conf"]


def test_this_machine() -> None:
    """What it is; a folder that does not exist yet counts as the one that it will lie in."""
    found = probe(["/", "/nowhere/yet"])
    release = platform.freedesktop_os_release()
    assert (found["distribution_id"], found["distribution_version"]) == (release["ID"], release.get("VERSION_ID", ""))
    assert found["cpus"] <= CPUS
    space = os.statvfs("/")
    assert abs(found["disk_free_mib"]["/nowhere/yet"] - space.f_bavail * space.f_frsize // 2**20) < 100
    system = subprocess.run(
        ["/usr/bin/python3", "-c", "import platform; print(platform.python_version())"],
        capture_output=True,
        text=True,
        check=True,
    )
    # The one that releases run on, not the one that this test or Ansible runs on.
    assert found["python_version"] == system.stdout.strip()
