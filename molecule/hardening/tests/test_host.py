"""The host under the apps: what its kernel is told, what a crash leaves behind, and what updates it by itself."""

from __future__ import annotations

import re

import pytest
from forge_scenario import show, until
from testinfra.host import Host

SETTINGS = "/etc/sysctl.d/90-forge.conf"
CRASH = "cd /var/tmp && ulimit -c; kill -SEGV $$"
CORES = "find / -xdev -type f -name 'core*' -newer /run/before-the-crash -regex '.*/core\\(\\.[0-9]+\\)?'"


def settings(host: Host) -> dict[str, str]:
    """What the kernel was told."""
    lines = (line.partition("=") for line in host.check_output("cat %s", SETTINGS).splitlines())
    return {name.strip(): value.strip() for name, found, value in lines if found and not name.startswith("#")}


def test_kernel_settings_are_in_force(host: Host) -> None:
    """Read from the kernel; each of them exists."""
    told = settings(host)
    assert len(told) > 15
    live = {name: host.check_output("sysctl --values %s", name).strip() for name in told}
    assert live == told


def test_redirects_and_forged_sources_are_off_for_every_interface(host: Host) -> None:
    """Also for those that were there before the settings: `all` alone does not reach them in each case."""
    for name in ("accept_redirects", "accept_source_route"):
        values = host.check_output(f"cat /proc/sys/net/ipv4/conf/all/{name} /proc/sys/net/ipv6/conf/*/{name}").split()
        assert values[0] == "0"
    # The kernel takes the larger one of `all` and the interface's.
    assert host.check_output("cat /proc/sys/net/ipv4/conf/all/rp_filter") == "1"


@pytest.mark.parametrize("how", ["of a service", "of a person", "of the app"])
def test_a_crash_leaves_no_core(host: Host, live: str, how: str) -> None:
    """In no folder that it may write to."""
    host.check_output("touch /run/before-the-crash")
    if how == "of a service":
        run = "systemd-run --quiet --wait --collect --property=WorkingDirectory=/var/tmp sh -c 'kill -SEGV $$'"
        assert host.run(run).rc != 0
    elif how == "of a person":
        assert host.run("sh -c %s", CRASH).stdout.split()[:1] == ["0"]
    else:
        worker = host.check_output("pgrep --parent %s", show(host, live, "MainPID")).split()[0]
        host.check_output("kill -SEGV %s", worker)
        until(lambda: host.run("test -e /proc/%s", worker).rc != 0, 10)
    assert host.check_output(CORES) == ""


def test_no_service_may_dump_core(host: Host, live: str) -> None:
    """Of processes that run: only 1 keeps the kernel from handing a crash to a program as well."""
    cluster = host.check_output(
        "systemctl list-units --plain --no-legend 'postgresql@*' | cut --delimiter=' ' --fields=1"
    )
    for unit in ("nginx.service", cluster, live):
        limits = host.check_output("cat /proc/%s/limits", show(host, unit, "MainPID"))
        assert re.findall(r"^Max core file size\s+(\S+)", limits, re.MULTILINE) == ["1"], unit


def test_time_comes_from_the_servers_that_were_named(host: Host) -> None:
    """The service is enabled; a container has its machine's clock, so there it does not run."""
    assert host.service("systemd-timesyncd").is_enabled
    named = host.check_output("systemd-analyze cat-config systemd/timesyncd.conf")
    servers = " ".join(host.ansible.get_variables().get("base_time_servers", []))
    assert not servers or re.findall(r"^NTP=(.*)$", named, re.MULTILINE)[-1] == servers


def test_no_swap_unless_asked(host: Host) -> None:
    """Secrets stay in memory."""
    assert not host.file("/swapfile").exists


def test_updater_takes_security_updates_only(host: Host) -> None:
    """What it says itself: whose packages it would install, and whose not."""
    said = host.run("unattended-upgrade --dry-run --debug")
    output = said.stdout + said.stderr
    (allowed,) = set(re.findall(r"^Allowed origins are: (.*)$", output, re.MULTILINE))
    codename = host.check_output(". /etc/os-release && echo $VERSION_CODENAME")
    assert allowed == f"origin=Debian,codename={codename}-security,label=Debian-Security"
    # Both archives are known to apt, so that it does turn one of them down.
    known = host.check_output("apt-cache policy")
    assert "l=Debian-Security" in known
    assert re.search(r"l=Debian,", known)


def test_updater_and_reboot_are_due_in_the_window(host: Host) -> None:
    """Updates at its beginning, the reboot every ten minutes until its end."""
    window = host.ansible.get_variables().get("base_reboot_window", "03:00-04:00")
    start = window.partition("-")[0]
    for unit, times in (("apt-daily-upgrade.timer", 1), ("forge-reboot.timer", 6)):
        assert host.service(unit).is_running
        due = set(re.findall(r"OnCalendar=\*-\*-\* ([\d:]+)", show(host, unit, "TimersCalendar")))
        assert f"{start}:00" in due
        assert len(due) == times


@pytest.mark.parametrize("action", ["start", "restart", "upgrade", "try-restart"])
@pytest.mark.parametrize("name", ["nginx", "nginx.service"])
def test_packages_neither_start_nor_restart_nginx(host: Host, name: str, action: str) -> None:
    """They ask, and are told so; they may reload and stop it, and do as they like with others."""
    assert host.run("/usr/sbin/policy-rc.d %s %s", name, action).rc == 101
    assert host.run("/usr/sbin/policy-rc.d --quiet %s %s", name, action).rc == 101
    assert host.run("/usr/sbin/policy-rc.d %s reload", name).rc == 0
    assert host.run("/usr/sbin/policy-rc.d ssh %s", action).rc == 0


@pytest.mark.parametrize("protocol", ["dccp", "rds", "sctp", "tipc"])
def test_protocols_that_nobody_speaks_are_not_loaded(host: Host, protocol: str) -> None:
    """Whoever opens a socket of theirs would have the kernel load them."""
    assert f"install {protocol} /bin/false" in host.check_output("modprobe --showconfig").splitlines()
