"""Without Vault: the values are sealed on the host, and all promises are the same."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from secrets import token_urlsafe
from typing import Any

import httpx
import hvac
import pytest
from forge_events import Provisioning, Unnoticed, answer, assert_one_live, forgectl, history, leased_users, settle
from forge_scenario import CONTAINER, podman, ready, until
from forge_search import Search
from forge_traces import shown
from forge_vault import ROLE, SOURCE, alerts, cursor, down, passed, serving, timer
from testinfra.host import Host

Status = Callable[[], dict[str, Any]]

ON_THE_HOST = "systemd_creds"


def set_value(key: str, value: str, *options: str) -> None:
    """Seal a value, as its operator does."""
    podman(
        *("exec", "--interactive", CONTAINER, "forgectl", "secrets", "set", "inbox", key, *options),
        input=value.encode(),
    )


@pytest.fixture(scope="module", autouse=True)
def _unleased(host: Host, vault: hvac.Client) -> Iterator[None]:
    """What the module before needed for its leases, with which this one begins, is gone in the end."""
    yield
    vault.sys.revoke_force("database/creds/inbox")
    vault.sys.disable_secrets_engine("database")
    vault.auth.approle.create_or_update_approle(
        ROLE, token_policies=[ROLE], token_period="0s", token_explicit_max_ttl="0s"
    )
    # PostgreSQL finds that out at the next reboot: the load that ends with this module would notice a restart.
    host.check_output("rm --force /etc/postgresql/*/main/conf.d/99-lease.conf")


@pytest.fixture(scope="module")
def signing_key(elsewhere: dict[str, str]) -> str:
    """What the operator sets; awkward, as values are."""
    return elsewhere.setdefault("sealed signing key", f"{token_urlsafe(24)}'\"$\\`\n%é€ß{token_urlsafe(24)}")


def test_run_stops_with_the_commands_for_what_is_missing(
    host: Host, status: Status, provisioning: Provisioning
) -> None:
    """Before anything moves: what serves goes on; the database's passwords are nobody's business."""
    settle(status)
    before = status()["live"]
    run = provisioning.run(host, options=SOURCE, secrets_source=ON_THE_HOST)
    assert run.returncode == 2, run.stdout
    commands = re.findall(r"^ *sudo forgectl secrets set inbox (\w+)$", run.stdout, re.MULTILINE)
    assert set(commands) == {"signing_key", "partner_token"}, run.stdout
    assert status()["live"] == before


def test_run_goes_on_once_they_are_set(
    host: Host,
    status: Status,
    client: httpx.Client,
    provisioning: Provisioning,
    signing_key: str,
    elsewhere: dict[str, str],
) -> None:
    """The app has the values, what Vault had leased is gone, and the next run has nothing to do."""
    set_value("signing_key", signing_key)
    set_value("partner_token", elsewhere.setdefault("sealed partner token", token_urlsafe(48)))
    run = provisioning.run(host, options=SOURCE, secrets_source=ON_THE_HOST)
    assert run.returncode == 0, run.stdout
    found = serving(host, status)
    assert (found["FORGE_SIGNING_KEY"], found["PARTNER_TOKEN"]) == (signing_key, elsewhere["sealed partner token"])
    elsewhere["sealed database password"] = found["FORGE_DATABASE_PASSWORD"]
    assert ready(client)
    settle(status)
    until(lambda: not leased_users(host), 10)
    assert host.run("systemctl is-active 'inbox-lease@*'").stdout == ""
    again = provisioning.run(host, options=SOURCE, secrets_source=ON_THE_HOST)
    assert (again.returncode, "changed=0 " in again.stdout) == (0, True), again.stdout


def test_starts_need_no_vault(host: Host, vault: hvac.Client, client: httpx.Client, live: str) -> None:
    """It is down, and the app starts."""
    with down(vault):
        host.check_output("systemctl restart %s", live)
        assert until(lambda: ready(client), 30, every=0.2)
        assert forgectl(host, "secrets", "check", "inbox").rc == 0


def test_rotation(unnoticed: Unnoticed, host: Host, status: Status, elsewhere: dict[str, str]) -> None:
    """A new value goes into service by a cutover, and so does a new database password."""
    before = status()["live"]
    fresh = elsewhere.setdefault("second sealed partner token", token_urlsafe(48))
    with unnoticed("rotation of a sealed value"):
        set_value("partner_token", fresh)
        timer(host)
    assert serving(host, status)["PARTNER_TOKEN"] == fresh
    assert_one_live(host, status, before["release"])
    with unnoticed("rotation of a sealed database password"):
        answer(forgectl(host, "secrets", "rotate", "inbox", "--database-password", "--json"))
    elsewhere["second sealed database password"] = serving(host, status)["FORGE_DATABASE_PASSWORD"]
    assert elsewhere["second sealed database password"] != elsewhere["sealed database password"]


def test_bad_rotation(
    unnoticed: Unnoticed,
    host: Host,
    status: Status,
    client: httpx.Client,
    signing_key: str,
    elsewhere: dict[str, str],
) -> None:
    """A key that is gone, a value that the app refuses: the old ones serve, also after a restart of the slot."""
    before = status()["live"]
    since = cursor(host)
    with unnoticed("sealed values that are no good"):
        answer(forgectl(host, "secrets", "unset", "inbox", "partner_token", "--json"))
        timer(host)
        set_value("partner_token", elsewhere.setdefault("sealed partner token of a bad version", token_urlsafe(16)))
        set_value("signing_key", elsewhere.setdefault("sealed signing key that is too short", token_urlsafe(16)))
        timer(host)
        settle(status)
    assert status()["live"] == before
    assert history(host)[-1]["outcome"] == "failed"
    assert len(alerts(host, since)) == 2
    host.check_output("systemctl restart %s", f"inbox@{before['slot']}.service")
    assert until(lambda: ready(client), 30, every=0.2)
    assert serving(host, status)["FORGE_SIGNING_KEY"] == signing_key


def test_sealed_values_are_for_root_alone(host: Host) -> None:
    """Nobody else reads the files, and they open on this host only."""
    names = host.check_output("ls /etc/credstore.encrypted").split()
    sealed = [name for name in names if ".values" in name]
    assert {"forge.inbox.app.values", "forge.inbox.migrate.values"} <= set(sealed)
    for name in sealed:
        path = f"/etc/credstore.encrypted/{name}"
        for user in ("inbox", "inbox-migrate", "www-data"):
            assert "Permission denied" in host.run("runuser --user=%s -- cat %s", user, path).stderr


def test_values_are_nowhere_else(live: str, elsewhere: dict[str, str]) -> None:
    """In memory file systems, units, processes or the journal; systemd has them for the unit, as long as it runs."""
    found = shown(Search(passed() | elsewhere))
    allowed = rf"\d+/{live}/environ|run/credentials/{live}/values"
    assert {each.place for each in found if re.fullmatch(rf"\d+/{live}/environ", each.place)}
    assert [each for each in found if not re.fullmatch(allowed, each.place)] == []
