"""The database: who gets in and how, what each role may do, and that the app refuses one of another environment."""

from __future__ import annotations

import base64
import json
import re

import httpx
import hvac
import pytest
from forge_scenario import Status, secrets_at, until
from testinfra.host import Host

SOCKET = "/var/run/postgresql"


@pytest.fixture
def passwords(vault: hvac.Client) -> dict[str, str]:
    """Each role's password, from Vault."""
    return {
        f"inbox_{kind}": secrets_at(vault, f"forge/inbox/{kind}")["database_password"] for kind in ("app", "migrate")
    }


def admin(host: Host, query: str, database: str = "inbox") -> str:
    """Ask as the server's administrator."""
    with host.sudo("postgres"):
        command = "psql --no-psqlrc --no-align --tuples-only --set=ON_ERROR_STOP=1 --dbname=%s --command=%s"
        return str(host.check_output(command, database, query))


def ask(
    host: Host, role: str, password: str, query: str, database: str = "inbox", server: str = SOCKET
) -> tuple[int, str]:
    """Ask as a role that logs in with a password; return psql's exit code and all that it said."""
    # sudo writes commands into the journal, where no password may be: it travels encoded.
    encoded = base64.b64encode(password.encode()).decode()
    command = "PGPASSWORD=$(echo %s | base64 --decode) psql --no-psqlrc --no-align --tuples-only"
    options = "--host=%s --username=%s --dbname=%s --command=%s"
    result = host.run(f"{command} {options}", encoded, server, role, database, query)
    return result.rc, (result.stdout + result.stderr).strip()


def test_passwords_are_scram_and_asked_for(host: Host, passwords: dict[str, str]) -> None:
    """Verifiers only; the right password lets in through the socket and loopback, a wrong one nowhere.

    The second of the app's two roles has none until a rotation, so that nobody gets in as that.
    """
    verifiers = admin(
        host,
        "SELECT rolname || ' ' || coalesce(rolpassword, 'none') FROM pg_authid "
        "WHERE rolcanlogin AND rolname <> 'postgres'",
    )
    assert sorted(line.split("$")[0] for line in verifiers.splitlines()) == sorted(
        ["inbox_app_2 none", *(f"{role} SCRAM-SHA-256" for role in passwords)]
    )
    for server in (SOCKET, "127.0.0.1"):
        rc, said = ask(host, "inbox_app_2", passwords["inbox_app"], "SELECT 1", server=server)
        assert (rc, "password authentication failed" in said) == (2, True)
    assert admin(host, "SHOW password_encryption") == "scram-sha-256"
    for role, password in passwords.items():
        for server in (SOCKET, "127.0.0.1"):
            assert ask(host, role, password, "SELECT 1", server=server) == (0, "1")
            rc, said = ask(host, role, "wrong", "SELECT 1", server=server)
            assert (rc, "password authentication failed" in said) == (2, True)


def test_nobody_else_gets_in(host: Host, passwords: dict[str, str]) -> None:
    """No port to the outside, the administrator by being that user only, and no role in another database."""
    listening = host.check_output("ss --no-header --listening --tcp --numeric --processes | grep postgres")
    assert {line.split()[3] for line in listening.splitlines()} <= {"127.0.0.1:5432", "[::1]:5432"}
    for user in ("inbox", "inbox-migrate", "www-data"):
        peer = host.run("runuser --user=%s -- psql --username=postgres --dbname=inbox --command='SELECT 1'", user)
        assert 'Peer authentication failed for user "postgres"' in peer.stderr
    admin(host, "CREATE DATABASE other", "postgres")
    try:
        for role, password in passwords.items():
            for database in ("other", "postgres"):
                rc, said = ask(host, role, password, "SELECT 1", database)
                assert (rc, "no pg_hba.conf entry" in said) == (2, True)
    finally:
        admin(host, "DROP DATABASE other", "postgres")


@pytest.mark.parametrize(
    "query",
    [
        "CREATE TABLE mine (id int)",
        "CREATE SCHEMA mine",
        "ALTER TABLE event ADD COLUMN mine int",
        "DROP TABLE event",
        "TRUNCATE event",
        "CREATE INDEX mine ON event (id)",
        "CREATE ROLE mine",
        "CREATE DATABASE mine",
        "SET ROLE inbox_owner",
        "SET ROLE inbox_migrate",
        "SET ROLE inbox_app_2",
        "SELECT rolpassword FROM pg_authid",
        "COPY event TO PROGRAM 'cat'",
        "ALTER DATABASE inbox SET forge.environment = 'staging'",
    ],
)
def test_app_changes_rows_and_nothing_else(host: Host, passwords: dict[str, str], query: str) -> None:
    """Whatever is not reading and writing rows is refused to the app's role."""
    rc, said = ask(host, "inbox_app", passwords["inbox_app"], query)
    assert rc == 1
    assert re.search("permission denied|must be (owner|superuser)", said), said


def test_app_may_read_and_write_rows(host: Host, passwords: dict[str, str]) -> None:
    """In tables that a migration makes, the next ones as well."""
    migrate, app = passwords["inbox_migrate"], passwords["inbox_app"]
    assert ask(host, "inbox_migrate", migrate, "CREATE TABLE later (id serial, said text)")[0] == 0
    try:
        assert admin(host, "SELECT tableowner FROM pg_tables WHERE tablename = 'later'") == "inbox_owner"
        for query in ("INSERT INTO later (said) VALUES ('a')", "UPDATE later SET said = 'b'", "DELETE FROM later"):
            assert ask(host, "inbox_app", app, query)[0] == 0
        assert ask(host, "inbox_app", app, "SELECT count(*) FROM later JOIN event USING (id)") == (0, "0")
    finally:
        assert ask(host, "inbox_migrate", migrate, "DROP TABLE later")[0] == 0


def test_migrations_run_apart(host: Host, status: Status, live: str) -> None:
    """By a user of their own, into objects of the owner; its credential is not in the app's unit."""
    unit = f"inbox-migrate@{status()['live']['release']}.service"
    assert host.service(unit).systemd_properties["User"] == "inbox-migrate"
    journal = host.check_output("journalctl --no-pager --output=json --unit=%s SYSLOG_IDENTIFIER=inbox-migrate", unit)
    logged = [json.loads(line) for line in journal.splitlines()]
    assert {line["_UID"] for line in logged} == {str(host.user("inbox-migrate").uid)}
    assert any("0001" in line["MESSAGE"] for line in logged)
    owners = "SELECT DISTINCT relowner::regrole FROM pg_class WHERE relnamespace = 'public'::regnamespace"
    assert admin(host, owners) == "inbox_owner"
    assert "migrate" not in host.check_output("systemctl cat %s", live)


def test_other_environment_is_refused(host: Host, client: httpx.Client, live: str) -> None:
    """A database that is marked for another environment gets no request; put right, the app serves by itself."""
    cursor = host.check_output("journalctl --show-cursor --lines=0 | sed --quiet 's/^-- cursor: //p'")
    admin(host, "ALTER DATABASE inbox SET forge.environment = 'staging'", "postgres")
    try:
        host.check_output("systemctl restart %s", live)
        refusal = "FORGE_ENVIRONMENT is 'production' and the database is marked 'staging': refusing to use it"
        said = "journalctl --no-pager --output=cat --after-cursor=%s --identifier=inbox"
        until(lambda: refusal in host.check_output(said, cursor), 20)
        # The listener is systemd's: the request waits for an app that takes it.
        with pytest.raises(httpx.ReadTimeout):
            client.get("/ready", timeout=3)
    finally:
        admin(host, "ALTER DATABASE inbox SET forge.environment = 'production'", "postgres")
    assert until(lambda: client.get("/ready").status_code == 200, 30, every=0.5)


def test_connections_of_all_slots_fit(host: Host, status: Status) -> None:
    """Two slots side by side, each worker with its pool and its listener, the migration and the reserve."""
    settings = host.check_output("cat /etc/forge/apps/inbox.toml")
    (pool,) = (line.split('"')[1] for line in settings.splitlines() if line.startswith("FORGE_DATABASE_POOL_MAX"))
    needed = 2 * int(status()["workers"]["count"]) * (int(pool) + 1) + 2 + 2 + 5
    assert needed <= int(admin(host, "SHOW max_connections"))
