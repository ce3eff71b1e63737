"""A database user that Vault leases to each slot: kept, replaced before its end, and gone when its slot is.

PostgreSQL is the host's own, which is made to look like one elsewhere that Vault reaches.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import httpx
import hvac
import pytest
from forge_events import Provisioning, Unnoticed, answer, assert_one_live, forgectl, history, leased_users, psql, settle
from forge_scenario import CONTAINER, main_pid, podman, ready, secrets_at, show, until
from forge_search import Search
from forge_traces import shown
from forge_vault import ROLE, SOURCE, alerts, cursor, down, environment, journal, passed
from testinfra.host import Host

Status = Callable[[], dict[str, Any]]

POLICY = "forge-inbox-lease"
LONG = {"default_ttl": "120s", "max_ttl": "600s"}
# The first renewal, after 24 to 36 s, gives 39 s at least: enough for a cutover, and before the last quarter.
SHORT = {"default_ttl": "60s", "max_ttl": "75s"}
CREATION = "CREATE ROLE \"{{name}}\" LOGIN PASSWORD '{{password}}' VALID UNTIL '{{expiration}}' IN ROLE inbox_rw"
# Asks a lease unit for its user, as forge-launch does.
ASK = """
import socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
print(len(connection.recv(4096)))
"""


def sql(text: str) -> None:
    """Run statements as PostgreSQL's administrator; they are no arguments, since some hold passwords."""
    command = ("runuser", "--user", "postgres", "--", "psql", "--quiet", "--set", "ON_ERROR_STOP=1", "inbox")
    # Whatever takes long is in PostgreSQL's log otherwise.
    podman("exec", "--interactive", CONTAINER, *command, input=f"SET log_min_duration_statement = -1; {text}".encode())


def quoted(text: str) -> str:
    """A literal of SQL."""
    return "'" + text.replace("'", "''") + "'"


def lease_role(vault: hvac.Client, ttls: dict[str, str]) -> None:
    """Say how long users live that are leased from now on."""
    vault.secrets.database.create_role(name="inbox", db_name="inbox", creation_statements=[CREATION], **ttls)


@pytest.fixture(scope="module", autouse=True)
def _leased(host: Host, vault: hvac.Client, provisioning: Provisioning) -> None:
    """The app's database is elsewhere, and Vault makes its users."""
    address = host.ansible.get_variables()["ansible_host"]
    host.check_output(
        "echo \"listen_addresses = '*'\" > $(ls -d /etc/postgresql/*/main)/conf.d/99-lease.conf && "
        "echo 'host inbox all samenet scram-sha-256' >> $(ls /etc/postgresql/*/main/pg_hba.conf) && "
        "systemctl restart 'postgresql@*.service'"
    )
    migrate = secrets_at(vault, "forge/inbox/migrate")["database_password"]
    sql(f"ALTER ROLE inbox_migrate PASSWORD {quoted(migrate)}")
    engine = "engine-password-of-the-test"
    sql(f"CREATE ROLE vault LOGIN CREATEROLE PASSWORD {quoted(engine)}; GRANT inbox_rw TO vault WITH ADMIN OPTION")
    vault.sys.enable_secrets_engine("database")
    vault.secrets.database.configure(
        name="inbox",
        plugin_name="postgresql-database-plugin",
        allowed_roles=["inbox"],
        username="vault",
        password=engine,
        connection_url=f"postgresql://{{{{username}}}}:{{{{password}}}}@{address}:5432/inbox?sslmode=disable",
        password_authentication="scram-sha-256",
    )
    lease_role(vault, LONG)
    vault.sys.create_or_update_policy(POLICY, 'path "database/creds/inbox" { capabilities = ["read"] }')
    vault.auth.approle.create_or_update_approle(
        ROLE, token_policies=[ROLE, POLICY], token_period="120s", token_explicit_max_ttl="600s"
    )
    database = host.ansible.get_variables()["apps"]["inbox"]["database"] | {
        "placement": "external",
        "name": "inbox",
        "url": f"postgresql+asyncpg://nobody@{address}/inbox",
        "migration_url": f"postgresql+asyncpg://inbox_migrate@{address}/inbox",
        "vault_role": "inbox",
    }
    provisioning.ensure(host, options=SOURCE, app_database=database)


def unit(status: Status) -> str:
    """The unit beside the slot that serves."""
    return f"inbox-lease@{status()['live']['slot']}.service"


def user(host: Host, status: Status) -> str:
    """The database user of what serves."""
    url = environment(host, f"inbox@{status()['live']['slot']}.service")["FORGE_DATABASE_URL"]
    match = re.search(r"//([^@/:]+)@", url)
    assert match is not None
    return match[1]


def valid_until(host: Host, name: str) -> float:
    """When a database user ends, by PostgreSQL's own clock."""
    return float(psql(host, f"SELECT extract(epoch FROM rolvaliduntil) FROM pg_roles WHERE rolname = '{name}'"))


def kill(host: Host, status: Status) -> None:
    """End the process beside the slot that serves; its next one renews at once."""
    host.check_output("kill -KILL %s", str(main_pid(host, unit(status))))


def renew(host: Host, status: Status) -> None:
    """Have the lease renewed, by another process."""
    leased = user(host, status)
    end = valid_until(host, leased)
    kill(host, status)
    until(lambda: valid_until(host, leased) > end, 20)


def test_slot_has_a_user_of_its_own(host: Host, status: Status) -> None:
    """Made by Vault; a unit runs beside the slot that serves, and none beside the other."""
    assert leased_users(host) == {user(host, status)}
    listed = host.check_output("systemctl list-units --no-legend --plain --state=active 'inbox-lease@*'")
    assert [line.split()[0] for line in listed.splitlines()] == [unit(status)]
    assert forgectl(host, "secrets", "check", "inbox").rc == 0


@pytest.mark.parametrize("who", ["inbox-migrate", "www-data", "nobody"])
def test_user_is_for_the_app_alone(host: Host, status: Status, who: str) -> None:
    """Whoever else asks the unit for it gets nothing."""
    socket = f"/run/forge-lease/inbox-{status()['live']['slot']}/socket"
    asked = host.run("runuser --user=%s -- python3 -c %s %s", who, ASK, socket)
    assert asked.rc != 0 or asked.stdout.strip() == "0", asked
    assert int(host.check_output("runuser --user=inbox -- python3 -c %s %s", ASK, socket)) > 0


def test_user_outlives_processes(unnoticed: Unnoticed, host: Host, status: Status) -> None:
    """SIGKILL of the unit beside the slot: the next process renews the same user, and nobody notices."""
    before, since = user(host, status), cursor(host)
    with unnoticed("the lease's unit killed"):
        renew(host, status)
    assert f"goes on with the lease of {before}" in journal(host, since, f"--unit={unit(status)}")
    assert (user(host, status), leased_users(host)) == (before, {before})
    assert alerts(host, since) == []


def test_restarted_slot_has_the_same_user(host: Host, status: Status, client: httpx.Client) -> None:
    """Its unit hands it out again."""
    before = user(host, status)
    service = f"inbox@{status()['live']['slot']}.service"
    host.check_output("kill -KILL %s", str(main_pid(host, service)))
    assert until(lambda: int(show(host, service, "NRestarts")) and ready(client), 30, every=0.2)
    assert user(host, status) == before


def test_lost_lease_is_replaced(host: Host, vault: hvac.Client, status: Status, client: httpx.Client) -> None:
    """Revoked by an administrator: on-call is told, and a fresh slot has another user."""
    before, slot, since = user(host, status), status()["live"]["slot"], cursor(host)
    vault.sys.revoke_prefix("database/creds/inbox")
    until(lambda: before not in leased_users(host), 10)
    # It would find out at its next renewal.
    host.check_output("systemctl restart %s", unit(status))
    assert until(lambda: status()["live"]["slot"] != slot, 60, every=0.5)
    settle(status)
    assert "is lost" in alerts(host, since)[0]
    assert until(lambda: leased_users(host) == {user(host, status)}, 10)
    assert user(host, status) != before
    assert ready(client)


def test_vault_may_be_away(unnoticed: Unnoticed, host: Host, vault: hvac.Client, status: Status) -> None:
    """For less than a lease lasts: an attempt to renew it is in vain, and nobody else notices."""
    before, since = user(host, status), cursor(host)
    with unnoticed("Vault away"):
        # All of the lease is left then, so that however long a slow machine takes, no alert is due.
        renew(host, status)
        with down(vault):
            kill(host, status)
            until(lambda: "next attempt in" in "\n".join(journal(host, since, f"--unit={unit(status)}")), 45, every=0.5)
    assert (user(host, status), leased_users(host)) == (before, {before})
    assert alerts(host, since) == []


@pytest.mark.exhaustive
def test_user_is_replaced_before_its_end(unnoticed: Unnoticed, host: Host, vault: hvac.Client, status: Status) -> None:
    """Vault renews it so far and no further: under load another slot takes over in time, and the old user is gone."""
    lease_role(vault, SHORT)
    answer(forgectl(host, "recycle", "inbox", "--json"))
    before, live, since = user(host, status), status()["live"], cursor(host)
    with unnoticed("a lease that ends"):
        assert until(lambda: status()["live"]["slot"] != live["slot"], 90, every=0.5)
        lease_role(vault, LONG)
    assert until(lambda: leased_users(host) == {user(host, status)}, 10)
    assert user(host, status) != before
    assert_one_live(host, status, live["release"])
    assert history(host)[-1]["action"] == "recycle"
    assert alerts(host, since) == []


def test_user_is_nowhere_else(live: str, elsewhere: dict[str, str]) -> None:
    """Nor any secret: in memory file systems, units, the journal, processes but the app's."""
    found = shown(Search(passed() | elsewhere))
    assert {each.place for each in found if re.fullmatch(rf"\d+/{live}/environ", each.place)}
    assert [
        each
        for each in found
        if not re.fullmatch(rf"\d+/{live}/environ|run/credentials/inbox[^/]+/secret-id", each.place)
    ] == []
