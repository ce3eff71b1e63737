"""What comes in, seen from elsewhere while somebody really listens; and the tables of others."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from forge_access import Stranger, gets_in, listening, rules, stranger, vm
from forge_scenario import playbook, ready, until
from testinfra.host import Host

# Of others: what Docker and podman keep in tables of their own, and a rule of the administrator's.
THEIRS = """
table ip nat { chain DOCKER { }; chain POSTROUTING { type nat hook postrouting priority 100; masquerade; }; }
table inet netavark { chain INPUT { type filter hook input priority 0; tcp dport 9999 accept; }; }
"""


@pytest.fixture(scope="module")
def outsider() -> Iterator[Stranger]:
    """A machine that the inventory does not name."""
    with stranger(200) as made:
        yield made


def test_closed_ports_are_silent(host: Host, outsider: Stranger) -> None:
    """Somebody listens on all addresses, and answers on loopback; from elsewhere there is not even a refusal."""
    with listening(host, 8081, 5432 + 1):
        assert [outsider.connects(8081), outsider.connects(5433), outsider.connects(8081, "udp")] == ["lost"] * 3
    # Nor where nobody listens.
    assert outsider.connects(8082) == "lost"


def test_open_ports_answer(host: Host, outsider: Stranger) -> None:
    """Those that the inventory adds, by the protocol and from the networks that it says."""
    with listening(host, 7001, 7002):
        assert (outsider.connects(7001), outsider.connects(7001, "udp")) == ("taken", "taken")
        assert (outsider.connects(7002), outsider.connects(7002, "udp")) == ("lost", "lost")
        with stranger(201) as named:
            assert (named.connects(7002), named.connects(7002, "udp")) == ("taken", "lost")
    # A port that is open without a listener says so.
    assert outsider.connects(7001) == "refused"


def test_the_site_answers(outsider: Stranger, client: httpx.Client) -> None:
    """Through 443; and 80 for the redirect."""
    assert ready(client)
    address = vm()["address"]
    fetch = "import urllib.request as r; r.HTTPRedirectHandler.redirect_request = lambda *a: None\n"
    fetch += f"q = r.Request('http://{address}/', headers={{'Host': 'inbox.example.com'}})\n"
    fetch += "try: r.build_opener(r.ProxyHandler({})).open(q, timeout=5)\nexcept Exception as e: print(e.code)"
    assert outsider.run("python3", "-c", fetch).stdout.strip() in {"301", "308"}


def test_tables_of_others(host: Host, outsider: Stranger) -> None:
    """They stay through an apply, a stop and a start of the firewall, and through a stop of nftables.service."""

    def others() -> dict[str, str]:
        tables = [line.removeprefix("table ") for line in host.check_output("nft list tables").splitlines()]
        return {table: host.check_output(f"nft list table {table}") for table in tables if table != "inet forge"}

    host.check_output("printf %s %s | nft -f -", "%s", THEIRS)
    try:
        before = others()
        assert {"ip nat", "inet netavark"} <= before.keys()
        loaded = rules(host)
        host.check_output("systemctl reload forge-firewall.service")
        assert (others(), rules(host)) == (before, loaded)
        host.check_output("systemctl stop nftables.service")
        assert (others(), rules(host)) == (before, loaded)
        with listening(host, 8081):
            host.check_output("systemctl stop forge-firewall.service")
            assert others() == before
            assert outsider.connects(8081) == "taken"
            host.check_output("systemctl start forge-firewall.service")
            assert outsider.connects(8081) == "lost"
        assert (others(), rules(host)) == (before, loaded)
    finally:
        host.check_output("nft delete table ip nat; nft delete table inet netavark")


def test_a_start_that_fails_once(host: Host) -> None:
    """An attempt at a boot may find no sandbox: the next one loads the rules."""
    loaded = rules(host)
    folder, flag = "/run/systemd/system/forge-firewall.service.d", "/run/forge-failed-once"
    once = f"[Service]\nExecStartPre=+/bin/sh -c 'test -e {flag} || {{ touch {flag}; exit 1; }}'\n"
    host.check_output("systemctl stop forge-firewall.service")
    try:
        host.check_output(f"mkdir {folder}; printf %s > {folder}/once.conf; systemctl daemon-reload", once)
        host.run("systemctl start forge-firewall.service")
        assert until(lambda: host.service("forge-firewall.service").is_running, 10)
        assert host.file(flag).exists
        assert rules(host) == loaded
    finally:
        host.check_output(f"rm --recursive --force {folder} {flag}; systemctl daemon-reload")
        host.check_output("systemctl start forge-firewall.service")


def test_rules_that_somebody_flushed(host: Host) -> None:
    """The next run sees it, and loads them again; the one after that has nothing to do."""
    loaded = rules(host)
    host.check_output("nft delete table inet forge")
    run = playbook("--tags", "hardening")
    assert run.returncode == 0, run.stdout
    assert "changed=1 " in run.stdout
    assert rules(host) == loaded
    assert gets_in()
    again = playbook("--tags", "hardening")
    assert "changed=0 " in again.stdout, again.stdout
