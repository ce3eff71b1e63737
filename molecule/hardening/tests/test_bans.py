"""Whoever keeps guessing is banned from SSH, without an answer; and who is not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from forge_access import Stranger, gets_in, listening, ssh, stranger
from forge_scenario import until
from testinfra.host import Host

ATTEMPTS = 3  # hardening_fail2ban_attempts of this scenario
PATIENCE = 40


@pytest.fixture
def guesser() -> Iterator[Stranger]:
    """A machine that has done nothing yet."""
    with stranger(200) as made:
        yield made


@pytest.fixture(autouse=True)
def _no_bans(host: Host) -> Iterator[None]:
    """Before and after."""
    host.check_output("fail2ban-client unban --all")
    yield
    host.check_output("fail2ban-client unban --all")


def banned(host: Host) -> list[str]:
    """The addresses that are banned from SSH; none while fail2ban starts."""
    return str(host.check_output("fail2ban-client get sshd banip || true")).split()


def test_guessing_is_banned(host: Host, guesser: Stranger) -> None:
    """From another address, with real attempts; the site is still there for it, and so is SSH once it is unbanned."""
    assert guesser.connects(22) == "taken"
    guesser.guesses("root", ATTEMPTS)
    until(lambda: guesser.address in banned(host), PATIENCE, every=0.5)
    assert guesser.connects(22) == "lost"
    with listening(host, 7001):
        assert guesser.connects(7001) == "taken"
    table = host.check_output("nft list table inet forge-bans")
    assert guesser.address in table
    assert "drop" in table
    assert "reject" not in table
    assert gets_in()
    host.check_output("fail2ban-client set sshd unbanip %s", guesser.address)
    # sshd of Debian 13 has penalties of its own, of seconds.
    until(lambda: guesser.connects(22) == "taken", PATIENCE, every=1)


def test_a_ban_outlasts_a_restart(host: Host, guesser: Stranger) -> None:
    """Of fail2ban, and a reload of the firewall; its table is its own."""
    host.check_output("fail2ban-client set sshd banip %s", guesser.address)
    assert guesser.connects(22) == "lost"
    host.check_output("systemctl restart fail2ban.service forge-firewall.service")
    until(lambda: guesser.address in banned(host), PATIENCE, every=0.5)
    until(lambda: guesser.connects(22) == "lost", PATIENCE, every=0.5)


def test_who_is_named_is_not_banned(host: Host) -> None:
    """hardening_fail2ban_ignore."""
    with stranger(202) as named:
        named.guesses("root", 2 * ATTEMPTS)
        until(lambda: f"Ignore {named.address} by ip" in ignored(host), PATIENCE, every=0.5)
        assert banned(host) == []
        assert named.connects(22) == "taken"


def test_the_operator_is_not_banned(host: Host) -> None:
    """Failures from the address that the operator is logged in from, as when an agent offers too many keys."""
    line = host.check_output("ss -Htn state established '( sport = :22 )'").splitlines()[0]
    client = line.split()[3].rpartition(":")[0].strip("[]")
    for _ in range(ATTEMPTS + 1):
        assert ssh("true", "BatchMode=yes", user="nobody").returncode == 255
    until(lambda: f"Ignore {client} by command" in ignored(host), PATIENCE, every=0.5)
    assert banned(host) == []
    until(gets_in, PATIENCE, every=1)


def ignored(host: Host) -> str:
    """What fail2ban says of those that it leaves alone."""
    return str(host.run("grep -h ' Ignore ' /var/log/fail2ban.log").stdout)


def test_bans_grow(host: Host) -> None:
    """Each is longer than the one before, up to a week."""
    settings = {
        name: host.check_output(f"fail2ban-client get sshd {name}")
        for name in ("bantime", "bantime.increment", "bantime.maxtime", "maxretry")
    }
    assert settings == {
        "bantime": "600",
        "bantime.increment": "True",
        "bantime.maxtime": "604800",
        "maxretry": str(ATTEMPTS),
    }
