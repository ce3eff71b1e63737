"""After a reboot the rules are there before anybody can connect; a trial that was under way is over."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
from forge_access import access, begin, gets_in, listening, plan, rules, stranger
from forge_scenario import CONTAINER, podman, reachable, ready, reboot, until
from testinfra.host import Host


def test_reboot(host: Host, client: httpx.Client, unit: Callable[[str], Any]) -> None:
    """The same rules, the same sshd, and systemd is content."""
    before = access(host)
    reboot(client, patience=30)
    until(lambda: reachable(host), 60)
    assert access(host) == before
    for name in ("forge-firewall.service", "ssh.service", "fail2ban.service"):
        assert unit(name).is_running
        assert unit(name).is_enabled
    with listening(host, 8081), stranger(200) as outsider:
        assert outsider.connects(8081) == "lost"
    assert until(lambda: host.run("systemctl is-system-running").stdout.strip() == "running", 60, every=1)


def test_power_cut_during_a_trial(host: Host, client: httpx.Client) -> None:
    """Of a configuration that lets nobody in; the old one is there from the first packet on."""
    before = access(host)
    text = json.loads(plan(host, 600))
    shut = text | {"firewall": text["firewall"].replace("tcp dport 22 accept", ""), "ssh": text["ssh"] + "# a remark\n"}
    assert begin(host, json.dumps(shut)).rc == 0
    assert "tcp dport 22 accept" not in rules(host)
    assert not gets_in()
    podman("restart", "--time", "0", CONTAINER)
    until(gets_in, 90, every=0.5)
    until(lambda: reachable(host), 60)
    assert access(host) == before
    assert until(lambda: ready(client), 90, every=0.5)
